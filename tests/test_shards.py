"""The store of shards on its own: what it takes up again, what it refuses, what it leaves."""

import json
import logging
import os
import pickle
import shutil

import numpy as np
import pytest
from support import tree

from kd_plugin import files, shards
from kd_plugin.files import Busy, FileError, locked
from kd_plugin.shards import ShardedStore, Shards, fixed_rows, line_ends

PLAN = [np.array(batch) for batch in ([4, 0], [2], [1, 5], [3])]


class Squares(ShardedStore):
    """Of each number its square, as a line and as four bytes."""

    HEADER, SHARDS, RESULT = "header.json", "shards", "squares.txt"
    CONTENT, ADVICE = "squares", "Choose another folder"

    def __init__(self, folder, num_shards=1, shard_id=0, **header):
        columns = {"lines": line_ends, "numbers": fixed_rows(4)}
        super().__init__(
            folder, {"of": "numbers", **header}, columns, num_shards=num_shards, shard_id=shard_id
        )

    def rows_in(self, batch):
        return len(batch)

    def append(self):
        squares = self.batches[self.done].astype("<i4") ** 2
        self.write(
            {"lines": "".join(f"{s}\n" for s in squares).encode(), "numbers": squares.tobytes()}
        )

    def merge(self):
        found = {}
        for folder, numbers in self.sentences_of_shards():
            lines = (folder / "lines").read_text().splitlines()
            assert lines == np.fromfile(str(folder / "numbers"), "<i4").astype(str).tolist()
            found.update(zip(numbers.tolist(), lines))
        with files.all_or_nothing(self.folder / self.RESULT) as file:
            file.write("".join(found[i] + "\n" for i in sorted(found)).encode())


def write(folder, num_shards=1, shard_id=0, **header):
    store = Squares(folder, num_shards, shard_id, **header)
    store.begin(PLAN)
    while store.done < len(store.batches):
        store.append()
    return store.finish()


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7])
def test_however_many_shards(tmp_path, num_shards):
    """Also more of them than there are batches."""
    ended = [write(tmp_path, num_shards, i) for i in range(num_shards)]
    assert ended == [False] * (num_shards - 1) + [True]
    assert set(tree(tmp_path)) == {"header.json", "squares.txt"}
    assert tree(tmp_path)["squares.txt"] == b"0\n1\n4\n9\n16\n25\n"
    assert write(tmp_path, 2)


@pytest.mark.parametrize("lines", range(0, 16, 3))
@pytest.mark.parametrize("numbers", range(0, 25, 3))
def test_goes_on_behind_the_last_batch_that_all_files_have(tmp_path, lines, numbers):
    write(tmp_path / "whole", 2, 0)
    store = Squares(tmp_path / "cut", 1, 0)
    whole = {"lines": b"16\n0\n4\n1\n25\n9\n", "numbers": np.array([16, 0, 4, 1, 25, 9], "<i4")}
    store.shards.own.mkdir(parents=True)
    (store.shards.own / "lines").write_bytes(whole["lines"][:lines])
    (store.shards.own / "numbers").write_bytes(whole["numbers"].tobytes()[:numbers])
    store.begin(PLAN)
    rows = min(whole["lines"][:lines].count(b"\n"), numbers // 4)
    assert store.done == sum(rows >= needed for needed in (2, 3, 5, 6))
    store.close()
    assert write(tmp_path / "cut")
    assert tree(tmp_path / "cut")["squares.txt"] == b"0\n1\n4\n9\n16\n25\n"


def test_what_was_made_from_something_else_is_refused(tmp_path):
    write(tmp_path, 2, 0)
    before = tree(tmp_path)
    with pytest.raises(FileError) as error:
        write(tmp_path, 2, 1, of="letters")
    assert str(error.value) == (
        f"{tmp_path} holds squares made with other settings: of is letters here, numbers there. "
        "Choose another folder."
    )
    assert tree(tmp_path) == before
    store = Squares(tmp_path, 2, 1)
    store.begin(PLAN)
    store.append()
    store.append()
    # somebody has replaced it in the meantime
    (tmp_path / "header.json").write_text(json.dumps({"of": "letters"}))
    with pytest.raises(FileError, match="made with other settings"):
        store.finish()
    assert not (store.shards.own / "done").exists()


@pytest.mark.parametrize("name", ["lines", "numbers"])
def test_a_file_that_something_else_has_written_to_is_not_merged(tmp_path, name):
    store = Squares(tmp_path)
    store.begin(PLAN)
    while store.done < len(store.batches):
        store.append()
    with open(store.shards.own / name, "ab") as file:
        file.write(b"9\n\0\0")
    with pytest.raises(FileError, match="was written to by something else: delete"):
        store.finish()
    assert not store.complete and not (store.shards.own / "done").exists()


def test_a_link_in_place_of_a_file_is_refused(tmp_path):
    store = Squares(tmp_path)
    store.shards.own.mkdir(parents=True)
    (tmp_path / "precious").write_text("mine")
    (store.shards.own / "lines").symlink_to(tmp_path / "precious")
    with pytest.raises(FileError, match="is a link") as error:
        store.begin(PLAN)
    assert not isinstance(error.value, Busy)
    assert (tmp_path / "precious").read_text() == "mine"


def test_cleaning_up_leaves_what_is_not_its_own(tmp_path):
    """Only names that end in a random number of 128 bits are its own."""
    mine = {"notes.new.txt", "corpus.de.new", "dict.fa.new", "notes.1.new", "a.0123abcd.new"}
    for name in mine:
        tmp_path.joinpath(name).write_text("mine")
    new = files.temporary(tmp_path / "squares.txt")
    new.touch()
    new.with_name(new.name + ".bin").touch()
    new.with_name(new.name + ".d").mkdir()
    with files.passing_folder(tmp_path / "folder") as passing:
        shutil.copytree(passing, str(files.temporary(tmp_path / "copy")))
        assert len(files.leftovers(tmp_path)) == 5
    assert write(tmp_path)
    assert set(os.listdir(tmp_path)) == mine | {"header.json", "squares.txt"}


def test_a_passing_folder_goes_whatever_happens(tmp_path):
    with pytest.raises(KeyError):
        with files.passing_folder(tmp_path / "model") as passing:
            assert os.path.dirname(passing) == str(tmp_path) and os.listdir(passing) == []
            assert os.path.basename(passing).startswith("model.")
            open(os.path.join(passing, "half"), "w").close()
            raise KeyError
    assert not list(tmp_path.iterdir())


# locks


def test_one_process_writes_a_shard(tmp_path):
    first = Squares(tmp_path)
    first.begin(PLAN)
    with pytest.raises(Busy, match=r"another process is writing .*shard-0-of-1: wait for it"):
        Squares(tmp_path).begin(PLAN)
    first.close()
    assert write(tmp_path)


def test_a_worker_process_can_release_what_it_inherits(tmp_path):
    first = Shards(tmp_path, 1, 0)
    assert first.claim()
    pickle.loads(pickle.dumps(first)).release()  # in one that is not forked
    with pytest.raises(Busy):
        Shards(tmp_path, 1, 0).claim()
    first.release()
    assert Shards(tmp_path, 1, 0).claim()


@pytest.mark.parametrize("num_shards, shard_id", [(2, 2), (1, -1), (0, 0)])
def test_shards_that_do_not_exist(tmp_path, num_shards, shard_id):
    with pytest.raises(FileError, match="--shard-id must be from 0 to --num-shards"):
        Squares(tmp_path, num_shards, shard_id)


def test_without_locks_it_works_and_says_so(tmp_path, monkeypatch, caplog):
    """As on some network file systems."""

    def flock(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING):
        assert write(tmp_path)
    assert "cannot be locked" in caplog.text
    assert "make sure that no other process writes it" in caplog.text


def test_only_a_held_lock_is_busy(tmp_path):
    first = locked(tmp_path / "lock")
    with pytest.raises(Busy):
        locked(tmp_path / "lock")
    first.close()
    locked(tmp_path / "lock").close()
    with pytest.raises(FileNotFoundError):
        locked(tmp_path / "nowhere" / "lock")
    (tmp_path / "link").symlink_to(tmp_path / "lock")
    with pytest.raises(FileError, match="is a link") as error:
        locked(tmp_path / "link")
    assert not isinstance(error.value, Busy)


# rows


def test_where_rows_end(tmp_path):
    path = tmp_path / "file"
    for content, lines, pairs in (
        (b"", [], []),
        (b"abc", [], [2]),
        (b"a\nbc\nd", [2, 5], [2, 4, 6]),
        (b"\n\n", [1, 2], [2]),
    ):
        path.write_bytes(content)
        assert list(line_ends(path)) == lines and list(fixed_rows(2)(path)) == pairs
    assert len(line_ends(tmp_path / "none")) == len(fixed_rows(2)(tmp_path / "none")) == 0
    assert shards.line_ends(path).dtype == np.int64
