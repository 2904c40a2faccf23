"""What drops a sentence."""

import pytest

from kd_plugin.sequences import Filters

S = "s1 s2 s3 s4 s5 s6 s7 s8"  # 8 subwords


@pytest.mark.parametrize(
    "source, target, reason",
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
def test_filters(source, target, reason):
    texts = (source, target, "")
    found = Filters().reason(source.split(), target.split(), True, texts)
    assert found == reason
    assert Filters.off().reason(source.split(), target.split(), False, texts) is None


def test_unfinished_hypotheses():
    texts = ("s", "a", None)
    assert Filters().reason(["s"], ["a"], False, texts) == "unfinished"
    assert Filters()._replace(unfinished=False).reason(["s"], ["a"], False, texts) is None


def test_a_copy_that_the_reference_is_too_stays():
    same = (["Paris"], ["Paris"], True)
    assert Filters().reason(*same, ("Paris", "Paris", "Paris")) is None
    assert Filters().reason(*same, ("Paris", "Paris", None)) == "copy_of_source"
    assert Filters()._replace(copies=False).reason(*same, ("Paris", "Paris", None)) is None
