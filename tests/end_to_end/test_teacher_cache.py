"""A teacher on disk: written by fairseq-kd-cache, trained from by fairseq-train."""

import json
import os
import random
import re
import shutil
import signal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import support
import torch
from support import (
    SGD,
    USER_DIR,
    assert_same_files,
    assert_same_weights,
    distil,
    fairseq,
    hypotheses,
    load,
    train_on_two_ranks,
    validate,
    write_cache,
)

SHORT = ("--max-update", 6, "--disable-validation")
SYMBOLS = 24  # 20 words and fairseq's special symbols
EIGHT = ("--top-k", 8, "--temperatures", 2, "--batch-size", 16)
SIDES = (support.SOURCE, support.TARGET)


def taught(data, cache, save_dir, *more, **how):
    return distil(data, None, save_dir, "--teacher-cache", cache, *more, **how)


class Cache(NamedTuple):
    folder: Path
    run: support.Run


@pytest.fixture(scope="module")
def eight(data, teacher, tmp_path_factory) -> Cache:
    """8 symbols, temperatures 2 and, as always, 1, of train and valid; not to be changed."""
    folder = tmp_path_factory.mktemp("eight")
    return Cache(folder, write_cache(data, teacher, folder, *EIGHT).ok())


@pytest.fixture(scope="module")
def whole(data, teacher, tmp_path_factory) -> Cache:
    folder = tmp_path_factory.mktemp("whole")
    options = ("--top-k", SYMBOLS, "--batch-size", 16)
    return Cache(folder, write_cache(data, teacher, folder, *options).ok())


class Taught(NamedTuple):
    run: support.Run
    folder: Path
    passing: Path  # where the cache was that is gone now


@pytest.fixture(scope="module")
def student(data, whole, tmp_path_factory) -> Taught:
    """As ``distilled``, from all symbols of a cache that is gone afterwards."""
    folder = tmp_path_factory.mktemp("student")
    passing = folder / "passing"
    shutil.copytree(str(whole.folder), str(passing))
    run = taught(
        *(data, passing, folder, "--max-update", 60, "--report-accuracy"),
        *("--valid-subset", "valid,valid1", "--save-interval-updates", 25),
    ).ok()
    shutil.rmtree(str(passing))
    return Taught(run, folder, passing)


# what is written


def test_rows_are_what_stock_fairseq_says_sentence_by_sentence(data, teacher, eight):
    """In float64, without padding, without this plugin's teacher."""
    from fairseq import checkpoint_utils

    import kd_plugin  # noqa: F401  lets torch open fairseq's checkpoints

    models, _, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(teacher)], arg_overrides={"data": str(data)}
    )
    model = models[0].double().eval()
    assert len(task.target_dictionary) == SYMBOLS
    for subset in ("train", "valid"):
        task.load_dataset(subset)
        dataset = task.dataset(subset)
        manifest = json.loads((eight.folder / subset / "manifest.json").read_text())
        rows = manifest["rows"]
        assert manifest["sentences"] == len(dataset) and rows == dataset.tgt_sizes.sum()

        def array(name, dtype, *shape, subset=subset):
            path = eight.folder / subset / (name + ".bin")
            return np.fromfile(str(path), dtype).reshape(*shape)

        offsets = array("offsets", "<i8", -1)
        symbols = array("symbols", "<u2", rows, 8)
        log_probs, rests = array("log_probs", "<f2", rows, 8), array("rests", "<f2", rows, 1)
        reference, entropy = array("reference", "<f2", rows), array("entropy", "<f2", rows)
        near = dict(rtol=6e-4, atol=2e-5)
        for i in range(0, len(dataset), 1 if subset == "valid" else 13):
            batch = dataset.collater([dataset[i]])
            with torch.no_grad():
                z = model(**batch["net_input"])[0][0].numpy().astype("f8")
            log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
            here = slice(offsets[i], offsets[i + 1])
            ordered = -np.sort(-log_p, -1)
            named = symbols[here].astype(int)
            assert all(len(set(row)) == 8 for row in named.tolist())
            np.testing.assert_allclose(log_probs[here], ordered[:, :8], **near)
            np.testing.assert_allclose(np.take_along_axis(log_p, named, -1), ordered[:, :8], **near)
            target = batch["target"][0].numpy()
            np.testing.assert_allclose(
                reference[here], log_p[np.arange(len(target)), target], **near
            )
            np.testing.assert_allclose(
                entropy[here], -(np.exp(log_p) * log_p).sum(-1), rtol=1e-3, atol=1e-4
            )
            rest = np.log(np.exp(ordered[:, 8:] / 2).sum(-1, keepdims=True))
            np.testing.assert_allclose(rests[here], rest, rtol=1e-3, atol=1e-4)


def test_the_command_reports_what_it_kept(distilled, eight, whole):
    """Its valid nll_loss is what a training with the running teacher logs."""
    expected = distilled.run.records("valid")[-1]["valid_teacher_nll_loss"]
    for cache, k in ((eight, 8), (whole, SYMBOLS)):
        found = re.findall(r"teacher: nll_loss ([\d.]+), entropy ([\d.]+) bits", cache.run.text)
        assert len(found) == 2  # train, valid
        assert float(found[1][0]) == pytest.approx(expected, abs=0.0021)
        assert "valid: 48 sentences" in cache.run.text
        assert f"top {k} of checkpoint_last.pt" in cache.run.text
    assert re.search(r"probability mass: mean 1.0000", whole.run.text)
    # 2 bytes for each symbol and log-probability, the reference, the entropy and a rest
    (bytes_, *_) = re.findall(r"([\d.]+) bytes per target token", eight.run.text)
    assert 8 * 4 + 3 * 2 < float(bytes_) < 8 * 4 + 3 * 2 + 8  # with an offset per sentence


def test_an_unfinished_cache_and_a_finished_one(data, teacher, eight, tmp_path):
    """Killed in the middle of a write; then the same command again, and again."""

    def run(**how):
        return write_cache(data, teacher, tmp_path, *EIGHT, **how)

    killed = run(file_limit=40001, killed_by_limit=True)
    assert killed.code == -signal.SIGXFSZ
    partial = tmp_path / "train" / "partial" / "shard-0-of-1"
    assert (partial / "symbols.bin").stat().st_size == 40001
    refused = taught(data, tmp_path, tmp_path / "student")
    assert "is not finished: run the same fairseq-kd-cache again" in refused.error
    run().ok()
    assert_same_files(tmp_path, eight.folder)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert "valid: 48 sentences" in run().ok().text
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_shards_and_a_merge_that_finds_no_room(data, teacher, eight, tmp_path):
    """Three shards, the last first; the merged file is longer than any shard's."""

    def run(shard, **how):
        options = (*EIGHT, "--num-shards", 3, "--shard-id", shard)
        return write_cache(data, teacher, tmp_path, *options, **how)

    for shard in (2, 1):
        done = run(shard).ok()
        assert f"train: shard {shard} of 3 is done; the last one to finish" in done.text
    limit = (eight.folder / "train" / "log_probs.bin").stat().st_size - 1000
    full = run(0, file_limit=limit)
    assert full.code == 1 and "run the same command again" in full.text
    assert not list(tmp_path.rglob("*.new"))
    killed = run(0, file_limit=limit, killed_by_limit=True)
    assert killed.code == -signal.SIGXFSZ
    left = sorted(p.name for p in (tmp_path / "train").iterdir())
    assert [name for name in left if name.endswith(".new")], left
    assert not (tmp_path / "train" / "manifest.json").exists()
    run(0).ok()
    assert_same_files(tmp_path, eight.folder)


def test_without_references(data, teacher, tmp_path):
    lonely = tmp_path / "data"
    shutil.copytree(str(data), str(lonely))
    for path in lonely.glob("train.*.bb.*"):
        path.unlink()
    run = write_cache(lonely, teacher, tmp_path / "cache")
    assert "needs references, and train of" in run.refusal
    assert not (tmp_path / "cache").exists()


def test_a_teacher_that_overflows(corpus, data, teacher, tmp_path):
    state = load(teacher)
    words = [line.split()[0] for line in (data / "dict.aa.txt").read_text().splitlines()]
    word = words[-4]
    row = 4 + words.index(word)
    state["model"]["encoder.embed_tokens.weight"][row] = torch.finfo(torch.float32).max
    torch.save(state, str(tmp_path / "broken.pt"))
    shutil.copy(str(data / "dict.aa.txt"), str(tmp_path))
    shutil.copy(str(data / "dict.bb.txt"), str(tmp_path))
    lines = (corpus.text / "valid.aa").read_text().splitlines()
    holders = {i for i, line in enumerate(lines) if word in line.split()}
    assert 0 < len(holders) < len(lines)

    run = write_cache(data, tmp_path / "broken.pt", tmp_path / "cache", "--gen-subset", "valid")
    assert run.code == 1 and "Traceback" not in run.text
    found = re.search(r"teacher \S*broken.pt gave NaN.* with ids \[([\d, ]+)\]", run.text)
    assert found, run.text[-2000:]
    assert {int(i) for i in found.group(1).split(",")} <= holders
    assert not (tmp_path / "cache" / "valid" / "manifest.json").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        (("--top-k", 25), "--top-k must be from 1 to the 24 symbols"),
        (("--temperatures", "warm"), "--temperatures needs numbers above 0"),
        (("--gen-subset", "nothing"), "Dataset not found: nothing"),
        (("--max-tokens", 5), "more than --max-tokens 5: raise it"),
        (("--path", "/nowhere.pt"), "/nowhere.pt"),
        (("--fp16",), "--fp16 needs a GPU"),
        (("--amp", "--teacher-checkpoint-path", "x"), "checkpoint-path give --path; --amp"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_the_command_refuses(options, words, data, teacher, tmp_path):
    tool = support.in_process
    run = write_cache(data, teacher, tmp_path / "cache", *options, tool=tool)
    assert run.code == 1 and "Traceback" not in run.text
    (line,) = [s for s in run.text.splitlines() if s.startswith("fairseq-kd-cache: ")]
    assert words in line and "What has been written is kept" not in line
    assert not list(tmp_path.rglob("manifest.json"))


# training


def close(one, other, keys, tolerance=0.006):
    for key in keys:
        here, there = one.series("train_inner", key), other.series("train_inner", key)
        assert len(here) == len(there) >= 6, key
        assert here == pytest.approx(there, rel=tolerance, abs=tolerance), key


def test_all_symbols_are_the_running_teacher(distilled, student):
    keys = ("loss", "kd_loss", "nll_loss", "teacher_nll_loss")
    close(student.run, distilled.run, keys, 0.02)
    for key in (*keys, "gnorm", "agreement", "accuracy"):
        here, there = (run.series("train_inner", key)[:8] for run in (student.run, distilled.run))
        assert here == pytest.approx(there, rel=0.002, abs=0.003), key
    losses = student.run.series("train_inner", "kd_loss")
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_a_cached_valid_subset_has_all_metrics_another_the_students(distilled, student):
    # it also validates when it saves
    cached = {record["valid_num_updates"]: record for record in student.run.records("valid")}
    for there in distilled.run.records("valid"):
        here = cached[there["valid_num_updates"]]
        for key in ("loss", "nll_loss", "kd_loss", "teacher_nll_loss", "agreement"):
            name = "valid_" + key
            assert here[name] == pytest.approx(there[name], rel=0.01, abs=0.005), key
    records = student.run.records("valid1")
    assert len(records) == len(cached) >= 3
    for record in records:
        assert {"valid1_loss", "valid1_nll_loss", "valid1_ppl"} <= set(record)
        assert not [key for key in record if "kd" in key or "teacher" in key or "agree" in key]
    said = re.findall(r"\| INFO \| .*no subset valid1 in the cache.*$", student.run.text, re.M)
    assert len(said) == 1 and "without kd_loss" in said[0]


@pytest.mark.parametrize(
    "k, flags",
    [
        (8, ()),
        (4, ("--kd-temperature", 2, "--left-pad-source")),
        (4, ("--kd-selection", "teacher-better", "--kd-weight-schedule", "adaptive")),
        (
            8,
            (
                *("--kd-tail", "renormalise", "--kd-temperature", 3, "--kd-divergence", "js"),
                *("--kd-selection", "teacher-correct", "--ignore-prefix-size", 1),
            ),
        ),
        (
            8,
            (
                *("--kd-selection", "teacher-entropy", "--kd-divergence", "reverse-kl"),
                *("--kd-temperature", 2, "--kd-queue-size", 100),
            ),
        ),
        (
            4,
            (
                *("--kd-tail", "renormalise", "--kd-temperature-schedule", "linear:1:3:5"),
                *("--kd-divergence", "skew-kl", "--sentence-avg", "--max-tokens", 150),
            ),
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_cut_from_the_cache_is_the_cut_of_the_running_teacher(
    data, teacher, eight, tmp_path, k, flags
):
    online = distil(data, teacher, tmp_path / "online", *SGD, *SHORT, "--kd-top-k", k, *flags).ok()
    cut = () if k == 8 else ("--kd-top-k", k)
    cached = taught(data, eight.folder, tmp_path / "cached", *SGD, *SHORT, *cut, *flags).ok()
    more = ["kd_weight"] if "adaptive" in flags else []
    more += ["kd_selected"] if "--kd-selection" in flags else []
    # one token of a few hundred more or less may be selected
    close(cached, online, ("loss", "nll_loss", "kd_loss", *more), 0.02 if more else 0.004)
    close(cached, online, ("gnorm",), 0.05 if more else 0.01)
    close(cached, online, ("ups", "wpb")[1:], 0)
    assert online.series("train_inner", "kd_loss")[0] > 0.05


def test_workers_change_nothing(data, whole, student, tmp_path):
    run = taught(
        *(data, whole.folder, tmp_path, "--max-update", 10, "--num-workers", 2),
        *("--report-accuracy", "--disable-validation"),
    ).ok()
    for key in ("loss", "kd_loss", "gnorm"):
        assert run.series("train_inner", key) == student.run.series("train_inner", key)[:10], key


def test_resumed_bit_for_bit(data, whole, student, tmp_path):
    """From inside the first epoch; the cache has moved since."""
    (saved,) = student.folder.glob("checkpoint_*_25.pt")
    shutil.copy(str(saved), str(tmp_path / "checkpoint_last.pt"))
    run = taught(data, whole.folder, tmp_path, "--max-update", 60, "--report-accuracy").ok()
    assert run.series("train_inner", "num_updates") == list(range(26, 61))
    assert run.series("train_inner", "kd_loss") == student.run.series("train_inner", "kd_loss")[25:]
    assert_same_weights(tmp_path / "checkpoint_last.pt", student.folder / "checkpoint_last.pt")


def test_two_ranks_are_one_rank_with_two_batches_per_update(data, eight, tmp_path):
    options = (
        *SGD,
        *("--max-epoch", 1, "--report-accuracy", "--ddp-backend", "legacy_ddp"),
        # 31 training batches and 7 validation batches: one rank gets a dummy batch, in the last
        # update one of the validation before it, which no cache knows
        *("--max-sentences", 21, "--max-sentences-valid", 7, "--teacher-cache", eight.folder),
        *("--validate-interval-updates", 5),
    )
    one = distil(data, None, tmp_path / "one", *options, "--update-freq", 2).ok()
    two, _ = train_on_two_ranks(*support.kd_arguments(data, None, tmp_path / "two", *options))
    assert len(one.records("train_inner")) == 16
    for tag, prefix in (("train_inner", ""), ("valid", "valid_")):
        for key in ("loss", "nll_loss", "kd_loss", "teacher_nll_loss", "agreement", "accuracy"):
            there, here = one.series(tag, prefix + key), two.series(tag, prefix + key)
            assert here == pytest.approx(there, abs=0.0021) and there, (tag, key)
    assert_same_weights(
        *(tmp_path / "one/checkpoint_last.pt", tmp_path / "two/checkpoint_last.pt"),
        rtol=1e-3,
        atol=1e-5,
    )


def test_train1_upsampled(data, teacher, tmp_path):
    """As fairseq concatenates it: the primary subset twice, then train1."""
    more = tmp_path / "data"
    shutil.copytree(str(data), str(more))
    for file in data.glob("valid1.*"):
        shutil.copy(str(file), str(more / file.name.replace("valid1", "train1")))
    options = ("--upsample-primary", 2)
    run = write_cache(
        *(more, teacher, tmp_path / "cache", "--gen-subset", "train", "--top-k", SYMBOLS, *options)
    ).ok()
    assert f"train: {2 * 640 + 24} sentences" in run.text
    online = distil(more, teacher, tmp_path / "online", *SHORT, *options).ok()
    cached = taught(more, tmp_path / "cache", tmp_path / "cached", *SHORT, *options).ok()
    close(cached, online, ("loss", "kd_loss", "wpb"), 0.003)
    other = taught(more, tmp_path / "cache", tmp_path / "none", "--upsample-primary", 1)
    refused(other, "upsample_primary is 1 here, 2 there")


def test_sentences_that_the_teacher_cannot_read(data, teacher, tmp_path):
    """They have no rows; training has to leave them out, and is told how."""
    cache = tmp_path / "cache"
    short = ("--model-overrides", "{'max_source_positions': 6}")
    write_cache(data, teacher, cache, *short, "--gen-subset", "train").ok()
    run = taught(data, cache, tmp_path / "none", "--disable-validation")
    refused(run, "has no rows for", "--max-source-positions", "of up to 21 source")
    limits = ("--max-source-positions", 6)
    options = (*SHORT, *limits, "--skip-invalid-size-inputs-valid-test")
    run = taught(data, cache, tmp_path / "cached", *options).ok()
    online = distil(data, teacher, tmp_path / "online", *options, "--kd-top-k", 8).ok()
    close(run, online, ("loss", "kd_loss", "wpb"), 0.004)


# after training


def test_a_student_works_without_the_cache(corpus, data, student, whole, tmp_path):
    """fairseq-generate does not even look at it; fairseq-validate does without, or is given one."""
    checkpoint = student.folder / "checkpoint_last.pt"
    broken = student.passing / "test"
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text("{")
    try:
        run = fairseq(
            *("fairseq-generate", data, *USER_DIR, "--path", checkpoint, "--cpu", "--beam", 2),
            *("--batch-size", 16, "--num-workers", 0, "--max-len-b", 10),
        ).ok()
    finally:
        shutil.rmtree(str(student.passing))
    assert len(hypotheses(run.text)) == 16

    during = student.run.records("valid")[-1]
    run = validate(data, checkpoint).ok()
    found = run.metrics()
    assert "no subset valid in the cache" in run.text
    assert found["nll_loss"] == pytest.approx(during["valid_nll_loss"], abs=0.0011)
    assert "kd_loss" not in found and "agreement" not in found
    found = validate(data, checkpoint, "--teacher-cache", whole.folder).ok().metrics()
    for key in ("loss", "nll_loss", "kd_loss", "teacher_nll_loss", "agreement"):
        assert found[key] == pytest.approx(during["valid_" + key], abs=0.0011), key


# refusals


def refused(run, *words):
    message = run.error
    for word in words:
        assert word in message, f"{word!r} not in: {message}"
    assert not run.records("train_inner")


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ("--kd-temperature", 3, "--kd-top-k", 9),
            ["--kd-top-k 9 is more than the 8 of the cache", "symbols at 1, 2; take --kd-tail"],
        ),
        (
            ("--kd-temperature-schedule", "linear:1:2:5"),
            ["--kd-temperature-schedule with --kd-tail bucket", "at 1, 2: take --kd-tail renorm"],
        ),
        (("--kd-divergence", "logit-mse"), ["logit-mse", "--kd-tail renormalise"]),
        (
            ("--teacher-checkpoint-path", "teacher.pt", "--teacher-dtype", "bf16"),
            ["leave out --teacher-checkpoint-path, --teacher-dtype, or leave out --teacher-cache"],
        ),
        (
            ("--truncate-source", "--max-source-positions", 6),
            ["truncate_source is 6 here, None there", "made from something other than"],
        ),
        (("--teacher-cache", "/nowhere"), ["no cache of the subset train in /nowhere"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_flags_that_the_cache_cannot_serve(flags, words, data, eight, tmp_path):
    refused(taught(data, eight.folder, tmp_path, *flags, tool=support.in_process), *words)
    assert not list(tmp_path.glob("**/checkpoint*.pt"))


def test_several_data_folders(data, eight, tmp_path):
    run = taught("{0}:{0}".format(data), eight.folder, tmp_path)
    refused(run, "expected a cache for each of the 2 data folders")


def test_neither_teacher_nor_cache(data, tmp_path):
    refused(distil(data, None, tmp_path), "--teacher-checkpoint-path or --teacher-cache")


def item_size(file, lines):
    tokens = sum(len(line.split()) + 1 for line in lines)
    assert file.stat().st_size % tokens == 0
    return file.stat().st_size // tokens


def swap(file, size, one, other, length):
    """Exchange two stretches of tokens of a binarised file."""
    content = bytearray(file.read_bytes())
    a, b = (slice(start * size, (start + length) * size) for start in (one, other))
    content[a], content[b] = content[b], content[a]
    assert file.read_bytes() != bytes(content)
    file.write_bytes(content)


@pytest.mark.parametrize("what", ["sentence", "order", "dictionary"])
def test_other_data_of_the_same_size(what, corpus, data, eight, tmp_path):
    other = tmp_path / "data"
    shutil.copytree(str(data), str(other))
    texts = {lang: (corpus.text / ("train." + lang)).read_text().splitlines() for lang in SIDES}
    if what == "dictionary":
        path = other / "dict.bb.txt"
        lines = path.read_text().splitlines()
        random.Random(1).shuffle(lines)
        path.write_text("\n".join(lines) + "\n")
        words = ["dictionaries: target differs"]
    elif what == "sentence":  # two words of the first one change places
        file = other / "train.aa-bb.bb.bin"
        swap(file, item_size(file, texts["bb"]), 0, 1, 1)
        words = ["data: train.aa-bb.bb.bin differs"]
    else:  # two sentences of the same length change places
        lengths = [len(line.split()) + 1 for line in texts["aa"]]
        first = next(i for i in range(1, 100) if lengths[i] == lengths[i + 1])
        at = sum(lengths[:first])
        for lang in SIDES:
            file = other / f"train.aa-bb.{lang}.bin"
            swap(file, item_size(file, texts[lang]), at, at + lengths[first], lengths[first])
        words = ["data: train.aa-bb.aa.bin differs", "data: train.aa-bb.bb.bin differs"]
    run = taught(other, eight.folder, tmp_path / "student", "--disable-validation")
    refused(run, f"the cache {eight.folder}/", *words)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut_off(path):
    os.truncate(str(path), path.stat().st_size - 2)


@pytest.mark.parametrize(
    "name, damage, words",
    [
        ("log_probs.bin", flip, ["log_probs.bin is damaged", "the checksum of its bytes from 0"]),
        ("entropy.bin", Path.unlink, ["entropy.bin is missing: make the cache again"]),
        ("manifest.json", cut_off, ["manifest.json cannot be read"]),
    ],
    ids=["flipped", "missing", "manifest"],
)
def test_damage(name, damage, words, data, eight, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(str(eight.folder), str(cache))
    damage(cache / "train" / name)
    refused(taught(data, cache, tmp_path / "student", "--disable-validation"), *words)


def test_subsets_that_are_not_alike(data, eight, whole, tmp_path):
    shutil.copytree(str(eight.folder / "train"), str(tmp_path / "train"))
    shutil.copytree(str(whole.folder / "valid"), str(tmp_path / "valid"))
    run = taught(data, tmp_path, tmp_path / "student")
    refused(run, str(tmp_path / "train"), str(tmp_path / "valid"), "make one of them again")


def test_a_teacher_trained_on_is_a_warning(data, teacher, tmp_path):
    cache = tmp_path / "cache"
    mine = tmp_path / "teacher.pt"
    shutil.copy(str(teacher), str(mine))
    write_cache(data, mine, cache, *EIGHT, "--gen-subset", "train").ok()
    mine.write_bytes(b"other weights")
    options = ("--max-update", 1, "--disable-validation")
    run = taught(data, cache, tmp_path / "student", *options).ok()
    assert len(run.records("train_inner")) == 1
    assert len(re.findall(r"WARNING \| .*teacher.pt is no longer the one", run.text)) == 1
