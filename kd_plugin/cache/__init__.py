"""A teacher's distributions on disk: run it once, train from them as often as you like."""

from .dataset import TaughtDataset
from .fill import fill, rows_of_batch, summary_lines
from .layout import CacheError, describe_data
from .reader import CachedSubset

__all__ = [
    "CacheError",
    "CachedSubset",
    "TaughtDataset",
    "describe_data",
    "fill",
    "rows_of_batch",
    "summary_lines",
]
