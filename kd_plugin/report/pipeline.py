"""From models and a test set to the report's files."""

import contextlib
import hashlib
import json
import logging
import math
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from fairseq import utils
from omegaconf import OmegaConf

from .. import decoding
from ..checkpoints import Checkpoint
from ..decoding import databin
from ..decoding.engines import threads
from ..errors import UserError
from ..files import all_or_nothing, differences, leftovers, locked, read_json, write_json
from ..teachers import Student, Teacher, TeacherSettings
from ..timing import Quartiles
from . import compare, page
from . import metrics as columns
from .curves import read_curves
from .decode import NUMBERS, Measured, Sample, configuration, measure, task_given
from .score import TESTS, score
from .systems import CTRANSLATE2, Model, System, role_of

_SETTINGS, _MEASURED, _TRANSLATIONS = "settings.json", "measured", "translations"
_PAGES = ("report.md", "report.html", "report.json")
_PICTURES = ("quality-speed.png", "curves.png", "differences.png")
logger = logging.getLogger(__name__)

_COUNTED = 500_000  # sentences of the training set, to tell rare tokens from common ones


class Asked(NamedTuple):
    """A report to make.

    Attributes:
        models: the models to judge.
        teacher: the model that the others are students of.
        baseline: the model that significance is tested against.
        options: fairseq-generate's, parsed, which name the test set, the search and the device.
            Not fairseq's ``cfg``, as the other pipelines take it: that is made of them anew for
            each model, with the model's data and path.
        output: folder to write: ``report.json``, ``.md``, ``.html``, PNG files, ``translations``.
        beam: of the search; with ``greedy``, beam 1 beside it.
        repeats: passes over the data that are timed.
        reference: file with the raw references; None for those of the data-bin.
        metrics: what quality is measured by, of ``METRICS``; the first comes first in all tables
            and is what pictures show.
        tokenize: BLEU's, as sacrebleu's ``--tokenize``; None for the target language's.
        test, samples: of significance: one of ``TESTS``, and how many samples it draws.
        logs: files of fairseq-train's logs, by name.
        examples: how many sentences to show of each student.
        train_sample: how many sentences of the training set to translate, too, for their length.
        trust: open checkpoints with the full pickle machinery.
        overwrite: replace a report of other settings in ``output``.
    """

    models: Sequence[Model]
    teacher: Model
    baseline: Model
    options: Namespace
    output: str
    beam: int = 5
    greedy: bool = False
    repeats: int = 3
    reference: Optional[str] = None
    metrics: Sequence[str] = columns.USUAL
    tokenize: Optional[str] = None
    test: str = "bs"
    samples: int = 1000
    logs: Dict[str, str] = {}
    examples: int = 10
    train_sample: int = 500
    trust: bool = False
    overwrite: bool = False

    def systems(self) -> List[System]:
        beams = [self.beam, *([1] if self.greedy and self.beam != 1 else [])]
        return [System(model, beam, beam == self.beam) for model in self.models for beam in beams]


class _TestSet(NamedTuple):
    """The test set as fairseq reads it, and as text.

    Attributes:
        binarised: whether the data-bin has references, which models are compared on.
        tokenizer: of BLEU.
        sample: of the training set; None without one.
    """

    cfg: Any
    task: Any
    corpus: decoding.Corpus
    source: List[str]
    references: List[str]
    binarised: bool
    tokenizer: decoding.Tokenizer
    sample: Optional[Sample]


class _Results(NamedTuple):
    """What there is to report on.

    Attributes:
        measured: by model's name.
        failures: why a model failed, by its name.
    """

    asked: Asked
    data: _TestSet
    measured: Dict[str, Measured]
    failures: Dict[str, str]

    def translations(self, system: System) -> List[Optional[str]]:
        return self.measured[system.model.name].translations[system.beam]

    def systems(self) -> List[System]:
        """Those of models that did not fail."""
        return [s for s in self.asked.systems() if s.model.name not in self.failures]


def make(asked: Asked) -> Dict[str, Any]:
    """Judge all models and write the report; goes on where an interruption left off.

    Returns:
        what ``report.json`` holds.

    Raises:
        UserError: something does not fit, or every model fails; earlier results stay.
    """
    curves = {name: read_curves(path) for name, path in asked.logs.items()}
    data = _read(asked)
    folder = Path(asked.output)
    settings = _settings(data)
    with _prepared(folder, settings, asked.overwrite):
        return _make(asked, data, curves, settings)


def _make(
    asked: Asked, data: _TestSet, curves: Dict[str, Any], settings: Dict[str, Any]
) -> Dict[str, Any]:
    folder = Path(asked.output)
    # each set of settings has its folder: the results of an earlier report stay until the end
    kept = folder / _MEASURED / _digest(settings)
    results = _measure(asked, data, settings, kept)
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
        "doubts": columns.doubts(asked.metrics, data.tokenizer, data.references),
        "notes": _notes(results),
        **_judge(results),
        "curves": curves,
    }
    report["differences"], report["not_compared"] = _differences(results)
    _write(report, folder)
    _write_translations(results, folder)
    for path in (folder / _MEASURED).iterdir():
        if path != kept:
            shutil.rmtree(path)
    write_json(folder / _SETTINGS, settings)
    return report


# The test set, and what its translations depend on


def _read(asked: Asked) -> _TestSet:
    cfg = configuration(asked.options)
    utils.import_user_module(cfg.common)
    task = decoding.set_up_task(cfg)
    bins = decoding.DataBin(cfg.task.data, task.cfg.source_lang, task.cfg.target_lang)
    corpus = decoding.Corpus.of_subset(task, bins, cfg.dataset.gen_subset)
    to_text, _ = decoding.text_functions(task, cfg, bins)

    def texts(sentences: Any, dictionary: Any, escape_unk: bool = False) -> List[str]:
        indices = (sentences[i].tolist() for i in range(len(sentences)))
        return [to_text(databin.decode(dictionary, own, escape_unk=escape_unk)) for own in indices]

    source = texts(corpus.source, bins.source)
    if asked.reference is not None:
        references = _read_lines(asked.reference)
        if len(references) != len(source):
            raise UserError(
                f"--reference {asked.reference}: expected {len(source)} lines, as many as "
                f"{cfg.dataset.gen_subset} has sentences; got {len(references)}"
            )
    elif corpus.references is not None:
        references = texts(corpus.references, bins.target, escape_unk=True)
    else:
        raise UserError(
            f"{cfg.task.data} has no {task.cfg.target_lang} references: give a file with "
            "--reference"
        )
    tokenizer = decoding.Tokenizer.of(task.cfg.target_lang, asked.tokenize)
    for note in columns.doubts(asked.metrics, tokenizer, references):
        logger.warning(note)
    return _TestSet(
        *(cfg, task, corpus, source, references),
        binarised=corpus.references is not None,
        tokenizer=tokenizer,
        sample=_read_sample(asked, task, bins, texts),
    )


def _read_sample(
    asked: Asked, task: Any, bins: decoding.DataBin, texts: Callable[..., List[str]]
) -> Optional[Sample]:
    if not asked.train_sample:
        return None
    corpus = decoding.Corpus.of_sample(task, bins, "train", asked.train_sample)
    if corpus is None or corpus.references is None:
        return None
    content = [tokens.tolist() for side in (corpus.source, corpus.references) for tokens in side]
    references = texts(corpus.references, bins.target, escape_unk=True)
    return Sample(asked.train_sample, _digest(content), references)


def _read_lines(path: str) -> List[str]:
    try:
        # only \n ends a line, as for fairseq
        with open(path, encoding="utf-8", newline="\n") as file:
            return [line.rstrip("\r\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--reference {path} cannot be read ({error})") from None


def _settings(data: _TestSet) -> Dict[str, Any]:
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


def _model_settings(model: Model, asked: Asked, data: _TestSet) -> Dict[str, Any]:
    """What they depend on beside that: the model's files, task, own data-bin and workers."""
    own = {}
    if _has_own_data(model, data):
        langs = model.langs or data.corpus.data.langs
        bins = decoding.DataBin(model.data, *langs, renamed=f"--model-langs {model.name}={{}}")
        own = decoding.describe(bins, data.cfg.dataset.gen_subset, None, data.cfg.task)
    found: Dict[str, Any] = {"model": model.fingerprint(), "model_data": own}
    found["task"] = _task(asked) or "the checkpoint's"
    device, _ = decoding.placement(data.cfg, data.cfg.distributed_training.device_id)
    if model.kind == CTRANSLATE2 and device.type == "cpu":
        found["ctranslate2_workers"] = threads()
    return found


def _has_own_data(model: Model, data: _TestSet) -> bool:
    return Path(model.data).resolve() != data.corpus.data.folder.resolve()


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


def _measure(asked: Asked, data: _TestSet, settings: Dict[str, Any], kept: Path) -> _Results:
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
        found = len(next(iter(measured[model.name].translations.values()), ()))
        if model.name not in failures and found != len(data.references):
            failures[model.name] = (
                f"{model.data} has {found} sentences, the references {len(data.references)}"
            )
    if len(failures) == len(asked.models):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise UserError("no model could be judged: " + reasons)
    return _Results(asked, data, measured, failures)


def _notes(results: _Results) -> List[str]:
    asked, data = results.asked, results.data
    good = [one for name, one in results.measured.items() if name not in results.failures]
    notes = []
    if len({run for one in good for run in one.runs}) > 1:
        notes.append(
            "The passes come from several runs of the command, so they did not all take turns: "
            "speeds are less comparable."
        )
    if any(len(seconds) > asked.repeats for one in good for seconds in one.seconds.values()):
        notes.append(f"Some models were timed in more than {asked.repeats} passes.")
    generation = data.cfg.generation
    refine = [name for name, one in results.measured.items() if one.facts.get("refines")]
    if refine:
        notes.append(
            f"Not autoregressive: {', '.join(refine)}. What they write is refined up to "
            f"{generation.iter_decode_max_iter} times; the beam is for the other models."
        )
    elif decoding.refining_flags(generation):
        notes.append(
            f"{', '.join(decoding.refining_flags(generation))}: without effect, all models are "
            "autoregressive."
        )
    text = decoding.describe_text(data.cfg)
    lines = (line for one in good for line in one.translations.get(asked.beam, ()) if line)
    if not any(text.values()) and any("\u2581" in line or "@@ " in line for line in lines):
        notes.append(
            "The translations are in SUBWORDS, so scores mean nothing: was --remove-bpe forgotten?"
        )
    return notes


def _judge(results: _Results) -> Dict[str, Any]:
    """Scores and costs of all that did not fail."""
    asked = results.asked
    texts = {
        system: [text or "" for text in results.translations(system)]
        for system in results.systems()
    }
    baseline = next(
        (system for system in texts if system.main and system.model == asked.baseline),
        next(iter(texts)),
    )
    scores, signatures = score(
        {system.name: lines for system, lines in texts.items()},
        results.data.references,
        baseline=baseline.name,
        tokenizer=results.data.tokenizer,
        test=asked.test,
        samples=asked.samples,
        metrics=asked.metrics,
    )
    rows = [
        _row(system, results, scores[system.name], list(signatures))
        if system in texts
        else {"name": system.name, "model": system.model.name, "beam": system.beam, "scores": None}
        for system in asked.systems()
    ]
    metrics = columns.describe(asked.metrics, results.data.tokenizer)
    _add_ratios(rows, asked.teacher, metrics[0]["name"])
    return {
        "metrics": metrics,
        "baseline": baseline.name,
        "significance": f"{TESTS[asked.test]}, {asked.samples:,} samples",
        "signatures": signatures,
        "models": [_model(model, results) for model in asked.models],
        "systems": rows,
    }


def _model(model: Model, results: _Results) -> Dict[str, Any]:
    measured = results.measured[model.name]
    return {
        "name": model.name,
        "kind": model.kind,
        "path": model.path,
        "error": results.failures.get(model.name),
        **{key: measured.facts.get(key) for key in (*NUMBERS, "precision")},
        "peak_memory_bytes": measured.memory or None,
    }


def _row(
    system: System, results: _Results, scores: Dict[str, Any], metrics: Sequence[str]
) -> Dict[str, Any]:
    measured, translations = results.measured[system.model.name], results.translations(system)
    seconds, tokens = measured.seconds[system.beam], measured.tokens[system.beam]
    translated = sum(text is not None for text in translations)
    return {
        "name": system.name,
        "model": system.model.name,
        "beam": system.beam,
        "scores": {metric: scores[metric] for metric in metrics},
        "length_ratio": scores["length_ratio"],
        "length_ratio_on_train": _length_on_train(system, results) if system.main else None,
        "identical": scores["identical"],
        "left_out": len(translations) - translated,
        "seconds": seconds,
        "tokens": tokens,
        "sentences_per_second": Quartiles.of([translated / s for s in seconds])._asdict(),
        "tokens_per_second": Quartiles.of([tokens / s for s in seconds])._asdict(),
    }


def _length_on_train(system: System, results: _Results) -> Optional[float]:
    """Of the translations of the training set's sample over their references."""
    sample, found = results.data.sample, results.measured[system.model.name].sampled
    if sample is None or found is None:
        return None
    pairs = [(text, own) for text, own in zip(found[1], sample.references) if text is not None]
    if not pairs:
        return None
    translations, references = zip(*pairs)
    return results.data.tokenizer.length_ratio(translations, references)


def _add_ratios(rows: Sequence[Dict[str, Any]], teacher: Model, metric: str) -> None:
    """To each row its share of the teacher's score ("kept") and its speed-up over the teacher."""

    def quality(row: Dict[str, Any]) -> float:
        return row["scores"][metric]["score"]

    def speed(row: Dict[str, Any]) -> float:
        return row["sentences_per_second"]["median"]

    judged = [row for row in rows if row["scores"]]
    best = next((row for row in judged if row["name"] == teacher.name), None)
    for row in judged:
        row["kept"] = quality(row) / quality(best) if best and quality(best) else None
        row["speedup"] = speed(row) / speed(best) if best else None


# Differences from the teacher


def _differences(results: _Results) -> Tuple[Dict[str, Any], Dict[str, str]]:
    """Compare each student with the teacher, one after the other: two models are held at a time.

    Returns:
        by student, the differences; and by model, why it cannot be compared.
    """
    asked, data = results.asked, results.data
    students = [model for model in asked.models if model != asked.teacher]
    reasons: Dict[str, str] = {}

    def unless_refused(model: Model, work: Callable[[Model, _Results], Any]) -> Any:
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
    plan = _plan(data, [limits[model] for model in [asked.teacher, *students]])
    counts, dataset = _counts(data), data.corpus.dataset
    for model in students:
        student = unless_refused(model, _open)
        if student is not None:
            batches = (dataset.collater([dataset[int(i)] for i in batch]) for batch in plan)
            dictionary = data.task.target_dictionary
            tokens = compare.compare(teacher, student, batches, dictionary)
            found[model.name] = _difference(model, tokens, counts, results)
        del student  # before the next one is opened
    return found, reasons


def _max_positions(model: Model, results: _Results) -> Tuple[int, int]:
    """Longest source and target, in tokens, that all its checkpoints take.

    Raises:
        UserError: it gives no distributions, or not over the data's vocabulary.
    """
    if model.name in results.failures:
        raise UserError("it failed")
    if model.kind == CTRANSLATE2:
        raise UserError("CTranslate2 gives no distributions")
    if _has_own_data(model, results.data):
        raise UserError("it has a vocabulary of its own")
    if not results.data.binarised:
        raise UserError("the data-bin has no references")
    asked = results.asked
    limits = []
    for path in model.paths:
        checkpoint = Checkpoint.open(path, role_of(model, asked.teacher), asked.trust)
        longer = checkpoint.as_task(_task(asked)).tags(results.data.corpus.data.langs).longer
        limits.append([most - more for most, more in zip(checkpoint.max_positions, longer)])
    source, target = zip(*limits)
    return min(source), min(target)


def _task(asked: Asked) -> Optional[str]:
    """What the models were trained for, whatever their checkpoints say; None is what those say."""
    return "translation" if task_given(asked.options) else None


def _open(model: Model, results: _Results) -> Teacher:
    """A model that gives distributions over the data's vocabulary."""
    cfg, task = results.data.cfg, results.data.task
    device, dtype = decoding.placement(cfg, cfg.distributed_training.device_id)
    fit = Student(
        task.source_dictionary, task.target_dictionary, task.cfg.source_lang, task.cfg.target_lang
    )
    asked = results.asked
    # it has been decoded, whatever its checkpoints call the languages
    names = {"source_lang": fit.source_lang, "target_lang": fit.target_lang}
    settings = TeacherSettings(
        model.paths,
        overrides=names,
        trust=asked.trust,
        role=role_of(model, asked.teacher),
        task=_task(asked),
    )
    return Teacher.open(settings, fit).place(device, dtype)


def _plan(data: _TestSet, limits: Sequence[Tuple[int, int]]) -> List[np.ndarray]:
    """Batches of the test set, as sentence numbers; without what is too long for one of the models.

    Args:
        limits: longest source and target of each model.
    """
    return decoding.plan(
        data.task,
        data.corpus,
        limits,
        max_tokens=data.cfg.dataset.max_tokens,
        max_sentences=data.cfg.dataset.batch_size,
        required_multiple=1,
        seed=data.cfg.common.seed,
    )


def _difference(
    model: Model, tokens: compare.Tokens, counts: np.ndarray, results: _Results
) -> Dict[str, Any]:
    asked, data = results.asked, results.data
    end = data.task.target_dictionary.eos()
    buckets = compare.buckets(tokens, counts, end)
    teacher, student = [
        results.measured[name].translations[asked.beam] for name in (asked.teacher.name, model.name)
    ]
    return {
        "all": compare.Bucket.of("all", tokens)._asdict(),
        "calibration": {k: v._asdict() for k, v in compare.calibrations(tokens, end).items()},
        "by": {kind: [bucket._asdict() for bucket in own] for kind, own in buckets.items()},
        "farthest": [
            _sentence(i, tokens, data, teacher=teacher[i], student=student[i])
            for i in compare.farthest(tokens, asked.examples)
        ],
    }


def _counts(data: _TestSet) -> np.ndarray:
    """How often each target symbol occurs in training, (V,).

    Without a training set there, as the dictionary's file has it.
    """
    dictionary, bins = data.task.target_dictionary, data.corpus.data
    train = bins.side("train", bins.langs[1])
    if train is None:
        return np.array([min(n, _COUNTED) for n in dictionary.count])
    counts = np.zeros(len(dictionary), dtype=np.int64)
    for i in range(min(len(train), _COUNTED)):
        np.add.at(counts, train[i].numpy(), 1)
    return counts


def _sentence(
    i: int,
    tokens: compare.Tokens,
    data: _TestSet,
    *,
    teacher: Optional[str],
    student: Optional[str],
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


def _write_translations(results: _Results, folder: Path) -> None:
    (folder / _TRANSLATIONS).mkdir(exist_ok=True)
    names = set()
    for system in results.systems():
        name = f"{system.model.name}{'' if system.main else '.greedy'}.txt"
        names.add(name)
        with all_or_nothing(folder / _TRANSLATIONS / name) as file:
            lines = results.translations(system)
            file.write("".join((line or "") + "\n" for line in lines).encode("utf-8"))
    for path in (folder / _TRANSLATIONS).glob("*.txt"):
        if path.name not in names:
            path.unlink()  # of a model that is no longer asked for
