"""A stranger's models, given to every command that opens one."""

import json
import struct
from pathlib import Path

import hostile
import pytest
import torch
from support import (
    LANGUAGES,
    USER_DIR,
    distil,
    fairseq,
    kd_arguments,
    load,
    write_cache,
    write_sequences,
)

EXPORT = "fairseq-kd-export"


def train(data, path, good, folder):
    return distil(data, path, folder, "--max-update", 1)


def cache(data, path, good, folder):
    return write_cache(data, path, folder, "--gen-subset", "valid")


def sequences(data, path, good, folder, *more):
    return write_sequences(data, path, folder, "--gen-subset", "valid", *more)


def ctranslate2_sequences(data, path, good, folder):
    return sequences(data, path, good, folder, "--engine", "ctranslate2")


def export(data, path, good, folder, *more):
    return fairseq(EXPORT, "--path", path, "--output", folder, "--data", data, *more)


def average(data, path, good, folder):
    return export(data, f"{good}:{path}", good, folder, "--average")


def ctranslate2_export(data, path, good, folder):
    return export(data, path, good, folder, "--format", "ctranslate2")


def benchmark(data, path, good, folder):
    training = kd_arguments(data, path, folder)
    return fairseq("fairseq-kd-benchmark", *training, "--rows", 0, "--repeats", 1)


COMMANDS = (train, cache, sequences, ctranslate2_sequences, export, average, ctranslate2_export,
    benchmark)  # fmt: skip


def models(teacher, marker, long):
    """Checkpoints that are the teacher's but for one thing, with a word of what is said."""
    whole = load(teacher)
    option = f"[__import__('os').mkdir({str(marker)!r})]"
    found = {
        "code in the optimizer state": ({**whole, "last_optimizer_state": hostile.Mkdir(marker)},
            "posix.mkdir"),
        "an option that is code": (hostile.configured(whole, adaptive_softmax_cutoff=option),
            "would execute"),
        "embeddings of 10^9 numbers": (hostile.configured(whole, encoder_ffn_embed_dim=10**9),
            "cannot be rebuilt"),
    }  # fmt: skip
    if long:
        name = "decoder.embed_tokens.weight"
        large = {**whole["model"], name: torch.zeros(1).expand(10**6, 10**6)}
        found.update(
            {
                "a weight of 10^12 numbers": ({**whole, "model": large}, "more numbers"),
                "code in a pretrained model": (
                    hostile.configured(
                        whole,
                        arch="transformer_from_pretrained_xlm",
                        _name="transformer_from_pretrained_xlm",
                        pretrained_xlm_checkpoint=str(marker),
                    ),
                    "evaluates, or opens",
                ),
                "a weight of text": (
                    {**whole, "model": {**whole["model"], name: "x"}},
                    "not all of its weights are tensors",
                ),
                "a language outside": (
                    {**whole, "cfg": {**whole["cfg"], "task": {"target_lang": "../bb"}}},
                    "not the name of a language",
                ),
            }
        )
    return {what: (hostile.saved(content), word) for what, (content, word) in found.items()}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_every_command(command, data, teacher, tmp_path, long, count):
    if command.__name__.startswith("ctranslate2"):
        pytest.importorskip("ctranslate2")
    marker, path, output = tmp_path / "executed", tmp_path / "evil.pt", tmp_path / "output"
    made = list(models(teacher, marker, long).items())
    if not long:  # each model to several commands
        made = [made[COMMANDS.index(command) % len(made)]]
    for what, (content, word) in made:
        path.write_bytes(content)
        if command is average and word == "cannot be rebuilt":  # it is not even built
            word = "cannot be averaged: encoder_ffn_embed_dim is 64 and 1000000000"
        run = command(data, path, teacher, output)
        last = run.text.strip().splitlines()[-1]
        assert run.code == 1 and str(path) in last and word in last, (what, run.text[-3000:])
        assert command is train or "Traceback" not in run.text, (what, run.text[-3000:])
        assert not marker.exists(), what
        assert not list(tmp_path.rglob("output*/*.pt")) and not output.is_file(), what
        count("hostile models given to a command")


def test_stock_fairseq_executes_what_building_evaluates(data, teacher, tmp_path):
    """Otherwise the option above shows nothing."""
    marker, path = tmp_path / "executed", tmp_path / "evil.pt"
    content, _ = models(teacher, marker, False)["an option that is code"]
    path.write_bytes(content)
    # the plugin lets newer torch open the file, and changes nothing else
    fairseq("fairseq-generate", data, "--path", path, *USER_DIR, "--cpu", *LANGUAGES)
    assert marker.exists()


def ctranslate2_models(good: Path, folder: Path):
    """Copies of a converted model, each with another file."""
    content = (good / "model.bin").read_bytes()
    spec = struct.unpack_from("<H", content, 4)[0]
    variables = 4 + 2 + spec + 4  # version, name of the model, its revision
    first = variables + 4
    name = struct.unpack_from("<H", content, first)[0]
    rank = first + 2 + name
    many = b"\xff" * 4
    files = {
        "truncated": ("model.bin", content[: len(content) // 2]),
        "empty": ("model.bin", b""),
        "text": ("model.bin", b"no model at all" * 100),
        "variables": ("model.bin", content[:variables] + many + content[variables + 4 :]),
        "size": ("model.bin", content[: rank + 1] + many + content[rank + 5 :]),
        "symbols": ("source_vocabulary.json", b"[[1]]"),
        "brackets": ("source_vocabulary.json", b"[" * 10**5),
        "record": ("kd_export.json", b'{"parameters": "<script>"}'),
    }
    for what, (file, changed) in files.items():
        copied = folder / what
        copied.mkdir()
        for path in good.iterdir():
            (copied / path.name).write_bytes(path.read_bytes())
        assert (copied / file).is_file()
        (copied / file).write_bytes(changed)
        yield what, copied


def test_report(data, teacher, tmp_path, long, count):
    marker, output = tmp_path / "executed", tmp_path / "report"
    named = {"teacher": teacher}
    checkpoints = [content for content, _ in models(teacher, marker, long).values()]
    for i, content in enumerate(checkpoints if long else checkpoints[:2]):
        named[f"evil{i}"] = tmp_path / f"evil{i}.pt"
        named[f"evil{i}"].write_bytes(content)
    try:
        import ctranslate2  # noqa: F401

        good = tmp_path / "good"
        fairseq(
            *(EXPORT, "--path", teacher, "--output", good, "--data", data, "--no-verify"),
            *("--format", "ctranslate2"),
        ).ok()
        converted = dict(ctranslate2_models(good, tmp_path))
        short = ("variables", "size", "record")
        named.update(converted if long else {what: converted[what] for what in short})
    except ImportError:
        pass
    run = fairseq(
        *("fairseq-kd-report", data, "--output", output, "--cpu", "--beam", 1, "--repeats", 1),
        *("--num-workers", 0, *LANGUAGES, "--models"),
        *[f"{name}={path}" for name, path in named.items()],
        timeout=900,  # a process for each
    )
    assert run.code == 1 and "Traceback" not in run.text, run.text[-3000:]
    assert not marker.exists()
    report = json.loads((output / "report.json").read_text())
    errors = {model["name"]: model["error"] for model in report["models"]}
    assert errors.pop("teacher") is None
    for name, error in errors.items():
        assert str(named[name]) in error
        count("hostile models given to a command")
