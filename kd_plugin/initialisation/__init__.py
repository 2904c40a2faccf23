"""A student's first weights, taken from its teacher's layers and embeddings."""

from .pipeline import Asked, Made, make

__all__ = ["Asked", "Made", "make"]
