"""Symbols and the text that they spell, where both are not the same."""

import io
from argparse import Namespace
from types import SimpleNamespace

import pytest
import sentencepiece
from fairseq.data import Dictionary

from kd_plugin.decoding import databin, text_functions
from kd_plugin.decoding.text import added, spell, split_tags


@pytest.fixture(scope="module")
def model():
    """SentencePiece that spells what it does not know in bytes."""
    lines = ["Der Mann geht nach Hause.", "Ein Hund steht auf der Bank!"] * 50
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        **{"sentence_iterator": iter(lines), "model_writer": content, "minloglevel": 2},
        **{"vocab_size": 300, "byte_fallback": True, "model_type": "bpe"},
    )
    return sentencepiece.SentencePieceProcessor(model_proto=content.getvalue())


def test_pieces_are_spelled_as_sentencepiece_spells_them(model):
    for text in ("Der Hund auch 5 €.", "x😀y  z", "<0x42> literally", "a\u2581b", "", " Bank "):
        pieces = model.encode(text, out_type=str)
        assert spell(pieces) == model.decode_pieces(pieces)
    for broken in (
        ["<0xE2>", "<0x82>", "▁", "a", "<0xFF>"],  # no characters
        ["<0xED>", "<0xA0>", "<0x80>", "<0x42>"],  # half of a surrogate pair
        ["D", "<0xE2>", "<0x96>", "<0x81>", "."],  # a character that marks words elsewhere
    ):
        expected = model.decode_pieces(["▁", *broken])
        assert spell(["▁", *broken]) == expected.strip()


def dictionary_of(*symbols: str) -> Dictionary:
    dictionary = Dictionary()
    for symbol in symbols:
        dictionary.add_symbol(symbol)
    return dictionary


def functions(post_process=None, bpe=None, task_adds=(), symbols=(), overwrite=()):
    data = SimpleNamespace(source=dictionary_of(*symbols), target=dictionary_of(*symbols))
    theirs = dictionary_of(*symbols)
    for dictionary in (data.source, data.target, theirs):
        for symbol in overwrite:
            dictionary.add_symbol(symbol, overwrite=True)
    for symbol in task_adds:
        theirs.add_symbol(symbol)
    task = SimpleNamespace(
        **{"source_dictionary": theirs, "target_dictionary": theirs},
        **{"build_bpe": lambda _: bpe, "build_tokenizer": lambda _: None},
    )
    common_eval = Namespace(post_process=post_process)
    cfg = SimpleNamespace(bpe=bpe and Namespace(_name=bpe.name), tokenizer=None)
    cfg.common_eval = common_eval
    return text_functions(task, cfg, data)


class Recorded:
    """A BPE that, like GPT-2's, knows no special symbols."""

    name = "gpt2"

    @staticmethod
    def decode(line):
        return " ".join(str(int(word)) for word in line.split())


@pytest.mark.parametrize(
    "how, subwords, text",
    [
        ({}, "<s> a <pad> b </s> c", "a b c"),
        ({}, "a <unk> b", "a <unk> b"),
        ({"overwrite": ["</s>"]}, "a </s> b", "a </s> b"),  # a word of this text
        ({"task_adds": ["[de_DE]", "<mask>"]}, "a <mask> b </s> [de_DE]", "a b"),
        ({"symbols": ["<mask>"]}, "a <mask> b", "a <mask> b"),  # a word of the data
        ({"post_process": "sentencepiece"}, "▁5 ▁ <0xE2> <0x82> <0xAC> auch", "5 €auch"),
        ({"post_process": "sentencepiece"}, "deu_Latn eng_Latn ▁Der ▁Mann", "Der Mann"),
        ({"post_process": "sentencepiece"}, "▁Der </s> ▁Mann </s> [de_DE]", "Der Mann"),
        ({"post_process": "@@ "}, ">>deu<< Ein Ha@@ us", "Ein Haus"),
        ({"post_process": "sentencepiece"}, "▁a <0x0A> b <0x0D> c", "a b c"),
        ({"bpe": Recorded}, "<s> 1 <pad> 2 </s>", "1 2"),
    ],
)
def test_what_is_no_text_is_not_in_it(how, subwords, text):
    assert functions(**how)[0](subwords) == text


def test_fairseqs_sentencepiece_decodes_bytes_too(model):
    bpe = SimpleNamespace(name="sentencepiece", decode=None)
    pieces = " ".join(model.encode("Der Hund, 5 €", out_type=str))
    for post_process in (None, "sentencepiece"):  # given twice, fairseq joins the words
        assert functions(post_process, bpe)[0](pieces) == "Der Hund, 5 €"


@pytest.mark.parametrize(
    "symbols, split",
    [
        ("deu_Latn eng_Latn ▁Der", (2, 3)),
        ("__src__hi__ __tgt__en__ x __de__", (2, 3)),
        ("<2de> x [de_DE]", (1, 2)),
        (">>cmn_Hans<< x", (1, 2)),
        ("eng_Latn", (1, 1)),
        ("", (0, 0)),
        # words of a text
        ("▁deu_Latn __init__ [sic] <br> de_DE", (0, 5)),
        ("x deu_Latn y", (0, 3)),
    ],
)
def test_tags_of_languages(symbols, split):
    words = symbols.split()
    first, last = split
    assert split_tags(words) == (words[:first], words[first:last], words[last:])


def test_what_a_task_adds_comes_behind_the_datas_symbols():
    data = dictionary_of("a", "b")
    assert added(dictionary_of("a", "b", "[de_DE]"), data) == [6]
    assert added(data, data) == []
    assert added(dictionary_of("b", "a", "c"), data) == []  # another dictionary altogether


def test_sentences_keep_the_special_symbols_within_them():
    dictionary = dictionary_of("a", "b")
    for tokens in ([4, 1, 5, 2], [2, 4, 2, 5, 2], [1, 2], [2], [0, 4, 3, 2]):
        line = databin.decode(dictionary, tokens)
        assert databin.encode(dictionary, line).tolist() == tokens
    assert databin.decode(dictionary, [4, 3, 2]) == "a <unk>"
    assert databin.decode(dictionary, [4, 3, 2], escape_unk=True) == "a <<unk>>"
