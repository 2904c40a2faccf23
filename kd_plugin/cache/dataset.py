"""Join a batch with the teacher's cached answers about its sentences."""

from typing import Any, Dict, List, Sequence

import numpy as np
import torch
from fairseq.data import BaseWrapperDataset

from .layout import CacheError
from .reader import CachedSubset


def are_words(target: torch.Tensor, pad: int, tags: int) -> torch.Tensor:
    """Which symbols of targets (B, T) have rows in a cache, bool (B, T): no padding, also not in
    the text, and not the tags that a target may begin with, which a teacher need not know.

    Args:
        tags: how many.
    """
    real = target.ne(pad)
    return real & (real.cumsum(1) > tags) if tags else real


def target_tokens(dataset: Any, sentence: Any, pad: int, tags: int = 0) -> np.ndarray:
    """The symbols of a sentence's target that have rows."""
    target = getattr(dataset, "tgt", None)  # of sentence pairs; reads no source
    symbols = dataset[int(sentence)]["target"] if target is None else target[int(sentence)]
    symbols = symbols.numpy()
    return symbols[symbols != pad][tags:]


def target_sizes(dataset: Any) -> np.ndarray:
    """Target tokens of each sentence, or block of text, with padding symbols in it."""
    if hasattr(dataset, "tgt_sizes"):
        return np.asarray(dataset.tgt_sizes)
    sizes = np.asarray(dataset.sizes)
    if sizes.ndim > 1:  # of source and target
        return sizes[:, 1]
    return sizes + bool(dataset.add_bos_token)  # which fairseq does not count


def with_rows(
    batch: Dict[str, Any], samples: Sequence[Dict[str, Any]], pad: int, tags: int = 0
) -> Dict[str, Any]:
    """A batch with the cached rows of the samples that it was collated from.

    ``batch["teacher"]`` is a plain dict of integer and float16 tensors with one row for each target
    token of ``are_words``, in the batch's order.

    Args:
        samples: of a ``TaughtDataset``, in any order; their ids are the batch's.
        tags: how many each target begins with.

    Raises:
        CacheError: a sentence has a different number of rows than target tokens.
    """
    rows = {sample["id"]: sample["teacher"] for sample in samples}
    # the collater orders sentences by length
    ordered = [rows[sentence] for sentence in batch["id"].tolist()]
    if not all(len(parts["reference"]) for parts in ordered):
        return batch  # outside training, which is refused where there are such sentences
    teacher = {name: np.concatenate([parts[name] for parts in ordered]) for name in ordered[0]}
    tokens = int(are_words(batch["target"], pad, tags).sum())
    if len(teacher["reference"]) != tokens:
        raise CacheError(
            f"the batch of the sentences {batch['id'].tolist()} has {tokens} target tokens, "
            f"the cache {len(teacher['reference'])} rows: make the cache again"
        )
    # torch has no unsigned integers of two and four bytes
    signed = {"u2": np.int32, "u4": np.int64}
    found = {
        name: torch.from_numpy(array.astype(signed.get(array.dtype.str[1:], array.dtype)))
        for name, array in teacher.items()
    }
    return {**batch, "teacher": found}


class TaughtDataset(BaseWrapperDataset):
    """A dataset whose samples hold their cached rows, and its batches theirs: ``with_rows``.

    Args:
        tags: how many each target begins with.

    Raises:
        CacheError: a sentence has a different number of rows than target tokens.
    """

    def __init__(self, dataset: Any, cache: CachedSubset, pad: int, tags: int = 0) -> None:
        super().__init__(dataset)
        self.cache, self._targets = cache, (pad, tags)
        lengths = cache.lengths()
        if len(lengths) != len(dataset):
            raise CacheError(
                f"the cache {cache.folder} holds {len(lengths)} sentences, the data {len(dataset)}"
            )
        # no rows: the teacher could not read it
        suspect = np.flatnonzero((lengths != target_sizes(dataset) - tags) & (lengths > 0))
        wrong = [i for i in suspect if lengths[i] != len(target_tokens(dataset, i, pad, tags))]
        if wrong:
            cache.verify_offsets()  # damage is the likelier reason
            raise CacheError(
                f"the cache {cache.folder} has a different number of rows than the data has target "
                f"tokens for {len(wrong)} sentences, the first of them number {wrong[0]}"
            )
        self.has_rows = lengths > 0

    # What some datasets have and others have not

    @property
    def src_sizes(self) -> np.ndarray:
        return self.dataset.src_sizes

    @property
    def tgt_sizes(self) -> np.ndarray:
        return self.dataset.tgt_sizes

    @property
    def lengths_read(self) -> np.ndarray:
        return self.dataset.lengths_read

    @property
    def add_bos_token(self) -> bool:
        return self.dataset.add_bos_token

    def __getitem__(self, index: int) -> Dict[str, Any]:
        return {**self.dataset[index], "teacher": self.cache.rows(index)}

    def collater(self, samples: List[Dict[str, Any]], *args: Any, **kwargs: Any) -> Dict[str, Any]:
        batch = self.dataset.collater(samples, *args, **kwargs)
        return with_rows(batch, samples, *self._targets) if batch else batch
