"""The words that BLEU counts, by the target language."""

import pytest
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers import tokenizer_ja_mecab

from kd_plugin.decoding import Tokenizer
from kd_plugin.errors import UserError
from kd_plugin.report.score import score
from kd_plugin.sequences.values import pairwise

CHINESE = ["今天天气很好，我们一起去公园散步吧。", "他昨天买了一本新书，但是还没有看完。"]
SEGMENTED = ["今天 天气 很 好 ， 我们 一起 去 公园 散步 吧 。"]
THAI = ["วันนี้อากาศดีมากเราไปเดินเล่นกันเถอะ"]
TIBETAN = ["དེ་རིང་གནམ་གཤིས་ཡག་པོ་འདུག"]


@pytest.mark.parametrize(
    "lang, name",
    [
        *((code, "zh") for code in ("zh", "zho_Hans", "zh_CN", "zh-Hant", "cmn", "[zh_CN]")),
        *((code, "13a") for code in ("de", "deu_Latn", "zha", "zho_Latn", "en", "c++", "")),
    ],
)
def test_the_tokenizer_is_the_languages(lang, name):
    found = Tokenizer.of(lang)
    assert found == Tokenizer(name, name == "zh")
    # sacreBLEU's own rule, where it is told the language
    own = BLEU(trg_lang="zh" if name == "zh" else "de")
    assert found.metric().tokenizer_signature == own.tokenizer_signature == name
    assert Tokenizer.of(lang, "char").name == "char"


@pytest.mark.parametrize("lang", ["ja", "jpn_Jpan", "ja_XX"])
def test_a_tokenizer_that_is_not_installed_is_replaced_and_that_is_said(lang, monkeypatch):
    monkeypatch.setattr(tokenizer_ja_mecab, "MeCab", None)
    found = Tokenizer.of(lang)
    assert found.name == "char" and found.asian
    (note,) = found.notes(["天気がいい"])
    assert f"BLEU of {lang} COUNTS CHARACTERS" in note and "pip install 'sacrebleu[ja]'" in note
    with pytest.raises(UserError, match="--bleu-tokenize ja-mecab: sacreBLEU cannot use it here"):
        Tokenizer.of(lang, "ja-mecab")  # what was asked for is not replaced


def test_a_tokenizer_that_sacrebleu_does_not_know():
    with pytest.raises(UserError, match="--bleu-tokenize no: expected one of .*13a"):
        Tokenizer.of("de", "no")


@pytest.mark.parametrize(
    "name, references, said",
    [
        ("13a", CHINESE, True),
        ("none", CHINESE, True),
        ("zh", CHINESE, False),
        ("char", CHINESE, False),
        ("13a", SEGMENTED, False),
        ("13a", THAI, True),
        ("13a", TIBETAN, True),
        ("char", THAI, False),
        ("13a", ["Das Wetter ist heute sehr schön.", "오늘은 날씨가 아주 좋습니다."], False),
        ("13a", ["", "a"], False),
        ("13a", [], False),
    ],
)
def test_words_that_cannot_be_told_apart(name, references, said):
    notes = Tokenizer(name).notes(references)
    assert [f"tokenizer {name} does not split" in note for note in notes] == [True] * said


def test_good_chinese_is_not_worth_nothing():
    nearly = [line[:-1] for line in CHINESE]
    for name, least, most in (("13a", 0, 1), (Tokenizer.of("zh").name, 90, 95)):
        tokenizer = Tokenizer(name, name == "zh")
        how = {"baseline": "student", "test": "bs", "samples": 10, "tokenizer": tokenizer}
        scores, signatures = score({"student": nearly}, CHINESE, **how)
        assert least <= scores["student"]["BLEU"]["score"] <= most
        assert f"|tok:{name}|" in signatures["BLEU"]
        # of two sentences with 36 characters, 2 are missing; whole, both are wrong
        ter = scores["student"]["TER"]["score"]
        assert ter == pytest.approx(100 if name == "13a" else 100 * 2 / 36)


def test_of_chinese_hypotheses_the_closest_is_found():
    worse, better = CHINESE[0][:9], CHINESE[0][:-1]
    lists = [[worse, better]], [[CHINESE[0]]]
    assert pairwise("bleu")(*lists) == [[[0], [0]]]
    ((far, near),) = pairwise("bleu", Tokenizer.of("zho_Hans"))(*lists)
    assert far[0] < 50 < near[0]
