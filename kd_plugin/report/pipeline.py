"""From models and a test set to the report's files."""

import contextlib
import hashlib
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np
import torch

from .. import decoding
from ..checkpoints import LANGUAGE_MODEL, SPEECH, Checkpoint
from ..decoding.engines import threads
from ..errors import UserError
from ..files import all_or_nothing, differences, leftovers, locked, read_json, write_json
from ..teachers import Teacher
from ..timing import Quartiles
from . import compare, examples, given, page
from .asked import Asked, Judged, Results, TestSet
from .blocks import TextInBlocks
from .curves import read_curves
from .decode import measure
from .measured import NUMBERS, Measured
from .systems import CTRANSLATE2, Model, System, judged_kind, open_model, role_of
from .translations import Translations
from .utterances import Utterances

_SETTINGS, _MEASURED, _TRANSLATIONS = "settings.json", "measured", "translations"
_PAGES = ("report.md", "report.html", "report.json")
_PICTURES = (*page.CAPTIONS, "curves.png", "differences.png")  # the last two of earlier versions
logger = logging.getLogger(__name__)

_COUNTED = 500_000  # sentences of the training set, to tell rare tokens from common ones


def make(asked: Asked) -> Dict[str, Any]:
    """Judge all models and write the report; goes on where an interruption left off.

    Returns:
        what ``report.json`` holds.

    Raises:
        UserError: something does not fit, or every model fails; earlier results stay.
    """
    curves = {name: read_curves(path) for name, path in asked.logs.items()}
    data = _data(asked)
    for note in data.describe(asked)["doubts"]:
        logger.warning(note)
    folder = Path(asked.output)
    settings = _settings(data)
    with _prepared(folder, settings, asked.overwrite):
        if asked.for_scoring is not None:
            given.make_folder(Path(asked.for_scoring))
        return _make(asked, data, curves, settings)


def _data(asked: Asked) -> TestSet:
    kind = judged_kind(asked.options)
    if kind is LANGUAGE_MODEL:
        return TextInBlocks(asked.options)
    return Utterances(asked) if kind is SPEECH else Translations(asked)


def _make(
    asked: Asked, data: TestSet, curves: Dict[str, Any], settings: Dict[str, Any]
) -> Dict[str, Any]:
    folder = Path(asked.output)
    # each set of settings has its folder: the results of an earlier report stay until the end
    kept = folder / _MEASURED / _digest(settings)
    results = _measure(asked, data, settings, kept)
    report: Dict[str, Any] = {
        "format": "kd_plugin report",
        "version": 1,
        "settings": settings,
        "task": data.kind.task,
        "subset": data.cfg.dataset.gen_subset,
        **data.describe(asked),
        "teacher": asked.teacher.name,
        "device": settings["device"],
        "threads": settings["threads"],
        "repeats": asked.repeats,
        "notes": [*_notes(results), *data.notes(results)],
        **_judge(results),
        "curves": curves,
    }
    compared, report["not_compared"] = _differences(results)
    report["differences"] = {name: one.found for name, one in compared.items()}
    divergences = {name: one.divergences for name, one in compared.items()}
    report["examples"] = examples.choose(results, divergences)
    _write(report, folder)
    _write_translations(results, folder)
    for path in (folder / _MEASURED).iterdir():
        if path != kept:
            shutil.rmtree(path)
    write_json(folder / _SETTINGS, settings)
    if asked.for_scoring is not None:
        given.write(Path(asked.for_scoring), data.for_scoring(results))
    return report


# What outcomes depend on


def _settings(data: TestSet) -> Dict[str, Any]:
    """All that outcomes, and how long they take, depend on beside the model."""
    cfg = data.cfg
    device, dtype = decoding.placement(cfg, cfg.distributed_training.device_id)
    return {
        **data.settings(),
        "precision": str(dtype),
        "seed": cfg.common.seed,
        "max_tokens": cfg.dataset.max_tokens,
        "batch_size": cfg.dataset.batch_size,
        "required_batch_size_multiple": cfg.dataset.required_batch_size_multiple,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
    }


def _model_settings(model: Model, asked: Asked, data: TestSet) -> Dict[str, Any]:
    """What they depend on beside that: the model's files, task, own data-bin and workers."""
    own = data.settings_of(model) if _has_own_data(model, data) else {}
    found: Dict[str, Any] = {"model": model.fingerprint(), "model_data": own}
    found["task"] = asked.trained_for or "the checkpoint's"
    device, _ = decoding.placement(data.cfg, data.cfg.distributed_training.device_id)
    if model.format == CTRANSLATE2 and device.type == "cpu":
        found["ctranslate2_workers"] = threads()
    return found


def _has_own_data(model: Model, data: TestSet) -> bool:
    return Path(model.data).resolve() != data.folder.resolve()


def _digest(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


@contextlib.contextmanager
def _prepared(folder: Path, settings: Dict[str, Any], overwrite: bool) -> Iterator[None]:
    """The folder, made, locked for as long as it is written, and without what kills have left.

    Raises:
        UserError: it holds a report of other settings, or files of somebody else.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: expected a folder, found a file")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock"):
        left = [path for path in leftovers(folder) if path.is_file()]
        _refuse_others(folder, settings, overwrite, left)
        for inner in (folder / _TRANSLATIONS, *(folder / _MEASURED).glob("*")):
            left += [path for path in leftovers(inner) if path.is_file()]
        for path in left:
            path.unlink()
        yield


def _refuse_others(
    folder: Path, settings: Dict[str, Any], overwrite: bool, left: Sequence[Path]
) -> None:
    """Refuse a folder that this command has not written with these settings.

    Args:
        left: what kills have left there, which does not count.

    Raises:
        UserError: it is one.
    """
    if (folder / _SETTINGS).is_file():
        found = read_json(folder / _SETTINGS)
        different = differences(settings, found, settings)
        if different and not overwrite:
            raise UserError(
                f"--output {folder} holds a report made with other settings: "
                f"{'; '.join(different)}. Choose another folder; --overwrite would replace it."
            )
    else:
        ours = {".lock", _MEASURED}
        if (folder / _MEASURED).is_dir():  # killed before the settings, which come last
            ours |= {_TRANSLATIONS, *_PICTURES, *_PAGES}
        others = {path.name for path in folder.iterdir()} - ours - {path.name for path in left}
        if others:
            raise UserError(
                f"--output {folder} holds files that this command did not write: choose another "
                "folder"
            )


# Quality and cost


def _measure(asked: Asked, data: TestSet, settings: Dict[str, Any], kept: Path) -> Results:
    """Decode with every model.

    Args:
        kept: folder of what has been measured with these settings.

    Raises:
        UserError: all of them failed.
    """
    measured = {
        model.name: Measured(
            kept / (model.name + ".json"), {**settings, **_model_settings(model, asked, data)}
        )
        for model in asked.models
    }
    failures = measure(
        asked.systems(),
        measured,
        teacher=asked.teacher,
        options=asked.options,
        repeats=asked.repeats,
        sample=data.sample,
    )
    for model in asked.models:
        found = len(next(iter(measured[model.name].outcomes.values()), ()))
        if model.name not in failures and found != len(data.dataset):
            failures[model.name] = (
                f"{model.data} has {found} {data.kind.samples[0]}, the data {len(data.dataset)}"
            )
    if len(failures) == len(asked.models):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise UserError("no model could be judged: " + reasons)
    return Results(asked, data, measured, failures)


def _notes(results: Results) -> List[str]:
    asked = results.asked
    good = [one for name, one in results.measured.items() if name not in results.failures]
    notes = []
    if len({run for one in good for run in one.runs}) > 1:
        notes.append(
            "The passes come from several runs of the command, so they did not all take turns: "
            "speeds are less comparable."
        )
    if any(len(seconds) > asked.repeats for one in good for seconds in one.seconds.values()):
        notes.append(f"Some models were timed in more than {asked.repeats} passes.")
    return notes


def _judge(results: Results) -> Dict[str, Any]:
    """Scores and costs of all that did not fail."""
    asked = results.asked
    judged = results.data.judge(results, results.baseline())
    rows = []
    for system in asked.systems():
        row: Dict[str, Any] = {"name": system.name, "model": system.model.name}
        if results.data.kind is not LANGUAGE_MODEL:
            row.update(beam=system.beam, file=system.file)
        good = system.name in judged.rows
        rows.append({**row, **(_row(system, results, judged) if good else {"scores": None})})
    _add_ratios(rows, asked.teacher, judged.metrics[0]["name"], results.data.speed)
    return {
        "metrics": judged.metrics,
        **judged.more,
        "signatures": judged.signatures,
        "models": [_model(model, results) for model in asked.models],
        "systems": rows,
    }


def _row(system: System, results: Results, judged: Judged) -> Dict[str, Any]:
    measured = results.measured[system.model.name]
    seconds, tokens = measured.seconds[system.beam], measured.tokens[system.beam]
    return {
        **judged.rows[system.name],
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": Quartiles.of([tokens / s for s in seconds])._asdict(),
    }


def _model(model: Model, results: Results) -> Dict[str, Any]:
    measured = results.measured[model.name]
    return {
        "name": model.name,
        "kind": model.format,
        "path": model.path,
        "error": results.failures.get(model.name),
        **{key: measured.facts.get(key) for key in (*NUMBERS, "precision")},
        "vocabulary_map": bool(measured.facts.get("vocabulary_map")),
        "peak_memory_bytes": measured.memory or None,
    }


def _add_ratios(rows: Sequence[Dict[str, Any]], teacher: Model, metric: str, pace: str) -> None:
    """To each row its share of the teacher's score ("kept") and its speed-up over the teacher.

    Args:
        pace: the entry of a row that speeds are compared by.
    """

    def quality(row: Dict[str, Any]) -> float:
        return row["scores"][metric]["score"]

    def speed(row: Dict[str, Any]) -> float:
        return row[pace]["median"]

    judged = [row for row in rows if row["scores"]]
    best = next((row for row in judged if row["name"] == teacher.name), None)
    for row in judged:
        row["kept"] = quality(row) / quality(best) if best and quality(best) else None
        row["speedup"] = speed(row) / speed(best) if best else None


# Differences from the teacher


class _Compared(NamedTuple):
    """A student beside its teacher: what the report says, and the divergence of each sentence."""

    found: Dict[str, Any]
    divergences: Dict[int, float]


def _differences(results: Results) -> Tuple[Dict[str, Any], Dict[str, str]]:
    """Compare each student with the teacher, one after the other: two models are held at a time.

    Returns:
        by student, the differences; and by model, why it cannot be compared.
    """
    asked, data = results.asked, results.data
    students = [model for model in asked.models if model != asked.teacher]
    reasons: Dict[str, str] = {}

    def unless_refused(model: Model, work: Callable[[Model, Results], Any]) -> Any:
        try:
            return work(model, results)
        except UserError as error:
            reasons[model.name] = str(error)
            return None

    limits = {model: unless_refused(model, _max_positions) for model in [asked.teacher, *students]}
    students = [model for model in students if model.name not in reasons]
    teacher = None
    if students and asked.teacher.name not in reasons:
        teacher = unless_refused(asked.teacher, _open)
    if asked.teacher.name in reasons:
        reason = f"the teacher cannot be compared: {reasons[asked.teacher.name]}"
        return {}, {model.name: reason for model in asked.models if model != asked.teacher}
    found: Dict[str, Any] = {}
    if teacher is None:
        return found, reasons
    fit = [limits[model] for model in [asked.teacher, *students]]
    counts = _counts(data)
    for model in students:
        student = unless_refused(model, _open)
        if student is not None:
            tokens = compare.compare(teacher, student, data.batches(fit), data.student.target)
            found[model.name] = _difference(model, tokens, counts, results)
        del student  # before the next one is opened
    return found, reasons


def _max_positions(model: Model, results: Results) -> Tuple[int, int]:
    """Longest source and target, in tokens, that all its checkpoints take.

    Raises:
        UserError: it gives no distributions, or not over the data's vocabulary.
    """
    asked, data = results.asked, results.data
    if model.name in results.failures:
        raise UserError("it failed")
    if model.format == CTRANSLATE2:
        raise UserError("CTranslate2 gives no distributions")
    if _has_own_data(model, data):
        raise UserError("it has a vocabulary of its own")
    data.refuse_comparison(model)
    limits = []
    for path in model.paths:
        checkpoint = Checkpoint.open(path, role_of(model, asked.teacher), asked.trust)
        longer = checkpoint.as_task(asked.trained_for).tags(data.student.languages).longer
        limits.append([most - more for most, more in zip(checkpoint.max_positions, longer)])
    source, target = zip(*limits)
    return min(source), min(target)


def _open(model: Model, results: Results) -> Teacher:
    """A model that gives distributions over the data's vocabulary."""
    asked, data = results.asked, results.data
    role = role_of(model, asked.teacher)
    return open_model(
        model, data.student, data.cfg, role=role, trust=asked.trust, task=asked.trained_for
    )


def _difference(
    model: Model, tokens: compare.Tokens, counts: np.ndarray, results: Results
) -> _Compared:
    asked, data = results.asked, results.data
    end = data.student.target.eos()
    buckets = compare.buckets(tokens, counts, end)
    divergences = compare.divergences(tokens)
    found = {
        "all": compare.Bucket.of("all", tokens)._asdict(),
        "calibration": {k: v._asdict() for k, v in compare.calibrations(tokens, end).items()},
        "by": {kind: [bucket._asdict() for bucket in buckets[kind]] for kind in data.kinds},
        "farthest": [
            _sentence(i, tokens, model, results)
            for i in compare.farthest(divergences, asked.examples)
        ],
    }
    return _Compared(found, divergences)


def _counts(data: TestSet) -> np.ndarray:
    """How often each target symbol occurs in training, (V,).

    Without a training set there, as the dictionary's file has it.
    """
    dictionary, train = data.student.target, data.training_set()
    if train is None:
        return np.array([min(n, _COUNTED) for n in dictionary.count])
    counts = np.zeros(max(len(dictionary), len(data.student.source)), dtype=np.int64)
    for i in range(min(len(train), _COUNTED)):
        np.add.at(counts, train[i].numpy(), 1)
    return counts


def _sentence(i: int, tokens: compare.Tokens, student: Model, results: Results) -> Dict[str, Any]:
    asked, data = results.asked, results.data
    own, symbols = tokens.only(tokens.sentence == i), data.student.target.symbols
    models = {"teacher": asked.teacher, "student": student}
    return {
        "number": i + 1,
        **data.texts(i),
        **{
            who: data.said(i, results, System(model, asked.beam, True))
            for who, model in models.items()
        },
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


# Files


def _write(report: Dict[str, Any], folder: Path) -> None:
    from .draw import draw  # no process that decodes needs matplotlib

    pictures = draw(report)
    report["pictures"] = list(pictures)
    texts = {
        "report.md": page.markdown(report),
        "report.html": page.page(report, pictures),
        "report.json": json.dumps(_without_infinities(report), indent=1, ensure_ascii=False),
    }
    # file names need not be UTF-8
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


def _without_infinities(value: Any) -> Any:
    """``value`` with None for the numbers that JSON cannot write: infinities and NaN."""
    if isinstance(value, dict):
        return {key: _without_infinities(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinities(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_translations(results: Results, folder: Path) -> None:
    files = results.data.files(results)
    for name, lines in files.items():
        (folder / _TRANSLATIONS).mkdir(exist_ok=True)
        with all_or_nothing(folder / _TRANSLATIONS / name) as file:
            file.write("".join(line + "\n" for line in lines).encode("utf-8"))
    for path in (folder / _TRANSLATIONS).glob("*.txt"):
        if path.name not in files:
            path.unlink()  # of a model that is no longer asked for
