"""What decodes, and what it decodes, where it refuses."""

from argparse import Namespace
from collections import namedtuple

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.dataclass.configs import GenerationConfig
from fairseq.tasks.translation import TranslationTask

from kd_plugin.decoding import (
    Corpus,
    CTranslate2Engine,
    DataBin,
    FairseqEngine,
    SymbolReading,
    databin,
    open_translator,
    placement,
)
from kd_plugin.errors import UserError
from kd_plugin.files import FileError

ONE_SENTENCE = {"id": torch.tensor([7]), "net_input": {"src_tokens": torch.tensor([[4, 2]])}}


@pytest.fixture
def task():
    task = TranslationTask.__new__(TranslationTask)  # without data
    task.src_dict = task.tgt_dict = Dictionary()
    return task


@pytest.mark.parametrize(
    "flags, told",
    [
        ({"sampling": True, "diverse_beam_groups": 2}, "mutually exclusive"),
        ({"sampling_topk": 5}, "--sampling-topk requires --sampling"),
        ({"temperature": 0.0}, "--temperature must be greater than 0"),
    ],
)
def test_flags_that_fairseqs_generator_refuses_are_the_users_mistake(flags, told, task):
    class Model(torch.nn.Linear):
        def max_decoder_positions(self):
            return 9

    with pytest.raises(UserError, match="refuses the flags of the search: .*" + told):
        FairseqEngine(task, [Model(1, 1)], GenerationConfig(**flags), 1)


def engine_of(kind, **attributes):
    engine = kind.__new__(kind)
    for name, value in attributes.items():
        setattr(engine, name, value)
    return engine


def test_flags_that_are_refused_while_decoding(task):
    generator = namedtuple("Generator", "max_len")(9)

    def step(*_):
        raise ValueError("DiverseBeamSearch requires --beam to be divisible by the groups")

    task.inference_step = step
    engine = engine_of(
        FairseqEngine,
        **{"task": task, "models": [], "generation": GenerationConfig(), "seed": 1},
        **{"cuda": False, "generator": generator, "strip": set()},
    )
    with pytest.raises(UserError, match="fairseq's generator refuses.*to be divisible"):
        list(engine.decode([ONE_SENTENCE]))


def test_flags_that_ctranslate2_refuses_are_the_users_mistake(task):
    class Translator:
        def translate_batch(self, *_, **options):
            raise ValueError("min_decoding_length is greater than max_decoding_length")

    task.src_dict.add_symbol("a")
    engine = engine_of(
        CTranslate2Engine,
        **{"reading": SymbolReading(task), "generation": GenerationConfig()},
        **{"max_positions": 9, "workers": 1, "mapped": False},
        **{"split": {}, "translator": Translator()},
    )
    with pytest.raises(UserError, match="CTranslate2 refuses.*min_decoding_length is greater"):
        list(engine.decode([ONE_SENTENCE]))


@pytest.mark.parametrize(
    "content, words",
    [(b"", "it is empty"), (b"a\tb\n" + b"a " * 1000 + b"\tb\n", "1001 source symbols")],
)
def test_a_vocabulary_map_that_ctranslate2_would_crash_over(content, words, tmp_path):
    (tmp_path / "vmap.txt").write_bytes(content)
    with pytest.raises(FileError, match=f"vmap.txt is no vocabulary map, or damaged .*{words}"):
        open_translator(tmp_path, "cpu", 0, "default")


def test_what_is_no_translation_is_stripped(task):
    """mBART's generator ends with the language, behind the end of the sentence."""
    dictionary = task.tgt_dict
    data = Namespace(target=Dictionary())
    for symbol in ("a", "b"):
        dictionary.add_symbol(symbol)
        data.target.add_symbol(symbol)
    german, english = dictionary.add_symbol("[de_DE]"), dictionary.add_symbol("[en_XX]")
    generator = namedtuple("Generator", "eos symbols_to_strip_from_output")(english, {english})
    task.build_generator = lambda *_, **__: generator
    engine = FairseqEngine(task, [torch.nn.Linear(1, 1)], GenerationConfig(), 1, data)
    eos = dictionary.eos()
    for tokens in ([4, 5, eos, english], [german, 4, 5, eos, english], [0, 4, 5, eos]):
        found = engine._read({"tokens": torch.tensor(tokens), "score": -1.0}, 9)
        assert found == ("a b", -1.0, True)


def test_ctranslate2_gets_and_gives_what_fairseq_does(task):
    class Translator:
        def translate_batch(self, sources, **_):
            self.sources = sources
            found = namedtuple("Result", "hypotheses scores")
            lists = [found([source and [*source, "</s>"]], [-1.0]) for source in sources]
            return [Namespace(result=lambda one=one: one) for one in lists]

    task.src_dict.add_symbol("a")
    engine = engine_of(
        CTranslate2Engine,
        **{"reading": SymbolReading(task), "generation": GenerationConfig()},
        **{"max_positions": 9, "workers": 1, "mapped": False},
        **{"split": {}, "translator": Translator()},
    )
    # fairseq's encoder sees an end within a sentence, and no pads
    tokens = torch.tensor([[1, 4, 2, 4, 2], [1, 4, 1, 4, 2], [1, 1, 1, 1, 2]])
    sample = {"id": torch.tensor([5, 6, 7]), "net_input": {"src_tokens": tokens}}
    (found,) = engine.decode([sample])
    assert engine.translator.sources == [["a", "</s>", "a"], ["a", "a"], []]
    # nothing is a whole translation of nothing
    assert found[6] == [("a a", -1.0, True)] and found[7] == [("", -1.0, True)]


def test_sides_of_different_lengths_are_the_users_mistake(task, tmp_path):
    """fairseq has an assertion for it."""
    sentence = torch.tensor([4, 2], dtype=torch.int32)
    for lang, count in (("aa", 3), ("bb", 2)):
        task.src_dict.save(str(tmp_path / f"dict.{lang}.txt"))
        writer = databin.Writer(tmp_path / f"test.aa-bb.{lang}", 8)
        for _ in range(count):
            writer.add(sentence)
        writer.close()
    with pytest.raises(UserError, match="test has 3 sentences in aa and 2 in bb"):
        Corpus.of_subset(task, DataBin(str(tmp_path), "aa", "bb"), "test")


def test_a_gpu_that_is_not_there_is_the_users_mistake(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cfg = Namespace(common=Namespace(cpu=False, fp16=False, bf16=False))
    with pytest.raises(UserError, match="--device-id 2: expected less than 2"):
        placement(cfg, 2)
