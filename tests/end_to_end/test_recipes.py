"""The recipes from text to table, at toy size."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import CHECKOUT, SCRIPTS, Run

RECIPES = CHECKOUT / "recipes"
# of "At a glance", which is also printed
ROW = r"^\| (\w[\w-]+) \| \d+\.\d\d \| (?:[\d.]+ x|–) \|"


def run(recipe: str, work: Path, *arguments, **settings) -> Run:
    settings.update(
        SETUP="skip",
        VIRTUAL_ENV=sys.prefix,
        PATH=f"{SCRIPTS}:{os.environ['PATH']}",
        WORK=work,
        OMP_NUM_THREADS=1,
        # teachers of so few updates do not know where a sentence ends
        SEQUENCES_FLAGS="--no-filters --max-len-a 1 --max-len-b 5",
    )
    done = subprocess.run(
        ["bash", str(RECIPES / recipe), *map(str, arguments)],
        env={**os.environ, **{key: str(value) for key, value in settings.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
    )
    return Run(done.returncode, done.stdout)


def stages(work: Path, commands: str, *arguments, **settings) -> Run:
    """Commands of a recipe; the environment's own stay out of the way."""
    script = f"""set -euo pipefail
        SRC=aa TGT=bb WORK=$1 TMPDIR={work.parent}
        source '{RECIPES}/setup.sh' && source '{RECIPES}/stages.sh'
        command_of() {{ printf '%s\\n' "$@"; }}
        shift
        {commands}"""
    done = subprocess.run(
        ["bash", "-c", script, "bash", str(work), *map(str, arguments)],
        env={
            **os.environ,
            **{"SETUP": "skip", "VIRTUAL_ENV": sys.prefix, "KD_FLAGS": "--kd-[a-z]* x"},
            **{key: str(value) for key, value in settings.items()},
        },
        cwd=str(work.parent),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
    )
    return Run(done.returncode, done.stdout)


def test_folders_of_any_name(tmp_path):
    """Flags are one word each; a list of the user's is split into words, and nothing else."""
    work, teacher = tmp_path / "My Drive & [1]", tmp_path / "big | teacher.pt"
    (tmp_path / "--kd-other").touch()  # that a pattern would find
    printed = stages(work, 'distil_flags "$1"; printf \'%s\\n\' "${LOSS[@]}"', teacher).ok()
    assert printed.text.splitlines()[6:] == [
        *("--teacher-checkpoint-path", str(teacher), "--kd-[a-z]*", "x")
    ]
    models = work / "models" / "one"
    models.mkdir(parents=True)
    for name in ("checkpoint9.pt", "checkpoint10.pt", "checkpoint11.pt", "checkpoint_best.pt"):
        (models / name).touch()
    stages(work, "average one 2").ok()
    lines = (models / "average.log").read_text().splitlines()
    assert lines[:3] == ["export", "--path", f"{models}/checkpoint10.pt:{models}/checkpoint11.pt"]
    refused = stages(tmp_path / "a:b", "true")
    assert refused.code == 1 and "without : and ," in refused.text


def test_a_text_whose_last_line_is_not_ended(tmp_path):
    for lang, text in (("aa", "a\nb\nc"), ("bb", "a\nb\nc\n"), ("cc", "a\nb")):
        (tmp_path / f"train.{lang}").write_text(text)
    use = 'use_text train "$1"'
    stages(tmp_path / "work", use, tmp_path / "train").ok()
    assert (tmp_path / "work" / "text" / "train.aa").read_text() == "a\nb\nc"
    refused = stages(tmp_path / "other", "TGT=cc; " + use, tmp_path / "train")
    assert refused.code == 1 and "got 3 and 2" in refused.text


def test_sizes_of_students(tmp_path):
    """tiny, small and base, or a file of one's own, before STUDENT_FLAGS, which win."""
    for name in ("tiny", "small", "base"):
        printed = stages(tmp_path / "work", "echo $STUDENT_FLAGS", PRESET=name).ok()
        assert printed.text.split() == (RECIPES / f"presets/{name}.flags").read_text().split()
    own = tmp_path / "own.flags"
    own.write_text("--arch lstm  # nothing else\n")
    both = {"PRESET": own, "STUDENT_FLAGS": "--lr 1"}
    printed = stages(tmp_path / "work", "echo $STUDENT_FLAGS", **both).ok()
    assert printed.text.split() == ["--arch", "lstm", "--lr", "1"]
    refused = stages(tmp_path / "work", "true", PRESET="huge")
    assert refused.code == 1 and "expected PRESET=tiny, small, base or a file" in refused.text


def with_int8(models, *exported):
    if importlib.util.find_spec("ctranslate2"):
        models = [*models, *(name + "-int8" for name in exported)]
    return models


@pytest.mark.slow
def test_the_quick_start(tmp_path):
    tmp_path = tmp_path / "My Drive & [1]"
    sizes = dict(SIZE=500, HELD_OUT=24, VOCAB=300, TEACHER_UPDATES=30, STUDENT_UPDATES=3)
    sizes.update(TEACHER_DIM=32, STUDENT_DIM=16, MAX_TOKENS=4000, KD_CACHE=4)

    done = run("quickstart.sh", tmp_path, **sizes).ok()
    students = ["plain", "word_level", "sequence_level"]
    expected = ["teacher", *(name + "_student" for name in students)]
    expected = with_int8(expected, expected[-1])
    assert re.findall(ROW, done.text, re.MULTILINE) == expected
    report = (tmp_path / "report" / "report.md").read_text()
    assert re.findall(ROW, report.split("## Quality")[0], re.MULTILINE) == expected
    assert "against plain_student" in report
    # again: every stage has its result
    again = run("quickstart.sh", tmp_path, **sizes).ok()
    work = "^(training|translating|binarising|exporting|opening) "
    assert re.search(work, done.text, re.MULTILINE)
    assert not re.search(work, again.text, re.MULTILINE)
    assert (tmp_path / "report" / "report.md").read_text() == report


def test_summaries(tmp_path):
    sizes = dict(SIZE=300, HELD_OUT=16, VOCAB=250, TEACHER_UPDATES=16, STUDENT_UPDATES=3)
    sizes.update(TEACHER_DIM=32, STUDENT_DIM=16, MAX_TOKENS=8000, MAX_SOURCE=60, KD_CACHE=4)
    if importlib.util.find_spec("rouge_score"):
        sizes["METRICS"] = "rouge bleu"
    else:
        sizes["METRICS"] = "chrf bleu"
    done = run("summarise.sh", tmp_path, **sizes).ok()
    expected = ["teacher", "plain", "word_level", "sequence_level"]
    assert re.findall(ROW, done.text, re.MULTILINE) == expected
    first = "ROUGE-1" if sizes["METRICS"].startswith("rouge") else "chrF2"
    assert f"| model | {first} | speed-up |" in done.text
    documents = (tmp_path / "text" / "train.document").read_text().splitlines()
    lengths = [len(line.split()) for line in (tmp_path / "text/train.summary").open()]
    assert sum(len(line.split()) for line in documents) > 3 * sum(lengths)
    again = run("summarise.sh", tmp_path, **sizes).ok()
    assert not re.search("^(training|translating|binarising) ", again.text, re.MULTILINE)


def test_the_table_of_evidence(tmp_path):
    """Two seeds each of rows that translate all right or half, and of what they stand against."""
    references = [f"the {word} sees a {other}" for word in "abcdefgh" for other in "klmn"]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "test.en").write_text("".join(line + "\n" for line in references))
    scores = {"right": (100, 100), "half": (50, 54), "plain": (48, 52)}
    scores.update({"right-finetuned": (99, 99), "plain-finetuned": (98, 98)})  # the same sentences
    for seed in (1, 2):
        folder = tmp_path / f"report-s{seed}"
        (folder / "translations").mkdir(parents=True)
        systems, differences = [], {}
        for name, bleu in scores.items():
            right = name == "right" or name.endswith("-finetuned")
            wrong = 0 if right else len(references) // 2
            lines = ["it is not here"] * wrong + references[wrong:]
            lines = lines[seed:] + lines[:seed] if name == "plain" else lines
            model = f"{name}-s{seed}"
            (folder / "translations" / f"{model}.txt").write_text("\n".join(lines) + "\n")
            one = {"score": float(bleu[seed - 1]), "p": 0.5}
            systems.append({"model": model, "beam": 5, "length_ratio": 0.9})
            systems[-1]["length_ratio_on_train"] = None
            systems[-1]["scores"] = {"BLEU": one, "chrF2": one}
            differences[model] = {"all": {"agreement": 0.25 * seed}}
            differences[model]["calibration"] = {"student": {"ends": 1.0}}
        content = {"systems": systems, "differences": differences}
        content["signatures"] = {"BLEU": "BLEU nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp"}
        (folder / "report.json").write_text(json.dumps(content))
    evidence = [sys.executable, str(RECIPES / "evidence.py"), str(tmp_path), "en"]
    shown = subprocess.run(evidence, check=True, stdout=subprocess.PIPE, universal_newlines=True)
    found = json.loads((tmp_path / "evidence.json").read_text())
    rows = [line.split(" | ") for line in shown.stdout.splitlines()[2:]]
    names = ["| right", "| right-finetuned", "| plain-finetuned", "| half", "| plain"]
    assert [row[0] for row in rows] == names
    assert found["half"]["BLEU, beam"] == 52 and found["half"]["seeds"] == 2
    assert found["half"]["BLEU, beam, spread"] == pytest.approx(8**0.5)
    assert found["half"]["agreement"] == pytest.approx(0.375)
    for metric in ("BLEU", "chrF2"):
        assert found["right"][f"p, {metric}"] == 1 / 4000 and f"p, {metric}" not in found["plain"]
        assert found["right-finetuned"][f"p, {metric}"] == 1
    # the same of the runs' files alone, without the text
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(str(tmp_path / "runs"), str(elsewhere))
    subprocess.run([*evidence[:2], str(elsewhere)], check=True, stdout=subprocess.PIPE)
    assert json.loads((elsewhere / "evidence.json").read_text()) == found


@pytest.fixture(scope="module")
def text(long, tmp_path_factory) -> Path:
    """What the quick start makes, as if it were a corpus of somebody's."""
    if not long:
        pytest.skip("minutes; with --long")
    folder = tmp_path_factory.mktemp("corpus") / "text"
    corpus = [sys.executable, str(RECIPES / "corpus.py"), str(folder), "--src", "de", "--tgt", "en"]
    subprocess.run([*corpus, "--size", "800", "--held-out", "48"], check=True)
    return folder


def test_multi30k(text, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for split, name in (("train", "train"), ("valid", "val"), ("test", "test_2016_flickr")):
        for lang in ("de", "en"):
            shutil.copy(str(text / f"{split}.{lang}"), str(corpus / f"{name}.{lang}"))
    flags = "--max-update 40 --lr 0.005 --warmup-updates 10"
    done = run("multi30k.sh", tmp_path, corpus, VOCAB=500, TRAIN_FLAGS=flags, KD_CACHE=4).ok()
    students = ["plain", "distilled", "best", "closest", "closest_word", "mixed"]
    expected = with_int8(["teacher", *students], "mixed")
    assert list(dict.fromkeys(re.findall(ROW, done.text, re.MULTILINE))) == expected


def test_iwslt14(text, tmp_path):
    flags = "--encoder-embed-dim 32 --decoder-embed-dim 32 --lr 0.01 --warmup-updates 10"
    sizes = dict(AVERAGE=2, MAX_TOKENS=500, TEACHER_UPDATES=60, STUDENT_UPDATES=60)
    done = run("iwslt14_de_en.sh", tmp_path, text, TRAIN_FLAGS=flags, **sizes).ok()
    expected = with_int8(["teacher", "plain", "distilled", "sequences"], "distilled")
    assert re.findall(ROW, done.text, re.MULTILINE) == expected
