"""The report's page in a browser, on a desk and on a phone."""

import copy
import json

import browser
import pytest
from test_report import a_report

from kd_plugin.report import pipeline

pytestmark = pytest.mark.skipif(browser.found() is None, reason="no Chromium")

WIDE = """Array.from(document.querySelectorAll("table"),
    (table) => table.parentElement.scrollWidth - table.parentElement.clientWidth)"""
PAGE = "document.documentElement.scrollWidth - innerWidth"
NUMBERS = """Array.from(document.querySelectorAll(".sentences tbody"),
    (body) => +body.querySelector("th").textContent.match(/\\d+/)[0])"""
HIDDEN = 'document.querySelector(".order").hidden'
CHOOSE = """(order, reversed) => {
    const select = document.querySelector(".order select");
    select.selectedIndex = order;
    select.dispatchEvent(new Event("change"));
    const box = document.querySelector(".order input");
    if (box.checked !== reversed) box.click();
}"""
TEXT = """The committee of the European Parliament, which had been meeting since Monday, postponed
its decision. """


def many():
    """A report with much to show: names, metrics, systems, sentences."""
    report = a_report()
    report["metrics"] += [
        {
            **{"name": name, "source": "given", "lower_is_better": False, "at_a_glance": True},
            "decimals": 4,
        }
        for name in ("ROUGE-1", "ROUGE-2", "ROUGE-L", "COMET", "MetricX")
    ]
    for metric in report["metrics"]:
        report["signatures"][metric["name"]] = "x:" + "y" * 300
        for system in report["systems"][:2]:
            system["scores"][metric["name"]] = system["scores"]["BLEU"]
    name = "a-student-with-a-name_that-says_what_it-was-trained-on.v2"
    for model in range(6):
        system = copy.deepcopy(report["systems"][1])
        system["name"] = f"{name}{model}, greedy"
        report["systems"].append(system)
    report["models"].append({**report["models"][1], "name": name})
    report["differences"][name] = copy.deepcopy(report["differences"]["s|t"])
    (first,) = report["examples"]["rows"]
    rows = []
    for number, kl, worse in ((3, 4.0, 1.5), (8, 2.0, None), (5, 1.0, -20.0), (9, 0.5, 0.0)):
        row = copy.deepcopy(first)
        row.update(number=number, source=TEXT * number, reference="x" * 400)
        row["keys"] = [-kl, worse]
        rows.append(row)
    report["examples"]["rows"] = rows
    curve = {"nll_loss": [(1, 2.0), (2, 1.0)], "kd_loss": [(1, 2.0)], "agreement": [(1, 0.5)]}
    report["curves"]["student"]["valid"] = curve
    return report


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    pipeline._write(many(), folder)
    with browser.browser(folder / "profile") as page:
        yield page, folder / "report.html"


def test_on_a_desk_nothing_scrolls_sideways(shown):
    page, file = shown
    page.open(file, 1280)
    assert page.value(PAGE) <= 0
    assert set(page.value(WIDE)) == {0}


def test_on_a_phone_pictures_can_be_read(shown):
    page, file = shown
    page.open(file, 390)
    assert page.value(PAGE) <= 0
    sizes = page.value("Array.from(document.images, (i) => [i.width, i.naturalWidth])")
    assert len(sizes) == 8
    for width, natural in sizes:
        assert 320 < width <= 390
        assert 10 / 72 * 150 * width / natural > 9  # letters of 10 points, in pixels
    # what a system says has the page's width, and its numbers stand below
    wide = page.value('document.querySelector(".sentences .text").getBoundingClientRect().width')
    assert wide > 320


def test_sentences_are_put_in_order(shown):
    page, file = shown
    page.open(file, 1280)
    assert page.value(HIDDEN) is False
    for order, back, expected in (
        (0, False, [3, 8, 5, 9]),  # by divergence
        (1, False, [5, 9, 3, 8]),  # where nothing can be compared, last
        (1, True, [3, 9, 5, 8]),
        (2, False, [3, 5, 8, 9]),
        (2, True, [9, 8, 5, 3]),
    ):
        page.value(f"({CHOOSE})({order}, {json.dumps(back)})")
        assert page.value(NUMBERS) == expected, (order, back)


def test_without_scripts_the_same_sentences_are_there(shown):
    page, file = shown
    text = 'document.querySelector(".sentences").textContent.split(/\\s+/).join("")'
    page.open(file, 1280)
    with_scripts = page.value(text)
    page.open(file, 1280, scripts=False)
    assert page.value(HIDDEN) is True
    assert page.value(NUMBERS) == [3, 8, 5, 9] and page.value(text) == with_scripts


def test_no_other_script_runs_and_nothing_is_fetched(shown, tmp_path):
    """Even if a text were not escaped."""
    page, file = shown
    content = file.read_text(encoding="utf-8")
    evil = "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'>"
    (tmp_path / "evil.html").write_text(content.replace("</h1>", "</h1>" + evil), encoding="utf-8")
    page.open(tmp_path / "evil.html", 1280)
    assert page.value("window.ran === undefined") and page.value(HIDDEN) is False
