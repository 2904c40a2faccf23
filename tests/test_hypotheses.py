"""Hypotheses on disk: what several shards write, what kills and damage leave."""

import gc
import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kills import at_each_line, in_a_child
from nbest import HEADER, PLAN, SENTENCES, lists, nbest_of, write
from support import tree

from kd_plugin import files, shards
from kd_plugin.decoding import TextHypothesis
from kd_plugin.files import Busy, FileError, temporary
from kd_plugin.sequences import HypothesisStore, hypotheses

NAN = float("nan")
MODULES = (files, shards, hypotheses)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert write(folder)
    return folder


def test_lists_come_back_in_the_order_of_the_data(finished):
    found = list(HypothesisStore(finished, HEADER))
    assert found == [(i, nbest_of(i)) for i in range(SENTENCES)]
    assert not (finished / "shards").exists()


def test_lists_of_text(finished, tmp_path):
    """They are never taken for subwords, nor subwords for text; and a score may be missing."""
    expected = {0: [TextHypothesis('"Ö b"\u2028', -1.0, True)], 1: [TextHypothesis("", NAN, False)]}
    store = HypothesisStore(tmp_path, {**HEADER, "written": "text"})
    store.begin([np.array([1, 0])])
    store.append(expected)
    assert store.finish()
    assert str(list(store)) == str(list(expected.items()))
    assert b'{"text": "", "score": null, "finished": false}' in tree(tmp_path)["hypotheses.jsonl"]
    for folder, header in (
        (tmp_path, HEADER),
        (finished, {**HEADER, "written": "text"}),
    ):
        with pytest.raises(FileError, match="written is"):
            HypothesisStore(folder, header).refuse_others()
    HypothesisStore(finished, {**HEADER, "written": "subwords"}).refuse_others()


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
        at_each_line(lambda: lines.append(0), *MODULES)
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

            at_each_line(count, *MODULES)
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


def test_lists_that_an_earlier_version_began_are_gone_on_with(finished, tmp_path):
    """Written here by hand: a header, a plan, and one of a shard's batches and a bit more."""
    own = tmp_path / "shards" / "shard-0-of-2"
    own.mkdir(parents=True)
    header = {"format": "kd_plugin hypotheses", "version": 1, **HEADER}
    (tmp_path / "header.json").write_text(json.dumps(header))
    np.savez(
        str(tmp_path / "plan.npz"),
        sentences=np.concatenate(PLAN).astype("<i8"),
        lengths=np.array([len(batch) for batch in PLAN], "<i8"),
    )
    plan = (tmp_path / "plan.npz").read_bytes()
    assert plan == tree(finished)["plan.npz"]
    whole = tree(finished)["hypotheses.jsonl"].splitlines(keepends=True)
    (own / "hypotheses.jsonl").write_bytes(b"".join(whole[i] for i in PLAN[0]) + whole[7][:9])
    (own / "lock").touch()
    store = HypothesisStore(tmp_path, HEADER, 2, 0)
    store.begin()
    assert store.done == 1
    while store.done < len(store.batches):
        store.append(lists(store.batches[store.done]))
    assert not store.finish() and write(tmp_path, 2, 1)
    assert (tmp_path / "hypotheses.jsonl").read_bytes() == b"".join(whole)


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


def test_a_plan_without_its_header_is_never_left(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(shards, "write_json", full)
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
    with pytest.raises(Busy, match="another process is writing"):
        HypothesisStore(tmp_path, HEADER).begin(PLAN)


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


def test_what_kills_leave_beside_complete_lists_is_removed(finished, tmp_path):
    folder = tmp_path / "lists"
    shutil.copytree(str(finished), str(folder))
    for name in ("source-1", "ctranslate2-1"):
        new = temporary(folder / name)
        (folder / f"{new.name}.bin").touch()
        new.mkdir()
        (folder / f"{new.name}.k3_x9abc.new").mkdir()  # an earlier version's, while it converted
    assert len(list(folder.iterdir())) == len(list(finished.iterdir())) + 6
    HypothesisStore(folder, HEADER).clean_up()
    assert tree(folder) == tree(finished) and not list(folder.glob("*.new*"))


def test_what_a_user_keeps_beside_the_lists_stays(finished, tmp_path):
    """Such names may end in .new, too; also those that hexadecimal digits could spell."""
    folder = tmp_path / "lists"
    shutil.copytree(str(finished), str(folder))
    names = ("corpus.de.new", "dict.fa.new", "notes.1.new", "a.0123abcd.new", "source-1.ad.new.bin")
    for name in names:
        (folder / name).write_text("mine")
    (folder / "train.de.new").mkdir()
    (folder / "train.de.new" / "text").write_text("mine")
    before = tree(folder)
    HypothesisStore(folder, HEADER).clean_up()
    assert tree(folder) == before
    assert write(folder)  # it is complete: the same command again
    assert tree(folder) == before
