"""Small caches and n-best lists, finished or begun."""

from pathlib import Path

import numpy as np

from kd_plugin.cache.writer import CacheWriter
from kd_plugin.decoding import Hypothesis
from kd_plugin.sequences import HypothesisStore

HEADER = {
    "subset": "train",
    "k": 2,
    "temperatures": [2.0],
    "vocabulary": 9,
    "teachers": [{"path": "t.pt", "bytes": 3, "sha256": "0" * 64, "weight": 1.0, "overrides": {}}],
    "dictionaries": {"source": "1" * 64, "target": "2" * 64},
    "files": {"train.bin": "3" * 64},
    "settings": {"source_lang": "aa", "target_lang": "bb"},
}
LENGTHS, BATCHES = np.array([2, 1, 3]), [np.array([0, 1]), np.array([2])]


def targets(sentence: int) -> np.ndarray:
    return np.full(LENGTHS[sentence], 8)


def begin_cache(folder: Path) -> CacheWriter:
    writer = CacheWriter(str(folder), HEADER, LENGTHS, BATCHES, targets=targets)
    writer.begin()
    return writer


def add_batches(writer: CacheWriter, count: int) -> None:
    for batch in writer.batches[writer.done : count]:
        rows = int(LENGTHS[batch].sum())
        values = {"symbols": np.tile(np.array([8, 3]), (rows, 1))}
        for name, array in writer.types.items():
            values.setdefault(name, np.full((rows, *array.width), -1.5))
        writer.append({name: values[name].astype(a.dtype) for name, a in writer.types.items()})


def finish_cache(folder: Path) -> None:
    writer = begin_cache(folder)
    add_batches(writer, 2)
    assert writer.finish()


def begun_cache(folder: Path) -> None:
    writer = begin_cache(folder)
    add_batches(writer, 1)
    writer.close()


PLAN = [np.array([3, 1]), np.array([0, 2, 4])]


def hypotheses(folder: Path) -> HypothesisStore:
    return HypothesisStore(folder, {"teachers": [{"sha256": "1" * 64}], "generation": {"beam": 2}})


def begin_hypotheses(folder: Path) -> HypothesisStore:
    store = hypotheses(folder)
    store.begin(PLAN)
    return store


def add_lists(store: HypothesisStore, count: int) -> None:
    nbest = [Hypothesis("▁a b\u2028", -0.5, True), Hypothesis("", -2.0, False)]
    for batch in store.batches[store.done : count]:
        store.append({int(i): nbest for i in batch})


def finish_hypotheses(folder: Path) -> None:
    store = begin_hypotheses(folder)
    add_lists(store, 2)
    assert store.finish()


def begun_hypotheses(folder: Path) -> None:
    store = begin_hypotheses(folder)
    add_lists(store, 1)
    store.close()
