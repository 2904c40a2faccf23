"""Scores, differences from the teacher, curves, and pages of the report."""

import base64
import functools
import hashlib
import html.parser
import json
import math
import re
import resource
import subprocess
import sys
import uuid
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import sacrebleu.significance
import torch
from fairseq.data import Dictionary
from hypothesis import given, settings
from hypothesis import strategies as st
from trainer import write_data, write_mbart

from kd_plugin.decoding import Tokenizer
from kd_plugin.errors import UserError
from kd_plugin.files import FileError, locked
from kd_plugin.objective.answer import Member, RunningAnswer
from kd_plugin.report import asked as records
from kd_plugin.report import (
    browser,
    compare,
    curves,
    decode,
    draw,
    measured,
    named,
    page,
    pick,
    read_models,
)
from kd_plugin.report import pipeline as build
from kd_plugin.report.metrics import describe
from kd_plugin.report.score import score
from kd_plugin.report.systems import Model, System

METRICS = ("BLEU", "chrF2", "TER")  # unless others are asked for
REFERENCES = [
    "A dog runs across the green field.",
    "Two men are talking on the street.",
    "A woman in a red coat is reading a book.",
    "Children play football in the park.",
    "The old man is sitting on a bench.",
    "Three girls are jumping over the wall.",
    "A boy eats an apple near the window.",
    "People are waiting for the train today.",
] * 5  # fmt: skip
GOOD = [line.replace("the", "a") if i % 4 == 0 else line for i, line in enumerate(REFERENCES)]
BAD = [" ".join(line.split()[::-1]) for line in REFERENCES]


# scores


@pytest.fixture(scope="module")
def scored():
    systems = {"plain": BAD, "student": GOOD, "copy": list(BAD)}
    return score(
        systems, REFERENCES, baseline="plain", tokenizer=Tokenizer(), test="bs", samples=1000
    )


def test_scores_are_those_of_the_command_line(scored, tmp_path):
    scores, signatures = scored
    (tmp_path / "ref").write_text("\n".join(REFERENCES) + "\n")
    (tmp_path / "hyp").write_text("\n".join(GOOD) + "\n")
    command = [sys.executable, "-m", "sacrebleu", str(tmp_path / "ref")]
    command += ["-i", str(tmp_path / "hyp")]
    command += ["-m", "bleu", "chrf", "ter", "--confidence", "-w", "6", "-f", "json"]
    printed = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    assert [one["name"] for one in printed] == list(METRICS)
    for one in printed:
        ours = scores["student"][one["name"]]
        assert ours["score"] == pytest.approx(one["score"], abs=1e-6)
        assert ours["mean"] == pytest.approx(one["confidence_mean"], abs=1e-6)
        assert ours["ci"] == pytest.approx(one["confidence_var"], abs=1e-6)
        assert signatures[one["name"]] == f"{one['name']} {one['signature']}"


def test_a_clearly_better_system_is_significantly_so_and_a_copy_is_called_one(scored):
    scores, _ = scored
    for metric in METRICS:
        assert scores["student"][metric]["p"] < 0.05
        assert scores["plain"][metric]["p"] is None
        assert scores["copy"][metric]["p"] is None
        assert scores["copy"][metric]["score"] == scores["plain"][metric]["score"]
    assert scores["copy"]["identical"]
    assert not scores["plain"]["identical"] and not scores["student"]["identical"]
    assert scores["student"]["BLEU"]["score"] > 80 > scores["plain"]["BLEU"]["score"]


def test_samples_that_score_nothing_are_scores_too():
    """Of two sentences, one shares no letter with its reference: some samples hold it alone."""
    references = ["abc def"] * 2
    translations = {"a": ["zzz qqq", "abc def"], "b": ["zzz qqq", "abc deg"]}
    options = dict(baseline="a", tokenizer=Tokenizer(), test="bs", samples=100)
    scores, _ = score(translations, references, **options)
    assert 0 < scores["a"]["chrF2"]["score"] < 100


def test_approximate_randomisation_is_sacrebleus(scored):
    ours, _ = score(
        *({"a": BAD, "b": GOOD}, REFERENCES),
        **{"baseline": "a", "tokenizer": Tokenizer(), "test": "ar", "samples": 200},
    )
    metrics = {"BLEU": sacrebleu.metrics.BLEU()}
    systems = [("a", BAD), ("b", GOOD)]
    paired = sacrebleu.significance.PairedTest(systems, metrics, [REFERENCES], "ar", 200)
    assert ours["b"]["BLEU"]["p"] == pytest.approx(paired()[1]["BLEU"][1].p_value)


# differences from the teacher

PAD, V = 1, 8  # fairseq's four special symbols, and a to d


@pytest.fixture
def dictionary():
    found = Dictionary()
    for symbol in "abcd":
        found.add_symbol(symbol)
    return found


def model_of(logits):
    """Stands for a teacher: says the same logits (B, T, V) of every batch."""

    def answer(net_input):
        flat = logits.flatten(0, 1)
        return RunningAnswer([Member("m", lambda rows: flat[rows])])

    answer.device = torch.device("cpu")
    return answer


@pytest.mark.parametrize("left_pad", (False, True))
def test_tokens_against_float64_by_hand(dictionary, left_pad):
    generator = torch.Generator().manual_seed(5)
    t, s = (3 * torch.randn(2, 3, V, generator=generator) for _ in range(2))
    target = torch.tensor([[4, 5, 2], [6, 2, PAD]])
    if left_pad:
        target[1] = torch.tensor([PAD, 6, 2])
    batch = {"id": torch.tensor([7, 3]), "target": target, "net_input": {}}
    tokens = compare.compare(model_of(t), model_of(s), [batch], dictionary)
    where = [(0, 0), (0, 1), (0, 2), (1, left_pad + 0), (1, left_pad + 1)]
    assert tokens.sentence.tolist() == [7, 7, 7, 3, 3]
    assert tokens.position.tolist() == [1, 2, 3, 1, 2]
    assert tokens.symbol.tolist() == [4, 5, 2, 6, 2]
    for i, (b, at) in enumerate(where):
        p = np.exp(t[b, at].double().numpy())
        q = np.exp(s[b, at].double().numpy())
        p, q = p / p.sum(), q / q.sum()
        symbol = tokens.symbol[i]
        assert tokens.kl[i] == pytest.approx((p * np.log2(p / q)).sum(), rel=1e-5, abs=2e-6)
        assert tokens.entropy[i] == pytest.approx(-(p * np.log2(p)).sum(), rel=1e-5, abs=2e-6)
        assert tokens.teacher_nll[i] == pytest.approx(-np.log2(p[symbol]), rel=1e-5, abs=2e-6)
        assert tokens.student_nll[i] == pytest.approx(-np.log2(q[symbol]), rel=1e-5, abs=2e-6)
        assert tokens.teacher_best[i] == p.argmax() and tokens.student_best[i] == q.argmax()
        for found, own in ((tokens.teacher, p), (tokens.student, q)):
            assert found[:, i] == pytest.approx([own.max(), (own**2).sum(), own[2]], rel=1e-5)


def test_chunks_do_not_change_what_is_found(dictionary, monkeypatch):
    generator = torch.Generator().manual_seed(6)
    t, s = (torch.randn(3, 5, V, generator=generator) for _ in range(2))
    target = torch.randint(4, V, (3, 5), generator=generator)
    batch = {"id": torch.arange(3), "target": target, "net_input": {}}
    whole = compare.compare(model_of(t), model_of(s), [batch], dictionary)
    monkeypatch.setattr(compare, "rows_at_once", lambda *_: 1)
    monkeypatch.setattr(compare, "rows_ahead", lambda *_: 2)
    parts = compare.compare(model_of(t), model_of(s), [batch], dictionary)
    for one, other in zip(whole, parts):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def tokens_by_hand() -> compare.Tokens:
    # sentence 0: a a b </s>; sentence 1: c </s>
    return compare.Tokens(
        sentence=np.array([0, 0, 0, 0, 1, 1]),
        position=np.array([1, 2, 3, 4, 1, 2]),
        symbol=np.array([4, 4, 5, 2, 6, 2]),
        student_nll=np.array([1.0, 2.0, 3.0, 0.5, 8.0, 0.1]),
        teacher_nll=np.array([0.5, 1.0, 2.0, 0.5, 4.0, 0.1]),
        kl=np.array([0.2, 0.4, 0.6, 0.0, 3.0, 1.0]),
        entropy=np.array([0.05, 0.5, 0.50001, 1.0, 4.5, 3.0]),
        student_best=np.array([4, 5, 5, 2, 7, 2]),
        teacher_best=np.array([4, 4, 5, 2, 6, 6]),
        student=np.array(
            [[0.5, 0.55, 0.9, 1.0, 0.3, 0.95], [0.4, 0.3, 0.5, 1.0, 0.25, 0.9], [0, 0, 0, 1, 0, 1]]
        ),
        teacher=np.array(
            [[0.7, 0.5, 0.6, 0.7, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0.7, 0, 0.4]]
        ),
    )


def test_calibration_by_hand():
    found = compare.calibrations(tokens_by_hand(), end=2)
    # bins of ten: 0.5 and 0.55 (one of two right), 0.9, 1.0 and 0.95 (all three right), 0.3
    assert found["student"].likeliest == pytest.approx((0.05 + (3 - 2.85) + 0.3) / 6)
    # the reference's: 2**-nll against the expected one, in the bins of 0.2s, 0.3, 0.4, 0.5, 0.9s
    gaps = [0.25 - 2**-8, 0.3 - 2**-2, 0.5 - 0.4, 0.5 - 2**-3, 1.9 - 2**-0.5 - 2**-0.1]
    assert found["student"].reference == pytest.approx(sum(gaps) / 6)
    assert found["student"].ends == 1 and found["teacher"].ends == pytest.approx(0.55)
    nothing = tokens_by_hand().only(np.zeros(6, dtype=bool))
    assert set(compare.calibrations(nothing, end=2)["teacher"]) == {None}


def test_who_is_right_about_itself_is_calibrated():
    """References drawn from the student's own distributions."""
    rng = np.random.default_rng(3)
    q = rng.dirichlet(np.full(V, 0.3), 40000)
    symbol = (q.cumsum(-1) > rng.random((len(q), 1))).argmax(-1)
    values = np.stack([q.max(-1), (q**2).sum(-1), q[:, 2]])
    nll = -np.log2(q[np.arange(len(q)), symbol])
    none = np.zeros(len(q))
    tokens = compare.Tokens(none, none, symbol, nll, nll, *[none] * 4, values, values)
    found = compare.Calibration.of(tokens, q.argmax(-1), nll, values, end=2)
    # a mean of n values from 0 to 1 in each of ten bins: 5 standard errors of all together
    assert found.likeliest < 5 * 0.5 * (10 / len(q)) ** 0.5
    assert found.reference < 5 * 0.5 * (10 / len(q)) ** 0.5
    assert found.ends == pytest.approx(1, abs=5 / (symbol == 2).sum() ** 0.5)


def test_buckets_by_hand():
    counts = np.array([0, 0, 0, 0, 1500, 9, 0, 5])
    found = compare.buckets(tokens_by_hand(), counts, end=2)
    bucket = compare.Bucket
    assert found["frequency"] == [
        bucket("0", 1, 0.0, 3.0, 8.0, 4.0),
        bucket("1 to 9", 1, 1.0, 0.6, 3.0, 2.0),
        bucket("1,000 to 9,999", 2, 0.5, pytest.approx(0.3), 1.5, 0.75),
        bucket("end of sentence", 2, 0.5, 0.5, pytest.approx(0.3), pytest.approx(0.3)),
    ]
    assert [(b.label, b.tokens) for b in found["position"]] == [("1", 2), ("2", 2), ("3 to 4", 2)]
    assert found["position"][0] == bucket("1", 2, 0.5, pytest.approx(1.6), 4.5, 2.25)
    assert [(b.label, b.tokens) for b in found["length"]] == [("1 to 5", 6)]
    entropies = [("0 to 0.1", 1), ("0.1 to 0.5", 1), ("0.5 to 1", 2), ("2 to 4", 1), ("above 4", 1)]
    assert [(b.label, b.tokens) for b in found["entropy"]] == entropies


@given(st.integers(0, 2**31), st.integers(1, 60))
@settings(deadline=None, max_examples=40)
def test_every_token_is_in_one_bucket_of_each_kind(seed, n):
    rng = np.random.default_rng(seed)
    sentence = np.sort(rng.integers(0, 5, n))
    symbol = rng.integers(2, V, n)
    best = rng.integers(4, V, (2, n))
    losses = rng.exponential(2, (4, n))
    more = rng.random((2, 3, n))
    tokens = compare.Tokens(sentence, rng.integers(1, 100, n), symbol, *losses, *best, *more)
    found = compare.buckets(tokens, rng.integers(0, 20000, V), end=2)
    whole = compare.Bucket.of("all", tokens)
    for kind in found.values():
        assert sum(bucket.tokens for bucket in kind) == n
        for name in ("agreement", "kl", "nll", "teacher_nll"):
            mean = sum(bucket.tokens * getattr(bucket, name) for bucket in kind) / n
            assert mean == pytest.approx(getattr(whole, name))


def test_the_farthest_sentences_by_divergence_per_token():
    found = compare.divergences(tokens_by_hand())
    assert found == {0: pytest.approx(0.3), 1: pytest.approx(2.0)}
    assert compare.farthest(found, 5) == [1, 0]
    assert compare.farthest(found, 1) == [1]
    assert compare.farthest(found, 0) == []


# curves


def record(update, nll, **more):
    values = {"num_updates": str(update), "nll_loss": str(nll), **more}
    return "2026-01-01 00:00:00 | INFO | train_inner | " + json.dumps(values)


def valid(update, nll, kd):
    values = {
        "valid_nll_loss": str(nll),
        "valid_kd_loss": str(kd),
        "valid_num_updates": str(update),
    }
    return "2026-01-01 00:00:00 | INFO | valid | " + json.dumps(values)


def test_curves_of_a_json_log(tmp_path):
    lines = [
        *(record(50, 9.5), record(100, 8.25, kd_loss="2.5"), valid(100, 8.5, 2.75)),
        *("noise | train_inner | {broken", "2026 | INFO | valid1 | {}"),
        # an epoch's average is no point of the curve
        '2026 | INFO | train | {"train_nll_loss": "9", "train_num_updates": "100"}',
        # killed, and resumed from update 60
        *(record(100, 8.0), record(150, 7.0)),
    ]
    (tmp_path / "log").write_text("\n".join(lines))
    found = curves.read_curves(str(tmp_path / "log"))
    assert found["train"]["nll_loss"] == [(50, 9.5), (100, 8.0), (150, 7.0)]
    assert found["train"]["kd_loss"] == [(100, 2.5)]
    assert found["valid"] == {"nll_loss": [(100, 8.5)], "kd_loss": [(100, 2.75)]}


def test_curves_of_a_plain_log(tmp_path):
    lines = (
        "2026 | INFO | train_inner | epoch 001:     50 / 253 loss=12.3, nll_loss=12.236, "
        "kd_loss=3.5, num_updates=50, lr=0.0001",
        "2026 | INFO | valid | epoch 001 | valid on 'valid' subset | loss 7.1 | nll_loss 6.164 | "
        "ppl 71.68 | agreement 0.25 | num_updates 253",
        "2026 | INFO | train | epoch 001 | loss 9.2 | nll_loss 8.7 | num_updates 253",
    )
    (tmp_path / "log").write_text("\n".join(lines))
    found = curves.read_curves(str(tmp_path / "log"))
    assert found["train"] == {"nll_loss": [(50, 12.236)], "kd_loss": [(50, 3.5)]}
    assert found["valid"] == {"nll_loss": [(253, 6.164)], "agreement": [(253, 0.25)]}


PREFIXES = {
    "log file": "",
    "fairseq-train": "2026-01-01 00:00:00 | INFO | train_inner | ",
    "srun": "0: 2026-01-01 00:00:00 | INFO | train_inner | ",
    "fairseq-hydra-train": "[2026-01-01 00:00:00,012][train_inner][INFO] - ",
    "hydra in colours": "[\x1b[36m2026-01-01 00:00:00,012\x1b[0m][\x1b[34mtrain_inner\x1b[0m]"
    "[\x1b[32mINFO\x1b[0m] - ",
}


@pytest.mark.parametrize("kind", ("json", "simple", "tqdm"))
@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES)
def test_curves_of_any_log(kind, prefix, tmp_path):
    lines = {
        "json": (
            '{"epoch": 1, "update": 0.2, "nll_loss": "12.5", "num_updates": "50"}',
            '{"epoch": 1, "valid_nll_loss": "6.5", "valid_kd_loss": "2.5", '
            '"valid_num_updates": "60"}',
            '{"epoch": 1, "train_nll_loss": "9.5", "train_num_updates": "60"}',
            '{"epoch": 1, "valid1_nll_loss": "7.5", "valid1_num_updates": "60"}',
            '{"epoch": 1, "dev_nll_loss": "8.5", "dev_num_updates": "60"}',
        ),
        "simple": (
            "epoch 001:     50 / 60 loss=13, nll_loss=12.5, num_updates=50",
            "epoch 001 | valid on 'valid' subset | nll_loss 6.5 | kd_loss 2.5 | num_updates 60",
            "epoch 001 | loss 9.2 | nll_loss 9.5 | num_updates 60",
            "epoch 001 | valid on 'valid1' subset | nll_loss 7.5 | num_updates 60",
            "epoch 001 | valid on 'dev' subset | nll_loss 8.5 | num_updates 60",
        ),
    }
    # on a terminal, the bar has no prefix and ends in a carriage return
    bar = (
        "epoch 001:  83%|###| 50/60 [00:04<00:00, 9it/s, loss=13, nll_loss=12.5, num_updates=50]\r"
    )
    lines = ["begin training epoch 1", *lines["json" if kind == "json" else "simple"]]
    text = "\n".join(prefix + line for line in lines)
    if kind == "tqdm":
        text = text.replace(prefix + lines[1] + "\n", bar)
    (tmp_path / "log").write_bytes(text.encode())
    assert curves.read_curves(str(tmp_path / "log")) == {
        "train": {"nll_loss": [(50, 12.5)]},
        "valid": {"nll_loss": [(60, 6.5)], "kd_loss": [(60, 2.5)]},
        "valid1": {"nll_loss": [(60, 7.5)]},
        "dev": {"nll_loss": [(60, 8.5)]},
    }


@pytest.mark.parametrize(
    "line",
    (
        "2026-01-01 00:00:00 | INFO | dev | epoch 001 | valid on 'dev' subset | loss 7.1 | "
        "nll_loss 6.5 | num_updates 60",
        '2026-01-01 00:00:00 | INFO | dev | {"epoch": 1, "dev_nll_loss": "6.5", '
        '"dev_num_updates": "60", "dev_best_loss": "6"}',
        '0: 2026-01-01 00:00:00 | INFO | dev | {"dev_nll_loss": 6.5, "dev_num_updates": 60}',
    ),
)
def test_curves_of_a_validation_subset_of_any_name(line, tmp_path):
    (tmp_path / "log").write_text(record(50, 9.5) + "\n" + line + "\n")
    assert curves.read_curves(str(tmp_path / "log")) == {
        "train": {"nll_loss": [(50, 9.5)]},
        "valid": {},
        "dev": {"nll_loss": [(60, 6.5)]},
    }


def test_a_file_that_is_no_log(tmp_path):
    (tmp_path / "log").write_text("nothing\n")
    with pytest.raises(FileError, match="no line of fairseq-train's progress"):
        curves.read_curves(str(tmp_path / "log"))
    with pytest.raises(FileError, match="cannot be read"):
        curves.read_curves(str(tmp_path / "missing"))


# names


def test_models_by_name(tmp_path):
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).write_bytes(b"x")
    folder = tmp_path / "int8"
    folder.mkdir()
    (folder / "model.bin").write_bytes(b"x")
    a, b = str(tmp_path / "a.pt"), str(tmp_path / "b.pt")
    pairs = [f"teacher={a}:{b}", "student=" + a, f"int8={folder}"]
    models = read_models(pairs, "data", ["student=other"], ["student=a_A,b_B"])
    assert [m.langs for m in models] == [None, ("a_A", "b_B"), None]
    assert [(m.name, m.format, m.data) for m in models] == [
        ("teacher", "fairseq", "data"),
        ("student", "fairseq", "other"),
        ("int8", "ctranslate2", "data"),
    ]
    assert models[0].paths == [a, b]
    assert models[0].fingerprint() != models[1].fingerprint()
    assert pick(models, None, "--teacher", ("teacher",)) is models[0]
    assert pick(models, "int8", "--teacher", ("teacher",)) is models[2]
    assert pick(models, None, "--baseline", ("baseline",)) is models[0]
    with pytest.raises(UserError, match="--teacher x: the models are named teacher, student"):
        pick(models, "x", "--teacher", ())


def test_wrong_names_are_all_named_at_once(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"x")
    a = str(tmp_path / "a.pt")
    with pytest.raises(UserError) as error:
        named(["m=" + a, "m=" + a, a], "--models", "CHECKPOINT")
    assert "'m' occurs twice" in str(error.value) and "NAME=CHECKPOINT" in str(error.value)
    with pytest.raises(UserError) as error:
        read_models([f"m={tmp_path / 'no.pt'}", "a/b=" + a, f"c={tmp_path}"], "", ["x=y"])
    for part in ("no such file", "'a/b'", "without model.bin", "no model is named 'x'"):
        assert part in str(error.value)
    for name in ("_x", "a$b", "s.greedy", "a,b", ".a", "a b"):
        with pytest.raises(UserError, match="cannot be a model's name"):
            read_models([f"{name}={a}"], "", [])
    with pytest.raises(UserError, match="no such file"):  # a folder is no member of an ensemble
        read_models([f"m={a}:{tmp_path}"], "", [])
    with pytest.raises(UserError, match="--model-langs m: --model-data names no folder of it"):
        read_models(["m=" + a], "", [], ["m=aa,bb"])
    with pytest.raises(UserError, match="--model-langs m: expected a source and a target language"):
        read_models(["m=" + a], "", ["m=data"], ["m=aa"])


# models at once


class FakeWorker:
    """Stands for a process with a model; ``events`` is what is asked of all of them."""

    events: list = []
    broken: tuple = ()

    def __init__(self, model, role, options):
        self.name = model.name
        self.events.append(("start", self.name))

    def open(self):
        self.events.append(("open", self.name))
        if self.name in self.broken:
            raise FileError("unreadable")
        return {"precision": None, **dict.fromkeys(measured.NUMBERS, 1)}

    def decode(self, beam, description):
        self.events.append(("decode", self.name))
        return measured.Pass(["a"], 2, 0.5)

    def memory(self):
        return 7

    def stop(self):
        self.events.append(("stop", self.name))


def test_models_are_opened_one_after_the_other_and_decode_in_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "_Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "events", [])
    monkeypatch.setattr(FakeWorker, "broken", ("b",))
    models = [Model(name, name, "data") for name in "abc"]
    kept = {m.name: measured.Measured(tmp_path / (m.name + ".json"), {}) for m in models}
    systems = [System(model, 5, True) for model in models]
    assert decode.measure(*(systems, kept), teacher=models[0], options=None, repeats=2) == {
        "b": "unreadable"
    }
    assert FakeWorker.events == [
        *(("start", name) for name in "abc"),
        *(("open", "a"), ("open", "b")),
        ("stop", "b"),  # at once: its memory is free for c
        ("open", "c"),
        *(("decode", "a"), ("decode", "c")) * 2,
        *(("stop", "a"), ("stop", "c")),
    ]
    again = measured.Measured(tmp_path / "a.json", {})
    assert again.outcomes == {5: ["a"]} and again.seconds == {5: [0.5, 0.5]}
    assert again.memory == 7 and again.tokens == {5: 2}


def test_a_mistake_of_ours_in_a_worker_shows_its_traceback(monkeypatch, capsys):
    class Pipe:
        sent: list = []

        def recv(self):
            return "open"

        def send(self, message):
            self.sent.append(message)

    for error, told, traceback in (
        (UserError("no such file"), "no such file", False),
        (MemoryError(), "there is not enough memory; smaller batches need less", False),
        (RuntimeError("shapes differ"), "RuntimeError: shapes differ", True),
    ):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(decode, "_Decoder", fail)
        monkeypatch.setattr(decode.logging, "disable", lambda level: None)
        decode._serve(Pipe(), None, None, None)
        assert Pipe.sent[-1] == ("failed", told)
        assert ("Traceback" in capsys.readouterr().err) == traceback


def test_two_models_at_most_are_held_to_compare_any_number(monkeypatch):
    class Opened:
        def __init__(self, name):
            self.name = name

    alive, most = weakref.WeakSet(), []

    def open_one(model, results):
        opened = Opened(model.name)
        alive.add(opened)
        if model.name == "broken":
            raise UserError("another vocabulary")
        return opened

    def compared(teacher, student, batches, dictionary):
        most.append(len(alive))
        assert teacher.name == "teacher" and batches == ["batch"] and dictionary == "dictionary"
        return student.name

    models = [Model(n, n, "data") for n in ("a", "teacher", "b", "failed", "broken", "c", "int8")]
    asked = records.Asked(models, models[1], models[0], None, "out")

    def batches(limits):
        assert limits == [(5, 9)] * 5
        return ["batch"]

    data = SimpleNamespace(batches=batches, student=SimpleNamespace(target="dictionary"))

    def limits(model, results):
        if model.name in ("failed", "int8"):
            raise UserError("no distributions")
        return 5, 9

    monkeypatch.setattr(build, "_open", open_one)
    monkeypatch.setattr(build, "_max_positions", limits)
    monkeypatch.setattr(build, "_counts", lambda data: None)
    monkeypatch.setattr(build.compare, "compare", compared)
    monkeypatch.setattr(build, "_difference", lambda model, tokens, counts, results: tokens)
    results = records.Results(asked, data, {}, {})
    found, reasons = build._differences(results)
    assert found == {"a": "a", "b": "b", "c": "c"}
    assert most == [2, 2, 2]
    assert reasons == {
        **dict.fromkeys(("failed", "int8"), "no distributions"),
        "broken": "another vocabulary",
    }


def test_without_a_teacher_that_can_be_compared_no_student_is(monkeypatch):
    models = [Model(name, name, "data") for name in ("teacher", "a", "b")]

    def limits(model, results):
        if model.name == "teacher":
            raise UserError("it failed")
        return 5, 9

    monkeypatch.setattr(build, "_max_positions", limits)
    results = records.Results(
        records.Asked(models, models[0], models[1], None, "out"), None, {}, {}
    )
    reason = "the teacher cannot be compared: it failed"
    assert build._differences(results) == ({}, {"a": reason, "b": reason})


def test_workers_of_ctranslate2_are_part_of_what_is_kept(tmp_path, monkeypatch):
    """Measured with another number of them, its speed is another; fairseq's is not."""
    folder, checkpoint = tmp_path / "ct2", tmp_path / "a.pt"
    folder.mkdir()
    for path in (folder / "model.bin", checkpoint):
        path.write_bytes(b"x")
    cfg = SimpleNamespace(
        common=SimpleNamespace(cpu=True, fp16=False, bf16=False),
        distributed_training=SimpleNamespace(device_id=0),
    )
    data = SimpleNamespace(cfg=cfg, folder=tmp_path)

    def settings_with(workers, path):
        monkeypatch.setattr(build, "threads", lambda: workers, raising=False)
        asked = records.Asked([], None, None, SimpleNamespace(), "out")
        return build._model_settings(Model("m", str(path), str(tmp_path)), asked, data)

    assert settings_with(1, folder) != settings_with(2, folder)
    assert settings_with(1, checkpoint) == settings_with(2, checkpoint)
    # what was measured before models had their own tasks may be wrong, and is measured anew
    assert settings_with(1, checkpoint)["task"] == "the checkpoint's"


# the folder


def hexadecimal(name):
    return f"{name}.{uuid.uuid4().hex}.new"


def test_only_what_a_kill_of_ours_has_left_is_removed(tmp_path):
    ours = tmp_path / "ours"
    for inner in ("measured/0a", "translations", "notes"):
        (ours / inner).mkdir(parents=True)
    left = [
        ours / hexadecimal("report.md"),
        ours / "measured" / "0a" / hexadecimal("teacher.json"),
        ours / "translations" / hexadecimal("teacher.txt"),
    ]
    (ours / "settings.json").write_text("{}")
    others = [
        ours / "draft.new",
        ours / "draft.2a.new",
        ours / "notes" / "draft.new",
        ours / "translations" / "b.new",
        ours / "notes" / hexadecimal("report.md"),
    ]
    for path in left + others:
        path.write_text("x")
    (ours / "folder.new").mkdir()
    (ours / hexadecimal("folder")).mkdir()
    with build._prepared(ours, {}, False):
        assert not any(path.exists() for path in left)
    assert all(path.exists() for path in others)


def test_a_folder_of_other_files_named_new_is_refused(tmp_path):
    (tmp_path / "draft.new").write_text("x")
    with pytest.raises(UserError, match="files that this command did not write"):
        with build._prepared(tmp_path, {}, False):
            pass
    assert (tmp_path / "draft.new").read_text() == "x"


def test_after_an_error_the_folder_is_free(tmp_path, monkeypatch):
    models = [Model(name, name, "data") for name in ("teacher", "a")]
    asked = records.Asked(models, models[0], models[1], None, str(tmp_path))

    def fail(*_):
        raise UserError("no model could be judged")

    data = SimpleNamespace(describe=lambda asked: {"doubts": []})
    monkeypatch.setattr(build, "Translations", lambda asked: data)
    monkeypatch.setattr(build, "_settings", lambda data: {})
    monkeypatch.setattr(build, "_measure", fail)
    with pytest.raises(UserError, match="could be judged") as kept:
        build.make(asked)
    locked(tmp_path / ".lock").close()
    assert kept.value.__traceback__ is not None  # which would keep the lock's file open


# pages

NASTY = '<script>alert("x")</script> a | b & c \u202eabc'


def a_report():
    def scores(x, p):
        return {m: {"score": x, "mean": x + 0.1, "ci": 1.5, "p": p} for m in METRICS}

    def spread(x):
        return {"median": x, "low": x * 0.9, "high": x * 1.1}

    def system(name, model, beam, bleu, speed, p=None):
        return {
            **{"name": name, "model": model, "beam": beam, "scores": scores(bleu, p)},
            "file": name.replace(", ", "."),
            **{"length_ratio": 0.95, "length_ratio_on_train": None, "identical": False},
            **{"left_out": 1, "seconds": [3.5]},
            **{"tokens": 1234, "kept": bleu / 40, "speedup": speed / 110},
            "sentences_per_second": spread(speed),
            "tokens_per_second": spread(12 * speed),
        }

    def model(name, kind="fairseq", error=None):
        sizes = {"parameters": 7524352, "parameters_without_embeddings": 5529600}
        return {
            **{"name": name, "kind": kind, "path": "/x", "error": error, "precision": "float32"},
            **{**sizes, "bytes": 30097408, "file_bytes": 30160000, "peak_memory_bytes": 9e7},
            "vocabulary_map": False,
        }

    bucket = compare.Bucket.of("all", tokens_by_hand())._asdict()
    by = compare.buckets(tokens_by_hand(), np.arange(8), 2)
    calibrations = compare.calibrations(tokens_by_hand(), 2)
    worth = {"chrF2": {"value": 41.5, "against": {}}}
    worse = {"chrF2": {"value": 30.25, "against": {"teacher": -11.25}}}
    token = {"symbol": NASTY, "kl": 1.25, "teacher": "</s>", "student": "<b>"}
    sentence = {
        **{"number": 17, "source": NASTY, "reference": NASTY, "teacher": NASTY, "student": None},
        **{"kl": 1.25, "tokens": [token, {**token, "student": "</s>"}]},
    }
    return {
        **{"format": "kd_plugin report", "version": 1, "settings": {}, "subset": "test"},
        "task": "translation",
        **{"languages": ["de", "en"], "sentences": 1000, "references": "ref.en"},
        **{"teacher": "teacher", "baseline": "teacher", "beam": 5, "device": "CPU", "threads": 2},
        **{"repeats": 3, "significance": "paired bootstrap resampling, 1,000 samples"},
        "metrics": describe(["bleu", "chrf", "ter"]),
        "signatures": {metric: metric + " nrefs:1|bs:1000" for metric in METRICS},
        "doubts": [],
        "notes": [],
        "models": [model("teacher"), model("s|t"), model("broken", error="unreadable: " + NASTY)],
        "systems": [
            system("teacher", "teacher", 5, 39.97, 110.0),
            system("s|t, greedy", "s|t", 1, 38.5, 2222.25, 0.0125),
            {"name": "broken", "model": "broken", "beam": 5, "scores": None},
        ],
        "curves": {"student": {"train": {"nll_loss": [(1, 2.0)]}, "valid": {}}},
        "differences": {
            "s|t": {
                "all": bucket,
                "calibration": {who: one._asdict() for who, one in calibrations.items()},
                "by": {kind: [b._asdict() for b in own] for kind, own in by.items()},
                "farthest": [sentence],
            }
        },
        "not_compared": {"int8": "CTranslate2 gives no distributions"},
        "examples": {
            "each": 10,
            "measures": [{"name": "chrF2", "lower_is_better": False, "decimals": 2}],
            "orders": [
                {"system": "s|t", "measure": None, "against": "teacher"},
                {"system": "s|t", "measure": "chrF2", "against": "teacher"},
            ],
            "rows": [
                {
                    **{"number": 17, "source": NASTY, "reference": NASTY},
                    "keys": [-1.25, -11.25],
                    "systems": [
                        {"system": "teacher", "text": NASTY, "kl": None, "worth": worth},
                        {"system": "s|t", "text": None, "kl": 1.25, "worth": worse},
                    ],
                }
            ],
        },
    }


def axes_of(work, *of):
    """The axes that a picture is drawn on."""
    styles = {name: draw._style(i) for i, name in enumerate(("teacher", "s|t", "student"))}
    figure = work(*of, styles)
    try:
        return figure.axes
    finally:
        draw.plt.close(figure)


def test_pictures_show_all_that_the_report_says():
    report = a_report()
    report["systems"][1]["scores"]["TER"]["score"] = 50.0  # which is not drawn
    quality_speed = functools.partial(draw._quality_speed, report["metrics"][0], "sentences")
    (axes,) = axes_of(quality_speed, report["systems"][:2])
    points = [line.get_xydata().tolist() for line in axes.lines]
    assert [[110.0, 39.97]] in points and [[2222.25, 38.5]] in points
    assert {text.get_text() for text in axes.texts} == {"teacher", "s|t, greedy"}
    drawn = [
        (kind, measure, axes)
        for kind in draw._KINDS
        for measure, axes in zip(
            *(("kl", "agreement"), axes_of(draw._differences, report["differences"], kind))
        )
    ]
    assert len(drawn) == 8
    for kind, measure, axes in drawn:
        buckets = report["differences"]["s|t"]["by"][kind]
        assert list(axes.lines[0].get_ydata()) == [bucket[measure] for bucket in buckets]
        if measure == "agreement":  # which stands below
            labels = [text.get_text() for text in axes.get_xticklabels()]
            assert labels == [bucket["label"] for bucket in buckets]
        low, high = axes.get_ylim()
        assert low <= 0 and max(bucket[measure] for bucket in buckets) < high


def curve_of(start):
    return {"nll_loss": [(1, start), (2, start - 1)]}


def legend_of(logs):
    axes = axes_of(draw._curves, logs, "nll_loss")[0]
    legend = axes.get_legend()
    labels = [text.get_text() for text in legend.get_texts()]
    lines = [(line.get_linestyle(), list(line.get_ydata())) for line in axes.lines]
    return legend.get_title().get_text(), labels, lines


def test_curves_of_one_validation_subset_are_named_after_the_log():
    logs = {"student": {"train": curve_of(9.0), "valid": {}, "dev": curve_of(8.0)}}
    title, labels, lines = legend_of(logs)
    assert (title, labels) == ("dev (pale: train)", ["student"])
    assert lines == [("-", [9.0, 8.0]), ("-", [8.0, 7.0])]


def test_curves_of_several_validation_subsets_are_told_apart():
    logs = {
        "student": {"train": {}, "valid": curve_of(8.0), "valid1": curve_of(7.0)},
        "s|t": {"train": {}, "valid": curve_of(6.0)},
    }
    title, labels, lines = legend_of(logs)
    assert title == "validation (pale: train)"
    assert labels == ["student, valid", "student, valid1", "s|t, valid"]
    assert lines == [("-", [8.0, 7.0]), ("--", [7.0, 6.0]), ("-", [6.0, 5.0])]


class Text(html.parser.HTMLParser):
    """Tags and visible text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self._style = [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._style = tag in ("style", "title", "script")

    def handle_endtag(self, tag):
        self._style = False

    def handle_data(self, data):
        if not self._style:
            self.text.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    report = a_report()
    build._write(report, folder)
    return report, folder


def test_the_page_needs_nothing_from_outside_and_escapes_text(written):
    _, folder = written
    found = Text((folder / "report.html").read_text(encoding="utf-8"))
    tags = [tag for tag, _ in found.tags]
    assert set(tags) & {"link", "iframe", "b"} == set() and tags.count("script") == 1
    (policy,) = [own["content"] for tag, own in found.tags if "http-equiv" in own]
    checksum = base64.b64encode(hashlib.sha256(browser.SCRIPT.encode()).digest()).decode()
    assert "default-src 'none'; " in policy and policy.endswith(f"script-src 'sha256-{checksum}'")
    for tag, attributes in found.tags:
        assert tag != "script" or not attributes
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert attributes["src"].startswith("data:image/png;base64,")
    images = [attributes for tag, attributes in found.tags if tag == "img"]
    assert len(images) == len(draw_names(folder)) == 6
    assert any(NASTY in text for text in found.text)
    assert any("unreadable" in text for text in found.text)
    assert "viewport" in [own.get("name") for tag, own in found.tags if tag == "meta"]


def test_one_pass_is_no_median():
    several = {**a_report(), "pictures": []}
    assert "Speed: the median of 3 passes, in which" in page.markdown(several)
    assert "Speed: of one pass, on CPU with 2 threads." in page.markdown({**several, "repeats": 1})


def draw_names(folder):
    return sorted(path.name for path in folder.glob("*.png"))


def numbers_of(value):
    """All numbers in a JSON value, its strings included."""
    if isinstance(value, dict):
        return {n for part in value.values() for n in numbers_of(part)}
    if isinstance(value, list):
        return {n for part in value for n in numbers_of(part)}
    if isinstance(value, (int, float)):
        return {abs(float(value))}
    found = re.findall(r"\d[\d,]*\.?\d*", value) if isinstance(value, str) else ()
    return {float(number.replace(",", "")) for number in found}


def test_every_number_of_the_page_is_in_the_json(written):
    _, folder = written
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    known = sorted(numbers_of(report))
    shown = [
        number
        for text in Text((folder / "report.html").read_text(encoding="utf-8")).text
        for number in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?%?", text)
    ]
    assert len(shown) > 100
    labels = {95.0, 0.0, 1.0, 10.0}  # of intervals; what is best; bins
    for number in shown:
        digits = number.rstrip("%").replace(",", "")
        rounding = 0.5000001 * 10.0 ** -len(digits.partition(".")[2])
        value = float(digits)
        candidates = [(value, rounding), (value * 1e6, rounding * 1e6)]  # megabytes
        if number.endswith("%"):
            candidates = [(value / 100, rounding / 100)]
        assert value in labels or any(
            any(abs(x - wanted) <= allowed for x in known) for wanted, allowed in candidates
        ), number


def test_the_tables_in_markdown(written):
    _, folder = written
    text = (folder / "report.md").read_text(encoding="utf-8")
    row, second = [line for line in text.splitlines() if line.startswith("| s\\|t, greedy")][:2]
    assert "38.50" in row and "20.2 x" in row and "2,222.2" in row
    assert second.startswith("| s\\|t, greedy | 1 | 38.50; 38.60 ± 1.50; 0.0125 | 38.50; ")
    assert "broken failed: unreadable" in text and "not translated" in text
    assert re.search(r"^\| broken \| failed \|", text, re.MULTILINE)


class Cells(html.parser.HTMLParser):
    """The tables of a page: rows of cells, the header first; without details."""

    def __init__(self, content):
        super().__init__()
        self.tables, self._open, self._detail = [], False, False
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self._detail = tag == "details" or self._detail
        self._open = tag in ("td", "th", "small") and not self._detail
        if tag == "small" and self._open:
            self.tables[-1][-1][-1] += "; "

    def handle_endtag(self, tag):
        self._open = False
        self._detail = tag != "details" and self._detail

    def handle_data(self, data):
        if self._open:
            self.tables[-1][-1][-1] += data


def test_each_number_stands_in_its_place(tmp_path):
    report = a_report()
    for i, metric in enumerate(METRICS):  # each metric another
        found = report["systems"][1]["scores"][metric]
        found.update(score=38.5 + i, mean=38.6 + i, p=0.0125 + i / 10)
    build._write(report, tmp_path)
    tables = Cells((tmp_path / "report.html").read_text(encoding="utf-8")).tables
    system, model = report["systems"][1], report["models"][1]

    def row(table, label):
        (found,) = [cells for cells in table[1:] if cells[0] == label]
        return list(zip(table[0], found))[1:]

    assert row(tables[0], "s|t, greedy") == [
        *(("BLEU", "38.50"), ("speed-up", "20.2 x"), ("MB", "30.10")),
        *(("of the teacher's BLEU", "96.2%"), ("chrF2", "39.50"), ("parameters", "7,524,352")),
        ("sentences/s", "2,222.2"),
    ]
    assert row(tables[1], "s|t, greedy") == [
        ("beam", "1"),
        ("BLEU; 95% interval; p", "38.50; 38.60 ± 1.50; 0.0125"),
        ("chrF2; 95% interval; p", "39.50; 39.60 ± 1.50; 0.1125"),
        ("TER; 95% interval; p", "40.50; 40.60 ± 1.50; 0.2125"),
        *(("length", "0.950"), ("on train", "–")),
    ]
    cost = dict(row(tables[2], "s|t, greedy"))
    assert cost["tokens/s"] == f"{system['tokens_per_second']['median']:,.0f}"
    assert cost["peak memory MB"] == "90.00" and cost["MB; file MB"] == "30.10; 30.16"
    sizes = f"{model['parameters']:,}; {model['parameters_without_embeddings']:,}"
    assert cost["parameters; without embeddings"] == sizes
    columns = ["tokens", "agreement", "KL(teacher || student)", "nll", "teacher's nll"]
    difference = report["differences"]["s|t"]
    assert tables[3][1:] == [
        ["sentence 17, source", NASTY, "", ""],
        ["reference", NASTY, "", ""],
        ["teacher", NASTY, "41.50", ""],
        ["s|t", "", "30.25; -11.25 to teacher", "1.25"],
    ]
    del tables[3]
    assert row(tables[4], "teacher") == [
        *(("likeliest symbol", "0.250"), ("reference", "0.027"), ("ends expected", "0.550"))
    ]
    by = zip([tables[3], *tables[5:9]], [[difference["all"]], *difference["by"].values()])
    for table, buckets in by:
        for bucket in buckets:
            numbers = [bucket[key] for key in ("agreement", "kl", "nll", "teacher_nll")]
            cells = [str(bucket["tokens"]), *map("{:.3f}".format, numbers)]
            assert row(table, bucket["label"]) == list(zip(columns, cells))


def test_pictures_of_an_earlier_report_go(written, tmp_path):
    report = a_report()
    (tmp_path / "curves.png").write_bytes(b"old")
    (tmp_path / "curves-kd_loss.png").write_bytes(b"old")
    report["curves"] = {}
    build._write(report, tmp_path)
    assert not list(tmp_path.glob("*.new"))
    kinds = [f"differences-{kind}.png" for kind in draw._KINDS]
    assert draw_names(tmp_path) == sorted([*kinds, "quality-speed.png"])
    assert report["pictures"] == ["quality-speed.png", *kinds]


def test_without_room_for_all_an_earlier_report_stays(tmp_path):
    report = a_report()
    build._write(report, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    report["systems"] = report["systems"][:1]  # another picture, and then another page
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = max(len(data) for name, data in before.items() if name.endswith(".png"))
    assert room < len(before["report.html"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError, match="report.html"):
            build._write(report, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_numbers_that_json_cannot_write(tmp_path):
    plain = build._without_infinities({"a": [math.inf, (1.5, math.nan)], "b": "x"})
    assert plain == {"a": [None, [1.5, None]], "b": "x"}


def test_models_are_compared_on_what_they_read_with_their_tags(tmp_path):
    data = write_data(tmp_path / "data")
    path, _, _ = write_mbart(tmp_path, data, True)
    model = Model("teacher", path, str(data))
    options = SimpleNamespace(task="translation")
    of_test = SimpleNamespace(
        folder=data,
        student=SimpleNamespace(languages=("aa", "bb")),
        refuse_comparison=lambda model: None,
    )
    results = records.Results(records.Asked([model], model, model, options, "out"), of_test, {}, {})
    assert build._max_positions(model, results) == (10, 9)
    options.task_given = True
    assert build._max_positions(model, results) == (12, 10)
