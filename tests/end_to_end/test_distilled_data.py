"""fairseq-kd-sequences: the teacher's translations, as a data-bin that trains."""

import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

import pytest
import sacrebleu
import support
from support import (
    LANGUAGES,
    SOURCE,
    STOCK,
    TARGET,
    TRAINING,
    USER_DIR,
    fairseq,
    train_plain,
    transformer,
    tree,
    write_sequences,
)
from toy import binarise, dictionary_lines, train_teacher, write_dictionaries

from kd_plugin import decoding
from kd_plugin.commands import sequences as command

BEAM = ("--beam", 4, "--nbest", 4)


def lists(folder) -> Dict[int, List[Tuple[str, float]]]:
    lines = (Path(folder) / "hypotheses.jsonl").read_text(encoding="utf-8").splitlines()
    found = map(json.loads, lines)
    return {one["id"]: [(n["subwords"], n["score"]) for n in one["nbest"]] for one in found}


def generated(text: str) -> Dict[int, List[Tuple[str, float]]]:
    """fairseq-generate's n best, scores in nats."""
    found: Dict[int, List[Tuple[str, float]]] = {}
    for i, score, said in re.findall(r"^H-(\d+)\t(\S+)\t(.*)$", text, re.MULTILINE):
        found.setdefault(int(i), []).append((said, float(score) * 0.6931471805599453))
    return found


def assert_same_lists(ours, theirs, count):
    assert len(theirs) == count and ours.keys() == theirs.keys()
    for i in theirs:
        assert [said for said, _ in ours[i]] == [said for said, _ in theirs[i]], i
        assert [score for _, score in ours[i]] == pytest.approx([x for _, x in theirs[i]], rel=1e-5)


def text_of(output, lang, kind="") -> List[str]:
    return (output / "text" / f"train{kind}.{lang}").read_text().splitlines()


def record(output):
    return json.loads((output / "record.json").read_text())


class Made(NamedTuple):
    output: Path
    run: support.Run


@pytest.fixture(scope="module")
def weak(data, tmp_path_factory) -> Path:
    """A teacher that makes mistakes, so that its n best differ."""
    folder = tmp_path_factory.mktemp("weak")
    return train_teacher(data, folder, transformer(32), 160)


@pytest.fixture(scope="module")
def made(data, weak, tmp_path_factory) -> Made:
    """Of the 4 best the closest one; not to be changed."""
    output = tmp_path_factory.mktemp("made") / "data"
    options = ("--select", "closest", "--metric", "chrf", *BEAM)
    return Made(output, write_sequences(data, weak, output, *options).ok())


def test_the_hypotheses_are_those_of_fairseq_generate(data, weak, made):
    run = fairseq(
        "fairseq-generate",
        *(data, *USER_DIR, "--path", weak, "--gen-subset", "train", "--cpu", *LANGUAGES, *BEAM),
        *("--batch-size", 64, "--required-batch-size-multiple", 1),
    ).ok()
    assert_same_lists(lists(made.output / "hypotheses"), generated(run.text), 640)


def test_the_closest_is_the_one_that_sacrebleu_says(corpus, made):
    sources = (corpus.text / ("train." + SOURCE)).read_text().splitlines()
    references = (corpus.text / ("train." + TARGET)).read_text().splitlines()
    expected = []
    for i, nbest in sorted(lists(made.output / "hypotheses").items()):
        scores = [sacrebleu.sentence_chrf(said, [references[i]]).score for said, _ in nbest]
        expected.append((sources[i], nbest[scores.index(max(scores))][0]))
    kept = list(zip(text_of(made.output, SOURCE), text_of(made.output, TARGET)))
    dropped = [pair for pair in expected if pair not in set(kept)]
    assert len(kept) + len(dropped) == 640 == len(expected)
    assert [pair for pair in expected if pair in set(kept)] == kept
    counts = record(made.output)["counts"]
    assert counts["distilled"] == len(kept) and sum(counts["dropped"].values()) == len(dropped)
    assert len(dropped) < 64
    # some of them are not the likeliest: there was something to choose
    likeliest = [nbest[0][0] for _, nbest in sorted(lists(made.output / "hypotheses").items())]
    assert sum(a != b for (_, a), b in zip(expected, likeliest)) > 20


def test_it_is_what_fairseq_preprocess_would_make_of_the_text(data, made, tmp_path):
    fairseq(
        "fairseq-preprocess",
        *("--source-lang", SOURCE, "--target-lang", TARGET, "--destdir", tmp_path),
        *("--trainpref", made.output / "text" / "train.subwords", "--workers", 1),
        *("--srcdict", data / f"dict.{SOURCE}.txt"),
        *("--tgtdict", data / f"dict.{TARGET}.txt"),
    ).ok()
    for lang in (SOURCE, TARGET):
        for end in ("bin", "idx"):
            name = f"train.{SOURCE}-{TARGET}.{lang}.{end}"
            assert (made.output / name).read_bytes() == (tmp_path / name).read_bytes(), name
    for path in data.iterdir():
        if path.name.startswith(("valid", "test", "dict")):
            assert (made.output / path.name).read_bytes() == path.read_bytes()


def test_it_trains(made, tmp_path):
    run = train_plain(made.output, tmp_path, "--max-epoch", 2).ok()
    losses = run.series("train_inner", "nll_loss")
    assert losses[-1] < 0.9 * losses[0]
    assert run.series("valid", "valid_nll_loss")


def test_a_finished_command_again_changes_nothing(data, weak, made):
    before = {p: p.stat().st_mtime_ns for p in made.output.rglob("*")}
    options = ("--select", "closest", "--metric", "chrf", *BEAM)
    again = write_sequences(data, weak, made.output, *options).ok()
    assert before == {p: p.stat().st_mtime_ns for p in made.output.rglob("*")}
    # a progress bar, which is on stderr, may stand before it in the same line
    summary = re.findall(re.escape(f"{made.output}: ") + r"\d+ distilled.*", made.run.text)
    assert len(summary) == 1 and summary[0] in again.text


def test_choosing_again_decodes_nothing(data, weak, made, tmp_path):
    """Another selection from the same lists, of a teacher whose file is somewhere else by now."""
    moved = tmp_path / "elsewhere.pt"
    shutil.copy(str(weak), str(moved))
    best = tmp_path / "best"
    folder = made.output / "hypotheses"
    run = write_sequences(data, moved, best, "--hypotheses", folder, *BEAM, "--no-filters").ok()
    assert "Translated" not in run.text and not (best / "hypotheses").exists()
    expected = [nbest[0][0] for _, nbest in sorted(lists(folder).items())]
    assert text_of(best, TARGET) == [said for said in expected if said]


@pytest.fixture(scope="module")
def backward(data, tmp_path_factory) -> Path:
    """A model of the other direction."""
    folder = tmp_path_factory.mktemp("backward")
    return train_teacher(data, folder, transformer(32), 120, "-s", TARGET, "-t", SOURCE)


def test_the_one_that_tells_most_of_its_source(data, weak, made, backward, tmp_path):
    """Sources are scored as fairseq-generate scores references."""
    kept = ("--hypotheses", made.output / "hypotheses")
    how = ("--select", "backward", "--backward-path", backward, *BEAM, *kept, "--no-filters")

    def score(output):
        """Of each pair that was written, per token, in bits."""
        run = fairseq(
            *("fairseq-generate", output, *USER_DIR, "--path", backward, "--gen-subset", "train"),
            *("-s", TARGET, "-t", SOURCE, "--score-reference", "--cpu"),
            *("--required-batch-size-multiple", 1),
        ).ok()
        return dict(re.findall(r"^H-(\d+)\t(\S+)", run.text, re.MULTILINE))

    best = tmp_path / "best"
    write_sequences(data, weak, best, *how, "--keep", 1).ok()
    scores = [float(value) for value in score(best).values()]
    assert len(scores) == 640
    mean = record(best)["means"]["backward"] / math.log(2)
    assert mean == pytest.approx(sum(scores) / 640, abs=1e-4)
    # all of them, in this order: each sentence's first is the one that was chosen above
    every = tmp_path / "every"
    write_sequences(data, weak, every, *how, "--keep", 4).ok()
    counts, total = record(every)["counts"], sum(map(len, lists(kept[1]).values()))
    assert counts["distilled"] + counts["duplicates"] == total > 3.9 * 640
    # kept once for both; and those of the closest
    values = [*(made.output / "hypotheses").glob("values-*[0-9a-f]")]
    assert [path.stat().st_size for path in values] == [8 * total] * 2
    scores = score(every)
    sources = text_of(every, SOURCE)
    ordered = [float(scores[str(i)]) for i in range(len(sources))]
    by_source = {}
    for source, value in zip(sources, ordered):
        by_source.setdefault(source, []).append(value)
    single = [own for source, own in by_source.items() if len(own) <= 4]
    assert len(single) > 300
    assert all(a >= b - 1e-4 for own in single for a, b in zip(own, own[1:]))


def test_a_backward_model_of_ctranslate2(data, weak, made, backward, tmp_path):
    """Its scores are the checkpoint's."""
    pytest.importorskip("ctranslate2")
    export = ("--format", "ctranslate2", "--no-verify", "--data", data)
    for path, pair in ((backward, (TARGET, SOURCE)), (weak, (SOURCE, TARGET))):
        output = tmp_path / pair[0]
        langs = ("-s", pair[0], "-t", pair[1])
        fairseq("fairseq-kd-export", "--path", path, *export, *langs, "--output", output).ok()
    how = ("--hypotheses", made.output / "hypotheses", "--select", "backward", *BEAM)
    means, chosen = [], []
    for model in (backward, tmp_path / TARGET):
        output = tmp_path / f"of {model.name}"
        write_sequences(data, weak, output, *how, "--backward-path", model).ok()
        means.append(record(output)["means"]["backward"])
        chosen.append(text_of(output, TARGET))
    assert means[1] == pytest.approx(means[0], abs=1e-5)
    assert sum(a == b for a, b in zip(*chosen)) > 0.99 * len(chosen[0]) > 500
    run = write_sequences(data, weak, tmp_path / "no", *how, "--backward-path", tmp_path / SOURCE)
    assert "its vocabularies are not the data's dictionaries, in the other order" in run.refusal
    assert not (tmp_path / "no").exists()


def test_a_model_of_the_same_direction_is_no_backward_one(data, weak, made, tmp_path):
    how = ("--min-backward-quantile", 0.1, "--backward-path", weak, *BEAM)
    refusal = write_sequences(data, weak, tmp_path / "no", *how, tool=support.in_process).refusal
    assert f"{weak} translates aa-bb, expected was bb-aa" in refusal
    assert not (tmp_path / "no").exists()


def test_languages_need_not_be_told(data, weak, tmp_path):
    """As of fairseq-generate: the names of the data's files say them."""
    arguments = (data, "--path", weak, "--cpu", "--num-workers", 0, "--gen-subset", "valid")
    run = fairseq("fairseq-kd-sequences", *arguments, "--output", tmp_path / "found").ok()
    assert "distilled sentences" in run.text
    write_sequences(data, weak, tmp_path / "told", "--gen-subset", "valid", "--batch-size", 48).ok()
    assert text_of(tmp_path / "found", TARGET) == text_of(tmp_path / "told", TARGET)
    task = ("--task", "translation_multi_simple_epoch", "--lang-pairs", "aa-bb")
    run = fairseq("fairseq-kd-sequences", *arguments, *task, "--output", tmp_path / "no")
    assert "--source-lang and --target-lang: give both" in run.refusal


def test_sampling_depends_on_neither_shards_nor_interruptions(data, weak, tmp_path):
    options = ("--sampling", "--sampling-topk", 5, "--beam", 2, "--nbest", 2, "--seed", 7)
    write_sequences(data, weak, tmp_path / "one", *options).ok()
    for i in (1, 0):
        write_sequences(
            data, weak, tmp_path / "two", *options, "--num-shards", 2, "--shard-id", i
        ).ok()
    write_sequences(data, weak, tmp_path / "other", *options, "--seed", 8).ok()
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert lists(tmp_path / "one" / "hypotheses") != lists(tmp_path / "other" / "hypotheses")


def test_an_ensemble(data, weak, teacher, tmp_path):
    pair = f"{weak}:{teacher}"
    write_sequences(data, pair, tmp_path / "data", "--gen-subset", "valid").ok()
    run = fairseq(
        "fairseq-generate",
        *(data, *USER_DIR, "--path", pair, "--gen-subset", "valid", "--cpu", *LANGUAGES),
        *("--batch-size", 64, "--required-batch-size-multiple", 1),
    ).ok()
    assert_same_lists(lists(tmp_path / "data" / "hypotheses"), generated(run.text), 48)


def test_both_engines(data, weak, made, tmp_path):
    """CTranslate2 in float32 finds what fairseq finds, with the same scores.

    A little higher with so few symbols, as if its softmax left out those that never come.
    """
    pytest.importorskip("ctranslate2")
    options = ("--engine", "ctranslate2", "--compute-type", "float32", *BEAM)
    run = write_sequences(data, weak, tmp_path, *options).ok()
    assert "distilled sentences" in run.text
    fast, slow = lists(tmp_path / "hypotheses"), lists(made.output / "hypotheses")
    assert fast.keys() == slow.keys()
    same = [i for i in slow if fast[i][0][0] == slow[i][0][0]]
    assert len(same) > 0.98 * len(slow)
    for i in same:
        assert fast[i][0][1] == pytest.approx(slow[i][0][1], abs=1e-2)


def test_ctranslate2_decodes_without_the_torch_model(data, weak, tmp_path, monkeypatch):
    pytest.importorskip("ctranslate2")
    monkeypatch.setattr(decoding, "build_models", None)
    arguments = [data, "--path", weak, "--output", tmp_path, *LANGUAGES, "--gen-subset", "valid"]
    options = ["--engine", "ctranslate2", "--cpu", "--num-workers", 0]
    assert command.main([str(argument) for argument in (*arguments, *options)]) == 0
    assert len(lists(tmp_path / "hypotheses")) == 48


def test_ctranslate2_refuses_what_it_cannot_take(data, tmp_path):
    pytest.importorskip("ctranslate2")
    lstm = train_teacher(data, tmp_path / "lstm", support.ARCHITECTURES["lstm"], 2)
    run = write_sequences(data, lstm, tmp_path / "data", "--engine", "ctranslate2")
    assert "lstm" in run.refusal and "--engine fairseq takes any" in run.text


def test_a_text_without_references(data, corpus, weak, made, tmp_path):
    """Its sentences are translated as those of a subset, and can follow the original ones."""
    lines = (corpus.text / ("train." + SOURCE)).read_text().splitlines()[:40]
    mono = tmp_path / "mono.txt"
    mono.write_text("\n".join(lines) + "\n")
    options = ("--source-text", mono, *BEAM, "--no-filters")
    mixed = tmp_path / "mixed"
    write_sequences(data, weak, mixed, *options, "--mix", "original", "--repeat-original", 2).ok()
    original = (corpus.text / ("train." + TARGET)).read_text().splitlines()
    assert text_of(mixed, TARGET)[:1280] == 2 * original
    assert text_of(mixed, SOURCE)[1280:] == lines
    translated = [nbest[0][0] for nbest in list(lists(made.output / "hypotheses").values())[:40]]
    agreeing = sum(a == b for a, b in zip(text_of(mixed, TARGET)[1280:], translated))
    assert agreeing >= 39  # another padding moves scores by rounding
    assert record(mixed)["counts"]["original"] == 1280
    run = write_sequences(data, weak, tmp_path / "no", *options, "--select", "closest")
    assert "--source-text has no references" in run.refusal


def test_what_a_refused_command_leaves_is_not_taken_for_another_text(data, weak, tmp_path):
    output, junk, text = tmp_path / "data", tmp_path / "junk.pt", tmp_path / "text"
    junk.write_text("no")
    text.write_text("")
    found = write_sequences(data, weak, output, "--source-text", text)
    assert "expected at least one line" in found.refusal
    text.write_text("a01 a02\na03 a04\n")
    assert "junk.pt" in write_sequences(data, junk, output, "--source-text", text).refusal
    lines = ["a05 a06 a07", "a08 a09", "a10 a11 a12"]
    text.write_text("\n".join(lines) + "\n")
    write_sequences(data, weak, output, "--source-text", text, "--no-filters").ok()
    assert text_of(output, SOURCE) == lines


@pytest.fixture(scope="module")
def other_subwords(corpus, tmp_path_factory):
    """A student with a SentencePiece model of its own: that model and its data."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("student")
    sentencepiece.SentencePieceTrainer.train(
        input=[str(corpus.text / ("train." + lang)) for lang in (SOURCE, TARGET)],
        model_prefix=str(folder / "spm"),
        vocab_size=34,
        model_type="bpe",
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    for split in ("train", "valid"):
        for lang in (SOURCE, TARGET):
            lines = (corpus.text / f"{split}.{lang}").read_text().splitlines()
            encoded = [" ".join(model.encode(line, out_type=str)) for line in lines]
            (folder / f"{split}.{lang}").write_text("\n".join(encoded) + "\n")
    return folder / "spm.model", binarise(folder, folder / "data", "--joined-dictionary")


def test_a_student_with_other_subwords(data, weak, made, other_subwords, tmp_path):
    import sentencepiece

    spm, student = other_subwords
    output = tmp_path / "data"
    options = ("--hypotheses", made.output / "hypotheses", *BEAM)
    given = ("--student-data", student, "--student-spm", spm)
    write_sequences(data, weak, output, *options, *given).ok()
    model = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    for lang in (SOURCE, TARGET):
        running, subwords = text_of(output, lang), text_of(output, lang, ".subwords")
        assert [model.decode(line.split()) for line in subwords] == running
        assert subwords == [" ".join(model.encode(line, out_type=str)) for line in running]
        name = f"dict.{lang}.txt"
        assert (output / name).read_bytes() == (student / name).read_bytes()
    assert record(output)["counts"]["unknown_tokens"] == 0
    train_plain(output, tmp_path / "s", "--max-update", 2).ok()
    run = write_sequences(data, weak, tmp_path / "no", *options, "--student-data", student)
    assert "lacks" in run.refusal and "--student-spm" in run.text


def test_a_multilingual_teacher(corpus, tmp_path):
    """Of another task, which tells the target language with a symbol."""
    joined = binarise(corpus.text, tmp_path / "data", "--joined-dictionary")
    task = ("--task", "translation_multi_simple_epoch", "--decoder-langtok")
    pairs = ("--lang-pairs", f"{SOURCE}-{TARGET}")
    training = [a for a in TRAINING if a not in LANGUAGES]
    fairseq(
        "fairseq-train",
        *(joined, *STOCK, *training, *transformer(32), "--save-dir", tmp_path / "teacher"),
        *(*task, *pairs, "--max-update", 60, "--log-interval", 50),
    ).ok()
    teacher = tmp_path / "teacher" / "checkpoint_last.pt"
    output = tmp_path / "distilled"
    write_sequences(joined, teacher, output, *task, *pairs, "--gen-subset", "valid").ok()
    run = fairseq(
        "fairseq-generate",
        *(joined, *USER_DIR, "--path", teacher, "--gen-subset", "valid", "--cpu", *LANGUAGES),
        *(*task, *pairs, "--batch-size", 64, "--required-batch-size-multiple", 1),
    ).ok()
    theirs, ours = generated(run.text), lists(output / "hypotheses")
    assert len(theirs) == 48 and ours.keys() == theirs.keys()
    assert sum(ours[i][0][0] == theirs[i][0][0] for i in theirs) >= 47
    assert f"__{TARGET}__" not in (output / "hypotheses" / "hypotheses.jsonl").read_text()
    train_plain(output, tmp_path / "s", "--max-update", 2).ok()
    # the checkpoint names its task, unless a flag names another
    write_sequences(joined, teacher, tmp_path / "own", "--gen-subset", "valid").ok()
    assert lists(tmp_path / "own" / "hypotheses") == ours
    message = write_sequences(joined, teacher, tmp_path / "no", "--task", "translation").refusal
    assert "it has 50 symbols and the data's 48" in message


def test_sources_that_are_too_long(corpus, data, tmp_path):
    """For the teacher's positions: left out and counted, or cut."""
    short = transformer(16)
    limits = ("--max-source-positions", 7, "--max-target-positions", 64)
    arguments = (*limits, "--skip-invalid-size-inputs-valid-test")
    teacher = train_teacher(data, tmp_path / "t", short, 2, *arguments)
    lengths = [len(line.split()) + 1 for line in (corpus.text / "train.aa").open()]
    too_long = sum(length > 7 for length in lengths)
    assert too_long > 50
    run = write_sequences(data, teacher, tmp_path / "left", "--no-filters").ok()
    assert f"{too_long} longer than the teacher reads" in run.text
    counts = record(tmp_path / "left")["counts"]
    assert counts["dropped"]["longer_than_the_teacher_reads"] == too_long
    options = ("--no-filters", "--truncate-source", "--max-source-positions", 7)
    write_sequences(data, teacher, tmp_path / "cut", *options).ok()
    counts = record(tmp_path / "cut")["counts"]
    assert counts["dropped"]["longer_than_the_teacher_reads"] == 0
    assert max(len(line.split()) for line in text_of(tmp_path / "cut", SOURCE)) == 6


def test_an_output_of_other_settings(data, weak, made, tmp_path):
    output = tmp_path / "data"
    shutil.copytree(str(made.output), str(output))
    (output / "notes.txt").write_text("mine")
    before = tree(output)
    closest = ("--select", "closest", "--metric", "chrf")
    for options, word in (
        ((*closest, *BEAM, "--max-length", 5), "max_length is 5 here, 250 there"),
        ((*closest, "--beam", 3, "--nbest", 3), "beam is 3 here, 4 there"),
    ):
        run = write_sequences(data, weak, output, *options)
        message = run.refusal
        assert word in message and "--overwrite would remove" in message
        assert "train.aa-bb.aa.bin" in message
        assert tree(output) == before
    assert f", and the hypotheses in {output / 'hypotheses'}" in message
    # one that fails replaces nothing
    (tmp_path / "junk.pt").write_text("no")
    message = write_sequences(data, tmp_path / "junk.pt", output, "--overwrite").refusal
    assert "junk.pt" in message and tree(output) == before
    # not the lists of --hypotheses
    lent = ("--hypotheses", made.output / "hypotheses", "--beam", 2, "--overwrite")
    message = write_sequences(data, weak, tmp_path / "no", *lent).refusal
    assert "choose another --hypotheses" in message and "--overwrite" not in message
    # the lists stay: they are still the right ones
    options = (*closest, *BEAM, "--max-length", 5)
    run = write_sequences(data, weak, output, *options, "--overwrite").ok()
    assert "Translated" not in run.text and "replacing" in run.text
    assert record(output)["counts"]["dropped"]["too_long"] > 0
    run = write_sequences(data, weak, output, "--overwrite", "--beam", 2).ok()
    assert "removing the hypotheses" in run.text and "Translated" in run.text
    assert all(len(nbest) == 1 for nbest in lists(output / "hypotheses").values())
    assert (output / "notes.txt").read_text() == "mine"


def test_a_folder_that_is_not_its_own(data, weak, tmp_path):
    """The data itself, for example: with --overwrite, too."""
    copy = tmp_path / "data"
    shutil.copytree(str(data), str(copy))
    before = tree(copy)
    for more in ((), ("--overwrite",)):
        message = write_sequences(copy, weak, copy, *more).refusal
        assert "holds files that this command did not write" in message
    (tmp_path / "file").write_text("")
    message = write_sequences(data, weak, tmp_path / "file").refusal
    assert "expected a folder, found a file" in message
    assert tree(copy) == before


def test_dictionaries_that_are_not_the_teachers(corpus, data, weak, tmp_path):
    both = [dictionary_lines(data, lang) for lang in (SOURCE, TARGET)]
    for lines in both:
        random.Random(1).shuffle(lines)
    options = write_dictionaries(tmp_path / "dictionaries", *both)
    shuffled = binarise(corpus.text, tmp_path / "data", *options)
    message = write_sequences(shuffled, weak, tmp_path / "no").refusal
    assert "dictionary" in message and "--student-data" in message and "symbol 4 is" in message


def test_bad_flags_are_named_together(data, weak, tmp_path):
    def refused(*arguments):
        return write_sequences(*arguments, tool=support.in_process).refusal

    message = refused(
        *(data, weak, tmp_path, "--nbest", 7, "--repeat-original", 3, "--student-spm", "x"),
        *("--min-closeness", 120, "--min-score-quantile", 1, "--prefix-size", 2),
        *("--compute-type", "int8", "--metric", "chrf", "--bleu-tokenize", "no"),
    )
    for part in (
        "--nbest 7 needs --beam 7",
        "--repeat-original needs --mix",
        "--student-spm needs --student-data",
        "--min-closeness must be from 0 to 100",
        "--min-score-quantile must be from 0 to below 1",
        "--prefix-size cannot be used",
        "--compute-type needs --engine ctranslate2",
        "--bleu-tokenize needs --metric bleu",
        "--bleu-tokenize no: expected one of",
    ):
        assert part in message
    message = refused(
        *(data, weak, tmp_path, "--keep", 0, "--select", "closest", "--scores", tmp_path / "no"),
        *("--backward-weight", 1, "--min-backward-quantile", -0.5, "--languages", "a"),
        *("--nbest", 2, "--beam", 2),
    )
    for part in (
        "--keep must be 1 or more",
        "--select scores and --scores FILE go together",
        "no: no such file",
        "--backward-weight and --min-backward-quantile: needs --backward-path",
        "--min-backward-quantile must be from 0",
        "--backward-weight goes with --select best",
        "--languages",
    ):
        assert part in message
    message = refused(data, weak, tmp_path, "--keep", 3, "--backward-path", weak)
    assert "--keep 3 needs --nbest 3 or more" in message
    assert "--backward-path: say what for" in message
    message = refused(data, weak, tmp_path, "--select", "closest")
    assert "--select closest needs --nbest 2 or more" in message
    message = refused(data, weak, tmp_path, "--gen-subset", "nothing")
    assert "no subset 'nothing'" in message and "train" in message
    message = refused(tmp_path / "none", weak, tmp_path / "no")
    assert "data cannot be read" in message or "expected a folder of fairseq" in message
    message = refused(data, tmp_path / "none.pt", tmp_path / "no")
    assert "none.pt" in message


def test_without_references(data, weak, tmp_path):
    lonely = tmp_path / "data"
    shutil.copytree(str(data), str(lonely))
    for path in lonely.glob("train.*.bb.*"):
        path.unlink()
    message = write_sequences(lonely, weak, tmp_path / "no", "--select", "closest", *BEAM).refusal
    assert "need references" in message and "has none" in message
    write_sequences(lonely, weak, tmp_path / "yes", *BEAM).ok()
    assert record(tmp_path / "yes")["counts"]["distilled"] > 600


def test_nothing_left_after_filtering(data, weak, made, tmp_path):
    options = ("--hypotheses", made.output / "hypotheses", *BEAM, "--max-length", 0)
    message = write_sequences(data, weak, tmp_path / "no", *options).refusal
    assert "nothing is left: of 640 sentences" in message and "too long" in message
    assert "--no-filters" in message
    assert not (tmp_path / "no" / "dict.aa.txt").exists()


def test_subwords_that_would_be_compared_as_words(data, weak, corpus, tmp_path):
    pieces = [["\u2581" + line for line in dictionary_lines(data, lang)] for lang in ("aa", "bb")]
    marked = binarise(corpus.text, tmp_path / "data", *write_dictionaries(tmp_path / "d", *pieces))
    for wrong in ((), ("--remove-bpe",)):
        run = write_sequences(marked, weak, tmp_path / "no", "--select", "closest", *BEAM, *wrong)
        assert "add --remove-bpe sentencepiece" in run.refusal
