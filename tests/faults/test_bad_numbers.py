"""Numbers that go bad: training stays right, or stops with a sentence."""

import importlib.util
import json
import math
import re
import shutil
from typing import Any, Dict

import pytest
import support
import torch
from support import (
    LANGUAGES,
    assert_same_weights,
    distil,
    fairseq,
    train_plain,
    validate,
    write_cache,
    write_sequences,
)
from toy import binarise, changed, train_teacher

from kd_plugin.cache.writer import teacher_rows
from kd_plugin.objective import chunks as objective
from kd_plugin.objective import divergences
from kd_plugin.objective.answer import CachedAnswer, Dense, Member, RunningAnswer
from kd_plugin.objective.chunks import Settings
from kd_plugin.objective.divergences import divergence

# a teacher that rules symbols out

V = 9


def kl(p, q):
    return sum(a * (a / b).log() for a, b in zip(p, q) if a > 0)


def by_definition(name, teacher, student, k, tail, temperature):
    """The divergence of one row, outcome by outcome; differentiable in float64."""
    p, q = (torch.softmax(z / temperature, -1) for z in (teacher, student))
    top = p.topk(k).indices
    rest = torch.ones(V, dtype=torch.bool).scatter(0, top, False)
    p, q = ([part[top], part[rest].sum()[None]] for part in (p, q))
    p, q = (torch.cat(part if tail == "bucket" and k < V else part[:1]) for part in (p, q))
    p, q = p / p.sum(), q / q.sum()
    if name in ("reverse-kl", "logit-mse"):  # over the teacher's support
        alive = p > 0
        if name == "logit-mse":
            d = (student - teacher)[top[alive]]
            return (d - d.mean()).pow(2).mean() / 2
        p, q = p[alive], q[alive] / q[alive].sum()

    def mixed(share):
        return share * p + (1 - share) * q

    return {
        "forward-kl": lambda: kl(p, q),
        "reverse-kl": lambda: kl(q, p),
        "js": lambda: (kl(p, mixed(0.5)) + kl(q, mixed(0.5))) / 2,
        "tvd": lambda: (p - q).abs().sum() / 2,
        "skew-kl": lambda: kl(p, mixed(0.1)),
        "skew-reverse-kl": lambda: kl(q, mixed(0.9)),
    }[name]()


def cached(teacher, target, k, temperatures):
    """What the teacher says after a way over the disk, in half precision."""
    rows: Dict[str, Any] = teacher_rows(Dense(teacher), target, k, temperatures)
    rows["symbols"] = rows["symbols"].astype("i4")
    real = torch.ones(1, len(target), dtype=torch.bool)
    tensors = {name: torch.from_numpy(array) for name, array in rows.items()}
    return CachedAnswer(tensors, real, temperatures, k == V)


@pytest.mark.parametrize("name", divergences.NAMES)
def test_symbols_that_the_teacher_rules_out(name, count):
    """-inf logits, of none to all but one symbol: value and gradient as defined, no NaN."""
    generator = torch.Generator().manual_seed(0)
    rows = 4 * V
    student, teacher = torch.randn(2, rows, V, generator=generator, dtype=torch.float64) * 2
    for row in range(rows):
        teacher[row, torch.randperm(V, generator=generator)[: row % V]] = -math.inf
    # the reference, too, may be one of them
    target = torch.randint(0, V, (rows,), generator=generator)
    assert teacher.gather(-1, target[:, None]).isinf().any()
    online = RunningAnswer([Member("t", lambda rows: teacher[rows])])

    for tail, k, temperature in (
        (tail, k, temperature)
        for tail in ("bucket", "renormalise")
        for k in (1, 3, V)
        for temperature in (1.0, 2.0)
    ):
        if name == "logit-mse" and (tail == "bucket" or temperature != 1):
            continue
        z = student.clone().requires_grad_()
        expected = torch.stack(
            [by_definition(name, p, q, k, tail, temperature) for p, q in zip(teacher, z)]
        )
        scale = temperature ** divergence(name).temperature_power
        (expected_gradient,) = torch.autograd.grad(scale * expected.sum(), z)
        signals = {
            "online": (online, dict(rtol=1e-4, atol=1e-5)),
            "cached": (cached(teacher, target, k, (1.0, 2.0)), dict(rtol=4e-3, atol=4e-3)),
        }
        if k == V:
            signals["online, not cut"] = signals["online"]
        for way, (signal, tolerance) in signals.items():
            settings = Settings(
                *(1.0, 0.0, temperature, 0.0, divergence(name)),
                top_k=0 if way == "online, not cut" else k,
                tail=tail,
                with_metrics=True,
            )
            where = f"{way}, {tail}, top {k}, temperature {temperature}"
            z = student.float().requires_grad_()
            terms = objective.distillation_objective(
                z, target, torch.arange(rows), signal, settings
            )
            (gradient,) = torch.autograd.grad(terms.loss, z)
            torch.testing.assert_close(terms.kd.double(), expected, msg=where, **tolerance)
            torch.testing.assert_close(gradient.double(), expected_gradient, msg=where, **tolerance)
            count("divergences of a teacher that rules symbols out, in value and gradient")


def test_of_a_teacher_with_few_possible_symbols_the_cache_keeps_no_rest():
    """Though nothing notes it: at temperature 1 the rest is one minus the K's sum, but never 0."""
    teacher = torch.tensor([[0.5, 0.1, -0.3, *[-math.inf] * (V - 3)]], dtype=torch.float64)
    student = torch.randn(1, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first = torch.tensor([0])
    settings = Settings(1.0, 0.0, divergence=divergence("reverse-kl"))
    signal = cached(teacher, first, 4, ())
    terms = objective.distillation_objective(student, first, first, signal, settings)
    expected = by_definition("reverse-kl", teacher[0], student[0], 4, "bucket", 1.0)
    torch.testing.assert_close(terms.kd[0], expected, rtol=4e-3, atol=4e-3)


# a student that overflows


@pytest.mark.parametrize("name", divergences.NAMES)
def test_a_gradient_too_large_for_half_precision_is_inf(name):
    """Or NaN, so that the loss scaler sees it; one step of its scale lower it is the gradient."""
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 4, V, generator=generator) * 2
    rows, target = torch.arange(4), torch.randint(0, V, (4,), generator=generator)
    signal = RunningAnswer([Member("t", lambda rows: teacher[rows])])
    settings = Settings(0.5, divergence=divergence(name))

    def gradient(z, scale):
        terms = objective.distillation_objective(z, target, rows, signal, settings)
        return torch.autograd.grad(terms.loss * scale, z)[0]

    half, wide = logits.half().requires_grad_(), logits.half().double().requires_grad_()
    largest = gradient(wide, 1.0).abs().max().item()
    fits = 2.0 ** math.floor(math.log2(torch.finfo(torch.float16).max / largest))
    expected = gradient(wide, fits)
    torch.testing.assert_close(gradient(half, fits).double(), expected, rtol=2e-3, atol=1e-2)
    assert not gradient(half, 2 * fits).isfinite().all()


# weights that are no numbers, or too large


def broken(data, teacher, folder, change):
    """A teacher with other weights, its dictionaries beside it."""
    for dictionary in data.glob("dict.*.txt"):
        shutil.copy(str(dictionary), str(folder))
    return changed(teacher, folder / "broken.pt", lambda state: change(state["model"]))


COMMANDS = {
    "training": lambda data, path, out, good: distil(data, path, out),
    "validating": lambda data, path, out, good: validate(
        data, good, "--teacher-checkpoint-path", path
    ),
    "caching": lambda data, path, out, good: write_cache(data, path, out),
    "decoding": lambda data, path, out, good: write_sequences(data, path, out),
    "exporting": lambda data, path, out, good: fairseq(
        "fairseq-kd-export", "--path", path, "--data", data, "--output", out, "--no-verify"
    ),
    "reporting": lambda data, path, out, good: fairseq(
        "fairseq-kd-report",
        *(data, "--models", f"good={good}", f"bad={path}", "--output", out),
        *("--cpu", "--repeats", 1, "--num-workers", 0, *LANGUAGES),
    ),
}


SLOW = ("validating", "reporting")


@pytest.mark.parametrize("command", COMMANDS)
def test_weights_that_are_no_numbers(command, data, teacher, distilled, tmp_path, long, count):
    """Refused by name, by all that read checkpoints, before anything is made with them."""
    if command in SLOW and not long:
        pytest.skip("in the long form")

    def change(weights):
        weights["encoder.layers.0.fc1.weight"][3, 5] = math.nan
        weights["decoder.layers.0.fc2.bias"][2] = math.inf

    path = broken(data, teacher, tmp_path, change)
    run = COMMANDS[command](data, path, tmp_path / "out", distilled.checkpoint)
    assert run.code != 0
    text = run.text
    if command == "reporting":  # on the others; and why not on this one
        text = json.loads((tmp_path / "out" / "report.json").read_text())["models"][1]["error"]
    weights = "encoder.layers.0.fc1.weight, decoder.layers.0.fc2.bias"
    assert f"{path}: 2 of its weights hold NaN or inf ({weights})" in text, text[-2000:]
    if command not in ("training", "validating"):  # fairseq prints its callers, too
        assert "Traceback" not in run.text
    assert not list(tmp_path.glob("out*/**/*.pt")) and not (tmp_path / "out").is_file()
    count("weights of NaN or inf, by command")


@pytest.mark.parametrize("engine", ["fairseq", "ctranslate2"])
def test_decoding_with_a_teacher_that_overflows(engine, data, teacher, tmp_path, count):
    """fairseq's generator would run into an assertion, and CTranslate2 repeat a word for ever."""
    if engine == "ctranslate2":
        pytest.importorskip("ctranslate2")

    def change(weights):
        weights["encoder.embed_tokens.weight"][-1] = torch.finfo(torch.float32).max

    path = broken(data, teacher, tmp_path, change)
    run = write_sequences(data, path, tmp_path / "out", "--engine", engine)
    assert run.code == 1 and "Traceback" not in run.text
    assert re.search(r"no translation with any probability .* with ids \[[\d, ]+\]", run.text)
    assert not (tmp_path / "out" / "record.json").exists()
    count("teachers that overflow")


# real runs


def taught_both_ways(data, teacher, folder, k, *more):
    """The same training with the teacher running, and from a cache of all that it says."""
    cache = folder / "cache"
    write_cache(data, teacher, cache, "--top-k", k, "--temperatures", "1", "--batch-size", 16).ok()
    online = distil(data, teacher, folder / "online", *more, "--kd-top-k", k).ok()
    cached = distil(data, None, folder / "cached", *more, "--teacher-cache", cache).ok()
    for key in ("loss", "nll_loss", "kd_loss", "gnorm"):
        # null where an update distilled nothing
        here, there = (
            [-1 if value is None else value for value in run.series("train_inner", key)]
            for run in (cached, online)
        )
        assert len(there) > 1 and all(map(math.isfinite, there))
        assert here == pytest.approx(there, rel=0.01, abs=0.011), key


# SGD: Adam would blow what half precision changes in a gradient near 0 up to its step size
SGD = ("--optimizer", "sgd", "--lr", 0.1)


def test_a_vocabulary_of_five(tmp_path, count):
    """fairseq's four special symbols and one word, which has nothing to say but how often."""
    text = tmp_path / "text"
    text.mkdir()
    for split, size in (("train", 64), ("valid", 16)):
        for lang, word in (("aa", "a"), ("bb", "b")):
            lines = [" ".join([word] * (1 + i % 4)) for i in range(size)]
            (text / f"{split}.{lang}").write_text("\n".join(lines) + "\n")
    data = binarise(text, tmp_path / "data", "--padding-factor", 1)
    teacher = train_teacher(data, tmp_path / "teacher", support.transformer(16), 40)

    taught_both_ways(data, teacher, tmp_path, 5, *SGD, "--max-update", 4, "--report-accuracy")
    run = distil(data, teacher, tmp_path / "six", "--kd-top-k", 6)
    assert "--kd-top-k must be from 0 to the 5 symbols of the vocabulary, got 6" in run.error
    run = write_cache(data, teacher, tmp_path / "eight")  # 8 are the default
    assert run.code == 1 and "--top-k must be from 1 to the 5 symbols of the vocabulary" in run.text
    engines = ["fairseq"] + ["ctranslate2"] * bool(importlib.util.find_spec("ctranslate2"))
    for engine in engines:
        options = ("--engine", engine, "--beam", 5, "--nbest", 5)
        made = write_sequences(data, teacher, tmp_path / engine, *options).ok()
        assert "Translated 64 sentences" in made.text
    count("commands with a vocabulary of five symbols", 7 + len(engines))


def test_sentences_of_one_token_and_of_none(corpus, teacher, tmp_path, long, count):
    """Alone in their batches, and with the first token ignored: then batches teach nothing."""
    text = tmp_path / "text"
    text.mkdir()
    for split, size in (("train", 40), ("valid", 8)):
        for lang, column in (("aa", 0), ("bb", 1)):
            pairs = [("", ""), ("a03", ""), ("", "b03"), ("a03", "b03"), ("a05 a01", "b05 b01")]
            lines = [pairs[i % len(pairs)][column] for i in range(size)]
            (text / f"{split}.{lang}").write_text("\n".join(lines) + "\n")
    known = [corpus.data / f"dict.{lang}.txt" for lang in ("aa", "bb")]
    data = binarise(text, tmp_path / "data", "--srcdict", known[0], "--tgtdict", known[1])
    options = (*SGD, "--max-sentences", 1, "--max-epoch", 1, "--report-accuracy")

    prefixes = (0, 1) if long else (1,)
    for prefix in prefixes:
        folder = tmp_path / str(prefix)
        taught_both_ways(data, teacher, folder, 24, *options, "--ignore-prefix-size", prefix)
    made = write_sequences(data, teacher, tmp_path / "made", "--beam", 2, "--no-filters").ok()
    assert "Translated 40 sentences" in made.text
    count("batches of an empty or one-token sentence", len(prefixes) * 2 * 32)


def test_a_training_of_which_no_token_is_selected(data, teacher, tmp_path, count):
    """It is plain training."""
    options = (*SGD, "--max-update", 5)
    selection = ("--kd-selection", "batch", "--kd-selection-rate", 0.001, "--kd-weight", 0.9)
    ours = distil(data, teacher, tmp_path / "ours", *options, *selection).ok()
    stock = train_plain(data, tmp_path / "stock", *options).ok()
    for key in ("loss", "nll_loss", "gnorm"):
        expected = stock.series("train_inner", key)
        assert ours.series("train_inner", key) == pytest.approx(expected, abs=0.0021)
    assert ours.series("train_inner", "kd_selected") == [0] * 5
    assert not any("kd_loss" in record for record in ours.records("train_inner"))
    assert_same_weights(
        *(folder / "checkpoint_last.pt" for folder in (tmp_path / "ours", tmp_path / "stock")),
        rtol=1e-3,
        atol=1e-5,
    )
    count("batches of which no token is selected", 5)
