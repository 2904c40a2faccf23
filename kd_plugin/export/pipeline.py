"""From checkpoints to a model that works without the plugin, verified to be the same."""

import contextlib
import logging
import os
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from fairseq.data import Dictionary

from ..checkpoints import LANGUAGE_MODEL, Checkpoint, Role, average, dictionaries
from ..decoding import DataBin, Tokenizer, infer_languages
from ..errors import Faults, UserError
from ..files import replacing
from . import fairseq
from .ctranslate2 import CTranslate2Format
from .fairseq import FairseqFormat
from .formats import (
    ExportError,
    Format,
    Model,
    Proof,
    data_bin,
    flag_name,
    refuse_other_dictionaries,
)
from .huggingface import TransformersFormat
from .verify import Blocks, Text

logger = logging.getLogger(__name__)

_BEAM = 5
ROLE = Role("model", "--trust-checkpoint", "--data", task="--task")
FORMATS: Dict[str, Format] = {
    format.name: format for format in (FairseqFormat(), CTranslate2Format(), TransformersFormat())
}


class Asked(NamedTuple):
    """What is to be exported.

    Attributes:
        paths: the checkpoint, or several to average.
        output: file or, where the format is one of folders, folder to write.
        format: a name of ``FORMATS``.
        options: of the format, by name: ``{"quantization": "int8"}``.
        average: whether several checkpoints are meant to be averaged.
        source_lang, target_lang: unless they are the checkpoint's.
        task: what it was trained for, whatever the checkpoint says; None is what that says.
        user_dir: folder of architectures or tasks, which has been imported.
        overwrite: replace what is there, once the new one is good.
        trust: open checkpoints with the full pickle machinery.
        verify: compare the export with the checkpoint.
        data: data-bin to verify on, unless it is the one that the checkpoint names.
        subset: which sentences of it.
        sentences: only the first so many; 0 for all, None as many as is usual for the format.
        beam: of the translations that are compared; None is 5.
        post_process: what BLEU is scored without, as fairseq-generate has it; None leaves all.
        tokenize: BLEU's tokenizer, as sacrebleu's ``--tokenize``; None for the target language's.
    """

    paths: Sequence[str]
    output: str
    format: str = "fairseq"
    options: Mapping[str, Any] = {}
    average: bool = False
    source_lang: Optional[str] = None
    target_lang: Optional[str] = None
    task: Optional[str] = None
    user_dir: Optional[str] = None
    overwrite: bool = False
    trust: bool = False
    verify: bool = True
    data: Optional[str] = None
    subset: str = "valid"
    sentences: Optional[int] = None
    beam: Optional[int] = None
    post_process: Optional[str] = None
    tokenize: Optional[str] = None


def make(asked: Asked) -> List[str]:
    """Export a model; it gets its name once it is verified to be the same.

    Returns:
        lines for the user: what was written, how large it is, how it compares.

    Raises:
        UserError: something does not fit, or the export is not the same model. Nothing of it
            stays then, and what was there before does.
    """
    _refuse(asked)
    format, output = FORMATS[asked.format], Path(asked.output)

    def refuse(first: Checkpoint) -> None:
        first = first.as_task(asked.task)
        fairseq.refuse_task(first)
        format.refuse(first)
        _refuse_search(asked, first)

    if len(asked.paths) > 1:
        checkpoint = average(asked.paths, ROLE, asked.trust, refuse).as_task(asked.task)
        logger.info(f"averaged {len(asked.paths)} checkpoints")
    else:
        checkpoint = Checkpoint.open(asked.paths[0], ROLE, asked.trust).as_task(asked.task)
        refuse(checkpoint)
    given = (asked.source_lang, asked.target_lang)
    langs = languages_of(checkpoint, given, (asked.data, checkpoint.data))
    data, source, target = _dictionaries(asked, checkpoint, langs)
    stock = fairseq.stock_state(checkpoint, source, target, langs)
    model = format.adapt(Model(checkpoint, stock), asked.options)
    lines = [f"exported {output}"]
    with _proof(asked, model, data) as proof, replacing(output, asked.overwrite) as new:
        format.write(model, new, asked.options)
        lines.append(_size(model, new))
        figures = None
        if proof is not None:
            verdict = format.verify(model, new, asked.options, proof)
            figures = verdict.figures
            lines += [f"| {line}" for line in verdict.lines]
        format.record(model, new, asked.options, asked.paths, figures=figures)
    if proof is None:
        names = ":".join(asked.paths)
        logger.warning(f"{output} is UNVERIFIED: it was not compared with {names}")
    return lines


def _refuse(asked: Asked) -> None:
    """Flags that mean nothing together, and an output that would destroy something.

    Raises:
        ExportError: all of them.
    """
    faults = Faults()
    if asked.format not in FORMATS:
        raise ExportError(f"--format {asked.format}: expected one of {', '.join(FORMATS)}")
    format, output = FORMATS[asked.format], Path(asked.output)
    faults.check(
        len(asked.paths) == 1 or asked.average,
        f"--path names {len(asked.paths)} checkpoints: --average makes one model of them; an "
        "ensemble cannot be exported",
    )
    for flag in dict.fromkeys(flag for other in FORMATS.values() for flag in other.flags):
        names = [other.name for other in FORMATS.values() if flag in other.flags]
        faults.check(
            format.name in names or asked.options.get(flag_name(flag)) is None,
            f"{flag} needs --format {' or '.join(names)}",
        )
    for flag in format.required:
        given = asked.options.get(flag_name(flag)) is not None
        faults.check(given, f"--format {format.name} needs {flag}")
    found = [fault for other in FORMATS.values() for fault in other.faults(asked.options)]
    faults.messages += dict.fromkeys(found)
    faults.check(asked.beam is None or asked.beam >= 1, "--beam must be 1 or more")
    faults.check(
        asked.post_process is None or format.scores_symbols,
        "--remove-bpe needs --format "
        f"{' or '.join(o.name for o in FORMATS.values() if o.scores_symbols)}, whose BLEU is "
        "scored on what the model's symbols spell",
    )
    if asked.tokenize:
        faults.check(
            format.needs_references,
            "--bleu-tokenize needs --format "
            f"{' or '.join(o.name for o in FORMATS.values() if o.needs_references)}, which tells "
            "BLEU",
        )
        with faults.collecting():
            Tokenizer.of("", asked.tokenize)
    faults.check(
        asked.sentences is None or asked.sentences >= 0,
        "--verify-sentences must be 0 (all) or more",
    )
    faults.check(
        output.resolve().parent.is_dir(), f"--output {output}: there is no folder {output.parent}"
    )
    faults.check(
        not asked.data or os.path.isdir(asked.data), f"--data {asked.data}: there is no such folder"
    )
    written = os.path.realpath(asked.output) + os.sep
    values = (v if isinstance(v, list) else [v] for v in asked.options.values())
    files = [value for several in values for value in several if isinstance(value, str)]
    for name in (*asked.paths, asked.data, *filter(os.path.exists, files)):
        if name and (os.path.realpath(name) + os.sep).startswith(written):
            faults.add(f"--output {output} would overwrite {name}")
    if output.exists():
        if not asked.overwrite:
            faults.add(f"--output {output} already exists; choose another, or --overwrite")
        elif not format.made(output):
            faults.add(
                f"--output {output}: --overwrite replaces only what fairseq-kd-export --format "
                f"{format.name} has made"
            )
    faults.raise_if_any(ExportError)


def _refuse_search(asked: Asked, checkpoint: Checkpoint) -> None:
    """Flags of translations that are compared, of a model that makes none.

    Raises:
        ExportError: they are given.
    """
    flags = {
        "--beam": asked.beam,
        "--remove-bpe": asked.post_process,
        "--bleu-tokenize": asked.tokenize,
    }
    given = ", ".join(flag for flag, value in flags.items() if value is not None)
    if given and checkpoint.kind is LANGUAGE_MODEL:
        raise ExportError(
            f"{given}: of no use to {checkpoint}, which is {LANGUAGE_MODEL.model}: probabilities "
            "of a text are compared, and no translations"
        )


def languages_of(
    checkpoint: Checkpoint,
    given: Tuple[Optional[str], Optional[str]],
    folders: Sequence[Optional[str]],
) -> Tuple[str, str]:
    """A model's source and target language; "" and "" of a language model.

    Args:
        given: what flags say of them.
        folders: data-bins, which may tell by the names of their files, the first ones rather.

    Raises:
        ExportError: nothing says what they are, or the flags are of no use.
    """
    if checkpoint.kind is LANGUAGE_MODEL:
        if any(given):
            raise ExportError(
                f"{checkpoint} is {LANGUAGE_MODEL.model}: leave out --source-lang and --target-lang"
            )
        return "", ""
    found = checkpoint.languages
    for folder in folders:
        # fairseq-train had them from the data's file names, and told nobody
        if folder and os.path.isdir(folder) and not all(found) and not all(given):
            found = infer_languages(folder)
    source, target = given[0] or found[0], given[1] or found[1]
    if not (source and target):
        raise ExportError(f"{checkpoint} names no languages: give --source-lang and --target-lang")
    return source, target


def _dictionaries(
    asked: Asked, checkpoint: Checkpoint, langs: Tuple[str, str]
) -> Tuple[Optional[DataBin], Dictionary, Dictionary]:
    """The data to verify on, if there are any, and the model's dictionaries."""
    found = checkpoint.dictionaries(langs)
    data = None
    if asked.data:
        data = data_bin(asked.data, checkpoint, langs)
    elif checkpoint.data and asked.verify:
        # what is missing there is told when it is needed
        with contextlib.suppress(UserError):
            data = data_bin(checkpoint.data, checkpoint, langs)
    if found is None:
        if data is None:
            raise ExportError(
                f"{checkpoint}: its dictionaries were not found; --data DIR names a folder "
                f"with {dictionaries.files(langs)}"
            )
        return data, data.source, data.target
    if data is not None:
        symbols = [found.source.symbols, found.target.symbols]
        if checkpoint.kind is LANGUAGE_MODEL:  # what it predicts may be the first of these
            symbols = symbols[:1]
        refuse_other_dictionaries(checkpoint, data, symbols, "--data", found.origin)
    return data, found.source, found.target


@contextlib.contextmanager
def _proof(asked: Asked, model: Model, data: Optional[DataBin]) -> Iterator[Optional[Proof]]:
    """What to verify on; None if that is not wanted."""
    if not asked.verify:
        yield None
        return
    if data is None:
        raise ExportError(
            f"no data to verify the export on: {model.checkpoint} names no existing data-bin. "
            "--data DIR names one; --no-verify exports unverified"
        )
    format = FORMATS[asked.format]
    count = format.sentences if asked.sentences is None else asked.sentences
    beam = asked.beam or _BEAM
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        if model.models_language:
            options, longest = model.stock["cfg"]["task"], model.max_positions[1]
            blocks = Blocks.cut(
                *(data, asked.subset, count), options=options, longest=longest, folder=where
            )
            yield Proof(blocks, beam, asked.post_process, user_dir=asked.user_dir)
            return
        text = Text.cut(
            *(data, asked.subset, count), max_positions=model.max_positions, folder=where
        )
        if format.needs_references and text.corpus.references is None:
            raise ExportError(
                f"{data.folder}: {asked.subset} has no references, and --format {format.name} is "
                "verified on them"
            )
        tokenizer = Tokenizer.of(model.languages[1], asked.tokenize)
        yield Proof(text, beam, asked.post_process, tokenizer, asked.user_dir)


def _size(model: Model, new: Path) -> str:
    total, rest = model.parameters()
    files = sorted(new.iterdir()) if new.is_dir() else [new]
    return (
        f"| {total:,} parameters, {rest:,} without embeddings, "
        f"{sum(file.stat().st_size for file in files):,} bytes"
    )
