"""Translations that a teacher makes: fairseq checkpoints, decoded by fairseq or CTranslate2."""

import contextlib
import os
import shutil
import time
from abc import abstractmethod
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from fairseq import utils
from omegaconf import OmegaConf

from .. import decoding
from ..checkpoints import Checkpoint, Role, parse_overrides
from ..decoding import Corpus, databin
from ..export import ExportError, export_ctranslate2
from ..files import FileError, digest, temporary
from ..timing import progress_bar
from .asked import Opened
from .hypotheses import HypothesisStore
from .origin import Origin

ROLE = Role("teacher", "--trust-checkpoint", overrides="--model-overrides", task="--task")


class Engine(NamedTuple):
    """What decodes a corpus.

    Attributes:
        decode: turns collated batches into n-best lists, in turn.
        positions: the longest source and target of each model.
        corpus: its sentences as the models read them.
    """

    decode: Callable[[Any], Any]
    positions: List[Any]
    corpus: Corpus


class Decoded(Origin):
    """Translations that are made now, batch by batch, by whatever ``engine`` gives."""

    def __init__(self, opened: Opened) -> None:
        super().__init__(opened)
        default = "float16" if opened.device.type == "cuda" else "int8"
        self.compute_type = opened.asked.compute_type or default  # CTranslate2's

    @abstractmethod
    def teachers(self) -> Dict[str, Any]:
        """What the header says of them."""

    @abstractmethod
    def engine(self, store: HypothesisStore, corpus: Corpus) -> Engine:
        """Open the models, or convert them, beside the store.

        Raises:
            UserError: they cannot be opened, or cannot decode this.
        """

    def header(self) -> Dict[str, Any]:
        asked, cfg = self.opened.asked, self.opened.cfg
        of_fairseq = asked.engine == "fairseq"
        return {
            **self.teachers(),
            "task": cfg.task._name,
            **decoding.describe(self.opened.data, self.opened.subset, asked.source_text, cfg.task),
            "source_text_encoding": decoding.describe_text(cfg) if asked.source_text else None,
            "engine": asked.engine,
            "precision": str(self.opened.dtype) if of_fairseq else self.compute_type,
            "generation": OmegaConf.to_container(cfg.generation),
            "seed": cfg.common.seed,
            "max_tokens": cfg.dataset.max_tokens,
            "batch_size": cfg.dataset.batch_size,
            "required_batch_size_multiple": cfg.dataset.required_batch_size_multiple,
        }

    def fill(self, store: HypothesisStore, corpus: Corpus, make_room: Callable[[], None]) -> bool:
        cfg = self.opened.cfg
        engine = self.engine(store, corpus)
        plan = None
        if not store.planned:
            plan = decoding.plan(
                self.opened.task,
                engine.corpus.dataset,
                engine.positions,
                max_tokens=cfg.dataset.max_tokens,
                max_sentences=cfg.dataset.batch_size,
                required_multiple=cfg.dataset.required_batch_size_multiple,
                seed=cfg.common.seed,
            )
        make_room()
        with contextlib.closing(store):
            start = time.perf_counter()
            sentences, tokens = decode(
                *(engine.corpus, engine, store, plan), num_workers=cfg.dataset.num_workers
            )
            seconds = max(time.perf_counter() - start, 1e-9)
            print(
                f"Translated {sentences:,} sentences ({tokens:,} tokens) in {seconds:.1f}s "
                f"({sentences / seconds:.2f} sentences/s, {tokens / seconds:.2f} tokens/s)",
                flush=True,
            )
            return store.finish()

    def ctranslate2(self, reading: Any, folder: Path, longest: int) -> decoding.CTranslate2Engine:
        """CTranslate2 with the model in a folder.

        Args:
            reading: what it reads and writes.
            longest: target that it can write.
        """
        device = self.opened.device
        return decoding.CTranslate2Engine(
            reading,
            folder,
            self.opened.cfg.generation,
            device=device.type,
            device_index=device.index or 0,
            compute_type=self.compute_type,
            max_positions=longest,
        )


class DecodedByCheckpoints(Decoded):
    """Translations of one checkpoint, or of an ensemble."""

    def __init__(self, opened: Opened) -> None:
        asked, cfg = opened.asked, opened.cfg
        self.paths = utils.split_paths(cfg.common_eval.path)
        self.overrides = parse_overrides(cfg.common_eval.model_overrides, "--model-overrides")
        if cfg.task._name == "translation" and not asked.task_given:
            task = decoding.own_task(cfg, opened.task, self.paths, ROLE, asked.trust)
            opened = opened._replace(task=task)
        super().__init__(opened)

    def teachers(self) -> Dict[str, Any]:
        files = [{"sha256": digest(path), "bytes": os.path.getsize(path)} for path in self.paths]
        return {
            "teachers": files,
            "overrides": {str(k): repr(v) for k, v in self.overrides.items()},
        }

    def engine(self, store: HypothesisStore, corpus: Corpus) -> Engine:
        opened = self.opened
        asked, cfg, task = opened.asked, opened.cfg, opened.task
        checkpoints = decoding.open_checkpoints(
            *(self.paths, task, ROLE), overrides=self.overrides, trust=asked.trust
        )
        if asked.task_given:
            checkpoints = [checkpoint.as_task(cfg.task._name) for checkpoint in checkpoints]
        if asked.engine == "ctranslate2":
            folder = store.beside("ctranslate2", "teachers", "files")
            langs = cfg.task.source_lang, cfg.task.target_lang
            convert_for_ctranslate2(checkpoints[0], task, langs, folder)
            positions = checkpoints[0].max_positions
            converted = self.ctranslate2(decoding.SymbolReading(task), folder, positions[1])
            return Engine(converted.decode, [positions], corpus)
        models = decoding.build_models(
            *(checkpoints, task, self.overrides, cfg), device=opened.device, dtype=opened.dtype
        )
        engine = decoding.FairseqEngine(task, models, cfg.generation, cfg.common.seed, corpus.data)
        unused = [] if engine.refines else decoding.refining_flags(cfg.generation)
        if unused:
            raise FileError(f"{', '.join(unused)}: for teachers that are not autoregressive")
        return Engine(engine.decode, [model.max_positions() for model in models], corpus)


def convert_for_ctranslate2(
    checkpoint: Checkpoint, task: Any, langs: Tuple[str, str], folder: Path
) -> Path:
    """A teacher as CTranslate2 reads it, kept in ``folder`` for the next time.

    Args:
        task: has the dictionaries of ``langs``.

    Raises:
        FileError: CTranslate2 is not installed, or takes no such model.
    """
    dictionaries = task.source_dictionary, task.target_dictionary
    try:
        return keep(
            folder, lambda new: export_ctranslate2(checkpoint, *dictionaries, langs, folder=new)
        )
    except ExportError as error:
        reason = str(error).rstrip(".")
        raise FileError(f"--engine ctranslate2: {reason}. --engine fairseq takes any.") from error


def keep(folder: Path, write: Callable[[Path], Any]) -> Path:
    """A conversion that is kept for the next time, whole or not there.

    Args:
        write: makes it, in a new folder.
    """
    if (folder / "model.bin").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = temporary(folder)
    try:
        write(new)
        with contextlib.suppress(OSError):  # another process was first
            os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def decode(
    corpus: Corpus,
    engine: Any,
    store: HypothesisStore,
    plan: Optional[Sequence[np.ndarray]],
    *,
    num_workers: int,
) -> Tuple[int, int]:
    """Decode one shard, from where it stopped.

    Args:
        engine: has ``decode``, which turns collated batches into n-best lists, in turn.
        plan: the sentences of each batch; None if the store has one.

    Returns:
        numbers of sentences and of subwords that were decoded now.
    """
    store.begin(plan)
    if any((batch >= len(corpus.dataset)).any() for batch in store.batches):
        raise FileError(f"{store.folder} is a plan for other sentences")
    total = sum(map(len, store.batches))
    before = sum(map(len, store.batches[: store.done]))
    batches: Any = store.batches[store.done :]
    loader = torch.utils.data.DataLoader(
        corpus.dataset,
        batch_sampler=batches,
        collate_fn=corpus.dataset.collater,
        num_workers=num_workers,
        worker_init_fn=store.shards.release,
    )
    subwords = 0
    with progress_bar(total, "decoding", "sentences", before) as progress:
        for nbest in engine.decode(loader):
            store.append(nbest)
            # of text: its words
            subwords += sum(len(databin.words(n[0][0])) + 1 for n in nbest.values())
            progress.update(len(nbest))
    return total - before, subwords
