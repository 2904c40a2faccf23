"""Students of two pairs of languages: teach, validate, resume, translate, on two ranks."""

import json
import re
import shutil

import pytest
import torch
from support import (
    CHECKOUT,
    LANGUAGES,
    PLUGIN,
    SGD,
    STUDENT,
    TRAINING,
    USER_DIR,
    assert_same_weights,
    distil,
    fairseq,
    hypotheses,
    load,
    script,
    train_on_two_ranks,
)
from toy import SIZES, binarise, changed, write_text

from kd_plugin import benchmark
from kd_plugin.commands import benchmark as benchmark_command

TASK = "translation_multi_simple_epoch"
PAIRS = ("aa-bb", "cc-bb")
TAGS = ("--lang-pairs", ",".join(PAIRS), "--encoder-langtok", "src", "--decoder-langtok")
INSIDE = ("--kd-hidden", "mse", "--kd-attention-weight", 0.1)
METRICS = [f"{name}_{pair}" for name in ("nll_loss", "kd_loss") for pair in PAIRS]
assert TRAINING[-len(LANGUAGES) :] == LANGUAGES  # which would have the task decode one direction


@pytest.fixture(scope="session")
def two_pairs(once, corpus):
    """A data-bin of aa-bb and of cc-bb, which is smaller and has the same words."""

    def make(folder):
        sizes = {split: size // 2 for split, size in SIZES.items()}
        text = write_text(folder / "text", sizes, seed=5)
        given = [("--srcdict", "aa"), ("--tgtdict", "bb")]
        given = [x for flag, lang in given for x in (flag, corpus.data / f"dict.{lang}.txt")]
        other = binarise(text, folder / "other", *given, "--testpref", text / "test")
        data = folder / "data"
        shutil.copytree(str(corpus.data), str(data))
        for file in other.iterdir():
            if ".aa" in file.name:
                file.rename(data / file.name.replace("aa", "cc"))
            elif "aa-bb.bb" in file.name:
                file.rename(data / file.name.replace("aa-bb", "cc-bb"))
        return data

    return once("two-pairs", make)


@pytest.fixture
def paths(teacher, tmp_path):
    """A teacher of aa-bb, and one that says of cc-bb the same with less certainty."""

    def less_certain(state):
        for name, weight in state["model"].items():
            if name == "decoder.output_projection.weight":
                weight.mul_(0.5)

    other = changed(teacher, tmp_path / "other" / "teacher.pt", less_certain)
    return f"aa-bb={teacher},cc-bb={other}"


@pytest.fixture
def teachers(paths):
    overrides = "cc-bb={'source_lang': 'cc', 'dropout': 0.1}"
    return ("--teacher-checkpoint-path", paths, "--teacher-overrides", overrides)


def stock(data, save_dir, *more):
    criterion = ("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", 0.1)
    common = (*TRAINING[: -len(LANGUAGES)], *STUDENT, "--ignore-prefix-size", 1)
    return (data, "--task", TASK, *criterion, *common, *TAGS, "--save-dir", save_dir, *more)


def distilling(data, teachers, save_dir, *more):
    criterion = ("--criterion", "kd_label_smoothed_cross_entropy")
    own = (*USER_DIR, "--task", "kd_" + TASK, *criterion, *teachers)
    return (*stock(data, save_dir), *own, *more)


def test_weight_0_is_stock_training(two_pairs, teachers, tmp_path):
    options = (*SGD, "--max-update", 12, "--dropout", 0.1, "--sampling-method", "temperature")
    plain = fairseq("fairseq-train", *stock(two_pairs, tmp_path / "stock", *options)).ok()
    weightless = (*options, "--kd-weight", 0)
    arguments = distilling(two_pairs, teachers, tmp_path / "ours", *weightless)
    ours = fairseq("fairseq-train", *arguments).ok()
    assert len(plain.series("train_inner", "nll_loss")) == 12
    for tag, key in (("train_inner", "nll_loss"), ("valid", "valid_nll_loss")):
        assert ours.series(tag, key) == pytest.approx(plain.series(tag, key), abs=0.0021)
    assert_same_weights(
        *(tmp_path / "ours/checkpoint_last.pt", tmp_path / "stock/checkpoint_last.pt"),
        rtol=1e-3,
        atol=1e-5,
    )
    for name in METRICS:
        assert ours.series("valid", "valid_" + name)[-1] > 0


def test_a_student_resumes_translates_and_teaches(two_pairs, teachers, teacher, corpus, tmp_path):
    """It goes on in the second virtual epoch, with a queue of scores for each pair, and what it
    learns inside of the teachers and writes itself."""
    options = ("--max-update", 30, "--dropout", 0.1, "--save-interval-updates", 10)
    options += ("--virtual-epoch-size", 256, "--sampling-method", "temperature")
    options += ("--kd-selection", "global", "--kd-selection-scope", "pair", *INSIDE)
    options += ("--kd-inputs", "argmax", "--kd-inputs-rate", 0.3)

    def train(folder):
        arguments = distilling(two_pairs, teachers, tmp_path / folder, *options)
        return fairseq("fairseq-train", *arguments).ok()

    run = train("whole")
    losses = run.series("train_inner", "kd_loss")
    assert losses[-1] < losses[0] and run.series("valid", "valid_agreement_cc-bb")[-1] > 0
    (saved,) = (tmp_path / "whole").glob("checkpoint_2_20.pt")
    (tmp_path / "resumed").mkdir()
    shutil.copy(str(saved), str(tmp_path / "resumed" / "checkpoint_last.pt"))
    resumed = train("resumed")
    assert resumed.series("train_inner", "num_updates") == list(range(21, 31))
    assert resumed.series("train_inner", "kd_loss") == losses[20:]
    student = tmp_path / "whole/checkpoint_last.pt"
    last = tmp_path / "resumed/checkpoint_last.pt"
    assert_same_weights(last, student)
    maps, again = (load(path)["criterion"] for path in (student, last))
    assert len(maps) == 4 and all(torch.equal(maps[name], again[name]) for name in maps)
    for name in ("kd_hidden", "kd_attention", "kd_inputs"):
        assert max(run.series("train_inner", name)) > 0

    validated = fairseq(
        *("fairseq-validate", two_pairs, *USER_DIR, "--task", "kd_" + TASK, *TAGS, "--cpu"),
        *("--path", student, "--max-sentences", 16, "--required-batch-size-multiple", 1),
        *("--num-workers", 0, "--valid-subset", "valid", "--log-format", "json"),
    ).ok()
    for name in ("kd_loss", *METRICS):
        (found,) = validated.series("valid", "valid_" + name)
        assert found == pytest.approx(run.series("valid", "valid_" + name)[-1], abs=0.0011), name

    # in stock fairseq, pair by pair; without the plugin where torch opens what fairseq saves
    plugin = USER_DIR if hasattr(torch.serialization, "add_safe_globals") else ()
    decoding = ("--cpu", "--beam", 2, "--gen-subset", "test", "--num-workers", 0)
    bleu = {}
    for pair, count in zip(PAIRS, (SIZES["test"], SIZES["test"] // 2)):
        source, target = pair.split("-")
        found = fairseq(
            *("fairseq-generate", two_pairs, "--task", TASK, *TAGS, *plugin, "--path", student),
            *("-s", source, "-t", target, *decoding, "--required-batch-size-multiple", 1),
            *("--scoring", "sacrebleu"),
        ).ok()
        assert len(hypotheses(found.text)) == count
        bleu[pair] = float(re.findall(r"BLEU = ([\d.]+)", found.text)[-1])
    fairseq(
        *("fairseq-kd-report", two_pairs, *LANGUAGES, *decoding, "--output", tmp_path / "report"),
        *("--models", f"teacher={teacher}", f"student={student}", "--repeats", 1),
        *("--significance-samples", 10, "--train-sample", 0),
    ).ok()
    rows = json.loads((tmp_path / "report/report.json").read_text())["systems"]
    assert rows[1]["scores"]["BLEU"]["score"] == pytest.approx(bleu["aa-bb"], abs=0.01)

    again = distil(corpus.data, student, tmp_path / "again", "--max-update", 2).ok()
    assert "reads __aa__ ... </s>, writes after </s> __bb__" in again.text


@pytest.fixture
def caches(two_pairs, paths, tmp_path):
    """Of 8 symbols, made by two processes each, with the flags of a training beside the pair's."""
    of_pairs = dict(part.split("=") for part in paths.split(","))
    for pair, path in of_pairs.items():
        source, target = pair.split("-")
        given = ("--path", path, "--model-overrides", f"{{'source_lang': '{source}'}}")
        given += ("--cache", tmp_path / pair, "--virtual-epoch-size", 256, "--batch-size", 16)
        for shard in (0, 1):
            run = fairseq(
                *("fairseq-kd-cache", two_pairs, "--task", "kd_" + TASK, *TAGS, *given, "--cpu"),
                *("-s", source, "-t", target, "--num-shards", 2, "--shard-id", shard),
                *("--num-workers", 0),
            ).ok()
        assert (
            f"{tmp_path / pair / 'train'}: {SIZES['train'] // (1 + (pair != PAIRS[0]))}" in run.text
        )
    return ("--teacher-cache", ",".join(f"{pair}={tmp_path / pair}" for pair in PAIRS))


def test_from_caches_it_resumes_and_two_ranks_are_one(two_pairs, caches, tmp_path):
    """In virtual epochs, with a temperature's sampling of pairs, read by a worker."""
    options = ("--dropout", 0.1, "--virtual-epoch-size", 256, "--sampling-method", "temperature")

    def arguments(folder, *more):
        return distilling(two_pairs, caches, tmp_path / folder, *options, *more)

    often = ("--max-update", 24, "--save-interval-updates", 20, "--num-workers", 1)
    run = fairseq("fairseq-train", *arguments("whole", *often)).ok()
    losses = run.series("train_inner", "kd_loss")
    assert losses[-1] < losses[0] and run.series("valid", "valid_agreement_cc-bb")[-1] > 0
    (saved,) = (tmp_path / "whole").glob("checkpoint_2_20.pt")
    (tmp_path / "resumed").mkdir()
    shutil.copy(str(saved), str(tmp_path / "resumed" / "checkpoint_last.pt"))
    resumed = fairseq("fairseq-train", *arguments("resumed", *often)).ok()
    assert resumed.series("train_inner", "kd_loss") == losses[20:]
    assert_same_weights(*(tmp_path / f"{name}/checkpoint_last.pt" for name in ("whole", "resumed")))
    short = (*SGD, "--max-update", 6, "--max-sentences", 3, "--dropout", 0)
    one = fairseq("fairseq-train", *arguments("one", *short, "--update-freq", 2)).ok()
    two, _ = train_on_two_ranks(*arguments("two", *short, "--ddp-backend", "legacy_ddp"))
    for key in ("valid_kd_loss", "valid_teacher_nll_loss", "valid_kd_loss_cc-bb"):
        (here,), (there,) = (each.series("valid", key)[-1:] for each in (one, two))
        assert here == pytest.approx(there, abs=0.0021), key
    assert_same_weights(
        *(tmp_path / f"{name}/checkpoint_last.pt" for name in ("one", "two")),
        **{"rtol": 1e-3, "atol": 1e-5},
    )


def test_two_ranks_are_one_with_two_batches(two_pairs, teachers, tmp_path):
    """Most batches have sentences of one pair alone."""
    options = (*SGD, "--max-update", 12, "--max-sentences", 3, "--ddp-backend", "legacy_ddp")
    options += INSIDE
    arguments = distilling(two_pairs, teachers, tmp_path / "one", *options, "--update-freq", 2)
    one = fairseq("fairseq-train", *arguments).ok()
    two, other = train_on_two_ranks(*distilling(two_pairs, teachers, tmp_path / "two", *options))
    for tag, prefix in (("train_inner", ""), ("valid", "valid_")):
        for key in ("kd_loss", "kd_hidden", "kd_attention", *METRICS):
            there, here = (
                [record.get(prefix + key) for record in run.records(tag)] for run in (one, two)
            )
            # None where an update has nothing of the pair
            assert [x is None for x in here] == [x is None for x in there]
            known = [[x for x in run if x is not None] for run in (here, there)]
            assert known[0] and known[0] == pytest.approx(known[1], abs=0.0021), (tag, key)
    assert_same_weights(
        *(tmp_path / "one/checkpoint_last.pt", tmp_path / "two/checkpoint_last.pt"),
        rtol=1e-3,
        atol=1e-5,
    )


def test_the_benchmark_times_it(two_pairs, teachers, tmp_path):
    arguments = [*map(str, distilling(two_pairs, teachers, tmp_path))]
    steps = benchmark.Steps(benchmark_command._configuration(arguments), batches=1)
    measured = steps.costs(1)
    assert measured["target_tokens"] > 16
    assert {"plain step", "distilled step", "teacher forward", "caching"} < set(measured["costs"])


def test_the_shipped_yaml_runs(two_pairs, paths, tmp_path):
    name = "kd_" + TASK
    run = script(
        *("fairseq-hydra-train", "--config-dir", CHECKOUT / "recipes" / "config"),
        *("--config-name", name, f"common.user_dir={PLUGIN}", "common.cpu=true"),
        *(f"task.data={two_pairs}", "task.lang_pairs='aa-bb,cc-bb'", "task.langs=[aa,bb,cc]"),
        f"task.teacher_checkpoint_path='{paths}'",
        "+task.teacher_overrides=\"cc-bb={'source_lang':'cc'}\"",
        *("model.share_all_embeddings=false", "optimization.max_update=3"),
        "dataset.ignore_unused_valid_subsets=true",
        "common.log_format=json",
        cwd=tmp_path,
    ).ok()
    assert "valid_kd_loss_cc-bb" in run.text
    assert list(tmp_path.glob("outputs/*/*/checkpoints/checkpoint_best.pt"))
