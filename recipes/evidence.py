"""The table of evidence.sh: python recipes/evidence.py WORK TGT, or evidence.py RUNS.

What the reports in WORK say of each run goes into WORK/runs/ROW-sSEED.npz: its figures, and the
statistics of each sentence of test that BLEU and chrF2 are computed from. Collect such files of
several machines in one folder, RUNS, for one table of them all. evidence.md and evidence.json are
written to WORK, or to RUNS.

Each row is the mean over seeds with its standard deviation; scores are sacreBLEU's. Against the row
plain, or another that BASELINE in the environment names, stands the p-value of a hierarchical
bootstrap over sentences and seeds together: each of its samples draws sentences, the same for both
rows, and seeds, for each row its own, both with replacement; p is twice the share of samples in
which the difference of the means has the other sign. Rows that end in -finetuned are compared with
plain-finetuned. evidence.json also has the mean of the p-values that sacreBLEU's paired bootstrap
gives each seed against its plain one.
"""

import json
import os
import re
import shlex
import statistics
import sys
from functools import partial
from pathlib import Path

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

SAMPLES = 4000
METRICS = ("BLEU", "chrF2")
BASELINE = os.environ.get("BASELINE", "plain")
FINETUNED = "-finetuned"  # have had more updates


def lines_of(path):
    with open(str(path), encoding="utf-8", newline="\n") as file:
        return [line.rstrip("\n") for line in file]


def last_validation(log):
    """The last validation's values in fairseq's json log, and the command of its first line."""
    text = log.read_text(encoding="utf-8")
    found = re.findall(r"\| valid \| (\{.*\})", text)
    return json.loads(found[-1]) if found else {}, text.split("\n", 1)[0]


def bytes_per_token(command):
    words = shlex.split(command)
    if "--teacher-cache" not in words:
        return None
    manifest = Path(words[words.index("--teacher-cache") + 1]) / "train" / "manifest.json"
    return json.loads(manifest.read_text())["summary"]["bytes_per_token"]


def collect(work, references, runs):
    """Writes a file for each run that a report has."""
    for report in sorted(work.glob("report-s*/report.json")):
        content = json.loads(report.read_text(encoding="utf-8"))
        tokenize = re.search(r"tok:([^|]+)", content["signatures"]["BLEU"]).group(1)
        found = {}
        for system in content["systems"]:
            if not system["scores"]:
                continue
            model = system["model"]
            one = found.setdefault(model, {"tokenize": tokenize})
            search = "greedy" if system["beam"] == 1 else "beam"
            for metric in METRICS:
                score = system["scores"][metric]
                one[f"{metric}, {search}"] = score["score"]
                one[f"p of sacreBLEU, {metric}, {search}"] = score.get("p")
            one[f"length, {search}"] = system["length_ratio"]
            if search == "beam":
                one["length, train"] = system["length_ratio_on_train"]
            differences = content["differences"].get(model)
            if differences:
                one["agreement"] = differences["all"]["agreement"]
                one["ends expected"] = differences["calibration"]["student"]["ends"]
            log = work / "models" / model / "train.log"
            if log.is_file():
                valid, command = last_validation(log)
                one["nll on valid"] = float(valid["valid_nll_loss"])
                one["updates"] = float(valid["valid_num_updates"])
                one["bytes per token"] = bytes_per_token(command)
        for model, one in found.items():
            lines = lines_of(report.parent / "translations" / (model + ".txt"))
            counts = {
                name: metric.statistics(lines)
                for name, metric in scores(references, tokenize).items()
            }
            np.savez_compressed(str(runs / model), figures=json.dumps(one), **counts)


def scores(references, tokenize):
    kinds = zip(METRICS, (partial(BLEU, tokenize=tokenize), CHRF))
    return {name: Scores(kind, references) for name, kind in kinds}


def read(runs):
    """By row's name, what is known of each of its seeds."""
    rows = {}
    for path in sorted(runs.glob("*.npz")):
        name, _, seed = path.stem.rpartition("-s")
        name, seed = (name, seed) if seed.isdigit() else (path.stem, "")
        with np.load(str(path)) as file:
            one = json.loads(str(file["figures"]))
            one["statistics"] = {metric: file[metric] for metric in METRICS}
        rows.setdefault(name, {})[seed] = one
    return rows


class Scores:
    """Corpus scores of samples of sentences, from their statistics."""

    def __init__(self, metric, references):
        self.metric = metric(references=references and [references])

    def statistics(self, lines):
        return np.array(self.metric._extract_corpus_statistics(lines, None), dtype=np.int32)

    def of(self, counts):
        return self.metric._compute_score_from_stats(list(counts)).score


def p_value(scores, ours, plain):
    """Of the hierarchical bootstrap, two-sided.

    Args:
        ours, plain: of each seed, the sentences' statistics.
    """
    n, signs = len(plain[0]), []
    generator = np.random.default_rng(1)  # anew, so that no other row makes a difference
    for _ in range(SAMPLES):
        sentences = np.bincount(generator.integers(n, size=n), minlength=n)
        means = []
        for systems in (ours, plain):
            drawn = generator.integers(len(systems), size=len(systems))
            means.append(statistics.mean(scores.of(sentences @ systems[i]) for i in drawn))
        signs.append(np.sign(means[0] - means[1]))
    low, high = (np.array(signs) <= 0).mean(), (np.array(signs) >= 0).mean()
    return min(1.0, max(2 * min(low, high), 1 / SAMPLES))


def table(rows):
    found = {name: {} for name in rows}
    tokenize = next(iter(next(iter(rows.values())).values()))["tokenize"]
    for metric, computed in scores(None, tokenize).items():
        kept = {
            name: [one["statistics"][metric] for one in seeds.values()]
            for name, seeds in rows.items()
        }
        for name in rows:
            baseline = BASELINE + (FINETUNED if name.endswith(FINETUNED) else "")
            if name != baseline and "" not in rows[name] and baseline in rows:
                p = p_value(computed, kept[name], kept[baseline])
                found[name][f"p, {metric}"] = p
    for name, seeds in rows.items():
        row = found[name]
        row["seeds"] = len(seeds)
        for key in next(iter(seeds.values())):
            values = [one[key] for one in seeds.values() if isinstance(one.get(key), float)]
            if values:
                row[key] = statistics.mean(values)
                row[key + ", spread"] = statistics.stdev(values) if len(values) > 1 else None
    return found


COLUMNS = {
    "BLEU, beam": "{:.2f}",
    "p, BLEU": "{:.3f}",
    "chrF2, beam": "{:.2f}",
    "p, chrF2": "{:.3f}",
    "BLEU, greedy": "{:.2f}",
    "chrF2, greedy": "{:.2f}",
    "length, beam": "{:.3f}",
    "length, greedy": "{:.3f}",
    "length, train": "{:.3f}",
    "ends expected": "{:.3f}",
    "nll on valid": "{:.3f}",
    "agreement": "{:.3f}",
    "bytes per token": "{:.1f}",
    "updates": "{:.0f}",
}


def markdown(found):
    lines = [
        "| row | seeds | " + " | ".join(COLUMNS) + " |",
        "|---|" + "---:|" * (len(COLUMNS) + 1),
    ]
    for name, row in sorted(found.items(), key=lambda pair: -pair[1]["BLEU, beam"]):
        cells = []
        for key, form in COLUMNS.items():
            text = "" if row.get(key) is None else form.format(row[key])
            if row.get(key + ", spread"):
                text += " ± " + form.format(row[key + ", spread"])
            cells.append(text)
        lines.append(f"| {name} | {row['seeds']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(folder, target=None):
    folder = Path(folder)
    runs = folder
    if target:
        runs = folder / "runs"
        runs.mkdir(exist_ok=True)
        collect(folder, lines_of(folder / "text" / f"test.{target}"), runs)
    found = table(read(runs))
    (folder / "evidence.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    text = markdown(found)
    (folder / "evidence.md").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main(*sys.argv[1:])
