"""Models for CTranslate2: a folder with the model, its README and a record of what it is."""

import json
import os
import re
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List, Set, Tuple

from fairseq.data import Dictionary

from ..checkpoints import Checkpoint
from ..files import FileError, naming, passing_folder, read_json
from .fairseq import ExportError, model_arguments, stock_state, write

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
RECORD = "kd_export.json"  # in the folder: what it was made of


def export_ctranslate2(
    checkpoint: Checkpoint,
    source: Dictionary,
    target: Dictionary,
    langs: Tuple[str, str],
    folder: Path,
) -> None:
    """Write a checkpoint as a new folder that CTranslate2 opens, in float32; unverified.

    Raises:
        ExportError: CTranslate2 is not installed, or takes no such model.
    """
    check(checkpoint)
    convert(checkpoint, stock_state(checkpoint, source, target, langs), folder)


def check(checkpoint: Checkpoint) -> None:
    """Refuse what CTranslate2 does not take, before any work.

    Raises:
        ExportError: the architecture or an option, by name; or CTranslate2 is not installed.
    """
    converter = _ctranslate2().converters.fairseq
    args = model_arguments(checkpoint)
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
        raise _not_taken(checkpoint, "; ".join(faults))


def convert(
    checkpoint: Checkpoint, stock: Dict[str, Any], folder: Path, quantization: str = "float32"
) -> None:
    """Write a model in CTranslate2's format into a new folder.

    CTranslate2's converter opens files with a full unpickler; the one that it gets here was
    written for it a moment before, from plain types.

    Args:
        checkpoint: for messages.
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
            raise _not_taken(checkpoint, str(error).strip() or type(error).__name__) from error


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
            raise FileError(f"{folder / RECORD}: {name} is not of the type {kind.__name__}")
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


def _not_taken(checkpoint: Checkpoint, reason: str) -> ExportError:
    return ExportError(
        f"CTranslate2 {_ctranslate2().__version__} cannot take {checkpoint}: "
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
