"""What a figure is measured on, and how much memory a work needs there."""

import gc
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Sequence

import fairseq
import numpy as np
import torch

from ..errors import UserError


def describe(device: torch.device) -> Dict[str, Any]:
    """What the figures depend on, as plain types."""
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fairseq": fairseq.__version__,
        "python": platform.python_version(),
    }


def peak_of_another_process(arguments: Sequence[str]) -> int:
    """The number that ``python ARGUMENTS`` prints last: the peak memory of its work, in bytes.

    What one work needs, another one in the same process would hide.
    """
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
    )
    if done.returncode != 0:
        # the reason is at the end; what is too long for a message is cut there
        raise UserError(f"measuring the peak memory failed:\n{done.stderr[-3000:].strip()}")
    return int(done.stdout.split()[-1])


def peak_allocated(work: Callable[[], None], device: torch.device) -> int:
    """The most bytes that the work's tensors hold at one time, of those it allocates itself."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    # The first work() leaves its gradient, which the second one frees: as much as it allocates
    freed = 0
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiled:
        work()
    events = profiled.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    if changes and changes[0] < 0:
        freed = -changes[0]
    return int(max(np.cumsum(changes), default=0)) + freed
