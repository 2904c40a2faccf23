"""Models for stock fairseq: checkpoints of plain types, without the plugin or a teacher."""

import io
import logging
import math
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple

import numpy as np
import torch
from fairseq import models
from fairseq.data import Dictionary
from fairseq.dataclass.configs import DatasetConfig, GenerationConfig
from fairseq.modules import SinusoidalPositionalEmbedding
from fairseq.tasks import TASK_DATACLASS_REGISTRY
from omegaconf import OmegaConf

from ..checkpoints import (
    LANGUAGE_MODEL,
    SECOND_COPIES,
    TRANSLATION,
    Checkpoint,
    CheckpointError,
    Dictionaries,
    build_model,
)
from ..files import naming
from . import verify
from .formats import ExportError, Format, Model, Proof, Verdict

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5  # of log-probabilities per token: rounding, and no more

_FAIRSEQS = frozenset(models.ARCH_MODEL_REGISTRY)  # as long as no --user-dir has been imported

# A command of fairseq's; that the plugin is not there is part of the proof, unless a --user-dir
# that an architecture needs imports it
_STOCK = """
import sys
from fairseq_cli.{} import cli_main
cli_main()
without = "--user-dir" not in sys.argv
sys.exit("the plugin was imported" if without and "kd_plugin" in sys.modules else 0)
"""


class FairseqFormat(Format):
    """A checkpoint that stock fairseq opens, verified by fairseq-generate, or a language model by
    fairseq-eval-lm, in another process."""

    name = "fairseq"

    def write(self, model: Model, output: Path, options: Mapping[str, Any]) -> None:
        write(model.stock, output)

    def verify(
        self, model: Model, output: Path, options: Mapping[str, Any], proof: Proof
    ) -> Verdict:
        text = proof.text
        user_dir = None if model.checkpoint.architecture in _FAIRSEQS else proof.user_dir
        where = f"fairseq with --user-dir {user_dir}" if user_dir else "stock fairseq"
        if isinstance(text, verify.Blocks):
            tokens, difference = compare_scores(model.checkpoint, text, output, user_dir)
            same = f"{tokens} tokens of {text.subset} scored the same, within"
        else:
            difference = compare(model.checkpoint, text, output, proof.beam, user_dir)
            same = (
                f"{text.sentences} sentences of {text.subset} translated the same (beam "
                f"{proof.beam}), scores within"
            )
        return Verdict([f"verified in {where}: {same} {difference:.1g} per token"], {})


def refuse_task(checkpoint: Checkpoint) -> None:
    """Models of other tasks than these are not exported.

    Raises:
        ExportError: it was trained for another one.
    """
    if not (checkpoint.is_translation or checkpoint.kind is LANGUAGE_MODEL):
        raise ExportError(
            f"{checkpoint} was trained for the task {checkpoint.task!r}; only models of the tasks "
            f"'translation' and 'language_modeling' can be exported.{checkpoint.advise_task()}"
        )


def model_arguments(checkpoint: Checkpoint) -> Namespace:
    """What building a checkpoint's model reads of its options, plain types, defaults filled in.

    Raises:
        ExportError: stock fairseq could not use such a model or task.
    """
    refuse_task(checkpoint)
    try:
        complete = vars(checkpoint.complete_options())
    except CheckpointError as error:
        raise ExportError(str(error)) from error
    for side in ("encoder", "decoder"):
        sizes = complete.get(side + "_kernel_size_list")
        if isinstance(sizes, (list, tuple)) and len(sizes) == 1:
            raise ExportError(
                f"{checkpoint}: stock fairseq cannot build the architecture "
                f"{checkpoint.architecture} with a single layer from plain types"
            )
    return Namespace(**{name: _plain(checkpoint, name, v) for name, v in complete.items()})


def unusual_options(args: Namespace) -> List[str]:
    """Options by which a transformer is of a kind that other software has no place for.

    Args:
        args: ``model_arguments`` of a transformer.
    """
    found = [
        f"Option --{name.replace('_', '-')} is not supported"
        for name in (
            *("adaptive_input", "cross_self_attention", "no_cross_attention"),
            "adaptive_softmax_cutoff",
        )
        if getattr(args, name, None)
    ]
    for name in ("decoder_input_dim", "decoder_output_dim"):
        if getattr(args, name, args.decoder_embed_dim) != args.decoder_embed_dim:
            found.append(f"Option --{name.replace('_', '-')} must be as --decoder-embed-dim")
    return found


def stock_state(
    checkpoint: Checkpoint, source: Dictionary, target: Dictionary, langs: Tuple[str, str]
) -> Dict[str, Any]:
    """A checkpoint's model as a checkpoint that stock fairseq uses.

    It holds weights, what building the model and its task reads, and both symbol lists; no
    optimizer, no criterion, nothing of a teacher, and nothing but dictionaries, lists, strings,
    numbers and tensors. Both ends of the supported versions build from it.

    Args:
        source, target: its dictionaries.

    Raises:
        ExportError: this fairseq cannot rebuild the model.
    """
    args = model_arguments(checkpoint)
    kind = checkpoint.kind or TRANSLATION
    task = kind.new_task(Dictionaries(source, target, "its own"), checkpoint.max_positions)
    try:
        # building completes the arguments, too
        model = build_model(args, checkpoint.weights, task)
    except Exception as error:
        reason = " ".join(str(error).split())[:500]
        raise ExportError(
            f"{checkpoint}: its model cannot be rebuilt with this fairseq and dictionaries of "
            f"{len(source)} and {len(target)} symbols ({type(error).__name__}: {reason})"
        ) from error
    model.to(checkpoint.dtype)
    own = model.state_dict().items()
    weights = {name: w for name, w in own if not SECOND_COPIES.search(name)}
    for name, module in model.named_modules():
        if isinstance(module, SinusoidalPositionalEmbedding):  # fairseq 0.12.2 wants it
            weights[name + "._float_tensor"] = torch.zeros(1)
    return {
        "args": None,
        "cfg": {
            "task": _task_section(checkpoint, langs),
            "model": {k: _plain(checkpoint, k, v) for k, v in sorted(vars(args).items())},
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
                "num_updates": checkpoint.updates,
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

    CTranslate2 writes them all down in float32, sinusoidal ones too: a sixth of a small model.
    """
    model, weights = dict(stock["cfg"]["model"]), dict(stock["model"])
    for side, module in (("source", "encoder"), ("target", "decoder")):
        name = f"max_{side}_positions"
        model[name] = min(model[name], longest)
        table = module + ".embed_positions.weight"
        if table in weights:  # learned; fairseq counts from after the padding's index
            weights[table] = weights[table][: model[name] + Dictionary().pad() + 1]
    return {**stock, "cfg": {**stock["cfg"], "model": model}, "model": weights}


def _task_section(checkpoint: Checkpoint, langs: Tuple[str, str]) -> Dict[str, Any]:
    kind = checkpoint.kind or TRANSLATION
    fields = TASK_DATACLASS_REGISTRY[kind.task].__dataclass_fields__
    names = [name for name in fields if name[:5] != "eval_"]
    found = {name: _plain(checkpoint, name, checkpoint.task_options.get(name)) for name in names}
    kept = {name: value for name, value in found.items() if value is not None and name != "_name"}
    named = dict(zip(("source_lang", "target_lang"), langs)) if any(langs) else {}
    return {**kept, "_name": kind.task, **named}


def _plain(checkpoint: Checkpoint, name: str, value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return str(value)
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    if isinstance(value, (list, tuple)):
        return [_plain(checkpoint, name, item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(checkpoint, name, item) for key, item in value.items()}
    raise ExportError(
        f"{checkpoint}: the value of {name} is a {type(value).__name__}, and only plain types can "
        "be exported"
    )


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


def compare(
    checkpoint: Checkpoint,
    text: verify.Text,
    exported: Path,
    beam: int,
    user_dir: Optional[str] = None,
) -> float:
    """Translations of the export by stock fairseq, in a process that has never seen the plugin.

    Args:
        checkpoint: translates here, in this process.
        user_dir: what that process imports, where the architecture is not fairseq's own.

    Returns:
        the largest difference of two scores, in nats per token.

    Raises:
        ExportError: they are not the checkpoint's.
    """
    logger.info(f"translating {text.sentences} sentences with {checkpoint}")
    expected = verify.by_fairseq(verify.build(checkpoint, text, beam), text, beam)
    logger.info("translating them with the export, in stock fairseq without the plugin")
    source, target = text.corpus.data.langs
    printed = _in_stock_fairseq(
        *("generate", text.folder, exported, user_dir, "--gen-subset", text.subset),
        *("--beam", str(beam), "--source-lang", source, "--target-lang", target),
        *("--max-tokens", str(verify.MAX_TOKENS)),
        *("--max-source-positions", str(text.task.cfg.max_source_positions)),
        *("--max-target-positions", str(text.task.cfg.max_target_positions)),
        "--skip-invalid-size-inputs-valid-test",
    )
    found = {}
    for line in re.findall(r"^H-(.*)$", printed, re.MULTILINE):
        i, score, subwords = line.split("\t", 2)
        found[int(i)] = (float(score) * math.log(2), subwords)  # it prints them to base 2
    if found.keys() != expected.keys():
        raise ExportError(
            f"stock fairseq translates {len(found)} sentences with the export, the checkpoint "
            f"{len(expected)}"
        )
    for i, hypothesis in sorted(expected.items()):
        if found[i][1] != hypothesis.subwords:
            raise ExportError(
                f"the export differs from the checkpoint: sentence {i} is {found[i][1]!r} in stock "
                f"fairseq, {hypothesis.subwords!r} before"
            )
    return _tolerable(largest(abs(found[i][0] - expected[i].score) for i in expected))


def compare_scores(
    checkpoint: Checkpoint, text: verify.Blocks, exported: Path, user_dir: Optional[str] = None
) -> Tuple[int, float]:
    """The same of a language model: how it scores each token of a text.

    Returns:
        the number of tokens, and the largest difference of two scores, in nats.

    Raises:
        ExportError: the scores are not the checkpoint's.
    """
    logger.info(f"scoring text with {checkpoint}, and with the export in stock fairseq")
    model = checkpoint.build(text.task, kind=LANGUAGE_MODEL).float()
    model.prepare_for_inference_(Namespace(generation=verify.generation(1)))
    expected = text.scores(model)
    printed = _in_stock_fairseq(
        *("eval_lm", text.folder, exported, user_dir, "--gen-subset", text.subset),
        *("--batch-size", "1", "--output-word-probs", *text.flags),
    )
    found = {
        int(number): [float(score) for score in _SCORE.findall(words)]
        for number, words in _SCORED.findall(printed)
    }
    lengths = [{i: len(scores) for i, scores in one.items()} for one in (found, expected)]
    if lengths[0] != lengths[1]:
        raise ExportError(
            f"stock fairseq scores {sum(lengths[0].values())} tokens with the export, the "
            f"checkpoint {sum(lengths[1].values())}"
        )
    pairs = [pair for i in expected for pair in zip(found[i], expected[i])]
    return len(pairs), _tolerable(largest(abs(a - b) for a, b in pairs))


def largest(differences: Iterable[float]) -> float:
    """NaN if one of them is, which ``max`` may pass over."""
    return float(np.max(list(differences)))


# What fairseq-eval-lm prints of a block: its number, and each symbol with its score
_SCORED = re.compile(r"fairseq_cli\.eval_lm(?: \| |:)(\d+) (.+)$", re.MULTILINE)
_SCORE = re.compile(r" \[(-?(?:\d+\.\d+|inf|nan))\](?=\t|$)")


def _tolerable(difference: float) -> float:
    if not difference <= TOLERANCE:
        raise ExportError(
            f"the export differs from the checkpoint: its scores by up to {difference:.2g} per "
            f"token ({TOLERANCE:.0e} at most was expected)"
        )
    return difference


def _in_stock_fairseq(
    program: str, data: Path, exported: Path, user_dir: Optional[str], *more: str
) -> str:
    """What a program of fairseq's prints of an export, in a process without the plugin.

    Args:
        program: a module of ``fairseq_cli``.

    Raises:
        ExportError: it fails.
    """
    command = [
        *(sys.executable, "-W", "ignore", "-c", _STOCK.format(program), str(data.resolve())),
        *("--path", str(exported.resolve()), "--cpu", "--num-workers", "0"),
        *("--required-batch-size-multiple", "1", *more),
        *(("--user-dir", str(Path(user_dir).resolve())) if user_dir else ()),
    ]
    done = subprocess.run(
        command,
        cwd=str(data),
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    printed = [part.decode("utf-8", "replace") for part in (done.stdout, done.stderr)]
    if done.returncode:
        lines = printed[1].strip().splitlines() or ["no message"]
        raise ExportError(f"stock fairseq cannot use the export: {lines[-1][:500]}")
    return "\n".join(printed)
