"""Progress and memory, on systems that tell and on others."""

import mmap
import sys
from pathlib import Path

import pytest

from kd_plugin import timing
from kd_plugin.timing import memory, peak_memory, progress_bar


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="not Linux")
def test_memory_of_this_process():
    size = 1 << 26
    # not by malloc, which may hand out pages that are already this process's
    with mmap.mmap(-1, size) as block:
        before = memory("VmRSS")
        for page in range(0, size, mmap.PAGESIZE):
            block[page] = 1
        assert before + 0.9 * size < memory("VmRSS") <= peak_memory()
    assert memory("VmRS") is None


@pytest.mark.parametrize("platform, unit", [("linux", 1024), ("darwin", 1)])
def test_a_system_that_does_not_count_memory(monkeypatch, platform, unit):
    monkeypatch.setattr(timing, "Path", lambda _: Path("/nowhere"))
    monkeypatch.setattr(timing.sys, "platform", platform)
    assert memory("VmRSS") is None
    usage = timing.resource.getrusage(timing.resource.RUSAGE_SELF)
    assert peak_memory() >= usage.ru_maxrss * unit > 0


@pytest.mark.parametrize("terminal, seconds", [(True, 0.5), (False, 30)])
def test_progress_comes_often_on_a_terminal_alone(monkeypatch, terminal, seconds):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with progress_bar(9, "writing", "sentences", 4) as progress:
        assert progress.mininterval == seconds and (progress.total, progress.n) == (9, 4)
        assert progress.desc.startswith("writing") and progress.unit == "sentences"
