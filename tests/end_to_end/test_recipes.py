"""The quick start from its corpus to its table, at toy size."""

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
    table = (tmp_path / "table.md").read_text()
    assert table in done.stdout
    students = ("plain", "word level", "sequence level", "sequence and word level")
    rows = re.findall(r"^\| ([a-z ]+) \| [\d,]+ \| \d+\.\d\d \|", table, re.MULTILINE)
    assert rows == ["teacher", *(name + " student" for name in students)]
    # again: every stage has its result
    again = run()
    assert again.returncode == 0, again.stdout[-5000:]
    assert not re.search("^(training|translating|binarising) ", again.stdout, re.MULTILINE)
    assert (tmp_path / "table.md").read_text() == table
