"""The vocabulary map of parallel data."""

import random

import pytest
from fairseq.data import Dictionary

from kd_plugin.decoding import DataBin, databin
from kd_plugin.export import vocabulary_map as module
from kd_plugin.export.vocabulary_map import vocabulary_map
from kd_plugin.files import FileError


def binarised(folder, pairs, source, target, split="train"):
    """Pairs of sentences as a data-bin with these symbols."""
    folder.mkdir()
    for side, (lang, symbols) in enumerate((("aa", source), ("bb", target))):
        dictionary = Dictionary()
        for symbol in symbols:
            dictionary.add_symbol(symbol)
        dictionary.save(str(folder / f"dict.{lang}.txt"))
        writer = databin.Writer(folder / f"{split}.aa-bb.{lang}", len(dictionary))
        for pair in pairs:
            writer.add(databin.encode(dictionary, pair[side]))
        writer.close()
    return DataBin(str(folder), "aa", "bb")


def test_by_hand(tmp_path, monkeypatch):
    """Of "x": a third more often with a. Symbols of frequent use and special ones are left out.

    Pairs: a-x 2, a-y 1, b-x 1, b-y 1. For each time that a (2) or b (1) occurs: 1, 1/2, 1, 1.
    Shares: x of the first pair 1/2 to each, y 1/3 to a and 2/3 to b; x of the second 1 to a.
    So a: x 3/2, y 1/3; and b: y 2/3, x 1/2.
    """
    monkeypatch.setattr(module, "ALWAYS", 1)
    pairs = [("a b", "x y the the"), ("a", "the x the <pad>")]
    data = binarised(tmp_path / "data", pairs, ["a", "b", "c"], ["x", "y", "the", "c"])
    # c was never seen, but is copied
    assert vocabulary_map([data], 2) == (["the"], {"a": ["x", "y"], "b": ["y", "x"], "c": ["c"]})
    found = vocabulary_map([data, data], 1)
    assert found == (["the"], {"a": ["x"], "b": ["y"], "c": ["c"]})
    found.write(tmp_path / "vmap.txt")
    assert (tmp_path / "vmap.txt").read_text() == "\tthe\na\tx\nb\ty\nc\tc\n"


def translated(count, seed=1):
    """Sentences of which each word has one translation, beside a word that is everywhere."""
    drawn = random.Random(seed)
    for _ in range(count):
        numbers = drawn.sample(range(40), drawn.randint(2, 7))
        target = [f"t{i}" for i in numbers]
        drawn.shuffle(target)
        yield " ".join(f"s{i}" for i in numbers), " ".join([*target, "the"])


def test_each_word_gets_its_translation(tmp_path, monkeypatch, caplog):
    """However the data are cut, and with too little memory for the pairs that are rare."""
    monkeypatch.setattr(module, "ALWAYS", 1)
    pairs, words = [*translated(600)], [f"s{i}" for i in range(40)]
    data = binarised(tmp_path / "data", pairs, words, ["the", *(f"t{i}" for i in range(40))])
    expected = {word: ["t" + word[1:]] for word in words}
    found = vocabulary_map([data], 1)
    assert found == (["the"], expected)
    more = vocabulary_map([data], 5)
    monkeypatch.setattr(module, "_CHUNK", 500)
    assert vocabulary_map([data], 5) == more and all(len(c) == 5 for c in more.candidates.values())
    monkeypatch.setattr(module, "_MOST_COUNTED", 800)  # of 1,600 pairs
    assert vocabulary_map([data], 1) == found and not caplog.records
    monkeypatch.setattr(module, "_MOST_COUNTED", 20)
    kept = vocabulary_map([data], 1).candidates
    assert len(kept) < 40 and f"{40 - len(kept)} rare source symbols keep no" in caplog.text
    monkeypatch.setattr(module, "_CHUNK", 1)  # every sentence is too long
    with pytest.raises(FileError, match="train has no text to make a vocabulary map of"):
        vocabulary_map([data], 1)


def test_symbols_with_separators_are_left_out(tmp_path):
    found = module.VocabularyMap(["x", "y\tz"], {"a\rb": ["x"], "c": ["d e", "f"], "g": ["\n"]})
    found.write(tmp_path / "vmap.txt")
    assert (tmp_path / "vmap.txt").read_bytes() == b"\tx\nc\tf\n"


def test_sides_that_do_not_fit(tmp_path):
    data = binarised(tmp_path / "data", [("a", "x"), ("a", "x")], ["a"], ["x"])
    writer = databin.Writer(tmp_path / "data" / "train.aa-bb.bb", 5)
    writer.add(databin.encode(data.target, "x"))
    writer.close()
    with pytest.raises(FileError, match="train has 2 sentences in aa and 1 in bb"):
        vocabulary_map([data], 1)
    writer = databin.Writer(tmp_path / "data" / "train.aa-bb.bb", 5)
    for _ in range(2):
        writer.add([400, 2])
    writer.close()
    with pytest.raises(FileError, match="symbol number 400, and its dictionary has 5"):
        vocabulary_map([data], 1)
