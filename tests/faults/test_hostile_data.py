"""A stranger's caches, dictionaries and text."""

import html.parser
import json
import multiprocessing
import os
import shutil
from types import SimpleNamespace

import pytest
import sentencepiece
from fairseq.data import Dictionary
from folders import (
    HEADER,
    begin_cache,
    begin_hypotheses,
    begun_cache,
    begun_hypotheses,
    finish_cache,
)
from support import LANGUAGES, distil, fairseq, transformer, write_cache, write_sequences
from toy import binarise, train_teacher

from kd_plugin.cache import CachedSubset, CacheError, layout
from kd_plugin.decoding import text_functions
from kd_plugin.files import FileError

# folders that were begun


@pytest.mark.parametrize(
    "begin, go_on, file",
    [
        (begun_cache, begin_cache, "train/partial/shard-0-of-1/symbols.bin"),
        (begun_cache, begin_cache, "train/partial/shard-0-of-1/lock"),
        (begun_hypotheses, begin_hypotheses, "shards/shard-0-of-1/hypotheses.jsonl"),
    ],
    ids=["array", "lock", "lines"],
)
def test_nothing_is_written_through_a_link(begin, go_on, file, tmp_path, count):
    precious, folder = tmp_path / "precious", tmp_path / "folder"
    precious.write_text("a diary\n" * 100)
    folder.mkdir()
    begin(folder)
    (folder / file).unlink()
    (folder / file).symlink_to(precious)
    with pytest.raises(FileError, match=f"{folder / file} is a link"):
        go_on(folder)
    assert precious.read_text() == "a diary\n" * 100
    count("links planted in caches and n-best lists")


# caches


@pytest.fixture()
def cache(tmp_path):
    finish_cache(tmp_path / "cache")
    return tmp_path / "cache"


def opened(cache):
    return CachedSubset(str(cache), "train", lambda whole: HEADER)


def test_an_array_may_be_a_link_to_its_own_content_alone(cache, tmp_path, count):
    """Content is compared with its checksum: a link reads nothing that the cache does not tell."""
    array, moved = cache / "train" / "symbols.bin", tmp_path / "elsewhere.bin"
    shutil.move(str(array), str(moved))
    array.symlink_to(moved)
    assert opened(cache).rows(0)["symbols"].tolist() == [[8, 3]] * 2
    for target in ("/etc/passwd", "/dev/zero", str(cache)):
        array.unlink()
        array.symlink_to(target)
        with pytest.raises(CacheError, match="symbols.bin"):
            opened(cache)
        count("links planted in caches and n-best lists")


def look(cache):
    try:
        opened(cache)
    except CacheError:
        pass


@pytest.mark.parametrize("teacher", ["/dev/zero", "pipe", "../../etc/passwd"])
def test_a_teacher_elsewhere(cache, tmp_path, monkeypatch, teacher):
    """What the manifest says of the teacher is looked up; it may be without end."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    manifest = json.loads((cache / "train" / "manifest.json").read_text())
    manifest["teachers"][0].update(path=teacher, bytes=0)
    manifest.pop("checksum")
    layout.write_manifest(cache / "train", manifest)
    process = multiprocessing.get_context("fork").Process(target=look, args=(cache,))
    process.start()
    process.join(60)
    ended = not process.is_alive()
    process.kill()
    process.join()
    assert ended


# dictionaries

DICTIONARIES = {
    "twice": b"a00 5\na00 3\n",
    "no count": b"a00\n",
    "a count of text": b"a00 many\n",
    "a count of 5000 digits": b"a00 " + b"9" * 5000 + b"\n",
    "no text": b"\xff\xfe\x00a 5\n",
    "nothing": b"",
    "control characters": b"a\x1b[2J\x00\x85 5\n" * 1,
    "half a character": b"\xed\xa0\x80 5\n",
}


def test_dictionaries_beside_a_teacher(data, teacher, tmp_path, long, count):
    path = tmp_path / "teacher.pt"
    shutil.copy(str(teacher), str(path))
    shutil.copy(str(data / "dict.bb.txt"), str(tmp_path))
    commands = {
        "train": lambda out: distil(data, path, out, "--max-update", 1),
        "sequences": lambda out: write_sequences(data, path, out, "--gen-subset", "valid"),
        "export": lambda out: fairseq(
            "fairseq-kd-export", "--path", path, "--output", out, "--no-verify"
        ),
    }
    for what, content in DICTIONARIES.items():
        (tmp_path / "dict.aa.txt").write_bytes(content)
        for name, command in commands.items():
            if long or what == "no text":
                run = command(tmp_path / "output")
                last = run.text.strip().splitlines()[-1]
                assert run.code == 1 and str(tmp_path) in last, (what, name, run.text[-3000:])
                assert name == "train" or "Traceback" not in run.text, (what, name)
                assert last.isprintable() or name == "train", (what, last)
                count("hostile dictionaries given to a command")


CUT = {"train.aa-bb.bb.bin": 1000, "train.aa-bb.aa.idx": 1000, "train.aa-bb.bb.idx": 0}


def test_data_cut_short(data, teacher, tmp_path, long, count):
    cut, output = tmp_path / "cut", tmp_path / "output"
    commands = {
        "train": lambda: distil(cut, teacher, output, "--max-update", 1),
        "cache": lambda: write_cache(cut, teacher, output),
        "sequences": lambda: write_sequences(cut, teacher, output),
    }
    for file, left in CUT.items() if long else list(CUT.items())[:1]:
        shutil.rmtree(str(cut), ignore_errors=True)
        shutil.copytree(str(data), str(cut))
        os.truncate(str(cut / file), left)
        for name, command in commands.items():
            run = command()
            said = [line for line in run.text.splitlines() if "cut short. Binarise" in line]
            assert run.code == 1 and said and str(cut) in said[-1], (file, name, run.text[-3000:])
            assert not output.exists() or not list(output.iterdir()), (file, name)
            count("data cut short, given to a command")


def test_data_of_another_dictionary(data, teacher, tmp_path):
    """Fewer symbols than the sentences have: a dictionary was copied over theirs."""
    other, output = tmp_path / "other", tmp_path / "output"
    shutil.copytree(str(data), str(other))
    lines = (data / "dict.bb.txt").read_text().splitlines(True)
    (other / "dict.bb.txt").write_text("".join(lines[:6]))
    runs = [
        distil(other, teacher, output, "--max-update", 1),
        write_cache(other, teacher, output),
        write_cache(other, teacher, output, "--gen-subset", "valid"),
    ]
    for run in runs:
        assert run.code == 1 and "binarised with a different dict" in run.text, run.text[-3000:]
    assert not output.exists() or not list(output.iterdir())


def test_a_junk_model_of_subwords(data, teacher, tmp_path):
    junk = tmp_path / "junk.model"
    junk.write_bytes(b"\x0a\xff\xff\xff\xff\x0f junk")
    run = write_sequences(
        *(data, teacher, tmp_path / "output", "--gen-subset", "valid"),
        *("--bpe", "sentencepiece", "--sentencepiece-model", junk),
    )
    assert run.code == 1 and "Traceback" not in run.text
    assert str(junk) in run.text.strip().splitlines()[-1]


# text

LINES = [
    "a00 a01",
    "",
    "a00\0a01 \0",
    "a02 \u202ea03\u202c \u200f",
    "a00 a01\u2028a02\u2029 a03\x85a04\x0b\x0c\x1c",
    "<script>alert('a01')</script> | a02",
    "a03 \ufeff\ufffe\r",
    " ".join(["a05"] * 100000),
    "a" * 100000,
]


def test_a_text_of_anything_keeps_its_lines(data, teacher, tmp_path, count):
    text, output = tmp_path / "text", tmp_path / "output"
    text.write_bytes("\n".join(LINES).encode("utf-8") + b"\n")
    write_sequences(
        *(data, teacher, output, "--source-text", text, "--no-filters", "--max-len-b", 20),
    ).ok()
    counts = json.loads((output / "record.json").read_text())["counts"]
    assert counts["sentences"] == len(LINES)
    assert counts["dropped"]["longer_than_the_teacher_reads"] == 1
    kept = counts["distilled"]
    assert kept == len(LINES) - 1 - counts["dropped"]["empty"]
    for name in ("train.aa", "train.bb", "train.subwords.aa", "train.subwords.bb"):
        assert (output / "text" / name).read_bytes().count(b"\n") == kept
    count("hostile sentences", len(LINES))


@pytest.mark.parametrize("content", [b"a00 \xff a01\n", b"a00 \xed\xa0\x80\n", b"\xff\xfea\0\n"])
def test_a_text_that_is_no_text(content, data, teacher, tmp_path, count):
    text, output = tmp_path / "text", tmp_path / "output"
    text.write_bytes(content)
    run = write_sequences(data, teacher, output, "--source-text", text)
    last = run.text.strip().splitlines()[-1]
    assert run.code == 1 and "Traceback" not in run.text
    assert str(text) in last and "not UTF-8" in last
    assert not (output / "record.json").exists()
    count("hostile sentences")


def test_a_model_of_subwords_that_knows_line_breaks(tmp_path):
    text, prefix = tmp_path / "text", tmp_path / "spm"
    text.write_text("a b c d\n" * 9)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(prefix),
        vocab_size=270,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(prefix) + ".model")
    pieces = "▁a <0x0A> ▁b"
    decoded = model.decode(pieces.split())
    assert "\n" in decoded
    dictionaries = {side: Dictionary() for side in ("source_dictionary", "target_dictionary")}
    data = SimpleNamespace(source=Dictionary(), target=Dictionary())
    task = SimpleNamespace(
        **dictionaries,
        build_bpe=lambda _: SimpleNamespace(decode=lambda line: model.decode(line.split())),
        build_tokenizer=lambda _: None,
    )
    cfg = SimpleNamespace(bpe=None, tokenizer=None, common_eval=SimpleNamespace(post_process=None))
    to_text, _ = text_functions(task, cfg, data)
    assert to_text(pieces) == decoded.replace("\n", " ")


# the report

WORDS = ["<script>alert(1)</script>", "</td><img/src=x/onerror=alert(1)>", "a|b", "\u202ea", "&lt;",
    "[a](javascript:alert(1))", "`", "$\\alpha$", "'\"", "\x1b[2J"]  # fmt: skip


class Page(html.parser.HTMLParser):
    def __init__(self, content):
        super().__init__()
        self.tags, self.said = [], []
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, attributes))

    def handle_data(self, data):
        self.said.append(data)


def test_a_report_of_anything(tmp_path, count):
    text, data = tmp_path / "text", tmp_path / "data"
    text.mkdir()
    lines = "".join(" ".join(WORDS[i:] + WORDS[:i]) + "\n" for i in range(len(WORDS)))
    for split in ("train", "valid", "test"):
        for lang in ("aa", "bb"):
            (text / f"{split}.{lang}").write_text(lines, encoding="utf-8")
    binarise(text, data, "--testpref", text / "test")
    teacher = train_teacher(data, tmp_path / "teacher", transformer(8), 2)
    # the last character of it is half of none
    name = "<img src=x onerror=alert(1)>[a](javascript:b)|" + os.fsdecode(b"\xff")
    reference = tmp_path / name
    reference.write_text(lines, encoding="utf-8")
    output = tmp_path / "report"
    fairseq(
        *("fairseq-kd-report", data, "--output", output, "--cpu", "--beam", 1, "--repeats", 1),
        *("--num-workers", 0, *LANGUAGES, "--reference", reference, "--max-len-b", 20),
        *("--models", f"teacher={teacher}", f"student={teacher}"),
    ).ok()
    page = Page((output / "report.html").read_text(encoding="utf-8"))
    allowed = """html head meta title style body h1 h2 h3 div table thead tbody tr th td p
        figure img figcaption details summary span small br bdi label select option input script"""
    assert {tag for tag, _ in page.tags} <= set(allowed.split())
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [[]]
    for tag, attributes in page.tags:
        names = dict(attributes)
        assert not any(name.startswith("on") for name in names)
        assert tag != "img" or names["src"].startswith("data:image/png;base64,")
    said = "".join(page.said)
    for shown in (*WORDS[:-1], name.encode("utf-8", "backslashreplace").decode()):
        assert shown in said, shown
    tables = (output / "report.md").read_text(encoding="utf-8")
    assert "<" not in tables and "[a](" not in tables.replace("\\[", "")
    count("hostile sentences", len(WORDS))
