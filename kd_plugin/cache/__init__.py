"""A teacher's distributions on disk: run it once, train from them as often as you like."""

from .dataset import TaughtDataset
from .fill import rows_of_batch
from .layout import CacheError, Describe, describe_data
from .pipeline import Asked, make, verify
from .reader import CachedSubset

__all__ = [
    "Asked",
    "CacheError",
    "CachedSubset",
    "Describe",
    "TaughtDataset",
    "describe_data",
    "make",
    "rows_of_batch",
    "verify",
]
