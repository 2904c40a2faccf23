"""Let models translate, each in a process of its own, in turns: what they say, how fast, how large.

A process of its own, so that one model's memory is not another's, and one that fails, or is killed,
takes none of the others with it. In turns, so that a machine that slows down slows all of them.
"""

import contextlib
import copy
import gc
import logging
import math
import multiprocessing
import resource
import signal
import sys
import time
import uuid
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import torch
from fairseq import utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import open_dict
from tqdm import tqdm

from .. import decoding
from ..checkpoints import Role, lacking
from ..decoding.databin import words
from ..export import read_record, symbols_of
from ..files import FileError, read_json, write_json
from .systems import CTRANSLATE2, Model, System

_OTHER_DICTIONARIES = "Name a data-bin made with its own dictionaries: --model-data NAME=DIR."


NUMBERS = ("parameters", "parameters_without_embeddings", "bytes", "file_bytes")  # of a model


class Said(NamedTuple):
    """One pass of a system over the data.

    Attributes:
        text: by sentence; None where a sentence is longer than the model reads.
        tokens: target symbols, ends of sentence included.
        seconds: from batches of source symbols to target symbols.
    """

    text: List[Optional[str]]
    tokens: int
    seconds: float


class Measured:
    """What is known of one model, kept in a file from pass to pass.

    Attributes:
        about: facts about the model.
        said: by beam, its translations.
        tokens: by beam, their number.
        seconds: by beam, of each pass.
        memory: bytes at the peak of decoding beyond what the process held before it.
        runs: of which runs of the command the passes are.
    """

    def __init__(self, path: Path, settings: Dict[str, Any]) -> None:
        self._path, self._settings = path, settings
        self.about: Dict[str, Any] = {}
        self.said: Dict[int, List[Optional[str]]] = {}
        self.tokens: Dict[int, int] = {}
        self.seconds: Dict[int, List[float]] = {}
        self.memory = 0
        self.runs: List[str] = []
        if path.is_file():
            self._read(read_json(path))

    def _read(self, found: Dict[str, Any]) -> None:
        if found.get("settings") != self._settings:
            return  # another model by the same name; it is measured anew
        try:
            for beam, text in found["said"].items():
                self.said[int(beam)] = text
                self.tokens[int(beam)] = int(found["tokens"][beam])
                self.seconds[int(beam)] = [float(s) for s in found["seconds"][beam]]
            self.about, self.memory, self.runs = found["about"], found["memory"], found["runs"]
            self._check()
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise FileError(f"{self._path} is damaged: delete it") from None

    def _check(self) -> None:
        lines = [line for text in self.said.values() for line in text]
        numbers = [self.memory, *(self.about[name] or 0 for name in NUMBERS)]
        if not (
            all(line is None or type(line) is str for line in lines)
            and all(0 < s < math.inf for seconds in self.seconds.values() for s in seconds)
            and all(type(number) is int and number >= 0 for number in numbers)
            and all(type(run) is str for run in self.runs)
            and isinstance(self.about["precision"], (str, type(None)))
        ):
            raise ValueError("something of another kind")

    def passes(self, beam: int) -> int:
        return len(self.seconds.get(beam, ()))

    def add(self, beam: int, said: Said, run: str) -> None:
        self.said.setdefault(beam, said.text)
        self.tokens.setdefault(beam, said.tokens)
        self.seconds.setdefault(beam, []).append(said.seconds)
        if run not in self.runs:
            self.runs.append(run)
        self.write()

    def write(self) -> None:
        names = ("about", "said", "tokens", "seconds", "memory", "runs")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            self._path,
            {"settings": self._settings, **{name: getattr(self, name) for name in names}},
        )


def measure(
    systems: Sequence[System],
    measured: Dict[str, Measured],
    options: Namespace,
    repeats: int,
) -> Dict[str, str]:
    """Let every system translate ``repeats`` times, going on where an interruption left off.

    Args:
        systems: what is judged.
        measured: by model's name; what is found out is added.
        options: fairseq-generate's, parsed.

    Returns:
        why a model failed, by its name; the others are complete.
    """
    run = uuid.uuid4().hex
    failures: Dict[str, str] = {}
    missing = [
        (number, system)
        for number in range(repeats)
        for system in systems
        if measured[system.model.name].passes(system.beam) <= number
    ]
    workers: Dict[str, _Worker] = {}
    try:
        for model in dict.fromkeys(system.model for _, system in missing):
            print(f"opening {model.name}", flush=True)
            workers[model.name] = _Worker(model, options)
        for name, worker in workers.items():
            try:
                measured[name].about = worker.about()
            except FileError as error:
                failures[name] = str(error)
        for number, system in missing:
            name = system.model.name
            if name in failures:
                continue
            what = f"{name}, beam {system.beam}, {number + 1} of {repeats}"
            try:
                measured[name].add(system.beam, workers[name].decode(system.beam, what), run)
            except FileError as error:
                failures[name] = str(error)
        for name in workers:
            if name not in failures:
                measured[name].memory = max(workers[name].memory(), measured[name].memory)
                measured[name].write()
    finally:
        for worker in workers.values():
            worker.stop()
    return failures


class _Worker:
    """A process that holds one model."""

    def __init__(self, model: Model, options: Namespace) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, model, options), daemon=True)
        # Ctrl-C is for the one who asks, who then stops this one
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._process.start()
        signal.signal(signal.SIGINT, before)
        theirs.close()

    def about(self) -> Dict[str, Any]:
        return self._answer()

    def decode(self, beam: int, what: str) -> Said:
        with tqdm(desc=what, unit="sentences", mininterval=1, leave=False) as progress:
            self._ask(beam)
            return self._answer(progress)

    def memory(self) -> int:
        self._ask(None)
        return self._answer()

    def _ask(self, question: Optional[int]) -> None:
        with contextlib.suppress(BrokenPipeError):  # the answer will say so
            self._pipe.send(question)

    def _answer(self, progress: Any = None) -> Any:
        while True:
            try:
                kind, content = self._pipe.recv()
            except (EOFError, ConnectionResetError):
                self._process.join()
                raise FileError(
                    f"its process ended with exit code {self._process.exitcode}: was it killed, "
                    "for want of memory perhaps?"
                ) from None
            if kind == "failed":
                raise FileError(content)
            if kind == "answer":
                return content
            progress.total = content[1]
            progress.update(content[0])

    def stop(self) -> None:
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Any, model: Model, options: Namespace) -> None:
    """What a worker's process does: answers until it is stopped."""
    logging.disable(logging.INFO)  # it would tear the progress bar
    try:
        decoder = _Decoder(model, options)
        pipe.send(("answer", decoder.about))
        while True:
            beam = pipe.recv()  # None asks for the memory
            pipe.send(("answer", decoder.memory() if beam is None else decoder.decode(beam, pipe)))
    except EOFError:
        pass
    except Exception as error:
        pipe.send(("failed", str(error).strip() or type(error).__name__))


class _Decoder:
    """A model with the data it translates."""

    def __init__(self, model: Model, options: Namespace) -> None:
        cfg = configuration(options, model)
        utils.import_user_module(cfg.common)
        self.device, dtype = decoding.placement(cfg, cfg.distributed_training.device_id)
        self.task = decoding.set_up_task(cfg)
        self.generation, self.seed = cfg.generation, cfg.common.seed
        langs = self.task.cfg.source_lang, self.task.cfg.target_lang
        data = decoding.DataBin(model.data, *langs)
        corpus = decoding.Corpus.of_subset(self.task, data, cfg.dataset.gen_subset)
        self.to_text, _ = decoding.text_functions(self.task, cfg)
        self.sentences = len(corpus.source)
        self._memory_before = _resident()
        self.model: Any
        if model.kind == CTRANSLATE2:
            record = read_record(Path(model.path))
            check_vocabulary(model, self.task)
            self.model = Path(model.path)
            self.positions = [
                (
                    record.get("max_source_positions", 1024),
                    record.get("max_target_positions", 1024),
                )
            ]
            files = [file for file in self.model.iterdir() if file.is_file()]
            self.about = {
                "parameters": record.get("parameters"),
                "parameters_without_embeddings": record.get("parameters_without_embeddings"),
                "bytes": (self.model / "model.bin").stat().st_size,
                "file_bytes": sum(file.stat().st_size for file in files),
                "precision": record.get("quantization"),
            }
        else:
            checkpoints = decoding.open_checkpoints(
                *(model.paths, self.task, role("model")),
                trust=options.trust_checkpoint,
                otherwise=_OTHER_DICTIONARIES,
            )
            totals, inner = zip(*(checkpoint.parameters() for checkpoint in checkpoints))
            self.about = {
                "parameters": sum(totals),
                "parameters_without_embeddings": sum(inner),
                # without the optimizer state that training's checkpoints hold
                "bytes": sum(n * _bytes_each(c.dtype) for n, c in zip(totals, checkpoints)),
                "file_bytes": sum(Path(path).stat().st_size for path in model.paths),
                "precision": str(dtype).replace("torch.", ""),
            }
            self.model = decoding.build_models(checkpoints, self.task, {}, cfg, self.device, dtype)
            self.positions = [one.max_positions() for one in self.model]
            del checkpoints
        self.device_index = cfg.distributed_training.device_id
        plan = decoding.plan(
            self.task,
            corpus,
            self.positions,
            max_tokens=cfg.dataset.max_tokens,
            max_sentences=cfg.dataset.batch_size,
            required_multiple=cfg.dataset.required_batch_size_multiple,
            seed=cfg.common.seed,
        )
        dataset = corpus.dataset
        self.batches = [dataset.collater([dataset[int(i)] for i in batch]) for batch in plan]
        gc.collect()
        _forget_peak()

    def decode(self, beam: int, pipe: Any) -> Said:
        engine = self._engine(beam)
        found: Dict[int, str] = {}
        start = time.perf_counter()
        for nbest in engine.decode(self.batches):
            found.update({i: hypotheses[0].subwords for i, hypotheses in nbest.items()})
            pipe.send(("progress", (len(nbest), self.sentences)))
        seconds = time.perf_counter() - start
        return Said(
            [self.to_text(found[i]) if i in found else None for i in range(self.sentences)],
            sum(len(words(subwords)) + 1 for subwords in found.values()),
            seconds,
        )

    def _engine(self, beam: int) -> Any:
        generation = copy.deepcopy(self.generation)
        with open_dict(generation):
            generation.beam, generation.nbest = beam, 1
        if isinstance(self.model, Path):
            return decoding.CTranslate2Engine(
                self.task,
                self.model,
                generation,
                device=self.device.type,
                device_index=self.device_index,
                compute_type="default",
                max_positions=self.positions[0][1],
            )
        return decoding.FairseqEngine(self.task, self.model, generation, self.seed)

    def memory(self) -> int:
        """Of a GPU, what torch allocated there at most."""
        if self.device.type == "cuda" and not isinstance(self.model, Path):
            return torch.cuda.max_memory_allocated()
        return max(_peak() - self._memory_before, 0)


def role(name: str) -> Role:
    """Of a model that is judged: "teacher", "student", or "model" where that does not matter."""
    return Role(name, "--trust-checkpoint", "--model-data")


def _bytes_each(dtype: torch.dtype) -> int:
    return torch.empty(0, dtype=dtype).element_size()


def configuration(options: Namespace, model: Optional[Model] = None) -> Any:
    """fairseq's configuration of what fairseq-generate would do with a model."""
    own = copy.deepcopy(options)
    if model is not None:
        own.data, own.path = model.data, model.path
    if own.max_tokens is None and own.batch_size is None:
        own.max_tokens = 12000  # as fairseq-generate
    return convert_namespace_to_omegaconf(own)


def check_vocabulary(model: Model, task: Any) -> None:
    """A CTranslate2 model must know the data's symbols.

    Raises:
        FileError: it has others.
    """
    for side, dictionary, theirs in zip(
        ("source", "target"),
        (task.source_dictionary, task.target_dictionary),
        symbols_of(Path(model.path)),
    ):
        pad = dictionary.pad_word
        unknown = lacking((symbol for symbol in dictionary.symbols if symbol != pad), theirs)
        if unknown:
            raise FileError(
                f"{model.path}: its {side} vocabulary lacks {len(unknown)} symbols of the data "
                f"({', '.join(map(repr, unknown[:5]))}, ...). {_OTHER_DICTIONARIES}"
            )


# Memory of this process, in bytes, as Linux tells it


def _status(name: str) -> Optional[int]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    return None


def _resident() -> int:
    return _status("VmRSS") or 0


def _forget_peak() -> None:
    """Reading a checkpoint may take more than decoding; let the peak be that of decoding."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status("VmHWM") or (peak if sys.platform == "darwin" else peak * 1024)
