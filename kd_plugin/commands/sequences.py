"""``fairseq-kd-sequences``: a training set of the teacher's translations.

Decodes the training source with fairseq's generator, or imports translations made elsewhere;
chooses one hypothesis for each sentence, and writes a complete data-bin (Kim & Rush 2016).
"""

import argparse
import os
import sys
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

from fairseq import options as fairseq_options
from fairseq import utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from .. import sequences
from ..checkpoints import parse_overrides, parse_symbols
from ..decoding import Around, parse_languages
from ..errors import Faults
from ..export import QUANTIZATIONS
from ..files import FileError
from ..sequences import exchange
from ..sequences.student import SUBWORDS, TEXT
from .arguments import (
    Help,
    NeedsNoOther,
    add_trust,
    flag_of,
    refuse_unsupported,
    run_like_fairseq,
    shard_of_process,
)
from .choice import add_choice, read_choice, refuse_choice

PROG = "fairseq-kd-sequences"
_AROUND = ("source_prefix", "source_suffix", "target_prefix")
_OF_FOLDERS = ("teacher_spm", "teacher_tokenizer", *_AROUND)


def make_parser() -> argparse.ArgumentParser:
    parser = fairseq_options.get_generation_parser(default_task="translation")
    parser.prog, parser.description, parser.formatter_class = PROG, __doc__, Help
    parser.usage = (
        "%(prog)s DATA --path TEACHER[:MORE] | --import FILE... --output DIR [options]\n"
        "       %(prog)s DATA --mix DIR[:DIR...] --output DIR [options]\n"
        "       %(prog)s --inspect DIR [--inspect-output FILE]"
    )
    # without a multiple: newer fairseq would leave sentences out
    parser.set_defaults(gen_subset="train", required_batch_size_multiple=1)
    add = parser.add_argument_group("sequence-level distillation").add_argument
    add("--output", required=True, metavar="DIR", help="data-bin to write")
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
        metavar="SET[=WEIGHT][:SET...]",
        help="put training sets before the distilled one, or, without --path, nothing but these "
        "together: original is that of DATA, other names are folders of data-bins in the student's "
        "vocabulary; weight 2 writes a set twice, 0.5 a random half of it",
    )
    add(
        "--repeat-original",
        type=int,
        metavar="N",
        help="the weight of original in --mix (default: 1)",
    )
    add(
        "--mix-order",
        default=sequences.ORDERS[0],
        choices=sequences.ORDERS,
        help="of the whole training set; fairseq-train shuffles in each epoch by itself",
    )
    add(
        "--student-data",
        metavar="DIR",
        help="data-bin of a student with other dictionaries than the teacher's: its dictionaries, "
        "valid and test are copied from there",
    )
    add(
        "--student-spm",
        metavar="MODEL",
        help="the student's SentencePiece model, which encodes the text that --remove-bpe or --bpe "
        "has decoded",
    )
    add(
        "--student-langs",
        metavar="SRC,TGT",
        help="what --student-data calls the languages (default: as DATA does)",
    )
    add("--engine", default="fairseq", choices=sequences.ENGINES, help="software that decodes")
    add(
        "--compute-type",
        choices=QUANTIZATIONS,
        help="CTranslate2's precision (default: int8 on a CPU, float16 on a GPU)",
    )
    add(
        "--write-nbest",
        metavar="FILE",
        help="also write source, hypotheses and scores as text, for scoring or translating "
        f"elsewhere; the name says how: {', '.join(exchange.ENDINGS)}",
    )
    folder = parser.add_argument_group("a teacher that is a folder, with --engine ctranslate2")
    folder.add_argument(
        "--teacher-spm",
        metavar="SOURCE[:TARGET]",
        help="SentencePiece models that cut text into the tokens of the CTranslate2 folder --path",
    )
    folder.add_argument(
        "--teacher-tokenizer",
        metavar="DIR",
        help="folder with its tokenizer of Hugging Face's (default: --path, if that is a model of "
        "transformers)",
    )
    for flag, what in (
        ("--source-prefix", "its tokens before every source"),
        ("--source-suffix", "its tokens behind every source (default: its end of sentence)"),
        ("--target-prefix", "its tokens that every translation begins with"),
    ):
        folder.add_argument(flag, metavar="TOKENS", help=what + ", with spaces or commas between")
    add("--overwrite", action="store_true", help="replace what another command made in --output")
    add_trust(add)
    add = parser.add_argument_group("translations made elsewhere, instead of --path").add_argument
    add(
        "--import",
        dest="imported",
        nargs="+",
        default=[],
        metavar="FILE",
        help="read translations from here, one file after the other; '-' is standard input; .gz "
        "and .zst are unpacked",
    )
    add(
        "--import-format",
        choices=tuple(exchange.FORMATS),
        help="lines: one translation in each; fairseq: what fairseq-generate prints; nbest: "
        "Marian's, id ||| text ||| features ||| score; tsv: source, translation[, score]; jsonl: "
        "JSON objects (default: recognised)",
    )
    add(
        "--import-as",
        choices=(TEXT, SUBWORDS),
        help="text, which --bpe or --student-spm encodes, or subwords of DATA's target dictionary "
        "(default: subwords if they are marked as its are)",
    )
    add(
        "--import-source",
        choices=(exchange.CHECK, exchange.USE, exchange.IGNORE),
        help="the file's own sources: check that they are those of the subset or of --source-text, "
        "use them as the source text, or ignore them (default: check; use if DATA has no such "
        "subset)",
    )
    add(
        "--import-incomplete",
        action="store_true",
        help="in files with ids: drop sentences without a translation instead of refusing",
    )
    add_choice(parser)
    add = parser.add_argument_group("looking at finished data, instead of making any").add_argument
    add(
        "--inspect",
        action=NeedsNoOther,
        metavar="DIR",
        help="print what a person wants to see of this --output before training on it: counts, "
        "lengths, what was dropped and why, examples",
    )
    add(
        "--inspect-output",
        metavar="FILE",
        help="write that to a file whose name ends with .html or .md instead",
    )
    return parser


def main(arguments: Optional[List[str]] = None) -> int:
    return run_like_fairseq(PROG, make_parser, run, arguments)


def run(options: argparse.Namespace) -> None:
    if options.inspect:
        page = sequences.inspect(options.inspect, options.inspect_output)
        print(options.inspect_output if page is None else page, flush=True)
        return
    _refuse(options)
    shard = shard_of_process(options)
    record = sequences.make(
        sequences.Asked(
            cfg=convert_namespace_to_omegaconf(options),
            output=options.output,
            choice=read_choice(options),
            hypotheses=options.hypotheses,
            source_text=options.source_text,
            mix=_mix(options),
            mix_order=options.mix_order,
            student_data=options.student_data,
            student_spm=options.student_spm,
            student_langs=_student_langs(options),
            task_given=options.task_given,
            engine=options.engine,
            teacher_spm=utils.split_paths(options.teacher_spm) if options.teacher_spm else (),
            teacher_tokenizer=options.teacher_tokenizer,
            around=Around(*(parse_symbols(getattr(options, name)) for name in _AROUND)),
            compute_type=options.compute_type,
            trust=options.trust_checkpoint,
            overwrite=options.overwrite,
            imported=options.imported,
            import_format=options.import_format,
            import_as=options.import_as,
            import_source=options.import_source,
            import_incomplete=options.import_incomplete,
            write_nbest=options.write_nbest,
            num_shards=shard.num_shards,
            shard_id=shard.shard_id,
            device_id=shard.device_id,
        )
    )
    if record is not None:
        print("\n".join(sequences.summary_lines(record, Path(options.output))), flush=True)


def _refuse(options: argparse.Namespace) -> None:
    """Flags that mean nothing here, or need others."""
    faults = Faults()
    refuse_unsupported(options, faults)
    check = faults.check
    check(options.output, "--output: expected the folder to write")
    wanted: List[sequences.Wanted] = []
    with faults.collecting():
        wanted = _mix(options)
    if options.imported:
        _refuse_for_import(options, faults)
    else:
        if not options.path:
            _refuse_for_mixture(options, faults, wanted)
        check(
            options.nbest <= options.beam, f"--nbest {options.nbest} needs --beam {options.nbest}"
        )
        for name in ("import_format", "import_as", "import_source", "import_incomplete"):
            check(not getattr(options, name), f"{flag_of(name)} needs --import")
    check(
        options.write_nbest is None or options.write_nbest.endswith(exchange.ENDINGS),
        f"--write-nbest {options.write_nbest}: expected a name with {', '.join(exchange.ENDINGS)}",
    )
    refuse_choice(options, faults, None if options.imported else options.nbest)
    check(
        options.source_text is None or os.path.isfile(options.source_text),
        f"--source-text {options.source_text}: no such file",
    )
    check(
        options.student_data or not options.student_spm,
        "--student-spm needs --student-data, with the dictionaries that go with it",
    )
    check(
        options.student_data or not options.student_langs,
        "--student-langs needs --student-data, whose languages it names",
    )
    with faults.collecting():
        _student_langs(options)
    check(options.mix or options.mix_order == sequences.ORDERS[0], "--mix-order needs --mix")
    check(not options.inspect_output, "--inspect-output needs --inspect")
    with faults.collecting():
        parse_overrides(options.model_overrides, "--model-overrides")
    is_folder = os.path.isdir(options.path or "")
    if options.engine == "ctranslate2":
        _refuse_for_ctranslate2(options, faults)
    else:
        check(not options.compute_type, "--compute-type needs --engine ctranslate2")
        check(not is_folder, f"--path {options.path} is a folder: give --engine ctranslate2, too")
    if is_folder:
        _refuse_for_folder(options, faults)
    else:
        given = [flag_of(name) for name in _OF_FOLDERS if getattr(options, name) is not None]
        check(
            not given,
            f"{', '.join(given)}: for a teacher that is a folder of CTranslate2's or transformers'",
        )
    faults.raise_if_any(FileError)


def _refuse_for_import(options: argparse.Namespace, faults: Faults) -> None:
    check = faults.check
    check(not options.path, "--import and --path: expected one of them")
    for name in ("sampling", "engine"):
        check(
            getattr(options, name) in (False, "fairseq"),
            f"--{name} is for a teacher that decodes, not for --import",
        )
    check(
        shard_of_process(options).num_shards == 1,
        "--import is the work of one process: run it without --num-shards, torchrun or srun",
    )
    if options.import_source == exchange.USE:
        check(not options.source_text, "--import-source use and --source-text: give one of them")
    check(options.imported.count("-") <= 1, "--import: standard input can be read once")


def _refuse_for_mixture(
    options: argparse.Namespace, faults: Faults, wanted: Sequence[sequences.Wanted]
) -> None:
    """Without a teacher there must be something else than what is in DATA."""
    if not faults.check(
        any(one.name != sequences.ORIGINAL for one in wanted),
        "--path: expected the teacher's checkpoint, or several with ':' between; or --import; "
        "or without either --mix with folders to put together",
    ):
        return
    for name in ("source_text", "hypotheses", "write_nbest"):
        faults.check(not getattr(options, name), f"{flag_of(name)} needs a teacher: give --path")
    with faults.collecting():
        faults.check(
            read_choice(options) == sequences.Choice(),
            "flags of choice and filters need a teacher: give --path, or leave them out",
        )


def _mix(options: argparse.Namespace) -> List[sequences.Wanted]:
    """What --mix and --repeat-original say together.

    Raises:
        FileError: something that cannot be.
    """
    wanted = sequences.parse_mix(options.mix) if options.mix else []
    times = options.repeat_original
    if times is None:
        return wanted
    originals = [one for one in wanted if one.name == sequences.ORIGINAL]
    faults = Faults()
    faults.check(originals, "--repeat-original needs --mix original")
    faults.check(times >= 1, "--repeat-original must be 1 or more")
    faults.check(
        all(one.weight == 1 for one in originals),
        "--repeat-original and a weight of original in --mix: give one of them",
    )
    faults.raise_if_any(FileError)
    return [one._replace(weight=times) if one in originals else one for one in wanted]


def _refuse_for_ctranslate2(options: argparse.Namespace, faults: Faults) -> None:
    check = faults.check
    check(options.task == "translation", "--engine ctranslate2 takes --task translation alone")
    check(len(utils.split_paths(options.path or "")) <= 1, "--engine ctranslate2 takes no ensemble")
    for name in ("diverse_beam_groups", "diversity_rate", "match_source_len", "unkpen"):
        check(
            getattr(options, name) in (-1, -1.0, False, 0),
            f"--engine ctranslate2 has no {flag_of(name)}",
        )
    if options.sampling:
        check(options.temperature > 0, "--temperature must be above 0")
    else:
        check(
            options.temperature == 1, "--engine ctranslate2 has --temperature with --sampling alone"
        )


def _refuse_for_folder(options: argparse.Namespace, faults: Faults) -> None:
    for name in ("trust_checkpoint", "model_overrides"):
        given = getattr(options, name)
        faults.check(given in (False, "{}", None), f"{flag_of(name)} is for checkpoints")
    faults.check(
        options.teacher_spm is None or options.teacher_tokenizer is None,
        "--teacher-spm and --teacher-tokenizer: give one of them",
    )
    if options.teacher_spm is not None:
        models = utils.split_paths(options.teacher_spm)
        faults.check(
            1 <= len(models) <= 2,
            f"--teacher-spm {options.teacher_spm}: expected one model, or the source's and the "
            "target's with ':' between",
        )


def _student_langs(options: argparse.Namespace) -> Optional[Tuple[str, str]]:
    if options.student_langs is None:
        return None
    return parse_languages(options.student_langs, "--student-langs")


if __name__ == "__main__":
    sys.exit(main())
