"""What distillation costs on this machine: of the objective alone, and of whole training steps.

And how fast a student will translate here.
"""

from .objective import objective_costs
from .pipeline import Asked, make
from .steps import Steps
from .students import Students

__all__ = ["Asked", "Steps", "Students", "make", "objective_costs"]
