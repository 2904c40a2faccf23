"""What task and criterion share in reading fairseq's configuration."""

from typing import Any

CRITERION = "kd_label_smoothed_cross_entropy"


def choice_value(value: Any) -> str:
    """A ChoiceEnum's value: fairseq keeps it as a string or as an enum, depending on the way in."""
    return str(getattr(value, "value", value))
