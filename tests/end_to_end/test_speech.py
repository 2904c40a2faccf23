"""Speech: teach, validate, resume, write down, cache; with fairseq's own commands."""

import json
import random
import re
import shutil

import pytest
import torch
import yaml
from speech import AUGMENT, spaced, write_speech
from support import (
    PLUGIN,
    SGD,
    USER_DIR,
    assert_same_weights,
    fairseq,
    hypotheses,
    listener,
    train_on_two_ranks,
    train_plain,
)

from kd_plugin import benchmark
from kd_plugin.commands import benchmark as benchmark_command

LETTERS = "abcdefgh"
SAVED = "checkpoint_last.pt"


@pytest.fixture(scope="session")
def speech(once):
    """Spoken words, to be written in capitals; augmented.yaml masks what training hears."""

    def make(folder):
        rng = random.Random(1)
        utterances = {
            split: [
                (said, said.upper())
                for said in (
                    "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 6)))
                    for _ in range(size)
                )
            ]
            for split, size in (("train", 160), ("valid", 32))
        }
        data = write_speech(folder / "data", utterances, LETTERS, LETTERS.upper(), noise=0.5)
        config = yaml.safe_load((data / "config.yaml").read_text())
        (data / "augmented.yaml").write_text(yaml.safe_dump({**config, **AUGMENT}))
        for split, pairs in utterances.items():
            for lang, texts in zip(("aa", "bb"), zip(*pairs)):
                text = "".join(f"{spaced(one)}\n" for one in texts)
                (folder / f"{split}.{lang}").write_text(text)
        return data

    return once("speech", make)


@pytest.fixture(scope="session")
def teacher(once, speech):
    def make(folder):
        fairseq("fairseq-train", *listener(speech, folder, "--max-update", 100, dim=32)).ok()
        return folder / SAVED

    return once("speech-teacher", make)


@pytest.fixture(scope="session")
def reader(once, speech):
    """A teacher that translates the transcripts."""

    def make(folder):
        text = speech.parent
        fairseq(
            *("fairseq-preprocess", "-s", "aa", "-t", "bb", "--destdir", folder / "data"),
            *("--trainpref", text / "train", "--validpref", text / "valid", "--workers", 1),
        ).ok()
        train_plain(folder / "data", folder, "--max-update", 60, "--lr", 0.02).ok()
        return folder / SAVED

    return once("speech-reader", make)


def distilled(speech, teacher, save_dir, *more, **how):
    given = ("--teacher-checkpoint-path", teacher)
    return listener(speech, save_dir, *given, *more, kd=True, **how)


def distil(*of, **how):
    return fairseq("fairseq-train", *distilled(*of, **how)).ok()


def test_weight_0_is_stock_training_and_a_cache_is_its_teacher(speech, teacher, tmp_path):
    options = (*SGD, "--max-update", 10, "--dropout", 0.1)
    plain = fairseq("fairseq-train", *listener(speech, tmp_path / "stock", *options)).ok()
    ours = distil(speech, teacher, tmp_path / "ours", *options, "--kd-weight", 0)
    assert len(plain.series("train_inner", "nll_loss")) == 10
    for tag, key in (("train_inner", "nll_loss"), ("valid", "valid_nll_loss")):
        assert ours.series(tag, key) == pytest.approx(plain.series(tag, key), abs=0.0021)
    assert_same_weights(tmp_path / "ours" / SAVED, tmp_path / "stock" / SAVED, rtol=1e-3, atol=1e-5)

    made = fairseq(
        *("fairseq-kd-cache", speech, "--path", teacher, "--cache", tmp_path / "cache"),
        *("--task", "kd_speech_to_text", "--cpu", "--top-k", len(LETTERS) + 4),
        *("--max-sentences", 16, "--num-workers", 0),
    ).ok()
    assert "160 utterances" in made.text
    one = distil(speech, teacher, tmp_path / "one", *options, "--kd-weight", 0.8)
    from_cache = ("--teacher-cache", tmp_path / "cache", *options, "--kd-weight", 0.8)
    two = fairseq("fairseq-train", *listener(speech, tmp_path / "two", *from_cache, kd=True)).ok()
    for tag, prefix in (("train_inner", ""), ("valid", "valid_")):
        for key in ("kd_loss", "nll_loss", *(["teacher_nll_loss"] if prefix else [])):
            there, here = (run.series(tag, prefix + key) for run in (one, two))
            assert here == pytest.approx(there, abs=0.01), (tag, key)
    others = listener(speech, tmp_path / "no", *from_cache, kd=True, yaml="augmented.yaml")
    refused = fairseq("fairseq-train", *others)
    assert "cannot be used with specaugment" in refused.error
    assert not list((tmp_path / "no").glob("*.pt"))


def test_a_student_resumes_writes_and_teaches(speech, teacher, tmp_path):
    """Bit for bit, what SpecAugment masks included."""
    options = ("--max-update", 30, "--dropout", 0.1, "--save-interval-updates", 7)
    run = distil(speech, teacher, tmp_path / "whole", *options, yaml="augmented.yaml")
    losses = run.series("train_inner", "kd_loss")
    assert losses[-1] < losses[0] and run.series("valid", "valid_agreement")[-1] > 0
    (saved,) = (tmp_path / "whole").glob("checkpoint_*_14.pt")
    (tmp_path / "resumed").mkdir()
    shutil.copy(str(saved), str(tmp_path / "resumed" / SAVED))
    resumed = distil(speech, teacher, tmp_path / "resumed", *options, yaml="augmented.yaml")
    assert resumed.series("train_inner", "num_updates") == list(range(15, 31))
    student = tmp_path / "whole" / SAVED
    assert_same_weights(tmp_path / "resumed" / SAVED, student)

    # fairseq's own decoding; without the plugin where torch opens what fairseq saves
    plugin = USER_DIR if hasattr(torch.serialization, "add_safe_globals") else ()
    common = ("--cpu", "--max-sentences", 16, "--num-workers", 0)
    common += ("--required-batch-size-multiple", 1)
    found = fairseq(
        *("fairseq-generate", speech, "--task", "speech_to_text", "--path", student, *plugin),
        *("--gen-subset", "valid", "--beam", 1, *common),
    ).ok()
    assert len(hypotheses(found.text)) == 32
    validated = fairseq(
        *("fairseq-validate", speech, "--user-dir", PLUGIN, "--task", "kd_speech_to_text"),
        *("--path", student, *common, "--valid-subset", "valid", "--log-format", "json"),
    ).ok()
    assert f'"valid_kd_loss": "{run.series("valid", "valid_kd_loss")[-1]:g}"' in validated.text

    again = distil(speech, student, tmp_path / "again", "--max-update", 2)
    assert "dictionaries from its checkpoint" in again.text


def distance(a, b):
    """Words to substitute, delete or insert between two lists (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, one in enumerate(a):
        above, row[0] = row[:], i + 1
        for j, other in enumerate(b):
            row[j + 1] = min(above[j] + (one != other), above[j + 1] + 1, row[j] + 1)
    return row[-1]


def test_a_report_is_what_generate_writes(speech, teacher, tmp_path):
    pytest.importorskip("jiwer")
    distil(speech, teacher, tmp_path / "student", "--max-update", 5)
    models = {"teacher": teacher, "student": tmp_path / "student" / SAVED}
    search = ("--gen-subset", "valid", "--beam", 2, "--cpu", "--max-tokens", 400)
    output = tmp_path / "report"
    given = (speech, "--models", *(f"{name}={path}" for name, path in models.items()))
    asked = ("fairseq-kd-report", *given, *search, "--output", output, "--repeats", 1)
    made = fairseq(*asked).ok()
    assert "| model | WER | speed-up |" in made.text
    report = json.loads((output / "report.json").read_text())
    rows = [line.split("\t") for line in (speech / "valid.tsv").read_text().splitlines()[1:]]
    references = [row[4].split() for row in rows]
    for system, name in zip(report["systems"], models):
        lines = (output / "translations" / f"{name}.txt").read_text().splitlines()
        wrong = sum(distance(one, line.split()) for one, line in zip(references, lines))
        score = 100 * wrong / sum(map(len, references))
        assert system["name"] == name and len(lines) == 32
        assert system["scores"]["WER"]["score"] == pytest.approx(score)
        assert system["utterances_per_second"]["median"] == 32 / system["seconds"][0]
        more = ("--task", "speech_to_text", "--path", models[name], "--num-workers", 0)
        run = fairseq("fairseq-generate", speech, *more, *search, *USER_DIR).ok()
        assert lines == hypotheses(run.text)
    page = (output / "report.html").read_text()
    assert "frames to target symbols" in page and "32 utterances of valid" in page
    assert report["differences"]["student"]["all"]["tokens"] == sum(map(len, references)) + 32
    found = fairseq(*asked, "--model-langs", "student=a,b", "--nbest", 2, "--reference", "no")
    for words in ("--model-langs: of no use to models that hear", "--nbest: only", "no: no such"):
        assert words in found.refusal
    # another model of the data's, as its YAML file says
    config = yaml.safe_load((speech / "config.yaml").read_text())
    shutil.copytree(str(speech), str(tmp_path / "other"))
    for changed, words in (
        ({"input_channels": 2}, "input_channels 1, and the data's YAML file has 2"),
        ({"bpe_tokenizer": {"bpe": "characters"}}, "--remove-bpe: leave it out"),
    ):
        (tmp_path / "other" / "config.yaml").write_text(yaml.safe_dump({**config, **changed}))
        more = ("--output", tmp_path / "no", "--gen-subset", "valid", "--cpu", "--remove-bpe")
        refused = fairseq("fairseq-kd-report", tmp_path / "other", *given[1:], *more)
        assert words in refused.refusal


def test_two_ranks_are_one_with_two_batches(speech, teacher, tmp_path):
    options = (*SGD, "--max-epoch", 1, "--max-sentences", 17, "--ddp-backend", "legacy_ddp")
    options += ("--kd-hidden", "relations", "--kd-attention-weight", 0.5)
    one = distil(speech, teacher, tmp_path / "one", *options, "--update-freq", 2)
    two, _ = train_on_two_ranks(*distilled(speech, teacher, tmp_path / "two", *options))
    for tag, prefix in (("train_inner", ""), ("valid", "valid_")):
        for key in ("nll_loss", "kd_loss", "kd_hidden", "kd_attention"):
            there, here = one.series(tag, prefix + key), two.series(tag, prefix + key)
            assert there and here == pytest.approx(there, abs=0.0021), (tag, key)
    assert_same_weights(tmp_path / "one" / SAVED, tmp_path / "two" / SAVED, rtol=1e-3, atol=1e-5)


def test_a_teacher_of_text_and_its_cache(speech, reader, tmp_path):
    options = ("--teacher-reads", "transcript", "--max-update", 10, "--kd-weight", 0.8)
    one = distil(speech, reader, tmp_path / "one", *options, yaml="augmented.yaml")
    assert re.search(r"teacher on 64 utterances of train: nll_loss \d", one.text)
    fairseq(
        *("fairseq-kd-cache", speech, "--path", reader, "--cache", tmp_path / "cache"),
        *("--task", "kd_speech_to_text", "--teacher-reads", "transcript", "--cpu"),
        *("--config-yaml", "augmented.yaml", "--top-k", len(LETTERS) + 4),
        *("--max-sentences", 16, "--num-workers", 0),
    ).ok()
    from_cache = ("--teacher-cache", tmp_path / "cache", *options)
    two = fairseq(
        *("fairseq-train",),
        *listener(speech, tmp_path / "two", *from_cache, kd=True, yaml="augmented.yaml"),
    ).ok()
    for tag, key in (("train_inner", "kd_loss"), ("valid", "valid_teacher_nll_loss")):
        assert two.series(tag, key) == pytest.approx(one.series(tag, key), abs=0.01)


def test_the_benchmark_times_it(speech, teacher, tmp_path):
    arguments = [*map(str, distilled(speech, teacher, tmp_path))]
    steps = benchmark.Steps(benchmark_command._configuration(arguments), batches=1)
    measured = steps.costs(1)
    assert measured["target_tokens"] > 16
    assert {"plain step", "distilled step", "caching"} < set(measured["costs"])
