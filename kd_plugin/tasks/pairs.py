"""Sentences of several pairs of languages, in batches that mix them.

fairseq numbers sentences within their pair. Here each has a number of its own on its way into a
batch, and the batch says of each sentence which pair it is of, and which sentence of that pair.
"""

from typing import Any, Dict, List

from fairseq import utils
from fairseq.data import BaseWrapperDataset
from fairseq.data.multilingual.multilingual_data_manager import MultilingualDatasetManager

from ..cache import TaughtDataset, with_rows
from ..teachers import Student


class PairDataset(BaseWrapperDataset):
    """The sentences of one pair of languages from one data folder.

    Args:
        dataset: fairseq's. In its place, ``self.dataset``, a source may put one that knows more of
            the samples; fairseq's own collates them.
        pair: its number, from 0; ``pairs``: how many there are.
        turn: the data folder's number, from 0.
    """

    def __init__(self, dataset: Any, pair: int, pairs: int, turn: int) -> None:
        super().__init__(dataset)
        self.pair, self.pairs, self.turn = pair, pairs, turn
        self._collater = dataset.collater

    def __getitem__(self, index: int) -> Dict[str, Any]:
        sample = self.dataset[index]
        return {**sample, "id": sample["id"] * self.pairs + self.pair}

    def collater(self, samples: List[Dict[str, Any]], **more: Any) -> Dict[str, Any]:
        return self._collater(samples, **more)


class PairsDataset(BaseWrapperDataset):
    """All pairs' sentences: what fairseq made of them, whose batches hold more.

    ``batch["pair"]`` is the number of each sentence's pair, int64 (B,), and ``batch["id"]`` its own
    within the pair; ``batch["teacher"]`` the cached rows, where all pairs have a cache.

    Args:
        dataset: fairseq's, with a ``PairDataset`` for each pair.
        student: the targets' tags and padding.
    """

    def __init__(self, dataset: Any, student: Student) -> None:
        super().__init__(dataset)
        parts = dataset.datasets
        self._pairs = parts[0].pairs
        self._taught = all(isinstance(part.dataset, TaughtDataset) for part in parts)
        self._targets = student.target.pad(), student.tags.longer[1]

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # there is none yet
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def collater(self, samples: List[Any], **more: Any) -> Dict[str, Any]:
        batch = self.dataset.collater(samples, **more)
        if not batch:
            return batch
        if self._taught:
            own = [sample[1] if isinstance(sample, tuple) else sample for sample in samples]
            batch = with_rows(batch, own, *self._targets)
        number = batch["id"]
        return {**batch, "id": number // self._pairs, "pair": number % self._pairs}


class PairsManager(MultilingualDatasetManager):
    """fairseq's, whose datasets of a pair say which pair and data folder they are of."""

    def load_a_dataset(self, *, data_path: str, src: str, tgt: str, **more: Any) -> PairDataset:
        dataset = super().load_a_dataset(data_path=data_path, src=src, tgt=tgt, **more)
        return PairDataset(
            dataset,
            self.lang_pairs.index(f"{src}-{tgt}"),
            len(self.lang_pairs),
            utils.split_paths(self.args.data).index(data_path),
        )

    def folders(self, pair: str, subset: str) -> List[str]:
        """The data folders that a pair is in: the first ones. Epochs go through them in turn."""
        key = self.get_dataset_key("main", *pair.split("-"))
        count = self.get_split_num_data_shards(subset).get(key)
        return utils.split_paths(self.args.data)[:count]
