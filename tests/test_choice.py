"""Which hypothesis a sentence gets."""

from typing import NamedTuple

import pytest
from fairseq.data import Dictionary
from letters import LINES, LISTS, LetterCorpus, letters
from sacrebleu import sentence_bleu, sentence_chrf

from kd_plugin.decoding import Hypothesis, TextHypothesis, databin
from kd_plugin.sequences import SELECTORS, Choice, Filters, Student, choose
from kd_plugin.sequences import choice as select


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
        found = select.per_token(score, 2, lenpen, unnormalized)
        assert found == pytest.approx(-2)


class Data(NamedTuple):
    source: Dictionary
    target: Dictionary


@pytest.fixture
def toy():
    dictionary = letters()
    data = Data(dictionary, dictionary)
    source = [databin.encode(dictionary, "h " + line) for line in LINES]
    references = [databin.encode(dictionary, line) for line in LINES]
    return LetterCorpus(source, references, data), Student(data, lambda text: text, None)


def test_best_and_closest(toy):
    best = choose(*(toy[0], LISTS, toy[1], Choice()))
    assert best.which.tolist() == [0, 0, 0, -1, 0]
    assert best.dropped["longer_than_the_teacher_reads"] == 1 and sum(best.dropped.values()) == 1
    assert best.means["score_per_token"] == pytest.approx(-(0.1 + 0.3 + 0.5 + 0.9) / 4)
    assert best.means["closeness"] is None
    for metric in ("bleu", "chrf"):
        closest = choose(toy[0], LISTS, toy[1], Choice("closest", metric))
        assert closest.which.tolist() == [1, 0, 0, -1, 1]


def test_far_from_the_reference(toy):
    chosen = choose(toy[0], LISTS, toy[1], Choice(min_closeness=99.0))
    assert chosen.which.tolist() == [-1, 0, -1, -1, -1]
    assert chosen.dropped["far_from_reference"] == 3
    assert chosen.means["closeness"] == pytest.approx(100)


@pytest.mark.parametrize(
    "quantile, which",
    [(0.0, [0, 0, 0, -1, 0]), (0.25, [0, 0, 0, -1, -1]), (0.5, [0, 0, -1, -1, -1])],
)
def test_the_share_with_the_lowest_scores(toy, quantile, which):
    choice = Choice(min_score_quantile=quantile)
    chosen = choose(toy[0], LISTS, toy[1], choice)
    assert chosen.which.tolist() == which
    assert chosen.dropped["low_score"] == 4 - sum(i == 0 for i in which)


def test_every_sentence_is_counted_once(toy):
    """Whatever the choice is: kept or dropped for one reason."""
    for choice in (Choice("closest", "chrf", Filters(), 50.0, 0.5), Choice(filters=Filters(2))):
        chosen = choose(toy[0], LISTS, toy[1], choice)
        assert (chosen.which >= 0).sum() + sum(chosen.dropped.values()) == 5


def test_what_cannot_be_encoded_anew_is_dropped(toy):
    corpus, student = toy
    lists = [(0, [Hypothesis("a <unk>", -0.1, True)]), (1, [Hypothesis("b", -0.1, True)])]
    for recode, dropped in ((None, 0), (str.upper, 1)):
        chosen = choose(corpus, lists, student._replace(recode=recode), Choice())
        assert chosen.dropped["unknown_symbol"] == dropped


def test_a_selector_is_its_entry_in_the_table(toy, monkeypatch):
    """Whatever gives each hypothesis a value: here the longest text."""

    def length(candidates):
        return [len(candidates.text(i)) for i in range(len(candidates))]

    monkeypatch.setitem(SELECTORS, "longest", select.Selector("longest", "the longest", length))
    chosen = choose(toy[0], LISTS, toy[1], Choice("longest"))
    assert chosen.which.tolist() == [0, 0, 0, -1, 0]
    shortest = select.Selector("shortest", "the shortest", lambda c: [-x for x in length(c)])
    monkeypatch.setitem(SELECTORS, "shortest", shortest)
    filters = Filters.off()
    chosen = choose(toy[0], LISTS, toy[1], Choice("shortest", filters=filters))
    assert chosen.which.tolist() == [0, 0, 1, -1, 1] and chosen.dropped["empty"] == 0
    chosen = choose(toy[0], LISTS, toy[1], Choice("shortest"))
    assert chosen.which.tolist() == [0, 0, -1, -1, 1] and chosen.dropped["empty"] == 1
    assert not Choice("longest").needs_references and Choice("closest").needs_references


def test_a_hypothesis_is_measured_once(toy):
    measured = []

    def similarity(hypothesis, reference):
        measured.append(hypothesis)
        return 1.0

    def text(hypothesis):
        return hypothesis.subwords.upper()

    candidates = select.Candidates(LISTS[0][1], text, "A B C", similarity)
    assert [candidates.closeness(i) for i in (0, 1, 1, 0)] == [1.0] * 4
    assert measured == ["A B D", "A B C"]


# hypotheses that are text


def spelled(text):
    """Characters, as a subword model would have it."""
    return " ".join(text.replace(" ", "").lower())


@pytest.fixture
def texts(toy):
    corpus, student = toy
    lists = [
        (i, [TextHypothesis(one.subwords.upper(), one.score, True) for one in nbest])
        for i, nbest in LISTS
    ]
    student = student._replace(to_text=lambda text: text.upper(), encode=spelled)
    return corpus, lists, student


@pytest.mark.parametrize("choice", [Choice(), Choice("closest"), Choice(filters=Filters(2))])
def test_text_is_chosen_as_its_subwords_would_be(toy, texts, choice):
    """The letters of a text are here the symbols of the dictionary."""
    expected = choose(toy[0], LISTS, texts[2], choice)
    found = choose(*texts[:2], texts[2], choice)
    assert found.which.tolist() == expected.which.tolist()
    assert found.dropped == expected.dropped and found.means == pytest.approx(expected.means)


def test_a_student_of_its_own_encodes_text_by_its_own_model(toy, texts):
    one = TextHypothesis("A B", -0.1, True)
    mine = texts[2]._replace(recode=lambda text: text.replace(" ", "_"))
    assert mine.symbols(one) == ["A_B"] and texts[2].symbols(one) == ["a", "b"]
    assert mine.hypothesis(one) == ("A B", "A_B", [])
    assert texts[2].hypothesis(one) == ("A B", "a b", [])
    # the source is recoded for such a student alone
    assert mine.sentence("a b").subwords == "A_B" and texts[2].sentence("a b").subwords == "a b"


def test_a_score_that_nobody_gave(toy):
    nan = float("nan")
    lists = [(0, [Hypothesis("a b c", nan, True)]), (1, [Hypothesis("b c d", -2.0, True)])]
    assert choose(toy[0], lists, toy[1], Choice()).means["score_per_token"] == -2
    means = choose(toy[0], lists[:1], toy[1], Choice()).means
    assert means["score_per_token"] is None
