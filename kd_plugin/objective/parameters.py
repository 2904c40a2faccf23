"""A number that the user chooses: its flag, default, range and help, described once."""

from typing import Any, Callable, NamedTuple


class Parameter(NamedTuple):
    """One number of a divergence or of a selection.

    The command line's field, its help and the refusal of a value out of range come from here.
    """

    flag: str
    keyword: str  # of the function that takes it
    default: Any
    valid: Callable[[Any], bool]
    expected: str  # the range, as it follows "must be"
    meaning: str

    @property
    def field(self) -> str:
        """The name of the flag's field in a configuration."""
        return self.flag.lstrip("-").replace("-", "_")

    @property
    def help(self) -> str:
        return f"{self.meaning}, {self.expected} (default: {self.default})"
