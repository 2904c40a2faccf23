"""Data-bins and texts that are decoded, their batches, and what decodes them."""

import os
import shutil
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fairseq.data import Dictionary, LanguagePairDataset
from fairseq.data.indexed_dataset import make_builder
from letters import LINES, task_of, write_letters
from omegaconf import OmegaConf
from support import tree
from torch.utils.data import DataLoader

from kd_plugin.checkpoints import Role
from kd_plugin.decoding import (
    Corpus,
    batch_limits,
    databin,
    describe,
    describe_text,
    engines,
    models,
    plan,
)
from kd_plugin.errors import UserError
from kd_plugin.files import FileError


@pytest.fixture
def data(tmp_path) -> databin.DataBin:
    return write_letters(tmp_path / "data")


# text and data


def test_symbols_with_other_whitespace_stay_whole():
    dictionary = Dictionary()
    for symbol in ("a\u00a0b", "\u2028", "c"):
        dictionary.add_symbol(symbol)
    line = "a\u00a0b c \u2028 c"
    tokens = databin.encode(dictionary, line)
    assert tokens.tolist() == [4, 6, 5, 6, dictionary.eos()] and tokens.dtype == torch.int32
    assert databin.decode(dictionary, tokens.tolist()) == line
    assert databin.encode(dictionary, "").tolist() == [dictionary.eos()]
    assert databin.encode(dictionary, "zz").tolist() == [dictionary.unk(), dictionary.eos()]


def test_a_model_of_subwords_counts_by_its_content(tmp_path):
    def described(path, content):
        path.write_bytes(content)
        bpe = Namespace(_name="sentencepiece", sentencepiece_model=str(path), enable_sampling=False)
        common_eval = Namespace(post_process=None)
        return describe_text(Cfg(bpe=bpe, tokenizer=None, common_eval=common_eval))

    class Cfg(dict):
        __getattr__ = dict.__getitem__

    one = described(tmp_path / "one.model", b"1")
    assert (
        one == described(tmp_path / "moved.model", b"1") != described(tmp_path / "one.model", b"2")
    )
    assert one["bpe"]["_name"] == "sentencepiece" and one["bpe"]["enable_sampling"] is False


def test_a_text_that_cannot_be_read_leaves_nothing(data, tmp_path):
    text = tmp_path / "text"
    for content, word in (
        (b"a b\n\xff\n", "not UTF-8"),
        (b"", "expected at least one line, found none"),
    ):
        text.write_bytes(content)
        with pytest.raises(FileError, match=word):
            Corpus.of_text(
                task_of(data),
                data,
                str(text),
                to_subwords=str,
                prefix=tmp_path / "kept" / "source-1",
            )
        assert not list((tmp_path / "kept").iterdir())
    text.write_bytes(b"a b\n")
    corpus = Corpus.of_text(
        task_of(data), data, str(text), to_subwords=str, prefix=tmp_path / "kept" / "source-1"
    )
    assert len(corpus.source) == 1
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "source-1.bin",
        "source-1.idx",
    ]


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_a_kept_text_that_is_cut_short(data, tmp_path, ending):
    """It is refused, or, where a file is missing, made anew."""
    text, prefix = tmp_path / "text", tmp_path / "source-1"
    text.write_text("a b\nc d e\n")

    def read():
        return Corpus.of_text(task_of(data), data, str(text), to_subwords=str, prefix=prefix)

    assert len(read().source) == 2
    path = prefix.with_suffix(ending)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FileError) as error:
            read()
        message = str(error.value)
        assert message.startswith(f"{prefix} cannot be read (") and "cut short" in message
        assert message.endswith("Delete both files and run the same command again.")
    path.unlink()
    assert len(read().source) == 2 and path.read_bytes() == whole


@pytest.mark.parametrize("vocabulary", [100, 70000])
@pytest.mark.parametrize("lengths", [[], [1], [3, 1, 200, 2]])
def test_a_side_is_written_as_fairseq_writes_it(tmp_path, vocabulary, lengths):
    sentences = [torch.randint(vocabulary, (length,), dtype=torch.int32) for length in lengths]
    theirs = make_builder(str(tmp_path / "theirs.bin"), impl="mmap", vocab_size=vocabulary)
    for sentence in sentences:
        theirs.add_item(sentence)
    theirs.finalize(str(tmp_path / "theirs.idx"))
    ours = databin.Writer(tmp_path / "ours", vocabulary)
    for sentence in sentences:
        ours.add(sentence)
    ours.close()
    for ending in (".bin", ".idx"):
        written = (tmp_path / f"ours{ending}").read_bytes()
        assert written == (tmp_path / f"theirs{ending}").read_bytes()
    assert (ours.sentences, ours.tokens) == (len(lengths), sum(lengths))


@pytest.mark.parametrize("langs", [("c++", "x[ab]"), ("a*", "b?"), ("(a|b)", ".c")])
def test_names_are_no_patterns(tmp_path, langs):
    """Neither the folder's nor the languages'."""
    data = write_letters(tmp_path / "run[1]*(2)", *langs)
    sides = ["valid.{}-{}.{}.".format(*langs, lang) for lang in langs]
    expected = [side + end for side in sides for end in ("bin", "idx")]
    assert set(data.splits()) == {"train", "valid"}
    assert sorted(path.name for path in data.splits()["valid"]) == sorted(expected)
    dictionaries = [path.name for path in data.dictionary_files()]
    assert sorted(data.carried_files()) == sorted([*dictionaries, *expected])
    before = describe(data, "valid", None, Namespace())
    assert set(before["files"]) == {*dictionaries, *expected}
    (data.folder / expected[0]).write_bytes(b"another corpus")
    assert describe(data, "valid", None, Namespace()) != before


@pytest.mark.parametrize("impl", ["lazy", "raw"])
def test_older_formats(data, tmp_path, impl):
    """They are read whole: through a file that is left open, workers would get other sentences."""
    older = write_letters(tmp_path / impl, impl=impl)
    expected = [data.side("train", "aa")[i].tolist() for i in range(len(LINES))]
    for lang in older.langs:
        side = older.side("train", lang)
        assert [side[i].tolist() for i in range(len(side))] == expected
        assert getattr(side, "data_file", None) is None
    corpus = Corpus.of_subset(task_of(older), older, "train")
    assert [corpus.references[i].tolist() for i in range(5)] == expected
    assert getattr(corpus.dataset.src, "data_file", None) is None
    loader = DataLoader(corpus.dataset, batch_size=1, collate_fn=list, num_workers=2)
    assert [sample["source"].tolist() for (sample,) in loader] == expected
    # beside a training set in the format of today
    carried, whole = tmp_path / "carried", tmp_path / "whole"
    for bins, folder in ((older, carried), (data, whole)):
        folder.mkdir()
        databin.carry(bins, folder)
    assert tree(carried) == tree(whole)


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_an_older_format_that_is_cut_short(tmp_path, ending):
    data = write_letters(tmp_path / "data", impl="lazy")
    path = tmp_path / "data" / f"train.aa-bb.bb{ending}"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FileError, match="cut short. Binarise it again"):
            data.side("train", "bb")


@pytest.mark.parametrize("forth", [False, True])
def test_what_is_carried_names_the_direction_that_was_asked(tmp_path, forth):
    """fairseq takes the direction from the first file that it sees, in no order."""
    folder, to = tmp_path / "data", tmp_path / "to"
    data = write_letters(folder, back=True)
    if forth:
        write_letters(folder)
    read = data.carried_files()["valid.aa-bb.bb.idx"].name
    assert read == ("valid.aa-bb.bb.idx" if forth else "valid.bb-aa.bb.idx")
    (folder / "valid.align.bb-aa.bin").touch()  # of no use the other way round
    to.mkdir()
    databin.carry(data, to)
    sides = {f"valid.aa-bb.{lang}{end}" for lang in ("aa", "bb") for end in (".bin", ".idx")}
    assert set(os.listdir(str(to))) == {"dict.aa.txt", "dict.bb.txt", *sides}
    assert databin.infer_languages(str(to)) == ("aa", "bb")


def test_a_split_is_read_as_fairseq_does(tmp_path):
    """Both sides by one name: those of the other direction may be other sentences."""
    data = write_letters(tmp_path / "data", back=True)
    for end in (".bin", ".idx"):
        name = str(data.folder / "train.{}.aa") + end
        shutil.copy(name.format("bb-aa"), name.format("aa-bb"))
    assert data.side("train", "aa") is not None and data.side("train", "bb") is None


def test_a_direction_that_is_not_clear(tmp_path):
    """fairseq takes one of them, and one language that was given for nothing."""
    folder = tmp_path / "data"

    def languages(source=None):
        cfg = OmegaConf.structured(task_of(write_letters(folder, back=True)).cfg)
        cfg._name, cfg.source_lang, cfg.target_lang = "translation", source, None
        models.set_up_task(Namespace(task=cfg))
        return cfg.source_lang, cfg.target_lang

    assert languages() == languages("bb") == ("bb", "aa")
    with pytest.raises(FileError, match="give both; the files of .* say bb-aa"):
        languages("aa")
    write_letters(folder)
    with pytest.raises(FileError, match="holds aa-bb and bb-aa: .*--source-lang and --target-lang"):
        languages()


def test_train1_is_not_left_out_without_a_word(data, caplog):
    Corpus.of_subset(task_of(data), data, "train")
    assert "would read" not in caplog.text
    for path in data.folder.glob("train.*"):
        shutil.copy(str(path), str(path).replace("train.", "train1."))
    Corpus.of_subset(task_of(data), data, "train1")
    assert "would read" not in caplog.text
    assert len(Corpus.of_subset(task_of(data), data, "train").source) == 5
    assert "would read train1 with it" in caplog.text and "--gen-subset train1" in caplog.text


@pytest.mark.parametrize("unknown, said", [(1, False), (2, True)])
def test_many_unknown_symbols_are_said(data, tmp_path, caplog, unknown, said):
    """5 of 100 are none too many; it is said before anything is decoded."""
    text = tmp_path / "text"
    text.write_text(" ".join(["a"] * (24 - unknown) + ["raw"] * unknown) + "\n")
    Corpus.of_text(task_of(data), data, str(text), to_subwords=str, prefix=tmp_path / "source-1")
    assert (f"OF THE SYMBOLS OF {text} ARE UNKNOWN" in caplog.text) == said


def test_a_teacher_of_the_other_direction_is_said(data, tmp_path, caplog):
    path = tmp_path / "teacher.pt"
    symbols = {"source_symbols": data.source.symbols, "target_symbols": data.target.symbols}
    weights = {side + ".embed_tokens.weight": torch.zeros(12, 2) for side in ("encoder", "decoder")}
    for langs, said in (
        (("aa", "bb"), ""),
        (("c++", "x[a|b](*?)"), "from c++ to x[a|b](*?), and translates from aa to bb here"),
        (("bb", "aa"), "FROM bb TO aa, not from aa to bb"),
    ):
        caplog.clear()
        task = {"source_lang": langs[0], "target_lang": langs[1]}
        cfg = {"task": task, "model": {"arch": "transformer"}}
        torch.save({"cfg": cfg, "model": weights, "task_state": symbols}, str(path))
        models.open_checkpoints([str(path)], task_of(data), Role("teacher"))
        assert said in caplog.text and bool(caplog.text) == bool(said)


@pytest.mark.parametrize("subset", ["train", "lonely"])
def test_batches_of_sentences_that_fit(data, monkeypatch, subset):
    """Each of 4 symbols; none of them is looked at by itself."""
    for path in data.folder.glob("train.aa-bb.aa.*"):
        shutil.copy(str(path), str(path).replace("train", "lonely"))
    task = task_of(data)
    corpus = Corpus.of_subset(task, data, subset)
    monkeypatch.setattr(LanguagePairDataset, "size", None)
    found = plan(task, corpus.dataset, [(4, 4)], max_tokens=8)
    assert sorted(i for batch in found for i in batch) == [0, 1, 2, 3, 4]
    assert [len(batch) for batch in found] == [2, 2, 1]
    assert plan(task_of(data), corpus.dataset, [(3, 4)], max_tokens=3) == []
    with pytest.raises(FileError, match="sentence has 4 tokens, more than --max-tokens 3"):
        plan(task, corpus.dataset, [(4, 4)], max_tokens=3)


@pytest.mark.parametrize(
    "given, expected",
    [((None, None), (12000, None)), ((100, None), (100, None)), ((None, 5), (None, 5))],
)
def test_batches_without_a_limit_have_fairseqs(given, expected):
    dataset = Namespace(max_tokens=given[0], batch_size=given[1])
    assert batch_limits(Namespace(dataset=dataset)) == expected


# CTranslate2


@pytest.mark.parametrize("torchs, cores, expected", [(1, 8, 1), (3, 8, 3), (8, 2, 2)])
def test_as_many_threads_as_torch_but_no_more_than_cores(monkeypatch, torchs, cores, expected):
    monkeypatch.setattr(torch, "get_num_threads", lambda: torchs)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert engines.threads() == expected
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert engines.threads() == expected
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert engines.threads() == 1


@pytest.fixture
def opened(monkeypatch):
    """How CTranslate2 is opened; the last time."""
    found = {}

    def translator(path, **how):
        found.update(how)
        return SimpleNamespace()

    monkeypatch.setitem(sys.modules, "ctranslate2", SimpleNamespace(Translator=translator))
    return found


def engine_on(device):
    return engines.CTranslate2Engine(
        None, Path("model"), None, device=device, compute_type="int8", max_positions=9
    )


@pytest.mark.parametrize("affinity", [True, False])
def test_ctranslate2_takes_the_threads_that_fairseq_would(opened, monkeypatch, affinity):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    if not affinity:
        monkeypatch.delattr(os, "sched_getaffinity")
    engine = engine_on("cpu")
    assert opened["inter_threads"] == engine.workers == 2 and opened["intra_threads"] == 1
    engine_on("cuda")
    assert opened["inter_threads"] == 1


def test_a_model_that_finds_nothing_probable_is_no_bug_of_ours():
    error = engines._no_translation([5, 3], "so it is")
    assert isinstance(error, UserError) and "ids [3, 5] (so it is)" in str(error)
