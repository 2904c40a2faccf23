"""Blocks of text: what a report of language models says of them."""

from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
from fairseq import tasks, utils

from .. import decoding
from ..cache.layout import data_files
from ..checkpoints import LANGUAGE_MODEL
from ..errors import UserError
from ..files import digest, read_whole, reading_binarised
from ..tasks.language_modeling import as_student, describe_blocks, refuse_blocks
from .asked import Asked, Judged, Results, TestSet, Worth
from .systems import System, configuration

PERPLEXITY = "perplexity"


class TextInBlocks(TestSet):
    """A text, cut into blocks as fairseq-eval-lm does.

    Args:
        options: fairseq's flags, parsed.

    Raises:
        UserError: the data cannot be read, or blocks cannot be made.
    """

    kind = LANGUAGE_MODEL
    speed = "tokens_per_second"
    kinds = ("frequency", "position", "entropy")  # most blocks are of one length

    def __init__(self, options: Namespace) -> None:
        self.cfg = cfg = configuration(options)
        utils.import_user_module(cfg.common)
        refuse_blocks(cfg.task)
        self.subset, self.bins = cfg.dataset.gen_subset, decoding.DataBin(cfg.task.data, "", "")
        self.folder = self.bins.folder
        try:
            self.task = tasks.setup_task(cfg.task)
            with reading_binarised(self.folder / self.subset):
                self.task.load_dataset(self.subset)
                self.dataset = self.task.dataset(self.subset)
                read_whole(self.dataset)
        except UserError:
            raise
        except Exception as error:  # fairseq's may be a bare one
            raise UserError(
                f"{self.folder}: the subset {self.subset!r} of fairseq-preprocess --only-source "
                f"cannot be read ({error or repr(error)})"
            ) from error
        self.student = as_student(self.task, cfg.task)

    @property
    def longest(self) -> int:
        """Tokens of the longest block, as a model reads it."""
        return int(np.max(self.dataset.sizes, initial=0)) + bool(self.cfg.task.add_bos_token)

    def describe(self, asked: Asked) -> Dict[str, Any]:
        return {
            "blocks": len(self.dataset),
            "cut": describe_blocks(self.cfg.task),
            "doubts": [],
        }

    def settings(self) -> Dict[str, Any]:
        files = data_files(str(self.folder), self.subset, False, [""])
        return {
            "subset": self.subset,
            "files": {Path(name).name: digest(name) for name in files},
            "dictionary": digest(str(self.bins.dictionary_files()[0])),
            "outputs": len(self.student.target),
            **describe_blocks(self.cfg.task),
        }

    def notes(self, results: Results) -> List[str]:
        return []

    def judge(self, results: Results, baseline: System) -> Judged:
        metric = {"source": "the task", "lower_is_better": True, "at_a_glance": True, "decimals": 2}
        rows = {}
        for system in results.systems():
            tokens = results.measured[system.model.name].tokens[system.beam]
            loss = sum(results.outcomes(system)) / tokens
            rows[system.name] = {"scores": {PERPLEXITY: {"score": 2**loss}}, "loss": loss}
        signature = "2 to the power of the loss in bits per token, as fairseq-eval-lm's"
        return Judged([{"name": PERPLEXITY, **metric}], {PERPLEXITY: signature}, rows, {})

    def batches(self, limits: Sequence[Tuple[int, int]] = ()) -> Iterator[Dict[str, Any]]:
        plan = decoding.plan(
            *(self.task, self.dataset, [self.longest]),  # what is too long for a model, it refuses
            max_tokens=self.cfg.dataset.max_tokens,
            max_sentences=self.cfg.dataset.batch_size,
            required_multiple=self.cfg.dataset.required_batch_size_multiple,
            seed=self.cfg.common.seed,
        )
        for numbers in plan:
            batch = self.dataset.collater([self.dataset[int(i)] for i in numbers])
            if self.cfg.task.add_bos_token:  # which begins the target, too, and counts for nobody
                batch["target"][:, 0] = self.student.target.pad()
            yield batch

    def training_set(self) -> Optional[Any]:
        return self.bins.side("train", "")

    def worth(self, results: Results) -> List[Worth]:
        losses = {system.name: results.outcomes(system) for system in results.systems()}
        return [Worth("loss, bits", True, 2, losses)]
