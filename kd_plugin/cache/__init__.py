"""A teacher's distributions on disk: run it once, train from them as often as you like."""

from .dataset import TaughtDataset, are_words, with_rows
from .fill import rows_of_batch
from .layout import CacheError, Describe, data_files, describe_data
from .pipeline import Asked, make, verify
from .reader import CachedSubset

__all__ = [
    "Asked",
    "CacheError",
    "CachedSubset",
    "Describe",
    "TaughtDataset",
    "are_words",
    "data_files",
    "describe_data",
    "make",
    "rows_of_batch",
    "verify",
    "with_rows",
]
