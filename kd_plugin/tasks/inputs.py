"""Decoder inputs that the student writes.

In training the decoder reads references, in use what it wrote itself so far. Here it writes the
inputs of a share of training's batches, and the teacher, asked about the same words, says what
should follow each: so the student learns to go on from its own mistakes.

- ``argmax`` takes the student's likeliest symbol at each position of the reference, from one pass
  without gradient (the iteration of Zhang et al., ACL 2023, "Towards Understanding and Improving
  Knowledge Distillation for Neural Machine Translation"). Not a translation: each symbol follows
  the reference's, not the student's own.
- ``sample`` draws translations, symbol by symbol (Agarwal et al., ICLR 2024, "On-Policy
  Distillation of Language Models").

Tokens of languages at the beginning stay as they are, and are written nowhere else.

The student writes in eval mode, without dropout, as it is used.
"""

import contextlib
import math
from typing import Any, Dict, Tuple

import numpy as np
import torch
import torch.distributed as dist
from fairseq import search
from fairseq.data import data_utils
from fairseq.sequence_generator import SequenceGenerator
from torch import Tensor

from ..plan import Inputs
from ..teachers import Step


class StudentInputs:
    """Lets the student write the inputs of a share of training's batches.

    Whether it does depends on the seed, the update and the number of the batch within it, and on
    nothing else: all ranks do the same, and a resumed training does what it would have done. The
    random numbers of training are as they were without it.

    Args:
        settings: how the student writes, and how often.
        task: a task that translates, between one pair of languages or several.
    """

    def __init__(self, settings: Inputs, task: Any) -> None:
        self.settings, self.dictionary = settings, task.target_dictionary
        self.pad, self.eos = self.dictionary.pad(), self.dictionary.eos()
        self.seed = task.cfg.seed
        self.left_pad = task.cfg.left_pad_target
        self.multiple = getattr(task.cfg, "required_seq_len_multiple", 1)
        self.student = task.student()
        self.never = [one for one in self.dictionary.symbols if one in self.student.needless]

    def begin(self, model: Any, longest: float) -> None:
        """An epoch begins.

        Args:
            model: the student itself, in no wrapper of distributed training.
            longest: of how many tokens a target may be at most.
        """
        self.model, self.longest = model, longest
        for layer in model.modules():
            # fairseq 0.12.2 computes in another way, with other rounding, until a layer was first
            # trained: a resumed training would not write what it would have written
            if hasattr(layer, "ever_training"):
                layer.ever_training = True

    def __call__(
        self, sample: Dict[str, Any], step: Step, number: int
    ) -> Tuple[Dict[str, Any], Step]:
        """A batch as it is trained on: as it came, or a copy with the student's own words.

        Args:
            number: which of the update's batches it is.
        """
        assert step.update is not None
        rate, (coin, _) = self.settings.rate(step.update), self._numbers(step.update, number)
        if step.is_dummy or coin / 2**32 >= rate:
            return sample, step
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        _, seed = self._numbers(step.update, number, rank)
        device = sample["target"].device
        gpu = device.type == "cuda"
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng([device] if gpu else []))
            stack.enter_context(torch.no_grad())
            if gpu and step.amp:
                stack.enter_context(torch.autocast("cuda"))
            stack.callback(self.model.train, self.model.training)
            torch.manual_seed(seed)
            self.model.eval()
            write = self._argmax if self.settings.how == "argmax" else self._sample
            inputs, target = write(sample)
        written = {
            **sample,
            "net_input": {**sample["net_input"], "prev_output_tokens": inputs},
            "target": target,
            "ntokens": int(target.ne(self.pad).sum()),
        }
        return written, step._replace(inputs=self.settings.how)

    def _numbers(self, *of: int) -> Tuple[int, int]:
        """Two random 32-bit numbers that belong to a batch."""
        one, other = np.random.SeedSequence((self.seed, *of)).generate_state(2)
        return int(one), int(other)

    def _argmax(self, sample: Dict[str, Any]) -> Tuple[Tensor, Tensor]:
        """Decoder inputs and target, (B, T), of the reference's shape.

        Each sentence ends where its reference does, with the same last symbol (``</s>``). Before
        it the likeliest symbol that is neither ``</s>`` nor padding stands: a sentence that ends
        and goes on would be like nothing that a decoder ever reads.
        """
        never = [self.pad, self.eos, *map(self.dictionary.index, self.never)]
        written = sample["target"].clone()
        inputs = sample["net_input"]["prev_output_tokens"].clone()
        logits = self.model(**sample["net_input"])[0]
        logits[..., never] = -math.inf
        words = self.student.words(written)
        goes_on = words[:, :-1] & words[:, 1:]
        likeliest = logits[:, :-1].argmax(-1)[goes_on]
        written[:, :-1][goes_on] = likeliest
        inputs[:, 1:][goes_on] = likeliest
        return inputs, written

    def _sample(self, sample: Dict[str, Any]) -> Tuple[Tensor, Tensor]:
        """Decoder inputs and target, (B, longest translation).

        A translation may be empty, which is ``</s>`` alone. One that reaches the limit is ended.
        """
        target, inputs = sample["target"], sample["net_input"]["prev_output_tokens"]
        longest = min(target.size(1) + self.settings.extra_length, self.longest)
        real = target.ne(self.pad)
        # what the decoder begins with, and the tokens of languages that the target does
        begin = inputs.gather(1, real.int().argmax(1, keepdim=True))
        tags = target[real & ~self.student.words(target)].view(len(target), -1)
        generator = SequenceGenerator(
            [self.model],
            self.dictionary,
            max_len_b=int(longest) - 1,  # beside </s>
            min_len=0,
            normalize_scores=False,
            temperature=self.settings.temperature,
            search_strategy=_Sampling(self.dictionary),
            tokens_to_suppress=self.never,
        )
        given = {"prefix_tokens": tags} if tags.size(1) else {}
        found = generator.generate([self.model], sample, bos_token=begin.squeeze(1), **given)
        written = [one[0]["tokens"] for one in found]
        read = [torch.cat([first, own[:-1].to(first)]) for first, own in zip(begin, written)]
        inputs, target = (
            data_utils.collate_tokens(
                tokens, self.pad, left_pad=self.left_pad, pad_to_multiple=self.multiple
            )
            for tokens in (read, written)
        )
        return inputs, target


class _Sampling(search.Sampling):
    """fairseq's, also where all that is allowed has a probability too small for its number."""

    def step(self, step: int, lprobs: Tensor, *more: Any, **named: Any) -> Any:
        # At the limit only </s> is left, which a student that never ends gives no probability:
        # nothing could be drawn. Differences of log-probabilities are all that drawing needs.
        highest = lprobs.max(dim=-1, keepdim=True).values
        nothing = highest.eq(-math.inf)
        lprobs = lprobs - highest.masked_fill(nothing, 0)
        lprobs[..., self.eos] = lprobs[..., self.eos].masked_fill(nothing.squeeze(-1), 0)
        return super().step(step, lprobs, *more, **named)
