"""Models without the plugin: plain checkpoints for stock fairseq, folders for CTranslate2."""

import io
import json
import os
import re
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any, Dict, List, Set, Tuple

import torch
from fairseq import models
from fairseq.data import Dictionary
from fairseq.dataclass.configs import DatasetConfig, GenerationConfig
from fairseq.modules import SinusoidalPositionalEmbedding
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from omegaconf import OmegaConf
from torch import Tensor

from ..checkpoints import checkpoint
from ..checkpoints.untrusted import bounded_memory
from ..errors import UserError
from ..files import FileError, naming, passing_folder, read_json

QUANTIZATIONS = (
    "float32",
    "float16",
    "bfloat16",
    "int16",
    "int8",
    "int8_float32",
    "int8_float16",
    "int8_bfloat16",
)
RECORD = "kd_export.json"  # in a CTranslate2 folder: what it was made of
_TASKS = ("translation", "kd_translation")

_NO_PARAMETERS = re.compile(r"_float_tensor$|coder\.version$")
_TABLES = re.compile(
    r"\.(embed_tokens|embed_positions|output_projection)\.|decoder\.(fc_out|fc3)\."
)


class ExportError(UserError):
    """A model that cannot be exported; the message says why and what to do."""


def parameters(state: Dict[str, Any]) -> Tuple[int, int]:
    """How many parameters a checkpoint holds; shared ones are counted once.

    Returns:
        all; and those outside the tables of the vocabulary and of positions: token and position
        embeddings and the projection to the vocabulary, tied or not.
    """
    total = rest = 0
    tables: List[Tensor] = []
    for name, tensor in state["model"].items():
        if _NO_PARAMETERS.search(name):
            continue
        if _TABLES.search(name):
            # what shares storage in the model may be a copy in the file
            if any(tensor.shape == other.shape and tensor.equal(other) for other in tables):
                continue
            tables.append(tensor)
        else:
            rest += tensor.numel()
        total += tensor.numel()
    return total, rest


def languages(state: Dict[str, Any]) -> Tuple[Any, Any]:
    """A checkpoint's source and target language; None where it names none."""
    task = checkpoint.section(state, "task")
    return checkpoint.get(task, "source_lang"), checkpoint.get(task, "target_lang")


def max_positions(path: str, state: Dict[str, Any]) -> Tuple[int, int]:
    """Symbols of the longest sentence that a checkpoint's model takes, on either side."""
    args = model_arguments(path, state)
    return args.max_source_positions, args.max_target_positions


def model_arguments(path: str, state: Dict[str, Any]) -> Namespace:
    """What building a checkpoint's model reads of its configuration, defaults filled in.

    Raises:
        ExportError: the model or its task is none that stock fairseq could translate with.
    """
    task, model = checkpoint.section(state, "task"), checkpoint.section(state, "model")
    name = checkpoint.get(task, "_name") or checkpoint.get(task, "task")
    if name not in _TASKS:
        raise ExportError(
            f"{path} was trained for the task {name!r}; expected one of {' and '.join(_TASKS)}"
        )
    arch = checkpoint.get(model, "_name") or checkpoint.get(model, "arch")
    if arch not in models.ARCH_MODEL_REGISTRY:
        raise ExportError(
            f"{path}: this fairseq has no architecture {arch!r} of a translation model"
        )
    parser = ArgumentParser()
    models.ARCH_MODEL_REGISTRY[arch].add_args(parser)
    names = {action.dest for action in parser._actions}
    positions = {"max_source_positions", "max_target_positions"}
    found = {
        name: _plain(path, name, checkpoint.get(model, name))
        for name in sorted(names)
        if checkpoint.get(model, name, parser) is not parser
    }
    for name in positions:
        found[name] = checkpoint.get(model, name) or checkpoint.get(task, name) or 1024
    # an LSTM takes its adaptive softmax from there
    criterion = checkpoint.get(model, "criterion")
    found["criterion"] = criterion if criterion == "adaptive_loss" else None
    args = Namespace(**found, arch=arch, _name=arch)
    try:
        models.ARCH_CONFIG_REGISTRY[arch](args)
        kernels = [
            len(getattr(args, side + "_kernel_size_list", "many"))
            for side in ("encoder", "decoder")
        ]
    except Exception as error:  # an option of another kind than the architecture's
        raise ExportError(
            f"{path}: its options are not those of {arch} ({type(error).__name__}: {error})"
        ) from error
    if 1 in kernels:
        raise ExportError(
            f"{path}: stock fairseq cannot build the architecture {arch} with a single layer from "
            "plain types"
        )
    return args


def stock_state(
    path: str, state: Dict[str, Any], source: Dictionary, target: Dictionary, langs: Tuple[str, str]
) -> Dict[str, Any]:
    """A checkpoint's model as a checkpoint that stock fairseq translates with.

    It holds weights, what building the model and the task ``translation`` reads, and both symbol
    lists; no optimizer, no criterion, nothing of a teacher, and nothing but dictionaries, lists,
    strings, numbers and tensors. Both ends of the supported versions build from it.

    Args:
        path: the checkpoint, for messages.
        state: what ``read_checkpoint`` found there.
        source, target: its dictionaries.

    Raises:
        ExportError: this fairseq cannot rebuild the model.
    """
    args = model_arguments(path, state)
    task = TranslationTask(
        TranslationConfig(
            max_source_positions=args.max_source_positions,
            max_target_positions=args.max_target_positions,
        ),
        source,
        target,
    )
    try:
        # building completes the arguments; loading renames what older versions named otherwise
        with bounded_memory(state["model"]):
            model = models.build_model(args, task)
            model.load_state_dict(dict(state["model"]), strict=True, model_cfg=args)
    except Exception as error:
        raise ExportError(
            "{}: its model cannot be rebuilt with this fairseq and dictionaries of {} and {} "
            "symbols ({}: {})".format(
                *(path, len(source), len(target), type(error).__name__),
                " ".join(str(error).split())[:500],
            )
        ) from error
    model.to(next(w.dtype for w in state["model"].values() if w.is_floating_point()))
    own = model.state_dict().items()
    weights = {name: w for name, w in own if not checkpoint.SECOND_COPIES.search(name)}
    for name, module in model.named_modules():
        if isinstance(module, SinusoidalPositionalEmbedding):  # fairseq 0.12.2 wants it
            weights[name + "._float_tensor"] = torch.zeros(1)
    history = (state.get("optimizer_history") or [{}])[-1]
    return {
        "args": None,
        "cfg": {
            "task": _task_section(path, state, langs),
            "model": {k: _plain(path, k, v) for k, v in sorted(vars(args).items())},
            "criterion": None,
            # read by fairseq's hub interface; fields of the task refer to its dataset's
            "dataset": OmegaConf.to_container(OmegaConf.structured(DatasetConfig)),
            "generation": OmegaConf.to_container(OmegaConf.structured(GenerationConfig)),
            "bpe": None,
            "tokenizer": None,
        },
        "model": weights,
        "criterion": None,
        "optimizer_history": [
            {
                "criterion_name": "none",
                "optimizer_name": "none",
                "lr_scheduler_state": {},
                "num_updates": int(history.get("num_updates", 0)),
            }
        ],
        "task_state": {
            "source_symbols": list(source.symbols),
            "target_symbols": list(target.symbols),
        },
        "extra_state": {},
        "last_optimizer_state": None,
    }


def shortened(stock: Dict[str, Any], longest: int) -> Dict[str, Any]:
    """A ``stock_state`` for sentences of at most so many tokens, with no positions beyond.

    CTranslate2 writes them all down in float32, sinusoidal ones too: a fifth of a small model.
    """
    model, weights = dict(stock["cfg"]["model"]), dict(stock["model"])
    for side, module in (("source", "encoder"), ("target", "decoder")):
        name = f"max_{side}_positions"
        model[name] = min(model[name], longest)
        table = module + ".embed_positions.weight"
        if table in weights:  # learned; fairseq counts from after the padding's index
            weights[table] = weights[table][: model[name] + Dictionary().pad() + 1]
    return {**stock, "cfg": {**stock["cfg"], "model": model}, "model": weights}


def _task_section(path: str, state: Dict[str, Any], langs: Tuple[str, str]) -> Dict[str, Any]:
    task = checkpoint.section(state, "task")
    names = [name for name in TranslationConfig.__dataclass_fields__ if name[:5] != "eval_"]
    found = {name: _plain(path, name, checkpoint.get(task, name)) for name in names}
    kept = {name: value for name, value in found.items() if value is not None and name != "_name"}
    return {**kept, "_name": "translation", "source_lang": langs[0], "target_lang": langs[1]}


def _plain(path: str, name: str, value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return str(value)
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    if isinstance(value, (list, tuple)):
        return [_plain(path, name, item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(path, name, item) for key, item in value.items()}
    raise ExportError(
        f"{path}: the value of {name} is a {type(value).__name__}, and only plain types can be "
        "exported"
    )


def check_ctranslate2(path: str, state: Dict[str, Any]) -> None:
    """Refuse what CTranslate2 does not take, before any work.

    Raises:
        ExportError: the architecture or an option, by name; or CTranslate2 is not installed.
    """
    converter = _ctranslate2().converters.fairseq
    args = model_arguments(path, state)
    faults = []
    try:
        converter._get_model_spec(args)
    except AttributeError:
        pass  # another version of CTranslate2, which refuses while it converts
    except Exception as error:
        faults = re.findall(r"^- (.*)$", str(error), re.MULTILINE) or [str(error)]
    if not faults:  # options that it does not look at
        for name in ("adaptive_input", "cross_self_attention", "no_cross_attention"):
            if getattr(args, name, False):
                faults.append(f"Option --{name.replace('_', '-')} is not supported")
        if getattr(args, "adaptive_softmax_cutoff", None):
            faults.append("Option --adaptive-softmax-cutoff is not supported")
        for name in ("decoder_input_dim", "decoder_output_dim"):
            if getattr(args, name, args.decoder_embed_dim) != args.decoder_embed_dim:
                faults.append(f"Option --{name.replace('_', '-')} must be as --decoder-embed-dim")
    if faults:
        raise _not_taken(path, "; ".join(faults))


def write(state: Dict[str, Any], path: Any) -> None:
    """Write a file for ``torch.load``.

    On a full disk ``torch.save`` fails with an assertion of its own, which on torch 1.12 may end
    the process. So it writes to memory.

    Raises:
        OSError: the file cannot be written.
    """
    content = io.BytesIO()
    torch.save(state, content)
    with naming(path), open(path, "wb") as file:
        file.write(content.getbuffer())


def convert(path: str, stock: Dict[str, Any], folder: Path, quantization: str = "float32") -> None:
    """Write a model in CTranslate2's format into a new folder.

    CTranslate2's converter opens files with a full unpickler; the one that it gets here was
    written for it a moment before, from plain types.

    Args:
        path: the checkpoint, for messages.
        stock: what ``stock_state`` made of it.

    Raises:
        ExportError: CTranslate2 is not installed, or takes no such model.
    """
    converters = _ctranslate2().converters
    task = stock["cfg"]["task"]
    langs = task["source_lang"], task["target_lang"]
    args = Namespace(**{**stock["cfg"]["model"], "task": "translation"})
    with naming(folder), passing_folder(folder) as passing:
        file = os.path.join(passing, "model.pt")
        write({**stock, "cfg": None, "args": args}, file)
        for side, lang in zip(("source", "target"), langs):
            _write_symbols(
                stock["task_state"][side + "_symbols"],
                os.path.join(passing, f"dict.{lang}.txt"),
            )
        try:
            converter = converters.FairseqConverter(
                file, passing, source_lang=langs[0], target_lang=langs[1]
            )
            converter.convert(str(folder), quantization=quantization)
        except OSError:
            raise
        except Exception as error:
            raise _not_taken(path, str(error).strip() or type(error).__name__) from error


def read_record(folder: Path) -> Dict[str, Any]:
    """What a CTranslate2 folder was made of; empty for one that another tool has made.

    Raises:
        FileError: it is damaged.
    """
    if not (folder / RECORD).is_file():
        return {}
    found = read_json(folder / RECORD)
    kinds = {
        "parameters": int,
        "parameters_without_embeddings": int,
        "max_source_positions": int,
        "max_target_positions": int,
        "quantization": str,
    }
    for name, kind in kinds.items():
        if not isinstance(found.get(name), (kind, type(None))):
            raise FileError(f"{folder / RECORD}: {name} is no {kind.__name__}")
    return found


def symbols_of(folder: Path) -> Tuple[Set[str], Set[str]]:
    """The source and target symbols that a CTranslate2 folder knows.

    Raises:
        FileError: its vocabularies cannot be read.
    """
    shared = folder / "shared_vocabulary.json"
    files = [folder / "source_vocabulary.json", folder / "target_vocabulary.json"]
    if shared.is_file():
        files = [shared, shared]
    try:
        source, target = [set(json.loads(file.read_text(encoding="utf-8"))) for file in files]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise FileError(
            f"{folder}: expected a model of CTranslate2 4 with its vocabularies ({error})"
        ) from None
    return source, target


def _ctranslate2() -> Any:
    try:
        import ctranslate2
        import ctranslate2.converters
    except ImportError:
        raise ExportError("this needs CTranslate2: pip install ctranslate2") from None
    return ctranslate2


def _not_taken(path: str, reason: str) -> ExportError:
    return ExportError(
        f"CTranslate2 {_ctranslate2().__version__} cannot take the model {path}: "
        f"{' '.join(reason.split())}"
    )


def _write_symbols(symbols: List[str], path: str) -> None:
    """A dictionary as fairseq reads it, repeated symbols included."""
    seen: Set[str] = set()
    special = Dictionary().nspecial
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        seen.update(symbols[:special])
        for symbol in symbols[special:]:
            again = " #fairseq:overwrite" if symbol in seen else ""
            file.write(f"{symbol} 1{again}\n")
            seen.add(symbol)


_README = """# From {source} to {target}, for CTranslate2 ({quantization})

    pip install {packages}
    echo 'a sentence in {source}' | python translate.py

in this folder, with `translate.py`:

```python
import {imports}

translator = ctranslate2.Translator(".")  # device="cuda" for a GPU
{subwords}result = translator.translate_batch([{encode}], beam_size=5)
print({decode})
```

What it was made of and how it compares with fairseq: `{record}`.
"""


def readme(langs: Tuple[str, str], quantization: str, spm: bool, record: str) -> str:
    """How to translate a sentence with a converted model: raw with ``spm``, else in subwords."""
    words = "result[0].hypotheses[0]"
    processor = 'subwords = sentencepiece.SentencePieceProcessor(model_file="spm.model")\n'
    return _README.format(
        source=langs[0],
        target=langs[1],
        quantization=quantization,
        record=record,
        packages="ctranslate2 sentencepiece" if spm else "ctranslate2",
        imports="ctranslate2, sentencepiece" if spm else "ctranslate2",
        subwords=processor if spm else "# in and out: subwords, with spaces between\n",
        encode="subwords.encode(input(), out_type=str)" if spm else "input().split()",
        decode=f"subwords.decode({words})" if spm else f'" ".join({words})',
    )
