"""From models and a test set to the report's files."""

import contextlib
import hashlib
import json
import math
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from fairseq import utils
from omegaconf import OmegaConf

from .. import decoding
from ..decoding import databin
from ..files import (
    UNFINISHED,
    FileError,
    all_or_nothing,
    differences,
    locked,
    read_json,
    write_json,
)
from ..teachers.run import Student, Teacher
from ..timing import Spread
from . import compare, page
from .curves import read_curves
from .decode import NUMBERS, Measured, configuration, measure, role
from .score import METRICS, TESTS, score
from .systems import CTRANSLATE2, Model, System

_SETTINGS, _MEASURED, _TRANSLATIONS = "settings.json", "measured", "translations"
_PAGES = ("report.md", "report.html", "report.json")
_PICTURES = ("quality-speed.png", "curves.png", "differences.png")
_COUNTED = 500_000  # sentences of the training set, to tell rare tokens from common ones


class Asked(NamedTuple):
    """What the report is to be about.

    Attributes:
        models: what is judged.
        teacher: the model that the others are students of.
        baseline: the model that significance is tested against.
        beam: of the search; with ``greedy``, beam 1 beside it.
        repeats: passes over the data that are timed.
        reference: file with the raw references; None are the data-bin's own.
        logs: fairseq-train's, by name.
        examples: how many sentences to show of each student.
        trust: open checkpoints with the full pickle machinery.
    """

    models: Sequence[Model]
    teacher: Model
    baseline: Model
    beam: int = 5
    greedy: bool = False
    repeats: int = 3
    reference: Optional[str] = None
    tokenize: str = "13a"
    test: str = "bs"
    samples: int = 1000
    logs: Dict[str, str] = {}
    examples: int = 10
    trust: bool = False

    def systems(self) -> List[System]:
        beams = [self.beam, *([1] if self.greedy and self.beam != 1 else [])]
        return [System(model, beam, beam == self.beam) for model in self.models for beam in beams]


class _Data(NamedTuple):
    """The test set as fairseq reads it, and as text."""

    cfg: Any
    task: Any
    corpus: decoding.Corpus
    source: List[str]
    binarised: Optional[List[str]]  # references out of the data-bin
    references: List[str]


def make(asked: Asked, options: Namespace, output: str, overwrite: bool) -> Dict[str, Any]:
    """Judge all models and write the report; goes on where an interruption left off.

    Args:
        options: fairseq-generate's, parsed.
        output: folder to write: ``report.json``, ``.md``, ``.html``, PNG files, ``translations``.
        overwrite: replace what this command made there with other settings.

    Returns:
        what ``report.json`` holds.

    Raises:
        FileError: something does not fit, or every model fails; earlier results stay.
    """
    curves = {name: read_curves(path) for name, path in asked.logs.items()}
    data = _read(asked, options)
    folder = Path(output)
    settings = _settings(asked, data)
    lock = _prepare(folder, settings, overwrite)
    # of other settings than an earlier report's, which stays until there is another
    kept = folder / _MEASURED / _digest(settings)
    measured = {
        model.name: Measured(kept / (model.name + ".json"), {**settings, **_about(model, data)})
        for model in asked.models
    }
    failures = measure(asked.systems(), measured, options, asked.repeats)
    for model in asked.models:
        found = len(next(iter(measured[model.name].said.values()), ()))
        if model.name not in failures and found != len(data.references):
            failures[model.name] = (
                f"{model.data} has {found} sentences, the references {len(data.references)}"
            )
    if len(failures) == len(asked.models):
        raise FileError(
            "no model could be judged: "
            + "; ".join(f"{name}: {why}" for name, why in failures.items())
        )
    report: Dict[str, Any] = {
        "format": "kd_plugin report",
        "version": 1,
        "settings": settings,
        "subset": data.cfg.dataset.gen_subset,
        "languages": [data.task.cfg.source_lang, data.task.cfg.target_lang],
        "sentences": len(data.references),
        "references": asked.reference or "the data-bin's own references",
        "teacher": asked.teacher.name,
        "beam": asked.beam,
        "device": settings["device"],
        "threads": settings["threads"],
        "repeats": asked.repeats,
        "notes": _notes(asked, data, measured, failures),
        **_judge(asked, data, measured, failures),
        "curves": curves,
    }
    report["differences"], report["not_compared"] = _differences(asked, data, measured, failures)
    _write(report, folder)
    _write_translations(asked, measured, failures, folder)
    for path in (folder / _MEASURED).iterdir():
        if path != kept:
            shutil.rmtree(path)
    write_json(folder / _SETTINGS, settings)
    lock.close()
    return report


def _digest(settings: Dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _read(asked: Asked, options: Namespace) -> _Data:
    cfg = configuration(options)
    utils.import_user_module(cfg.common)
    task = decoding.set_up_task(cfg)
    bins = decoding.DataBin(cfg.task.data, task.cfg.source_lang, task.cfg.target_lang)
    corpus = decoding.Corpus.of_subset(task, bins, cfg.dataset.gen_subset)
    to_text, _ = decoding.text_functions(task, cfg)
    source = [to_text(databin.decode(bins.source, t.tolist())) for t in _each(corpus.source)]
    binarised = None
    if corpus.references is not None:
        binarised = [
            to_text(databin.decode(bins.target, t.tolist())) for t in _each(corpus.references)
        ]
    if asked.reference is not None:
        references = _lines(asked.reference)
        if len(references) != len(source):
            raise FileError(
                f"--reference {asked.reference}: expected {len(source)} lines, as many as "
                f"{cfg.dataset.gen_subset} has sentences; got {len(references)}"
            )
    elif binarised is not None:
        references = binarised
    else:
        raise FileError(
            f"{cfg.task.data} has no {task.cfg.target_lang} references: give a file with "
            "--reference"
        )
    return _Data(cfg, task, corpus, source, binarised, references)


def _each(sentences: Any) -> Any:
    return (sentences[i] for i in range(len(sentences)))


def _lines(path: str) -> List[str]:
    try:
        # only \n ends a line, as for fairseq
        with open(path, encoding="utf-8", newline="\n") as file:
            return [line.rstrip("\r\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"--reference {path} cannot be read ({error})") from None


def _settings(asked: Asked, data: _Data) -> Dict[str, Any]:
    """All that translations, and how long they take, depend on beside the model."""
    cfg = data.cfg
    device, dtype = decoding.placement(cfg, cfg.distributed_training.device_id)
    generation = OmegaConf.to_container(cfg.generation)
    assert isinstance(generation, dict)
    bins = data.corpus.data
    return {
        **decoding.describe(bins, cfg.dataset.gen_subset, None, cfg.task),
        "generation": {key: v for key, v in generation.items() if key not in ("beam", "nbest")},
        "text": decoding.describe_text(cfg),
        "precision": str(dtype),
        "seed": cfg.common.seed,
        "max_tokens": cfg.dataset.max_tokens,
        "batch_size": cfg.dataset.batch_size,
        "required_batch_size_multiple": cfg.dataset.required_batch_size_multiple,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
    }


def _about(model: Model, data: _Data) -> Dict[str, Any]:
    own = {}
    if _is_other(model, data):
        bins = decoding.DataBin(model.data, *data.corpus.data.langs)
        own = decoding.describe(bins, data.cfg.dataset.gen_subset, None, data.cfg.task)
    return {"model": model.fingerprint(), "model_data": own}


def _is_other(model: Model, data: _Data) -> bool:
    """Whether a model reads a data-bin of its own."""
    return Path(model.data).resolve() != data.corpus.data.folder.resolve()


def _prepare(folder: Path, settings: Dict[str, Any], overwrite: bool) -> Any:
    """Make the folder and hold it; refuse one that holds something else."""
    if folder.exists() and not folder.is_dir():
        raise FileError(f"--output {folder}: expected a folder, found a file")
    folder.mkdir(parents=True, exist_ok=True)
    lock = locked(folder / ".lock")
    if (folder / _SETTINGS).is_file():
        found = read_json(folder / _SETTINGS)
        different = differences(settings, found, settings)
        if different and not overwrite:
            raise FileError(
                f"--output {folder} holds a report made with other settings: "
                f"{'; '.join(different)}. Choose another folder; --overwrite would replace it."
            )
    else:
        ours = {".lock", _MEASURED}
        if (folder / _MEASURED).is_dir():  # the settings, which come last, did not come
            ours |= {_TRANSLATIONS, *_PICTURES, *_PAGES}
        names = {path.name for path in folder.iterdir()} - ours
        if not all(name.endswith(UNFINISHED) for name in names):
            raise FileError(
                f"--output {folder} holds files that this command did not write: choose another "
                "folder"
            )
    for left in folder.rglob("*" + UNFINISHED):
        left.unlink()
    return lock


def _notes(
    asked: Asked, data: _Data, measured: Dict[str, Measured], failures: Dict[str, str]
) -> List[str]:
    good = [one for name, one in measured.items() if name not in failures]
    notes = []
    if len({run for one in good for run in one.runs}) > 1:
        notes.append("Not all passes are of the same run of the command, so not all were in turns.")
    if any(len(seconds) > asked.repeats for one in good for seconds in one.seconds.values()):
        notes.append(f"Of some models there were more passes than {asked.repeats}.")
    text = decoding.describe_text(data.cfg)
    said = (line for one in good for line in one.said.get(asked.beam, ()) if line)
    if not any(text.values()) and any("\u2581" in line or "@@ " in line for line in said):
        notes.append(
            "The translations are in SUBWORDS, so scores mean nothing: was --remove-bpe forgotten?"
        )
    return notes


def _judge(
    asked: Asked,
    data: _Data,
    measured: Dict[str, Measured],
    failures: Dict[str, str],
) -> Dict[str, Any]:
    """Scores and costs of all that did not fail."""
    systems = asked.systems()
    texts = {
        system: [text or "" for text in measured[system.model.name].said[system.beam]]
        for system in systems
        if system.model.name not in failures
    }
    baseline = next(
        (system for system in texts if system.main and system.model == asked.baseline),
        next(iter(texts)),
    )
    scores, signatures = score(
        {system.name: lines for system, lines in texts.items()},
        data.references,
        baseline.name,
        asked.tokenize,
        asked.test,
        asked.samples,
    )
    rows = [
        _row(system, measured[system.model.name], scores)
        if system in texts
        else {"name": system.name, "model": system.model.name, "beam": system.beam, "scores": None}
        for system in systems
    ]
    teacher = next((row for row in rows if row["name"] == asked.teacher.name), None)
    for row in rows:
        if row["scores"] is None:
            continue
        row["kept"] = row["speedup"] = None
        if teacher and teacher["scores"]:
            best = teacher["scores"]["BLEU"]["score"]
            row["kept"] = row["scores"]["BLEU"]["score"] / best if best else None
            row["speedup"] = (
                row["sentences_per_second"]["median"] / teacher["sentences_per_second"]["median"]
            )
    return {
        "baseline": baseline.name,
        "significance": f"{TESTS[asked.test]}, {asked.samples:,} samples",
        "signatures": signatures,
        "models": [
            {
                "name": model.name,
                "kind": model.kind,
                "path": model.path,
                "error": failures.get(model.name),
                **{key: measured[model.name].about.get(key) for key in (*NUMBERS, "precision")},
                "peak_memory_bytes": measured[model.name].memory or None,
            }
            for model in asked.models
        ],
        "systems": rows,
    }


def _write_translations(
    asked: Asked, measured: Dict[str, Measured], failures: Dict[str, str], folder: Path
) -> None:
    (folder / _TRANSLATIONS).mkdir(exist_ok=True)
    names = set()
    for system in asked.systems():
        if system.model.name not in failures:
            name = f"{system.model.name}{'' if system.main else '.greedy'}.txt"
            names.add(name)
            lines = measured[system.model.name].said[system.beam]
            with all_or_nothing(folder / _TRANSLATIONS / name) as file:
                file.write("".join((line or "") + "\n" for line in lines).encode("utf-8"))
    for path in (folder / _TRANSLATIONS).glob("*.txt"):
        if path.name not in names:
            path.unlink()  # of a model that is no longer asked for


def _row(system: System, measured: Measured, scores: Dict[str, Any]) -> Dict[str, Any]:
    own = scores[system.name]
    seconds, said = measured.seconds[system.beam], measured.said[system.beam]
    translated = sum(text is not None for text in said)
    tokens = measured.tokens[system.beam]
    return {
        "name": system.name,
        "model": system.model.name,
        "beam": system.beam,
        "scores": {metric: own[metric] for metric in METRICS},
        "length_ratio": own["length_ratio"],
        "identical": own["identical"],
        "left_out": len(said) - translated,
        "seconds": seconds,
        "tokens": tokens,
        "sentences_per_second": Spread.of([translated / s for s in seconds])._asdict(),
        "tokens_per_second": Spread.of([tokens / s for s in seconds])._asdict(),
    }


def _differences(
    asked: Asked, data: _Data, measured: Dict[str, Measured], failures: Dict[str, str]
) -> Tuple[Dict[str, Any], Dict[str, str]]:
    """Of each student that can be compared with the teacher; and why the others cannot."""
    students = [model for model in asked.models if model != asked.teacher]
    why: Dict[str, str] = {}
    opened: Dict[str, Teacher] = {}
    for model in [asked.teacher, *students]:
        if model.name in failures:
            why[model.name] = "it failed"
        elif model.kind == CTRANSLATE2:
            why[model.name] = "CTranslate2 tells no distributions"
        elif _is_other(model, data):
            why[model.name] = "it has a vocabulary of its own"
        elif data.binarised is None:
            why[model.name] = "the data-bin has no references"
        else:
            try:
                opened[model.name] = _open(model, data, asked)
            except ValueError as error:
                why[model.name] = str(error)
    if asked.teacher.name in why:
        reason = f"nothing can be compared with {asked.teacher.name}: {why[asked.teacher.name]}"
        return {}, {model.name: reason for model in students}
    teacher = opened.pop(asked.teacher.name)
    if not opened:
        return {}, why
    plan = decoding.plan(
        data.task,
        data.corpus,
        [model.max_positions() for model in (teacher, *opened.values())],
        max_tokens=data.cfg.dataset.max_tokens,
        max_sentences=data.cfg.dataset.batch_size,
        seed=data.cfg.common.seed,
    )
    dataset, dictionary = data.corpus.dataset, data.task.target_dictionary
    batches = (dataset.collater([dataset[int(i)] for i in batch]) for batch in plan)
    found = compare.compare(teacher, list(opened.values()), batches, dictionary)
    counts = _counts(data)
    said = measured[asked.teacher.name].said[asked.beam]
    return {
        name: {
            "all": compare.Bucket.of("all", tokens)._asdict(),
            "by": {
                kind: [bucket._asdict() for bucket in own]
                for kind, own in compare.buckets(tokens, counts, dictionary.eos()).items()
            },
            "farthest": [
                _sentence(i, tokens, data, said[i], measured[name].said[asked.beam][i])
                for i in compare.farthest(tokens, asked.examples)
            ],
        }
        for name, tokens in zip(opened, found)
    }, why


def _open(model: Model, data: _Data, asked: Asked) -> Teacher:
    device, dtype = decoding.placement(data.cfg, data.cfg.distributed_training.device_id)
    task = data.task
    fit = Student(
        task.source_dictionary, task.target_dictionary, task.cfg.source_lang, task.cfg.target_lang
    )
    its = role("teacher" if model == asked.teacher else "student")
    return Teacher.open(model.paths, fit, trust=asked.trust, role=its).place(device, dtype)


def _counts(data: _Data) -> np.ndarray:
    """How often each target symbol occurs in training; in the dictionary's words, if need be."""
    dictionary, bins = data.task.target_dictionary, data.corpus.data
    train = bins.side("train", bins.langs[1])
    if train is None:
        return np.array([min(n, _COUNTED) for n in dictionary.count])
    counts = np.zeros(len(dictionary), dtype=np.int64)
    for i in range(min(len(train), _COUNTED)):
        np.add.at(counts, train[i].numpy(), 1)
    return counts


def _sentence(
    i: int, tokens: compare.Tokens, data: _Data, teacher: Optional[str], student: Optional[str]
) -> Dict[str, Any]:
    own = tokens.only(tokens.sentence == i)
    symbols = data.task.target_dictionary.symbols
    return {
        "number": i + 1,
        "source": data.source[i],
        "reference": data.references[i],
        "teacher": teacher,
        "student": student,
        "kl": float(own.kl.mean(dtype=np.float64)),
        "tokens": [
            {
                "symbol": symbols[own.symbol[t]],
                "kl": float(own.kl[t]),
                "teacher": symbols[own.teacher_best[t]],
                "student": symbols[own.student_best[t]],
            }
            for t in range(len(own.symbol))
        ],
    }


def _write(report: Dict[str, Any], folder: Path) -> None:
    from .draw import draw  # no process that decodes needs matplotlib

    pictures = draw(report)
    report["pictures"] = list(pictures)
    texts = {
        "report.md": page.markdown(report),
        "report.html": page.page(report, pictures),
        "report.json": json.dumps(_plain(report), indent=1, ensure_ascii=False),
    }
    # a file's name may be no text
    written = {name: text.encode("utf-8", "backslashreplace") for name, text in texts.items()}
    content = {**pictures, **written}
    # all are written before the first is renamed: on a full disk an earlier report stays whole
    with contextlib.ExitStack() as written_files:
        for name, data in content.items():
            file = written_files.enter_context(all_or_nothing(folder / name))
            file.write(data)
            file.flush()
    for name in set(_PICTURES) - set(pictures):
        if (folder / name).is_file():
            (folder / name).unlink()  # of an earlier report


def _plain(value: Any) -> Any:
    """Without numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
