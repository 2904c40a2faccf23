"""The cache on its own: what is written, what kills and damage leave behind, what is read again."""

import contextlib
import copy
import importlib
import json
import logging
import math
import multiprocessing
import os
import pickle
import shutil
import signal as signals
import sys
import zlib
from argparse import Namespace
from itertools import permutations
from pathlib import Path
from typing import Any, Dict, List, NamedTuple

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary, LanguagePairDataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kills import at_each_line, in_a_child
from support import tree
from trainer import new_task

from kd_plugin import files
from kd_plugin import shards as store
from kd_plugin.cache import (
    CachedSubset,
    CacheError,
    TaughtDataset,
    layout,
    reader,
    writer,
)
from kd_plugin.cache.writer import CacheWriter, teacher_rows
from kd_plugin.checkpoints import TRANSLATION
from kd_plugin.commands import cache as command
from kd_plugin.commands.cache import _temperatures
from kd_plugin.files import FileError
from kd_plugin.objective import chunks as objective
from kd_plugin.objective import divergences
from kd_plugin.objective.answer import CachedAnswer, Dense, Member, RunningAnswer
from kd_plugin.objective.chunks import Settings
from kd_plugin.objective.divergences import divergence
from kd_plugin.objective.selection import Selection
from kd_plugin.teachers import Student

V, K, TEMPERATURES = 29, 5, (0.5, 2.0)
# of a float16's 11 bits; log-probabilities down to -16 nats
HALF = dict(rtol=2.0**-11, atol=1e-6)
DATA = {
    "dictionaries": {"source": "1" * 64, "target": "2" * 64},
    "files": {"train.aa-bb.aa.bin": "3" * 64, "train.aa-bb.bb.bin": "4" * 64},
    "data": {"train.aa-bb.aa.bin": "5" * 64, "train.aa-bb.bb.bin": "6" * 64},
    "settings": {"source_lang": "aa", "target_lang": "bb", "truncate_source": 7},
}
ARRAYS = ("offsets", "symbols", "log_probs", "reference", "entropy", "rests")
FILES = (*ARRAYS, "blocks")


class Case(NamedTuple):
    """Some sentences and what a teacher says of them."""

    header: Dict[str, Any]
    lengths: np.ndarray
    batches: List[np.ndarray]
    logits: List[torch.Tensor]  # of each sentence
    targets: List[torch.Tensor]
    rows: List[Dict[str, np.ndarray]]  # of each batch, as they are appended

    def writer(self, cache, num_shards=1, shard_id=0, **header):
        return CacheWriter(
            *(str(cache), {**self.header, **header}, self.lengths, self.batches),
            targets=self.target,
            num_shards=num_shards,
            shard_id=shard_id,
        )

    def write(self, cache, num_shards=1, shard_id=0, **header):
        """The whole command, once: True if the cache is complete."""
        shard = self.writer(cache, num_shards, shard_id, **header)
        shard.begin()
        self.append(shard)
        return shard.finish()

    def append(self, shard):
        mine = self.rows[shard.shards.shard_id :: shard.shards.num_shards]
        while shard.done < len(shard.batches):
            shard.append(mine[shard.done])

    def target(self, sentence):
        return self.targets[sentence].numpy()


def uniform_of(sentence, rows, samples):
    return writer.uniform_of_sentence(1, sentence, rows, samples)


def make_case(folder, sentences=17, k=K, temperatures=TEMPERATURES, seed=0, samples=0) -> Case:
    generator = np.random.RandomState(seed)
    lengths = generator.randint(1, 7, sentences)
    lengths[[3, 11]] = 0  # the teacher cannot read these
    teacher = folder / "teacher.pt"
    teacher.write_bytes(b"weights")
    header = {
        "subset": "train",
        "k": k,
        "temperatures": list(temperatures),
        "vocabulary": V,
        "teachers": [
            {
                "path": str(teacher),
                "bytes": 7,
                "sha256": layout.digest(str(teacher)),
                "weight": 1.0,
                "overrides": {},
            }
        ],
        "teacher_dtype": "torch.float32",
        **copy.deepcopy(DATA),
    }
    order = generator.permutation(np.flatnonzero(lengths))
    batches = np.split(order, [2, 5, 6, 10, 12])
    logits = [torch.from_numpy(generator.randn(n, V).astype("f4") * 2) for n in lengths]
    targets = [torch.from_numpy(generator.randint(4, V, n)) for n in lengths]
    rows = [
        teacher_rows(
            Dense(torch.cat([logits[i] for i in batch])),
            torch.cat([targets[i] for i in batch]),
            *(k, temperatures),
            np.concatenate([uniform_of(i, lengths[i], samples) for i in batch])
            if samples
            else None,
        )
        for batch in batches
    ]
    if samples:
        header["tail_samples"] = samples
    return Case(header, lengths, batches, logits, targets, rows)


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    return make_case(tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def finished(case, tmp_path_factory) -> Path:
    """A cache whose writing nothing disturbed; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    assert case.write(folder)
    return folder


@pytest.fixture
def cache(finished, tmp_path) -> Path:
    """A copy to damage."""
    shutil.copytree(str(finished), str(tmp_path / "cache"))
    return tmp_path / "cache"


def change(cache, **fields):
    """With the right checksum: made so, not damaged."""
    found = json.loads((cache / "train" / "manifest.json").read_text())
    layout.write_manifest(cache / "train", {**found, **fields})


def write_checksums(cache):
    """Of what the files hold now."""
    found = {p.stem: layout.checksum(p) for p in (cache / "train").glob("*.bin")}
    del found["blocks"]
    change(cache, checksums=found)
    names = sorted({*found} - {"offsets"}, key=(*ARRAYS, "drawn").index)
    content = [(cache / "train" / f"{name}.bin").read_bytes() for name in names]
    blocks = [zlib.crc32(c[i : i + 65536]) for c in content for i in range(0, len(c), 65536)]
    np.array(blocks, dtype="<u4").tofile(str(cache / "train" / "blocks.bin"))


def opened(cache, data=DATA, subset="train"):
    return CachedSubset(str(cache), subset, lambda whole: data)


def refusal(cache, data=DATA, subset="train"):
    """When it is opened or, of damage that is only found then, when it is read."""
    with pytest.raises(FileError) as error:
        opened(cache, data, subset).verify()
    return str(error.value)


# rows


def log_softmax(logits):
    """In float64, by numpy."""
    z = np.asarray(logits, dtype=np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def expected_rows(logits, target, k, temperatures):
    log_p = log_softmax(logits)
    symbols = np.argsort(-log_p, axis=-1, kind="stable")[:, :k]
    others = log_p.copy()
    np.put_along_axis(others, symbols, -np.inf, -1)
    with np.errstate(divide="ignore"):
        rests = [np.log(np.exp(others / t).sum(-1)) for t in temperatures]
        p = np.exp(log_p)
        entropy = -np.where(p > 0, p * np.where(p > 0, log_p, 0), 0).sum(-1)
    return {
        "symbols": symbols,
        "log_probs": np.take_along_axis(log_p, symbols, -1),
        "reference": np.take_along_axis(log_p, np.asarray(target)[:, None], -1)[:, 0],
        "entropy": entropy,
        "rests": np.stack(rests, -1) if rests else np.empty((len(log_p), 0)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 8, V - 1, V])
def test_rows_against_numpy(k, dtype):
    generator = torch.Generator().manual_seed(k)
    logits = (3 * torch.randn(50, V, generator=generator, dtype=torch.float64)).to(dtype)
    logits[:20, 7] = -math.inf  # a symbol that the teacher does not have
    target = torch.randint(0, V, (50,), generator=generator)
    target[0] = 7
    found = teacher_rows(Dense(logits), target, k, TEMPERATURES)
    expected = expected_rows(logits.double(), target, k, TEMPERATURES)
    assert set(found) == set(ARRAYS) - {"offsets"} - ({"rests"} if k == V else set())
    assert found["symbols"].dtype == "<u2"
    assert found["symbols"].tolist() == expected["symbols"].tolist()
    for name in set(found) - {"symbols"}:
        assert found[name].dtype == "<f2" and found[name].shape == expected[name].shape
        np.testing.assert_allclose(found[name].astype("f8"), expected[name], err_msg=name, **HALF)
    assert found["reference"][0] == -math.inf


def test_no_temperature_but_1_needs_no_rests():
    assert "rests" not in teacher_rows(Dense(torch.zeros(2, V)), torch.zeros(2).long(), K, [])


def test_what_is_too_low_for_half_precision_is_its_lowest():
    logits = torch.tensor([[0.0, -1e6, -math.inf, -2e6]])
    found = teacher_rows(Dense(logits), torch.tensor([3]), 3, [2.0])
    lowest = float(np.finfo(np.float16).min)
    assert found["log_probs"].tolist() == [[0, lowest, lowest]]  # symbol 3
    assert found["symbols"].tolist() == [[0, 1, 3]]
    assert found["reference"] == lowest and found["rests"] == -math.inf
    assert np.isfinite(found["entropy"]).all()


def test_symbols_beyond_two_bytes():
    logits = torch.zeros(1, (1 << 16) + 1)
    logits[0, 1 << 16] = 5.0
    found = teacher_rows(Dense(logits), torch.tensor([0]), 1, [])
    assert found["symbols"].dtype == "<u4" and found["symbols"].tolist() == [[1 << 16]]
    logits = torch.zeros(1, 1 << 16)
    logits[0, -1] = 5.0
    found = teacher_rows(Dense(logits), torch.tensor([0]), 1, [])
    assert found["symbols"].dtype == "<u2" and found["symbols"].tolist() == [[(1 << 16) - 1]]


# symbols drawn from the tail

DRAWS = 4000


@pytest.mark.parametrize("samples", [1, 3])
def test_each_share_of_the_mass_is_drawn_as_often_as_it_is_likely(samples):
    """Over a fine grid of all random numbers, a count is its probability to the grid's width."""
    p = torch.tensor([[0.0, 0.2, 0.05, 0.0, 0.75], [0.5, 0.0, 0.1, 0.4, 0.0]], dtype=torch.float64)
    grid = (np.arange(1000) + 0.5) / 1000
    counts = torch.zeros_like(p)
    for u in grid:
        drawn = writer.draw(p.log(), torch.full((2, samples), u, dtype=torch.float64))
        assert drawn.shape == (2, samples)
        counts += torch.nn.functional.one_hot(drawn, 5).sum(1)
    torch.testing.assert_close(counts / (1000 * samples), p, rtol=0, atol=1e-3)
    assert (counts[p == 0] == 0).all()


def test_a_draw_at_the_edges():
    p = torch.tensor([[0.0, 0.5, 0.5, 0.0]]).log()
    drawn = writer.draw(p, torch.tensor([[0.0, 0.999]], dtype=torch.float64))
    assert drawn.tolist() == [[1, 2]]
    nothing = writer.draw(torch.full((1, 4), -math.inf), torch.zeros(1, 2, dtype=torch.float64))
    assert nothing.shape == (1, 2) and (nothing < 4).all()


def drawn_answer(logits, target, temperature, samples, trial):
    """From a cache of 5 symbols and some drawn ones; the numbers exact, in float64."""
    arrays = expected_rows(logits, target, 5, [temperature])
    uniform = writer.uniform_of_sentence(1, trial, len(target), samples)
    tempered = torch.log_softmax(logits / temperature, dim=-1)
    arrays["tempered_entropy"] = -(tempered.exp() * tempered).sum(-1).numpy()
    arrays["drawn"] = teacher_rows(Dense(logits), target, 5, [temperature], uniform)["drawn"]
    arrays["drawn"] = arrays["drawn"].astype("i4")
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    real = torch.ones(1, len(target), dtype=torch.bool)
    return CachedAnswer(tensors, real, [temperature], False)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("samples", [1, 4])
def test_draws_are_right_on_average(temperature, samples):
    """Value and gradient are forward-kl's, within the error of the mean of independent draws.

    With m the tail's mass and t_j = p_j / m, the estimate of p_j has the variance m^2 t_j (1 - t_j)
    / S, that of the value m^2 Var_t(log q) / S; draws from equal shares have at most these.
    """
    generator = torch.Generator().manual_seed(5)
    student, teacher = torch.randn(2, 6, V, generator=generator, dtype=torch.float64).mul(2)
    student.requires_grad_()
    target = torch.randint(0, V, (6,), generator=generator)
    rows = torch.arange(6)
    flags = Settings(1.0, None, temperature, tail="sample")
    exact = RunningAnswer([Member("t", lambda index: teacher[index])])

    def values(answer):
        terms = objective.distillation_objective(student, target, rows, answer, flags)
        return terms.kd, torch.autograd.grad(terms.loss, student)[0]

    found = [values(drawn_answer(teacher, target, temperature, samples, i)) for i in range(DRAWS)]
    flags = flags._replace(tail="bucket")
    value, gradient = values(exact)

    p, log_q = (torch.log_softmax(z.detach() / temperature, -1) for z in (teacher, student))
    p = p.exp()
    t = p.scatter(-1, p.topk(5).indices, 0)
    m = t.sum(-1, keepdim=True)
    t = t / m
    of_p = m**2 * t * (1 - t) / samples
    spread = (t * log_q**2).sum(-1) - (t * log_q).sum(-1) ** 2
    of_value = m.squeeze(-1) ** 2 * spread / samples
    for mean, right, variance in (
        (torch.stack([v for v, _ in found]).mean(0), value, of_value),
        # c(T) = T^2, and 1 / T of the tempered logits
        (torch.stack([g for _, g in found]).mean(0), gradient, of_p * temperature**2),
    ):
        # 4.5 standard errors: once in a thousand tests of this size
        assert ((mean - right).abs() <= 4.5 * (variance / DRAWS).sqrt() + 1e-9).all()


def test_draws_of_a_row_depend_on_its_sentence_and_position_alone():
    first = writer.uniform_of_sentence(7, 3, 6, 4)
    assert first.shape == (6, 4) and ((first >= 0) & (first < 1)).all()
    np.testing.assert_array_equal(first[:2], writer.uniform_of_sentence(7, 3, 2, 4))
    for other in ((7, 4, 6, 4), (8, 3, 6, 4)):
        assert not np.isclose(first, writer.uniform_of_sentence(*other)).any()


@pytest.mark.parametrize("samples", [0, 4])
def test_k_of_the_whole_vocabulary_needs_no_draws(samples):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 8, V, generator=generator, dtype=torch.float64)
    target = torch.zeros(8, dtype=torch.long)
    uniform = np.zeros((8, samples)) if samples else None
    arrays = teacher_rows(Dense(teacher), target, V, [1.0], uniform)
    assert set(arrays) == {"symbols", "log_probs", "reference", "entropy"}
    arrays["symbols"] = arrays["symbols"].astype("i4")
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    cached = CachedAnswer(tensors, torch.ones(1, 8, dtype=torch.bool), [1.0], True)
    online = RunningAnswer([Member("t", lambda rows: teacher[rows])])
    found = [
        objective.distillation_objective(
            student, target, torch.arange(8), answer, Settings(1.0, tail=tail)
        ).kd
        for answer, tail in ((cached, "sample"), (online, "bucket"))
    ]
    torch.testing.assert_close(*found, rtol=4e-3, atol=4e-3)


def test_a_cache_with_draws(tmp_path):
    case = make_case(tmp_path, temperatures=[1.0], samples=3)
    assert case.write(tmp_path / "cache")
    for shard in range(2):
        case.write(tmp_path / "shards", 2, shard)
    assert tree(tmp_path / "shards") == tree(tmp_path / "cache")
    found = opened(tmp_path / "cache")
    assert found.samples == 3 and found.rows(0)["drawn"].shape == (case.lengths[0], 3)
    for i in np.flatnonzero(case.lengths):
        rows = found.rows(i)
        for symbols, drawn in zip(rows["symbols"], rows["drawn"]):
            assert not set(symbols) & set(drawn)
    old = opened(case_without_draws(tmp_path))
    assert not found.compatible_with(old)
    path = tmp_path / "cache" / "train" / "drawn.bin"
    content = bytearray(path.read_bytes())
    content[:2] = b"\xff\xff"
    path.write_bytes(bytes(content))
    write_checksums(tmp_path / "cache")
    assert "drawn.bin is damaged: symbol 65535" in refusal(tmp_path / "cache")


def case_without_draws(folder):
    assert make_case(folder, temperatures=[1.0]).write(folder / "old")
    return folder / "old"


# training from them


def signals_of(logits, target, k, temperatures, exact):
    """The same teacher online and cached; exact: in float64, computed by numpy."""
    online = RunningAnswer([Member("t", lambda rows: logits[rows])])
    if exact:
        arrays = expected_rows(logits, target, k, temperatures)
        if k == V:
            del arrays["rests"]
    else:
        arrays = teacher_rows(Dense(logits), target, k, temperatures)
        arrays["symbols"] = arrays["symbols"].astype("i4")
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    real = torch.ones(1, len(target), dtype=torch.bool)
    return online, CachedAnswer(tensors, real, temperatures, k == V)


def both_ways(name, tail, temperature, k, top_k, exact, temperatures=(2.0,), **more):
    """Terms and gradient, online and from a cache of k symbols, cut to top_k of them."""
    generator = torch.Generator().manual_seed(k + top_k)
    student, teacher = torch.randn(2, 40, V, generator=generator, dtype=torch.float64).mul(2)
    student.requires_grad_()
    target = torch.randint(0, V, (40,), generator=generator)
    rows = torch.arange(1, 40, 2)
    found = []
    for word in signals_of(teacher, target, k, temperatures, exact):
        online = isinstance(word, RunningAnswer)
        flags = Settings(
            *(0.7, None, temperature, 0.1, divergence(name)),
            top_k=(top_k or k) if online else top_k,
            tail=tail,
            with_metrics=True,
            **more,
        )
        terms = objective.distillation_objective(student, target, rows, word, flags)
        found.append((terms, torch.autograd.grad(terms.loss, student)[0]))
    return found


CUTS = [(V, 0), (V, V), (V, 4), (8, 0), (8, 8), (8, 4), (1, 0)]


@pytest.mark.parametrize("exact", [True, False], ids=["float64", "float16"])
@pytest.mark.parametrize("name", divergences.NAMES)
def test_cached_is_online(name, exact):
    """Exactly as long as the rows are exact; else to their precision. V of V: as if not cut."""
    tolerance = dict(rtol=1e-9, atol=1e-10) if exact else dict(rtol=4e-3, atol=4e-3)
    compared = 0
    for k, top_k in CUTS:
        for tail in ("renormalise", "bucket"):
            for temperature in (1.0, 2.0):
                if name == "logit-mse" and (tail == "bucket" or temperature != 1):
                    continue
                (online, there), (cached, here) = both_ways(
                    name, tail, temperature, k, top_k, exact
                )
                where = str((k, top_k, tail, temperature))
                for term in ("loss", "kd"):
                    a, b = getattr(cached, term), getattr(online, term)
                    torch.testing.assert_close(a, b, msg=where + term, **tolerance)
                close = torch.isclose(here, there, **tolerance).all(-1)
                # tvd's gradient jumps where p = q
                assert close.double().mean() > 0.9 if name == "tvd" else close.all(), where
                torch.testing.assert_close(
                    cached.tokens.teacher_nll, online.tokens.teacher_nll, **tolerance
                )
                assert cached.agree.tolist() == online.agree.tolist()
                compared += 1
    assert compared >= len(CUTS)


def test_renormalise_at_any_temperature_and_more_temperatures_than_one():
    for temperature in (0.3, 1.7, 5.0):
        (online, there), (cached, here) = both_ways("js", "renormalise", temperature, 8, 0, True)
        torch.testing.assert_close(cached.kd, online.kd, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-10)
    for temperature in (0.5, 2.0, 3.0):
        (online, there), (cached, here) = both_ways(
            *("forward-kl", "bucket", temperature, 8, 4, True), temperatures=(3.0, 0.5, 2.0)
        )
        torch.testing.assert_close(cached.kd, online.kd, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-10)


def test_a_rest_at_temperature_1_is_kept_on_request():
    """Of a teacher so sure that one minus the K's rounded probabilities says nothing of it."""
    logits = torch.tensor([[9.0, 8.99, 8.98, *([-5.0] * (V - 3))]], dtype=torch.float64)
    _, cached = signals_of(logits, torch.tensor([0]), 3, (1.0, 2.0), False)
    exact = Dense(torch.log_softmax(logits, -1)).top(3, 1.0, True).rest
    word = cached.rows(torch.tensor([0]), logits)
    torch.testing.assert_close(word.top(3, 1.0, True).rest, exact, rtol=1e-3, atol=1e-6)
    for tail in ("bucket", "renormalise"):
        (online, there), (found, here) = both_ways(
            "reverse-kl", tail, 1.0, 8, 4, True, temperatures=(1.0, 2.0)
        )
        torch.testing.assert_close(found.kd, online.kd, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-10)


def test_without_rests_the_bucket_works_at_temperature_1():
    """The default: fairseq-kd-cache without --temperatures."""
    (online, there), (cached, here) = both_ways(
        "forward-kl", "bucket", 1.0, 8, 0, False, temperatures=()
    )
    torch.testing.assert_close(cached.kd, online.kd, rtol=4e-3, atol=4e-3)
    torch.testing.assert_close(here, there, rtol=4e-3, atol=4e-3)


def test_a_rest_smaller_than_half_precision_can_tell():
    """The K's mass, rounded, may exceed 1: value and gradient stay finite."""
    logits = torch.tensor([[9.0, 8.99, 8.98, *([-20.0] * (V - 3))]])
    _, cached = signals_of(logits, torch.tensor([0]), 3, (), False)
    cached.arrays["log_probs"] = cached.arrays["log_probs"] + 2e-3
    student = torch.zeros(1, V, requires_grad=True)
    for name in ("forward-kl", "reverse-kl", "js", "skew-kl"):
        terms = objective.distillation_objective(
            *(student, torch.tensor([0]), torch.tensor([0]), cached),
            Settings(1.0, divergence=divergence(name)),
        )
        (gradient,) = torch.autograd.grad(terms.loss, student)
        assert terms.loss.isfinite() and gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("selected", ["teacher-correct", "teacher-better"])
@pytest.mark.parametrize("exact", [True, False], ids=["float64", "float16"])
def test_selection_asks_the_cache(selected, exact):
    (online, _), (cached, _) = both_ways(
        "forward-kl", "bucket", 2.0, 8, 0, exact, selection=Selection(selected)
    )
    assert 0 < online.selected.sum() < len(online.selected)
    assert cached.selected.tolist() == online.selected.tolist()


def test_entropy_and_adaptive_weight_come_from_the_cache():
    found = both_ways(
        *("forward-kl", "bucket", 1.0, 8, 0, False),
        selection=Selection("teacher-entropy"),
        adaptive=True,
    )
    (online, _), (cached, _) = found
    torch.testing.assert_close(
        *(cached.tokens.teacher_entropy, online.tokens.teacher_entropy), rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(cached.kd_weight, online.kd_weight, rtol=2e-3, atol=1e-4)
    assert online.kd_weight.std() > 0.05


def test_a_row_that_is_not_finite_is_found():
    _, cached = signals_of(torch.zeros(3, V), torch.zeros(3).long(), K, (), False)
    cached.arrays["log_probs"][1] = math.nan
    with pytest.raises(objective.NotFiniteTeacherError) as error:
        objective.distillation_objective(
            *(torch.zeros(3, V), torch.zeros(3).long(), torch.arange(3), cached, Settings())
        )
    assert error.value.rows.tolist() == [1] and "cache" in error.value.teachers


# writing


def test_a_cache_holds_every_row_in_the_order_of_the_data(case, finished):
    cache = opened(finished)
    assert len(cache) == len(case.lengths) and not cache.whole
    assert cache.lengths().tolist() == case.lengths.tolist()
    for i, logits in enumerate(case.logits):
        expected = teacher_rows(Dense(logits), case.targets[i], K, TEMPERATURES)
        found = cache.rows(i)
        assert set(found) == set(expected)
        for name in found:
            assert found[name].tobytes() == expected[name].tobytes(), (i, name)
    assert set(tree(finished)) == {"train/" + name + ".bin" for name in FILES} | {
        "train/manifest.json"
    }


def test_summary(case, finished):
    summary = json.loads((finished / "train" / "manifest.json").read_text())["summary"]
    log_p = log_softmax(torch.cat(case.logits))
    target = torch.cat(case.targets).numpy()
    covered = np.sort(np.exp(log_p), -1)[:, -K:].sum(-1)
    expected = {
        "bytes": sum(len(b) for name, b in tree(finished).items() if name.endswith(".bin"))
        - 4 * len(ARRAYS[1:]),  # checksums
        "covered_mean": covered.mean(),
        "covered_1st_percentile": np.sort(covered)[0],
        "nll_loss": -log_p[np.arange(len(target)), target].mean() / math.log(2),
        "entropy": -(np.exp(log_p) * log_p).sum(-1).mean() / math.log(2),
        "agreement": (log_p.argmax(-1) == target).mean(),
        "calibration_error": calibration_error(log_p, target),
        "tail_bits": kl_to_head_and_uniform_tail(log_p) / math.log(2),
    }
    expected["bytes_per_token"] = expected["bytes"] / len(target)
    assert summary == pytest.approx(expected, rel=1e-3, abs=2e-3)


def calibration_error(log_p, target):
    sure, right = np.exp(log_p).max(-1), log_p.argmax(-1) == target
    error = 0.0
    for low in np.arange(10) / 10:
        there = (sure >= low) & (sure < low + 0.1)
        if there.any():
            error += there.mean() * abs(sure[there].mean() - right[there].mean())
    return error


def kl_to_head_and_uniform_tail(log_p):
    other = log_p.copy()
    for row in other:
        tail = np.argsort(row)[: V - K]
        row[tail] = np.log(np.exp(row[tail]).mean())
    return (np.exp(log_p) * (log_p - other)).sum(-1).mean()


@pytest.mark.parametrize("shards", [2, 3, 8])
def test_shards_in_any_order_are_one_run_byte_for_byte(case, finished, tmp_path, shards):
    orders = list(permutations(range(shards))) if shards < 4 else [range(shards)]
    for i, order in enumerate(orders):
        cache = tmp_path / str(i)
        ended = [case.write(cache, shards, shard) for shard in order]
        assert ended == [False] * (shards - 1) + [True]
        assert tree(cache) == tree(finished)


def test_shards_that_write_at_the_same_time(case, finished, tmp_path):
    both = [case.writer(tmp_path, 2, i) for i in (0, 1)]
    for shard in both:
        shard.begin()
    for row in range(3):
        for shard in both:
            shard.append(case.rows[2 * row + shard.shards.shard_id])
    assert [shard.finish() for shard in both] == [False, True]
    assert tree(tmp_path) == tree(finished)


def test_a_finished_command_again_changes_nothing(case, cache):
    files = list(cache.rglob("*"))
    before = [(f.stat().st_mtime_ns, f.stat().st_ino) for f in files]
    for shards in (1, 2):
        shard = case.writer(cache, shards)
        shard.begin()
        assert shard.done == len(shard.batches) and shard.finish()
    assert list(cache.rglob("*")) == files
    assert [(f.stat().st_mtime_ns, f.stat().st_ino) for f in files] == before


@pytest.mark.parametrize("at", range(6))
def test_two_shards_that_merge_at_the_same_time(case, finished, tmp_path, monkeypatch, at):
    """One completes, and cleans up, while the other is in the middle: at its ``at``-th array."""
    case.write(tmp_path, 2, 0)
    slow, fast = case.writer(tmp_path, 2, 1), case.writer(tmp_path, 2, 0)
    slow.begin()
    case.append(slow)
    real, calls = writer.all_or_nothing, []

    @contextlib.contextmanager
    def interrupted(path):
        with real(path) as file:
            calls.append(path)
            if len(calls) == at + 1:
                fast.begin()
                assert fast.finish()
            yield file

    monkeypatch.setattr(writer, "all_or_nothing", interrupted)
    assert slow.finish()
    assert len(calls) > at
    assert tree(tmp_path) == tree(finished)


MODULES = (files, store, layout, writer)  # in which a process is killed


@pytest.mark.parametrize("shards", [1, 2])
def test_killed_at_any_line(case, finished, tmp_path, shards):
    """A real SIGKILL; then the same command makes what an undisturbed one makes."""
    lines = []
    before = sys.gettrace()

    def prepared(folder):
        for other in range(1, shards):
            case.write(folder, shards, other)
        return folder

    try:
        prepared(tmp_path / "count")
        at_each_line(lambda: lines.append(0), *MODULES)
        case.write(tmp_path / "count", shards, 0)
    finally:
        sys.settrace(before)
    assert len(lines) > 300
    partial = 0
    for moment in range(1, len(lines), len(lines) // 25):
        cache = prepared(tmp_path / str(moment))

        def killed(cache=cache, moment=moment):
            left = [moment]

            def kill():
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signals.SIGKILL)

            at_each_line(kill, *MODULES)
            case.write(cache, shards, 0)

        status = in_a_child(killed)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signals.SIGKILL, moment
        partial += (cache / "train" / "partial").is_dir()
        if not (cache / "train" / "manifest.json").is_file() and (cache / "train").is_dir():
            assert "is not finished" in refusal(cache) or "no cache" in refusal(cache)
        assert case.write(cache, shards, 0)
        assert tree(cache) == tree(finished), moment
        shutil.rmtree(str(cache))
    assert partial > 10


@pytest.fixture(scope="module")
def written(case, tmp_path_factory):
    """All is in the shard's files, but it is not finished."""
    folder = tmp_path_factory.mktemp("written")
    shard = case.writer(folder)
    shard.begin()
    case.append(shard)
    return folder


@settings(deadline=None, max_examples=60)
@given(shares=st.lists(st.floats(0, 1), min_size=5, max_size=5), missing=st.sets(st.integers(0, 4)))
def test_whatever_bytes_a_kill_left_behind(
    case, finished, written, tmp_path_factory, shares, missing
):
    """Of each file any number of bytes, in the middle of a row too; some not even there."""
    folder = tmp_path_factory.mktemp("killed")
    shutil.copytree(str(written / "train"), str(folder / "train"))
    for i, (name, share) in enumerate(zip(ARRAYS[1:], shares)):
        path = folder / "train" / "partial" / "shard-0-of-1" / (name + ".bin")
        if i in missing:
            path.unlink()
        else:
            os.truncate(str(path), int(share * path.stat().st_size))
    assert case.write(folder)
    assert tree(folder) == tree(finished)
    shutil.rmtree(str(folder))


def test_one_that_an_earlier_version_began_is_gone_on_with(case, finished, tmp_path):
    """Written here by hand: two of three batches of one shard, and a bit of the third."""
    partial = tmp_path / "train" / "partial"
    own = partial / "shard-1-of-2"
    own.mkdir(parents=True)
    plan = zlib.crc32(b"".join(batch.astype("<i8").tobytes() + b"|" for batch in case.batches))
    header = {
        "format": "kd_plugin teacher cache",
        "version": 1,
        **case.header,
        "sentences": 17,
        "rows": int(case.lengths.sum()),
        "plan": f"{plan:08x}",
    }
    (partial / "header.json").write_text(json.dumps(header))
    (own / "lock").touch()
    for name in ARRAYS[1:]:
        first, second, third = [rows[name].tobytes() for rows in case.rows[1::2]]
        (own / f"{name}.bin").write_bytes(first + second + third[: len(third) // 2])
    shard = case.writer(tmp_path, 2, 1)
    shard.begin()
    assert shard.done == 2
    case.append(shard)
    assert not shard.finish()
    assert case.write(tmp_path, 2, 0)
    assert tree(tmp_path) == tree(finished)


def test_what_is_on_disk_is_not_asked_for_again(case, written, tmp_path):
    shutil.copytree(str(written / "train"), str(tmp_path / "train"))
    entropy = tmp_path / "train" / "partial" / "shard-0-of-1" / "entropy.bin"
    rows = [len(part["entropy"]) for part in case.rows]
    os.truncate(str(entropy), 2 * (rows[0] + rows[1] + 1))
    shard = case.writer(tmp_path)
    shard.begin()
    assert shard.done == 2
    assert {f.name: f.stat().st_size for f in entropy.parent.glob("*.bin")} == {
        name + ".bin": (rows[0] + rows[1]) * array.row_bytes for name, array in shard.types.items()
    }


def test_a_full_disk_leaves_what_can_be_gone_on_from(case, finished, tmp_path, monkeypatch):
    """At every write, each cut short by the kernel as a full disk does."""
    failed = 0
    for allowed in range(0, 40, 3):
        real, left = store.write_all, [allowed]

        def full(file, block, real=real, left=left):
            left[0] -= 1
            if left[0] < 0:
                real(file, block[: len(block) // 2])
                raise OSError(28, "No space left on device")
            real(file, block)

        cache = tmp_path / str(allowed)
        with monkeypatch.context() as patch:
            patch.setattr(store, "write_all", full)
            try:
                case.write(cache)
            except OSError:
                failed += 1
        assert case.write(cache)
        assert tree(cache) == tree(finished)
    assert failed >= 10


def test_a_merge_that_fails_leaves_no_rubbish(case, finished, tmp_path):
    case.write(tmp_path, 2, 0)

    def failing():
        real = os.fsync

        def full(descriptor):
            if (tmp_path / "train" / "partial" / "shard-1-of-2" / "done").is_file():
                raise OSError(28, "No space left on device")
            real(descriptor)

        os.fsync = full
        try:
            case.write(tmp_path, 2, 1)
        except OSError:
            os._exit(3)

    assert os.WEXITSTATUS(in_a_child(failing)) == 3
    assert not list((tmp_path / "train").glob("*.new"))
    assert case.write(tmp_path, 2, 1)
    assert tree(tmp_path) == tree(finished)


def test_a_shard_is_written_by_one_process_at_a_time(case, finished, tmp_path):
    first = case.writer(tmp_path)
    first.begin()
    with pytest.raises(FileError, match="another process is writing"):
        case.writer(tmp_path).begin()
    case.append(first)
    assert first.finish()
    assert tree(tmp_path) == tree(finished)


@pytest.mark.parametrize(
    "environment",
    [
        dict(WORLD_SIZE="3", RANK="2", LOCAL_RANK="1"),
        dict(SLURM_STEP_NUM_TASKS="3", SLURM_PROCID="2", SLURM_LOCALID="1"),
    ],
)
def test_ranks_of_torchrun_and_srun_are_shards(environment, tmp_path, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = []
    monkeypatch.setattr(command.cache, "make", found.append)
    flags = ["--path", "t.pt", "--cache", "c", "--cpu", "--temperatures", "2,1", "--top-k", "4"]
    for more in ([], ["--num-shards", "2", "--shard-id", "1"], ["--batch-size", "5"]):
        assert command.main([str(tmp_path), *flags, *more]) == 0
    assert [(one.num_shards, one.shard_id) for one in found] == [(3, 2), (2, 1), (3, 2)]
    assert [(one.max_tokens, one.max_sentences) for one in found] == [
        *[(12000, None)] * 2,
        (None, 5),
    ]
    assert found[0].temperatures == [1, 2] and found[0].k == 4 and found[0].folder == "c"
    assert found[0].device == torch.device("cpu") and found[0].dtype == torch.float32


class Numbers(list):
    collater = list


def test_workers_hold_no_lock(case, tmp_path, monkeypatch):
    """They outlive a process that is killed by some seconds; the next one need not wait."""
    filling = importlib.import_module("kd_plugin.cache.fill")
    shard = case.writer(tmp_path)
    shard.begin()

    def killed(*_, **__):
        shard.shards.release()
        case.writer(tmp_path).begin()
        raise KeyboardInterrupt

    monkeypatch.setattr(filling, "rows_of_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        filling._run(None, None, Numbers(range(len(case.lengths))), shard, num_workers=1)


def test_lengths_are_what_the_task_says(case, tmp_path, caplog):
    """A data set of another task may hold them otherwise."""
    filling = importlib.import_module("kd_plugin.cache.fill")
    lengths = np.array([[3, 2], [9, 2], [2, 4], [3, 9], [2, 2], [3, 1]])
    texts = [torch.full((n,), 4) for n in lengths[:, 1]]
    texts[2][1] = 1  # padding in the text
    data = Namespace(batch_by_size=lambda order, **_: [order[:2], order[2:]], tgt=texts)
    task = Namespace(
        target_dictionary=dictionary(),
        samples={"train": data}.get,
        student=lambda: Student(dictionary(), dictionary(), "aa", "bb"),
        cfg=Namespace(data="bin"),
        kind=TRANSLATION,
    )
    arguments = (task, (8, 5), str(tmp_path), case.header)
    task.lengths = lambda dataset: lengths if dataset is data else None
    task.lengths_read = lambda dataset: task.lengths(dataset)
    shard = filling.open_writer(*arguments, max_tokens=4)
    assert shard.lengths.tolist() == [2, 0, 3, 0, 2, 1]
    assert (
        "2 of 6 sentences of train are longer than the teacher can read (8 source and 5 target "
        "tokens): they are not cached" in caplog.text
    )
    with pytest.raises(CacheError, match="6 of 6 .* can read .1 source and 1 target.*--max-source"):
        filling.open_writer(task, (1, 1), *arguments[2:])
    assert [batch.tolist() for batch in shard.plan] == [[4, 2], [5, 0]]
    with pytest.raises(CacheError, match="the longest sentence has 4 tokens.* 3: raise it"):
        filling.open_writer(*arguments, max_tokens=3)
    task.lengths = lambda dataset: None
    with pytest.raises(CacheError, match="needs references, and train of bin has none"):
        filling.open_writer(*arguments)


def test_too_little_room_is_said_before(case, tmp_path, monkeypatch):
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: Namespace(free=1000))
    words = r"GB more while it is written .* but only 0\.0 GB are free: make room, or use a smaller"
    with pytest.raises(CacheError, match=words + " --top-k"):
        case.write(tmp_path)


def test_without_any_row(case, tmp_path):
    """A teacher that cannot read a single sentence."""
    empty = case._replace(lengths=np.zeros(3, dtype=int), batches=[], rows=[])
    assert empty.write(tmp_path)
    cache = opened(tmp_path)
    assert cache.lengths().tolist() == [0, 0, 0] and len(cache.rows(1)["symbols"]) == 0


@pytest.mark.parametrize("state", ["complete", "begun"])
@pytest.mark.parametrize(
    "header, word",
    [
        (dict(k=4), "k is 4 here, 5 there"),
        (dict(temperatures=[2.0]), "temperatures is"),
        (dict(teacher_dtype="torch.bfloat16"), "teacher_dtype is torch.bfloat16 here"),
        (dict(files={**DATA["files"], "train.aa-bb.bb.bin": "5" * 64}), "train.aa-bb.bb.bin diff"),
        (dict(teachers=[]), "teachers is"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_cache_is_not_gone_on_with(case, finished, written, state, header, word):
    folder = finished if state == "complete" else written
    before = tree(folder)
    with pytest.raises(CacheError) as error:
        case.writer(folder, **header).begin()
    assert word in str(error.value) and "delete that folder" in str(error.value)
    assert tree(folder) == before


def test_other_batches_are_not_gone_on_with(case, written):
    with pytest.raises(CacheError, match="plan is"):
        case._replace(batches=case.batches[::-1]).writer(written).begin()


@pytest.mark.parametrize("num_shards, shard_id", [(2, 2), (1, -1), (0, 0)])
def test_shards_that_do_not_exist(case, tmp_path, num_shards, shard_id):
    with pytest.raises(FileError, match="--shard-id must be from 0 to --num-shards"):
        case.writer(tmp_path, num_shards, shard_id)


# reading


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit(cache, name):
    path = cache / "train" / (name + ".bin")
    content = bytearray(path.read_bytes())
    for position in (0, len(content) // 3, len(content) - 1):
        for bit in (0, 7):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            message = refusal(cache)
            assert "is damaged" in message and "make the cache again" in message
            assert name == "blocks" or str(path) in message
    path.write_bytes(content)
    opened(cache)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_size_or_missing(cache, name):
    path = cache / "train" / (name + ".bin")
    content = path.read_bytes()
    for wrong in (content[:-1], content + b"\0", b""):
        path.write_bytes(wrong)
        message = refusal(cache)
        assert str(path) in message and "make the cache again" in message
        assert f"expected {len(content)} bytes, found {len(wrong)}" in message
    path.unlink()
    assert f"{path} is missing: make the cache again" in refusal(cache)


SHARED: List[CachedSubset] = []  # with forked processes; an argument would be pickled


def what_reading_says(cache=None):
    cache = cache or SHARED[-1]
    try:
        for i in range(len(cache)):
            cache.rows(i)
    except CacheError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("how", [None, "fork", "spawn"])
def test_a_block_that_is_damaged_after_the_start_is_found_when_it_is_read(tmp_path, how):
    case = make_case(tmp_path, sentences=6000)
    assert case.write(tmp_path)
    path, width = tmp_path / "train" / "log_probs.bin", 2 * K
    assert path.stat().st_size > 3 * 65536
    cache = opened(tmp_path)
    first = int(np.searchsorted(cache.offsets, 2 * 65536 // width))  # begins in the third block
    before = cache.rows(0), cache.rows(1)
    content = bytearray(path.read_bytes())
    content[2 * 65536 + 99] ^= 1
    content[7] ^= 1  # of a block that has been compared already
    with open(str(path), "r+b") as file:
        file.write(content)
    for i in range(2):
        assert cache.rows(i)["symbols"].tolist() == before[i]["symbols"].tolist()
    cache.rows(len(cache) - 1)
    expected = f"{path} is damaged: the checksum of its bytes from 131072 on is not the cache's"
    if how is None:
        with pytest.raises(CacheError, match=expected):
            cache.rows(first + 1)
    else:
        SHARED.append(cache)
        with multiprocessing.get_context(how).Pool(1) as pool:
            found = pool.apply(what_reading_says, () if how == "fork" else (cache,))
        assert ("from 0 on" if how == "spawn" else expected) in found


def test_what_workers_have_compared_is_not_compared_again(tmp_path, monkeypatch):
    case = make_case(tmp_path)
    assert case.write(tmp_path)
    cache = opened(tmp_path)
    SHARED.append(cache)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(what_reading_says) == ""
    monkeypatch.setattr(zlib, "crc32", None)
    assert what_reading_says(cache) == ""


def test_a_cache_that_shrinks_while_it_is_read(case, cache):
    found = opened(cache)
    path = cache / "train" / "entropy.bin"
    os.truncate(str(path), 4)
    with pytest.raises(CacheError, match=f"{path} is damaged: it has been cut short"):
        found.rows(16)


def test_opening_reads_nothing_of_the_content(tmp_path):
    """A cache of 100 GB in a sparse file: two sentences of 1.3 billion tokens each."""
    rows, k = 2 * 1_300_000_000, 8
    case = make_case(tmp_path)
    assert case.write(tmp_path)
    folder = tmp_path / "train"
    manifest = json.loads((folder / "manifest.json").read_text())
    np.array([0, rows // 2, rows], dtype="<i8").tofile(str(folder / "offsets.bin"))
    blocks = 0
    for name, array in layout.arrays(V, k, TEMPERATURES).items():
        path = folder / f"{name}.bin"
        os.truncate(str(path), 0)
        os.truncate(str(path), rows * array.row_bytes)
        blocks += -(-rows * array.row_bytes // 65536)
    os.truncate(str(folder / "blocks.bin"), 4 * blocks)
    layout.write_manifest(folder, {**manifest, "k": k, "rows": rows, "sentences": 2})
    assert sum(path.stat().st_size for path in folder.iterdir()) > 100e9

    def bytes_read():
        return int(Path("/proc/self/io").read_text().split()[1])

    before = bytes_read()
    found = opened(tmp_path)
    assert bytes_read() - before < 1e5
    assert found.lengths().tolist() == [rows // 2] * 2


def earlier(cache):
    """As version 0.1.0 wrote it: without checksums of blocks, samples of data and draws."""
    path = cache / "train" / "manifest.json"
    manifest = json.loads(path.read_text())
    for key in ("block_bytes", "data", "checksum"):
        del manifest[key]
    del manifest["summary"]["tail_bits"], manifest["summary"]["calibration_error"]
    (cache / "train" / "blocks.bin").unlink()
    layout.write_manifest(cache / "train", manifest)
    return cache


def test_a_cache_of_an_earlier_version_is_compared_as_a_whole_when_it_is_opened(case, cache):
    found = opened(earlier(cache))
    assert found.samples == 0
    for i in range(len(found)):
        rows, expected = found.rows(i), written_rows(case, i)
        assert {n: a.tobytes() for n, a in rows.items()} == expected
    assert "train.aa-bb.aa.bin differs" in refusal(
        cache, replaced(DATA, "files", "train.aa-bb.aa.bin", "0" * 64)
    )
    path = cache / "train" / "entropy.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CacheError, match=f"{path} is damaged: its checksum is not the manifest's"):
        opened(cache)


def written_rows(case, i):
    if not case.lengths[i]:
        kinds = layout.arrays(V, K, TEMPERATURES)
        return {name: b"" for name in kinds}
    rows = teacher_rows(Dense(case.logits[i]), case.targets[i], K, TEMPERATURES)
    return {name: array.tobytes() for name, array in rows.items()}


def test_no_cache_and_one_that_is_not_finished(cache, tmp_path):
    assert "no cache of the subset valid" in refusal(cache, subset="valid")
    assert "fairseq-kd-cache DATA" in refusal(tmp_path / "nowhere")
    (cache / "train" / "manifest.json").unlink()
    assert "no cache of the subset train" in refusal(cache)
    (cache / "train" / "partial").mkdir()
    assert "is not finished: run the same fairseq-kd-cache again" in refusal(cache)


def test_offsets_that_are_none(cache):
    """With the right checksum: made wrong, not damaged."""
    path = cache / "train" / "offsets.bin"
    right = np.fromfile(str(path), "<i8")
    for position, value in ((0, 1), (-1, right[-1] - 1), (4, right[-1] + 1)):
        wrong = right.copy()
        wrong[position] = value
        wrong.tofile(str(path))
        write_checksums(cache)
        assert f"{path} is damaged" in refusal(cache)


def replaced(data, section, key, value):
    return {**data, section: {**data[section], key: value}}


@pytest.mark.parametrize(
    "data, words",
    [
        (replaced(DATA, "dictionaries", "target", "0" * 64), ["dictionaries: target differs"]),
        (replaced(DATA, "data", "train.aa-bb.aa.bin", "0" * 64), ["train.aa-bb.aa.bin differs"]),
        (replaced(DATA, "data", "train1.aa-bb.aa.bin", "0" * 64), ["train1.aa-bb.aa.bin is"]),
        (replaced(DATA, "settings", "truncate_source", 6), ["truncate_source is 6 here, 7 there"]),
        (replaced(DATA, "settings", "source_lang", "bb"), ["source_lang is bb here, aa there"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_other_data(finished, data, words):
    for word in (*words, "made from something other than", "Use it with its own"):
        assert word in refusal(finished, data)


def test_another_format(cache):
    change(cache, version=2)
    assert "has version 2 of the format, and this kd_plugin reads version 1" in refusal(cache)
    change(cache, format="something else")
    assert "is not the manifest of a teacher cache" in refusal(cache)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "1", "\xff\xfe", "[" * 100000, '{"k": ' * 100000]
)
def test_a_manifest_that_is_no_json_object(cache, text):
    (cache / "train" / "manifest.json").write_text(text, encoding="latin-1")
    assert "manifest.json" in refusal(cache)


JSON = st.recursive(
    st.one_of(
        *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
        st.sampled_from([10**400, -1, 2**63, 2**64, 1 << 62, 1e308, "\0", "a\0b", "\ud800", {}]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


def places(value, path=()):
    """Where in a JSON value another could stand."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, part in items:
        yield from places(part, (*path, key))


@settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_value_anywhere_in_the_manifest(finished, tmp_path_factory, data):
    """Refused, or of no consequence; never any other exception."""
    manifest = json.loads((finished / "train" / "manifest.json").read_text())
    options = [path for path in places(manifest) if path]
    where = data.draw(st.sampled_from(options))
    value = data.draw(JSON)
    holder = manifest
    for key in where[:-1]:
        holder = holder[key]
    same = type(holder[where[-1]]) is type(value) and holder[where[-1]] == value
    if data.draw(st.booleans()) or same:
        value, same = None, False
        del holder[where[-1]]
    else:
        holder[where[-1]] = value
    folder = tmp_path_factory.mktemp("manifest")
    shutil.copytree(str(finished / "train"), str(folder / "train"))
    (folder / "train" / "manifest.json").write_text(json.dumps(manifest))
    if not same:
        assert str(folder) in refusal(folder)
    if where != ("checksum",):
        # and with a checksum to match, as an attacker would write it
        layout.write_manifest(folder / "train", manifest)
        try:
            cache = opened(folder)
        except FileError as error:
            assert str(folder) in str(error)
        else:
            assert len(cache) == 17 and len(cache.rows(0)["symbols"]) == cache.lengths()[0]
    shutil.rmtree(str(folder))


def test_another_teacher_is_only_a_warning(case, cache, caplog):
    (entry,) = case.header["teachers"]
    changed = cache.parent / "other.pt"
    for content, warned in ((b"weights", 0), (b"WEIGHTS", 1), (b"weights of more", 1), (None, 0)):
        if content is None:
            changed.unlink()
        else:
            changed.write_bytes(content)
        change(cache, teachers=[{**entry, "path": str(changed)}])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            opened(cache)
        assert caplog.text.count("no longer the one that the cache") == warned, content


def test_one_process_writes_a_shard(case, tmp_path):
    """A second one would cut off what the first has written since."""
    first = case.writer(tmp_path)
    first.begin()
    with pytest.raises(FileError, match="another process is writing"):
        case.writer(tmp_path).begin()


def test_a_teacher_that_may_not_be_read_is_left_alone(cache, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(reader, "digest", denied)
    opened(cache)


def test_pickled_it_opens_its_maps_again(finished):
    cache = opened(finished)
    pickled = pickle.dumps(cache)
    for name in ARRAYS:
        assert (finished / "train" / f"{name}.bin").read_bytes()[:48] not in pickled
    twin = pickle.loads(pickled)
    for i in range(len(cache)):
        for name, array in cache.rows(i).items():
            assert twin.rows(i)[name].tobytes() == array.tobytes()


# joining


def dictionary():
    found = Dictionary()
    for i in range(V - len(found)):
        found.add_symbol(f"w{i}")
    return found


def dataset(case, **how):
    """Sources as long as targets, in another order: batches are sorted by them."""
    symbols, lengths = dictionary(), np.maximum(case.lengths, 1)
    targets = [t if len(t) else torch.tensor([4]) for t in case.targets]
    sources = [torch.full((1 + (7 * i) % 5,), 5) for i in range(len(targets))]
    sizes = np.array([len(s) for s in sources])
    return LanguagePairDataset(sources, sizes, symbols, targets, lengths, symbols, **how)


@pytest.fixture(scope="module")
def numbered(case, tmp_path_factory):
    """A cache in which each row's reference is the row's number in the data."""
    starts = np.cumsum(case.lengths) - case.lengths
    rows = []
    for batch, part in zip(case.batches, case.rows):
        numbers = [np.arange(starts[i], starts[i] + case.lengths[i]) for i in batch]
        rows.append({**part, "reference": np.concatenate(numbers).astype("<f2")})
    folder = tmp_path_factory.mktemp("numbered")
    assert case._replace(rows=rows).write(folder)
    return opened(folder)


@settings(deadline=None, max_examples=40)
@given(
    sentences=st.lists(st.integers(0, 16), min_size=1, max_size=12, unique=True),
    left_source=st.booleans(),
    left_target=st.booleans(),
)
def test_rows_belong_to_their_tokens_in_any_batch(
    case, numbered, sentences, left_source, left_target
):
    plain = dataset(case, left_pad_source=left_source, left_pad_target=left_target)
    taught = TaughtDataset(plain, numbered, 1)
    sentences = [i for i in sentences if case.lengths[i]]
    if not sentences:
        return
    batch = taught.collater([taught[i] for i in sentences])
    real = batch["target"].ne(1)
    expected, position = {}, {}
    for b, i in enumerate(batch["id"].tolist()):
        first = int(numbered.offsets[i])
        for j, t in enumerate(real[b].nonzero().squeeze(-1).tolist()):
            expected[b * real.size(1) + t] = first + j
            position[b * real.size(1) + t] = (i, j)
    assert batch["teacher"]["reference"].tolist() == list(expected.values())
    assert {k: str(v.dtype) for k, v in batch["teacher"].items()} == {
        **{name: "torch.float16" for name in ARRAYS[2:]},
        "symbols": "torch.int32",
    }
    # asked for some rows in any order, it gives theirs
    signal = CachedAnswer(batch["teacher"], real, TEMPERATURES, False)
    rows = torch.tensor(sorted(expected, key=lambda row: (row * 7919) % 104729))
    word = signal.rows(rows, torch.zeros(1))
    assert (-word.nll(rows)).tolist() == [expected[row] for row in rows.tolist()]
    for row, symbols in zip(rows.tolist(), word.symbols.tolist()):
        i, j = position[row]
        assert symbols == numbered.rows(i)["symbols"][j].tolist()
        assert int(batch["target"].flatten()[row]) == int(case.targets[i][j])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_deliver_the_same(case, numbered, workers):
    taught = TaughtDataset(dataset(case), numbered, 1)
    batches = [batch.tolist() for batch in case.batches]
    loader = torch.utils.data.DataLoader(
        taught, batch_sampler=batches, collate_fn=taught.collater, num_workers=workers
    )
    for sentences, batch in zip(batches, loader):
        expected = taught.collater([taught[i] for i in sentences])
        assert batch["id"].tolist() == expected["id"].tolist()
        for name, tensor in expected["teacher"].items():
            assert torch.equal(batch["teacher"][name], tensor)


def test_it_is_the_data_set_in_all_else(case, numbered):
    plain = dataset(case)
    taught = TaughtDataset(plain, numbered, 1)
    assert len(taught) == len(plain)
    assert taught.tgt_sizes.tolist() == plain.tgt_sizes.tolist()
    assert taught.src_sizes.tolist() == plain.src_sizes.tolist()
    assert taught.has_rows.tolist() == (case.lengths > 0).tolist()
    assert taught.collater([]) == plain.collater([])
    prefixed = taught.collater([taught[0]], pad_to_length={"source": 9, "target": 9})
    assert prefixed["target"].size(1) == 9


def test_a_cache_of_other_sentences(case, numbered):
    short = dataset(case._replace(lengths=case.lengths[:-1], targets=case.targets[:-1]))
    with pytest.raises(CacheError, match="holds 17 sentences, the data 16"):
        TaughtDataset(short, numbered, 1)
    targets = [torch.cat([t, t[:1]]) if i == 5 else t for i, t in enumerate(case.targets)]
    longer = dataset(case._replace(lengths=[len(t) for t in targets], targets=targets))
    with pytest.raises(CacheError, match="for 1 sentences, the first of them number 5") as error:
        TaughtDataset(longer, numbered, 1)
    assert "has a different number of rows than the data has target tokens" in str(error.value)


def test_padding_inside_a_text(case, numbered):
    """It has no row, and no loss."""
    targets = [torch.cat([t[:1], torch.tensor([1]), t[1:]]) for t in case.targets]
    lengths = np.array([len(t) for t in targets])
    taught = TaughtDataset(dataset(case._replace(lengths=lengths, targets=targets)), numbered, 1)
    batch = taught.collater([taught[2], taught[4]])
    rows = [np.arange(*numbered.offsets[i : i + 2]) for i in batch["id"].tolist()]
    assert batch["teacher"]["reference"].tolist() == np.concatenate(rows).tolist()
    targets[2][0] = 1
    with pytest.raises(CacheError, match="for 1 sentences, the first of them number 2"):
        TaughtDataset(dataset(case._replace(lengths=lengths, targets=targets)), numbered, 1)


# what a cache was made from


@pytest.mark.parametrize(
    "text, expected",
    [("", []), ("1", [1]), ("2,1,2", [1, 2]), (" 0.5 , 4", [0.5, 4]), ("4e0,1.0", [1, 4])],
)
def test_temperatures(text, expected):
    assert _temperatures(text) == expected


@pytest.mark.parametrize("text", ["0", "-1", "1,0", "nan", "inf", "1 2", "warm"])
def test_temperatures_that_are_none(text):
    with pytest.raises(CacheError, match="--temperatures needs numbers above 0"):
        _temperatures(text)


def about(folder, subset="train", combine=True, **more):
    given = dict(source_lang="aa", target_lang="bb", upsample_primary=1, truncate_source=False)
    more = {"max_source_positions": 7, "num_batch_buckets": 0, **more}
    return new_task(**{**given, **more}).describe_data(str(folder), subset, combine, True)


def test_every_file_and_setting_counts(tmp_path):
    names = ["train.aa-bb.aa.bin", "train.aa-bb.aa.idx", "train.aa-bb.bb.bin", "train.aa-bb.bb.idx"]
    more = [name.replace("train.", "train1.") for name in names]
    for name in (*names, *more, "valid.aa-bb.aa.bin", "train3.aa-bb.aa.bin"):
        (tmp_path / name).write_text(name)
    alone, together = about(tmp_path, combine=False), about(tmp_path)
    for kind in ("files", "data"):
        assert sorted(alone[kind]) == names and sorted(together[kind]) == sorted(names + more)
        assert sorted(about(tmp_path, "valid")[kind]) == ["valid.aa-bb.aa.bin"]
    earlier = {key: value for key, value in together.items() if key != "data"}
    for name in (*names, *more):
        content = (tmp_path / name).read_text()
        (tmp_path / name).write_text(content.swapcase())
        for manifest, kind in ((together, "data"), (earlier, "files")):
            found = layout.data_differences(lambda whole: about(tmp_path), manifest)
            assert found == [f"{kind}: {name} differs"]
        (tmp_path / name).write_text(content)
    for setting in (dict(upsample_primary=2), dict(truncate_source=True)):
        ours = about(tmp_path, **setting)
        assert len(layout.data_differences(lambda _, ours=ours: ours, together)) == 1
    # it means nothing as long as nothing is truncated
    assert about(tmp_path, max_source_positions=3) == together


def test_buckets_are_refused(tmp_path):
    with pytest.raises(CacheError, match="--num-batch-buckets"):
        about(tmp_path, num_batch_buckets=2)
