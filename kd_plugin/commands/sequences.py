"""``fairseq-kd-sequences``: a training set that says what the teacher says.

Decodes the training source with fairseq's generator, chooses one hypothesis for each sentence, and
writes a complete data-bin (Kim & Rush 2016).
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable, List, Optional, Tuple

import sentencepiece
from fairseq import options as fairseq_options
from fairseq import utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf, open_dict

from .. import decoding, sequences
from ..checkpoints import Role, digest, lacking, parse_overrides
from ..export import QUANTIZATIONS
from ..files import FileError
from .arguments import (
    Help,
    add_trust,
    run_like_fairseq,
    shard_of_process,
    useless_for_decoding,
)

PROG = "fairseq-kd-sequences"
ROLE = Role("teacher", "--trust-checkpoint", overrides="--model-overrides")


def make_parser() -> argparse.ArgumentParser:
    parser = fairseq_options.get_generation_parser(default_task="translation")
    parser.prog, parser.description, parser.formatter_class = PROG, __doc__, Help
    parser.usage = "%(prog)s DATA --path TEACHER[:MORE] --output DIR [options]"
    # without a multiple: newer fairseq would leave sentences out
    parser.set_defaults(gen_subset="train", required_batch_size_multiple=1)
    add = parser.add_argument_group("sequence-level distillation").add_argument
    add("--output", required=True, metavar="DIR", help="data-bin to write")
    add(
        "--select",
        default="best",
        choices=("best", "closest"),
        help="which of the n best: the likeliest, or the closest to the reference (sequence "
        "interpolation, Kim & Rush 2016)",
    )
    add(
        "--metric",
        default="bleu",
        choices=sequences.METRICS,
        help="of that closeness: sacreBLEU's, of sentences, on text without subwords",
    )
    add(
        "--hypotheses",
        metavar="DIR",
        help="folder of the n-best lists, to choose from them again in another --output "
        "(default: OUTPUT/hypotheses)",
    )
    add(
        "--source-text",
        metavar="FILE",
        help="translate this text instead of a subset: one sentence per line, raw if --bpe says "
        "how to encode it, else as subwords",
    )
    add(
        "--mix",
        choices=("original",),
        help="put the original training set of DATA before the distilled one",
    )
    add("--repeat-original", type=int, default=1, metavar="N", help="with --mix: so many times")
    add(
        "--student-data",
        metavar="DIR",
        help="data-bin of a student with other dictionaries than the teacher's: they, and its "
        "valid and test, are taken from there",
    )
    add(
        "--student-spm",
        metavar="MODEL",
        help="the student's SentencePiece model, to encode with what --remove-bpe or --bpe has "
        "decoded",
    )
    add("--engine", default="fairseq", choices=("fairseq", "ctranslate2"), help="what decodes")
    add(
        "--compute-type",
        choices=QUANTIZATIONS,
        help="CTranslate2's precision (default: int8 on a CPU, float16 on a GPU)",
    )
    add("--overwrite", action="store_true", help="replace what another command made in --output")
    add_trust(add)
    add = parser.add_argument_group("filters: what drops a sentence").add_argument
    defaults = sequences.Filters()
    add("--no-filters", action="store_true", help="none of the following ones unless named")
    add(
        "--max-length",
        type=int,
        metavar="N",
        help=f"more subwords on either side (default: {defaults.max_length})",
    )
    add(
        "--max-length-ratio",
        type=float,
        metavar="R",
        help=(
            "one side longer than R times the other, in subwords, the end of sentence included "
            f"(default: {defaults.max_length_ratio})"
        ),
    )
    add(
        "--max-repeats",
        type=int,
        metavar="N",
        help=(
            "the hypothesis's commonest 4-gram occurs more than N times more often than the "
            f"source's commonest does (default: {defaults.max_repeats})"
        ),
    )
    add(
        "--keep-copies",
        action="store_true",
        help="keep copies of the source, which are dropped otherwise",
    )
    add(
        "--keep-unfinished",
        action="store_true",
        help="keep hypotheses that the length limit has cut off, which are dropped otherwise",
    )
    add(
        "--min-closeness",
        type=float,
        metavar="X",
        help="less than this --metric against the reference, 0 to 100",
    )
    add(
        "--min-score-quantile",
        type=float,
        default=0.0,
        metavar="Q",
        help="this share of the sentences, those with the teacher's lowest score per token",
    )
    return parser


def main(arguments: Optional[List[str]] = None) -> int:
    return run_like_fairseq(PROG, make_parser, run, arguments)


def run(options: argparse.Namespace) -> None:
    _refuse(options)
    cfg = convert_namespace_to_omegaconf(options)
    utils.import_user_module(cfg.common)
    if cfg.dataset.max_tokens is None and cfg.dataset.batch_size is None:
        with open_dict(cfg):
            cfg.dataset.max_tokens = 12000  # as fairseq-generate
    num_shards, shard_id, device_id = shard_of_process(options)
    device, dtype = decoding.placement(cfg, device_id)
    task = decoding.set_up_task(cfg)
    langs = cfg.task.source_lang, cfg.task.target_lang
    data = decoding.DataBin(cfg.task.data, *langs)
    detokenise, to_subwords = decoding.text_functions(task, cfg)
    student = _student(options, data, detokenise, _wants_text(options))

    overrides = parse_overrides(cfg.common_eval.model_overrides, "--model-overrides")
    paths = utils.split_paths(cfg.common_eval.path)
    compute_type = options.compute_type or ("float16" if device.type == "cuda" else "int8")
    fairseq_engine = options.engine == "fairseq"
    header = {
        "teachers": [{"sha256": digest(path), "bytes": os.path.getsize(path)} for path in paths],
        "overrides": {str(k): repr(v) for k, v in overrides.items()},
        "task": options.task,
        **decoding.describe(data, cfg.dataset.gen_subset, options.source_text, cfg.task),
        "source_text_encoding": decoding.describe_text(cfg) if options.source_text else None,
        "engine": options.engine,
        "precision": str(dtype) if fairseq_engine else compute_type,
        "generation": OmegaConf.to_container(cfg.generation),
        "seed": cfg.common.seed,
        "max_tokens": cfg.dataset.max_tokens,
        "batch_size": cfg.dataset.batch_size,
        "required_batch_size_multiple": cfg.dataset.required_batch_size_multiple,
    }
    choice = _choice(options)
    output = sequences.Output(
        options.output,
        {
            "hypotheses": header,
            "select": choice.select,
            "metric": choice.metric if choice.needs_references else None,
            "filters": dict(choice.filters._asdict()),
            "min_closeness": choice.min_closeness,
            "min_score_quantile": choice.min_score_quantile,
            "text": decoding.describe_text(cfg),
            "original": options.repeat_original if options.mix else 0,
            "student_spm": digest(options.student_spm) if options.student_spm else None,
            "student_files": {
                path.name: digest(str(path)) for path in decoding.carried_files(student.data)
            },
        },
    )
    folder = Path(options.hypotheses or Path(options.output) / "hypotheses")
    store = sequences.HypothesisStore(folder, header, num_shards, shard_id)
    _refuse_others(options, output, store)
    if output.complete:
        output.clean_up()
        print("\n".join(sequences.summary_lines(output.record(), output.folder)), flush=True)
        return
    if options.source_text:
        kept = store.beside("source", "files", "source_text_encoding", "truncate_source")
        corpus = decoding.Corpus.of_text(task, data, options.source_text, to_subwords, kept)
    else:
        corpus = decoding.Corpus.of_subset(task, data, cfg.dataset.gen_subset)
    if choice.needs_references and corpus.references is None:
        raise FileError(
            "--select closest and --min-closeness need references, and "
            f"{options.source_text or f'{cfg.task.data}, {cfg.dataset.gen_subset}'} has none"
        )
    originals = _originals(options, data, corpus)

    if store.complete:
        store.clean_up()
    else:
        teachers = decoding.open_checkpoints(
            paths, task, ROLE, overrides=overrides, trust=options.trust_checkpoint
        )
        engine: Any
        if fairseq_engine:
            models = decoding.build_models(teachers, task, overrides, cfg, device, dtype)
            positions = [model.max_positions() for model in models]
            engine = decoding.FairseqEngine(task, models, cfg.generation, cfg.common.seed)
        else:
            kept = store.beside("ctranslate2", "teachers", "files")
            converted = sequences.converted(teachers[0], task, kept)
            positions = [teachers[0].max_positions]
            engine = decoding.CTranslate2Engine(
                task,
                converted,
                cfg.generation,
                device.type,
                device_id,
                compute_type,
                positions[0][1],
            )
        plan = None
        if not store.planned:
            plan = decoding.plan(
                task,
                corpus,
                positions,
                cfg.dataset.max_tokens,
                cfg.dataset.batch_size,
                cfg.dataset.required_batch_size_multiple,
                cfg.common.seed,
            )
        if options.overwrite:  # by now all has been checked
            _clear(output, store)
        start = time.perf_counter()
        sentences, tokens = sequences.decode(corpus, engine, store, plan, cfg.dataset.num_workers)
        seconds = max(time.perf_counter() - start, 1e-9)
        print(
            f"Translated {sentences:,} sentences ({tokens:,} tokens) in {seconds:.1f}s "
            f"({sentences / seconds:.2f} sentences/s, {tokens / seconds:.2f} tokens/s)",
            flush=True,
        )
        if not store.finish():
            print(
                f"{folder}: shard {shard_id} of {num_shards} is done; the last one to end writes "
                "the data",
                flush=True,
            )
            return
    lock = sequences.alone(output.folder)
    if lock is None:
        print(f"{output.folder}: another process is writing it", flush=True)
        return
    output.look()  # another process may have written it
    _refuse_others(options, output, store)
    if output.complete:
        return
    g = cfg.generation
    chosen = sequences.choose(corpus, store, student, choice, g.lenpen, g.unnormalized)
    if output.differences():
        print(f"replacing {output.contents()}", flush=True)
    output.write(corpus, store, chosen, student, originals, options.repeat_original)
    print("\n".join(sequences.summary_lines(output.record(), output.folder)), flush=True)
    lock.close()


def _refuse(options: argparse.Namespace) -> None:
    """Flags that mean nothing here, or need others."""
    faults = useless_for_decoding(options)
    if not options.path:
        faults.append("--path: expected the teacher's checkpoint, or several with ':' between")
    if options.nbest > options.beam:
        faults.append(f"--nbest {options.nbest} needs --beam {options.nbest}")
    if options.select == "closest" and options.nbest < 2:
        faults.append("--select closest needs --nbest 2 or more, as many as --beam say")
    if options.source_text and (options.select == "closest" or options.min_closeness is not None):
        faults.append("--source-text has no references for --select closest or --min-closeness")
    if options.source_text and not os.path.isfile(options.source_text):
        faults.append(f"--source-text {options.source_text}: no such file")
    if options.student_spm and not options.student_data:
        faults.append("--student-spm needs --student-data, with the dictionaries that go with it")
    if options.repeat_original != 1 and not options.mix:
        faults.append("--repeat-original needs --mix original")
    if options.repeat_original < 1:
        faults.append("--repeat-original must be 1 or more")
    if not 0 <= options.min_score_quantile < 1:
        faults.append("--min-score-quantile must be from 0 to below 1")
    if options.min_closeness is not None and not 0 <= options.min_closeness <= 100:
        faults.append("--min-closeness must be from 0 to 100")
    if options.engine == "ctranslate2":
        if options.task != "translation":
            faults.append("--engine ctranslate2 takes --task translation alone")
        if len(utils.split_paths(options.path or "")) > 1:
            faults.append("--engine ctranslate2 takes no ensemble")
        for name in ("diverse_beam_groups", "diversity_rate", "match_source_len", "unkpen"):
            if getattr(options, name) not in (-1, -1.0, False, 0):
                faults.append(f"--engine ctranslate2 has no --{name.replace('_', '-')}")
        if options.sampling and options.temperature <= 0:
            faults.append("--temperature must be above 0")
        if not options.sampling and options.temperature != 1:
            faults.append("--engine ctranslate2 has --temperature with --sampling alone")
    elif options.compute_type:
        faults.append("--compute-type needs --engine ctranslate2")
    if faults:
        raise FileError("; ".join(faults))


def _wants_text(options: argparse.Namespace) -> Optional[str]:
    """The flag that needs running text rather than subwords."""
    if options.student_spm:
        return "--student-spm"
    if options.select == "closest":
        return "--select closest"
    return None if options.min_closeness is None else "--min-closeness"


def _student(
    options: argparse.Namespace,
    data: decoding.DataBin,
    detokenise: Callable[[str], str],
    wants_text: Optional[str],
) -> sequences.Student:
    if wants_text and not (options.post_process or options.bpe or options.tokenizer):
        for mark, how in (("\u2581", "--remove-bpe sentencepiece"), ("@@", "--remove-bpe")):
            if any(mark in symbol for symbol in data.target.symbols):
                raise FileError(
                    f"{wants_text} needs text without subwords, and the vocabulary has {mark!r} "
                    f"in it: add {how}"
                )
    if not options.student_data:
        return sequences.Student(data, detokenise, None)
    theirs = decoding.DataBin(options.student_data, *data.langs)
    if "valid" not in theirs.splits():
        raise FileError(
            f"--student-data {options.student_data}: expected a folder of fairseq-preprocess with "
            "a valid subset; it is carried over"
        )
    if options.student_spm:
        try:
            model = sentencepiece.SentencePieceProcessor(model_file=options.student_spm)
        except (OSError, RuntimeError) as error:
            raise FileError(
                f"--student-spm {options.student_spm}: cannot be read as a SentencePiece model "
                f"({error})"
            ) from None
        return sequences.Student(
            theirs, detokenise, lambda text: " ".join(model.encode(text, out_type=str))
        )
    for mine, other, side in (
        (data.source, theirs.source, "source"),
        (data.target, theirs.target, "target"),
    ):
        unknown = lacking(mine.symbols, other.indices)
        if unknown:
            raise FileError(
                f"the {side} dictionary of --student-data lacks {len(unknown)} of the teacher's "
                f"symbols ({', '.join(map(repr, unknown[:5]))}, ...): give the student's "
                "SentencePiece model with --student-spm, so that the text is encoded anew"
            )
    return sequences.Student(theirs, detokenise, None)


def _choice(options: argparse.Namespace) -> sequences.Choice:
    base = sequences.Filters.off() if options.no_filters else sequences.Filters()
    named = {
        name: getattr(options, name)
        for name in ("max_length", "max_length_ratio", "max_repeats")
        if getattr(options, name) is not None
    }
    return sequences.Choice(
        options.select,
        options.metric,
        base._replace(
            copies=base.copies and not options.keep_copies,
            unfinished=base.unfinished and not options.keep_unfinished,
            **named,
        ),
        options.min_closeness,
        options.min_score_quantile,
    )


def _refuse_others(
    options: argparse.Namespace, output: sequences.Output, store: sequences.HypothesisStore
) -> None:
    """What is in the way, unless it is to be replaced."""
    if options.hypotheses:
        store.refuse_others("Repeat the command that made them, or choose another --hypotheses")
    if options.overwrite:
        return
    different = output.differences()
    if different:
        also = f", and the hypotheses in {store.folder}" if store.differences() else ""
        raise FileError(
            f"--output {output.folder} was made with other settings: {'; '.join(different)}. "
            "Choose another folder; --overwrite would remove "
            f"{output.contents()}{also}."
        )
    store.refuse_others("Choose another folder; --overwrite would remove them")


def _clear(output: sequences.Output, store: sequences.HypothesisStore) -> None:
    """Remove hypotheses of other settings, unless another shard has been first."""
    with sequences.alone(output.folder, wait=True):
        if store.differences():
            print(f"removing the hypotheses in {store.folder}", flush=True)
            store.clear()


def _originals(
    options: argparse.Namespace, data: decoding.DataBin, corpus: decoding.Corpus
) -> Optional[Tuple[Any, Any]]:
    if not options.mix:
        return None
    subset = "train" if options.source_text else options.gen_subset
    sides = [data.side(subset, lang) for lang in data.langs]
    if any(side is None for side in sides):
        raise FileError(f"--mix original: {data.folder} has no {subset} of both languages")
    return sides[0], sides[1]


if __name__ == "__main__":
    sys.exit(main())
