"""From a corpus and a teacher to a data-bin of the teacher's translations."""

import contextlib
import functools
import logging
import os
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Sequence

from .. import decoding
from ..decoding import Corpus, Tokenizer, databin
from ..decoding.text import MARKS
from ..files import Busy, FileError, digest
from . import backward, exchange, measures
from .asked import Asked, Opened
from .choice import Choice, choose
from .decoded import DecodedByCheckpoints
from .hypotheses import HypothesisStore
from .mixing import Mix, open_mix
from .origin import Origin
from .output import HYPOTHESES, Output
from .student import SUBWORDS, TEXT, Student, open_student
from .translators import DecodedByTranslator

logger = logging.getLogger(__name__)


def make(asked: Asked) -> Optional[Dict[str, Any]]:
    """Decode one shard, from where it stopped; the last one to end chooses, and writes the data.

    Returns:
        the record of the finished data: settings, counts and means. None if another process has
        yet to finish it.

    Raises:
        UserError: data, teacher and settings do not go together, or folders hold something else.
            Busy: another process decodes this shard.
    """
    with exchange.readable_twice(asked.imported) as files:
        opened = Opened.of(asked)
        _refuse_subwords(opened)
        origin = _origin(opened, files)
        student = open_student(
            opened.data,
            opened.to_text,
            asked.student_data,
            asked.student_spm,
            asked.student_langs,
            encode=opened.to_subwords if opened.cfg.bpe else None,
            written=origin.written if origin else SUBWORDS,
        )
        mix = _mix(opened, origin, student)
        if origin is None:
            return _write_mixture(opened, student, mix)
        return _make(opened, origin, student, mix)


def _origin(opened: Opened, files: Sequence[Any]) -> Optional[Origin]:
    """What the translations come from; None if none are wanted, but a mixture alone.

    Args:
        files: those of translations made elsewhere, if there are any.
    """
    if files:
        return exchange.Imported(opened, files)
    path = opened.cfg.common_eval.path
    if not path:
        return None
    if opened.asked.engine == "ctranslate2" and os.path.isdir(path):
        return DecodedByTranslator(opened)
    return DecodedByCheckpoints(opened)


def _make(opened: Opened, origin: Origin, student: Student, mix: Mix) -> Optional[Dict[str, Any]]:
    asked, cfg, data = opened.asked, opened.cfg, opened.data
    tokenizer = Tokenizer.of(cfg.task.target_lang, asked.choice.tokenize)
    header = origin.header()
    output = Output(asked.output, _settings(opened, header, student, tokenizer, mix))
    folder = Path(asked.hypotheses or output.folder / HYPOTHESES)
    store = HypothesisStore(folder, header, asked.num_shards, asked.shard_id)
    _refuse_others(asked, output, store)
    _refuse_file(asked, output, store)
    if output.complete and not asked.write_nbest:
        output.clean_up()
        return output.record()
    corpus = origin.corpus(store)
    read = student.data if store.written == TEXT else data
    how = measures.Running(opened.device, opened.dtype, asked.trust)
    measures.check(asked.choice, corpus, read, how)
    if asked.choice.uses_bleu and corpus.references is not None:
        _warn_of_words(tokenizer, corpus, opened.to_text)
    if store.complete:
        store.clean_up()
    elif not origin.fill(store, corpus, functools.partial(_make_room, asked, output, store)):
        print(
            f"{folder}: shard {asked.shard_id} of {asked.num_shards} is done; the last one to "
            "finish writes the data",
            flush=True,
        )
        return None
    with _alone(output) as alone:
        if not alone:
            return None
        _refuse_others(asked, output, store)
        if not output.complete:
            with measures.opened(
                *(asked.choice, read),
                backward_files=(output.settings["backward"] or {}).get("models", ()),
                store=store,
                text=decoding.describe_text(cfg),
                tokenizer=tokenizer,
                how=how,
            ) as found:
                chosen = choose(
                    *(corpus, store, student, asked.choice),
                    measures=found,
                    lenpen=cfg.generation.lenpen,
                    unnormalized=cfg.generation.unnormalized,
                    spelled=origin.reads_spelled,
                    missing=origin.missing,
                )
            if output.differences():
                print(f"replacing {output.contents()}", flush=True)
            output.write(corpus, store, chosen, student, mix=mix)
        if asked.write_nbest:
            _write_nbest(asked, corpus, store, student)
    return output.record()


def _write_mixture(opened: Opened, student: Student, mix: Mix) -> Optional[Dict[str, Any]]:
    """Write what is mixed, without a teacher."""
    asked = opened.asked
    settings = {"select": None, **mix.settings(beside_teacher=False)}
    output = Output(asked.output, {**settings, **_settings_of_student(opened, student)})
    _refuse_other_output(asked, output)
    with _alone(output) as alone:
        if not alone:
            return None
        _refuse_other_output(asked, output)
        if output.complete:
            output.clean_up()
        else:
            if output.differences():
                print(f"replacing {output.contents()}", flush=True)
            output.write_mixture(opened.data, student, mix)
    return output.record()


@contextlib.contextmanager
def _alone(output: Output) -> Iterator[bool]:
    """Keep other processes from writing a folder; whether that could be done."""
    try:
        lock = output.lock()
    except Busy:
        print(f"{output.folder}: another process is writing it", flush=True)
        yield False
        return
    with lock:
        output.refresh()  # another process may have written it
        yield True


# What the result depends on


def _settings(
    opened: Opened,
    header: Dict[str, Any],
    student: Student,
    tokenizer: Tokenizer,
    mix: Mix,
) -> Dict[str, Any]:
    """All that the data depends on."""
    choice = opened.asked.choice
    filters = dict(choice.filters._asdict())
    if filters["empty"]:
        del filters["empty"]  # as in records from before it could be switched off
    by_words = choice.uses_bleu and tokenizer != Tokenizer()  # likewise
    return {
        "hypotheses": header,
        "select": choice.select,
        "metric": choice.metric if choice.uses_metric else None,
        "tokenizer": tokenizer.name if by_words else None,
        "filters": filters,
        "min_closeness": choice.min_closeness,
        "min_score_quantile": choice.min_score_quantile,
        # None where records of before would have nothing
        "keep": choice.keep if choice.keep > 1 else None,
        "scores": digest(choice.scores) if choice.scores else None,
        "backward": _backward(choice),
        "languages": list(choice.languages) if choice.languages else None,
        "deduplicate": choice.deduplicate,
        **mix.settings(beside_teacher=True),
        **_settings_of_student(opened, student),
    }


def _settings_of_student(opened: Opened, student: Student) -> Dict[str, Any]:
    """What it is written for."""
    asked = opened.asked
    return {
        "text": decoding.describe_text(opened.cfg),
        "student_spm": digest(asked.student_spm) if asked.student_spm else None,
        "student_langs": list(asked.student_langs) if asked.student_langs else None,
        "student_files": {
            name: digest(str(path)) for name, path in student.data.carried_files().items()
        },
    }


def _backward(choice: Choice) -> Optional[Dict[str, Any]]:
    if choice.backward_path is None:
        return None
    return {
        "models": backward.files(choice.backward_path),
        "weight": choice.backward_weight,
        "min_quantile": choice.min_backward_quantile,
    }


# Refusals


def _refuse_subwords(opened: Opened) -> None:
    """Subwords that would be compared, or encoded anew, as if they were words."""
    asked, cfg = opened.asked, opened.cfg
    if asked.student_spm:
        flag = "--student-spm"
    elif asked.choice.selector.uses_metric:
        flag = f"--select {asked.choice.select}"
    elif asked.choice.min_closeness is not None:
        flag = "--min-closeness"
    else:
        return
    if cfg.bpe or cfg.tokenizer:
        return
    symbols, removed = opened.data.target.symbols, cfg.common_eval.post_process
    for mark, how in MARKS.items():
        marked = [symbol for symbol in symbols if mark in symbol]
        if removed and 20 * len(marked) < len(symbols):
            continue  # some that are text
        if any(mark in opened.to_text(f"{symbol} a") for symbol in marked[:1]):
            raise FileError(
                f"{flag} needs text without subwords, and the vocabulary has {mark!r} in it: add "
                f"{how}"
            )


def _refuse_others(asked: Asked, output: Output, store: HypothesisStore) -> None:
    """What is in the way, unless it is to be replaced."""
    if asked.hypotheses:
        store.refuse_others("Repeat the command that made them, or choose another --hypotheses")
    _refuse_other_output(asked, output, store)
    if not asked.overwrite:
        store.refuse_others("Choose another folder; --overwrite would remove them")


def _refuse_other_output(
    asked: Asked, output: Output, store: Optional[HypothesisStore] = None
) -> None:
    different = output.differences()
    if different and not asked.overwrite:
        also = f", and the hypotheses in {store.folder}" if store and store.differences() else ""
        raise FileError(
            f"--output {output.folder} was made with other settings: {'; '.join(different)}. "
            "Choose another folder; --overwrite would remove "
            f"{output.contents()}{also}."
        )


def _refuse_file(asked: Asked, output: Output, store: HypothesisStore) -> None:
    """--write-nbest that would replace something, or has nothing to write from."""
    if not asked.write_nbest:
        return
    if output.complete and not store.complete:
        raise FileError(
            f"--write-nbest {asked.write_nbest}: {store.folder} no longer has the hypotheses of "
            f"{output.folder}; decode them again in another --output"
        )
    if os.path.exists(asked.write_nbest) and not (output.complete or asked.overwrite):
        raise FileError(
            f"--write-nbest {asked.write_nbest}: there is such a file; choose another name, or "
            "--overwrite"
        )


# Reading and writing


def _mix(opened: Opened, origin: Optional[Origin], student: Student) -> Mix:
    asked = opened.asked
    subset = opened.subset if origin is None or origin.of_subset else "train"
    return open_mix(
        *(asked.mix, asked.mix_order, opened.cfg.common.seed),
        data=opened.data,
        subset=subset,
        student=student,
        output=asked.output,
    )


def _warn_of_words(tokenizer: Tokenizer, corpus: Corpus, to_text: Callable[[str], str]) -> None:
    """Before anything is decoded: a closeness that means nothing."""
    assert corpus.references is not None
    first = (corpus.references[i].tolist() for i in range(min(len(corpus.references), 1000)))
    texts = [to_text(databin.decode(corpus.data.target, tokens)) for tokens in first]
    for note in tokenizer.notes(texts):
        logger.warning(note)


def _write_nbest(asked: Asked, corpus: Corpus, store: HypothesisStore, student: Student) -> None:
    assert asked.write_nbest
    old = asked.write_nbest if os.path.exists(asked.write_nbest) and not asked.overwrite else None

    def source(i: int) -> str:
        return student.to_text(databin.decode(corpus.data.source, corpus.source[i].tolist()))

    exchange.write_nbest(asked.write_nbest, store, source, student.text, same_as=old)
    print(f"{asked.write_nbest}: the hypotheses, for scoring or translating elsewhere", flush=True)


def _make_room(asked: Asked, output: Output, store: HypothesisStore) -> None:
    if asked.overwrite:
        clear_others(output, store)


def clear_others(output: Output, store: HypothesisStore) -> None:
    """Remove hypotheses of other settings, unless another shard has been first."""
    with output.lock(wait=True):
        if store.differences():
            print(f"removing the hypotheses in {store.folder}", flush=True)
            store.clear()
