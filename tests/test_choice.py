"""Which hypothesis a sentence gets."""

from typing import NamedTuple

import pytest
from fairseq.data import Dictionary
from letters import LINES, LISTS, LetterCorpus, letters
from sacrebleu import sentence_bleu, sentence_chrf

from kd_plugin.decoding import Hypothesis, TextHypothesis, databin
from kd_plugin.errors import UserError
from kd_plugin.files import FileError
from kd_plugin.sequences import Choice, Filters, Student, backward, choose, language, values
from kd_plugin.sequences import choice as select


@pytest.mark.parametrize(
    "worth, expected",
    [
        ([1.0], [0]),
        ([1.0, 2.0], [1, 0]),
        ([2.0, 2.0], [0, 1]),
        ([1.0, 3.0, 3.0, 2.0], [1, 2, 3, 0]),
    ],
)
def test_of_equally_good_hypotheses_the_likeliest_comes_first(worth, expected):
    assert select.in_order(worth) == expected


@pytest.mark.parametrize("metric, reference", [("bleu", sentence_bleu), ("chrf", sentence_chrf)])
def test_closeness_is_sacrebleus(metric, reference):
    measure = values.pairwise(metric)
    texts = [
        "The cat sat.",
        "a b",
        "Hi!",
        "Hi there!",
        "",
        "\u3000 \u00e4 x",
        "a",
        "c d",
        "\U0001f600",
    ]
    lists = [texts, texts[::-1], texts[:1]], [texts, texts[2:5], []]
    for found, own, others in zip(measure(*lists), *lists):
        for row, text in zip(found, own):
            expected = [reference(text, [other]).score for other in others]
            # fastchrf 0.1, the last for Python 3.8, has seven digits; later ones all
            assert row == pytest.approx(expected, rel=1e-6)
    assert measure([["The cat sat."]], [["The cat sat."]])[0][0][0] == pytest.approx(100)


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
    assert best.which[:, 0].tolist() == [0, 0, 0, -1, 0]
    assert best.dropped["longer_than_the_teacher_reads"] == 1 and sum(best.dropped.values()) == 1
    assert best.means["score_per_token"] == pytest.approx(-(0.1 + 0.3 + 0.5 + 0.9) / 4)
    assert best.means["closeness"] is None
    for metric in ("bleu", "chrf"):
        closest = choose(toy[0], LISTS, toy[1], Choice("closest", metric))
        assert closest.which[:, 0].tolist() == [1, 0, 0, -1, 1]


def test_far_from_the_reference(toy):
    chosen = choose(toy[0], LISTS, toy[1], Choice(min_closeness=99.0))
    assert chosen.which[:, 0].tolist() == [-1, 0, -1, -1, -1]
    assert chosen.dropped["far_from_reference"] == 3
    assert chosen.means["closeness"] == pytest.approx(100)


@pytest.mark.parametrize(
    "quantile, which",
    [(0.0, [0, 0, 0, -1, 0]), (0.25, [0, 0, 0, -1, -1]), (0.5, [0, 0, -1, -1, -1])],
)
def test_the_share_with_the_lowest_scores(toy, quantile, which):
    choice = Choice(min_score_quantile=quantile)
    chosen = choose(toy[0], LISTS, toy[1], choice)
    assert chosen.which[:, 0].tolist() == which
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


def test_a_hypothesis_is_measured_once():
    measured = []

    def pairwise(texts, others):
        measured.extend(texts)
        return [[[1.0]]]

    student = Student(None, str.upper, None)
    candidates = values.Candidates(LISTS[0][1], [], student, "A B C", pairwise)
    assert [candidates.closeness(i) for i in (0, 1, 1, 0)] == [1.0] * 4
    assert measured == [["A B D"], ["A B C"]]


# several, and other values


def nbest(*texts):
    return [Hypothesis(text, -0.1 * i, True) for i, text in enumerate(texts, 1)]


def test_the_best_few_with_duplicates_once(toy):
    lists = [
        (0, nbest("a b c", "a b c", "a b", "c b a")),
        (1, nbest("b c d", "", "b b")),
        (3, nbest("d")),
    ]
    chosen = choose(toy[0], lists, toy[1], Choice(keep=2))
    # what a filter drops is not replaced by a worse one
    assert chosen.which.tolist() == [[0, 2], [0, -1], [-1, -1], [0, -1], [-1, -1]]
    assert chosen.duplicates == 1 and chosen.dropped["empty"] == 1
    assert chosen.dropped["longer_than_the_teacher_reads"] == 2
    assert chosen.means["score_per_token"] == pytest.approx(-(0.1 + 0.3 + 0.1 + 0.1) / 4)
    assert choose(toy[0], lists, toy[1], Choice()).duplicates == 0  # which nobody looked at
    low = choose(toy[0], lists, toy[1], Choice(keep=2, min_score_quantile=0.25))
    assert low.which.tolist() == [[0, -1], [0, -1], [-1, -1], [0, -1], [-1, -1]]


@pytest.mark.parametrize("metric, score", [("bleu", sentence_bleu), ("chrf", sentence_chrf)])
def test_minimum_bayes_risk(toy, metric, score):
    """The mean similarity to all hypotheses, by sacreBLEU's own sentence-level scores."""
    texts = ["a b c d e", "h g", "a b c d g", "a b c", "a b c d e"]
    means = [sum(score(text, [other]).score for other in texts) / len(texts) for text in texts]
    expected = sorted({text: -mean for text, mean in zip(texts, means)}.items(), key=lambda p: p[1])
    chosen = choose(
        toy[0], [(0, nbest(*texts))], toy[1], Choice("mbr", metric, Filters.off(), keep=5)
    )
    found = [texts[j] for j in chosen.which[0] if j >= 0]
    assert found == [text for text, _ in expected] and chosen.duplicates == 1


def measures(choice, **changed):
    return values.plain_measures("best", choice.metric)._replace(**changed)


def test_values_of_a_file(toy, tmp_path):
    path = tmp_path / "values"
    path.write_text("1\n2\n3e0\n-1\n0\n0.5\n7\n8\n")
    given = values.Given(str(path))
    choice = Choice("scores", filters=Filters.off())
    chosen = choose(toy[0], LISTS, toy[1], choice, measures=measures(choice, order=given))
    assert chosen.which[:, 0].tolist() == [1, 0, 1, -1, 1]
    given.end()


@pytest.mark.parametrize(
    "content, message",
    [
        ("1\n2\n3\n", "it has 3 lines, and there are more hypotheses"),
        ("1\n" * 9, "it has 9 lines, and there are 8 hypotheses"),
        ("1\n2\nx\n" + "1\n" * 5, "line 3: expected a number, got 'x'"),
        ("1\nnan\n" + "1\n" * 6, "line 2: expected a number, got 'nan'"),
    ],
)
def test_values_of_a_wrong_file(toy, tmp_path, content, message):
    path = tmp_path / "values"
    path.write_text(content)
    given = values.Given(str(path))
    choice = Choice("scores")
    with pytest.raises(FileError, match=message):
        choose(toy[0], LISTS, toy[1], choice, measures=measures(choice, order=given))
        given.end()


def test_a_score_beside_the_teachers(toy):
    """Per token -0.1 and -0.2: the second wins with a weight above 0.1."""
    back = [[-3.0, -2.0], [-1.0, -1.5], [-1.0, -9.0], [-1.0, -1.0]]

    def backward(block):
        return back

    for weight, expected in ((0.0, 0), (0.09, 0), (0.11, 1)):
        choice = Choice(backward_weight=weight)
        how = measures(choice, backward=backward)
        chosen = choose(toy[0], LISTS, toy[1], choice, measures=how)
        assert chosen.which[:, 0].tolist() == [expected, 0, 0, -1, 0]
    assert chosen.means["backward"] == pytest.approx(-(2.0 + 1.0 + 1.0 + 1.0) / 4)
    choice = Choice(min_backward_quantile=0.25)
    chosen = choose(toy[0], LISTS, toy[1], choice, measures=measures(choice, backward=backward))
    assert chosen.which[:, 0].tolist() == [-1, 0, 0, -1, 0]
    assert chosen.dropped["low_backward_score"] == 1


def test_duplicates_of_other_sentences(toy):
    """Of sentences with the same text the first one stays."""
    corpus, student = toy
    source = [corpus.source[i] for i in (0, 0, 1, 1, 2)]
    corpus = corpus._replace(source=source)
    lists = [(i, nbest(text)) for i, text in enumerate(("a", "b", "b", "b", "a"))]
    for kind, expected in (
        (None, [0, 0, 0, 0, 0]),
        ("pairs", [0, 0, 0, -1, 0]),
        ("source", [0, -1, 0, -1, 0]),
        ("target", [0, 0, -1, -1, -1]),
    ):
        chosen = choose(corpus, lists, student, Choice(deduplicate=kind, filters=Filters.off()))
        assert chosen.which[:, 0].tolist() == expected
        assert chosen.dropped["duplicate"] == expected.count(-1)


def test_languages():
    pytest.importorskip("py3langid")
    german = "Das Haus steht am Ende der Stra\u00dfe."
    english = "The house is at the end of the road."
    right = language.Languages(("de_DE", "en"))
    assert not right.wrong((german, english))
    assert right.wrong((english, english)) and right.wrong((german, german))
    assert not right.wrong(("Ja!", "Hallo, Peter!"))  # too short to be told
    assert language.Languages(("nb", "en")).codes == ["no", "en"]
    with pytest.raises(UserError, match="does not know deu_Latn; expected two of "):
        language.Languages(("deu_Latn", "en"))


def test_another_language_is_dropped(toy, monkeypatch):
    monkeypatch.setattr(select, "Languages", lambda codes: Wrong())

    class Wrong:
        def wrong(self, texts):
            return texts == ("h b c d", "b c d")

    chosen = choose(toy[0], LISTS, toy[1], Choice(languages=("aa", "bb")))
    assert chosen.which[:, 0].tolist() == [0, -1, 0, -1, 0]
    assert chosen.dropped["wrong_language"] == 1


class Sized(NamedTuple):
    """A sentence of which only the number of hypotheses matters."""

    hypotheses: int

    def __len__(self):
        return self.hypotheses


def test_kept_values_go_on_where_they_were(tmp_path):
    blocks = [[Sized(2), Sized(1)], [Sized(3)], [Sized(1), Sized(2)]]
    computed = []

    def compute(block):
        computed.append(block)
        start = 10.0 * blocks.index(block)
        return [[start + i for i in range(len(one))] for one in block]

    def read(stop=3):
        kept = values.Kept(compute, tmp_path / "values")
        found = [[list(own) for own in kept(block)] for block in blocks[:stop]]
        kept.close()
        return found

    expected = [[[0, 1], [0]], [[10, 11, 12]], [[20], [20, 21]]]
    assert read(2) == expected[:2] and computed == blocks[:2]
    assert read() == expected and computed == blocks
    assert read() == expected and computed == blocks
    # what a kill leaves: a part of a block, and of a number
    path = tmp_path / "values"
    path.write_bytes(path.read_bytes()[: 8 * 4 + 5])
    assert read() == expected and computed == [*blocks, *blocks[1:]]
    assert path.stat().st_size == 8 * 9


def test_values_that_another_process_writes_are_computed(tmp_path):
    def compute(block):
        return [[1.0] * len(one) for one in block]

    first, second = [values.Kept(compute, tmp_path / "values") for _ in range(2)]
    assert first([Sized(2)]) == second([Sized(2)]) == [[1.0, 1.0]]
    first.close()
    second.close()
    assert (tmp_path / "values").stat().st_size == 16


def test_sources_scored_given_translations():
    """Each pair once; what is too long gets the least."""
    seen = []

    def score(sources, targets):
        seen.extend(zip(sources, targets))
        return [-float(len(source)) for source in sources]

    direction = backward.Direction("back.pt", ("en", "de"), score, (4, 6), -5.0)
    how = backward.Backward(direction)

    def candidates(source, *texts):
        return values.Candidates(nbest(*texts), source, Student(None, str, None), None, None)

    block = [candidates(["x", "y"], "a", "a b"), candidates(["z"], "a b c d", "a b c")]
    assert how(block) == [[-1, -2], [backward.TOO_LONG, -3]]
    assert seen == [(["a"], ["x", "y"]), (["a", "b"], ["x", "y"]), (["a", "b", "c"], ["z"])]
    direction = direction._replace(guess=-1.0)
    with pytest.raises(UserError, match="expected a model that translates from en to de"):
        backward.Backward(direction)(block)


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
    assert found.which[:, 0].tolist() == expected.which[:, 0].tolist()
    assert found.dropped == expected.dropped and found.means == pytest.approx(expected.means)


def test_a_student_of_its_own_encodes_text_by_its_own_model(toy, texts):
    one = TextHypothesis("A B", -0.1, True)
    mine = texts[2]._replace(recode=lambda text: text.replace(" ", "_"))
    assert mine.symbols(one) == ["A_B"] and texts[2].symbols(one) == ["a", "b"]
    assert mine.hypothesis(one) == ("A B", "A_B", [], None)
    assert texts[2].hypothesis(one) == ("A B", "a b", [], None)
    # the source is recoded for such a student alone
    assert mine.sentence("a b").subwords == "A_B" and texts[2].sentence("a b").subwords == "a b"


def test_a_score_that_nobody_gave(toy):
    nan = float("nan")
    lists = [(0, [Hypothesis("a b c", nan, True)]), (1, [Hypothesis("b c d", -2.0, True)])]
    assert choose(toy[0], lists, toy[1], Choice()).means["score_per_token"] == -2
    means = choose(toy[0], lists[:1], toy[1], Choice()).means
    assert means["score_per_token"] is None
