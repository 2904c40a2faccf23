"""Scores that were computed elsewhere, and which sentences a report shows."""

import contextlib
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import given as given_
from hypothesis import strategies as st
from test_report import a_report

from kd_plugin.decoding import Tokenizer
from kd_plugin.errors import UserError
from kd_plugin.files import temporary
from kd_plugin.report import asked as records
from kd_plugin.report import examples, given, metrics, page
from kd_plugin.report.score import average
from kd_plugin.report.systems import Model

PLAIN = [0.5, 0.25, 0.75, 0.5, 0.5, 0.0, 1.0, 0.5]
GOOD = [0.75, 0.5, 0.75, 1.0, 0.5, 0.5, 1.0, 0.25]  # 0.15625 more in the mean
SYSTEMS = {"plain": "plain", "student": "student", "student.greedy": "student, greedy"}
HOW = {"test": "bs", "samples": 1000}


# means and tests


def test_means_and_the_paired_bootstrap_by_hand():
    values = {"plain": PLAIN, "student": GOOD, "copy": list(PLAIN)}
    found = average("COMET", values, baseline="plain", **HOW)
    assert found["plain"]["score"] == 0.5 and found["student"]["score"] == 0.65625
    # sacreBLEU's seed; the same sentences are drawn of both
    drawn = np.random.default_rng(12345).choice(8, size=(1000, 8), replace=True)
    means = {name: np.array(own)[drawn].mean(1) for name, own in values.items()}
    gaps = np.abs(means["student"] - means["plain"])
    p = ((gaps - gaps.mean() > 0.15625).sum() + 1) / 1001
    assert 0.01 < p < 0.1 and found["student"]["p"] == pytest.approx(p)
    ordered = np.sort(means["student"])
    assert found["student"]["ci"] == pytest.approx((ordered[974] - ordered[25]) / 2)
    assert found["student"]["mean"] == pytest.approx(ordered.mean())
    assert found["plain"]["p"] is None and not found["plain"]["identical"]
    assert found["copy"]["p"] is None and found["copy"]["identical"]


def test_another_seed_is_sacrebleus_and_without_a_baseline_nothing_is_tested(monkeypatch):
    monkeypatch.setenv("SACREBLEU_SEED", "7")
    drawn = np.random.default_rng(7).choice(8, size=(1000, 8), replace=True)
    found = average("COMET", {"student": GOOD}, baseline="plain", **HOW)["student"]
    assert found["mean"] == pytest.approx(np.array(GOOD)[drawn].mean())
    assert found["p"] is None and not found["identical"]


# files


def read(tmp_path, text, flag="COMET:{}", sentences=2):
    (tmp_path / "scores").write_text(text, encoding="utf-8")
    files = given.read_flags([flag.format(tmp_path / "scores")])
    return given.read(files, SYSTEMS, sentences, ["BLEU", "chrF2"])


TWO = {"plain": [0.5, -1.0], "student, greedy": [0.25, 2.0]}


@pytest.mark.parametrize(
    "text",
    (
        "plain\t0.5\nstudent.greedy\t0.25\nstudent.greedy\t2\nplain\t-1\n",
        "Model\tsentence\tscore\r\nplain\t2\t-1\r\nplain\t1\t.5\r\n"
        "student.greedy\t1\t0.25\r\nstudent.greedy\t2\t2\r\n",
        "d/plain.txt\tSegment 0\tscore: 0.5000\nd/student.greedy.txt\tSegment 0\tscore: 0.2500\n"
        "d/plain.txt\tSegment 1\tscore: -1.0000\nd/student.greedy.txt\tSegment 1\tscore: 2.0000\n"
        "d/plain.txt\tscore: -0.2500\nd/student.greedy.txt\tscore: 1.1250\n",
    ),
    ids=("in order", "with numbers", "of comet-score"),
)
def test_a_tsv_of_all_systems_and_of_one(tmp_path, text):
    assert read(tmp_path, text) == {"COMET": TWO}
    one = {"student, greedy": TWO["student, greedy"]}
    assert read(tmp_path, text, "student.greedy=COMET:{}") == {"COMET": one}


def test_a_number_a_line(tmp_path):
    found = read(tmp_path, "\ufeff1\n 2.5e-1\r\n", "plain=MetricX-24 (XL):{}")
    assert found == {"MetricX-24 (XL)": {"plain": [1.0, 0.25]}}
    (column,) = given.describe(found, given.read_flags(["plain=MetricX-24 (XL):f", "x=y:g"]))
    assert column["lower_is_better"] and column["decimals"] == 4
    assert column["source"] == "given by f"


def test_a_model_may_be_called_as_a_header_is(tmp_path):
    (tmp_path / "scores").write_text("system\tscore\nmodel\t1\nmodel\t2\n", encoding="utf-8")
    files = given.read_flags([f"COMET:{tmp_path / 'scores'}"])
    assert given.read(files, {"model": "model"}, 2, []) == {"COMET": {"model": [1.0, 2.0]}}
    (tmp_path / "scores").write_text("model\t1\nmodel\t2\n", encoding="utf-8")
    assert given.read(files, {"model": "model"}, 2, []) == {"COMET": {"model": [1.0, 2.0]}}


def test_which_scores_are_better_when_lower():
    names = ("TER", "HTER", "sacre-TER", "WER", "MetricX-24", "Rater", "human-rater", "answer")
    columns = given.describe({name: {"plain": [1.0]} for name in names}, [])
    assert [column["name"] for column in columns if column["lower_is_better"]] == [*names[:5]]


@pytest.mark.parametrize(
    ("text", "flag", "message"),
    (
        ("1\n2\n", "boss=COMET:{}", "no system is named 'boss'; they are plain, student, "),
        ("1\n2\n3\n", "plain=COMET:{}", "expected 2 scores of plain, one for each sentence; got 3"),
        ("1\n", "plain=COMET:{}", "expected 2 scores of plain, one for each sentence; got 1"),
        ("", "plain=COMET:{}", "expected 2 scores of plain, one for each sentence; got 0"),
        ("1\ngood\n", "plain=COMET:{}", "line 2: expected a number between .* got 'good'"),
        ("1\nNaN\n", "plain=COMET:{}", "line 2: expected a number between .* got 'NaN'"),
        ("inf\n2\n", "plain=COMET:{}", "line 1: expected a number between .* got 'inf'"),
        ("1\n\n2\n", "plain=COMET:{}", "line 2: expected a number between .* got ''"),
        ("1\n2\n", "COMET:{}", "expected a TSV .* --scores NAME=COMET:"),
        ("1\n2\n", "plain=bleu:{}", "bleu is computed here"),
        ("boss\t1\nplain\t2\n", "COMET:{}", "line 1: no system is named 'boss'"),
        ("plain\t1\n", "student=COMET:{}", "it has no scores of student"),
        ("plain\t1\t1\t1\n", "COMET:{}", "line 1: expected system, sentence .* got 4 columns"),
        ("plain\tx\t1\n", "COMET:{}", "line 1: expected the number of a sentence, .* got 'x'"),
        ("plain\t0\t1\n", "COMET:{}", "line 1: expected the number of a sentence, .* got '0'"),
        ("plain\t00\t1\n", "COMET:{}", "line 1: expected the number of a sentence, .* got '00'"),
        ("plain\t1\t1\nplain\t1\t1\n", "COMET:{}", "line 2: sentence 1 of plain occurs twice"),
        ("plain\t1\t1\nplain\t3\t1\n", "COMET:{}", "no score of sentence 2 of plain"),
        ("plain\t1\nplain\tx\n", "COMET:{}", "line 2: expected a number between .* got 'x'"),
    ),
)
def test_files_that_do_not_fit(tmp_path, text, flag, message):
    with pytest.raises(UserError, match="--scores .*" + message) as caught:
        read(tmp_path, text, flag)
    assert "\n" not in str(caught.value)


def test_a_kill_while_texts_are_written_is_no_obstacle(tmp_path):
    inputs = {given.SOURCE: ["ein Hund"], given.REFERENCE: ["a dog"]}
    given.write(tmp_path, {given.SOURCE: inputs[given.SOURCE]})
    left = temporary(tmp_path / given.REFERENCE)
    left.write_text("a d")
    given.check_folder(tmp_path, inputs, ["plain"])
    assert left.exists()  # a check changes nothing
    given.make_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [given.SOURCE]
    (tmp_path / "plain.txt").write_text("a cat\n")  # comes last: without references not ours
    with pytest.raises(UserError, match="it holds other files"):
        given.check_folder(tmp_path, inputs, ["plain"])
    with pytest.raises(UserError, match="--write-for-scoring .*: it cannot be made"):
        given.make_folder(tmp_path / given.SOURCE / "inner")


@given_(
    st.text("plain\t\n01Segment :score.-eE_\0\r", max_size=60),
    st.sampled_from(("COMET:{}", "plain=COMET:{}")),
)
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_file_is_read_or_refused(tmp_path, text, flag):
    with contextlib.suppress(UserError):
        found = read(tmp_path, text, flag)
        assert all(len(own) == 2 for own in found["COMET"].values())


def test_flags_and_files_are_all_named_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        given.read_flags(["COMET", "=COMET:f", "plain=COMET:", "plain=a\tb:f", "plain=ok:f"])
    assert str(caught.value).count("expected NAME=METRIC:FILE") == 3
    assert "cannot be a metric's name" in str(caught.value)
    (tmp_path / "f").write_bytes(b"\xff\n")
    (tmp_path / "g").write_text("1\n2\n")
    files = [f"plain=A:{tmp_path / 'f'}", f"plain=A:{tmp_path / 'none'}"]
    files += [f"plain=B:{tmp_path / 'g'}"] * 2
    with pytest.raises(UserError) as caught:
        given.read(given.read_flags(files), SYSTEMS, 2, [])
    message = str(caught.value)
    assert message.count("cannot be read") == 2 and "from another file already" in message


def test_what_others_score(tmp_path):
    inputs = {given.SOURCE: ["ein Hund", "a\u2028b"], given.REFERENCE: ["a dog", "c"]}
    folder = tmp_path / "my texts"
    given.check_folder(folder, inputs, ["plain", "student.greedy"])
    given.make_folder(folder)
    given.write(folder, {**inputs, "plain.txt": ["a cat", ""]})
    assert (folder / "src.txt").read_text(encoding="utf-8") == "ein Hund\na b\n"
    assert (folder / "plain.txt").read_text(encoding="utf-8") == "a cat\n\n"
    (folder / "comet.tsv").write_text("")
    given.check_folder(folder, inputs, ["plain"])  # again, with what COMET said of it
    with pytest.raises(UserError, match="it holds other files .* choose another folder"):
        given.check_folder(folder, {**inputs, given.SOURCE: ["eine Katze", "a b"]}, ["plain"])
    with pytest.raises(UserError, match="a model cannot be called ref"):
        given.check_folder(tmp_path / "new", inputs, ["ref"])
    with pytest.raises(UserError, match="expected a folder, found a file"):
        given.check_folder(folder / "src.txt", inputs, ["plain"])
    assert given.command("my texts", ["plain", "student.greedy"]) == (
        "comet-score -s 'my texts/src.txt' -t 'my texts/plain.txt' 'my texts/student.greedy.txt' "
        "-r 'my texts/ref.txt'"
    )


def test_columns_of_given_scores_with_their_own_decimals():
    report = a_report()
    report["metrics"] += given.describe(
        {"COMET": {"teacher": [0.8125]}}, [given.ScoreFile("", "COMET", "comet.tsv")]
    )
    report["signatures"]["COMET"] = "COMET, the mean of the sentences' scores"
    found = {"score": 0.8125, "mean": 0.8, "ci": 0.0125, "p": None, "identical": False}
    for system, own in zip(report["systems"], (None, found)):
        system["scores"]["COMET"] = own
    text = page.markdown({**report, "pictures": []})
    assert "| 0.8125; 0.8000 ± 0.0125; – |" in text
    assert "given by comet.tsv: COMET, the mean of the sentences' scores" in text
    assert "COMET: no scores of teacher, so no p." in text
    assert "| 38.50 | 0.8125 |" in page.summary(report)  # chrF2, and COMET beside it


# sentences

SCORES = {"teacher": [50, 60, 70, 80, 90], "plain": [40, 60, 75, 10, 90], "s": [49, 99, 70, 0, 91]}


def chosen(each, lower=False, kls=(0.5, 0.25, 3.0, 1.0)):
    models = [Model(name, name, "data") for name in SCORES]
    options = SimpleNamespace(task="translation")
    asked = records.Asked(models, models[0], models[1], options, "out", examples=each)
    data = SimpleNamespace(
        worth=lambda results: [records.Worth("chrF2", lower, 2, SCORES)],
        texts=lambda i: {"source": f"source {i}", "reference": f"reference {i}"},
        said=lambda i, results, system: f"{system.name} {i}",
    )
    results = records.Results(asked, data, {}, {})
    return examples.choose(results, {"s": dict(enumerate(kls))})


def test_the_ends_of_every_order_are_shown_and_the_first_order_comes_first():
    found = chosen(1)
    orders = [(one["system"], one["measure"], one["against"]) for one in found["orders"]]
    assert orders == [
        *(("plain", "chrF2", "teacher"), ("s", None, "teacher"), ("s", "chrF2", "teacher")),
        *(("s", "chrF2", "plain"), ("teacher", "chrF2", "plain")),
    ]
    # plain less the teacher: -10, 0, 5, -70, 0; s less it: -1, 39, 0, -80, 1, less plain: 9, 39,
    # -5, -10, 1; by KL sentences 2 and 1, counted from 0
    assert [row["number"] for row in found["rows"]] == [4, 2, 3]
    row = found["rows"][1]
    assert row.pop("keys") == [0, -0.25, 39, 39, 0]  # the lowest is the worst
    assert row["source"] == "source 1" and row["systems"][2] == {
        **{"system": "s", "text": "s 1", "kl": 0.25},
        "worth": {"chrF2": {"value": 99, "against": {"teacher": 39, "plain": 39}}},
    }
    assert chosen(0)["rows"] == []
    assert [row["number"] for row in chosen(9)["rows"]] == [4, 1, 2, 5, 3]
    assert [row["number"] for row in chosen(9, lower=True)["rows"]] == [3, 2, 5, 1, 4]
    assert chosen(9, lower=True)["rows"][1]["keys"] == [0, -0.25, -39, -39, 0]


def test_divergences_that_are_no_numbers_put_in_no_order():
    inf, nan = float("inf"), float("nan")
    report = {**a_report(), "examples": chosen(9, kls=(inf, nan, 3.0, nan))}
    shown = page.page(report, {})
    keys = {
        int(number): json.loads(keys)[1]
        for keys, number in re.findall(r"data-keys='([^']*)'>.*?sentence (\d)", shown)
    }
    assert keys == {1: -sys.float_info.max, 2: None, 3: -3.0, 4: None, 5: None}


def test_many_orders_show_fewer_sentences_each(monkeypatch):
    monkeypatch.setattr(examples, "MOST", 4)
    assert chosen(9)["each"] == 1


def test_what_tells_good_sentences():
    name, lower, value = metrics.of_sentences(["ter", "bleu", "chrf"], Tokenizer())
    assert name == "chrF2" and not lower and value("a dog", "a dog") == pytest.approx(100)
    name, lower, value = metrics.of_sentences(["bleu"], Tokenizer())
    assert name == "sentence BLEU" and value("a dog", "a dog") == pytest.approx(100)
    name, lower, value = metrics.of_sentences(["ter", "bleu"], Tokenizer())
    assert name == "TER" and lower and value("a cat", "a dog") == pytest.approx(50)
