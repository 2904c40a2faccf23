"""Folders of Hugging Face's transformers: their tokenizers, and their models for CTranslate2.

Such a folder may name code to be run, and weights may be pickles, which are programs. Neither is
ever executed: code is refused, and pickles are read by ``torchfile``. Nothing is fetched.
"""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any, Dict, List, Sequence

import torch

from ..checkpoints import torchfile
from ..errors import Faults
from ..files import FileError, digest, naming, passing_folder, read_json
from .reading import Around
from .tokens import spelled

_CONFIGS = ("config.json", "tokenizer_config.json")
_PARTS = (".json", ".txt", ".model", ".spm", ".vocab")  # what belongs to models and tokenizers
_SAFE, _PICKLED = "model.safetensors", "pytorch_model.bin"
_TRANSLATING = ("t5", "mt5", "umt5")  # types whose configurations need not say that they do
logger = logging.getLogger(__name__)

INSTALL = "pip install 'kd_plugin[transformers]'"


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model as transformers saves it."""
    return not (folder / "model.bin").is_file() and (folder / "config.json").is_file()


def faults(folder: Path) -> List[str]:
    """Why a folder of transformers cannot be used at all."""
    found = Faults()
    for name in _CONFIGS:
        if (folder / name).is_file():
            with found.collecting():
                if "auto_map" in read_json(folder / name):
                    found.add(
                        f"{folder / name} names code to be run (auto_map), and a teacher's folder "
                        "never runs any: translate with it elsewhere, and bring the translations"
                    )
    return found.messages


def model_faults(folder: Path) -> List[str]:
    """Why a model of transformers cannot be converted, as far as its files tell."""
    found = Faults()
    found.messages += faults(folder)
    with found.collecting():
        config = read_json(folder / "config.json")
        kind = config.get("model_type")
        if config.get("is_encoder_decoder") is not True and kind not in _TRANSLATING:
            found.add(
                f"{folder} holds a model of the type {kind!r}, without encoder and decoder: "
                "expected one that translates, as of Marian, M2M-100, NLLB, mBART or T5"
            )
    with found.collecting():
        _weights(folder)
    return found.messages


def files(folder: Path) -> Dict[str, str]:
    """SHA-256 of the files that a model or tokenizer depends on, by name."""
    names = [*_parts(folder), *(_weights(folder) if is_model(folder) else ())]
    return {name: digest(str(folder / name)) for name in names}


def _parts(folder: Path) -> List[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in _PARTS)


def _weights(folder: Path) -> List[str]:
    """Names of the files with the weights, safe ones if there are any.

    Raises:
        FileError: there are none that can be read.
    """
    for name in (_SAFE, _PICKLED):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [name]
        if index.is_file():
            parts = read_json(index).get("weight_map")
            found = sorted(set(map(str, parts.values()))) if isinstance(parts, dict) else []
            missing = [part for part in found if not _is_file_of(folder, part)]
            if missing or not found:
                raise FileError(f"{index} names {', '.join(missing) or 'nothing'}: no such file")
            return found
    raise FileError(f"{folder}: expected weights, {_SAFE} or {_PICKLED}; found neither")


def _is_file_of(folder: Path, name: str) -> bool:
    return os.path.basename(name) == name and (folder / name).is_file()


def open_library(flag: str) -> Any:
    """The library, which never fetches anything.

    Args:
        flag: that needs it, for messages.

    Raises:
        FileError: it is not installed, or cannot be imported.
    """
    # nothing is fetched; and processes that the tokenizers' threads are in must not fork
    for name, value in (("HF_HUB_OFFLINE", "1"), ("TOKENIZERS_PARALLELISM", "false")):
        os.environ.setdefault(name, value)
    try:
        import transformers
        from transformers import AutoTokenizer  # noqa: F401  which imports what may be missing
    except ImportError as error:
        raise FileError(f"{flag} needs transformers ({error}): {INSTALL}") from None
    except Exception as error:  # of a library that goes with another torch
        reason = " ".join(str(error).split())
        raise FileError(f"{flag}: transformers cannot be imported here ({reason})") from error
    transformers.logging.set_verbosity_error()
    return transformers


class TransformersTokens:
    """Tokens of a tokenizer of Hugging Face's; see ``SentencePieceTokens``.

    Args:
        folder: with the tokenizer.
        flag: that names it, for messages.

    Raises:
        FileError: transformers is not installed, or the tokenizer cannot be used.
    """

    def __init__(self, folder: str, flag: str) -> None:
        self._folder = Path(folder)
        if not self._folder.is_dir():
            raise FileError(f"{flag} {folder}: no such folder")
        found = Faults()
        found.messages += faults(self._folder)
        found.raise_if_any(FileError, f"{flag}: ")
        library = open_library(flag)
        try:
            self._tokenizer = library.AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
            self.around = self._named(self._tokenizer("")["input_ids"])
        except Exception as error:  # of nearly any kind
            raise FileError(
                f"{flag} {folder}: transformers cannot open its tokenizer ({_reason(error)})"
            ) from error

    def encode(self, text: str) -> List[str]:
        return self._named(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _named(self, ids: Sequence[int]) -> List[str]:
        return self._tokenizer.convert_ids_to_tokens(ids)

    def decode(self, tokens: Sequence[str]) -> str:
        return spelled(tokens, str(self._tokenizer.unk_token), self._decode)

    def _decode(self, tokens: List[str]) -> str:
        ids = self._tokenizer.convert_tokens_to_ids(tokens)
        return self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def lacking(self, around: Around) -> List[str]:
        """Faults of tokens that are to stand around sentences, and are none of its own."""
        tokenizer = self._tokenizer
        known = {*tokenizer.get_vocab(), *tokenizer.all_special_tokens}
        for token in {token for tokens in around for token in tokens or ()}:
            # tokens of languages may be in neither
            if tokenizer.convert_tokens_to_ids(token) != tokenizer.unk_token_id:
                known.add(token)
        return around.faults(known, known)

    def files(self) -> Any:
        return {name: digest(str(self._folder / name)) for name in _parts(self._folder)}


def convert(folder: Path, new: Path) -> None:
    """Write a model of transformers in CTranslate2's format, in the precision of its weights.

    Args:
        new: the folder to write.

    Raises:
        FileError: a library is missing, or the model cannot be converted.
    """
    found = Faults()
    found.messages += model_faults(folder)
    found.raise_if_any(FileError)
    library = open_library(f"--path {folder}")
    config = read_json(folder / "config.json")
    untied = config.get("model_type") in _TRANSLATING and config.get("tie_word_embeddings") is False
    if untied and int(library.__version__.split(".")[0]) >= 5:
        # it says that all of them are tied, and the converter believes it
        raise FileError(
            f"--path {folder}: CTranslate2 converts a T5 with an output layer of its own wrongly "
            f"beside transformers {library.__version__}; install an earlier one: "
            "pip install 'transformers<5'"
        )
    try:
        from ctranslate2.converters import TransformersConverter
    except ImportError:
        raise FileError("--engine ctranslate2 needs CTranslate2: pip install ctranslate2") from None
    with naming(new), passing_folder(new) as passing:
        _lay_out(folder, Path(passing))
        try:
            TransformersConverter(passing).convert(str(new))
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # such as a full disk
            reason = _reason(error).replace(passing, str(folder))
            raise FileError(f"--path {folder}: CTranslate2 cannot convert it ({reason})") from error


def _lay_out(folder: Path, passing: Path) -> None:
    """A folder with what the converter may see: no code, no pickle, and no wish to run any."""
    for name in _parts(folder):
        if name == "config.json":
            config = {
                key: value
                for key, value in read_json(folder / name).items()
                if not re.match("_?attn_implementation", key)  # which may name code
            }
            (passing / name).write_text(json.dumps(config), encoding="utf-8")
        elif not name.startswith(_PICKLED):
            (passing / name).symlink_to((folder / name).resolve())
    parts = _weights(folder)
    where = {}
    for number, name in enumerate(parts, 1):
        if name.endswith(".safetensors"):
            (passing / name).symlink_to((folder / name).resolve())
            continue
        safe = _SAFE if len(parts) == 1 else f"model-{number:05}-of-{len(parts):05}.safetensors"
        where.update(dict.fromkeys(_copy_pickled(folder / name, passing / safe), safe))
    if len(set(where.values())) > 1:
        index = {"metadata": {}, "weight_map": where}
        (passing / f"{_SAFE}.index.json").write_text(json.dumps(index), encoding="utf-8")


def _copy_pickled(path: Path, safe: Path) -> List[str]:
    """Weights of a pickle in a format that holds numbers alone; their names.

    Raises:
        FileError: the file is damaged, or would run something.
    """
    from safetensors.torch import save_file

    logger.info(f"reading {path}")
    try:
        found = torchfile.read(str(path))
        if not isinstance(found, dict):
            raise ValueError("expected weights by name")
        # copies, because weights that share memory are refused
        weights = {
            str(name): torch.clone(value, memory_format=torch.contiguous_format)
            for name, value in found.items()
            if isinstance(value, torch.Tensor)
        }
    except torchfile.ForbiddenGlobal as error:
        raise FileError(
            f"{path} asks for {error}, which no weights need. Nothing was run."
        ) from None
    except Exception as error:  # see ``torchfile.read``
        raise FileError(f"{path} cannot be read as weights ({_reason(error)})") from None
    save_file(weights, str(safe), metadata={"format": "pt"})
    return list(weights)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
