"""Run several models over a test set: what they say of it, speed, size and memory.

Each model has a process of its own, so that its memory can be measured, and so that one that fails
or is killed does not take the others with it. They decode in turns, so that a machine that slows
down slows all of them. Those of language models score the text (``scoring``).
"""

import contextlib
import copy
import gc
import logging
import multiprocessing
import signal
import time
import traceback
import uuid
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

import torch
from fairseq import utils
from omegaconf import open_dict
from tqdm import tqdm

from .. import decoding
from ..checkpoints import LANGUAGE_MODEL, SPEECH, Role, lacking
from ..decoding.databin import words
from ..errors import UserError, out_of_memory
from ..export import read_record
from ..files import FileError
from .measured import Measured, Memory, Pass, Sample, facts
from .scoring import Scorer
from .systems import (
    CTRANSLATE2,
    FAIRSEQ,
    Model,
    System,
    configuration,
    judged_kind,
    role_of,
    trained_for,
)
from .utterances import read_speech

_OTHER_DICTIONARIES = "Name a data-bin made with its own dictionaries: --model-data NAME=DIR."
_OTHER_SOUND = "Name a folder with the same utterances made for it: --model-data NAME=DIR."


def measure(
    systems: Sequence[System],
    measured: Dict[str, Measured],
    *,
    teacher: Model,
    options: Namespace,
    repeats: int,
    sample: Optional[Sample] = None,
) -> Dict[str, str]:
    """Let every system decode the data ``repeats`` times; goes on where an interruption left off.

    Args:
        systems: models and beams to measure.
        measured: by model's name; results are added.
        teacher: the model that messages call so.
        options: fairseq-generate's, parsed.
        sample: to be translated once, with the main beam.

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
    unsampled = [
        system
        for system in systems
        if system.main
        and sample is not None
        and (measured[system.model.name].sampled or ("",))[0] != sample.key
    ]
    workers: Dict[str, _Worker] = {}

    @contextlib.contextmanager
    def noting_failure(name: str) -> Iterator[None]:
        try:
            yield
        except FileError as error:
            failures[name] = str(error)
            workers.pop(name).stop()  # its memory is free for the others

    try:
        for model in dict.fromkeys(
            system.model for system in (*(system for _, system in missing), *unsampled)
        ):
            workers[model.name] = _Worker(model, role_of(model, teacher), options)
        # one after the other: opening a checkpoint takes more memory than decoding with its model
        for name in list(workers):
            print(f"opening {name}", flush=True)
            with noting_failure(name):
                measured[name].facts = workers[name].open()
        for number, system in missing:
            name = system.model.name
            if name in failures:
                continue
            scores = judged_kind(options) is LANGUAGE_MODEL
            beam = "" if scores else f", beam {system.beam}"
            description = f"{name}{beam}, {number + 1} of {repeats}"
            with noting_failure(name):
                done = workers[name].decode(system.beam, description)
                measured[name].add(system.beam, done, run)
        for system in unsampled:
            name = system.model.name
            assert sample is not None
            if name in failures:
                continue
            with noting_failure(name):
                found = workers[name].sample(system.beam, sample.most, f"{name}, a part of train")
                same = len(found) == len(sample.references)
                measured[name].sampled = sample.key, found if same else [None] * len(found)
                measured[name].write()
        for name in list(workers):
            with noting_failure(name):
                measured[name].memory = max(workers[name].memory(), measured[name].memory)
                measured[name].write()
    finally:
        for worker in workers.values():
            worker.stop()
    return failures


# What a worker is asked, or to decode with a beam; (beam, most): that much of the training set
_OPEN, _MEMORY = "open", "memory"


class _Worker:
    """A process for one model."""

    def __init__(self, model: Model, role: Role, options: Namespace) -> None:
        self._unit = judged_kind(options).samples[0]
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, model, role, options), daemon=True
        )
        # Ctrl-C is for the parent, which then stops its workers
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._process.start()
        signal.signal(signal.SIGINT, before)
        theirs.close()

    def open(self) -> Dict[str, Any]:
        """Open the model; its facts, as in ``Measured``."""
        self._send(_OPEN)
        return self._receive()

    def decode(self, beam: int, description: str) -> Pass:
        with self._progress(description) as progress:
            self._send(beam)
            return self._receive(progress)

    def sample(self, beam: int, most: int, description: str) -> List[Optional[str]]:
        with self._progress(description) as progress:
            self._send((beam, most))
            return self._receive(progress)

    def _progress(self, description: str) -> Any:
        return tqdm(desc=description, unit=self._unit, mininterval=1, leave=False)

    def memory(self) -> int:
        self._send(_MEMORY)
        return self._receive()

    def _send(self, request: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # _receive will say so
            self._pipe.send(request)

    def _receive(self, progress: Any = None) -> Any:
        while True:
            try:
                kind, content = self._pipe.recv()
            except (EOFError, ConnectionResetError):
                self._process.join()
                raise FileError(
                    f"its process ended with exit code {self._process.exitcode}; the system may "
                    "have killed it for lack of memory"
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


def _serve(pipe: Any, model: Model, role: Role, options: Namespace) -> None:
    """What a worker's process does: answer requests until it is stopped."""
    logging.disable(logging.INFO)  # it would tear the progress bar
    decoder: Any = None
    try:
        while True:
            request = pipe.recv()
            if request == _OPEN:
                open_model = Scorer if judged_kind(options) is LANGUAGE_MODEL else _Decoder
                decoder = open_model(model, role, options)
                answer = decoder.facts
            elif request == _MEMORY:
                answer = decoder.memory()
            elif isinstance(request, tuple):
                answer = decoder.sample(*request, pipe)
            else:
                answer = decoder.decode(request, pipe)
            pipe.send(("answer", answer))
    except EOFError:
        pass
    except (UserError, OSError) as error:
        pipe.send(("failed", str(error)))
    except Exception as error:
        reason = out_of_memory(error)
        if reason is None:  # a mistake of ours
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
        pipe.send(("failed", reason))


class _Decoder:
    """A model with the data that it decodes."""

    def __init__(self, model: Model, role: Role, options: Namespace) -> None:
        cfg = configuration(options, model)
        utils.import_user_module(cfg.common)
        self.device, dtype = decoding.placement(cfg, cfg.distributed_training.device_id)
        self.generation, self.seed = cfg.generation, cfg.common.seed
        self.kind = judged_kind(options)
        self.data: Optional[decoding.DataBin] = None
        if self.kind is SPEECH:
            self.task, dataset = read_speech(cfg)
        else:
            self.task = decoding.set_up_task(cfg)
            if model.format == FAIRSEQ and trained_for(options) is None:
                self.task = decoding.own_task(
                    *(cfg, self.task, model.paths, role, options.trust_checkpoint)
                )
            langs = cfg.task.source_lang, cfg.task.target_lang
            self.data = decoding.DataBin(model.data, *langs)
            corpus = decoding.Corpus.of_subset(self.task, self.data, cfg.dataset.gen_subset)
            dataset = corpus.dataset
        self.to_text, _ = decoding.text_functions(self.task, cfg, self.data)
        self._memory = Memory()
        self.model: Any
        if model.format == CTRANSLATE2:
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
            self.facts = {
                "parameters": record.get("parameters"),
                "parameters_without_embeddings": record.get("parameters_without_embeddings"),
                "bytes": (self.model / "model.bin").stat().st_size,
                "file_bytes": sum(file.stat().st_size for file in files),
                "precision": record.get("quantization"),
                "vocabulary_map": (self.model / decoding.VOCABULARY_MAP).is_file(),
            }
        else:
            checkpoints = decoding.open_checkpoints(
                model.paths,
                self.task,
                role,
                trust=options.trust_checkpoint,
                otherwise=_OTHER_SOUND if self.kind is SPEECH else _OTHER_DICTIONARIES,
            )
            self.facts = facts(checkpoints, model.paths, dtype)
            self.model = decoding.build_models(
                *(checkpoints, self.task, {}, cfg),
                device=self.device,
                dtype=dtype,
                kind=self.kind,
            )
            self.positions = [one.max_positions() for one in self.model]
            del checkpoints
            self.facts["refines"] = self._engine(1).refines
        self.dataset_options = cfg.dataset
        self.batches = self._batches(dataset)
        gc.collect()
        self._memory.forget_peak()

    def _batches(self, dataset: Any) -> "_Batches":
        plan = decoding.plan(
            self.task,
            dataset,
            self.positions,
            max_tokens=self.dataset_options.max_tokens,
            max_sentences=self.dataset_options.batch_size,
            required_multiple=self.dataset_options.required_batch_size_multiple,
            seed=self.seed,
        )
        return _Batches(dataset, plan, held=self.kind is not SPEECH)

    def decode(self, beam: int, pipe: Any) -> Pass:
        return self._decode(self.batches, beam, pipe)

    def sample(self, beam: int, most: int, pipe: Any) -> List[Optional[str]]:
        """Translations of as many sentences of the training set; none without one."""
        assert self.data is not None  # of speech there is no such sample
        corpus = decoding.Corpus.of_sample(self.task, self.data, "train", most)
        if corpus is None:
            return []
        return self._decode(self._batches(corpus.dataset), beam, pipe).outcomes

    def _decode(self, batches: "_Batches", beam: int, pipe: Any) -> Pass:
        engine, sentences = self._engine(beam), len(batches.dataset)
        found: Dict[int, str] = {}
        start = time.perf_counter()
        for nbest in engine.decode(batches):
            found.update({i: hypotheses[0].subwords for i, hypotheses in nbest.items()})
            pipe.send(("progress", (len(nbest), sentences)))
        seconds = time.perf_counter() - start - batches.reading
        return Pass(
            [self.to_text(found[i]) if i in found else None for i in range(sentences)],
            sum(len(words(subwords)) + 1 for subwords in found.values()),
            seconds,
        )

    def _engine(self, beam: int) -> Any:
        generation = copy.deepcopy(self.generation)
        with open_dict(generation):
            generation.beam, generation.nbest = beam, 1
        if isinstance(self.model, Path):
            return decoding.CTranslate2Engine(
                decoding.SymbolReading(self.task),
                self.model,
                generation,
                device=self.device.type,
                device_index=self.device.index or 0,
                compute_type="default",
                max_positions=self.positions[0][1],
            )
        return decoding.FairseqEngine(self.task, self.model, generation, self.seed, self.data)

    def memory(self) -> int:
        """Bytes at the peak of decoding; CTranslate2's on a GPU are not torch's."""
        return self._memory.peak(
            torch.device("cpu") if isinstance(self.model, Path) else self.device
        )


class _Batches:
    """Batches of a dataset, to be gone through several times.

    Args:
        plan: the numbers of each one's sentences.
        held: whether they stay in memory; sound, which is large, is read whenever it is needed.

    Attributes:
        reading: seconds that it took to read them, the last time.
    """

    def __init__(self, dataset: Any, plan: Sequence[Any], held: bool) -> None:
        self.dataset, self.reading = dataset, 0.0
        self._plan, self._held = plan, [self._read(some) for some in plan] if held else None

    def _read(self, numbers: Any) -> Dict[str, Any]:
        return self.dataset.collater([self.dataset[int(i)] for i in numbers])

    def __iter__(self) -> Iterator[Dict[str, Any]]:
        self.reading = 0.0
        if self._held is not None:
            yield from self._held
            return
        for numbers in self._plan:
            start = time.perf_counter()
            batch = self._read(numbers)
            self.reading += time.perf_counter() - start
            yield batch


def check_vocabulary(model: Model, task: Any) -> None:
    """A CTranslate2 model must have all of the data's symbols.

    Raises:
        FileError: it lacks some.
    """
    for side, dictionary, theirs in zip(
        ("source", "target"),
        (task.source_dictionary, task.target_dictionary),
        decoding.vocabularies(Path(model.path)),
    ):
        pad = dictionary.pad_word
        unknown = lacking((symbol for symbol in dictionary.symbols if symbol != pad), theirs)
        if unknown:
            raise FileError(
                f"{model.path}: its {side} vocabulary lacks {len(unknown)} symbols of the data "
                f"({', '.join(map(repr, unknown[:5]))}, ...). {_OTHER_DICTIONARIES}"
            )
