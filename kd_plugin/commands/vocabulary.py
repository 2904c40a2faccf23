"""``fairseq-kd-vocabulary``: a student's own vocabulary, cut out of its teacher's.

Keeps the pieces of a SentencePiece model and the symbols of a dictionary that the student's text
needs, so that a small model of two languages need not carry the 256,000 symbols of its teacher.
"""

import argparse
import sys
from pathlib import Path
from typing import List, Optional

from .. import vocabulary
from .arguments import Help, exit_code

PROG = "fairseq-kd-vocabulary"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(PROG, description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--spm", required=True, metavar="MODEL", help="the teacher's SentencePiece model")
    add("--dict", required=True, metavar="FILE", help="the teacher's dictionary, of fairseq")
    add(
        "--text",
        required=True,
        nargs="+",
        metavar="FILE",
        help="the student's training text, of both languages: one sentence per line, raw",
    )
    add("--output", required=True, metavar="DIR", help="folder to write")
    limit = parser.add_mutually_exclusive_group().add_argument
    limit(
        "--size",
        type=int,
        metavar="N",
        help="keep at most N symbols, the most frequent ones; fairseq's own four are counted "
        "(default: all that the text needs)",
    )
    limit(
        "--min-count",
        type=int,
        default=1,
        metavar="N",
        help="keep the pieces that the text has N times or more",
    )
    add(
        "--all-characters",
        action="store_true",
        help="keep every character that the model knows, not only those of the text",
    )
    add(
        "--valid",
        nargs="+",
        metavar="FILE",
        help="other text, to measure on what is lost",
    )
    add("--overwrite", action="store_true", help="replace what this command made in --output")
    return parser


def main(arguments: Optional[List[str]] = None) -> int:
    options = make_parser().parse_args(arguments)
    return exit_code(PROG, lambda: run(options), resumable=False)


def run(options: argparse.Namespace) -> None:
    record = vocabulary.make(
        vocabulary.Asked(
            spm=options.spm,
            dictionary=options.dict,
            text=options.text,
            output=options.output,
            size=options.size,
            min_count=options.min_count,
            all_characters=options.all_characters,
            valid=options.valid or (),
            overwrite=options.overwrite,
        )
    )
    print("\n".join(vocabulary.summary_lines(record, Path(options.output))), flush=True)


if __name__ == "__main__":
    sys.exit(main())
