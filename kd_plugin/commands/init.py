"""``fairseq-kd-init``: a student's first weights, taken from its teacher's layers.

Writes a checkpoint for ``fairseq-train --finetune-from-model``, and prints the flags that build the
student. Flags of fairseq-train behind the others are checked against it, and printed, too.
"""

import argparse
import sys
from typing import List, Optional

from .. import initialisation
from .arguments import Help, add_trust, exit_code, import_user_dir

PROG = "fairseq-kd-init"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        PROG,
        usage="%(prog)s TEACHER --output FILE [options] [flags of fairseq-train]",
        description=__doc__,
        formatter_class=Help,
        allow_abbrev=False,  # an abbreviation may be a flag of fairseq-train's
    )
    add = parser.add_argument
    add("teacher", metavar="TEACHER", help="the teacher's checkpoint, a transformer of fairseq")
    add("--output", required=True, metavar="FILE", help="checkpoint to write")
    for side in ("encoder", "decoder"):
        add(
            f"--{side}-layers",
            metavar="LIST",
            help=f"the teacher's {side} layers to take, counted from 0: 0,2,5 (default: all)",
        )
    add(
        "--layers",
        metavar="E:D",
        help="instead, how many encoder and decoder layers: 6:3, spread evenly over the "
        "teacher's with the first and the last among them; D of a language model",
    )
    add(
        "--dictionary",
        metavar="DIR",
        help="folder with the student's dict.SRC.txt and dict.TGT.txt, or dict.txt for both "
        "(default: the teacher's)",
    )
    add(
        "--new-symbols",
        default="refuse",
        choices=("refuse", "random"),
        help="what becomes of symbols that the teacher lacks: random starts them as fairseq would",
    )
    add("--new-symbols-seed", type=int, default=1, metavar="N", help="seed of their random rows")
    add(
        "--teacher-data",
        metavar="DIR",
        help="folder with the teacher's dictionaries (default: beside the checkpoint, or the data "
        "that it names)",
    )
    add("-s", "--source-lang", metavar="SRC", help="language (default: the checkpoint's)")
    add("-t", "--target-lang", metavar="TRG", help="language (default: the checkpoint's)")
    add(
        "--task",
        metavar="NAME",
        help="task that the student is trained for, kd_translation say (default: the teacher's); "
        "translation and kd_translation leave out the tags that a multilingual teacher's task adds "
        "to dictionaries",
    )
    add("--overwrite", action="store_true", help="replace an existing output")
    add(
        "--user-dir",
        metavar="DIR",
        help="folder to import for architectures and tasks that are not fairseq's",
    )
    add_trust(add)
    return parser


def main(arguments: Optional[List[str]] = None) -> int:
    options, training = make_parser().parse_known_args(arguments)

    def work() -> None:
        if options.user_dir:
            import_user_dir(["--user-dir", options.user_dir])
        run(options, training)

    return exit_code(PROG, work, resumable=False)


def run(options: argparse.Namespace, training: List[str]) -> None:
    made = initialisation.make(
        initialisation.Asked(
            teacher=options.teacher,
            output=options.output,
            encoder_layers=options.encoder_layers,
            decoder_layers=options.decoder_layers,
            layers=options.layers,
            dictionary=options.dictionary,
            new_symbols=options.new_symbols,
            seed=options.new_symbols_seed,
            teacher_data=options.teacher_data,
            source_lang=options.source_lang,
            target_lang=options.target_lang,
            task=options.task,
            training=training,
            overwrite=options.overwrite,
            trust=options.trust_checkpoint,
        )
    )
    print("\n".join([*made.lines, "| flags of fairseq-train:", made.command]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
