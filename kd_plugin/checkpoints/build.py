"""The one place where a checkpoint's model is built."""

import ast
import os
from argparse import ArgumentParser, Namespace
from typing import Any, Dict, Mapping, Optional, Tuple

import torch
from fairseq import models, utils
from fairseq.data import Dictionary
from fairseq.models.bart import BARTModel
from fairseq.models.nat import FairseqNATModel
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer.transformer_config import (
    DecoderConfig,
    EncDecBaseConfig,
    QuantNoiseConfig,
    TransformerConfig,
)
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from ..errors import UserError
from .untrusted import bounded_memory

# What a YAML file for fairseq-hydra-train may write as a section, "encoder: {layers: 2}", and the
# command line as options with a prefix, "--encoder-layers 2"
_SECTIONS = {
    "encoder": EncDecBaseConfig,
    "decoder": DecoderConfig,
    "quant_noise": QuantNoiseConfig,
}

# What tells a transformer from another model, and one transformer from another
_OF_EACH_SIDE = ("embed_dim", "ffn_embed_dim", "layers", "attention_heads", "normalize_before")
_TRANSFORMERS = (
    *(f"{side}_{option}" for side in ("encoder", "decoder") for option in _OF_EACH_SIDE),
    *("encoder_learned_pos", "decoder_learned_pos", "no_token_positional_embeddings"),
    *("activation_fn", "share_all_embeddings", "share_decoder_input_output_embed"),
)
TRANSFORMER = "transformer"  # the architecture that takes all its sizes from options

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def import_user_dir(folder: str, flag: str) -> None:
    """Import a folder that registers architectures or tasks, as fairseq does for ``--user-dir``.

    Args:
        flag: that names it, for messages.

    Raises:
        UserError: there is no such folder, or it cannot be imported.
    """
    absolute = os.path.abspath(folder)
    if os.path.basename(absolute) == "kd_plugin":
        # any copy of this plugin is taken; fairseq refuses a second folder of the same name
        imported: Any = getattr(utils.import_user_module, "memo", set())
        utils.import_user_module.memo = imported | {absolute}
    try:
        utils.import_user_module(Namespace(user_dir=folder))
    except FileNotFoundError as error:  # fairseq's has the path alone
        raise UserError(f"{flag}: no such folder: {error}") from error
    except (ImportError, ValueError) as error:
        raise UserError(f"{flag} {folder} cannot be imported: {error}") from error


def is_known(architecture: Optional[str]) -> bool:
    """Whether this fairseq, with what --user-dir has imported, knows an architecture."""
    return architecture in models.ARCH_MODEL_REGISTRY or architecture in models.MODEL_REGISTRY


def as_transformer(options: Mapping[str, Any], is_namespace: bool) -> Optional[Dict[str, Any]]:
    """Options under which fairseq's own transformer is built: what a name that is nobody's here
    stands for, if its options are a transformer's. An architecture is mostly no more than sizes
    under a name, and they were saved; loading the weights will tell.

    Args:
        is_namespace: whether they were saved as the command line has them.

    Returns:
        None if they are not.
    """
    named = {**options, "_name": TRANSFORMER, "arch": TRANSFORMER}
    flat = named if is_namespace else flat_options(named)
    return flat if all(flat.get(name) is not None for name in _TRANSFORMERS) else None


def parse_overrides(text: str, flag: str) -> Dict[str, Any]:
    """Options of a model that are to change: a dictionary written as Python literals.

    Args:
        flag: that ``text`` came with, for messages.

    Raises:
        UserError: it is something else.
    """
    try:
        overrides = ast.literal_eval(text or "{}")
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        overrides = None
    if not isinstance(overrides, dict) or not all(isinstance(key, str) for key in overrides):
        raise UserError(
            f"{flag}: expected a dictionary of options, {{'dropout': 0.1}} say; got {text!r}"
        )
    return overrides


def translation_task(
    source: Dictionary, target: Dictionary, max_positions: Tuple[int, int], **more: Any
) -> TranslationTask:
    """fairseq's task ``translation`` with these dictionaries.

    Args:
        max_positions: tokens of the longest source and target.
        more: further fields of its configuration.
    """
    longest = dict(zip(("max_source_positions", "max_target_positions"), max_positions))
    return TranslationTask(TranslationConfig(**longest, **more), source, target)


def build_model(options: Any, weights: Mapping[str, torch.Tensor], task: Any) -> Any:
    """Build a model and load its weights.

    Args:
        options: its configuration, as fairseq's ``build_model`` takes it.
        weights: by parameter name.
        task: a task with the model's dictionaries. Not the student's: through that one,
            validation BLEU would become the teacher's.

    Raises:
        Exception: of nearly any kind, when the options are not those of these weights.
    """
    with bounded_memory(weights):
        model = models.build_model(options, task)
        # loading renames in place what older versions of fairseq named otherwise
        model.load_state_dict(dict(weights), strict=True, model_cfg=options)
    return model


def new_model(options: Any, task: Any, seed: int) -> Any:
    """A model as fairseq starts to train it; the state of torch's generator stays as it was.

    Args:
        options, task: as of ``build_model``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return models.build_model(options, task)


def flat_options(options: Mapping[str, Any]) -> Dict[str, Any]:
    """A configuration of fairseq-hydra-train's with a transformer's options as the command line has
    them: each section's with its prefix, and a value where fairseq takes its default.

    Of a section fairseq reads nothing but the section. Beside it there are options with its prefix
    that nobody gave and nothing reads, the architecture's; with older versions of omegaconf they,
    and others, are None.

    Raises:
        TypeError: a section has a field that fairseq's has not.
    """
    flat, architecture = dict(options), options.get("_name") or options.get("arch")
    model = models.ARCH_MODEL_REGISTRY.get(architecture, object)
    if architecture in models.MODEL_DATACLASS_REGISTRY or not issubclass(model, TransformerModel):
        return flat
    for name, fields in _SECTIONS.items():
        if isinstance(flat.get(name), dict):
            section = vars(fields(**flat.pop(name)))
            flat.update({f"{name}_{key}": section[key] for key in section if key != "_name"})
    default = TransformerConfig()
    return {k: getattr(default, k, None) if v is None else v for k, v in flat.items()}


def is_autoregressive(model: Any) -> bool:
    """Whether a model writes a translation symbol by symbol, from left to right.

    The others (Levenshtein, CMLM, insertion, ...) write all of it at once and refine it: they give
    no distribution over the next symbol.
    """
    return not isinstance(model, FairseqNATModel)


def complete_options(
    architecture: str, options: Mapping[str, Any], max_positions: Tuple[int, int]
) -> Namespace:
    """What building a model reads of its options, with the architecture's defaults filled in.

    Raises:
        KeyError: this fairseq does not know the architecture.
        Exception: of nearly any kind: the options are not those of the architecture.
    """
    if architecture in models.MODEL_DATACLASS_REGISTRY:
        return Namespace(**{**options, "_name": architecture})  # they were saved complete
    parser = ArgumentParser()
    models.ARCH_MODEL_REGISTRY[architecture].add_args(parser)
    names = sorted(action.dest for action in parser._actions)
    found = {name: options[name] for name in names if name in options}
    found.update(zip(("max_source_positions", "max_target_positions"), max_positions))
    # an LSTM takes its adaptive softmax from there
    criterion = options.get("criterion")
    found["criterion"] = criterion if criterion == "adaptive_loss" else None
    if issubclass(models.ARCH_MODEL_REGISTRY[architecture], BARTModel):
        found["task"] = "translation"  # which it asks for when its weights are loaded
    complete = Namespace(**found, arch=architecture, _name=architecture)
    models.ARCH_CONFIG_REGISTRY[architecture](complete)
    return complete
