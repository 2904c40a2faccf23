"""fairseq-kd-benchmark measures what it says it measures, and its JSON holds all that it shows."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from typing import Any, Dict, List, NamedTuple

import pytest
import support
import torch
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.tasks.translation import TranslationConfig

from kd_plugin import benchmark
from kd_plugin.benchmark import pipeline
from kd_plugin.benchmark.machine import peak_allocated, peak_of_another_process
from kd_plugin.commands import benchmark as command
from kd_plugin.criterion import KDLabelSmoothedCrossEntropyCriterionConfig
from kd_plugin.errors import UserError
from kd_plugin.objective import divergences
from kd_plugin.tasks.translation import KDTranslationConfig

CPU = torch.device("cpu")
STOCK = "label_smoothed_cross_entropy"
DENSE = ["dense KL, T = 1", "dense KL, T = 1.7"]
OURS = ["forward-kl, T = 1", "forward-kl, T = 1.7"]
STEPS = ["plain step", "teacher forward", "distilled step"]
TO_PLAIN = "distilled step / plain step"
TO_PLAIN_AND_TEACHER = "distilled step / plain step + teacher forward"


class Measured(NamedTuple):
    text: str  # standard output
    figures: Dict[str, Any]  # from the JSON


@pytest.fixture(scope="module")
def measured(data, teacher, tmp_path_factory) -> Measured:
    """With the very arguments of a training.

    --user-dir is another copy of the plugin, as it is for an installed command and a checkout.
    """
    folder = tmp_path_factory.mktemp("benchmark")
    copy = folder / "copy" / "kd_plugin"
    shutil.copytree(str(support.PLUGIN), str(copy))
    student = folder / "student"
    student.mkdir()
    (student / "checkpoint_last.pt").touch()  # no training could go on from this
    arguments = support.kd_arguments(data, teacher, student, "--user-dir", copy)
    arguments = [*arguments, "--kd-ranking-weight", "1"]
    output = folder / "figures.json"
    done = subprocess.run(
        [sys.executable, "-m", "kd_plugin.commands.benchmark", *map(str, arguments)]
        + ["--repeats", "2", "--rows", "64", "--vocabularies", "50,100", "--batches", "2"]
        + ["--output", str(output)],
        cwd=str(support.CHECKOUT),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    # it trains nobody
    assert [(path.name, path.stat().st_size) for path in student.iterdir()] == [
        ("checkpoint_last.pt", 0)
    ]
    return Measured(done.stdout, json.loads(output.read_text()))


def assert_positive(quartiles):
    assert 0 < quartiles["low"] <= quartiles["median"] <= quartiles["high"]


def test_objective_figures(measured):
    found = measured.figures["objective"]
    assert [(one["vocabulary"], one["rows"]) for one in found] == [(50, 64), (100, 64)]
    for one in found:
        assert list(one["costs"]) == [STOCK, *DENSE, *OURS]
        for cost in one["costs"].values():
            for key in ("seconds", "to_stock", "to_dense"):
                assert_positive(cost[key])
        # each is compared with itself, and ours with the dense one at the same temperature
        itself = [(STOCK, "to_stock"), *((dense, "to_dense") for dense in DENSE)]
        for name, key in itself:
            assert set(one["costs"][name][key].values()) == {1.0}


def test_step_figures(measured, corpus):
    steps = measured.figures["steps"]
    # the batch of the 16 shortest sentences and that of the 16 longest; each has an end symbol
    lines = (corpus.text / "train.bb").read_text().splitlines()
    lengths = sorted(len(line.split()) + 1 for line in lines)
    tokens = sum(lengths[:16]) + sum(lengths[-16:])
    assert (steps["batches"], steps["target_tokens"]) == (2, tokens)

    assert list(steps["costs"])[:3] == STEPS
    for cost in steps["costs"].values():
        assert_positive(cost["seconds"])
        assert cost["tokens_per_second"] == pytest.approx(tokens / cost["seconds"]["median"])
    # in bytes: a process that has imported torch holds tens of megabytes
    peaks = measured.figures["peak_memory"]
    assert list(peaks) == list(steps["costs"])
    assert all(2e7 < peak < 1e11 for peak in peaks.values())
    for ratio in steps["ratios"].values():
        assert_positive(ratio)
    assert "distilled step / the same, outputs alone" in steps["ratios"]
    # the same rounds over a longer time
    for key in ("low", "median", "high"):
        assert steps["ratios"][TO_PLAIN_AND_TEACHER][key] < steps["ratios"][TO_PLAIN][key]


def test_all_that_is_shown_is_in_the_json(measured):
    """Row by row and number by number, to the digits shown."""
    expected = []
    for one in measured.figures["objective"]:
        for name, cost in one["costs"].items():
            quartiles = [cost[key] for key in ("seconds", "to_stock", "to_dense")]
            expected.append((name, [*quartiles, 100 * cost["extra_memory"]]))
    steps = measured.figures["steps"]
    for name, cost in steps["costs"].items():
        expected.append((name, [cost["seconds"], cost["tokens_per_second"]]))
    expected += [(name, [ratio]) for name, ratio in steps["ratios"].items()]
    peaks = measured.figures["peak_memory"]
    expected += [(name, [peak / 1e6]) for name, peak in peaks.items()]

    lines = measured.text.splitlines()
    for value in measured.figures["machine"].values():
        assert str(value) in lines[0]
    titles = ["64 rows, V = 50", "64 rows, V = 100", "2 batches, {target_tokens} target tokens"]
    for title in titles:
        assert any(line.endswith(title.format(**steps)) for line in lines), title
    shown = [line for line in lines if re.search(r"\d \(\d|\d MB$", line)]
    assert len(shown) == len(expected)
    for line, (name, values) in zip(shown, expected):
        assert line.startswith(name + "  ")
        found = re.findall(r"\d+(?:\.\d+)?", line[len(name) :])
        row = [figure for value in values for figure in figures(value)]
        assert len(found) == len(row), line
        for number, figure in zip(found, row):
            unit = 10.0 ** -len(number.partition(".")[2])
            assert float(number) == pytest.approx(figure, rel=1e-9, abs=0.501 * unit), line


def figures(value) -> List[float]:
    """A number, or a median and its quartiles."""
    return [value[k] for k in ("median", "low", "high")] if isinstance(value, dict) else [value]


def test_a_cached_step_leaves_out_what_no_cache_holds(data, teacher, tmp_path):
    support.write_cache(data, teacher, tmp_path / "cache", tool=support.in_process).ok()
    beyond = ("--kd-inputs", "argmax", "--kd-hidden", "relations", "--kd-ranking-weight", "1")
    given = ("--teacher-cache", tmp_path / "cache", *beyond)
    arguments = support.kd_arguments(data, teacher, tmp_path / "student", *given)
    steps = benchmark.Steps(command._configuration([*map(str, arguments)]), batches=1)
    for work in steps.works(["distilled step", "cached step"]).values():
        work()


def test_without_a_training_only_the_objective(tmp_path, capsys):
    output = tmp_path / "figures.json"
    chosen = ("--repeats", "1", "--rows", "8", "--vocabularies", "12", "--every-divergence")
    assert command.main([*chosen, "--output", str(output)]) == 0

    found = json.loads(output.read_text())
    assert set(found) == {"machine", "objective"}
    (objective,) = found["objective"]
    assert (objective["rows"], objective["vocabulary"]) == (8, 12)
    assert {*divergences.NAMES[1:], "forward-kl, top-k 8"} < set(objective["costs"])
    assert "tokens/s" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "other",
    [
        ("--task", "translation"),
        ("--criterion", "label_smoothed_cross_entropy"),
        ("--task", "translation", "--criterion", "label_smoothed_cross_entropy"),
    ],
    ids=["task", "criterion", "both"],
)
def test_another_training_is_refused(other, tmp_path, capsys):
    """In a sentence that says what is expected, and before anything is timed."""
    training = [str(tmp_path), *support.TRAINING, *support.STUDENT, *other]
    with pytest.raises(SystemExit) as stopped:
        command.main([str(argument) for argument in training])
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "--max-tokens" not in shown.err  # a sentence does not drown in all of fairseq's flags
    last = shown.err.strip().splitlines()[-1]
    for word in ("--task kd_translation", "--criterion kd_label_smoothed_cross_entropy"):
        assert word in last


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("data-bin", "--cpu"), ["a distillation run", "--arch"]),
        (("--rows", "0", "--output", "nowhere/x.json"), ["nowhere/x.json", "no such folder"]),
        (("--vocabularies", "8k"), ["--vocabularies", "8000,32000", "'8k'"]),
        (("--vocabularies", "8000,1"), ["--vocabularies", "above 1"]),
        (("--preset", "x", "--vocabularies", "4"), ["--vocabularies", "larger"]),
        (("--preset", "x", "--cpu"), ["--preset", "no other arguments", "--cpu"]),
        (("--preset", "x", "--map-leaves", "0"), ["--map-leaves", "at least 1"]),
        (("--map-leaves", "9"), ["--map-leaves needs --preset"]),
    ],
    ids=[
        *("no arch", "no folder", "no number", "no vocabulary"),
        *("no symbols", "training", "no map", "no preset"),
    ],
)
def test_what_is_missing_or_wrong_is_named(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(list(arguments))
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    for word in words:
        assert word in shown.err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "fault, code, shown",
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (UserError("teacher t.pt: arch 'evil\x1b]0;owned\x07'"), 1, "evil\\x1b]0;owned\\x07"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
    ],
    ids=["Ctrl-C", "hostile checkpoint", "disk"],
)
def test_what_ends_it_is_one_sentence(fault, code, shown, capsys, monkeypatch):
    """No traceback, and nothing that a stranger's file could do to a terminal."""

    def fail(**asked):
        raise fault

    monkeypatch.setattr(pipeline, "objective_costs", fail)
    assert command.main(["--rows", "8", "--vocabularies", "12"]) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error and "\x1b" not in error and "\x07" not in error
    last = error.strip().splitlines()[-1]
    assert last.startswith("fairseq-kd-benchmark: ") and shown in last


def test_what_a_failing_process_says_is_escaped():
    """The peak memory is measured in processes of their own, whose words end up in a message."""
    script = "import sys; sys.exit('arch evil\x1b[2J')"
    with pytest.raises(UserError) as failed:
        peak_of_another_process(["-c", script])
    assert "peak memory" in str(failed.value) and "\x1b" not in str(failed.value)


def test_of_a_failing_process_the_last_lines_are_shown():
    """A traceback says at its end what went wrong; what came before may be long."""
    script = "import sys; print('first', 'x' * 9000, file=sys.stderr); sys.exit('the reason')"
    with pytest.raises(UserError) as failed:
        peak_of_another_process(["-c", script])
    assert str(failed.value).endswith("x\nthe reason") and "first" not in str(failed.value)


def test_a_student_that_fairseq_cannot_build(data, teacher, tmp_path, capsys):
    """In one sentence: two dictionaries cannot share their embeddings."""
    training = support.kd_arguments(data, teacher, tmp_path, "--share-all-embeddings")
    assert command.main([*map(str, training), "--rows", "0"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    last = error.strip().splitlines()[-1]
    assert last.startswith("fairseq-kd-benchmark: fairseq cannot set up this training: ")
    assert "--share-all-embeddings requires a joined dictionary" in last


@pytest.mark.parametrize(
    "config, stock",
    [
        (KDTranslationConfig, TranslationConfig),
        (KDLabelSmoothedCrossEntropyCriterionConfig, LabelSmoothedCrossEntropyCriterionConfig),
    ],
    ids=["task", "criterion"],
)
def test_help_lists_every_flag(config, stock, capsys, monkeypatch):
    """Each with what it does and with its default, once; None is no default to show."""
    monkeypatch.setenv("COLUMNS", "1000")  # no line breaks
    assert command.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "--sentence-avg " in text
    inherited = {field.name for field in dataclasses.fields(stock)}
    own = [f for f in dataclasses.fields(config) if f.name not in inherited and f.metadata]
    assert len(own) >= 7
    for field in own:
        flag = "--" + field.name.replace("_", "-")
        (entry,) = re.findall(rf"^  {flag}\b(?!-).*(?:\n   .*)*$", text, re.MULTILINE)
        assert field.metadata["help"].split(" (")[0] in entry, flag
        assert entry.count("(default: ") <= 1 and "None" not in entry, flag
        if field.default is not None:
            assert entry.endswith(f"(default: {field.default})"), flag


SMALL = """--arch transformer --encoder-layers 2 --decoder-layers 1 --share-all-embeddings
--encoder-embed-dim 8 --encoder-ffn-embed-dim 16 --encoder-attention-heads 2
--decoder-embed-dim 8 --decoder-ffn-embed-dim 16 --decoder-attention-heads 2  # comment
"""


def test_students_that_nobody_has_trained(tmp_path, capsys):
    pytest.importorskip("ctranslate2")
    output, files = tmp_path / "figures.json", []
    for name, flags in (("one", SMALL), ("two", SMALL.replace("layers 2", "layers 3"))):
        files.append(tmp_path / f"{name}.flags")
        files[-1].write_text(flags)
    how = ("--vocabularies", "50,60", "--sentence-length", "5", "--map-leaves", "20")
    how = (*how, "--repeats", "2", "--output", str(output))
    assert command.main(["--preset", *map(str, files), *how]) == 0
    found = json.loads(output.read_text())
    assert set(found) == {"machine", "students"}
    assert [one["vocabulary"] for one in found["students"]] == [50, 60]
    # self-attention or attention to the source, feed-forward, layer norms
    attention, linear, norm = 4 * (8 * 8 + 8), 2 * 8 * 16 + 16 + 8, 2 * 8
    layer, decoder = attention + linear + 2 * norm, 2 * attention + linear + 3 * norm
    for one in found["students"]:
        students = one["students"]
        assert list(students) == ["one", "one, 20 symbols", "two", "two, 20 symbols"]
        for name, student in students.items():
            inner = layer * (2 if name.startswith("one") else 3) + decoder
            assert student["parameters_without_embeddings"] == inner
            assert student["parameters"] == inner + 8 * one["vocabulary"]
            assert student["bytes"] > 1000
            assert_positive(student["sentences_per_second"])
            assert_positive(student["to_first"])
        assert set(students["one"]["to_first"].values()) == {1.0}
    assert "greedy, 5 subwords each, V = 60" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--encoder-layers 2", "expected flags of fairseq-train, --arch among them"),
        (SMALL + "--layers 3", "fairseq refuses its flags: unrecognized arguments: --layers 3"),
        (SMALL + "--arch 'x", "cannot be read: No closing quotation"),
        (SMALL + "--encoder-attention-heads 3", "cannot build the student one: embed_dim must be"),
        (SMALL + "--adaptive-softmax-cutoff 9", "--adaptive-softmax-cutoff|embeddings"),
        (SMALL + "--max-target-positions 25", "student one takes sentences of up to 24 subwords"),
        (None, "No such file"),
    ],
)
def test_a_preset_that_is_no_student(flags, words, tmp_path, capsys):
    pytest.importorskip("ctranslate2")
    file = tmp_path / "one.flags"
    if flags is not None:
        file.write_text(flags)
    assert command.main(["--preset", str(file), "--vocabularies", "50", "--repeats", "1"]) == 1
    shown = capsys.readouterr()
    last = shown.err.strip().splitlines()[-1]
    assert last.startswith("fairseq-kd-benchmark: ") and re.search(words, last), last
    assert "--max-tokens" not in shown.err


MEGA = 1 << 20


def allocate(megabytes: int) -> torch.Tensor:
    return torch.empty(megabytes * MEGA, dtype=torch.uint8)


def nothing():
    pass


def three_at_once_then_another():
    several = [allocate(1), allocate(2), allocate(3)]
    del several
    allocate(4)


def one_after_the_other():
    for megabytes in (1, 3, 2):
        allocate(megabytes)


def overlapping():
    first = allocate(1)
    second = allocate(2)
    del first
    third = allocate(3)
    del second, third


class Replaces:
    """What a training step does: the gradient before is freed, the new one stays."""

    kept = None

    def __call__(self):
        self.kept = None
        self.kept = allocate(2)
        allocate(1)


@pytest.mark.parametrize(
    "work, megabytes",
    [
        (nothing, 0),
        (three_at_once_then_another, 6),
        (one_after_the_other, 3),
        (overlapping, 5),
        (Replaces(), 3),
    ],
    ids=["nothing", "three", "sequence", "overlapping", "replaced"],
)
def test_peak_allocated(work, megabytes):
    """Also the second time, when there is something of the first to be freed."""
    for _ in range(2):
        assert peak_allocated(work, CPU) == megabytes * MEGA


def test_extra_memory_is_a_share_of_the_logits():
    """The dense loss keeps several tensors like the logits; ours a few chunks of rows."""
    costs = benchmark.objective_costs(
        rows=4096, vocabulary=1000, repeats=1, device=CPU, dtype=torch.float32
    )["costs"]
    assert all(3 <= costs[name]["extra_memory"] < 5 for name in DENSE)
    assert all(0 < costs[name]["extra_memory"] < 1 for name in OURS)
