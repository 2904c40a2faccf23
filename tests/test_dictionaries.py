import pytest

from kd_plugin.checkpoints import MISSING, VocabularyError, index_map

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
        index_map([*SPECIAL, "a", "ß", "b"], [*SPECIAL, "b", "c"], "source")
    message = str(error.value)
    assert "'a'" in message and "'ß'" in message and "'b'" not in message
    assert "source" in message and "lacks 2" in message
    assert "Sequence-level distillation needs no shared vocabulary" in message


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
