"""Flags of what is chosen of a teacher's translations, and what is dropped."""

import argparse
import os
from typing import Optional, Tuple

from .. import sequences
from ..decoding import Tokenizer
from ..decoding.databin import parse_languages
from ..errors import Faults
from .arguments import add_bleu_tokenize, flag_of

_OWN = "own"  # of --languages: as the data call them


def add_choice(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("choice: which translations are taken").add_argument
    add(
        "--select",
        default="best",
        choices=tuple(sequences.SELECTORS),
        help="the order of the n best: "
        + "; ".join(f"{one.name}, {one.description}" for one in sequences.SELECTORS.values()),
    )
    add(
        "--keep",
        type=int,
        default=1,
        metavar="N",
        help="take up to N translations of each sentence, equal ones once",
    )
    add(
        "--metric",
        default="bleu",
        choices=sequences.METRICS,
        help="what translations are compared by: sacreBLEU's sentence-level score, on text without "
        "subwords",
    )
    add_bleu_tokenize(add)
    add(
        "--scores",
        metavar="FILE",
        help="a number for each translation, one per line, in the order of --write-nbest FILE.tsv; "
        "the highest is best",
    )
    add(
        "--backward-path",
        metavar="MODEL",
        help="a model from the target to the source language, of the same subwords, a checkpoint "
        "or a folder of CTranslate2's: it scores each source, given a translation, by its "
        "log-probability per token",
    )
    add(
        "--backward-weight",
        type=float,
        default=0.0,
        metavar="W",
        help="with --select best, go by the teacher's score per token plus W times that one",
    )
    add = parser.add_argument_group("filters: which sentences are dropped").add_argument
    defaults = sequences.Filters()
    add("--no-filters", action="store_true", help="switch off all filters but those given as flags")
    add(
        "--max-length",
        type=int,
        metavar="N",
        help=f"drop if either side has more than N subwords (default: {defaults.max_length})",
    )
    add(
        "--max-length-ratio",
        type=float,
        metavar="R",
        help=(
            "drop if one side is more than R times as long as the other, in subwords and the end "
            "of sentence "
            f"(default: {defaults.max_length_ratio})"
        ),
    )
    add(
        "--max-repeats",
        type=int,
        metavar="N",
        help=(
            "drop if the hypothesis repeats its most frequent 4-gram more than N times more often "
            f"than the source repeats its own (default: {defaults.max_repeats})"
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
        "--languages",
        nargs="?",
        const=_OWN,
        metavar="SRC,TGT",
        help="drop if source or translation is in another language, as py3langid tells it from 20 "
        "characters on (default: the data's names of the languages)",
    )
    add(
        "--deduplicate",
        choices=("pairs", "source", "target"),
        help="drop all but the first of equal pairs, sources, or translations",
    )
    add(
        "--min-closeness",
        type=float,
        metavar="X",
        help="drop if the --metric against the reference is below X, 0 to 100",
    )
    add(
        "--min-score-quantile",
        type=float,
        default=0.0,
        metavar="Q",
        help="drop this share of the sentences: those with the teacher's lowest score per token",
    )
    add(
        "--min-backward-quantile",
        type=float,
        default=0.0,
        metavar="Q",
        help="drop this share of the sentences: those with --backward-path's lowest score",
    )


def read_choice(options: argparse.Namespace) -> sequences.Choice:
    """The choice that flags ask for.

    Raises:
        UserError: --languages names no two.
    """
    base = sequences.Filters.off() if options.no_filters else sequences.Filters()
    named = {
        name: getattr(options, name)
        for name in ("max_length", "max_length_ratio", "max_repeats")
        if getattr(options, name) is not None
    }
    languages: Optional[Tuple[str, str]] = None
    if options.languages == _OWN:
        languages = sequences.OWN_LANGUAGES
    elif options.languages is not None:
        languages = parse_languages(options.languages, "--languages")
    return sequences.Choice(
        options.select,
        options.metric,
        base._replace(
            copies=base.copies and not options.keep_copies,
            unfinished=base.unfinished and not options.keep_unfinished,
            **named,
        ),
        min_closeness=options.min_closeness,
        min_score_quantile=options.min_score_quantile,
        tokenize=options.bleu_tokenize,
        keep=options.keep,
        scores=options.scores,
        backward_path=options.backward_path,
        backward_weight=options.backward_weight,
        min_backward_quantile=options.min_backward_quantile,
        languages=languages,
        deduplicate=options.deduplicate,
    )


def refuse_choice(options: argparse.Namespace, faults: Faults, hypotheses: Optional[int]) -> None:
    """Flags that mean nothing here, or need others.

    Args:
        hypotheses: how many of a sentence there will be; None is not known.
    """
    check, selector = faults.check, sequences.SELECTORS[options.select]
    most = max(2 if selector.needs_several else 1, options.keep)
    wants = f"--select {options.select}" if options.keep < 2 else f"--keep {options.keep}"
    check(options.keep >= 1, "--keep must be 1 or more")
    check(
        hypotheses is None or hypotheses >= most,
        f"{wants} needs --nbest {most} or more, and --beam at least as large",
    )
    if options.source_text:
        check(
            not selector.needs_references and options.min_closeness is None,
            f"--source-text has no references for --select {options.select} or --min-closeness",
        )
    for name in ("min_score_quantile", "min_backward_quantile"):
        check(
            0 <= getattr(options, name) < 1,
            f"{flag_of(name)} must be from 0 to below 1",
        )
    check(
        options.min_closeness is None or 0 <= options.min_closeness <= 100,
        "--min-closeness must be from 0 to 100",
    )
    check(
        (options.select == "scores") is (options.scores is not None),
        "--select scores and --scores FILE go together",
    )
    if options.scores is not None:
        check(os.path.isfile(options.scores), f"--scores {options.scores}: no such file")
    needs = [
        flag
        for flag, given in (
            ("--select backward", options.select == "backward"),
            ("--backward-weight", options.backward_weight != 0),
            ("--min-backward-quantile", options.min_backward_quantile != 0),
        )
        if given
    ]
    if options.backward_path is None:
        check(not needs, f"{' and '.join(needs)}: needs --backward-path MODEL")
    else:
        check(
            needs,
            "--backward-path: say what for, with --select backward, --backward-weight or "
            "--min-backward-quantile",
        )
    check(
        not options.backward_weight or options.select == "best",
        f"--backward-weight goes with --select best, not {options.select}",
    )
    with faults.collecting():
        read_choice(options)
    if options.bleu_tokenize:
        with faults.collecting():
            check(
                read_choice(options).uses_bleu,
                "--bleu-tokenize needs --metric bleu, and --select closest, --select mbr or "
                "--min-closeness",
            )
        with faults.collecting():
            Tokenizer.of("", options.bleu_tokenize)
