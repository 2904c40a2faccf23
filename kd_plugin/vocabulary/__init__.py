"""A student's own vocabulary, cut out of its teacher's: the pieces that its text needs."""

from .pipeline import Asked, make, read_record, summary_lines
from .subwords import SubwordModel

__all__ = ["Asked", "SubwordModel", "make", "read_record", "summary_lines"]
