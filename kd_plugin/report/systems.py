"""The models to judge, by name: each a checkpoint, an ensemble, or a CTranslate2 folder."""

import contextlib
import copy
import hashlib
import os
import re
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from fairseq import utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import open_dict

from .. import decoding
from ..checkpoints import LANGUAGE_MODEL, SPEECH, TRANSLATION, Checkpoint, Kind, Role, kind_of
from ..decoding import parse_languages
from ..errors import Faults, UserError
from ..files import digest
from ..teachers import Student, Teacher, TeacherSettings

FAIRSEQ, CTRANSLATE2 = "fairseq", "ctranslate2"
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*", re.ASCII)


class Model(NamedTuple):
    """A model to judge.

    Attributes:
        name: in tables and pictures.
        path: fairseq's ``--path``, or a folder of ``fairseq-kd-export --format ctranslate2``.
        data: data-bin with its dictionaries.
        langs: what that data-bin calls the languages, if not as the others do.
    """

    name: str
    path: str
    data: str
    langs: Optional[Tuple[str, str]] = None

    @property
    def format(self) -> str:
        return CTRANSLATE2 if os.path.isdir(self.path) else FAIRSEQ

    @property
    def paths(self) -> List[str]:
        """Its checkpoints, or the folder itself."""
        return [self.path] if self.format == CTRANSLATE2 else list(utils.split_paths(self.path))

    def fingerprint(self) -> str:
        """SHA-256 of its files' content."""
        files = self.paths
        if self.format == CTRANSLATE2:
            files = sorted(str(path) for path in Path(self.path).iterdir() if path.is_file())
        return hashlib.sha256(" ".join(map(digest, files)).encode()).hexdigest()


def role_of(model: Model, teacher: Model) -> Role:
    """What messages call a model's checkpoints, and the flags that they advise."""
    name = "teacher" if model == teacher else "student"
    return Role(name, trust="--trust-checkpoint", task="--task")


class System(NamedTuple):
    """A model with a beam; a row of the tables.

    Attributes:
        main: whether it decodes with the beam of ``--beam``, rather than greedily beside it.
    """

    model: Model
    beam: int
    main: bool

    @property
    def name(self) -> str:
        return self.model.name if self.main else self.model.name + ", greedy"

    @property
    def file(self) -> str:
        """What its file of translations is called, without the .txt."""
        return self.model.name if self.main else self.model.name + ".greedy"


def named(pairs: Sequence[str], flag: str, what: str) -> Dict[str, str]:
    """``NAME=VALUE`` arguments as a dictionary.

    Raises:
        UserError: one has another form, or a name occurs twice; all faults in one message.
    """
    found: Dict[str, str] = {}
    faults = Faults()
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            faults.add(f"expected NAME={what}, got {pair!r}")
        elif faults.check(name not in found, f"the name {name!r} occurs twice"):
            found[name] = value
    faults.raise_if_any(prefix=f"{flag}: ")
    return found


def read_models(
    pairs: Sequence[str], data: str, own_data: Sequence[str], own_langs: Sequence[str] = ()
) -> List[Model]:
    """The models of ``--models``, with the data-bins that ``--model-data`` gives some of them, and
    what those call the languages by ``--model-langs``.

    Args:
        data: data-bin of the others.

    Raises:
        UserError: a name or a file is wrong; all faults in one message.
    """
    paths = named(pairs, "--models", "CHECKPOINT")
    folders = named(own_data, "--model-data", "DATA-BIN")
    langs = {
        name: parse_languages(text, "--model-langs " + name)
        for name, text in named(own_langs, "--model-langs", "SRC,TGT").items()
    }
    faults = Faults()
    for name in folders:
        faults.check(name in paths, f"--model-data: no model is named {name!r}")
    for name in langs:
        faults.check(name in folders, f"--model-langs {name}: --model-data names no folder of it")
    models = [
        Model(name, path, folders.get(name, data), langs.get(name)) for name, path in paths.items()
    ]
    for model in models:
        faults.check(
            _NAME.fullmatch(model.name) and not model.name.endswith(".greedy"),
            f"{model.name!r} cannot be a model's name, which is also a file's: expected letters, "
            "digits and . _ + -, the first a letter or digit, not .greedy at the end",
        )
        is_folder = model.format == CTRANSLATE2
        faults.check(
            not is_folder or (Path(model.path) / "model.bin").is_file(),
            f"{model.name}: {model.path} is a folder without model.bin, so not a CTranslate2 model",
        )
        for path in model.paths:
            exists = os.path.isdir(path) if is_folder else os.path.isfile(path)
            faults.check(exists, f"{model.name}: no such file {path}")
    faults.raise_if_any()
    return models


def pick(models: Sequence[Model], wanted: Optional[str], flag: str, usual: Sequence[str]) -> Model:
    """The model that a flag names; by default the one with a usual name, or the first.

    Raises:
        UserError: there is no model of that name.
    """
    by_name = {model.name: model for model in models}
    for name in [wanted] if wanted else usual:
        if name in by_name:
            return by_name[name]
    if wanted:
        raise UserError(f"{flag} {wanted}: the models are named {', '.join(by_name)}")
    return models[0]


def configuration(options: Namespace, model: Optional[Model] = None) -> Any:
    """fairseq's configuration of what fairseq-generate would do with a model."""
    own = copy.deepcopy(options)
    if model is not None:
        own.data, own.path = model.data, model.path
        if model.langs is not None:
            own.source_lang, own.target_lang = model.langs
    cfg = convert_namespace_to_omegaconf(own)
    with open_dict(cfg):
        cfg.dataset.max_tokens, cfg.dataset.batch_size = decoding.batch_limits(cfg)
    return cfg


def trained_for(options: Namespace) -> Optional[str]:
    """The task that --task gives the models, whatever they were trained for; None: their own."""
    return options.task if getattr(options, "task_given", False) else None


def kind_of_models(models: Sequence[Model], trust: bool = False) -> Kind:
    """What all models are, by their checkpoints; of one that cannot be read its own row says why.

    Args:
        trust: open them with the full pickle machinery.

    Raises:
        UserError: they are of several kinds, or of one that no report is of.
    """
    found: Dict[Kind, List[str]] = {}
    for model in models:
        kinds = {TRANSLATION} if model.format == CTRANSLATE2 else set()
        if model.format == FAIRSEQ:
            for path in model.paths:
                with contextlib.suppress(UserError):
                    checkpoint = Checkpoint.open(path, Role("model"), trust)
                    kinds.add(checkpoint.kind or TRANSLATION)
        for kind in kinds:
            found.setdefault(kind, []).append(model.name)
    if len(found) > 1:
        each = "; ".join(f"{', '.join(names)}: {kind.model}" for kind, names in found.items())
        raise UserError(
            f"--models: expected models of one kind, and got {each}. Make a report of each kind"
        )
    return next(iter(found), TRANSLATION)


def judged_kind(options: Namespace) -> Kind:
    """What the models are, by the task of fairseq's flags."""
    found = kind_of(getattr(options, "task", None), None)
    return found if found in (LANGUAGE_MODEL, SPEECH) else TRANSLATION


def open_model(
    model: Model, fit: Student, cfg: Any, *, role: Role, trust: bool, task: Optional[str] = None
) -> Teacher:
    """A model that gives distributions over the data's vocabulary, where the flags place it.

    Args:
        fit: the data.
        cfg: fairseq's configuration.
        task: what it was trained for, whatever its checkpoints say.

    Raises:
        UserError: it cannot be opened, or does not fit the data.
    """
    # it has been decoded, whatever its checkpoints call the languages
    names = {"source_lang": fit.source_lang, "target_lang": fit.target_lang}
    settings = TeacherSettings(
        model.paths,
        overrides=names if any(fit.languages) else {},
        trust=trust,
        role=role,
        task=task,
    )
    placement = decoding.placement(cfg, cfg.distributed_training.device_id)
    return Teacher.open(settings, fit).place(*placement)
