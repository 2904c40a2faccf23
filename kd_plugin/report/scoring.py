"""How well a language model predicts a text, and at what cost: what its process does."""

import gc
import time
from argparse import Namespace
from typing import Any

import numpy as np
import torch

from ..checkpoints import Checkpoint, Role
from ..errors import UserError
from .blocks import TextInBlocks
from .compare import references
from .measured import Memory, Pass, facts
from .systems import Model, open_model, trained_for


class Scorer:
    """A language model with the text that it scores.

    Raises:
        UserError: it cannot be opened, does not fit the data, or reads no blocks as long as these.
    """

    def __init__(self, model: Model, role: Role, options: Namespace) -> None:
        self.data = data = TextInBlocks(options)
        trust, task = options.trust_checkpoint, trained_for(options)
        self._memory = Memory()
        checkpoints = [Checkpoint.open(path, role, trust) for path in model.paths]
        self.model = open_model(model, data.student, data.cfg, role=role, trust=trust, task=task)
        dtype = next(self.model.members[0].model.parameters()).dtype
        self.facts = facts(checkpoints, model.paths, dtype)
        del checkpoints
        longest = self.model.max_positions()[1]
        if longest < data.longest:
            raise UserError(
                f"{role.name} {':'.join(model.paths)} reads {data.kind.lengths(longest, longest)} "
                f"at most, and the longest block has {data.longest}. "
                + data.kind.shorten.format(longest, longest)
            )
        self.batches = list(data.batches())
        gc.collect()
        self._memory.forget_peak()

    @torch.no_grad()
    def decode(self, beam: int, pipe: Any) -> Pass:
        """The loss of each block, in bits.

        Args:
            beam: of no interest here.
        """
        blocks, dictionary = len(self.data.dataset), self.data.student.target
        nats, tokens = np.zeros(blocks), 0
        like = torch.zeros((), device=self.model.device)
        start = time.perf_counter()
        for batch in self.batches:
            answer = self.model(batch)
            for some in references(batch, dictionary, self.model.device):
                losses = answer.rows(some.rows, like).nll(some.symbol).double()
                np.add.at(nats, some.sentence.cpu().numpy(), losses.cpu().numpy())
                tokens += len(losses)
            pipe.send(("progress", (len(batch["id"]), blocks)))
        seconds = time.perf_counter() - start
        return Pass((nats / np.log(2)).tolist(), tokens, seconds)

    def memory(self) -> int:
        return self._memory.peak(self.model.device)
