"""Every figure of a benchmark, shown as soon as it is measured: the whole may take long."""

import json
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional, Sequence

import torch
from tqdm import tqdm

from .machine import describe, peak_of_another_process
from .objective import objective_costs
from .steps import Steps
from .students import Students
from .tables import memory_table, objective_table, step_tables, students_table


class Asked(NamedTuple):
    """What is to be measured.

    Attributes:
        device: of the objective's tensors.
        repeats: rounds to measure.
        vocabularies: sizes to time the objective or students with; none leaves it out.
        rows: target tokens of the objective's batch.
        dtype: of its logits.
        every_divergence: time it also with the other divergences, and with top-k 8.
        steps: of the training to time; None leaves it out.
        peak_command: arguments of Python that, with the name of one of the steps' works behind
            them, print the peak memory of a process that does only this, in bytes.
        students: whose translations to time; instead of the objective.
        output: file to write the figures to, as JSON.
    """

    device: torch.device
    repeats: int = 9
    vocabularies: Sequence[int] = ()
    rows: int = 4096
    dtype: torch.dtype = torch.float32
    every_divergence: bool = False
    steps: Optional[Steps] = None
    peak_command: Sequence[str] = ()
    students: Optional[Students] = None
    output: Optional[str] = None


def make(asked: Asked) -> Dict[str, Any]:
    """Measure, print a table of each part, and write all figures.

    Returns:
        "machine" and, of what was asked for, "students", "objective", "steps" and "peak_memory",
        as plain types.

    Raises:
        UserError: fairseq cannot set up the training, or a student.
    """
    measured: Dict[str, Any] = {"machine": describe(asked.device)}
    machine = ", ".join(f"{name} {value}" for name, value in measured["machine"].items())
    print(machine + "\n", flush=True)
    for vocabulary in asked.vocabularies:
        if asked.students is not None:
            speeds = asked.students.speeds(vocabulary, asked.repeats)
            measured.setdefault("students", []).append(speeds)
            print(students_table(speeds), flush=True)
            continue
        costs = objective_costs(
            rows=asked.rows,
            vocabulary=vocabulary,
            repeats=asked.repeats,
            device=asked.device,
            dtype=asked.dtype,
            every_divergence=asked.every_divergence,
        )
        measured.setdefault("objective", []).append(costs)
        print(objective_table(costs), flush=True)
    if asked.steps is not None:
        measured["steps"] = asked.steps.costs(asked.repeats)
        print(step_tables(measured["steps"]), flush=True)
        measured["peak_memory"] = {
            name: peak_of_another_process([*asked.peak_command, name])
            for name in tqdm(measured["steps"]["costs"], desc="peak memory", unit="process")
        }
        print(memory_table(measured["peak_memory"]), flush=True)
    if asked.output:
        Path(asked.output).write_text(json.dumps(measured, indent=2) + "\n")
    return measured
