"""From a corpus and a teacher to a data-bin of the teacher's translations."""

import contextlib
import copy
import logging
import os
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from fairseq import utils
from omegaconf import OmegaConf, open_dict

from .. import decoding
from ..checkpoints import Checkpoint, Role, parse_overrides
from ..decoding import Around, Corpus, DataBin, Tokenizer, databin
from ..decoding.corpus import SourceLines, TextDataset
from ..decoding.text import MARKS
from ..export import ExportError, export_ctranslate2
from ..files import Busy, FileError, digest
from ..timing import progress_bar
from . import exchange, measures
from .choice import Choice, choose
from .hypotheses import HypothesisStore
from .language import OWN_LANGUAGES
from .mixing import IN_ORDER, Mix, Wanted, open_mix
from .output import HYPOTHESES, Output
from .student import SUBWORDS, TEXT, Student, open_student
from .translators import Translator, keep

logger = logging.getLogger(__name__)

ENGINES = ("fairseq", "ctranslate2")
ROLE = Role("teacher", "--trust-checkpoint", overrides="--model-overrides", task="--task")


class Asked(NamedTuple):
    """What is to be distilled, for whom, and which part of it by this process.

    Attributes:
        cfg: fairseq's configuration, as ``fairseq-generate`` makes it: the data and the subset,
            the teacher's checkpoints (``--path``), search, batches, precision.
        output: the data-bin to write.
        choice: which hypotheses, and what drops a sentence.
        hypotheses: folder of the n-best lists; None is in ``output``.
        source_text: file with source sentences to translate instead of the subset.
        mix: training sets that come before the distilled one, or are all that is written, without
            ``--path``.
        mix_order: of the whole, one of ``mixing.ORDERS``; fairseq's ``--seed`` decides the random
            one, and which sentences of a set are taken.
        student_data: data-bin of a student with other dictionaries than the teacher's.
        student_spm: that student's SentencePiece model.
        student_langs: what that data-bin calls the languages, if not as the teacher's does.
        task_given: decode with the task of ``cfg``, whatever the checkpoints were trained for.
            Without it, that holds for another task than ``translation`` alone.
        engine: what decodes, one of ``ENGINES``.
        teacher_spm: SentencePiece models of a CTranslate2 folder that ``--path`` names: of both
            sides, or of the source and the target.
        teacher_tokenizer: or its tokenizer of Hugging Face's.
        around: tokens that such a teacher reads and writes around sentences.
        compute_type: CTranslate2's precision; None is int8 on a CPU and float16 on a GPU.
        trust: open checkpoints with the full pickle machinery.
        overwrite: replace what other settings made in ``output``.
        imported: files of translations made elsewhere, instead of a teacher; "-" is standard input.
        import_format: of ``exchange.FORMATS``; None to recognise it.
        import_as: "text" or "subwords" of the target's dictionary; None to find out.
        import_source: what the files' own sources are for: ``exchange.CHECK``, ``USE`` as the
            source text, or ``IGNORE``; None is ``USE`` if there is nothing else, else ``CHECK``.
        import_incomplete: whether sentences may lack a translation.
        write_nbest: file for the lists, to be scored or translated elsewhere.
        num_shards, shard_id: this process decodes every ``num_shards``-th batch.
        device_id: the GPU.
    """

    cfg: Any
    output: str
    choice: Choice = Choice()
    hypotheses: Optional[str] = None
    source_text: Optional[str] = None
    mix: Sequence[Wanted] = ()
    mix_order: str = IN_ORDER
    student_data: Optional[str] = None
    student_spm: Optional[str] = None
    student_langs: Optional[Tuple[str, str]] = None
    task_given: bool = False
    engine: str = "fairseq"
    teacher_spm: Sequence[str] = ()
    teacher_tokenizer: Optional[str] = None
    around: Around = Around()
    compute_type: Optional[str] = None
    trust: bool = False
    overwrite: bool = False
    imported: Sequence[str] = ()
    import_format: Optional[str] = None
    import_as: Optional[str] = None
    import_source: Optional[str] = None
    import_incomplete: bool = False
    write_nbest: Optional[str] = None
    num_shards: int = 1
    shard_id: int = 0
    device_id: int = 0


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
        return _make(asked, files)


def _make(asked: Asked, files: Sequence[Any]) -> Optional[Dict[str, Any]]:
    cfg = copy.deepcopy(asked.cfg)
    utils.import_user_module(cfg.common)
    with open_dict(cfg):
        cfg.dataset.max_tokens, cfg.dataset.batch_size = decoding.batch_limits(cfg)
    device, dtype = decoding.placement(cfg, asked.device_id)
    task = decoding.set_up_task(cfg)
    data = DataBin(cfg.task.data, cfg.task.source_lang, cfg.task.target_lang)
    to_text, to_subwords = decoding.text_functions(task, cfg, data)
    _refuse_subwords(asked, cfg, data, to_text)
    if asked.choice.languages == OWN_LANGUAGES:
        asked = asked._replace(choice=asked.choice._replace(languages=data.langs))
    tokenizer = Tokenizer.of(cfg.task.target_lang, asked.choice.tokenize)
    imported = _open_imported(asked, cfg, data, files) if files else None
    teacher = _Teacher(
        utils.split_paths(cfg.common_eval.path or ""),
        parse_overrides(cfg.common_eval.model_overrides, "--model-overrides"),
        device,
        dtype,
        asked.compute_type or ("float16" if device.type == "cuda" else "int8"),
        None if imported else _open_translator(asked, cfg, task),
    )
    written = TEXT if teacher.reads_text else SUBWORDS
    student = open_student(
        *(data, to_text, asked.student_data, asked.student_spm, asked.student_langs),
        encode=to_subwords if cfg.bpe else None,
        written=imported.translations.written if imported else written,
    )
    mix = _mix(asked, cfg, data, student)
    if not (imported or cfg.common_eval.path):
        return _only_mix(asked, cfg, data, student, mix)
    if imported:
        header = _header_of_imported(asked, cfg, data, imported)
    else:
        own = teacher.translator is None and cfg.task._name == "translation"
        if own and not asked.task_given:
            task = decoding.own_task(cfg, task, teacher.paths, ROLE, asked.trust)
        header = _header(asked, cfg, data, teacher)
    output = Output(asked.output, _settings(asked, cfg, header, student, tokenizer, mix))
    folder = Path(asked.hypotheses or output.folder / HYPOTHESES)
    store = HypothesisStore(folder, header, asked.num_shards, asked.shard_id)
    _refuse_others(asked, output, store)
    _refuse_file(asked, output, store)
    if output.complete and not asked.write_nbest:
        output.clean_up()
        return output.record()
    checked = None
    if imported and not store.complete:
        checked = _check(asked, cfg, task, data, imported, to_text, to_subwords)
    corpus = _corpus(
        asked, cfg, task, data, to_subwords=to_subwords, store=store, imported=imported
    )
    read = student.data if store.written == TEXT else data
    how = measures.Running(device, dtype, asked.trust)
    measures.check(asked.choice, corpus, read, how)
    if asked.choice.uses_bleu and corpus.references is not None:
        _warn_of_words(tokenizer, corpus, to_text)
    if store.complete:
        store.clean_up()
    elif imported:
        assert checked is not None
        if asked.overwrite:  # by now all has been checked
            clear_others(output, store)
        exchange.fill(store, imported.translations, checked)
    elif not _translate(
        *(asked, cfg, task, corpus, _running_text(asked, cfg, corpus, to_text)),
        teacher=teacher,
        store=store,
        output=output,
    ):
        print(
            f"{folder}: shard {asked.shard_id} of {asked.num_shards} is done; the last one to "
            "finish writes the data",
            flush=True,
        )
        return None
    try:
        lock = output.lock()
    except Busy:
        print(f"{output.folder}: another process is writing it", flush=True)
        return None
    with lock:
        output.refresh()  # another process may have written it
        _refuse_others(asked, output, store)
        if not output.complete:
            with measures.opened(
                *(asked.choice, read, student),
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
                    spelled=teacher.reads_text and not _raw(asked, cfg),
                    missing="without_translation" if imported else "longer_than_the_teacher_reads",
                )
            if output.differences():
                print(f"replacing {output.contents()}", flush=True)
            output.write(corpus, store, chosen, student, mix=mix)
        if asked.write_nbest:
            _write_nbest(asked, corpus, store, student)
    return output.record()


def _only_mix(
    asked: Asked, cfg: Any, data: DataBin, student: Student, mix: Mix
) -> Optional[Dict[str, Any]]:
    """Write what is mixed, without a teacher."""
    settings = {"select": None, **mix.settings(beside_teacher=False)}
    output = Output(asked.output, {**settings, **_settings_of_student(asked, cfg, student)})
    _refuse_other_output(asked, output)
    try:
        lock = output.lock()
    except Busy:
        print(f"{output.folder}: another process is writing it", flush=True)
        return None
    with lock:
        output.refresh()
        _refuse_other_output(asked, output)
        if output.complete:
            output.clean_up()
        else:
            if output.differences():
                print(f"replacing {output.contents()}", flush=True)
            output.write_mixture(data, student, mix)
    return output.record()


class _Imported(NamedTuple):
    """Translations made elsewhere.

    Attributes:
        translations: they.
        source: what the files' own sources are for.
        source_in_subwords: whether these are subwords, where they are used.
    """

    translations: exchange.Translations
    source: str
    source_in_subwords: bool = True


def _open_imported(asked: Asked, cfg: Any, data: DataBin, files: Sequence[Any]) -> _Imported:
    translations = exchange.Translations(
        *(files, asked.import_format, asked.import_as),
        dictionary=data.target,
        encodes=bool(cfg.bpe or asked.student_spm),
    )
    subset, lang = cfg.dataset.gen_subset, cfg.task.source_lang
    source = asked.import_source
    if source is None:
        alone = not asked.source_text and data.side(subset, lang) is None
        source = exchange.USE if alone else exchange.CHECK
        if alone:
            logger.info(f"{data.folder} has no {subset}: the source is that of --import")
    if source != exchange.USE:
        return _Imported(translations, source)
    own = (item.source for item in translations if item.source)
    subwords = exchange.are_subwords(own, data.source, bool(cfg.bpe))
    if not (subwords or cfg.bpe):
        raise FileError(
            f"{translations.names}: the sources are text, and nothing says how they become "
            "subwords: give --bpe sentencepiece --sentencepiece-model MODEL"
        )
    return _Imported(translations, source, subwords)


def _check(
    asked: Asked,
    cfg: Any,
    task: Any,
    data: DataBin,
    imported: _Imported,
    to_text: Callable[[str], str],
    to_subwords: Callable[[str], str],
) -> exchange.Checked:
    """Compare what is imported with what it should be of; nothing is written."""
    sources: Optional[exchange.Sources] = None
    how = to_text, to_subwords
    if asked.source_text:
        raw = _raw(asked, cfg)
        sources = exchange.TextSources(asked.source_text, data.source, *how, raw=raw)
    elif imported.source != exchange.USE:
        subset = cfg.dataset.gen_subset
        corpus = Corpus.of_subset(task, data, subset)
        name = f"{data.folder}, {subset}"
        sources = exchange.Sources(name, data.source, corpus.source, *how)
    checked = exchange.check(
        *(imported.translations, sources),
        compare=imported.source == exchange.CHECK,
        incomplete=asked.import_incomplete,
    )
    if asked.choice.min_score_quantile and not checked.scored:
        raise FileError(
            f"--min-score-quantile: some translations of {imported.translations.names} have no "
            "score"
        )
    return checked


class _Teacher(NamedTuple):
    """Checkpoints, and how they are to run."""

    paths: Sequence[str]
    overrides: Dict[str, Any]
    device: torch.device
    dtype: torch.dtype  # fairseq's precision
    compute_type: str  # CTranslate2's
    translator: Optional[Translator] = None  # what is no checkpoint

    @property
    def reads_text(self) -> bool:
        return self.translator is not None and self.translator.reads_text


def _open_translator(asked: Asked, cfg: Any, task: Any) -> Optional[Translator]:
    """The teacher, if it is a folder."""
    path = cfg.common_eval.path
    if asked.engine != "ctranslate2" or not os.path.isdir(path):
        return None
    return Translator.open(
        *(path, task),
        spm=asked.teacher_spm,
        tokenizer=asked.teacher_tokenizer,
        around=asked.around,
    )


# What the result depends on


def _header(asked: Asked, cfg: Any, data: DataBin, teacher: _Teacher) -> Dict[str, Any]:
    """All that hypotheses depend on."""
    of_fairseq = asked.engine == "fairseq"
    if teacher.translator is not None:
        teachers = teacher.translator.describe()
    else:
        files = [{"sha256": digest(path), "bytes": os.path.getsize(path)} for path in teacher.paths]
        teachers = {"teachers": files}
    return {
        **teachers,
        **({"written": TEXT} if teacher.reads_text else {}),
        "overrides": {str(k): repr(v) for k, v in teacher.overrides.items()},
        "task": cfg.task._name,
        **decoding.describe(data, cfg.dataset.gen_subset, asked.source_text, cfg.task),
        "source_text_encoding": decoding.describe_text(cfg) if asked.source_text else None,
        "engine": asked.engine,
        "precision": str(teacher.dtype) if of_fairseq else teacher.compute_type,
        "generation": OmegaConf.to_container(cfg.generation),
        "seed": cfg.common.seed,
        "max_tokens": cfg.dataset.max_tokens,
        "batch_size": cfg.dataset.batch_size,
        "required_batch_size_multiple": cfg.dataset.required_batch_size_multiple,
    }


def _header_of_imported(
    asked: Asked, cfg: Any, data: DataBin, imported: _Imported
) -> Dict[str, Any]:
    """Likewise, of translations made elsewhere."""
    own = imported.source == exchange.USE
    subset = None if own or asked.source_text else cfg.dataset.gen_subset
    return {
        **imported.translations.describe(),
        **decoding.describe(data, subset or "", asked.source_text, cfg.task),
        "subset": subset,
        "own_source": own,
        "source_text_encoding": decoding.describe_text(cfg) if own or asked.source_text else None,
        # how the scores are normalised
        "generation": {name: cfg.generation[name] for name in ("lenpen", "unnormalized")},
    }


def _settings(
    asked: Asked,
    cfg: Any,
    header: Dict[str, Any],
    student: Student,
    tokenizer: Tokenizer,
    mix: Mix,
) -> Dict[str, Any]:
    """All that the data depends on."""
    choice, filters = asked.choice, dict(asked.choice.filters._asdict())
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
        **_settings_of_student(asked, cfg, student),
    }


def _settings_of_student(asked: Asked, cfg: Any, student: Student) -> Dict[str, Any]:
    """What it is written for."""
    return {
        "text": decoding.describe_text(cfg),
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
        "models": [digest(path) for path in utils.split_paths(choice.backward_path)],
        "weight": choice.backward_weight,
        "min_quantile": choice.min_backward_quantile,
    }


# Refusals


def _refuse_subwords(asked: Asked, cfg: Any, data: DataBin, to_text: Callable[[str], str]) -> None:
    """Subwords that would be compared, or encoded anew, as if they were words."""
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
    symbols, removed = data.target.symbols, cfg.common_eval.post_process
    for mark, how in MARKS.items():
        marked = [symbol for symbol in symbols if mark in symbol]
        if removed and 20 * len(marked) < len(symbols):
            continue  # some that are text
        if any(mark in to_text(f"{symbol} a") for symbol in marked[:1]):
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


# Reading


def _corpus(
    asked: Asked,
    cfg: Any,
    task: Any,
    data: DataBin,
    *,
    to_subwords: Callable[[str], str],
    store: HypothesisStore,
    imported: Optional[_Imported],
) -> Corpus:
    """What is translated, with references if they are needed."""
    own = imported is not None and imported.source == exchange.USE
    references = None
    if own or asked.source_text:
        where = imported.translations.names if imported and own else asked.source_text
    else:
        where = f"{cfg.task.data}, {cfg.dataset.gen_subset}"
        corpus = Corpus.of_subset(task, data, cfg.dataset.gen_subset)
        references = corpus.references
    if asked.choice.needs_references and references is None:
        raise FileError(
            f"--select {asked.choice.select} and --min-closeness need references, and {where} has "
            "none"
        )
    if imported and own:
        keys = "imported", "format", "files", "source_text_encoding", "truncate_source"
        return Corpus.of_text(
            *(task, data, imported.translations.names),
            to_subwords=str if imported.source_in_subwords else to_subwords,
            prefix=store.beside("source", *keys),
            lines=(item.source or "" for item in imported.translations),
        )
    if asked.source_text:
        prefix = store.beside("source", "files", "source_text_encoding", "truncate_source")
        return Corpus.of_text(task, data, asked.source_text, to_subwords=to_subwords, prefix=prefix)
    return corpus


def _raw(asked: Asked, cfg: Any) -> bool:
    """Whether the source is running text, and not symbols of the data."""
    return bool(asked.source_text and (cfg.bpe or cfg.tokenizer))


def _running_text(
    asked: Asked, cfg: Any, corpus: Corpus, to_text: Callable[[str], str]
) -> Callable[[int], str]:
    """The running text of a sentence of the corpus."""
    if _raw(asked, cfg):
        return SourceLines(str(asked.source_text)).__getitem__
    return lambda i: to_text(databin.decode(corpus.data.source, corpus.source[i].tolist()))


def _mix(asked: Asked, cfg: Any, data: DataBin, student: Student) -> Mix:
    of_text = asked.source_text or asked.import_source == exchange.USE
    subset = "train" if of_text else cfg.dataset.gen_subset
    return open_mix(
        *(asked.mix, asked.mix_order, cfg.common.seed),
        data=data,
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


# Decoding


def _write_nbest(asked: Asked, corpus: Corpus, store: HypothesisStore, student: Student) -> None:
    assert asked.write_nbest
    old = asked.write_nbest if os.path.exists(asked.write_nbest) and not asked.overwrite else None

    def source(i: int) -> str:
        return student.to_text(databin.decode(corpus.data.source, corpus.source[i].tolist()))

    exchange.write_nbest(asked.write_nbest, store, source, student.text, same_as=old)
    print(f"{asked.write_nbest}: the hypotheses, for scoring or translating elsewhere", flush=True)


def _translate(
    asked: Asked,
    cfg: Any,
    task: Any,
    corpus: Corpus,
    text: Callable[[int], str],
    *,
    teacher: _Teacher,
    store: HypothesisStore,
    output: Output,
) -> bool:
    """Decode this shard; True if the lists of all shards are complete.

    Args:
        text: running text of a sentence of the corpus.
    """
    if teacher.translator is None:
        engine, positions = _engine(asked, cfg, task, corpus.data, teacher=teacher, store=store)
    else:
        engine, positions, corpus = _translator_engine(
            cfg, task, corpus, text, teacher=teacher, store=store
        )
    plan = None
    if not store.planned:
        plan = decoding.plan(
            task,
            corpus,
            positions,
            max_tokens=cfg.dataset.max_tokens,
            max_sentences=cfg.dataset.batch_size,
            required_multiple=cfg.dataset.required_batch_size_multiple,
            seed=cfg.common.seed,
        )
    if asked.overwrite:  # by now all has been checked
        clear_others(output, store)
    with contextlib.closing(store):
        start = time.perf_counter()
        sentences, tokens = decode(corpus, engine, store, plan, num_workers=cfg.dataset.num_workers)
        seconds = max(time.perf_counter() - start, 1e-9)
        print(
            f"Translated {sentences:,} sentences ({tokens:,} tokens) in {seconds:.1f}s "
            f"({sentences / seconds:.2f} sentences/s, {tokens / seconds:.2f} tokens/s)",
            flush=True,
        )
        return store.finish()


def _engine(
    asked: Asked, cfg: Any, task: Any, data: DataBin, *, teacher: _Teacher, store: HypothesisStore
) -> Tuple[Any, List[Any]]:
    """What decodes, and the longest source and target of each model."""
    checkpoints = decoding.open_checkpoints(
        teacher.paths, task, ROLE, overrides=teacher.overrides, trust=asked.trust
    )
    if asked.task_given:
        checkpoints = [checkpoint.as_task(cfg.task._name) for checkpoint in checkpoints]
    if asked.engine == "fairseq":
        models = decoding.build_models(
            checkpoints,
            *(task, teacher.overrides, cfg),
            device=teacher.device,
            dtype=teacher.dtype,
        )
        engine: Any = decoding.FairseqEngine(*(task, models, cfg.generation, cfg.common.seed), data)
        unused = [] if engine.refines else decoding.refining_flags(cfg.generation)
        if unused:
            raise FileError(f"{', '.join(unused)}: for teachers that are not autoregressive")
        return engine, [model.max_positions() for model in models]
    langs = cfg.task.source_lang, cfg.task.target_lang
    folder = store.beside("ctranslate2", "teachers", "files")
    convert_for_ctranslate2(checkpoints[0], task, langs, folder)
    positions = checkpoints[0].max_positions
    return _ctranslate2(cfg, teacher, decoding.SymbolReading(task), folder, positions[1]), [
        positions
    ]


def _ctranslate2(
    cfg: Any, teacher: _Teacher, reading: Any, folder: Path, longest: int
) -> decoding.CTranslate2Engine:
    return decoding.CTranslate2Engine(
        reading,
        folder,
        cfg.generation,
        device=teacher.device.type,
        device_index=teacher.device.index or 0,
        compute_type=teacher.compute_type,
        max_positions=longest,
    )


def _translator_engine(
    cfg: Any,
    task: Any,
    corpus: Corpus,
    text: Callable[[int], str],
    *,
    teacher: _Teacher,
    store: HypothesisStore,
) -> Tuple[Any, List[Any], Corpus]:
    """What decodes with a folder, its longest source and target, and what it reads.

    Args:
        text: running text of a sentence of the corpus.
    """
    assert teacher.translator is not None
    translator = teacher.translator.converted(store.beside("ctranslate2", "teachers"))
    assert translator.model is not None
    reading, positions = translator.reading(task), translator.positions
    if translator.reads_text:
        corpus = corpus._replace(dataset=TextDataset(reading, text, len(corpus.source)))
        logger.info(f"of the first sentence {reading.example(text(0))}")
        if not store.planned:
            _refuse_prefix(reading, corpus, task.max_positions()[0], positions[0])
    longest = positions[1] or task.max_positions()[1]
    engine = _ctranslate2(cfg, teacher, reading, translator.model.folder, longest)
    return engine, [positions], corpus


def _refuse_prefix(
    reading: Any, corpus: Corpus, asked: Optional[int], longest: Optional[int]
) -> None:
    """Refuse tokens around a source that make it too long, unless that limit is asked for."""
    if longest is None or (asked is not None and asked <= longest):
        return
    sizes, more = corpus.dataset.sizes, len(reading.source_prefix) + len(reading.source_suffix)
    too_long = int(((sizes > longest) & (sizes - more <= longest)).sum())
    if too_long:
        raise FileError(
            f"--source-prefix and --source-suffix: with these {more} tokens, {too_long} sentences "
            f"have more than the {longest} tokens that the teacher reads; "
            f"--max-source-positions {longest} leaves out all that are longer"
        )


def convert_for_ctranslate2(
    checkpoint: Checkpoint, task: Any, langs: Tuple[str, str], folder: Path
) -> Path:
    """A teacher as CTranslate2 reads it, kept in ``folder`` for the next time.

    Args:
        task: has the dictionaries of ``langs``.

    Raises:
        FileError: CTranslate2 is not installed, or takes no such model.
    """
    dictionaries = task.source_dictionary, task.target_dictionary
    try:
        return keep(
            folder, lambda new: export_ctranslate2(checkpoint, *dictionaries, langs, folder=new)
        )
    except ExportError as error:
        reason = str(error).rstrip(".")
        raise FileError(f"--engine ctranslate2: {reason}. --engine fairseq takes any.") from error


def clear_others(output: Output, store: HypothesisStore) -> None:
    """Remove hypotheses of other settings, unless another shard has been first."""
    with output.lock(wait=True):
        if store.differences():
            print(f"removing the hypotheses in {store.folder}", flush=True)
            store.clear()


def decode(
    corpus: Corpus,
    engine: Any,
    store: HypothesisStore,
    plan: Optional[Sequence[np.ndarray]],
    *,
    num_workers: int,
) -> Tuple[int, int]:
    """Decode one shard, from where it stopped.

    Args:
        engine: has ``decode``, which turns collated batches into n-best lists, in turn.
        plan: the sentences of each batch; None if the store has one.

    Returns:
        numbers of sentences and of subwords that were decoded now.
    """
    store.begin(plan)
    if any((batch >= len(corpus.dataset)).any() for batch in store.batches):
        raise FileError(f"{store.folder} is a plan for other sentences")
    total = sum(map(len, store.batches))
    before = sum(map(len, store.batches[: store.done]))
    batches: Any = store.batches[store.done :]
    loader = torch.utils.data.DataLoader(
        corpus.dataset,
        batch_sampler=batches,
        collate_fn=corpus.dataset.collater,
        num_workers=num_workers,
        worker_init_fn=store.shards.release,
    )
    subwords = 0
    with progress_bar(total, "decoding", "sentences", before) as progress:
        for nbest in engine.decode(loader):
            store.append(nbest)
            # of text: its words
            subwords += sum(len(databin.words(n[0][0])) + 1 for n in nbest.values())
            progress.update(len(nbest))
    return total - before, subwords
