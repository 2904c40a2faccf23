"""``fairseq-kd-report``: judge students beside their teacher.

Decodes a test set with each model, and writes tables, pictures and a page: of quality (BLEU,
ROUGE and others, with significance), of cost (size, speed, memory), and of where students still
differ from the teacher. Speech models write down what is said, which is judged by word errors
unless --metrics says otherwise. Language models score a text instead, in blocks that are cut as by
fairseq-eval-lm. --task speech_to_text --help and --task language_modeling --help show their flags.
"""

import argparse
import os
import sys
from typing import Any, Iterable, List, Optional

from fairseq import options as fairseq_options
from fairseq.dataclass.configs import GenerationConfig

from .. import report
from ..checkpoints import LANGUAGE_MODEL, SPEECH, TRANSLATION
from ..decoding import Tokenizer
from ..errors import Faults, UserError
from .arguments import (
    Help,
    add_bleu_tokenize,
    add_trust,
    at_least,
    flag_of,
    refuse_unsupported,
    run_like_fairseq,
)

PROG = "fairseq-kd-report"


def make_parser(task: str = TRANSLATION.task) -> argparse.ArgumentParser:
    """The parser, with the flags of fairseq's task of this name unless --task names another."""
    parser = fairseq_options.get_generation_parser(default_task=task)
    parser.prog, parser.description, parser.formatter_class = PROG, __doc__, Help
    parser.usage = "%(prog)s DATA --models NAME=CHECKPOINT [...] --output DIR [options]"
    # without a multiple: newer fairseq would leave sentences out
    parser.set_defaults(required_batch_size_multiple=1)
    add = parser.add_argument_group("report").add_argument
    add(
        "--models",
        nargs="+",
        required=True,
        metavar="NAME=CHECKPOINT",
        help="what to judge: checkpoints, ensembles (a.pt:b.pt), or folders of fairseq-kd-export "
        "--format ctranslate2",
    )
    add("--output", required=True, metavar="DIR", help="folder to write")
    add(
        "--teacher",
        metavar="NAME",
        help="the model that the others are students of (default: the one named teacher, else the "
        "first)",
    )
    add(
        "--baseline",
        metavar="NAME",
        help="the model that significance is tested against (default: the one named baseline or "
        "plain, else the first)",
    )
    add("--greedy", action="store_true", help="also decode with beam 1, shown in rows of its own")
    add(
        "--model-data",
        nargs="+",
        default=[],
        metavar="NAME=DIR",
        help="data-bin of the same sentences for a model whose dictionaries are not DATA's",
    )
    add(
        "--model-langs",
        nargs="+",
        default=[],
        metavar="NAME=SRC,TGT",
        help="what a model's --model-data calls the languages (default: as DATA does)",
    )
    add(
        "--reference",
        metavar="FILE",
        help="raw references, one per line (default: DATA's own, without subwords)",
    )
    add(
        "--metrics",
        nargs="+",
        choices=list(report.METRICS),
        help="what quality is measured by, the most important first; rouge for summaries (ROUGE-1, "
        f"ROUGE-2, ROUGE-L), wer for transcripts (default: {' '.join(report.USUAL)}; of speech "
        "models wer)",
    )
    add_bleu_tokenize(add)
    add(
        "--scores",
        nargs="+",
        action="extend",
        default=[],
        metavar="[NAME=]METRIC:FILE",
        help="scores of each sentence that were computed elsewhere, by COMET, MetricX or people, "
        "as columns beside the others: a number a line with NAME= the model (NAME.greedy its "
        "greedy search); or, for all models, a TSV of model, sentence (from 1, may be left out) "
        "and score, or what comet-score prints",
    )
    add(
        "--write-for-scoring",
        metavar="DIR",
        help="write source, references and all translations to this folder, a sentence a line, for "
        "comet-score and others to score",
    )
    add(
        "--significance",
        default="bs",
        choices=sorted(report.TESTS),
        help="paired bootstrap (bs) or approximate randomisation (ar)",
    )
    add(
        "--significance-samples",
        type=int,
        metavar="N",
        help="samples of that test (default: sacreBLEU's, 1000 for bs and 10000 for ar)",
    )
    add("--repeats", type=int, default=3, metavar="N", help="passes over the data that are timed")
    add(
        "--logs",
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help="fairseq-train's output or --log-file, for training curves",
    )
    add(
        "--examples",
        type=int,
        default=10,
        metavar="N",
        help="how many sentences to show from each end of every order that the page offers; fewer "
        f"where that would be more than {report.MOST_EXAMPLES} in all",
    )
    add(
        "--train-sample",
        type=int,
        default=500,
        metavar="N",
        help="sentences of DATA's training set that are translated, too, for their length over the "
        "references'; 0 for none",
    )
    add("--overwrite", action="store_true", help="replace a report of other settings in --output")
    add_trust(add)
    return parser


def main(arguments: Optional[List[str]] = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments

    def make() -> argparse.ArgumentParser:
        return make_parser(_task_of_models(given))

    return run_like_fairseq(PROG, make, run, given)


def _task_of_models(arguments: List[str]) -> str:
    """fairseq's task for the kind of the models, which knows its flags.

    Raises:
        UserError: the models are of several kinds.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--models", nargs="*", default=[])
    add_trust(parser.add_argument)
    found = parser.parse_known_args(arguments)[0]
    pairs = [pair.partition("=") for pair in found.models]
    models = [report.Model(name, path, "") for name, _, path in pairs]
    return report.kind_of_models(models, found.trust_checkpoint).task


def run(options: argparse.Namespace) -> None:
    _refuse(options)
    models = report.read_models(
        options.models, options.data, options.model_data, options.model_langs
    )
    samples = options.significance_samples or {"bs": 1000, "ar": 10000}[options.significance]
    made = report.make(
        report.Asked(
            models=models,
            teacher=report.pick(models, options.teacher, "--teacher", ("teacher",)),
            baseline=report.pick(models, options.baseline, "--baseline", ("baseline", "plain")),
            options=options,
            output=options.output,
            beam=options.beam,
            greedy=options.greedy,
            repeats=options.repeats,
            reference=options.reference,
            metrics=_metrics(options),
            tokenize=options.bleu_tokenize,
            scores=report.read_scores(options.scores),
            test=options.significance,
            samples=samples,
            logs=report.named(options.logs, "--logs", "FILE"),
            examples=options.examples,
            train_sample=options.train_sample,
            for_scoring=options.write_for_scoring,
            trust=options.trust_checkpoint,
            overwrite=options.overwrite,
        )
    )
    print(report.summary(made), flush=True)
    print(f"The report is {os.path.join(options.output, 'report.html')}", flush=True)
    if options.write_for_scoring:
        files = [system["file"] for system in made["systems"] if system["scores"]]
        how = report.scoring_command(options.write_for_scoring, files)
        print(f"To have the translations scored by COMET: {how}", flush=True)
    failed = [model["name"] for model in made["models"] if model["error"]]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(models)} models failed ({', '.join(failed)}); the report says "
            "why"
        )


def _metrics(options: argparse.Namespace) -> List[str]:
    usual = ["wer"] if options.task == SPEECH.task else report.USUAL
    return list(dict.fromkeys(options.metrics or usual))


# Flags that models of other tasks than translation have no use for, and who has none
_USELESS = {
    LANGUAGE_MODEL.task: (
        (
            *("greedy", "model_data", "model_langs", "reference", "metrics", "bleu_tokenize"),
            *("scores", "write_for_scoring", "baseline", "significance", "significance_samples"),
            *("train_sample", "post_process"),
            *(name for name in GenerationConfig.__dataclass_fields__ if name != "_name"),
        ),
        "language models, which score a text",
    ),
    SPEECH.task: (("model_langs", "train_sample"), "models that hear"),
}


def _given(options: Any, names: Iterable[str]) -> List[str]:
    """Which of these flags have another value than they have by themselves."""
    usual = make_parser(options.task)
    return [
        flag_of(name) for name in names if getattr(options, name, None) != usual.get_default(name)
    ]


def _refuse(options: Any) -> None:
    faults = Faults()
    refuse_unsupported(options, faults, ["prefix_size"] if options.task == SPEECH.task else [])
    faults.check(not options.path, f"instead of --path give --models NAME={options.path}")
    faults.check(options.nbest <= 1, "--nbest: only the best translation is judged")
    at_least(options, faults, 1, "repeats", "significance_samples")
    at_least(options, faults, 0, "examples", "train_sample")
    faults.check(
        options.task in (TRANSLATION.task, LANGUAGE_MODEL.task, SPEECH.task),
        "--task: leave it out, and each model is decoded with the task that its checkpoint names; "
        "only --task translation, language_modeling or speech_to_text can be given, for models "
        "that have another name for it",
    )
    if options.task in _USELESS:
        names, whose = _USELESS[options.task]
        useless = ", ".join(_given(options, names))
        faults.check(not useless, f"{useless}: of no use to {whose}")
        folders = [pair for pair in options.models if os.path.isdir(pair.partition("=")[2])]
        faults.check(
            not folders,
            f"--models {' '.join(folders)}: CTranslate2 folders are for models that translate text",
        )
    faults.check(options.model_overrides in (None, "{}"), "--model-overrides cannot be used here")
    with faults.collecting():
        report.check(_metrics(options))
    with faults.collecting():
        report.read_scores(options.scores)
    if options.bleu_tokenize:
        with faults.collecting():
            Tokenizer.of("", options.bleu_tokenize)
    faults.check(
        options.reference is None or os.path.isfile(options.reference),
        f"--reference {options.reference}: no such file",
    )
    faults.raise_if_any()


if __name__ == "__main__":
    sys.exit(main())
