"""What has been measured of a model, and what is measured of any."""

import contextlib
import math
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch

from ..checkpoints import Checkpoint
from ..files import FileError, read_json, write_json
from ..timing import memory, peak_memory

NUMBERS = ("parameters", "parameters_without_embeddings", "bytes", "file_bytes")  # of a model


class Pass(NamedTuple):
    """One pass of a system over the data.

    Attributes:
        outcomes: running text, by sentence; of a language model, the loss of each block in bits.
            None for what is longer than the model takes.
        tokens: target symbols, ends of sentence included.
        seconds: from batches of symbols to the outcomes.
    """

    outcomes: List[Any]
    tokens: int
    seconds: float


class Sample(NamedTuple):
    """Some sentences of the training set, whose translations' length is of interest.

    Attributes:
        most: how many were asked for.
        key: of what they are.
        references: running text.
    """

    most: int
    key: str
    references: List[str]


class Measured:
    """What has been measured of one model, kept in a file from pass to pass.

    Attributes:
        facts: sizes and precision of the model; the keys are ``NUMBERS``, "precision",
            "vocabulary_map", whether it has one and translates with it, and "refines", whether it
            is one that no beam is for.
        outcomes: by beam, what a pass says of each sentence.
        tokens: by beam, their number.
        seconds: by beam, of each pass.
        memory: bytes at the peak of decoding beyond what the process held before it.
        runs: identifiers of the runs of the command that the passes are of.
        sampled: the ``Sample``'s key and its translations; these are None where sentences are
            longer than the model takes, or its data has no such sample.
    """

    def __init__(self, path: Path, settings: Dict[str, Any]) -> None:
        self._path, self._settings = path, settings
        self.facts: Dict[str, Any] = {}
        self.outcomes: Dict[int, List[Any]] = {}
        self.tokens: Dict[int, int] = {}
        self.seconds: Dict[int, List[float]] = {}
        self.memory = 0
        self.runs: List[str] = []
        self.sampled: Optional[Tuple[str, List[Optional[str]]]] = None
        if path.is_file():
            self._read(read_json(path))

    def _read(self, found: Dict[str, Any]) -> None:
        if found.get("settings") != self._settings:
            return  # another model by the same name; it is measured anew
        try:
            for beam, outcomes in found["said"].items():
                self.outcomes[int(beam)] = outcomes
                self.tokens[int(beam)] = int(found["tokens"][beam])
                self.seconds[int(beam)] = [float(s) for s in found["seconds"][beam]]
            self.facts, self.memory, self.runs = found["about"], found["memory"], found["runs"]
            if found.get("sampled") is not None:  # no report from before it was has it
                key, translations = found["sampled"]
                self.sampled = str(key), [*translations]
            self._check()
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise FileError(f"{self._path} is damaged: delete it") from None

    def _check(self) -> None:
        said = [one for outcomes in self.outcomes.values() for one in outcomes]
        sampled = self.sampled[1] if self.sampled else []
        numbers = [self.memory, *(self.facts[name] or 0 for name in NUMBERS)]
        if not (
            {type(one) for one in said} - {type(None)} in (set(), {str}, {float})
            and all(one >= 0 for one in said if type(one) is float)  # and no NaN
            and all(line is None or type(line) is str for line in sampled)
            and all(0 < s < math.inf for seconds in self.seconds.values() for s in seconds)
            and all(type(number) is int and number >= 0 for number in numbers)
            and all(type(run) is str for run in self.runs)
            and isinstance(self.facts["precision"], (str, type(None)))
            and isinstance(self.facts.get("refines"), (bool, type(None)))
        ):
            raise ValueError("a value of another type, or out of range")

    def passes(self, beam: int) -> int:
        return len(self.seconds.get(beam, ()))

    def add(self, beam: int, done: Pass, run: str) -> None:
        self.outcomes.setdefault(beam, done.outcomes)
        self.tokens.setdefault(beam, done.tokens)
        self.seconds.setdefault(beam, []).append(done.seconds)
        if run not in self.runs:
            self.runs.append(run)
        self.write()

    def write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "settings": self._settings,
            "about": self.facts,
            "said": self.outcomes,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "memory": self.memory,
            "runs": self.runs,
            "sampled": self.sampled,
        }
        write_json(self._path, content)


def facts(
    checkpoints: Sequence[Checkpoint], paths: Sequence[str], dtype: torch.dtype
) -> Dict[str, Any]:
    """Sizes of a model of fairseq's, and its precision, as in ``Measured``.

    Args:
        checkpoints: opened from ``paths``.
        dtype: that it runs in.
    """
    totals, inner = zip(*(checkpoint.parameters() for checkpoint in checkpoints))
    return {
        "parameters": sum(totals),
        "parameters_without_embeddings": sum(inner),
        # without the optimizer state that training's checkpoints hold
        "bytes": sum(
            n * torch.empty(0, dtype=checkpoint.dtype).element_size()
            for n, checkpoint in zip(totals, checkpoints)
        ),
        "file_bytes": sum(Path(path).stat().st_size for path in paths),
        "precision": str(dtype).replace("torch.", ""),
    }


class Memory:
    """How much memory a model takes: made before it is opened."""

    def __init__(self) -> None:
        self._before = memory("VmRSS") or 0

    def forget_peak(self) -> None:
        """Reading a checkpoint may take more than its model's work, which is what counts."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self, device: torch.device) -> int:
        """Bytes at the peak of its work; on a GPU, what torch allocated there at most."""
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return max(peak_memory() - self._before, 0)
