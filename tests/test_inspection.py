"""What became of each sentence, and the page that shows it."""

import json
import re

import pytest
import torch
from letters import LISTS, LetterCorpus, write_letters
from support import tree

from kd_plugin.commands import sequences as command
from kd_plugin.decoding import Hypothesis, databin
from kd_plugin.files import FileError
from kd_plugin.sequences import Choice, Filters, Output, Student, choose, inspect
from kd_plugin.sequences.dropped import Dropped, read
from kd_plugin.sequences.mixing import ORIGINAL, Mix, Part


@pytest.fixture
def data(tmp_path) -> databin.DataBin:
    return write_letters(tmp_path / "data")


PLAIN = Choice()


def write(data, out, lists=LISTS, choice=PLAIN, mix=None):
    corpus = LetterCorpus(data.side("train", "aa"), data.side("train", "bb"), data)
    student = Student(data, lambda text: text.replace("h", "\t\x1b<b>|"), None)
    chosen = choose(corpus, lists, student, choice)
    Output(str(out), {"select": "best"}).write(corpus, lists, chosen, student, mix=mix)
    return chosen


# what was dropped


def test_a_line_comes_back():
    for text in ("", "a b", "a\tb", "a\\tb", "\n\\\r", "\\", "\u2028\x85", "é"):
        one = Dropped(7, "empty", text, text, -0.25)
        line = one.line()
        assert line.count("\t") == 4 and line.index("\n") == len(line) - 1 and "\r" not in line
        assert line.split("\t")[0] == "7" and line.endswith("\t-0.25\n")


def test_each_dropped_hypothesis_by_hand(data, tmp_path):
    """Sentence 1 (from 0) copies its source, the second of sentence 2 is empty, 3 has no list."""
    write(data, tmp_path / "out", choice=Choice(keep=2, filters=Filters(max_length_ratio=1.4)))
    path = tmp_path / "out/text/dropped.tsv"
    assert path.read_text() == (
        "3\tempty\tc d e\t\t-0.6\n4\tlonger_than_the_teacher_reads\td e f\t\t\n"
    )
    choice = Choice(min_closeness=99.0, filters=Filters(copies=True))
    lists = [
        LISTS[0],
        (1, [Hypothesis("b c d", -0.3, True)]),
        (3, [Hypothesis("d h", float("nan"), False)]),
    ]
    write(data, tmp_path / "two", lists, choice)
    lines = (tmp_path / "two/text/dropped.tsv").read_text().splitlines()
    assert lines == [
        "1\tfar_from_reference\ta b c\ta b d\t-0.1",
        "3\tlonger_than_the_teacher_reads\tc d e\t\t",
        "4\tunfinished\td e f\td \\t\x1b<b>|\t",
        "5\tlonger_than_the_teacher_reads\te f g\t\t",
    ]
    found = list(read(tmp_path / "two/text/dropped.tsv"))
    assert found[2] == Dropped(4, "unfinished", "d e f", "d \t\x1b<b>|", None)


def test_as_many_as_the_record_says(data, tmp_path):
    for number, choice in enumerate((Choice(), Choice(min_score_quantile=0.5), Choice(keep=2))):
        out = tmp_path / str(number)
        chosen = write(data, out, choice=choice)
        found = [one.reason for one in read(out / "text/dropped.tsv")]
        counts = json.loads((out / "record.json").read_text())["counts"]["dropped"]
        assert {reason: found.count(reason) for reason in counts} == counts == chosen.dropped
        assert counts["longer_than_the_teacher_reads"] == 1
    assert "low_score" in [one.reason for one in read(tmp_path / "1/text/dropped.tsv")]


@pytest.mark.parametrize("line", ["", "1\tempty\ta\tb", "x\tempty\ta\tb\t1", "1\te\ta\tb\tc"])
def test_a_line_that_is_damaged(line, tmp_path):
    (tmp_path / "dropped.tsv").write_text("1\tempty\ta\tb\t1\n" + line + "\n")
    with pytest.raises(FileError, match="line 2 is damaged: expected a number, a reason"):
        list(read(tmp_path / "dropped.tsv"))
    (tmp_path / "dropped.tsv").write_bytes(b"\xff\n")
    with pytest.raises(FileError, match="line 1 is not UTF-8"):
        list(read(tmp_path / "dropped.tsv"))


# the page


def cells(page, title):
    """Rows of the table below a heading."""
    part = re.split(r"^#+ ", page.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    rows = [line[2:-2].split(" | ") for line in part.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


@pytest.fixture
def out(data, tmp_path):
    sides = data.side("train", "aa"), data.side("train", "bb")
    part = Part(ORIGINAL, *sides, 2.0, False, {"sha256": "12" * 32})
    mix = Mix([part, part._replace(name="mono", weight=1.0, own=True)])
    lists = [(0, [Hypothesis("a b c d e f h", -0.1, True)]), (2, [Hypothesis("", -0.5, True)])]
    write(data, tmp_path / "out", lists, mix=mix)
    return tmp_path / "out"


def test_the_page_by_hand(out):
    page = inspect(str(out))
    assert page is not None and page.startswith(f"# Distilled data: {out}\n")
    glance = cells(page, "At a glance")
    assert glance["sentences of the training set"] == ["16"]
    assert glance["sentences to distil"] == ["5"] and glance["mixed in"] == ["15"]
    assert glance["dropped hypotheses and sentences"] == ["4"]
    # the score per token, -0.1, in bits
    assert glance["teacher's log-probability per token"] == ["-0.144 bits"]
    assert cells(page, "What was mixed") == {
        "": ["weight", "sentences", "written", "checksum of pairs"],
        "original": ["2", "5", "10", "121212121212"],
        "mono": ["1", "5", "5", "121212121212"],
        "distilled here": ["–", "–", "1", "–"],
    }
    lengths = cells(page, "Lengths in subwords")
    assert lengths["1 to 5"] == ["16 (100.0%)", "15 (93.8%)"]
    assert lengths["6 to 10"] == ["0 (0.0%)", "1 (6.2%)"]
    assert lengths["mean"] == ["3.0", "3.2"]  # (15 * 3 + 7) / 16 = 3.25
    ratios = cells(page, "Target's length to the source's")
    assert ratios["above 0.8, up to 1.0"] == ["15 (93.8%)"]
    assert ratios["above 1.25, up to 2.0"] == ["1 (6.2%)"]  # 8 of 4, ends included
    assert cells(page, "What was dropped")["empty"] == ["1"]
    assert cells(page, "Dropped: empty")["3"] == ["c d e", "", "-0.500"]
    missing = cells(page, "Dropped: longer than the teacher reads")
    assert list(missing) == ["sentence", "2", "4", "5"]
    pairs = cells(page, "16 random pairs")
    assert pairs["10"] == ["e f g", "e f g", "original"]
    assert pairs["11"] == ["a b c", "a b c", "mono"]
    assert pairs["16"] == ["a b c", "a b c d e f \\t\\x1b&lt;b&gt;\\|", "distilled here"]
    assert page == inspect(str(out))


def test_html_needs_nothing_and_runs_nothing(out, tmp_path):
    assert inspect(str(out), str(tmp_path / "page.html")) is None
    page = (tmp_path / "page.html").read_text()
    assert "a b c d e f \ufffd\ufffd&lt;b&gt;|" in page and "\x1b" not in page
    assert not re.search(r"<b>|<script|https?:|src=", page)
    assert page.count("<h1>") == 1 and page.endswith("</body></html>\n")
    inspect(str(out), str(tmp_path / "page.md"))
    assert (tmp_path / "page.md").read_text() == inspect(str(out))
    with pytest.raises(FileError, match=r"expected a name that ends with \.html or \.md"):
        inspect(str(out), str(tmp_path / "page.txt"))


def test_a_folder_alone_is_enough(out, tmp_path, capsys):
    """No data of the command, no data-bin, no other flag."""
    for path in out.glob("*.*"):
        if path.name != "record.json":
            path.unlink()
    before = tree(out)
    assert command.main(["--inspect", str(out)]) == 0
    assert "# 16 random pairs" in capsys.readouterr().out
    assert command.main([f"--inspect={out}", "--inspect-output", str(tmp_path / "p.md")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'p.md'}\n"
    assert tree(out) == before


def test_a_folder_of_before(out):
    """Without a list of what was dropped, of what was mixed, and without a checksum."""
    (out / "text/dropped.tsv").unlink()
    record = json.loads((out / "record.json").read_text())
    record["counts"].update(original=15)
    for key in ("mix", "pairs"):
        del record[key]
    for key in ("mixed", "duplicates"):
        del record["counts"][key]
    (out / "record.json").write_text(json.dumps(record))
    page = inspect(str(out))
    assert cells(page, "What was dropped")["empty"] == ["1"]
    assert "There is no text/dropped.tsv, so no examples: an older version." in page
    assert "Dropped: " not in page
    assert cells(page, "What was mixed")["original"] == ["–", "–", "15", "–"]


def test_five_examples_of_a_reason_and_twenty_pairs(data, tmp_path):
    line = databin.encode(data.source, "a b")
    sides = [line] * 300, [torch.cat([line] * 2)] * 300
    write(data, tmp_path / "out", mix=Mix([Part("x", *sides, 1.0, True)]))
    path = tmp_path / "out/text/dropped.tsv"
    more = [Dropped(n, "repetition", f"source {n}", "x", -1.0).line() for n in range(1, 101)]
    path.write_text(path.read_text() + "".join(more))
    page = inspect(str(tmp_path / "out"))
    found = [int(key) for key in list(cells(page, "20 random pairs"))[1:]]
    assert len(found) == 20 and found == sorted(set(found)) and max(found) > 150
    examples = list(cells(page, "Dropped: repetition"))[1:]
    assert len(examples) == 5 and examples != list("12345")
    assert "dropped.tsv has 100 of the 0 repetition: it was changed since, or is cut short." in page


# what is refused


def test_what_is_no_finished_folder(data, out, tmp_path):
    for folder in (tmp_path / "none", data.folder):
        with pytest.raises(FileError, match="expected a folder that fairseq-kd-sequences has fin"):
            inspect(str(folder))
    text = out / "text/train.bb"
    content = text.read_bytes()
    text.write_bytes(content[: len(content) // 2])
    with pytest.raises(FileError, match="record.json says 16 sentences, and train.aa has .* since"):
        inspect(str(out))
    text.write_bytes(content + b"more\n")
    with pytest.raises(FileError, match="train.bb has 17 or more"):
        inspect(str(out))
    text.write_bytes(b"\xff\n" + content)
    with pytest.raises(FileError, match="train.bb: line 1 is not UTF-8"):
        inspect(str(out))
    text.unlink()
    with pytest.raises(FileError, match="missing: .*train.bb"):
        inspect(str(out))


@pytest.mark.parametrize(
    "key, value",
    [
        ("mix", {"order": "in-order"}),
        ("mix", {"order": "in-order", "parts": [{"name": "a", "weight": "x"}]}),
        ("mix", [1]),
        ("files", ["dict.aa.txt"]),
        ("settings", {"select": "best", "filters": 7}),
        ("counts", {}),
    ],
)
def test_a_record_that_is_damaged(key, value, out):
    record = json.loads((out / "record.json").read_text())
    (out / "record.json").write_text(json.dumps({**record, key: value}))
    with pytest.raises(FileError, match=r"record.json is (damaged|not a record)"):
        inspect(str(out))
