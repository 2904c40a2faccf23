"""What decodes: fairseq's generator, or CTranslate2 with the teacher converted for it."""

import math
import os
from collections import deque
from pathlib import Path
from typing import (
    Any,
    Deque,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

import torch
from fairseq import utils
from fairseq.dataclass.configs import GenerationConfig
from fairseq.tasks.translation_lev import TranslationLevenshteinTask
from torch import Tensor

from ..checkpoints import is_autoregressive
from ..errors import UserError, out_of_memory
from ..files import FileError
from .converted import VOCABULARY_MAP, check_vocabulary_map
from .databin import DataBin
from .text import added


class Hypothesis(NamedTuple):
    """One translation: symbols with spaces between, and whether it ended by itself.

    Its score is NaN where nobody gave one.
    """

    subwords: str
    score: float
    finished: bool


class TextHypothesis(NamedTuple):
    """One translation as running text in one line, of what has subwords of its own, or none."""

    text: str
    score: float
    finished: bool


# Flags of models that refine translations; nothing to those that write from left to right
_REFINING = (
    "iter_decode_eos_penalty",
    "iter_decode_force_max_iter",
    "iter_decode_max_iter",
    "iter_decode_with_beam",
)


def refining_flags(generation: Any) -> List[str]:
    """Which of the flags of iterative decoding are set in fairseq's ``GenerationConfig``."""
    usual = GenerationConfig()
    return [
        "--" + name.replace("_", "-")
        for name in _REFINING
        if getattr(generation, name) != getattr(usual, name)
    ]


# What fits a CPU's caches, as CTranslate2 is told
BATCH_ON_CPU: Dict[str, Any] = {"max_batch_size": 512, "batch_type": "tokens"}

# Of one batch: the n best of each sentence, by its id
NBest = Dict[int, List[Hypothesis]]


def threads() -> int:
    """Threads that torch computes with (``OMP_NUM_THREADS`` sets them), at most one per core."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:  # macOS, Windows
        cores = os.cpu_count() or 1
    return max(1, min(torch.get_num_threads(), cores))


class FairseqEngine:
    """fairseq's own generator, as ``fairseq-generate`` runs it.

    Args:
        task: the task that the models were built for.
        models: one, or an ensemble, on their device.
        generation: fairseq's ``GenerationConfig``.
        seed: of sampling. Every batch has a seed of its own, so that what is sampled depends
            neither on shards nor on interruptions.
        data: whose dictionaries the task may have added symbols to, which are no translation.
    """

    def __init__(
        self,
        task: Any,
        models: Sequence[Any],
        generation: Any,
        seed: int,
        data: Optional[DataBin] = None,
    ) -> None:
        self.task, self.models, self.generation, self.seed = task, models, generation, seed
        like = next(models[0].parameters())
        self.cuda, self._dtype = like.is_cuda, like.dtype
        self._refuse_other_way_of_decoding()
        more = {"lm_model": None, "lm_weight": generation.lm_weight}
        try:
            self.generator = task.build_generator(models, generation, extra_gen_cls_kwargs=more)
        except (ValueError, AssertionError) as error:
            raise _refused("fairseq's generator", error) from error
        strip = getattr(self.generator, "symbols_to_strip_from_output", {self.generator.eos})
        dictionary = task.target_dictionary
        # the generator's end may be a language's symbol, behind the dictionary's
        self.strip = {*strip, self.generator.eos, dictionary.bos(), dictionary.eos()}
        if data is not None:
            self.strip.update(added(dictionary, data.target))

    @property
    def refines(self) -> bool:
        """Whether translations are written at once and refined, and not from left to right."""
        return isinstance(self.task, TranslationLevenshteinTask)

    def _refuse_other_way_of_decoding(self) -> None:
        for model in self.models:
            if is_autoregressive(model) is self.refines:
                how = "translates from left to right"
                if self.refines is False:
                    how = "is not autoregressive: fairseq decodes it with --task translation_lev"
                kind, task = type(model).__name__, type(self.task).__name__
                raise FileError(f"a {kind} {how}; it cannot be decoded as a {task}")
        if self.refines and (self.generation.nbest > 1 or self.generation.sampling):
            raise FileError(
                "--nbest and --sampling: a model that is not autoregressive has one translation of "
                "each sentence"
            )

    def decode(self, batches: Iterable[Dict[str, Any]]) -> Iterator[NBest]:
        """The n-best lists of collated batches, one after the other.

        Raises:
            UserError: for some sentence the models give no probabilities.
        """
        for sample in batches:
            if self.generation.sampling:
                utils.set_torch_seed(self.seed + int(sample["id"].min()))
            ids = sample["id"].tolist()
            if self.cuda:
                sample = utils.move_to_cuda(sample)
            if sample["net_input"]["src_tokens"].is_floating_point():  # sound
                sample = utils.apply_to_sample(self._as_model, sample)
            more = {}
            if self.generation.prefix_size:  # of references, which begin with a language's tag
                more["prefix_tokens"] = sample["target"][:, : self.generation.prefix_size]
            longest = self._longest(sample["net_input"]["src_tokens"])
            try:
                found = self.task.inference_step(self.generator, self.models, sample, **more)
            except AssertionError as error:
                if self.refines:  # of what such a model cannot do
                    raise _refused("fairseq's generator", error) from error
                # of a sentence that no symbol has a probability for
                raise _no_translation(ids, f"fairseq's generator: {error}") from error
            except ValueError as error:  # of flags that it looks at only now
                raise _refused("fairseq's generator", error) from error
            yield {
                i: [self._read(one, longest) for one in nbest[: self.generation.nbest]]
                for i, nbest in zip(ids, found)
            }

    def _as_model(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def _longest(self, src_tokens: Tensor) -> float:
        """Symbols after which fairseq ends a hypothesis that has not ended by itself."""
        if self.refines:
            return math.inf
        if self.generation.match_source_len:
            return src_tokens.size(1) + 1
        a, b = self.generation.max_len_a, self.generation.max_len_b
        return min(int(a * src_tokens.size(1) + b), self.generator.max_len - 1)

    def _read(self, found: Dict[str, Any], longest: float) -> Hypothesis:
        tokens, symbols = found["tokens"].tolist(), self.task.target_dictionary.symbols
        subwords = [symbols[token] for token in tokens if token not in self.strip]
        return Hypothesis(" ".join(subwords), float(found["score"]), len(tokens) <= longest)


def open_translator(model: Path, device: str, device_index: int, compute_type: str) -> Any:
    """A folder as ``ctranslate2.Translator``.

    A CPU does more with a single-threaded worker for each core.

    Raises:
        FileError: CTranslate2 is not there, or does not open it; or its vocabulary map is damaged.
    """
    check_vocabulary_map(model)
    try:
        import ctranslate2
    except ImportError:
        raise FileError(
            f"{model}: CTranslate2 is not installed: pip install 'kd_plugin[ctranslate2]'"
        ) from None
    try:
        return ctranslate2.Translator(
            str(model),
            device=device,
            device_index=device_index,
            compute_type=compute_type,
            inter_threads=threads() if device == "cpu" else 1,
            intra_threads=1,
            max_queued_batches=-1,
        )
    except (RuntimeError, MemoryError, ValueError) as error:
        raise FileError(f"{model}: CTranslate2 cannot open it ({error})") from error


class CTranslate2Engine:
    """CTranslate2, as many batches at a time as there are workers.

    On a CPU there are as many workers as fairseq would have threads, so that speeds compare. A
    model that has a vocabulary map translates with it.

    Args:
        reading: what batches say to the model, and what it says: ``SymbolReading`` or
            ``TextReading``.
        model: a folder with the converted teacher.
        generation: fairseq's ``GenerationConfig``.
        device: "cpu" or "cuda".
        compute_type: CTranslate2's name of the precision.
        max_positions: tokens of the longest hypothesis.
        mapped: False to translate without a vocabulary map.
    """

    def __init__(
        self,
        reading: Any,
        model: Path,
        generation: Any,
        *,
        device: str,
        device_index: int = 0,
        compute_type: str,
        max_positions: int,
        mapped: bool = True,
    ) -> None:
        self.reading, self.generation, self.max_positions = reading, generation, max_positions
        self.mapped = mapped and (model / VOCABULARY_MAP).is_file()
        cpu = device == "cpu"
        self.workers = threads() if cpu else 1
        self.split = BATCH_ON_CPU if cpu else {}
        self.translator = open_translator(model, device, device_index, compute_type)

    def decode(self, batches: Iterable[Dict[str, Any]]) -> Iterator[Mapping[int, List[Any]]]:
        """As ``FairseqEngine.decode``."""
        waiting: Deque[Tuple[List[int], Any]] = deque()
        for sample in batches:
            waiting.append((sample["id"].tolist(), self._begin(sample)))
            if len(waiting) > 2 * self.workers:
                yield self._end(*waiting.popleft())
        while waiting:
            yield self._end(*waiting.popleft())

    def _begin(self, sample: Dict[str, Any]) -> Any:
        g, prefix = self.generation, list(self.reading.target_prefix)
        sources, width = self.reading.sources(sample)
        longest = min(int(g.max_len_a * width + g.max_len_b), self.max_positions - 1 - len(prefix))
        how: Dict[str, Any] = {"beam_size": g.beam, "num_hypotheses": g.nbest}
        if g.sampling:
            how = {
                "beam_size": 1,
                "num_hypotheses": g.nbest,
                "sampling_topk": max(g.sampling_topk, 0),
                "sampling_topp": g.sampling_topp if g.sampling_topp > 0 else 1.0,
                "sampling_temperature": g.temperature,
            }
        if prefix:
            how["target_prefix"] = [prefix] * len(sources)
        try:
            return self.translator.translate_batch(
                sources,
                asynchronous=True,
                return_scores=True,
                return_end_token=True,
                length_penalty=0 if g.unnormalized else g.lenpen,
                no_repeat_ngram_size=g.no_repeat_ngram_size,
                # the prefix is counted
                max_decoding_length=longest + 1 + len(prefix),
                min_decoding_length=max(g.min_len, 1) + len(prefix),
                max_input_length=0,
                use_vmap=self.mapped,
                **self.split,
                **how,
            )
        except ValueError as error:
            raise _refused("CTranslate2", error) from error

    def _end(self, ids: List[int], results: Sequence[Any]) -> Dict[int, List[Any]]:
        found = {}
        for i, waiting in zip(ids, results):
            try:
                result = waiting.result()
            except RuntimeError as error:
                if out_of_memory(error) is not None:
                    raise
                raise FileError(f"CTranslate2 cannot translate sentence {i}: {error}") from error
            found[i] = [self._read(*one) for one in zip(result.hypotheses, result.scores)]
        improbable = [i for i, nbest in found.items() if not math.isfinite(nbest[0].score)]
        if improbable:
            raise _no_translation(improbable, "CTranslate2's scores are not finite")
        if self.reading.target_prefix:
            for nbest in found.values():  # as they rank without it
                nbest.sort(key=lambda one: -one.score)
        return found

    def _read(self, tokens: Sequence[str], score: float) -> Any:
        # nothing is its translation of nothing
        finished = tokens[-1:] in ([self.reading.end], [])
        prefix = len(self.reading.target_prefix)
        if 0 < prefix < len(tokens) and not self.generation.unnormalized:
            # it has no probability, but CTranslate2 divides by its length, too
            score *= (len(tokens) / (len(tokens) - prefix)) ** self.generation.lenpen
        return self.reading.hypothesis(tokens[prefix:], float(score), finished)


def _refused(engine: str, error: Exception) -> FileError:
    """The error of flags that contradict each other, in the words of what decodes."""
    return FileError(f"{engine} refuses the flags of the search: {error}")


def _no_translation(ids: Sequence[int], why: str) -> UserError:
    """The error of a model that finds nothing probable, though any sentence has a likeliest one."""
    return UserError(
        "no translation with any probability for one or more of the sentences with ids "
        f"{sorted(ids)} ({why}): the model gives NaN or inf there, or can never end a sentence. "
        "Try a wider precision (without --fp16 or --compute-type)."
    )
