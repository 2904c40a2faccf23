"""From n-best lists to a data-bin: what is decoded, written, replaced and refused."""

import contextlib
import os
import pickle
import re
import shutil
import signal
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from fairseq_cli.generate import get_symbols_to_strip_from_output
from kills import at_each_line, in_a_child
from letters import LISTS, LetterCorpus, write_letters
from nbest import HEADER, PLAN, SENTENCES, lists, write
from support import tree
from trainer import SENTENCES as SENTENCES_OF_TRAINER
from trainer import write_data, write_mbart

from kd_plugin import files
from kd_plugin.commands import arguments
from kd_plugin.commands import sequences as command
from kd_plugin.decoding import databin
from kd_plugin.decoding.text import split_tags
from kd_plugin.errors import UserError
from kd_plugin.files import Busy, FileError, temporary
from kd_plugin.sequences import Choice, Filters, HypothesisStore, Output, Student, choose, decoded
from kd_plugin.sequences import output as output_module
from kd_plugin.sequences import pipeline as distil
from kd_plugin.sequences.mixing import ORIGINAL, Mix, Part, Wanted
from kd_plugin.sequences.student import open_student


@pytest.fixture
def data(tmp_path) -> databin.DataBin:
    return write_letters(tmp_path / "data")


# decoding


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
        decoded.decode(corpus, Killed(), store, PLAN, num_workers=1)


def test_a_shard_that_comes_late_does_not_remove_what_an_earlier_one_has_begun(tmp_path):
    output = Output(str(tmp_path), {})
    folder = tmp_path / "hypotheses"
    assert write(folder)
    early, late = [HypothesisStore(folder, {**HEADER, "seed": 2}, 2, i) for i in (0, 1)]
    assert early.differences() and late.differences()
    distil.clear_others(output, early)
    early.begin(PLAN)
    early.append(lists(early.batches[0]))
    before = tree(folder)
    distil.clear_others(output, late)
    assert tree(folder) == before


# writing


def test_subwords_of_another_model_are_said(data, tmp_path, caplog):
    corpus = LetterCorpus(data.side("train", "aa"), data.side("train", "bb"), data)
    student = Student(data, lambda text: text, lambda text: text.replace("b", "x"))
    chosen = choose(corpus, LISTS, student, Choice())
    output = Output(str(tmp_path / "out"), {})
    output.write(corpus, LISTS, chosen, student)
    assert "12% OF THE SYMBOLS OF train.aa ARE UNKNOWN" in caplog.text
    assert output.record()["counts"]["unknown_tokens"] == 4


def original(source, target, weight=1):
    return Mix([Part(ORIGINAL, source, target, weight)])


def rows(folder, lang):
    side = databin.DataBin(str(folder), "aa", "bb").side("train", lang)
    return [side[i].tolist() for i in range(len(side))]


def test_an_original_is_written_as_it_is(data, tmp_path):
    """fairseq-train sees special symbols within sentences, too: so does a student of the mix."""
    sides = data.side("train", "aa"), data.side("train", "bb")
    special = [torch.tensor(tokens) for tokens in ([4, 1, 5, 2], [4, 2, 5, 2], [0, 3, 1, 2])]
    corpus = LetterCorpus(*sides, data)
    student = Student(data, lambda text: text, None)
    output = Output(str(tmp_path / "out"), {})
    chosen = choose(corpus, LISTS, student, Choice())
    output.write(corpus, LISTS, chosen, student, mix=original(special, special))
    for lang in ("aa", "bb"):
        assert rows(tmp_path / "out", lang)[:3] == [tokens.tolist() for tokens in special]


def test_tags_are_no_text(data, tmp_path, caplog):
    """A student keeps those that it has symbols for."""
    corpus = LetterCorpus(data.side("train", "aa"), data.side("train", "bb"), data)
    known, unknown = "<2aa>", "bbb_Latn"
    for dictionary in (data.source, data.target):
        for tag in (known, unknown):
            dictionary.add_symbol(tag)
    source = [databin.encode(data.source, f"{unknown} {known} a b {known}")] * 5
    corpus = corpus._replace(source=source)
    mine = write_letters(tmp_path / "mine")
    for dictionary in (mine.source, mine.target):
        dictionary.add_symbol(known)
    student = Student(mine, lambda line: " ".join(split_tags(line.split())[1]), str.lower)
    output = Output(str(tmp_path / "out"), {})
    output.write(corpus, LISTS, choose(corpus, LISTS, student, Choice()), student)
    assert (tmp_path / "out/text/train.aa").read_text() == "a b\n" * 4
    assert (tmp_path / "out/text/train.subwords.aa").read_text() == "<2aa> a b <2aa>\n" * 4
    assert output.record()["counts"]["unknown_tokens"] == 0
    assert "train.aa is written without tags of languages (bbb_Latn)" in caplog.text
    assert "train.bb is written without" not in caplog.text


def test_killed_at_any_line_of_writing(data, tmp_path):
    sides = data.side("train", "aa"), data.side("train", "bb")
    corpus = LetterCorpus(*sides, data)
    student = Student(data, lambda text: text, None)
    chosen = choose(corpus, LISTS, student, Choice())

    def write_to(folder):
        output = Output(str(folder), {"beam": 5})
        if output.complete:
            output.clean_up()
        else:
            output.write(corpus, LISTS, chosen, student, mix=original(*sides, weight=2))

    # another one that it replaces
    old = Output(str(tmp_path / "old"), {"beam": 4})
    old.write(corpus, LISTS[:2], chosen, student)
    write_to(tmp_path / "whole")
    whole = tree(tmp_path / "whole")
    assert "record.json" in whole and "valid.aa-bb.bb.idx" in whole
    lines = whole["text/train.bb"].decode().splitlines()
    assert lines == 2 * ["a b c", "b c d", "c d e", "d e f", "e f g"] + [
        nbest[0].subwords for _, nbest in LISTS
    ]
    last, killed = 0, True
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

            at_each_line(count, output_module, files)
            write_to(folder)

        killed = in_a_child(work) != 0
        write_to(folder)
        assert tree(folder) == whole, last
        assert not list(folder.glob("*.new"))
    assert last > 200
    temporary(tmp_path / "whole" / "data").mkdir()  # of a kill after the record
    write_to(tmp_path / "whole")
    assert not list((tmp_path / "whole").glob("*.new"))


def test_what_a_user_keeps_beside_the_data_stays(data, tmp_path):
    """What a kill left is removed, but not what is only called like it."""
    folder = tmp_path / "out"
    mine = ("data.de.new", "record.json.1.new", "data.0123abcd.new")
    sides = data.side("train", "aa"), data.side("train", "bb")
    corpus, student = LetterCorpus(*sides, data), Student(data, lambda text: text, None)
    kept = choose(corpus, LISTS, student, Choice())

    def write_with(settings):
        for name in mine:
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / "text").write_text("mine")
        left = temporary(folder / "data"), temporary(folder / "record.json")
        left[0].mkdir()
        (left[0] / "half").touch()
        left[1].touch()
        output = Output(str(folder), settings)
        if not output.complete:
            output.write(corpus, LISTS, kept, student)
            assert not any(path.exists() for path in left)
        output.clean_up()
        assert {name: (folder / name / "text").read_text() for name in mine} == dict.fromkeys(
            mine, "mine"
        )

    for settings in ({"beam": 5}, {"beam": 4}, {"beam": 4}):
        write_with(settings)
    for name in (*mine, "data.fa.new"):
        only = tmp_path / f"only {name}"
        (only / name).mkdir(parents=True)
        with pytest.raises(FileError, match="holds files that this command did not write"):
            Output(str(only), {})


def test_data_that_are_to_be_replaced_stay_until_there_are_others(data, tmp_path):
    sides = data.side("train", "aa"), data.side("train", "bb")
    corpus, student = LetterCorpus(*sides, data), Student(data, lambda text: text, None)
    kept = choose(corpus, LISTS, student, Choice())
    none = choose(corpus, LISTS, student, Choice(filters=Filters(0)))
    folder = tmp_path / "out"
    Output(str(folder), {"beam": 5}).write(corpus, LISTS, kept, student)
    before = tree(folder)
    other = Output(str(folder), {"beam": 4})
    assert not other.complete and other.differences() == ["beam is 4 here, 5 there"]
    with pytest.raises(FileError, match="nothing is left"):
        other.write(corpus, LISTS, none, student)
    assert tree(folder) == before
    other.write(corpus, LISTS, kept, student, mix=original(*sides))
    assert other.complete and len(tree(folder)["text/train.bb"].splitlines()) == 9


def test_a_folder_of_somebody_else(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(FileError, match="holds files that this command did not write"):
        Output(str(tmp_path), {})


# locks


def test_a_folder_is_written_by_one_process_at_a_time(tmp_path):
    first, second = Output(str(tmp_path), {}), Output(str(tmp_path), {})
    with first.lock():
        with pytest.raises(Busy, match="another process is writing"):
            second.lock()
    second.lock().close()


def test_a_lock_that_cannot_be_taken_is_not_one_that_is_held(tmp_path):
    """Somebody has put a link there: that is an error, and no other process is waited for."""
    (tmp_path / "elsewhere").touch()
    output = Output(str(tmp_path / "out"), {})
    output.folder.mkdir()
    (output.folder / ".lock").symlink_to(tmp_path / "elsewhere")
    store = HypothesisStore(output.folder / "hypotheses", HEADER)
    for work in (output.lock, lambda: distil.clear_others(output, store)):
        with pytest.raises(FileError, match="is a link") as error:
            work()
        assert not isinstance(error.value, Busy)


# what is asked


def asked(data, output, *flags):
    """What the command would ask for."""
    found = []
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(command.sequences, "make", found.append)
        arguments_ = [data.folder, "--path", data.folder / "dict.aa.txt", "--output", output]
        options = arguments.parse_like_fairseq(
            command.make_parser(), [str(a) for a in (*arguments_, "--cpu", *flags)]
        )
        command.run(options)
    return found[0]


@pytest.mark.parametrize("text", ["dropout=0", "[]", "7", "{"])
def test_overrides_that_are_no_dictionary(data, tmp_path, text):
    with pytest.raises(UserError, match="--model-overrides"):
        asked(data, tmp_path / "out", "--model-overrides", text)
    given = asked(data, tmp_path / "out")
    given.cfg.common_eval.model_overrides = text
    with pytest.raises(UserError, match="--model-overrides"):
        distil.make(given)


def test_what_is_asked_stays_as_it_was(data, tmp_path):
    """The library function changes no configuration of its caller."""
    given = asked(data, tmp_path / "out")
    assert given.cfg.dataset.max_tokens is None
    with pytest.raises(UserError, match="dict.aa.txt"):
        distil.make(given)  # which is no checkpoint
    assert given.cfg.dataset.max_tokens is None and given.cfg.task.source_lang is None


def test_flags_become_what_is_asked(data, tmp_path, monkeypatch):
    for name, value in dict(WORLD_SIZE="8", RANK="5", LOCAL_RANK="1").items():
        monkeypatch.setenv(name, value)
    given = asked(
        *(data, "out", "--select", "closest", "--beam", 4, "--nbest", 4, "--mix", "original"),
        *("--repeat-original", 3, "--no-filters", "--max-length", 7),
    )
    assert (given.num_shards, given.shard_id) == (8, 5)
    assert given.choice == Choice("closest", filters=Filters.off()._replace(max_length=7))
    assert given.mix == [Wanted(ORIGINAL, 3)] and given.engine == "fairseq" and not given.overwrite
    assert asked(data, "out").mix == []


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


# other names of languages


@pytest.fixture
def renamed(data, tmp_path):
    """A copy of the data-bin whose languages have other names."""
    folder = tmp_path / "renamed"
    folder.mkdir()
    for path in data.folder.iterdir():
        name = path.name.replace("aa", "a_A").replace("bb", "b_B")
        shutil.copy(str(path), str(folder / name))
    return folder


def test_a_student_whose_data_call_the_languages_otherwise(data, renamed):
    """What is advised, to the letter, leads to its own dictionaries and files."""
    with pytest.raises(FileError, match="dict.b_B.txt: if these are other names") as error:
        open_student(data, str, str(renamed))
    langs = re.search(r"--student-langs (\S+), the source's first$", str(error.value)).group(1)
    found = open_student(data, str, str(renamed), None, databin.parse_languages(langs, "")).data
    assert found.langs == ("a_A", "b_B") and found.source.symbols == data.source.symbols
    assert {*found.carried_files()} >= {"dict.a_A.txt", "dict.b_B.txt"}
    for path in renamed.glob("valid.*"):  # a second direction: its files no longer tell
        shutil.copy(str(path), str(path).replace("a_A-b_B", "b_B-a_A"))
    with pytest.raises(FileError, match="--student-langs SRC,TGT, the source's first"):
        open_student(data, str, str(renamed))


def test_text_that_nothing_encodes(data):
    for own in (None, str(data.folder)):
        with pytest.raises(FileError, match="nothing says how .* --bpe sentencepiece .* or"):
            open_student(data, str, own, written="text")
        assert open_student(data, str, own, encode=str, written="text").encode is str


@pytest.mark.parametrize("text", ["aa", "aa,", ",bb", "aa,bb,cc"])
def test_names_of_languages_that_are_none(data, text):
    with pytest.raises(UserError, match="--student-langs: expected a source and a target .* got"):
        asked(data, "out", "--student-data", data.folder, "--student-langs", text)
    with pytest.raises(UserError, match="--student-langs needs --student-data"):
        asked(data, "out", "--student-langs", "aa,bb")


# teachers whose task adds tags to sentences


@pytest.mark.parametrize("bos", [False, True])
def test_an_mbart_translates_as_its_own_task_has_it(bos, tmp_path):
    """With neither its tags nor ends of sentences in text, and with the corpus as it is."""
    data = write_data(tmp_path / "data")
    teacher, model, task = write_mbart(tmp_path, data, bos)
    flags = ["--langs", "bb,xx,aa", *(["--prepend-bos"] if bos else [])]
    given = asked(
        *(databin.DataBin(str(data), "aa", "bb"), tmp_path / "out", "--path", teacher),
        *("--task", "translation_from_pretrained_bart", *flags, "-s", "aa", "-t", "bb"),
        *("--beam", 3, "--no-filters", "--keep-unfinished", "--max-len-b", 5, "--num-workers", 0),
    )
    assert distil.make(given)["counts"]["unknown_tokens"] == 0
    dataset, dictionary = task.dataset("train"), task.target_dictionary
    generator = task.build_generator([model], given.cfg.generation)
    expected = []
    for i in range(len(dataset)):
        best = task.inference_step(generator, [model], dataset.collater([dataset[i]]))[0][0]
        strip = get_symbols_to_strip_from_output(generator)
        expected.append(dictionary.string(best["tokens"], extra_symbols_to_ignore=strip))
    text = tmp_path / "out" / "text"
    assert (text / "train.subwords.bb").read_text().splitlines() == expected
    assert len(set(expected)) > 2 and not any("[" in line or "<" in line for line in expected)
    sources = [" ".join(source) for source, _ in SENTENCES_OF_TRAINER["train"]]
    assert (text / "train.subwords.aa").read_text().splitlines() == sources
