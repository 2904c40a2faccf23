"""What distillation costs on this machine: of the objective alone, and of whole training steps."""

from .machine import describe, peak_of_another_process
from .objective import objective_costs
from .steps import Steps
from .tables import memory_table, objective_table, step_tables

__all__ = [
    "Steps",
    "describe",
    "memory_table",
    "objective_costs",
    "objective_table",
    "peak_of_another_process",
    "step_tables",
]
