"""What distillation costs on this machine: of the objective alone, and of whole training steps."""

from .objective import objective_costs
from .pipeline import Asked, make
from .steps import Steps

__all__ = ["Asked", "Steps", "make", "objective_costs"]
