"""Hypotheses on disk, what is chosen of them, and what is dropped."""

import gc
import os
import pickle
import resource
import shutil
import signal
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Dict, List, NamedTuple

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary, LanguagePairDataset
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu import sentence_bleu, sentence_chrf

from kd_plugin import files
from kd_plugin import shards as store_module
from kd_plugin.commands import arguments
from kd_plugin.decoding import Corpus, Hypothesis, databin, describe_text, plan
from kd_plugin.decoding import models as teachers
from kd_plugin.files import FileError
from kd_plugin.sequences import (
    Choice,
    Filters,
    HypothesisStore,
    Output,
    Student,
    choose,
    hypotheses,
)
from kd_plugin.sequences import choice as select
from kd_plugin.sequences import output as output_module
from kd_plugin.sequences import pipeline as distil
from kd_plugin.sequences.output import Originals

HEADER = {"teachers": [{"sha256": "1" * 64, "bytes": 7}], "generation": {"beam": 5}}
SENTENCES = 23
PLAN = [
    np.array(batch) for batch in ([3, 1, 22], [0], [7, 5, 4, 20, 21], [2, 6], list(range(8, 20)))
]


def nbest_of(sentence: int) -> List[Hypothesis]:
    """Lists of different lengths, with what is awkward in JSON and in text among it."""
    words = ['▁"a\\', "b\u2028c", "d\u00a0", "<unk>", "é", "\U0001f600", "\x85"]
    return [
        Hypothesis(" ".join(words[: (sentence + n) % 8]), -0.1 * sentence - n / 3, n != 1)
        for n in range(1 + sentence % 3)
    ]


def lists(batch) -> Dict[int, List[Hypothesis]]:
    return {int(i): nbest_of(int(i)) for i in batch}


def write(folder, shards=1, shard=0, plan=PLAN, **header) -> bool:
    store = HypothesisStore(folder, {**HEADER, **header}, shards, shard)
    if store.complete:
        store.clean_up()
        return True
    store.begin(plan)
    while store.done < len(store.batches):
        store.append(lists(store.batches[store.done]))
    return store.finish()


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert write(folder)
    return folder


# the store


def test_lists_come_back_in_the_order_of_the_data(finished):
    found = list(HypothesisStore(finished, HEADER))
    assert found == [(i, nbest_of(i)) for i in range(SENTENCES)]
    assert not (finished / "shards").exists()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_any_number_of_shards_makes_the_same_bytes(finished, tmp_path, order):
    assert [write(tmp_path / "2", 2, i) for i in order] == [False, True]
    assert [write(tmp_path / "7", 7, i) for i in range(7)] == [False] * 6 + [True]
    assert tree(tmp_path / "2") == tree(tmp_path / "7") == tree(finished)


def test_a_shard_that_begins_when_others_have_merged_all(finished, tmp_path):
    """After a kill in the middle of merging all shards are started again, each with its teacher."""
    write(tmp_path, 2, 0)
    late = HypothesisStore(tmp_path, HEADER, 2, 0)
    assert not late.complete
    write(tmp_path, 2, 1)
    late.begin(PLAN)
    assert late.done == len(late.batches) > 0 and late.finish()
    assert tree(tmp_path) == tree(finished)


def in_a_child(work) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def at_each_line(do, ours=frozenset({files.__file__, store_module.__file__, hypotheses.__file__})):
    def trace(frame, event, argument):
        if frame.f_code.co_filename not in ours:
            return None
        if event == "line":
            do()
        return trace

    sys.settrace(trace)


@pytest.mark.parametrize("shards", [1, 2])
def test_killed_at_any_line(finished, tmp_path, shards):
    """A real SIGKILL; then the same command makes what an undisturbed one makes."""

    def prepared(folder):
        for other in range(1, shards):
            write(folder, shards, other)
        return folder

    lines, before = [], sys.gettrace()
    try:
        prepared(tmp_path / "count")
        at_each_line(lambda: lines.append(0))
        write(tmp_path / "count", shards, 0)
    finally:
        sys.settrace(before)
    assert len(lines) > 100
    for last in range(1, len(lines), 17):
        folder, left = prepared(tmp_path / str(last)), [last]

        def work(folder=folder, left=left):
            def count():
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            at_each_line(count)
            write(folder, shards, 0)

        assert os.WTERMSIG(in_a_child(work)) == signal.SIGKILL
        assert write(folder, shards, 0), last
        assert tree(folder) == tree(finished), last


def test_what_a_kill_leaves_of_a_batch_is_decoded_again(finished, tmp_path):
    """Cut anywhere, in the middle of a symbol too."""
    first = HypothesisStore(tmp_path / "whole", HEADER, 2, 0)
    first.begin(PLAN)
    ends = [0]
    for batch in first.batches:
        first.append(lists(batch))
        ends.append((first.shards.own / "hypotheses.jsonl").stat().st_size)
    content = (first.shards.own / "hypotheses.jsonl").read_bytes()
    for cut in range(0, len(content) + 1, 5):
        store = HypothesisStore(tmp_path / str(cut), HEADER, 2, 0)
        store.shards.own.mkdir(parents=True)
        (store.shards.own / "hypotheses.jsonl").write_bytes(content[:cut])
        store.begin(PLAN)
        assert store.done == sum(end <= cut for end in ends[1:])
        while store.done < len(store.batches):
            store.append(lists(store.batches[store.done]))
        store.finish()
        assert write(tmp_path / str(cut), 2, 1)
        assert tree(tmp_path / str(cut)) == tree(finished)


def test_the_first_plan_is_the_one_for_all(tmp_path):
    store = HypothesisStore(tmp_path, HEADER, 2, 1)
    store.begin(PLAN)
    other = HypothesisStore(tmp_path, HEADER, 2, 0)
    other.begin(PLAN[::-1])
    assert [batch.tolist() for batch in other.batches] == [PLAN[i].tolist() for i in (0, 2, 4)]
    third = HypothesisStore(tmp_path, HEADER, 3, 2)
    assert third.planned and not HypothesisStore(tmp_path, {**HEADER, "seed": 2}).planned
    third.begin()
    assert [batch.tolist() for batch in third.batches] == [PLAN[2].tolist()]


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(
    "header, word",
    [
        (dict(generation={"beam": 4}), "generation: beam is 4 here, 5 there"),
        (dict(teachers=[{"sha256": "2" * 64, "bytes": 7}]), "sha256 differs"),
        (dict(teachers=[{"bytes": 7}]), "sha256 is there only"),
        (dict(version=2), "version is 2 here, 1 there"),
    ],
)
def test_other_hypotheses_are_not_gone_on_with(finished, tmp_path, header, word, complete):
    folder = finished
    if not complete:
        write(tmp_path, 2, 1)
        folder = tmp_path
    before = tree(folder)
    store = HypothesisStore(folder, {**HEADER, **header})
    assert not store.complete
    with pytest.raises(FileError) as error:
        store.begin(PLAN)
    assert word in str(error.value) and "choose another folder" in str(error.value)
    assert tree(folder) == before


def test_what_is_kept_beside_is_named_after_what_it_was_made_from(tmp_path):
    def store(**header):
        return HypothesisStore(tmp_path, {**HEADER, "files": {"dict": "1"}, **header})

    def beside(**header):
        return store(**header).beside("source", "files")

    assert beside() == beside(generation={"beam": 4}) != beside(files={"dict": "2"})
    for path in (beside(), beside(files={"dict": "2"}), tmp_path / "mine"):
        path.with_suffix(".bin").touch()
    one = store()
    ours = one.beside("source", "files")
    one.clear()
    assert {path.stem for path in tmp_path.iterdir()} == {"mine", ours.name}


def test_a_shard_that_comes_late_does_not_remove_what_an_earlier_one_has_begun(finished, tmp_path):
    output = Output(str(tmp_path), {})
    folder = tmp_path / "hypotheses"
    shutil.copytree(str(finished), str(folder))
    early, late = [HypothesisStore(folder, {**HEADER, "seed": 2}, 2, i) for i in (0, 1)]
    assert early.differences() and late.differences()
    distil.clear_others(output, early)
    early.begin(PLAN)
    early.append(lists(early.batches[0]))
    before = tree(folder)
    distil.clear_others(output, late)
    assert tree(folder) == before


def test_a_plan_without_its_header_is_never_left(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(store_module, "write_json", full)
    with pytest.raises(OSError):
        HypothesisStore(tmp_path, HEADER).begin(PLAN)
    assert not (tmp_path / "plan.npz").exists()


@pytest.mark.parametrize("room", [300, 4096, 8500])
def test_a_plan_that_finds_no_room_leaves_nothing(tmp_path, monkeypatch, room):
    """Nor a word beside the error: what cannot be raised, Python prints."""
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    store = HypothesisStore(tmp_path, {})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(OSError, match="plan.npz"):
            store.begin([np.arange(1000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    gc.collect()
    assert not printed
    assert [path.name for path in tmp_path.iterdir()] == ["header.json"]


def test_one_process_writes_a_shard(tmp_path):
    first = HypothesisStore(tmp_path, HEADER)
    first.begin(PLAN)
    with pytest.raises(FileError, match="another process is writing"):
        HypothesisStore(tmp_path, HEADER).begin(PLAN)


class Numbers(list):
    collater = list


def test_workers_hold_no_lock(tmp_path):
    """They outlive a process that is killed by some seconds; the next one need not wait."""
    store = HypothesisStore(tmp_path, HEADER)

    class Killed:
        def decode(self, batches):
            assert isinstance(batches.batch_sampler[0], np.ndarray)  # no lists of a large plan
            workers = iter(batches)
            yield lists(next(workers))
            pickle.loads(pickle.dumps(store.shards)).release()  # in one that is not forked
            store.shards.release()
            HypothesisStore(tmp_path, HEADER).begin(PLAN)
            raise KeyboardInterrupt

    corpus = SimpleNamespace(dataset=Numbers(range(SENTENCES)))
    with pytest.raises(KeyboardInterrupt):
        distil.decode(corpus, Killed(), store, PLAN, num_workers=1)


@pytest.mark.parametrize("num_shards, shard_id", [(2, 2), (1, -1), (0, 0)])
def test_shards_that_do_not_exist(tmp_path, num_shards, shard_id):
    with pytest.raises(FileError, match="--shard-id must be from 0 to --num-shards"):
        HypothesisStore(tmp_path, HEADER, num_shards, shard_id)


def test_a_shard_that_was_changed_is_not_merged(tmp_path):
    write(tmp_path, 2, 0)
    file = tmp_path / "shards" / "shard-0-of-2" / "hypotheses.jsonl"
    whole = file.read_bytes()
    for changed in (whole[:-1], whole + b"{}\n", whole.replace(b'"id": 7', b'"id": 8')):
        file.write_bytes(changed)
        with pytest.raises(FileError, match="run (its|that) shard again"):
            write(tmp_path, 2, 1)
        assert not (tmp_path / "hypotheses.jsonl").exists()
    file.write_bytes(whole)
    assert write(tmp_path, 2, 1)


@given(st.integers(0, 10**9), st.binary(max_size=3))
@settings(max_examples=200, deadline=None)
def test_a_damaged_file_is_named_or_read_as_what_it_says(finished, tmp_path_factory, at, junk):
    folder = tmp_path_factory.mktemp("damaged")
    for name, content in tree(finished).items():
        (folder / name).write_bytes(content)
    content = tree(finished)["hypotheses.jsonl"]
    at %= len(content)
    (folder / "hypotheses.jsonl").write_bytes(content[:at] + junk + content[at + 1 :])
    try:
        for sentence, nbest in HypothesisStore(folder, HEADER):
            assert isinstance(sentence, int) and all(isinstance(n.subwords, str) for n in nbest)
    except FileError as error:
        assert "hypotheses.jsonl: line" in str(error) and "decode again" in str(error)


# choosing


@pytest.mark.parametrize(
    "scores, expected",
    [([1.0], 0), ([1.0, 2.0], 1), ([2.0, 2.0], 0), ([1.0, 3.0, 3.0, 2.0], 1), ([0.0, 0.0, 0.0], 0)],
)
def test_of_equally_close_hypotheses_the_likeliest_is_taken(scores, expected):
    assert select.highest(scores) == expected


@pytest.mark.parametrize("metric, reference", [("bleu", sentence_bleu), ("chrf", sentence_chrf)])
def test_closeness_is_sacrebleus(metric, reference):
    measure = select.similarity(metric)
    pairs = [("The cat sat.", "The cat sat."), ("a b", "c d"), ("Hi!", "Hi there!"), ("", "a")]
    for hypothesis, gold in pairs:
        expected = reference(hypothesis, [gold]).score
        assert measure(hypothesis, gold) == expected
    assert measure("The cat sat.", "The cat sat.") == pytest.approx(100)
    assert measure("a b", "c d") == 0


def test_a_score_per_token():
    """Two words and the end of sentence, of log-probabilities that sum to -6."""
    for lenpen, unnormalized in ((1.0, False), (0.5, False), (2.0, False), (1.0, True)):
        score = -6 / (1 if unnormalized else 3**lenpen)
        found = select.per_token(Hypothesis("a b", score, True), lenpen, unnormalized)
        assert found == pytest.approx(-2)


S = "s1 s2 s3 s4 s5 s6 s7 s8"  # 8 subwords


@pytest.mark.parametrize(
    "source, said, fault",
    [
        (S, "a b c d e f g h", None),
        (S, "", "empty"),
        # (8 + 1) / (2 + 1) is 3, and not more
        (S, "a b", None),
        (S, "a", "length_ratio"),
        ("s", "a b c d e", None),
        ("s", "a b c d e f", "length_ratio"),
        # the commonest 4-gram twice more often than the source's
        (S, "a b c d a b c d", None),
        (S, "a b c d a b c d a b c d", "repetition"),
        (S, "a a a a a", None),
        (S, "a a a a a a", "repetition"),
        ("s s s s s s s s", "a a a a a a", None),
        (S, S, "copy_of_source"),
        ("s " * 250, "a b c d " * 70, "too_long"),
        ("s " * 251, "a " * 200, "too_long"),
        ("s " * 250, "a " * 250, None),
    ],
)
def test_filters(source, said, fault):
    found = Filters().reason(
        source.strip(), Hypothesis(said.strip(), -1.0, True), (source, said, "")
    )
    assert found == fault
    if fault != "empty":
        texts = (source, said, "")
        assert Filters.off().reason(source, Hypothesis(said.strip(), -1.0, False), texts) is None


def test_unfinished_hypotheses():
    texts = ("s", "a", None)
    assert Filters().reason("s", Hypothesis("a", -1.0, False), texts) == "unfinished"
    assert (
        Filters()._replace(unfinished=False).reason("s", Hypothesis("a", -1.0, False), texts)
        is None
    )


def test_a_copy_that_the_reference_is_too_stays():
    same = Hypothesis("Paris", -1.0, True)
    assert Filters().reason("Paris", same, ("Paris", "Paris", "Paris")) is None
    assert Filters().reason("Paris", same, ("Paris", "Paris", None)) == "copy_of_source"
    assert Filters()._replace(copies=False).reason("Paris", same, ("Paris", "Paris", None)) is None


class Toy(NamedTuple):
    source: List[torch.Tensor]
    references: List[torch.Tensor]
    data: Student
    dataset: None = None


class Data(NamedTuple):
    source: Dictionary
    target: Dictionary


@pytest.fixture
def toy():
    dictionary = Dictionary()
    for symbol in "abcdefgh":
        dictionary.add_symbol(symbol)
    data = Data(dictionary, dictionary)
    lines = ["a b c", "b c d", "c d e", "d e f", "e f g"]
    source = [databin.encode(dictionary, "h " + line) for line in lines]
    references = [databin.encode(dictionary, line) for line in lines]
    return Toy(source, references, data), Student(data, lambda text: text, None)


# sentence 3 was not decoded
TOY_LISTS = [
    (0, [Hypothesis("a b d", -0.1, True), Hypothesis("a b c", -0.2, True)]),
    (1, [Hypothesis("b c d", -0.3, True), Hypothesis("a a a", -0.4, True)]),
    (2, [Hypothesis("f g a", -0.5, True), Hypothesis("", -0.6, True)]),
    (4, [Hypothesis("g g g", -0.9, True), Hypothesis("e f", -0.9, True)]),
]


def test_best_and_closest(toy):
    best = choose(*(toy[0], TOY_LISTS, toy[1], Choice()))
    assert best.which.tolist() == [0, 0, 0, -1, 0]
    assert best.dropped["longer_than_the_teacher_reads"] == 1 and sum(best.dropped.values()) == 1
    assert best.means["score_per_token"] == pytest.approx(-(0.1 + 0.3 + 0.5 + 0.9) / 4)
    assert best.means["closeness"] is None
    for metric in ("bleu", "chrf"):
        closest = choose(toy[0], TOY_LISTS, toy[1], Choice("closest", metric))
        assert closest.which.tolist() == [1, 0, 0, -1, 1]


def test_far_from_the_reference(toy):
    chosen = choose(toy[0], TOY_LISTS, toy[1], Choice(min_closeness=99.0))
    assert chosen.which.tolist() == [-1, 0, -1, -1, -1]
    assert chosen.dropped["far_from_reference"] == 3
    assert chosen.means["closeness"] == pytest.approx(100)


@pytest.mark.parametrize(
    "quantile, which",
    [(0.0, [0, 0, 0, -1, 0]), (0.25, [0, 0, 0, -1, -1]), (0.5, [0, 0, -1, -1, -1])],
)
def test_the_share_with_the_lowest_scores(toy, quantile, which):
    choice = Choice(min_score_quantile=quantile)
    chosen = choose(toy[0], TOY_LISTS, toy[1], choice)
    assert chosen.which.tolist() == which
    assert chosen.dropped["low_score"] == 4 - sum(i == 0 for i in which)


def test_every_sentence_is_counted_once(toy):
    """Whatever the choice is: kept or dropped for one reason."""
    for choice in (Choice("closest", "chrf", Filters(), 50.0, 0.5), Choice(filters=Filters(2))):
        chosen = choose(toy[0], TOY_LISTS, toy[1], choice)
        assert (chosen.which >= 0).sum() + sum(chosen.dropped.values()) == 5


def test_what_cannot_be_encoded_anew_is_dropped(toy):
    corpus, student = toy
    lists = [(0, [Hypothesis("a <unk>", -0.1, True)]), (1, [Hypothesis("b", -0.1, True)])]
    for recode, dropped in ((None, 0), (str.upper, 1)):
        chosen = choose(corpus, lists, student._replace(recode=recode), Choice())
        assert chosen.dropped["unknown_symbol"] == dropped


# text and data


def test_symbols_with_other_whitespace_stay_whole():
    dictionary = Dictionary()
    for symbol in ("a\u00a0b", "\u2028", "c"):
        dictionary.add_symbol(symbol)
    line = "a\u00a0b c \u2028 c"
    tokens = databin.encode(dictionary, line)
    assert tokens.tolist() == [4, 6, 5, 6, dictionary.eos()] and tokens.dtype == torch.int32
    assert databin.decode(dictionary, tokens.tolist()) == line
    assert databin.encode(dictionary, "").tolist() == [dictionary.eos()]
    assert databin.encode(dictionary, "zz").tolist() == [dictionary.unk(), dictionary.eos()]


def test_a_model_of_subwords_counts_by_its_content(tmp_path):
    def described(path, content):
        path.write_bytes(content)
        bpe = Namespace(_name="sentencepiece", sentencepiece_model=str(path), enable_sampling=False)
        common_eval = Namespace(post_process=None)
        return describe_text(Cfg(bpe=bpe, tokenizer=None, common_eval=common_eval))

    class Cfg(dict):
        __getattr__ = dict.__getitem__

    one = described(tmp_path / "one.model", b"1")
    assert (
        one == described(tmp_path / "moved.model", b"1") != described(tmp_path / "one.model", b"2")
    )
    assert one["bpe"]["_name"] == "sentencepiece" and one["bpe"]["enable_sampling"] is False


@pytest.fixture
def databin_of_letters(tmp_path) -> databin.DataBin:
    folder = tmp_path / "data"
    folder.mkdir()
    dictionary = Dictionary()
    for symbol in "abcdefgh":
        dictionary.add_symbol(symbol)
    for lang in ("aa", "bb"):
        dictionary.save(str(folder / f"dict.{lang}.txt"))
        for split in ("train", "valid"):
            writer = databin.Writer(folder / f"{split}.aa-bb.{lang}", len(dictionary))
            for line in ("a b c", "b c d", "c d e", "d e f", "e f g"):
                writer.add(databin.encode(dictionary, line))
            writer.close()
    return databin.DataBin(str(folder), "aa", "bb")


def test_a_text_that_cannot_be_read_leaves_nothing(databin_of_letters, tmp_path):
    data, text = databin_of_letters, tmp_path / "text"
    for content, word in (
        (b"a b\n\xff\n", "not UTF-8"),
        (b"", "expected at least one line, found none"),
    ):
        text.write_bytes(content)
        with pytest.raises(FileError, match=word):
            Corpus.of_text(
                task_of(data),
                data,
                str(text),
                to_subwords=str,
                prefix=tmp_path / "kept" / "source-1",
            )
        assert not list((tmp_path / "kept").iterdir())
    text.write_bytes(b"a b\n")
    corpus = Corpus.of_text(
        task_of(data), data, str(text), to_subwords=str, prefix=tmp_path / "kept" / "source-1"
    )
    assert len(corpus.source) == 1
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "source-1.bin",
        "source-1.idx",
    ]


def test_what_kills_leave_beside_complete_lists_is_removed(finished, tmp_path):
    folder = tmp_path / "lists"
    shutil.copytree(str(finished), str(folder))
    (folder / "source-1.0123.new.bin").touch()
    (folder / "ctranslate2-1.0123.new").mkdir()
    HypothesisStore(folder, HEADER).clean_up()
    assert tree(folder) == tree(finished) and not list(folder.glob("*.new*"))


def test_train1_is_not_left_out_without_a_word(databin_of_letters, caplog):
    data = databin_of_letters
    Corpus.of_subset(task_of(data), data, "train")
    assert "would read" not in caplog.text
    for path in data.folder.glob("train.*"):
        shutil.copy(str(path), str(path).replace("train.", "train1."))
    Corpus.of_subset(task_of(data), data, "train1")
    assert "would read" not in caplog.text
    assert len(Corpus.of_subset(task_of(data), data, "train").source) == 5
    assert "would read train1 with it" in caplog.text and "--gen-subset train1" in caplog.text


@pytest.mark.parametrize("unknown, said", [(1, False), (2, True)])
def test_many_unknown_symbols_are_said(databin_of_letters, tmp_path, caplog, unknown, said):
    """5 of 100 are none too many; it is said before anything is decoded."""
    data, text = databin_of_letters, tmp_path / "text"
    text.write_text(" ".join(["a"] * (24 - unknown) + ["raw"] * unknown) + "\n")
    Corpus.of_text(task_of(data), data, str(text), to_subwords=str, prefix=tmp_path / "source-1")
    assert (f"OF THE SYMBOLS OF {text} ARE UNKNOWN" in caplog.text) == said


def test_subwords_of_another_model_are_said(databin_of_letters, tmp_path, caplog):
    data = databin_of_letters
    corpus = Toy(data.side("train", "aa"), data.side("train", "bb"), data)
    student = Student(data, lambda text: text, lambda text: text.replace("b", "x"))
    chosen = choose(corpus, TOY_LISTS, student, Choice())
    output = Output(str(tmp_path / "out"), {})
    output.write(corpus, TOY_LISTS, chosen, student)
    assert "12% OF THE SYMBOLS OF train.aa ARE UNKNOWN" in caplog.text
    assert output.record()["counts"]["unknown_tokens"] == 4


def test_a_teacher_of_the_other_direction_is_said(databin_of_letters, tmp_path, caplog):
    data, path = databin_of_letters, tmp_path / "teacher.pt"
    symbols = {"source_symbols": data.source.symbols, "target_symbols": data.target.symbols}
    weights = {side + ".embed_tokens.weight": torch.zeros(12, 2) for side in ("encoder", "decoder")}
    for langs, said in ((("aa", "bb"), False), (("bb", "aa"), True)):
        task = {"source_lang": langs[0], "target_lang": langs[1]}
        cfg = {"task": task, "model": {"arch": "transformer"}}
        torch.save({"cfg": cfg, "model": weights, "task_state": symbols}, str(path))
        teachers.read_teachers([str(path)], task_of(data), {}, False)
        assert ("FROM bb TO aa, not from aa to bb" in caplog.text) == said


def task_of(data) -> TranslationTask:
    cfg = TranslationConfig(
        data=str(data.folder),
        source_lang="aa",
        target_lang="bb",
        left_pad_source=True,
        left_pad_target=False,
        train_subset="train",
        dataset_impl=None,
        required_seq_len_multiple=1,
    )
    return TranslationTask(cfg, data.source, data.target)


@pytest.mark.parametrize("subset", ["train", "lonely"])
def test_batches_of_sentences_that_fit(databin_of_letters, monkeypatch, subset):
    """Each of 4 symbols; none of them is looked at by itself."""
    data = databin_of_letters
    for path in data.folder.glob("train.aa-bb.aa.*"):
        shutil.copy(str(path), str(path).replace("train", "lonely"))
    task = task_of(data)
    corpus = Corpus.of_subset(task, data, subset)
    monkeypatch.setattr(LanguagePairDataset, "size", None)
    found = plan(task, corpus, [(4, 4)], max_tokens=8)
    assert sorted(i for batch in found for i in batch) == [0, 1, 2, 3, 4]
    assert [len(batch) for batch in found] == [2, 2, 1]
    assert plan(task_of(data), corpus, [(3, 4)], max_tokens=3) == []
    with pytest.raises(FileError, match="sentence has 4 tokens, more than --max-tokens 3"):
        plan(task, corpus, [(4, 4)], max_tokens=3)


def test_killed_at_any_line_of_writing(databin_of_letters, tmp_path):
    data = databin_of_letters
    sides = data.side("train", "aa"), data.side("train", "bb")
    corpus = Toy(*sides, data)
    student = Student(data, lambda text: text, None)
    chosen = choose(corpus, TOY_LISTS, student, Choice())

    def write_to(folder):
        output = Output(str(folder), {"beam": 5})
        if output.complete:
            output.clean_up()
        else:
            output.write(corpus, TOY_LISTS, chosen, student, originals=Originals(*sides, 2))

    # another one that it replaces
    old = Output(str(tmp_path / "old"), {"beam": 4})
    old.write(corpus, TOY_LISTS[:2], chosen, student)
    write_to(tmp_path / "whole")
    whole = tree(tmp_path / "whole")
    assert "record.json" in whole and "valid.aa-bb.bb.idx" in whole
    lines = whole["text/train.bb"].decode().splitlines()
    assert lines == 2 * ["a b c", "b c d", "c d e", "d e f", "e f g"] + [
        nbest[0].subwords for _, nbest in TOY_LISTS
    ]
    ours, last, killed = {output_module.__file__, files.__file__}, 0, True
    while killed:
        last += 9
        folder, left = tmp_path / str(last), [last]
        if last % 2:
            shutil.copytree(str(tmp_path / "old"), str(folder))

        def work(folder=folder, left=left):
            def count():
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            at_each_line(count, ours)
            write_to(folder)

        killed = in_a_child(work) != 0
        write_to(folder)
        assert tree(folder) == whole, last
        assert not list(folder.glob("*.new"))
    assert last > 200
    (tmp_path / "whole" / "data.0123.new").mkdir()  # of a kill after the record
    write_to(tmp_path / "whole")
    assert not list((tmp_path / "whole").glob("*.new"))


def test_data_that_are_to_be_replaced_stay_until_there_are_others(databin_of_letters, tmp_path):
    data = databin_of_letters
    sides = data.side("train", "aa"), data.side("train", "bb")
    corpus, student = Toy(*sides, data), Student(data, lambda text: text, None)
    kept = choose(corpus, TOY_LISTS, student, Choice())
    none = choose(corpus, TOY_LISTS, student, Choice(filters=Filters(0)))
    folder = tmp_path / "out"
    Output(str(folder), {"beam": 5}).write(corpus, TOY_LISTS, kept, student)
    before = tree(folder)
    other = Output(str(folder), {"beam": 4})
    assert not other.complete and other.differences() == ["beam is 4 here, 5 there"]
    with pytest.raises(FileError, match="nothing is left"):
        other.write(corpus, TOY_LISTS, none, student)
    assert tree(folder) == before
    other.write(corpus, TOY_LISTS, kept, student, originals=Originals(*sides))
    assert other.complete and len(tree(folder)["text/train.bb"].splitlines()) == 9


def test_a_folder_of_somebody_else(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(FileError, match="holds files that this command did not write"):
        Output(str(tmp_path), {})


# processes


@pytest.mark.parametrize(
    "flags, environment, expected",
    [
        ((1, 0), {}, (1, 0)),
        ((4, 3), {}, (4, 3)),
        ((1, 0), dict(WORLD_SIZE="8", RANK="5", LOCAL_RANK="1"), (8, 5)),
        ((1, 0), dict(SLURM_STEP_NUM_TASKS="8", SLURM_PROCID="6", SLURM_LOCALID="2"), (8, 6)),
        # a batch script is one process, whatever it has been given
        ((1, 0), dict(SLURM_NTASKS="8", SLURM_PROCID="0", SLURM_LOCALID="0"), (1, 0)),
        ((4, 3), dict(WORLD_SIZE="8", RANK="5", LOCAL_RANK="1"), (4, 3)),
    ],
)
def test_the_shard_of_a_process(monkeypatch, flags, environment, expected):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    class Options(NamedTuple):
        num_shards: int
        shard_id: int
        device_id: int = 0

    assert arguments.shard_of_process(Options(*flags))[:2] == expected
