"""Translations made elsewhere: what each format says, what they are of, and what is refused."""

import contextlib
import gzip
import io
import json
import math
import re
import sys

import numpy as np
import pytest
from letters import LINES, LISTS, letters, write_letters

from kd_plugin.commands import sequences as command
from kd_plugin.decoding import Hypothesis, TextHypothesis, databin
from kd_plugin.files import FileError
from kd_plugin.sequences import HypothesisStore, exchange
from kd_plugin.sequences.exchange import formats
from kd_plugin.sequences.exchange.lines import Lines

NAN = math.nan
BIT = math.log(2)

FAIRSEQ = (
    "2026-01-01 | INFO | x\n"
    "S-1\tb c d\nT-1\tx\nH-1\t-1.5\tb@@ c\nD-1\t-1.5\tbc\nP-1\t-1 -2\n"
    "H-1\t-2\tb d\nD-1\t-2\tbd\nP-1\t-1 -3\n"
    "S-0\ta b c\nH-0\t-0.5\ta\nD-0\t-0.5\tA\nGenerate test with beam=2: BLEU4 = 0\n"
)


@contextlib.contextmanager
def opened(tmp_path, content, name="x.txt"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    with exchange.readable_twice([str(path)]) as files:
        yield files


def items(tmp_path, content, name="x.txt", subwords=True):
    """The format that is recognised, and its items without their lines."""
    with opened(tmp_path, content, name) as files:
        found = formats.recognise(files[0])
        return found, [tuple(item)[:3] for item in formats.FORMATS[found](files[0], subwords)]


@pytest.mark.parametrize(
    "name, content, format, expected",
    [
        ("a.en", "a b\n\nc\u2028d", "lines", [(None, None, t) for t in ("a b", "", "c\u2028d")]),
        ("a", "\ufeffa\r\nb\n", "lines", [(None, None, "a"), (None, None, "b")]),
        ("a", "x\ty\nz\t\n", "tsv", [(None, "x", "y"), (None, "z", "")]),
        ("a.tsv", "x\ty\t-1\n", "tsv", [(None, "x", [("y", -1.0)])]),
        (
            "a.txt",
            "id\tsrc\tother\tMT\tscore\n3\tx\t-\ty\t-1\n3\tx\t-\tz\t\n1\tu\t-\tv\t2e-1\n",
            "tsv",
            [(3, "x", [("y", -1.0), ("z", NAN)]), (1, "u", [("v", 0.2)])],
        ),
("a", "0 ||| a b ||| F0= -1 F1= 2 ||| -0.5\n0 |||  ||| F0= 1 ||| -2\n2 ||| c |||\n3 |||\n",
         "nbest", [(0, None, [("a b", -0.5), ("", -2.0)]), (2, None, "c"), (3, None, "")]),
        ("a.out", "0 ||| a b ||| -1\n0 ||| c\n2 ||| d ||| x= ||| -3\n", "nbest",
         [(0, None, [("a b", -1.0), ("c", NAN)]), (2, None, [("d", -3.0)])]),
        ("a.jsonl", '{"source": "x", "translations": [{"text": "y", "score": -1}, {"text": "z"}]}',
         "jsonl", [(None, "x", [("y", -1.0), ("z", NAN)])]),
        ("a", '{"src": "x", "hypotheses": ["y", "z"], "scores": [1, 2], "id": 7}\n\n'
         '{"translation": "y\\nz", "score": null, "id": "8"}\n{"translation": null}\n'
         '{"translations": []}\n', "jsonl",
         [(7, "x", [("y", 1.0), ("z", 2.0)]), (8, None, [("y\nz", NAN)]), (None, None, ""),
          (None, None, "")]),
    ],
)  # fmt: skip
def test_formats(tmp_path, name, content, format, expected):
    expected = [(*e[:2], [(e[2], NAN)] if isinstance(e[2], str) else e[2]) for e in expected]
    found = items(tmp_path, content, name)
    assert repr(found) == repr((format, expected))
    packed = gzip.compress(content.encode("utf-8"))
    assert repr(items(tmp_path, packed, name + ".gz")) == repr(found)
    zstandard = pytest.importorskip("zstandard")
    # in two frames, as pzstd and cat write them
    half = len(content.encode("utf-8")) // 2
    parts = content.encode("utf-8")[:half], content.encode("utf-8")[half:]
    packed = b"".join(zstandard.ZstdCompressor().compress(part) for part in parts)
    assert repr(items(tmp_path, packed, name + ".zst")) == repr(found)


def test_what_fairseq_generate_prints(tmp_path):
    """Scores in bits there, in nats here; ids in any order."""
    subwords = [
        (1, "b c d", [("b@@ c", -1.5 * BIT), ("b d", -2 * BIT)]),
        (0, "a b c", [("a", -0.5 * BIT)]),
    ]
    assert items(tmp_path, FAIRSEQ) == ("fairseq", subwords)
    text = [(1, "b c d", [("bc", -1.5 * BIT), ("bd", -2 * BIT)]), (0, "a b c", [("A", -0.5 * BIT)])]
    assert items(tmp_path, FAIRSEQ, subwords=False) == ("fairseq", text)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a", b"a\n\xff\n", "line 2: not UTF-8"),
        ("a", b"a\nb\0\n", "line 2: NUL"),
        ("a", "a\nb\n".encode("utf-16"), "line 1: UTF-16: make it UTF-8"),
        ("a", gzip.compress(b"a\n" * 9999, mtime=0)[:-9], "cut short or damaged behind line"),
        ("a", gzip.compress(b"a\n", mtime=0) + b"x", "cut short or damaged behind line 1"),
        ("a.tsv", "a\n", "line 1: expected source, translation"),
        ("a.tsv", "a\tb\nc\n", "line 2: expected 2 columns .* got 1"),
        ("a.tsv", "a\tb\tx\n", "line 1: a score that is no number: 'x'"),
        ("a.tsv", "a\tb\tnan\n", "line 1: a score that is no number: 'nan'"),
        ("a.tsv", "a\tb\t1e999\n", "line 1: a score that is no number"),
        ("a.tsv", "id\ttext\nx\ta\n", "line 2: an id that is no number: 'x'"),
        ("a.tsv", "id\tsource\ttext\n1\ta\tb\n1\tc\td\n", "line 3: another source of sentence 1"),
        ("a", "S-0\ta\nH-0\t-1\n", "line 2: expected H-0, a score and a text"),
        ("a", "S-0\ta\nH-0\tx\ta\n", "line 2: a score that is no number"),
        ("a", "S-0\ta\nH-0\t1\ta\nH-0\t1\ta\nD-0\t1\ta\n", "line 4: before it, 2 H-0 and 1 D-0"),
        ("a", "1 ||| a ||| f ||| 1\n0 ||| a ||| f ||| 1\n", "line 2: the ids go back.* 1 to 0"),
        ("a", "1 ||| a ||| f ||| b\n", "line 1: a score that is no number: 'b'"),
        ("a.jsonl", "{}\n", "line 1: expected a text, as one of translations"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "line 2: no JSON"),
        ("a.jsonl", '{"text":' * 99999, "line 1: no JSON"),
        ("a.jsonl", "1\n", "line 1: expected a JSON object"),
        ("a.jsonl", ' [{"text": "a"}]\n', "line 1: .* got an array: jq -c '.\\[\\]' makes lines"),
        ("a.csv", "a;b\n", ".csv is a spreadsheet's format"),
        ("a.jsonl", '{"text": 5}\n', "line 1: expected a text"),
        ("a.jsonl", '{"translations": "a"}\n', "line 1: 'translations': expected a list"),
        ("a.jsonl", '{"nbest": ["a"], "scores": [1, 2]}\n', "line 1: 'scores': expected a list"),
        ("a.jsonl", '{"text": "a", "score": true}\n', "line 1: a score that is no number: 'True'"),
        ("a.jsonl", '{"text": "a", "score": "-"}\n', "line 1: a score that is no number"),
        ("a.jsonl", '{"text": "a", "score": NaN}\n', "line 1: a score that is no number"),
        ("a.jsonl", '{"text": "a", "id": -1}\n', "line 1: 'id': expected the number of a sentence"),
        ("a.jsonl", '{"text": "a", "source": 1}\n', "line 1: 'source': expected a text"),
        ("a.jsonl", '{"text": "\\ud800"}\n', "line 1: half of a surrogate pair"),
        ("a.jsonl", '{"text": "\\u0000"}\n', "line 1: NUL"),
    ],
)
def test_bad_input(tmp_path, name, content, message):
    with pytest.raises(FileError, match=message) as error:
        items(tmp_path, content, name)
    assert str(tmp_path / name) in str(error.value)


def test_zstandard_that_is_cut_short(tmp_path, monkeypatch):
    zstandard = pytest.importorskip("zstandard")
    packed = zstandard.ZstdCompressor().compress(b"".join(b"%d\n" % i for i in range(99999)))
    for damaged in (packed[:-9], packed[:5000], packed + b"\x28\xb5\x2f\xfd\x00"):
        with pytest.raises(FileError, match="cut short or damaged behind line"):
            items(tmp_path, damaged)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(FileError, match="pip install .*zstd"):
        items(tmp_path, packed)


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("kd_plugin.sequences.exchange.lines.LONGEST", 1000)
    for content in (b"a\n" + b"x" * 2000, gzip.compress(b"a\n" + b"x" * 2000 + b"\nb", mtime=0)):
        with opened(tmp_path, content) as files:
            with pytest.raises(FileError, match="line 2: longer than 1,000 bytes"):
                list(files[0])


def test_standard_input_is_read_more_than_once(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\nb\n")))
    with exchange.readable_twice(["-"]) as (lines,):
        assert [list(lines), list(lines)] == [["a", "b"]] * 2
        assert lines.name == "standard input"
    with pytest.raises(FileError, match="no such file"):
        with exchange.readable_twice(["/no/such/file"]):
            pass


# beside their sources


SENTENCES = [databin.encode(letters(), line) for line in LINES]
ROWS = [f"{i}\t{line}\t{line.upper()}\n" for i, line in enumerate(LINES)]
NUMBERED = "".join(ROWS)


def capitals(text):
    return text.upper().replace("<UNK>", "<unk>")


def check(tmp_path, content, sources=SENTENCES, name="x.tsv", header="id\tsource\ttext\n", **how):
    """Against the letters, whose text is in capitals."""
    with opened(tmp_path, header + content, name) as files:
        translations = exchange.Translations(files, None, None, dictionary=letters(), encodes=True)
        if sources is not None:
            sources = exchange.Sources("letters", letters(), sources, capitals, str.lower)
        return exchange.check(translations, sources, **{"compare": True, **how})


def test_sources_that_are_ours(tmp_path):
    """As text or as subwords, with other spaces, in any order."""
    found = check(
        tmp_path, "3\td e f\tx\n0\tA  B C \tx\n4\te f g\t\n1\tB C D\tx\n2\t\uff23 D E\tx\n"
    )
    assert found.sentences.tolist() == [3, 0, 4, 1, 2]
    assert found.empty == 1 and not found.scored
    lines = "".join(f"{line}\tx\t-1\n" for line in LINES)
    found = check(tmp_path, lines, header="")
    assert found.sentences.tolist() == list(range(5)) and found.scored


def test_an_unknown_symbol_is_whatever_stands_there(tmp_path):
    unknown = [databin.encode(letters(), line) for line in ("a y c", "y y", "b y")]
    fits = "0\tA foo C\tx\n1\t1 2\tx\n2\tB\tx\n"
    assert len(check(tmp_path, fits, unknown).sentences) == 3
    for other in ("A foo D", "A", "C foo A"):
        with pytest.raises(FileError, match="line 2: its source is"):
            check(tmp_path, f"0\t{other}\tx\n", unknown)


@pytest.mark.parametrize(
    "content, message",
    [
        (
            "".join(ROWS[:4]),
            "translations of 4 sentences, and letters has 5; the first without is 4 "
            r"\(--import-incomplete drops",
        ),
        (NUMBERED.replace("d e f", "d e g"), "line 5: its source is 'd e g', and sentence 3 of "),
        (NUMBERED + "5\tx\ty\n", "line 7: sentence 5, and letters has 5 sentences, 0 to 4"),
        (NUMBERED + "1\tB C D\ty\n", "line 7: sentence 1 for a second time"),
        (NUMBERED.replace("d e f", '"d e f"'), "line 5: its source is .*, with quotes as in CSV"),
        ("", "expected at least one translation, found none"),
    ],
)
def test_what_is_not_of_these_sentences(tmp_path, content, message):
    with pytest.raises(FileError, match=message):
        check(tmp_path, content)


def test_an_empty_line_at_the_end(tmp_path):
    with pytest.raises(FileError, match="of 6 sentences, and letters has 5: its last line is emp"):
        check(tmp_path, "x\n" * 5 + "\n", name="x", header="")
    with pytest.raises(FileError, match="of 7 sentences, and letters has 5$"):
        check(tmp_path, "x\n" * 5 + "\n\n", name="x", header="")


def test_ids_that_count_from_1(tmp_path):
    """Of which the last sentence is missing, so that all would move by one without a word."""
    content = "".join(f"{i} ||| x ||| F0= 1 ||| -1\n" for i in range(1, 5))
    with pytest.raises(FileError, match="no sentence 0: ids count from 0"):
        check(tmp_path, content, name="x", header="", incomplete=True)
    zero = "0 ||| ||| F0= 0 ||| 0\n" + content
    assert len(check(tmp_path, zero[:-1], name="x", header="", incomplete=True).sentences) == 5


@pytest.mark.parametrize("lines", [4, 6])
def test_numbers_of_lines_that_differ(tmp_path, lines):
    for incomplete in (False, True):  # nobody knows which one is missing
        with pytest.raises(FileError, match=f"of {lines} sentences, and letters has 5"):
            check(tmp_path, "x\n" * lines, name="x", header="", incomplete=incomplete)


def test_sentences_may_be_missing_if_that_is_asked(tmp_path):
    found = check(tmp_path, "3\tD E F\tx\n0\tA B C\ty\n", incomplete=True)
    assert found.sentences.tolist() == [3, 0]


def test_sources_that_are_not_compared_or_are_the_source(tmp_path):
    other = NUMBERED.replace("d e f", "other")
    assert len(check(tmp_path, other, compare=False).sentences) == 5
    assert check(tmp_path, other, None).sentences.tolist() == list(range(5))
    with pytest.raises(FileError, match="line 1: no source, which was to be taken from here"):
        check(tmp_path, "x\n", None, name="x", header="")


def test_lines_of_a_text_are_sources(tmp_path):
    path = tmp_path / "text"
    path.write_text("\n".join(line.upper() for line in LINES))  # no end of line at the end
    sources = exchange.TextSources(str(path), letters(), str, str.lower, raw=True)
    assert len(sources) == 5 and sources.text(4) == "E F G"
    assert sources.difference(3, "D  e F") is None and sources.difference(3, "d") == "D E F"
    path.write_bytes(b"a\n\xff\n")
    sources = exchange.TextSources(str(path), letters(), str, str.lower, raw=True)
    with pytest.raises(FileError, match="text, line 2: not UTF-8"):
        sources.text(1)


@pytest.mark.parametrize(
    "symbols, lines, encodes, expected",
    [
        (["\u2581a", "b"], ["\u2581a b"], True, True),
        (["\u2581a", "b"], ["a b"], True, False),
        (["a@@", "b", "c"], ["a@@ b", "b"], True, True),
        (["a@@", "b", "c"], ["ab"], True, False),
        (["a", "b"], ["a b"], False, True),  # words
        (["a", "b"], ["a b"], True, False),
    ],
)
def test_text_is_told_from_subwords(symbols, lines, encodes, expected):
    dictionary = letters()
    dictionary.symbols = symbols
    assert exchange.are_subwords(iter(lines), dictionary, encodes) is expected


def test_the_likeliest_is_the_first(tmp_path):
    """By the scores, if all have one; without the empty ones, unless there are no others."""
    content = (
        '{"hypotheses": ["a", "b", " "], "scores": [-2, -1, 0]}\n'
        '{"hypotheses": ["a\\nb", "b"], "scores": [-2, null]}\n{"translation": ""}\n'
    )
    with opened(tmp_path, content, "a.jsonl") as files:
        found = exchange.Translations(files, None, "text", dictionary=letters(), encodes=True)
        lists = [found.hypotheses(item) for item in found]
    assert lists[0] == [TextHypothesis("b", -1.0, True), TextHypothesis("a", -2.0, True)]
    assert [one.text for one in lists[1]] == ["a b", "b"]
    assert [one.text for one in lists[2]] == [""]


def test_a_kill_while_importing_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("kd_plugin.sequences.exchange.align._BATCH", 2)

    def fill(folder, content=NUMBERED):
        with opened(tmp_path, "id\tsource\ttext\n" + content, "x.tsv") as files:
            found = exchange.Translations(files, None, "text", dictionary=letters(), encodes=True)
            checked = exchange.Checked(np.array([4, 3, 1, 0, 2]), False, 0)
            return exchange.fill(HypothesisStore(folder, found.describe()), found, checked)

    assert fill(tmp_path / "whole")
    append = HypothesisStore.append

    def killed(store, nbest):
        append(store, nbest)
        raise KeyboardInterrupt

    for _ in range(3):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(HypothesisStore, "append", killed)
            fill(tmp_path / "killed")
    assert fill(tmp_path / "killed")
    whole, other = (tmp_path / name / "hypotheses.jsonl" for name in ("whole", "killed"))
    assert whole.read_bytes() == other.read_bytes()
    assert json.loads(whole.read_text().splitlines()[4])["nbest"][0]["text"] == LINES[0].upper()
    with pytest.raises(FileError, match="it has changed while it was read"):
        fill(tmp_path / "less", "".join(ROWS[:4]))


# the other way


@pytest.mark.parametrize("name", ["x.tsv", "x.jsonl.gz"])
def test_lists_for_elsewhere_come_back(tmp_path, name):
    path = tmp_path / name
    lists = [(0, [Hypothesis("a\tb", -0.25, True), Hypothesis("c", NAN, True)]), *LISTS[1:]]

    def write(lists, **how):
        text = lambda one: one.subwords.upper()  # noqa: E731
        exchange.write_nbest(str(path), lists, LINES.__getitem__, text, **how)

    write(lists)
    expected = [
        (i, LINES[i], [(one.subwords.upper(), one.score) for one in nbest]) for i, nbest in lists
    ]
    found = items(tmp_path, path.read_bytes(), name)[1]
    tab = "A B" if name == "x.tsv" else "A\tB"
    assert repr(found) == repr(expected).replace("A\\tB", tab.replace("\t", "\\t"))
    before = path.read_bytes()
    write(lists, same_as=str(path))
    with pytest.raises(FileError, match="something else in it"):
        write(lists[1:], same_as=str(path))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    write(lists[1:])
    assert path.read_bytes() != before


# the command


def run(data, output, *flags, code=0):
    arguments = [data.folder, "--output", output, "--cpu", "-s", "aa", "-t", "bb", *flags]
    assert command.main([str(argument) for argument in arguments]) == code
    name = output / "text" / "train.bb"
    return name.read_text().splitlines() if name.exists() else None


@pytest.fixture
def data(tmp_path):
    return write_letters(tmp_path / "data")


def test_all_is_as_for_decoded_hypotheses(data, tmp_path, capfd):
    """Choice, filters, mixing, the record; and again as text that is written for elsewhere."""
    nbest = tmp_path / "a.nbest"
    nbest.write_text(
        "".join(
            f"{i} ||| {one} ||| F0= 1 ||| {score}\n"
            for i, line in enumerate(LINES)
            for one, score in (("h g", -0.1 - i), (line[::-1], -0.2 - i), ("", -9))
        )
    )
    out, written = tmp_path / "out", tmp_path / "lists.jsonl"
    flags = ("--import", nbest, "--write-nbest", written, "--keep-copies")
    assert run(data, out, *flags) == ["h g"] * 5
    record = json.loads((out / "record.json").read_text())
    assert record["means"]["score_per_token"] == pytest.approx(-2.1)
    header = record["settings"]["hypotheses"]
    assert header["format"] == "nbest" and header["written"] == "subwords"
    before = written.read_bytes()
    assert run(data, out, *flags) == ["h g"] * 5 and written.read_bytes() == before
    again = ("--select", "closest", "--metric", "chrf", "--mix", "original")
    assert run(data, tmp_path / "again", "--import", nbest, *again) == [
        *LINES, *(line[::-1] for line in LINES)
    ]  # fmt: skip
    assert run(data, tmp_path / "back", "--import", written) == ["h g"] * 5
    quantile = ("--min-score-quantile", 0.4)
    assert len(run(data, tmp_path / "quantile", "--import", nbest, *quantile)) == 3
    capfd.readouterr()
    written.write_text("mine")
    assert run(data, tmp_path / "other", *flags, code=1) is None
    assert "there is such a file" in capfd.readouterr().err and written.read_text() == "mine"
    assert not (tmp_path / "other").exists()


def test_a_source_of_their_own(data, tmp_path, capfd):
    """Without a subset it is taken, and said; with one it is compared, and what differs named."""
    table = tmp_path / "a.tsv"
    table.write_text("a b\tb a\nc d\td c\ne\t\n")
    for path in data.folder.glob("train.*"):
        path.unlink()
    assert run(data, tmp_path / "own", "--import", table) == ["b a", "d c"]
    assert (tmp_path / "own/text/train.aa").read_text() == "a b\nc d\n"
    assert "has no train: the source is that of --import" in capfd.readouterr().err
    counts = json.loads((tmp_path / "own/record.json").read_text())["counts"]
    assert counts["dropped"]["empty"] == 1 and counts["sentences"] == 3
    text = tmp_path / "mono"
    text.write_text("a b\nc d\ne\n")
    assert run(data, tmp_path / "mono.kd", "--import", table, "--source-text", text)
    text.write_text("a b\nc e\ne\n")
    out = tmp_path / "no"
    run(data, out, "--import", table, "--source-text", text, code=1)
    assert f"{table}, line 2: its source is 'c d', and sentence 1 of" in capfd.readouterr().err
    closest = ("--select", "closest")
    run(data, out, "--import", table, *closest, code=1)
    assert "need references" in capfd.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--path", "x.pt"), "--import and --path: expected one of them"),
        (("--engine", "ctranslate2", "--num-shards", 2, "--shard-id", 0), "--engine is for .*;.*"
         "--import is the work of one process"),
        (("--import-source", "use", "--source-text", "letters"), "give one of them"),
        (("--write-nbest", "x.csv"), "--write-nbest x.csv: expected a name with .tsv, .jsonl"),
        (("--min-score-quantile", 0.1), "have no score"),
        (("--import-as", "text"), "nothing says how the student cuts it into subwords"),
        (("--import-format", "jsonl"), "letters, line 1: no JSON"),
    ],
)  # fmt: skip
def test_flags_that_mean_nothing_here(data, tmp_path, flags, message, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "letters").write_text("\n".join(line[::-1] for line in LINES))
    run(data, tmp_path / "out", "--import", "letters", *flags, code=1)
    assert re.search(message, capfd.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_flags_that_need_an_import(data, tmp_path, capfd):
    run(data, tmp_path / "out", "--import-as", "text", "--import-incomplete", code=1)
    error = capfd.readouterr().err
    assert "--import-as needs --import; --import-incomplete needs --import" in error
    assert "or --import" in error


def test_lines_know_where_they_are(tmp_path):
    (tmp_path / "a").write_text("x\ny\n")
    lines = Lines(str(tmp_path / "a"), "a")
    assert [lines.number for _ in lines] == [1, 2]
    assert "--import a, line 2: bad" in str(lines.fault("bad"))
