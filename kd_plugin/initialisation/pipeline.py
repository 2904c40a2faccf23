"""From a teacher's checkpoint to one that a student's training starts from."""

import dataclasses
import os
import shlex
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.models.bart import BARTModel
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer_lm import TransformerLanguageModel

from ..checkpoints import (
    EACH_DIRECTION,
    LANGUAGE_MODEL,
    TRANSLATION,
    Checkpoint,
    Dictionaries,
    Kind,
    Role,
    added_symbols,
    count_parameters,
    kind_of,
    new_model,
    some,
    untaught,
)
from ..errors import Faults, UserError
from ..export import languages_of, model_arguments, stock_state, write
from ..files import replacing
from . import weights
from .flags import Flags
from .layers import choose, parse_counts, parse_layers
from .weights import Rows

TEACHER = Role("teacher", "--trust-checkpoint", "--teacher-data", task="--task")
_STUDENT = Role("student", data="--dictionary")
_NEW_SYMBOLS = ("refuse", "random")
_LEARNED = "{}.embed_positions.weight"

# fairseq's classes of transformers whose layers are all alike; those of a --user-dir are asked, too
_CLASSES = (TransformerModel, BARTModel, TransformerLanguageModel)
# Options of a model that cannot be taken apart, and why
_TIED_TO_DEPTH = "a decoder's layer reads the encoder's layer of its own number"
_IN_CLUSTERS = "its symbols are in clusters by frequency, of several widths"
_REFUSED = {
    "layer_wise_attention": _TIED_TO_DEPTH,
    "adaptive_input": _IN_CLUSTERS,
    "adaptive_softmax_cutoff": _IN_CLUSTERS,
    "character_embeddings": "its symbols are made of characters",
    "base_layers": "some of its layers are spread over all GPUs",
    "merge_src_tgt_embed": "its dictionaries are merged while it is built",
}


class Asked(NamedTuple):
    """A student, and the teacher that it is made of.

    Attributes:
        teacher: its checkpoint.
        output: the checkpoint to write.
        encoder_layers, decoder_layers: the teacher's layers to take, as flags list them; None for
            all of them.
        layers: instead, how many of each side: "6:3".
        dictionary: folder of the student's dictionaries; None where they are the teacher's.
        new_symbols: what to do about symbols of these that the teacher lacks: "refuse", or "random"
            for what fairseq starts with.
        seed: of random embeddings.
        teacher_data: folder of the teacher's dictionaries, unless they lie beside it.
        source_lang, target_lang: unless they are the checkpoint's.
        task: that the student is trained for, where it is not the teacher's.
        training: flags of ``fairseq-train`` that the student is to be trained with.
        overwrite: replace what is there.
        trust: open the checkpoint with the full pickle machinery.
    """

    teacher: str
    output: str
    encoder_layers: Optional[str] = None
    decoder_layers: Optional[str] = None
    layers: Optional[str] = None
    dictionary: Optional[str] = None
    new_symbols: str = "refuse"
    seed: int = 1
    teacher_data: Optional[str] = None
    source_lang: Optional[str] = None
    target_lang: Optional[str] = None
    task: Optional[str] = None
    training: Sequence[str] = ()
    overwrite: bool = False
    trust: bool = False


class Made(NamedTuple):
    """A student's start.

    Attributes:
        lines: for the user: what it is made of.
        flags: of ``fairseq-train``, that build it and start from it.
    """

    lines: List[str]
    flags: List[str]

    @property
    def command(self) -> str:
        return " ".join(map(shlex.quote, self.flags))


def make(asked: Asked) -> Made:
    """Write the checkpoint of a student that is made of some of its teacher's layers.

    It holds no optimizer, and nothing but weights and what building the model reads.
    ``fairseq-train --finetune-from-model`` starts from it, and from nothing of it but the weights.

    Raises:
        UserError: something does not fit. Nothing is written then, and what was there stays.
    """
    _refuse(asked)
    task = None if asked.task is None else untaught(asked.task)
    teacher, langs = _open(asked, task)
    kind = teacher.kind or TRANSLATION
    found = teacher.dictionaries(langs, asked.teacher_data)
    if found is None:
        raise UserError(
            f"{teacher}: its dictionaries were not found; --teacher-data DIR names the folder with "
            "those that it was trained with"
        )
    teacher.check_sizes(found, kind)
    mine = _students_dictionaries(asked, task, teacher, found)
    random = asked.new_symbols == "random"
    rows = [
        Rows.of(side, one.symbols, other.symbols, random)
        for side, one, other in zip(kind.vocabularies, mine, found)
    ]
    model = teacher.build(kind.new_task(found, teacher.max_positions), kind=kind)
    layers = _layers(asked, kind, model)
    options = {
        **teacher.options,
        **{f"{side}_layers": len(chosen) for side, chosen in layers.items()},
        **{f"{side}_layers_to_keep": None for side in layers},
    }
    student = dataclasses.replace(
        teacher.as_task(kind.task), role=_STUDENT, options=options, symbols=None, updates=0
    )
    whole = {name: weight.detach() for name, weight in model.state_dict().items()}
    flags = _flags(asked, student, kind, layers, whole)
    start: Dict[str, Any] = {}
    if any(one.random for one in rows):
        arguments = model_arguments(student)
        untrained = new_model(arguments, kind.new_task(mine, student.max_positions), asked.seed)
        start = untrained.state_dict()
    tables = {name: one for (_, name), one in zip(kind.tables, rows)}
    tables["decoder.output_projection.weight"] = rows[1]
    taken = weights.chosen(whole, layers, tables, start, teacher.dtype)
    stock = stock_state(student.with_weights(taken), mine.source, mine.target, langs)
    output = Path(asked.output)
    with replacing(output, asked.overwrite) as new:
        write(stock, new)
    total, rest = count_parameters(stock["model"])
    of, _ = teacher.parameters()
    lines = [f"{output}: made of {teacher}"]
    for side, chosen in layers.items():
        has = len(getattr(model, side).layers)
        lines.append(f"| {side} layers {', '.join(map(str, chosen))} of its {has} (0 to {has - 1})")
    named = kind.vocabularies[: len(kind.sides)]
    lines += [f"| {weights.describe(side, one)}" for side, one in zip(named, rows)]
    lines.append(
        f"| {total:,} parameters, {rest:,} without embeddings; the teacher has {of:,} in all"
    )
    return Made(lines, ["--finetune-from-model", str(output), *flags])


def _refuse(asked: Asked) -> None:
    """Raises:
    UserError: all that is wrong with the flags, and an output that would destroy something.
    """
    faults, output = Faults(), Path(asked.output)
    faults.check(
        asked.layers is None or (asked.encoder_layers is None and asked.decoder_layers is None),
        "--layers says how many layers, and --encoder-layers and --decoder-layers which: give one "
        "or the other",
    )
    faults.check(
        asked.new_symbols in _NEW_SYMBOLS,
        f"--new-symbols {asked.new_symbols}: expected {' or '.join(_NEW_SYMBOLS)}",
    )
    for flag, folder in (
        ("--dictionary", asked.dictionary),
        ("--teacher-data", asked.teacher_data),
    ):
        faults.check(
            folder is None or os.path.isdir(folder), f"{flag} {folder}: there is no such folder"
        )
    parent = output.resolve().parent
    faults.check(parent.is_dir(), f"--output {output}: there is no folder {parent}")
    if output.is_dir():
        faults.add(f"--output {output}: expected a file, found a folder")
    elif output.exists():
        if os.path.realpath(asked.teacher) == os.path.realpath(asked.output):
            faults.add(f"--output {output} would overwrite the teacher")
        elif not asked.overwrite:
            faults.add(f"--output {output} already exists; choose another, or --overwrite")
    faults.raise_if_any()


def _open(asked: Asked, task: Optional[str]) -> Tuple[Checkpoint, Tuple[str, str]]:
    """The teacher, of one direction where it has a model for each, and its languages."""
    teacher = Checkpoint.open(asked.teacher, TEACHER, asked.trust)
    if teacher.kind is None:
        teacher = teacher.as_task(task)
    if teacher.kind not in (TRANSLATION, LANGUAGE_MODEL):
        raise UserError(
            f"{teacher} was trained for the task {teacher.task!r}; expected a transformer of the "
            f"task {', '.join((*TRANSLATION.tasks, *LANGUAGE_MODEL.tasks))}.{teacher.advise_task()}"
        )
    if task is not None and kind_of(task, None) is not teacher.kind:
        raise UserError(
            f"--task {asked.task}: {teacher} is {teacher.kind.model}; expected one of "
            f"{', '.join(teacher.kind.tasks)}, or its like with a teacher, "
            f"{teacher.kind.taught} say"
        )
    given = (asked.source_lang, asked.target_lang)
    langs = languages_of(teacher, given, (asked.teacher_data, asked.dictionary, teacher.data))
    if any(langs):
        named = dict(zip(("source_lang", "target_lang"), langs))
        teacher = dataclasses.replace(teacher, task_options={**teacher.task_options, **named})
    if teacher.task == EACH_DIRECTION:
        teacher = teacher.for_direction(langs)
    _refuse_architecture(teacher)
    return teacher, langs


def _refuse_architecture(teacher: Checkpoint) -> None:
    """Raises:
    UserError: it is no transformer whose layers stand for themselves.
    """
    options = vars(teacher.complete_options())
    model = ARCH_MODEL_REGISTRY.get(teacher.architecture or "", object)
    own = not model.__module__.startswith("fairseq.") and issubclass(model, _CLASSES)
    if not (model in _CLASSES or own):
        raise UserError(
            f"{teacher} is a {teacher.architecture}: only layers of fairseq's transformers "
            "(transformer, BART and mBART, transformer_lm, by whatever names of architectures) can "
            "be taken"
        )
    faults = Faults()
    for option, why in _REFUSED.items():
        value = options.get(option, teacher.options.get(option))
        faults.check(not value, f"it has --{option.replace('_', '-')}: {why}")
    faults.raise_if_any(prefix=f"{teacher} cannot be taken apart: ")


def _students_dictionaries(
    asked: Asked, task: Optional[str], teacher: Checkpoint, found: Dictionaries
) -> Dictionaries:
    """Raises:
    UserError: they cannot be read, or do not go with what the teacher shares.
    """
    if task not in (None, teacher.task) and asked.dictionary is None:
        added = added_symbols(teacher.task, teacher.task_options)
        if added:
            raise UserError(
                f"--task {asked.task} needs --dictionary: {teacher} was trained for "
                f"{teacher.task}, which adds {some(added)} to its dictionaries, and "
                f"{asked.task} does not"
            )
    if asked.dictionary is None:
        return found
    student = dataclasses.replace(teacher.as_task(task), role=_STUDENT)
    mine = student.dictionaries(("", ""), asked.dictionary)
    assert mine is not None  # where a folder is named, they are there or it is told
    shared = vars(teacher.complete_options()).get("share_all_embeddings")
    if shared and mine.source.symbols != mine.target.symbols:
        raise UserError(
            f"--dictionary {asked.dictionary}: expected the same dictionary for both sides "
            f"(fairseq-preprocess --joined-dictionary), since {teacher} has "
            f"--share-all-embeddings; got {len(mine.source)} and {len(mine.target)} symbols that "
            "differ"
        )
    return mine


def _layers(asked: Asked, kind: Kind, model: Any) -> Dict[str, List[int]]:
    """By side, the teacher's layers to take.

    Raises:
        UserError: all that is wrong with what is asked for.
    """
    faults = Faults()
    listed: Dict[str, Optional[List[int]]] = {}
    for side, text in (("encoder", asked.encoder_layers), ("decoder", asked.decoder_layers)):
        with faults.collecting():
            listed[side] = text if text is None else parse_layers(text, f"--{side}-layers")
        faults.check(
            text is None or side in kind.sides, f"--{side}-layers: the teacher has no {side}"
        )
    counts: Sequence[Optional[int]] = [None for _ in kind.sides]
    if asked.layers is not None:
        with faults.collecting():
            counts = parse_counts(asked.layers, kind.sides)
    faults.raise_if_any()
    found = {}
    for side, count in zip(kind.sides, counts):
        with faults.collecting():
            found[side] = choose(side, len(getattr(model, side).layers), listed[side], count)
    faults.raise_if_any()
    return found


def _flags(
    asked: Asked,
    student: Checkpoint,
    kind: Kind,
    layers: Dict[str, List[int]],
    whole: Dict[str, Any],
) -> List[str]:
    """The flags that build the student, with those that it is to be trained with.

    Raises:
        UserError: these build another one.
    """
    always = {f"{side}_layers": len(chosen) for side, chosen in layers.items()}
    for side, name in (("encoder", "max_source_positions"), ("decoder", "max_target_positions")):
        table = whole.get(_LEARNED.format(side))
        if table is not None:  # fairseq counts from after the padding's index
            always[name] = table.size(0) - 2
    options = vars(student.complete_options())
    flags = Flags.of(str(student.architecture), kind.task, options, always)
    if asked.training:
        flags.refuse(asked.task, *asked.training)
    task = [] if asked.task is None else ["--task", asked.task]
    return [*flags.words, *task, *asked.training]
