"""Teachers that are folders: what they read and write is what those who made them would have."""

import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import foreign
import pytest
import torch
from fairseq.data import Dictionary
from foreign import FAMILIES
from support import in_process, write_sequences
from toy import binarise, dictionary_lines

from kd_plugin.decoding import Around, Converted, CTranslate2Engine, SentencePieceTokens
from kd_plugin.decoding.corpus import SourceLines, TextDataset
from kd_plugin.decoding.tokens import spelled
from kd_plugin.errors import UserError
from kd_plugin.sequences.translators import Translator

ctranslate2 = pytest.importorskip("ctranslate2")
SENTENCES = foreign.sentences(12, 5)
LONGEST = 12  # tokens of a translation


# Models of transformers


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """``made(family)`` is a folder of transformers, and the translator that it becomes."""
    pytest.importorskip("transformers")
    root, found = tmp_path_factory.mktemp("families"), {}

    def make(name):
        if name not in found:
            FAMILIES[name].make(root / name)
            translator = Translator.open(str(root / name), None, around=around_of(name))
            found[name] = translator.converted(root / f"{name} converted")
        return found[name]

    return make


def around_of(name):
    flags = FAMILIES[name].flags
    given = {
        field: (flags[flag],)
        for field, flag in (("before_source", "source_prefix"), ("before_target", "target_prefix"))
        if flag in flags
    }
    return Around(**given)


def translate(translator, reading=None, **generation):
    """The n-best lists of ``SENTENCES``."""
    from fairseq.dataclass.configs import GenerationConfig

    own = translator.reading(None)
    dataset = TextDataset(own, SENTENCES.__getitem__, len(SENTENCES))
    engine = CTranslate2Engine(
        reading or own,
        translator.model.folder,
        GenerationConfig(**{"beam": 1, "max_len_b": LONGEST - 1, **generation}),
        device="cpu",
        compute_type="float32",
        max_positions=translator.positions[1] or 1024,
    )
    (found,) = engine.decode([dataset.collater([dataset[i] for i in range(len(SENTENCES))])])
    return [found[i] for i in range(len(SENTENCES))]


class Raw:
    """Leaves tokens as they are."""

    def __init__(self, reading):
        self.end, self.target_prefix = reading.end, reading.target_prefix
        self.sources = reading.sources

    def hypothesis(self, tokens, score, finished):
        return foreign.Said(list(tokens), score, finished)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_translations_are_those_of_transformers(name, made):
    """Token by token, greedily, in float32; and what a score counts is what it says."""
    translator = made(name)
    expected = foreign.by_transformers(translator.folder, FAMILIES[name], SENTENCES, LONGEST)
    found = [nbest[0] for nbest in translate(translator, Raw(translator.reading(None)))]
    assert [one.tokens for one in found] == [tokens for tokens, _, _ in expected]
    assert [one.score for one in found] == pytest.approx(
        [score for *_, score in expected], abs=1e-4
    )
    assert [one.finished for one in found] == [tokens[-1] == "</s>" for tokens, *_ in expected]
    assert len({tuple(one.tokens) for one in found}) > 3
    texts = [nbest[0].text for nbest in translate(translator)]
    assert texts == [" ".join(text.split()) for _, text, _ in expected]


def test_a_prefix_takes_no_part_in_scores_and_ranks(made):
    """CTranslate2 counts its tokens, which have no probability, as part of the length."""
    translator = made("NLLB")
    for nbest in translate(translator, beam=4, nbest=4):
        assert len(nbest) == 4
        assert [one.score for one in nbest] == sorted((one.score for one in nbest), reverse=True)


def test_pickled_weights_are_read_without_running_them(made, tmp_path):
    good = made("Marian").folder
    pickled = tmp_path / "pickled"
    shutil.copytree(str(good), str(pickled))
    from safetensors.torch import load_file

    weights = load_file(str(pickled / "model.safetensors"))
    (pickled / "model.safetensors").unlink()
    weights["model.shared.weight"] = weights.get("model.shared.weight").clone()
    names = sorted(weights)
    parts = {"pytorch_model-1.bin": names[:9], "pytorch_model-2.bin": names[9:]}
    for part, inside in parts.items():
        torch.save({name: weights[name] for name in inside}, str(pickled / part))
    where = {name: part for part, inside in parts.items() for name in inside}
    index = pickled / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    translator = Translator.open(str(pickled), None).converted(tmp_path / "converted")
    assert translate(translator) == translate(made("Marian"))

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'run'}",)

    (pickled / "pytorch_model-2.bin").write_bytes(pickle.dumps({"model.shared.weight": Evil()}))
    with pytest.raises(UserError, match="pytorch_model-2.bin .*"):
        Translator.open(str(pickled), None).converted(tmp_path / "evil")
    assert not (tmp_path / "run").exists() and not (tmp_path / "evil").exists()
    index.write_text(json.dumps({"weight_map": {"a": "../model.bin"}}))
    with pytest.raises(UserError, match="names ../model.bin: no such file"):
        Translator.open(str(pickled), None)


def changed_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def remote_code(folder):
    changed_json(folder / "config.json", auto_map={"AutoModel": "evil.Model"})
    changed_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]})
    (folder / "evil.py").write_text(f"open({str(folder / 'run')!r}, 'w')")


def language_model(folder):
    changed_json(folder / "config.json", is_encoder_decoder=False, model_type="llama")


@pytest.mark.parametrize(
    "change, told",
    [
        (remote_code, "config.json names code to be run .*tokenizer_config.json names code"),
        (language_model, "of the type 'llama', without encoder and decoder"),
        (lambda folder: (folder / "model.safetensors").unlink(), "expected weights, model.safet"),
        (lambda folder: (folder / "source.spm").write_bytes(b"x"), "cannot open its tokenizer"),
        (lambda folder: (folder / "config.json").write_text("["), "config.json cannot be read"),
    ],
)
def test_folders_of_transformers_that_cannot_be_used(change, told, made, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(str(made("Marian").folder), str(folder))
    change(folder)
    with pytest.raises(UserError, match=told):
        Translator.open(str(folder), None)
    assert not (folder / "run").exists()


def test_models_that_ctranslate2_cannot_convert(made, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(str(made("Marian").folder), str(folder))
    changed_json(folder / "config.json", model_type="led", architectures=["LEDModel"])
    changed_json(folder / "tokenizer_config.json", tokenizer_class="MarianTokenizer")
    with pytest.raises(UserError, match="CTranslate2 cannot convert it .*No conversion is reg"):
        Translator.open(str(folder), None).converted(tmp_path / "converted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


def test_a_t5_that_would_be_converted_wrongly(made, tmp_path, monkeypatch):
    """Beside transformers 5, the scores of one with an output layer of its own would be others."""
    import transformers

    folder = tmp_path / "folder"
    shutil.copytree(str(made("T5").folder), str(folder))
    monkeypatch.setattr(transformers, "__version__", "5.24.0")
    with pytest.raises(UserError, match="T5 .* wrongly beside transformers 5.24.0; install"):
        Translator.open(str(folder), None).converted(tmp_path / "converted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


@pytest.mark.parametrize(
    "name, around, told",
    [
        ("NLLB", Around(), "tokenizer puts eng_Latn around every .*--source-prefix"),
        ("NLLB", Around(("deu_Latin",)), "lacks 'deu_Latin'; it has 'deu_Latn'"),
        (
            "M2M-100",
            Around(("__de__",), None, ("__xyz__",)),
            "--target-prefix: .*'__xyz__'; it has",
        ),
        ("M2M-100", Around(("__de__",), None, ("__en__",) * 63), "fewer than the teacher's 64"),
    ],
)
def test_tokens_around_sentences_that_cannot_be(name, around, told, made):
    translator = made(name)._replace(around=around)
    with pytest.raises(UserError, match=told):
        translator.reading(None)


# A folder of CTranslate2's


@pytest.fixture(scope="module")
def exported(data, teacher, once):
    """The toy teacher for CTranslate2; and the same with tokens as a SentencePiece model of words
    has them."""

    def make(folder: Path) -> Path:
        run = in_process(
            *("fairseq-kd-export", "--path", teacher, "--data", data, "--format", "ctranslate2"),
            *("--output", folder / "own", "--no-verify"),
        )
        assert run.code == 0, run.text
        shutil.copytree(str(folder / "own"), str(folder / "words"))
        for path in (folder / "words").glob("*vocabulary.json"):
            tokens = json.loads(path.read_text())
            path.write_text(json.dumps(["\u2581" + t if len(t) == 3 else t for t in tokens]))
        lines = [
            *dictionary_lines(data, "aa"),
            *dictionary_lines(data, "bb"),
        ]
        foreign.train_words(folder / "words", [line.split()[0] for line in lines])
        return folder

    return once("exported for ctranslate2", make)


@pytest.fixture(scope="module")
def students(corpus, tmp_path_factory):
    """The same data in the pieces of that SentencePiece model, which are not the teacher's."""
    folder = tmp_path_factory.mktemp("students")
    for path in corpus.text.iterdir():
        content = path.read_text().replace(" ", " \u2581").replace("\n", "\n\u2581")
        (folder / path.name).write_text("\u2581" + content[:-1])
    return binarise(folder, folder / "data")


def of_text(exported):
    """A teacher's and a student's way from text to pieces."""
    spm = exported / "words.model"
    return "--teacher-spm", spm, "--bpe", "sentencepiece", "--sentencepiece-model", spm


def lists(output):
    return [json.loads(line) for line in (output / "hypotheses" / "hypotheses.jsonl").open()]


SEARCH = ("--engine", "ctranslate2", "--compute-type", "float32", "--nbest", 3, "--no-filters")


def test_a_folder_translates_as_its_checkpoint_does(data, teacher, exported, students, tmp_path):
    """With the data's symbols, to the byte; and as text, of data in another vocabulary."""
    checkpoint, folder, text = [tmp_path / name for name in "cft"]
    write_sequences(data, teacher, checkpoint, *SEARCH).ok()
    write_sequences(data, exported / "own", folder, *SEARCH).ok()
    expected = lists(checkpoint)
    assert lists(folder) == expected
    for shard in (1, 0):
        write_sequences(
            *(students, exported / "words", text, *SEARCH, *of_text(exported)),
            *("--num-shards", 2, "--shard-id", shard),
        ).ok()
    found = lists(text)
    assert len(found) == len(expected) == 640
    for ours, theirs in zip(found, expected):
        assert [one["text"] for one in ours["nbest"]] == [o["subwords"] for o in theirs["nbest"]]
        scores = [[one["score"] for one in nbest["nbest"]] for nbest in (ours, theirs)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_without_anything_said_the_model_that_was_exported_with_it_cuts_text(exported, tmp_path):
    """And where there is none, nothing is guessed."""
    shutil.copytree(str(exported / "words"), str(tmp_path / "words"))
    shutil.copy(str(exported / "words.model"), str(tmp_path / "words" / "spm.model"))
    with pytest.raises(UserError, match="nothing says how text becomes its tokens: give --teach"):
        Translator.open(str(tmp_path / "words"), no_task())
    changed_json(tmp_path / "words" / "kd_export.json", sentencepiece="../../spm.model")
    translator = Translator.open(str(tmp_path / "words"), no_task())
    assert translator.reading(None).tokens("a01 a02") == ["\u2581a01", "\u2581a02"]
    assert translator.reading(None).tokens(" ") == []  # nothing is its translation
    assert [nbest[0].text for nbest in translate(translator)][:1] != [""]
    flags = Around(("\u2581a01",), ("\u2581a02",), ("\u2581b01",))
    around = Translator.open(str(tmp_path / "words"), no_task(), around=flags)
    assert around.reading(None).tokens("a03") == ["\u2581a01", "\u2581a03", "\u2581a02"]


def no_task():
    """Of data with other symbols."""
    dictionary = Dictionary()
    return SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--engine", "fairseq"], ["is a folder: give --engine ctranslate2, too"]),
        (["--path", "checkpoint", "--source-prefix", "a"], ["--source-prefix: for a teacher that"]),
        (
            [*("--teacher-spm", "a:b:c", "--teacher-tokenizer", "d", "--trust-checkpoint")],
            [
                "give one of them",
                "expected one model, or the source's",
                "--trust-checkpoint is for",
            ],
        ),
        (["--source-prefix", "a01"], ["need --teacher-spm or --teacher-tokenizer"]),
        (["--teacher-spm", "nowhere"], ["--teacher-spm nowhere: no such file"]),
        (["--teacher-tokenizer", "nowhere"], ["--teacher-tokenizer nowhere: no such folder"]),
        (["--path", "damaged"], ["no model of CTranslate2, or damaged"]),
        (["--path", "empty"], ["found no model.bin in it"]),
    ],
)
def test_what_is_refused_is_told_at_once_and_nothing_is_written(
    flags, told, data, teacher, exported, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copy(str(teacher), "checkpoint")
    shutil.copytree(str(exported / "own"), "damaged")
    content = Path("damaged/model.bin").read_bytes()
    Path("damaged/model.bin").write_bytes(content[: len(content) // 2])
    Path("empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    run = write_sequences(
        *(data, exported / "own", "out", "--engine", "ctranslate2", *flags), tool=in_process
    )
    for message in told:
        assert message in run.refusal
    assert sorted(tmp_path.rglob("*")) == before


def test_tokens_that_make_the_longest_sentence_too_long(exported, students, tmp_path):
    """Unless the limit is asked for: then longer sentences are left out, and counted."""
    shutil.copytree(str(exported / "words"), str(tmp_path / "words"))
    changed_json(tmp_path / "words" / "kd_export.json", max_source_positions=21)
    prefix = ",".join(["\u2581a01"] * 5)
    flags = (*of_text(exported), "--source-prefix", prefix, "--beam", 1, "--no-filters")
    flags += ("--engine", "ctranslate2")
    where = students, tmp_path / "words", tmp_path / "out"
    run = write_sequences(*where, *flags, tool=in_process)
    assert "1 sentences have more than the 21 tokens that the teacher reads" in run.refusal
    assert "--max-source-positions 21 leaves out" in run.refusal
    assert not list((tmp_path / "out").rglob("*.json*"))
    run = write_sequences(*where, *flags, "--max-source-positions", 21).ok()
    assert "1 longer than the teacher reads" in run.text


def test_tokens_of_another_model_are_told(exported, tmp_path, caplog):
    foreign.train_words(tmp_path / "other", [f"x{i:02}" for i in range(20)])
    for model, warnings in ((exported / "words.model", 0), (tmp_path / "other.model", 1)):
        translator = Translator.open(str(exported / "words"), None, spm=[str(model)])
        translator.reading(None).warn_of_unknown(["a01 a02", "a03"])
        assert caplog.text.count("OF THE SOURCE ARE UNKNOWN to the teacher (") == warnings


def test_a_model_is_known_by_its_file(exported):
    """Positions and vocabularies, without reading weights."""
    model = Converted.open(exported / "own")
    record = json.loads((exported / "own" / "kd_export.json").read_text())
    ctranslate2.Translator(str(exported / "own"))  # which reads it all
    assert model.start == model.end == "</s>" and not model.ends_source
    assert {"a00", "</s>"} <= model.source and {"b00", "</s>"} <= model.target
    assert min(model.positions) >= min(record["max_source_positions"], 1024)


def test_lines_are_read_as_they_are(tmp_path):
    for content in (b"a b\nc\r\n\n\xe2\x82\xac\xc2\x85d\n", b"x\n\ny"):
        (tmp_path / "text").write_bytes(content)
        lines = SourceLines(str(tmp_path / "text"))
        expected = [line.rstrip("\r") for line in content.decode().split("\n")]
        count = content.count(b"\n") + (content[-1:] != b"\n")
        assert [lines[i] for i in range(count)] == expected[:count] and len(lines) == count


def test_what_is_unknown_stays_visible(tmp_path):
    assert spelled(["a", "<unk>", "b"], "<unk>", " ".join) == "a <unk> b"
    pieces = SentencePieceTokens([foreign.train_sentencepiece(tmp_path / "spm", 1, 80)], "--spm")
    assert pieces.decode([*pieces.encode("Ein Mann"), "<unk>"]).split() == ["Ein", "Mann", "<unk>"]
