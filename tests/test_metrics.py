"""What the report measures quality by, beside sacreBLEU's own scores."""

import importlib.util
import sys

import pytest
from test_report import Cells, a_report, axes_of

from kd_plugin.decoding import Tokenizer
from kd_plugin.errors import UserError
from kd_plugin.report import check, draw, metrics, page
from kd_plugin.report.score import score

needs_rouge = pytest.mark.skipif(not importlib.util.find_spec("rouge_score"), reason="rouge-score")
needs_jiwer = pytest.mark.skipif(not importlib.util.find_spec("jiwer"), reason="jiwer")
HOW = {"baseline": "plain", "test": "bs", "samples": 100}


@needs_rouge
@pytest.mark.parametrize("test", ("bs", "ar"))
def test_rouge_by_hand(test):
    """the cat are sleep, the cat sleep now: 3 of 4 words, 1 of 3 pairs, 3 in this order."""
    references = ["The cats are sleeping.", "A dog runs."] * 20
    systems = {"plain": ["The cat sleeps now.", ""] * 20, "best": list(references)}
    how = {**HOW, "test": test, "tokenizer": Tokenizer.of("en"), "metrics": ["rouge"]}
    scores, signatures = score(systems, references, **how)
    expected = {"ROUGE-1": 75 / 2, "ROUGE-2": 100 / 3 / 2, "ROUGE-L": 75 / 2}
    assert list(signatures) == list(expected)
    for name, value in expected.items():
        assert scores["plain"][name]["score"] == pytest.approx(value)
        assert abs(scores["plain"][name]["mean"] - value) < scores["plain"][name]["ci"] < 20
        assert scores["best"][name]["score"] == 100 and scores["best"][name]["p"] < 0.05
        assert signatures[name].startswith(f"{name} nrefs:1|bs:1000|seed:12345|tok:ascii|stem:port")
    assert scores["best"]["length_ratio"] == 1


@needs_rouge
def test_letters_that_rouge_leaves_out():
    references, close = ["Schöne Grüße aus Köln"], ["Schäne Graße aus Käln"]
    for asked, expected, doubts in ((None, 100 * 6 / 7, 1), ("13a", 25, 0)):
        tokenizer = Tokenizer.of("de", asked)
        how = {**HOW, "tokenizer": tokenizer, "metrics": ["rouge"]}
        scores, _ = score({"plain": close}, references, **how)
        # of sch ne gr e aus k ln all but "gr"; of the words, "aus" alone
        assert scores["plain"]["ROUGE-1"]["score"] == pytest.approx(expected)
        notes = metrics.doubts(["rouge"], tokenizer, references)
        assert len(notes) == doubts and all("22.2% OF THE LETTERS" in note for note in notes)
    chinese = ["今天天气很好，我们去公园散步。"]
    how = {**HOW, "tokenizer": Tokenizer.of("zh"), "metrics": ["rouge"]}
    scores, signatures = score({"plain": [chinese[0][2:]]}, chinese, **how)
    # of 13 characters that are no punctuation, 11
    assert scores["plain"]["ROUGE-1"]["score"] == pytest.approx(100 * 22 / 24)
    assert "|tok:zh|stem:no|" in signatures["ROUGE-1"]
    assert not metrics.doubts(
        ["rouge"], Tokenizer.of("en"), ["A café."] + ["Tea in the city of light."] * 20
    )


@needs_jiwer
def test_word_error_rate_by_hand():
    """One word is another and one missing, one is too many, one stands where none should."""
    references = ["a b c d", "e  f", ""] * 10
    systems = {"plain": ["a x c", "e f g", "h"] * 10, "best": ["a b c d", "e f", ""] * 10}
    how = {**HOW, "tokenizer": Tokenizer(), "metrics": ["wer", "bleu"]}
    scores, signatures = score(systems, references, **how)
    assert scores["plain"]["WER"]["score"] == pytest.approx(100 * 4 / 6)
    assert scores["best"]["WER"]["score"] == 0 and scores["best"]["WER"]["p"] < 0.05
    assert list(signatures) == ["WER", "BLEU"]
    silent, _ = score({"plain": [""] * 3}, references[:3], **how)
    assert silent["plain"]["WER"]["score"] == 100


def test_a_package_that_is_missing(monkeypatch):
    for module in ("rouge_score", "rouge_score.rouge_scorer", "jiwer"):
        monkeypatch.setitem(sys.modules, module, None)
    check(["bleu", "chrf", "ter"])
    with pytest.raises(UserError) as caught:
        check(["bleu", "rouge", "wer"])
    for part in ("package rouge-score: pip install 'kd_plugin[rouge]'", "'kd_plugin[wer]'"):
        assert part in str(caught.value)


def test_the_first_metric_comes_first_and_all_have_columns():
    report = a_report()
    names = ["WER", "ROUGE-2", "TER"]
    report["pictures"] = []
    report["metrics"] = [
        {
            **{"name": name, "source": name.lower(), "lower_is_better": low},
            **{"at_a_glance": name != "TER", "decimals": 2},
        }
        for name, low in zip(names, (True, False, True))
    ]
    report["signatures"] = {name: name + " x:y" for name in names}
    for system in report["systems"]:
        if system["scores"]:
            found = system["scores"]["TER"]
            system["scores"] = {n: {**found, "score": 10.0 + i} for i, n in enumerate(names)}
    glance, quality = Cells(page.page(report, {})).tables[:2]
    assert glance[0][1:6] == ["WER", "speed-up", "MB", "of the teacher's WER", "ROUGE-2"]
    assert glance[1][1] == "10.00" and glance[1][5] == "11.00"
    assert glance[3] == ["broken", "failed", *["–"] * 6]
    assert quality[0][2:5] == [f"{name}; 95% interval; p" for name in names]
    text = page.markdown(report)
    assert "A lower WER is better. A lower TER is better. Length" in text
    assert "rouge-2: ROUGE-2 x:y" in text
    axes = axes_of(
        lambda *a: draw._quality_speed(report["metrics"][0], "sentences", *a), report["systems"][:2]
    )
    low, high = axes[0].get_ylim()
    assert low > high and "WER" in axes[0].get_ylabel()  # up is better
