"""``fairseq-kd-export``: a model that goes without the plugin, and is proved to be the same one.

Writes a checkpoint for stock fairseq, or a folder for CTranslate2; averages checkpoints first if
wanted. What it has written is compared with the checkpoint before it gets its name.
"""

import argparse
import contextlib
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from fairseq import utils
from fairseq.data import Dictionary, data_utils
from sentencepiece import SentencePieceProcessor

from ..checkpoints import Checkpoint, Role, average, count_parameters, digest
from ..decoding import DataBin
from ..export import ctranslate2 as to_ctranslate2
from ..export import fairseq as to_fairseq
from ..export import verify as verification
from ..export.ctranslate2 import QUANTIZATIONS, RECORD
from ..export.fairseq import ExportError
from ..files import temporary, write_json
from .arguments import Help, add_trust, exit_code

PROG = "fairseq-kd-export"
ROLE = Role("model", "--trust-checkpoint", "--data")
logger = logging.getLogger("kd_plugin.export")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(PROG, description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add(
        "--path",
        required=True,
        metavar="S.pt[:MORE]",
        help="the checkpoint; several with --average",
    )
    add("--average", action="store_true", help="average the checkpoints' weights first")
    add("--output", required=True, metavar="OUT", help="the file or, of CTranslate2, the folder")
    add("--format", default="fairseq", choices=("fairseq", "ctranslate2"), help="whose it will be")
    add(
        "--quantization",
        choices=QUANTIZATIONS,
        help="of CTranslate2's weights (default: float32)",
    )
    add(
        "--spm",
        metavar="MODEL",
        help="SentencePiece model to put into CTranslate2's folder; implies --remove-bpe "
        "sentencepiece",
    )
    add(
        "--max-positions",
        type=int,
        metavar="N",
        help="longest sentence, in subwords, that CTranslate2's model takes; a small model gets "
        "smaller by what is left out (default: the checkpoint's)",
    )
    add("-s", "--source-lang", metavar="SRC", help="(default: the checkpoint's)")
    add("-t", "--target-lang", metavar="TRG", help="(default: the checkpoint's)")
    add("--overwrite", action="store_true", help="replace what is there, once the new one is good")
    add_trust(add)
    add = parser.add_argument_group("verification").add_argument
    add(
        "--data",
        metavar="DIR",
        help="data-bin to verify on, with the model's dictionaries (default: the one that the "
        "checkpoint names)",
    )
    add("--gen-subset", default="valid", metavar="SPLIT", help="which sentences")
    add(
        "--verify-sentences",
        type=int,
        metavar="N",
        help="only the first N; 0 for all (default: 200, or all for CTranslate2's BLEU)",
    )
    add("--beam", type=int, default=5, metavar="N", help="of the translations that are compared")
    add(
        "--remove-bpe",
        "--post-process",
        nargs="?",
        const="@@ ",
        dest="post_process",
        metavar="SYMBOL",
        help="what BLEU is scored without, as fairseq-generate has it",
    )
    add("--no-verify", action="store_true", help="compare nothing")
    return parser


def main(arguments: Optional[List[str]] = None) -> int:
    options = make_parser().parse_args(arguments)
    return exit_code(PROG, lambda: run(options), resumable=False)


def run(options: argparse.Namespace) -> None:
    paths: List[str] = utils.split_paths(options.path)
    output = Path(options.output)
    _refuse(options, paths, output)
    if len(paths) > 1:
        checkpoint = average(paths, ROLE, options.trust_checkpoint)
        logger.info(f"averaged {len(paths)} checkpoints")
    else:
        checkpoint = Checkpoint.open(paths[0], ROLE, options.trust_checkpoint)
    if options.format == "ctranslate2":
        to_ctranslate2.check(checkpoint)
    langs = _languages(options, checkpoint)
    data, source, target = _dictionaries(options, checkpoint, langs)
    stock = to_fairseq.stock_state(checkpoint, source, target, langs)
    if options.max_positions:
        stock = to_fairseq.shortened(stock, options.max_positions)
    with _text(options, checkpoint, data, stock) as text, _replacing(
        output, options.overwrite
    ) as new:
        if options.format == "ctranslate2":
            record = _write_ctranslate2(options, paths, checkpoint, stock, text, new)
        else:
            record = _write_stock(options, checkpoint, stock, text, new)
    if text is None:
        logger.warning(f"{output} is UNVERIFIED: nobody has compared it with {options.path}")
    print("\n".join([f"exported {output}", *record]), flush=True)


def _refuse(options: argparse.Namespace, paths: List[str], output: Path) -> None:
    """Flags that mean nothing together, and an output that would destroy something."""
    faults = []
    if len(paths) > 1 and not options.average:
        faults.append(
            f"--path names {len(paths)} checkpoints: --average makes one model of them; an "
            "ensemble cannot be exported"
        )
    if options.format == "fairseq":
        for name in ("quantization", "spm", "max_positions"):
            if getattr(options, name) is not None:
                flag = name.replace("_", "-")
                faults.append(f"--{flag} needs --format ctranslate2")
    if options.max_positions is not None and options.max_positions < 2:
        faults.append("--max-positions must be 2 or more")
    if options.beam < 1:
        faults.append("--beam must be 1 or more")
    if options.verify_sentences is not None and options.verify_sentences < 0:
        faults.append("--verify-sentences must be 0 (all) or more")
    if options.spm:
        try:
            SentencePieceProcessor(model_file=options.spm)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            faults.append(f"--spm {options.spm}: no SentencePiece model ({reason})")
    if not output.resolve().parent.is_dir():
        faults.append(f"--output {output}: there is no folder {output.parent}")
    if options.data and not os.path.isdir(options.data):
        faults.append(f"--data {options.data}: there is no such folder")
    ours = os.path.realpath(str(output))
    for name in (*paths, options.data, options.spm):
        if name and (os.path.realpath(name) + os.sep).startswith(ours + os.sep):
            faults.append(f"--output {output} would overwrite {name}")
    if output.exists():
        folder = output.is_dir()
        if not options.overwrite:
            faults.append(f"--output {output} is there already; choose another, or --overwrite")
        elif folder != (options.format == "ctranslate2") or (
            folder and not (output / RECORD).is_file() and any(output.iterdir())
        ):
            faults.append(
                f"--output {output}: --overwrite replaces only what {PROG} --format "
                f"{options.format} has made"
            )
    if faults:
        raise ExportError("; ".join(faults))


def _languages(options: argparse.Namespace, checkpoint: Checkpoint) -> Tuple[str, str]:
    found = checkpoint.languages
    if not all(found):  # fairseq-train had them from the data's file names, and told nobody
        folder = options.data or checkpoint.data
        if folder and os.path.isdir(folder):
            found = data_utils.infer_language_pair(folder)
    source, target = options.source_lang or found[0], options.target_lang or found[1]
    if not (source and target):
        raise ExportError(f"{checkpoint} names no languages: say --source-lang and --target-lang")
    return source, target


def _dictionaries(
    options: argparse.Namespace, checkpoint: Checkpoint, langs: Tuple[str, str]
) -> Tuple[Optional[DataBin], Dictionary, Dictionary]:
    """The data to verify on, if there are any, and the model's dictionaries."""
    found = checkpoint.dictionaries(langs)
    data = None
    if options.data:
        data = DataBin(options.data, *langs)
    elif checkpoint.data and not options.no_verify:
        # what is missing there is told when it is needed
        with contextlib.suppress(ValueError):
            data = DataBin(checkpoint.data, *langs)
    if found is None:
        if data is None:
            raise ExportError(
                "{}: its dictionaries were found nowhere; --data DIR names a folder with "
                "dict.{}.txt and dict.{}.txt".format(checkpoint, *langs)
            )
        return data, data.source, data.target
    source, target, origin = found
    if data is not None:
        for lang, mine, other in zip(langs, (source, target), (data.source, data.target)):
            if mine.symbols != other.symbols:
                raise ExportError(
                    f"{checkpoint}: dict.{lang}.txt in {data.folder} ({len(other)} symbols) is not "
                    f"the model's, {origin} ({len(mine)} symbols); --data names a data-bin "
                    "that was made with the model's dictionaries"
                )
    return data, source, target


@contextlib.contextmanager
def _text(
    options: argparse.Namespace,
    checkpoint: Checkpoint,
    data: Optional[DataBin],
    stock: Dict[str, Any],
) -> Iterator[Optional[verification.Text]]:
    """The sentences to verify on; None if that is not wanted."""
    if options.no_verify:
        yield None
        return
    if data is None:
        raise ExportError(
            f"no data to prove the export on: {checkpoint} names no data-bin that is there. "
            "--data DIR names one; --no-verify exports without a proof"
        )
    count = options.verify_sentences
    if count is None:
        count = 0 if options.format == "ctranslate2" else 200
    with tempfile.TemporaryDirectory() as folder:
        text = verification.Text.cut(
            data, options.gen_subset, count, _max_positions(stock), Path(folder)
        )
        if options.format == "ctranslate2" and text.corpus.references is None:
            raise ExportError(
                f"{data.folder}: {options.gen_subset} has no references, and they are what "
                "CTranslate2 is compared on"
            )
        yield text


def _max_positions(stock: Dict[str, Any]) -> Tuple[int, int]:
    model = stock["cfg"]["model"]
    return model["max_source_positions"], model["max_target_positions"]


@contextlib.contextmanager
def _replacing(output: Path, overwrite: bool) -> Iterator[Path]:
    """Where to write; it becomes ``output`` if all goes well, and leaves nothing otherwise."""
    new = temporary(output)
    try:
        yield new
        if output.exists() and not overwrite:
            raise ExportError(f"{output} already exists: another process has made it")
        if output.is_dir():
            old = temporary(output)
            os.replace(output, old)
            os.replace(new, output)
            shutil.rmtree(old)
        else:
            os.replace(new, output)
    finally:
        if new.is_dir():
            shutil.rmtree(new)
        elif new.exists():
            new.unlink()


def _size(stock: Dict[str, Any], files: List[Path]) -> str:
    total, rest = count_parameters(stock["model"])
    return (
        f"| {total:,} parameters, {rest:,} without embeddings, "
        f"{sum((file.stat().st_size for file in files)):,} bytes"
    )


def _write_stock(
    options: argparse.Namespace,
    checkpoint: Checkpoint,
    stock: Dict[str, Any],
    text: Optional[verification.Text],
    new: Path,
) -> List[str]:
    to_fairseq.write(stock, new)
    lines = [_size(stock, [new])]
    if text is not None:
        difference = verification.compare_with_stock(checkpoint, text, new, options.beam)
        lines.append(
            f"| verified in stock fairseq: {text.sentences} sentences of {options.gen_subset} "
            f"translated the same (beam {options.beam}), scores within {difference:.1g} per token"
        )
    return lines


def _write_ctranslate2(
    options: argparse.Namespace,
    paths: List[str],
    checkpoint: Checkpoint,
    stock: Dict[str, Any],
    text: Optional[verification.Text],
    new: Path,
) -> List[str]:
    import ctranslate2

    quantization = options.quantization or "float32"
    logger.info(f"converting {checkpoint} to {quantization}")
    to_ctranslate2.convert(checkpoint, stock, new, quantization)
    if options.spm:
        shutil.copyfile(options.spm, str(new / "spm.model"))
    task = stock["cfg"]["task"]
    langs = task["source_lang"], task["target_lang"]
    readme = to_ctranslate2.readme(langs, quantization, bool(options.spm), RECORD)
    (new / "README.md").write_text(readme, encoding="utf-8")
    lines = [_size(stock, sorted(new.iterdir()))]
    total, rest = count_parameters(stock["model"])
    positions = _max_positions(stock)
    record: Dict[str, Any] = {
        "source_lang": langs[0],
        "target_lang": langs[1],
        "checkpoints": [{"path": os.path.abspath(p), "sha256": digest(p)} for p in paths],
        "quantization": quantization,
        "parameters": total,
        "parameters_without_embeddings": rest,
        "max_source_positions": positions[0],
        "max_target_positions": positions[1],
        "sentencepiece": "spm.model" if options.spm else None,
        "ctranslate2": ctranslate2.__version__,
        "verification": None,
    }
    if text is not None:
        found = verification.compare_with_ctranslate2(
            *(checkpoint, stock, text, new, quantization, options.beam, _detokenise(options))
        )
        found.update(subset=text.subset, beam=options.beam, remove_bpe=_symbol(options))
        record["verification"] = found
        lines += [
            f"| verified in CTranslate2 {ctranslate2.__version__}: tokens of {found['sentences']} "
            f"references scored within {found['max_token_difference_float32']:.1g} before "
            f"quantization, {found['max_token_difference']:.2g} "
            f"({found['mean_token_difference']:.2g} on average) as {found['compute_type']}",
            f"| BLEU {found['bleu_fairseq']:.2f} in fairseq, {found['bleu']:.2f} in CTranslate2: "
            f"drop {found['bleu_drop']:.2f} ({found['bleu_signature']}, {found['sentences']} "
            f"sentences of {found['subset']}, beam {found['beam']})",
        ]
    write_json(new / RECORD, record)
    return lines


def _symbol(options: argparse.Namespace) -> Optional[str]:
    return options.post_process or ("sentencepiece" if options.spm else None)


def _detokenise(options: argparse.Namespace) -> Callable[[str], str]:
    return lambda subwords: data_utils.post_process(subwords, _symbol(options))


if __name__ == "__main__":
    sys.exit(main())
