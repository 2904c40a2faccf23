"""Language models: teach, validate, resume, evaluate, cache; with fairseq's own commands."""

import json
import random
import re
import shutil

import pytest
import torch
from support import (
    CHECKOUT,
    PLUGIN,
    SGD,
    USER_DIR,
    assert_same_weights,
    fairseq,
    language_model,
    script,
    train_on_two_ranks,
)

from kd_plugin import benchmark
from kd_plugin.commands import benchmark as benchmark_command

WORDS = 30


@pytest.fixture(scope="session")
def text(once):
    """A data-bin of sentences in which each word is followed by one of three others."""

    def make(folder):
        rng = random.Random(1)
        for split, size in (("train", 300), ("valid", 40)):
            lines = [" ".join(f"w{word:02d}" for word in range(WORDS))] if split == "train" else []
            for _ in range(size):
                word, sentence = rng.randrange(WORDS), []
                for _ in range(rng.randint(3, 9)):
                    sentence.append(f"w{word:02d}")
                    word = (3 * word + rng.choice((0, 0, 1, 7))) % WORDS
                lines.append(" ".join(sentence))
            (folder / split).write_text("\n".join(lines) + "\n")
        fairseq(
            *("fairseq-preprocess", "--only-source", "--destdir", folder / "data"),
            *("--trainpref", folder / "train", "--validpref", folder / "valid", "--workers", 1),
        ).ok()
        return folder / "data"

    return once("lm-text", make)


@pytest.fixture(scope="session")
def teacher(once, text):
    def make(folder):
        fairseq(*stock(text, folder, "--max-update", 150, dim=32)).ok()
        return folder / "checkpoint_last.pt"

    return once("lm-teacher", make)


@pytest.fixture(scope="module")
def student(text, teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    distil(text, teacher, folder, "--max-update", 20)
    return folder / "checkpoint_last.pt"


def stock(text, save_dir, *more, dim=16):
    return ("fairseq-train", *language_model(text, save_dir, *more, dim=dim))


def distilled(text, teacher, save_dir, *more):
    return language_model(text, save_dir, "--teacher-checkpoint-path", teacher, *more, kd=True)


def distil(*of):
    return fairseq("fairseq-train", *distilled(*of)).ok()


def test_weight_0_is_stock_training_and_a_cache_is_its_teacher(text, teacher, tmp_path):
    options = (*SGD, "--max-update", 12, "--dropout", 0.1)
    plain = fairseq(*stock(text, tmp_path / "stock", *options)).ok()
    ours = distil(text, teacher, tmp_path / "ours", *options, "--kd-weight", 0)
    assert len(plain.series("train_inner", "nll_loss")) == 12
    for tag, key in (("train_inner", "nll_loss"), ("valid", "valid_nll_loss")):
        assert ours.series(tag, key) == pytest.approx(plain.series(tag, key), abs=0.0021)
    assert_same_weights(
        *(tmp_path / "ours/checkpoint_last.pt", tmp_path / "stock/checkpoint_last.pt"),
        rtol=1e-3,
        atol=1e-5,
    )

    caching = ("--task", "kd_language_modeling", "--tokens-per-sample", 16, "--cpu")
    made = fairseq(
        *("fairseq-kd-cache", text, "--path", teacher, "--cache", tmp_path / "cache", *caching),
        *("--top-k", WORDS + 4, "--max-sentences", 16, "--num-workers", 0),
    ).ok()
    assert "top 34 of checkpoint_last.pt" in made.text
    one = distil(text, teacher, tmp_path / "one", *options, "--kd-weight", 0.8)
    from_cache = ("--teacher-cache", tmp_path / "cache", *options, "--kd-weight", 0.8)
    two = fairseq(
        "fairseq-train", *language_model(text, tmp_path / "two", *from_cache, kd=True)
    ).ok()
    for tag, prefix in (("train_inner", ""), ("valid", "valid_")):
        for key in ("kd_loss", "nll_loss", *(["teacher_nll_loss"] if prefix else [])):
            there, here = (run.series(tag, prefix + key) for run in (one, two))
            assert here == pytest.approx(there, abs=0.01), (tag, key)
    others = language_model(
        *(text, tmp_path / "no", *from_cache, "--tokens-per-sample", 12), kd=True
    )
    refused = fairseq("fairseq-train", *others)
    assert "tokens_per_sample is 12 here, 16 there" in refused.error
    assert not list((tmp_path / "no").glob("*.pt"))


def test_a_student_resumes_is_evaluated_and_teaches(text, teacher, tmp_path):
    options = ("--max-update", 30, "--dropout", 0.1, "--save-interval-updates", 10)
    run = distil(text, teacher, tmp_path / "whole", *options)
    losses = run.series("train_inner", "kd_loss")
    assert losses[-1] < losses[0] and run.series("valid", "valid_agreement")[-1] > 0
    (saved,) = (tmp_path / "whole").glob("checkpoint_*_20.pt")
    (tmp_path / "resumed").mkdir()
    shutil.copy(str(saved), str(tmp_path / "resumed" / "checkpoint_last.pt"))
    resumed = distil(text, teacher, tmp_path / "resumed", *options)
    assert resumed.series("train_inner", "num_updates") == list(range(21, 31))
    student = tmp_path / "whole/checkpoint_last.pt"
    assert_same_weights(tmp_path / "resumed/checkpoint_last.pt", student)

    # fairseq's own evaluation; without the plugin where torch opens what fairseq saves
    plugin = USER_DIR if hasattr(torch.serialization, "add_safe_globals") else ()
    found = fairseq(
        *("fairseq-eval-lm", text, "--path", student, "--gen-subset", "valid", "--cpu"),
        *("--tokens-per-sample", 16, "--num-workers", 0, "--max-sentences", 16, *plugin),
        *("--required-batch-size-multiple", 1),
    ).ok()
    (perplexity,) = re.findall(r"Perplexity: ([\d.]+)", found.text)
    assert float(perplexity) == pytest.approx(run.series("valid", "valid_ppl")[-1], rel=0.005)
    validated = fairseq(
        *("fairseq-validate", text, "--user-dir", PLUGIN, "--task", "kd_language_modeling"),
        *("--path", student, "--cpu", "--max-sentences", 16, "--required-batch-size-multiple", 1),
        *("--num-workers", 0, "--valid-subset", "valid", "--log-format", "json"),
        *("--tokens-per-sample", 16),
    ).ok()
    assert f'"valid_kd_loss": "{run.series("valid", "valid_kd_loss")[-1]:g}"' in validated.text

    again = distil(text, student, tmp_path / "again", "--max-update", 2)
    assert "dictionaries from its checkpoint" in again.text


def test_two_ranks_are_one_with_two_batches(text, teacher, tmp_path):
    options = (*SGD, "--max-epoch", 1, "--max-sentences", 17, "--ddp-backend", "legacy_ddp")
    options += ("--kd-hidden", "relations", "--kd-attention-weight", 0.5)
    one = distil(text, teacher, tmp_path / "one", *options, "--update-freq", 2)
    two, _ = train_on_two_ranks(*distilled(text, teacher, tmp_path / "two", *options))
    for tag, prefix in (("train_inner", ""), ("valid", "valid_")):
        for key in ("nll_loss", "kd_loss", "kd_hidden", "kd_attention"):
            there, here = one.series(tag, prefix + key), two.series(tag, prefix + key)
            assert there and here == pytest.approx(there, abs=0.0021), (tag, key)
    assert_same_weights(
        *(tmp_path / "one/checkpoint_last.pt", tmp_path / "two/checkpoint_last.pt"),
        rtol=1e-3,
        atol=1e-5,
    )


def evaluated(text, path, *more, user_dir=()):
    """Loss and perplexity, as fairseq-eval-lm prints them."""
    found = fairseq(
        *("fairseq-eval-lm", text, "--path", path, "--gen-subset", "valid", "--cpu", *user_dir),
        *("--tokens-per-sample", 16, "--num-workers", 0, "--max-sentences", 16, *more),
        *("--required-batch-size-multiple", 1),
    ).ok()
    return re.findall(r"Loss \(base 2\): ([\d.]+), Perplexity: ([\d.]+)", found.text)[0]


def test_a_report_says_what_eval_lm_does_and_how_far_a_student_is(text, teacher, student, tmp_path):
    cut = ("--sample-break-mode", "complete", "--tokens-per-sample", 16)
    run = fairseq(
        *("fairseq-kd-report", text, "--models", f"teacher={teacher}", f"student={student}"),
        *("--output", tmp_path / "report", "--gen-subset", "valid", "--cpu", "--repeats", 1, *cut),
    ).ok()
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    loss, perplexity = evaluated(text, teacher, *cut)
    for system, name in zip(report["systems"], ("teacher", "student")):
        assert system["name"] == name and system["tokens_per_second"]["median"] > 0
        assert not {"beam", "length_ratio", "sentences_per_second", "left_out"} & set(system)
    assert f"{report['systems'][0]['loss']:.4f}" == loss
    assert f"{report['systems'][0]['scores']['perplexity']['score']:.2f}" == perplexity
    assert f"| teacher | {perplexity} | 1.0 x |" in run.text
    difference = report["differences"]["student"]
    assert set(difference["by"]) == {"frequency", "position", "entropy"}
    whole = difference["all"]
    assert whole["nll"] == pytest.approx(report["systems"][1]["loss"], rel=1e-5)
    assert whole["teacher_nll"] == pytest.approx(report["systems"][0]["loss"], rel=1e-5)
    assert whole["tokens"] == report["systems"][0]["tokens"] and whole["kl"] > 0
    page = (tmp_path / "report" / "report.html").read_text()
    for word in ("BLEU", "beam", "sentence/s", "translat", "length"):
        assert word not in re.sub(r"base64,[^\"]*", "", page)
    assert not (tmp_path / "report" / "translations").exists()


def test_an_export_is_the_same_in_stock_fairseq(text, teacher, student, tmp_path):
    run = fairseq(
        *("fairseq-kd-export", "--path", student, "--data", text, "--output", tmp_path / "s.pt"),
    ).ok()
    assert re.search(r"verified in stock fairseq: \d+ tokens of valid scored the same", run.text)
    state = torch.load(str(tmp_path / "s.pt"))
    assert state["cfg"]["task"]["_name"] == "language_modeling" and not state["criterion"]
    assert not {name for name in state["cfg"]["task"] if "teacher" in name or "lang" in name}
    plugin = USER_DIR if hasattr(torch.serialization, "add_safe_globals") else ()
    assert evaluated(text, tmp_path / "s.pt") == evaluated(text, student, user_dir=plugin)
    flags = ("--data", text, "--beam", 2, "--output", tmp_path / "no")
    refused = fairseq("fairseq-kd-export", "--path", student, *flags)
    assert re.search("--beam: of no use to model .* a decoder-only language model", refused.refusal)
    # it can teach
    assert (
        "dictionaries from its checkpoint"
        in distil(text, tmp_path / "s.pt", tmp_path / "again", "--max-update", 1).text
    )


def test_the_benchmark_times_it(text, teacher, tmp_path):
    arguments = [*map(str, distilled(text, teacher, tmp_path))]
    steps = benchmark.Steps(benchmark_command._configuration(arguments), batches=1)
    measured = steps.costs(1)
    assert measured["target_tokens"] > 16
    assert {"plain step", "distilled step", "caching"} < set(measured["costs"])


def test_the_shipped_yaml_runs(text, teacher, tmp_path):
    sizes = ("embed_dim", "input_dim", "output_dim")
    run = script(
        *("fairseq-hydra-train", "--config-dir", CHECKOUT / "recipes" / "config"),
        *("--config-name", "kd_language_modeling", f"common.user_dir={PLUGIN}"),
        *("common.cpu=true", f"task.data={text}", "task.tokens_per_sample=16"),
        *(f"task.teacher_checkpoint_path={teacher}", "optimization.max_update=3"),
        *(*(f"model.decoder_{size}=16" for size in sizes), "common.log_format=json"),
        cwd=tmp_path,
    ).ok()
    assert "valid_kd_loss" in run.text
    assert list(tmp_path.glob("outputs/*/*/checkpoints/checkpoint_best.pt"))
