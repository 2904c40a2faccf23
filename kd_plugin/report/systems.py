"""What is judged: models by name, each a checkpoint, an ensemble, or a CTranslate2 folder."""

import hashlib
import os
import re
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

from fairseq import utils

from ..checkpoints.checkpoint import digest
from ..files import FileError

FAIRSEQ, CTRANSLATE2 = "fairseq", "ctranslate2"
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*", re.ASCII)


class Model(NamedTuple):
    """A model that is judged.

    Attributes:
        name: in tables and pictures.
        path: fairseq's ``--path``, or a folder of ``fairseq-kd-export --format ctranslate2``.
        data: data-bin with its dictionaries.
    """

    name: str
    path: str
    data: str

    @property
    def kind(self) -> str:
        return CTRANSLATE2 if os.path.isdir(self.path) else FAIRSEQ

    @property
    def paths(self) -> List[str]:
        """Its checkpoints; of a folder, itself."""
        return [self.path] if self.kind == CTRANSLATE2 else list(utils.split_paths(self.path))

    def fingerprint(self) -> str:
        """SHA-256 of its files' content."""
        files = self.paths
        if self.kind == CTRANSLATE2:
            files = sorted(str(path) for path in Path(self.path).iterdir() if path.is_file())
        return hashlib.sha256(" ".join(map(digest, files)).encode()).hexdigest()


class System(NamedTuple):
    """A model decoding in one way; a row of the tables."""

    model: Model
    beam: int
    main: bool  # with the beam that was asked for, not the greedy search beside it

    @property
    def name(self) -> str:
        return self.model.name if self.main else self.model.name + ", greedy"


def named(pairs: Sequence[str], flag: str, what: str) -> Dict[str, str]:
    """``NAME=VALUE`` arguments as a dictionary.

    Raises:
        FileError: one is something else, or a name stands twice; all faults in one message.
    """
    found: Dict[str, str] = {}
    faults = []
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            faults.append(f"expected NAME={what}, got {pair!r}")
        elif name in found:
            faults.append(f"the name {name!r} stands there twice")
        else:
            found[name] = value
    if faults:
        raise FileError(f"{flag}: {'; '.join(faults)}")
    return found


def read_models(pairs: Sequence[str], data: str, own_data: Sequence[str]) -> List[Model]:
    """The models of ``--models``, and where ``--model-data`` has their dictionaries.

    Raises:
        FileError: a name or a file is wrong; all faults in one message.
    """
    paths = named(pairs, "--models", "CHECKPOINT")
    folders = named(own_data, "--model-data", "DATA-BIN")
    faults = [f"--model-data: no model is named {n!r}" for n in folders if n not in paths]
    models = [Model(name, path, folders.get(name, data)) for name, path in paths.items()]
    for model in models:
        if not _NAME.fullmatch(model.name) or model.name.endswith(".greedy"):
            faults.append(
                f"{model.name!r} cannot be a model's name, which is also a file's: expected "
                "letters, digits and . _ + -, the first a letter or digit, not .greedy at the end"
            )
        if model.kind == CTRANSLATE2 and not (Path(model.path) / "model.bin").is_file():
            faults.append(
                f"{model.name}: {model.path} is a folder without model.bin, so no CTranslate2 model"
            )
        exists = os.path.isdir if model.kind == CTRANSLATE2 else os.path.isfile
        missing = [path for path in model.paths if not exists(path)]
        faults += [f"{model.name}: no such file {path}" for path in missing]
    if faults:
        raise FileError("; ".join(faults))
    return models


def pick(models: Sequence[Model], wanted: Optional[str], flag: str, usual: Sequence[str]) -> Model:
    """The model that a flag names; by default the one with a usual name, or the first.

    Raises:
        FileError: there is none of that name.
    """
    by_name = {model.name: model for model in models}
    for name in [wanted] if wanted else usual:
        if name in by_name:
            return by_name[name]
    if wanted:
        raise FileError(f"{flag} {wanted}: no model is named so, but {', '.join(by_name)}")
    return models[0]
