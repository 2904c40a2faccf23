"""Models that translate: any task, any vocabulary, checked against the data they will read."""

import logging
import os
from argparse import ArgumentParser, Namespace
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from fairseq import tasks
from fairseq.dataclass.utils import omegaconf_no_object_check
from fairseq.tasks.speech_to_text import SpeechToTextTask
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from omegaconf import OmegaConf, open_dict

from ..checkpoints import (
    DTYPES,
    FEATURES,
    SPEECH,
    STOCK_OTHERS,
    TRANSLATION,
    Checkpoint,
    CheckpointError,
    Kind,
    Role,
    VocabularyError,
    translates_otherwise,
)
from ..checkpoints.dictionaries import difference, name_of
from ..checkpoints.tags import listed
from ..files import FileError
from .databin import infer_languages

logger = logging.getLogger(__name__)


def placement(cfg: Any, device_id: int) -> Tuple[torch.device, torch.dtype]:
    """Where fairseq's flags have models run, and in which precision.

    Raises:
        FileError: in one that the device does not have.
    """
    cuda = torch.cuda.is_available() and not cfg.common.cpu
    if cfg.common.fp16 and not cuda:
        raise FileError("--fp16 needs a GPU; on a CPU take --bf16 or neither")
    if cuda:
        gpus = torch.cuda.device_count()
        if device_id not in range(gpus):
            raise FileError(f"--device-id {device_id}: expected less than {gpus}, the GPUs here")
        torch.cuda.set_device(device_id)
    precision = "fp16" if cfg.common.fp16 else "bf16" if cfg.common.bf16 else "fp32"
    return torch.device("cuda", device_id) if cuda else torch.device("cpu"), DTYPES[precision]


def set_up_task(cfg: Any) -> Any:
    """The task of fairseq's flags, with the dictionaries of its data.

    The languages that it finds by itself are put into ``cfg.task``, too.

    Raises:
        FileError: they cannot be read, or nothing says which languages, files say several, or the
            task has none of these names.
    """
    langs = [getattr(cfg.task, name, None) for name in ("source_lang", "target_lang")]
    if not all(langs) and os.path.isdir(cfg.task.data or ""):
        found = infer_languages(cfg.task.data)
        if any(lang not in (None, other) for lang, other in zip(langs, found)):
            raise FileError(  # fairseq would take the files' word
                f"--source-lang and --target-lang: give both; the files of {cfg.task.data} say "
                f"{'-'.join(map(str, found))}"
            )
        langs = [*found]
    _refuse_unknown_languages(cfg.task, langs)
    try:
        task = tasks.setup_task(cfg.task)
    except Exception as error:  # fairseq's is a bare Exception, or an assertion
        raise FileError(
            f"{cfg.task.data}: the data cannot be read: {error or repr(error)}"
        ) from error
    if isinstance(task, TranslationTask):
        if not hasattr(task, "args"):
            task.args = task.cfg  # where mBART's task still looks, and fairseq 0.12 has none
        cfg.task.source_lang, cfg.task.target_lang = task.cfg.source_lang, task.cfg.target_lang
    if not all(getattr(cfg.task, name, None) for name in ("source_lang", "target_lang")):
        raise FileError("--source-lang and --target-lang: give both")
    return task


def _refuse_unknown_languages(cfg: Any, langs: Sequence[Optional[str]]) -> None:
    """Languages that have no tag, or no model: mBART's task would read an unknown symbol instead.

    Args:
        cfg: a task's configuration.
        langs: of the data.
    """
    if cfg._name not in STOCK_OTHERS or getattr(cfg, "lang_dict", None):
        return
    known = {
        *listed(getattr(cfg, "langs", None)),
        *(lang for pair in listed(getattr(cfg, "lang_pairs", None)) for lang in pair.split("-")),
    }
    unknown = [lang for lang in langs if lang is not None and lang not in known]
    if known and unknown:
        raise FileError(
            f"{cfg.data} names the languages {' and '.join(map(str, langs))}; the model's task "
            f"{cfg._name} knows {', '.join(sorted(known))}: give the files of the data-bin "
            "the model's names for its languages"
        )


def own_task(cfg: Any, task: Any, paths: Sequence[str], role: Role, trust: bool = False) -> Any:
    """The task that checkpoints were trained for, with their arguments, on the data of ``task``.

    It is put into ``cfg.task``, too. What fairseq's ``translation`` has flags for stays as the
    flags have it.

    Args:
        task: ``set_up_task(cfg)``, a translation task.
        role: what the checkpoints are, for messages.
        trust: open them with the full pickle machinery.

    Returns:
        ``task`` itself if ``translation`` is what they were trained for, whatever its name.

    Raises:
        CheckpointError: their task cannot be set up, or they have several.
    """
    # without weights: one after the other, and before what is measured or decoded
    found = [Checkpoint.open(path, role, trust).with_weights({}) for path in paths]
    others = {one.task: one for one in found if not one.is_translation}
    if not others:
        return task
    checkpoint = next(iter(others.values()))
    if len(others) > 1 or not all(one.task in others for one in found):
        raise CheckpointError(
            "an ensemble needs models of one task, got "
            + " and ".join(f"{one.path} of {one.task!r}" for one in found)
        )
    name = str(checkpoint.task)
    if not translates_otherwise(name):
        raise CheckpointError(
            f"{checkpoint} was trained for the task {name!r}; expected translation or one of "
            f"{', '.join(STOCK_OTHERS)}.{checkpoint.advise_task()}"
        )
    with open_dict(cfg), omegaconf_no_object_check():
        cfg.task = _task_configuration(name, cfg, checkpoint, trust)
    logger.info(f"{checkpoint} was trained for the task {name}, and is decoded with it")
    return set_up_task(cfg)


# Arguments of tasks that name files; those for training alone are not among them
_FILES = ("lang_dict", "source_dict", "target_dict", "fixed_dictionary")


def _task_configuration(name: str, cfg: Any, checkpoint: Checkpoint, trust: bool) -> Any:
    """A task's configuration: what it shares with ``translation`` from ``cfg``, the rest from the
    checkpoint."""
    shared = {
        key: cfg.task[key] for key in TranslationConfig.__dataclass_fields__ if key in cfg.task
    }
    dataclass = tasks.TASK_DATACLASS_REGISTRY.get(name)
    if dataclass is not None:
        names = set(dataclass.__dataclass_fields__)
        shared = {key: value for key, value in shared.items() if key in names}
        defaults = {}
    else:
        parser = ArgumentParser(allow_abbrev=False)
        tasks.TASK_REGISTRY[name].add_args(parser)
        defaults = {one.dest: one.default for one in parser._actions if one.dest != "help"}
        names = set(defaults)
        # read as text by such tasks, which evaluate it: never to be taken from a checkpoint
        shared = {key: value for key, value in shared.items() if key[:9] != "left_pad_"}
        shared.update(seed=cfg.common.seed, task=name)
    own = {
        key: checkpoint.task_options[key]
        for key in sorted(names - set(TranslationConfig.__dataclass_fields__))
        if key in checkpoint.task_options
    }
    pairs, pair = listed(own.get("lang_pairs")), "{source_lang}-{target_lang}".format(**shared)
    if pairs and pair not in pairs:
        logger.warning(f"{checkpoint} WAS TRAINED FOR {', '.join(pairs)}, not for {pair}")
    files = [f"{key} {own[key]}" for key in _FILES if own.get(key)]
    if files and not trust:
        raise CheckpointError(
            f"{checkpoint}: its task {name} reads files that the checkpoint names "
            f"({', '.join(files)}), which {checkpoint.role.trust} permits"
        )
    found: Dict[str, Any] = {**defaults, **shared, **own, "_name": name}
    return OmegaConf.create(found) if dataclass is not None else Namespace(**found)


_TO_DISTIL = (
    "Decode data that was binarised with the teacher's own dictionaries and subwords "
    "(fairseq-preprocess --srcdict --tgtdict), and name the student's with --student-data DIR "
    "--student-spm MODEL."
)


def open_checkpoints(
    paths: Sequence[str],
    task: Any,
    role: Role,
    *,
    overrides: Optional[Mapping[str, Any]] = None,
    trust: bool = False,
    otherwise: str = _TO_DISTIL,
) -> List[Checkpoint]:
    """Open checkpoints whose dictionaries must be the task's.

    Args:
        task: that has read the data.
        role: what they are, for messages.
        overrides: options of their models to change; may name their languages otherwise.
        trust: open them with the full pickle machinery.
        otherwise: what to do if the dictionaries are others.

    Raises:
        VocabularyError: they are; CheckpointError: a file cannot be used.
    """
    found = []
    for path in paths:
        checkpoint = Checkpoint.open(path, role, trust)
        # other tasks add symbols that checkpoints do not tell
        if isinstance(task, TranslationTask):
            _check_languages(checkpoint, task, overrides or {})
            ours = task.source_dictionary, task.target_dictionary
            langs = task.cfg.source_lang, task.cfg.target_lang
            _check_dictionaries(checkpoint, TRANSLATION, langs, ours, otherwise)
        elif isinstance(task, SpeechToTextTask):
            kind = checkpoint.kind
            if kind is not None and kind is not SPEECH:
                raise CheckpointError(f"{checkpoint} is {kind.model}, and hears nothing")
            checkpoint = checkpoint.as_task(SPEECH.task)
            _check_features(checkpoint, task.data_cfg, otherwise)
            ours = task.target_dictionary, task.target_dictionary
            _check_dictionaries(checkpoint, SPEECH, ("", ""), ours, otherwise)
        found.append(checkpoint)
    return found


def _check_languages(checkpoint: Checkpoint, task: Any, overrides: Mapping[str, Any]) -> None:
    langs = (task.cfg.source_lang, task.cfg.target_lang)
    theirs = checkpoint.languages_with(overrides)
    if theirs == langs[::-1]:
        logger.warning(
            f"{checkpoint} WAS TRAINED TO TRANSLATE FROM {theirs[0]} TO {theirs[1]}, not from "
            f"{langs[0]} to {langs[1]}: if that is not meant, swap --source-lang and --target-lang"
        )
    elif None not in theirs and theirs != langs:
        logger.warning(
            f"{checkpoint} was trained to translate from {theirs[0]} to {theirs[1]}, and "
            f"translates from {langs[0]} to {langs[1]} here: if these are not the same languages "
            "in the same direction, give --source-lang and --target-lang"
        )


def _check_features(checkpoint: Checkpoint, configuration: Any, otherwise: str) -> None:
    for name in FEATURES:
        theirs, ours = checkpoint.options.get(name), getattr(configuration, name)
        if theirs not in (None, ours):
            raise CheckpointError(
                f"{checkpoint} was trained with {name} {theirs}, and the data's YAML file has "
                f"{ours}. {otherwise}"
            )


def _check_dictionaries(
    checkpoint: Checkpoint,
    kind: Kind,
    langs: Tuple[str, str],
    ours: Tuple[Any, Any],
    otherwise: str,
) -> None:
    found = checkpoint.dictionaries(langs, otherwise=("data", *ours))
    assert found is not None  # there are the data's
    for side, mine, own in zip(kind.vocabularies, ours, found):
        different = difference(mine, own)
        if different:
            raise VocabularyError(
                f"{checkpoint}: its {name_of(side)} ({found.origin}, {len(own)} symbols) is "
                f"not the data's ({len(mine)} symbols); {different}. {otherwise} If the "
                "dictionaries found are not its own, put those beside the checkpoint."
            )
    checkpoint.check_sizes(found, kind)


def build_models(
    checkpoints: Sequence[Checkpoint],
    task: Any,
    overrides: Mapping[str, Any],
    cfg: Any,
    *,
    device: torch.device,
    dtype: torch.dtype,
    kind: Kind = TRANSLATION,
) -> List[Any]:
    """The models of checkpoints, all of one kind, placed and prepared as fairseq-generate does.

    Their parameters require gradients, though none are computed: torch folds a batch of single
    symbols into one matrix product only then, and decoding takes a third longer otherwise.
    """
    models = []
    for checkpoint in checkpoints:
        model = checkpoint.build(task, overrides, kind).to(device=device, dtype=dtype)
        model.prepare_for_inference_(cfg)
        models.append(model)
    return models
