import pytest
from fairseq.data import Dictionary

from kd_plugin.checkpoints import (
    MISSING,
    Role,
    VocabularyError,
    dictionaries,
    index_map,
    is_padding,
    lacking,
)

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def test_the_same_symbols_in_the_same_order_need_no_map():
    assert index_map([*SPECIAL, "a", "b"], [*SPECIAL, "a", "b"]) is None


def test_another_order_and_more_symbols_are_mapped_by_name():
    student = [*SPECIAL, "a", "b", "c"]
    teacher = [*SPECIAL, "c", "x", "a", "y", "b"]
    index = index_map(student, teacher).tolist()
    assert [teacher[i] for i in index] == student


def test_symbols_that_the_teacher_lacks_are_named():
    with pytest.raises(VocabularyError) as error:
        index_map([*SPECIAL, "a", "ß", "b"], [*SPECIAL, "b", "c"], "source", share="Share it.")
    message = str(error.value)
    assert "'a'" in message and "'ß'" in message and "'b'" not in message
    assert "source" in message and "lacks 2" in message
    assert message.endswith("knows every symbol of the student. Share it.")


def test_fairseqs_padding_symbols_do_not_count():
    student = [*SPECIAL, "a", "b", "madeupword0000", "madeupword0001"]
    teacher = [*SPECIAL, "b", "a", "madeupword0000"]
    assert index_map(student, teacher).tolist() == [0, 1, 2, 3, 5, 4, 6, MISSING]


def test_a_symbol_that_only_looks_like_padding_counts():
    with pytest.raises(VocabularyError, match="madeupwords"):
        index_map([*SPECIAL, "madeupwords"], SPECIAL)


def test_a_symbol_twice_cannot_be_mapped():
    with pytest.raises(VocabularyError, match="student.*more than once.*'a'"):
        index_map([*SPECIAL, "a", "a"], [*SPECIAL, "a"])
    assert index_map([*SPECIAL, "a", "a"], [*SPECIAL, "a", "a"]) is None


def test_only_flags_that_there_are_are_advised():
    for role, advised in (
        (Role("teacher"), False),
        (Role("teacher", data="--teacher-data"), True),
    ):
        with pytest.raises(VocabularyError) as error:
            index_map([*SPECIAL, "a"], SPECIAL, "target", role)
        assert ("--" in str(error.value)) == advised
        assert ("--teacher-data names the folder of the right one." in str(error.value)) == advised


def test_what_a_padding_symbol_is():
    """As fairseq-preprocess makes them; a word of data that holds the same letters is none."""
    dictionary = Dictionary()
    dictionary.finalize(padding_factor=8)
    assert [is_padding(symbol) for symbol in dictionary.symbols] == [False] * 4 + [True] * 4
    for symbol in ("madeupword", "madeupword1", "madeupwords", "a madeupword0001", "madeupword00x"):
        assert not is_padding(symbol)
    assert is_padding("madeupword12345")
    assert lacking(["a", "madeupword0003", "madeupwords", "b"], {"b"}) == ["a", "madeupwords"]


def test_where_two_dictionaries_differ():
    one, other, longer = Dictionary(), Dictionary(), Dictionary()
    for made, symbols in ((one, "ab"), (other, "ac"), (longer, "abc")):
        for symbol in symbols:
            made.add_symbol(symbol)
    assert dictionaries.difference(one, one) == ""
    assert "symbol 5 is 'b' in the data and 'c' there" in dictionaries.difference(one, other)
    assert "7 symbols and the data's 6" in dictionaries.difference(one, longer)


def test_dictionaries_of_lists_of_symbols():
    made = dictionaries.of_symbols([*SPECIAL, "a", "b", "a"])
    assert made.symbols == [*SPECIAL, "a", "b", "a"] and made.index("a") == 6
    with pytest.raises(VocabularyError, match="begins with fairseq's special symbols.*'a', '<s>'"):
        dictionaries.of_symbols(["a", *SPECIAL])


def test_folders_without_dictionaries(tmp_path):
    assert dictionaries.read_folder(str(tmp_path), ("aa", "bb")) is None
    (tmp_path / "dict.aa.txt").write_text("a 1\n")
    assert dictionaries.read_folder(str(tmp_path), ("aa", "bb")) is None
    (tmp_path / "dict.bb.txt").write_bytes(b"\xff 1\n")
    with pytest.raises(VocabularyError, match="dict.bb.txt: cannot be read as a dictionary"):
        dictionaries.read_folder(str(tmp_path), ("aa", "bb"))
