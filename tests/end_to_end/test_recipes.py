"""The recipes from text to table, at toy size."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import CHECKOUT, SCRIPTS, Run

RECIPES = CHECKOUT / "recipes"
# of "At a glance", which is also printed
ROW = r"^\| (\w[\w-]+) \| \d+\.\d\d \| (?:[\d.]+ x|–) \|"


def run(recipe: str, work: Path, *arguments, **settings) -> Run:
    # teachers of so few updates do not know where a sentence ends
    ends = "--max-len-a 1 --max-len-b 5"
    settings = dict(
        SETUP="skip",
        VIRTUAL_ENV=sys.prefix,
        PATH=f"{SCRIPTS}:{os.environ['PATH']}",
        WORK=work,
        OMP_NUM_THREADS=1,
        SEQUENCES_FLAGS="--no-filters " + ends,
        REPORT_FLAGS=ends + " --repeats 1",
        **settings,
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


# Says each letter as a tone, in the files and with the flags of espeak-ng
ESPEAK = """#!{python}
import array, math, sys, wave
flags = dict(zip(sys.argv[1:7:2], sys.argv[2:8:2]))
if flags["-v"] == "nobody" or sys.argv[7:] != ["--stdin"]:
    sys.exit("Error: The specified espeak-ng voice does not exist.")
samples, length = array.array("h"), 200000 // int(flags["-s"])
for letter in sys.stdin.read():
    pitch = (ord(letter) - 90) * 60 / 16000
    samples.extend(int(9000 * math.sin(math.tau * pitch * t)) for t in range(length))
with wave.open(flags["-w"], "wb") as file:
    file.setparams((1, 2, 16000, 0, "NONE", ""))
    file.writeframes(samples.tobytes())
"""


@pytest.fixture
def spoken(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "espeak-ng").write_text(ESPEAK.format(python=sys.executable))
    (tmp_path / "bin" / "espeak-ng").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    spec = importlib.util.spec_from_file_location("spoken", str(RECIPES / "spoken.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_features_are_kaldis(spoken):
    """Of noise, against torchaudio's where that fits torch; of a tone, by where its energy is."""
    noise = (3000 * np.random.RandomState(0).randn(8000)).astype("float32")
    with contextlib.suppress(ImportError, OSError):
        from torchaudio.compliance import kaldi

        expected = kaldi.fbank(torch.from_numpy(noise)[None], num_mel_bins=80)
        np.testing.assert_allclose(spoken.fbank(noise, 16000), expected.numpy(), rtol=1e-3)
    found = spoken.fbank(5000 * np.sin(2 * np.pi * 1000 * np.arange(8000) / 16000), 16000)
    assert found.shape == (1 + (8000 - 400) // 160, 80) and found.dtype == np.float32
    # on the mel scale, from 20 Hz to 8 kHz
    low, high, tone = (1127 * np.log(1 + hertz / 700) for hertz in (20, 8000, 1000))
    assert set(found.argmax(1)) <= {round((tone - low) / (high - low) * 81) - 1}


def test_what_is_said_is_listed(spoken, tmp_path):
    for split, lines in (("train", "Guten Tag!\n\nEs geht's.\n"), ("valid", "a\n"), ("test", "b")):
        (tmp_path / f"{split}.txt").write_text(lines)
    spoken.say(str(tmp_path), str(tmp_path / "data"), "de", "100 200")
    rows = [row.split("\t") for row in (tmp_path / "data/train.tsv").read_text().splitlines()]
    assert [row[3] for row in rows] == ["tgt_text", "guten tag", "es geht's"]
    for _, audio, frames, _, voice in rows[1:]:
        assert len(np.load(str(tmp_path / "data" / audio))) == int(frames) and voice == "de"
    with pytest.raises(SystemExit, match="-ng -v nobody .* does not say 'guten tag': .*not exist"):
        spoken.say(str(tmp_path), str(tmp_path / "other"), "nobody", "100")
    assert not list((tmp_path / "other").rglob("*.npy"))


def test_speech(long, spoken, tmp_path):
    if not long:
        pytest.skip("three trainings; with --long")
    sizes = dict(SIZE=40, HELD_OUT=8, VOCAB=50, TEACHER_UPDATES=4, STUDENT_UPDATES=2)
    sizes.update(TEACHER_DIM=16, STUDENT_DIM=8, KD_CACHE=4, METRICS="chrf")
    if importlib.util.find_spec("jiwer"):
        sizes["METRICS"] = "wer"
    done = run("speech.sh", tmp_path / "work", REPORT_FLAGS="--max-len-b 9", **sizes).ok()
    assert re.findall(ROW, done.text, re.MULTILINE) == ["teacher", "plain", "distilled"]
    again = run("speech.sh", tmp_path / "work", REPORT_FLAGS="--max-len-b 9", **sizes).ok()
    assert not re.search("^(training|speaking) ", again.text, re.MULTILINE)
    # as a folder of recordings, of which one file is missing
    (tmp_path / "work/data-bin/test.tsv").unlink()
    lacking = run("speech.sh", tmp_path / "other", tmp_path / "work/data-bin", **sizes)
    assert lacking.code == 1 and "data-bin/test.tsv beside" in lacking.text


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
