"""Judge students: how good, at what cost, and where they still differ from the teacher."""

from .asked import Asked
from .examples import MOST as MOST_EXAMPLES
from .given import command as scoring_command
from .given import read_flags as read_scores
from .metrics import METRICS, USUAL, check
from .page import summary
from .pipeline import make
from .score import TESTS
from .systems import Model, kind_of_models, named, pick, read_models

__all__ = [
    "METRICS",
    "MOST_EXAMPLES",
    "TESTS",
    "USUAL",
    "Asked",
    "Model",
    "check",
    "kind_of_models",
    "make",
    "named",
    "pick",
    "read_models",
    "read_scores",
    "scoring_command",
    "summary",
]
