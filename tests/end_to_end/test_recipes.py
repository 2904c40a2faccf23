"""The quick start from its corpus to its table, at toy size."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import support


@pytest.mark.slow
def test_the_quick_start(tmp_path):
    sizes = dict(SIZE=500, HELD_OUT=24, VOCAB=300, TEACHER_UPDATES=30, STUDENT_UPDATES=3)
    sizes.update(TEACHER_DIM=32, STUDENT_DIM=16, MAX_TOKENS=4000, KD_CACHE=4)
    how = dict(SETUP="skip", VIRTUAL_ENV=sys.prefix, WORK=tmp_path, OMP_NUM_THREADS=1)
    how.update(
        SEQUENCES_FLAGS="--no-filters", PATH="{}:{}".format(support.SCRIPTS, os.environ["PATH"])
    )
    settings = {key: str(value) for key, value in {**sizes, **how}.items()}

    def run():
        return subprocess.run(
            ["bash", str(support.CHECKOUT / "recipes" / "quickstart.sh")],
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
        )

    done = run()
    assert done.returncode == 0, done.stdout[-5000:]
    students = ["plain", "word_level", "sequence_level", "sequence_and_word_level"]
    expected = ["teacher", *(name + "_student" for name in students)]
    if importlib.util.find_spec("ctranslate2"):
        expected.append(expected[-1] + "-int8")
    row = r"^\| (\w[\w-]+) \| \d+\.\d\d \| (?:[\d.]+ x|–) \|"
    assert re.findall(row, done.stdout, re.MULTILINE) == expected
    report = (tmp_path / "report" / "report.md").read_text()
    assert re.findall(row, report.split("## Quality")[0], re.MULTILINE) == expected
    assert "against plain_student" in report
    # again: every stage has its result
    again = run()
    assert again.returncode == 0, again.stdout[-5000:]
    work = "^(training|translating|binarising|exporting|opening) "
    assert re.search(work, done.stdout, re.MULTILINE)
    assert not re.search(work, again.stdout, re.MULTILINE)
    assert (tmp_path / "report" / "report.md").read_text() == report
