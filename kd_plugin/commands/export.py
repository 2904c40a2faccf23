"""``fairseq-kd-export``: a model that works without the plugin, verified to be the same.

Writes a checkpoint for stock fairseq, or a folder for CTranslate2 or Hugging Face's transformers;
averages checkpoints first if wanted. What it has written is compared with the checkpoint before it
gets its name.
"""

import argparse
import sys
from typing import List, Optional

from fairseq import utils

from ..export import FORMATS, Asked, flag_name, make
from .arguments import Help, add_bleu_tokenize, add_trust, exit_code, import_user_dir

PROG = "fairseq-kd-export"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(PROG, description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add(
        "--path",
        required=True,
        metavar="S.pt[:MORE]",
        help="the checkpoint; several with --average",
    )
    add("--average", action="store_true", help="average the checkpoints' weights first")
    add(
        "--output",
        required=True,
        metavar="OUT",
        help="file to write, or folder where the format is one",
    )
    add(
        "--format",
        default="fairseq",
        choices=tuple(FORMATS),
        help="software that will open the model",
    )
    flags = {flag: what for format in FORMATS.values() for flag, what in format.flags.items()}
    for flag, what in flags.items():
        add(flag, **{**what, "default": None})  # None: not given, as formats expect
    add("-s", "--source-lang", metavar="SRC", help="language (default: the checkpoint's)")
    add("-t", "--target-lang", metavar="TRG", help="language (default: the checkpoint's)")
    add(
        "--overwrite",
        action="store_true",
        help="replace an existing output once the new one is verified",
    )
    add(
        "--task",
        dest="trained_for",
        choices=("translation", "language_modeling"),
        help="what the model was trained for, where a fork of fairseq has another name for it",
    )
    add(
        "--user-dir",
        metavar="DIR",
        help="folder to import for architectures and tasks that are not fairseq's",
    )
    add_trust(add)
    add = parser.add_argument_group("verification").add_argument
    add(
        "--data",
        metavar="DIR",
        help="data-bin to verify on, with the model's dictionaries (default: the one that the "
        "checkpoint names)",
    )
    add("--gen-subset", default="valid", metavar="SPLIT", help="subset to verify on")
    add(
        "--verify-sentences",
        type=int,
        metavar="N",
        help="only the first N; 0 for all (default: 200, or all for CTranslate2's BLEU)",
    )
    add(
        "--beam",
        type=int,
        metavar="N",
        help="beam of the translations that are compared (default: 5)",
    )
    add(
        "--remove-bpe",
        "--post-process",
        nargs="?",
        const="@@ ",
        dest="post_process",
        metavar="SYMBOL",
        help="subword marks to remove before BLEU is scored, as in fairseq-generate; of "
        "--format ctranslate2",
    )
    add_bleu_tokenize(add)
    add("--no-verify", action="store_true", help="skip the comparison")
    return parser


def main(arguments: Optional[List[str]] = None) -> int:
    options = make_parser().parse_args(arguments)

    def work() -> None:
        if options.user_dir:
            import_user_dir(["--user-dir", options.user_dir])
        run(options)

    return exit_code(PROG, work, resumable=False)


def run(options: argparse.Namespace) -> None:
    names = [flag_name(flag) for format in FORMATS.values() for flag in format.flags]
    asked = Asked(
        paths=utils.split_paths(options.path),
        output=options.output,
        format=options.format,
        options={
            name: getattr(options, name) for name in names if getattr(options, name) is not None
        },
        average=options.average,
        source_lang=options.source_lang,
        target_lang=options.target_lang,
        task=options.trained_for,
        user_dir=options.user_dir,
        overwrite=options.overwrite,
        trust=options.trust_checkpoint,
        verify=not options.no_verify,
        data=options.data,
        subset=options.gen_subset,
        sentences=options.verify_sentences,
        beam=options.beam,
        post_process=options.post_process,
        tokenize=options.bleu_tokenize,
    )
    print("\n".join(make(asked)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
