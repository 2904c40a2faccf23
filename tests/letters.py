"""A data-bin of letters with n-best lists of it, and models of any task that translate it."""

from argparse import Namespace
from pathlib import Path
from typing import Any, List, NamedTuple, Sequence

import torch
from fairseq import models, options, tasks
from fairseq.data import Dictionary, indexed_dataset
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from trainer import arguments

from kd_plugin.decoding import Hypothesis, databin

LINES = ("a b c", "b c d", "c d e", "d e f", "e f g")

# sentence 3 was not decoded
LISTS = [
    (0, [Hypothesis("a b d", -0.1, True), Hypothesis("a b c", -0.2, True)]),
    (1, [Hypothesis("b c d", -0.3, True), Hypothesis("a a a", -0.4, True)]),
    (2, [Hypothesis("f g a", -0.5, True), Hypothesis("", -0.6, True)]),
    (4, [Hypothesis("g g g", -0.9, True), Hypothesis("e f", -0.9, True)]),
]


class LetterCorpus(NamedTuple):
    """What choosing and writing need of a corpus."""

    source: List[torch.Tensor]
    references: List[torch.Tensor]
    data: Any
    dataset: None = None


def letters() -> Dictionary:
    dictionary = Dictionary()
    for symbol in "abcdefgh":
        dictionary.add_symbol(symbol)
    return dictionary


def write_letters(
    folder: Path,
    source: str = "aa",
    target: str = "bb",
    back: bool = False,
    impl: str = "mmap",
    lines: Sequence[str] = LINES,
) -> databin.DataBin:
    """Both sides alike, as train and valid.

    Args:
        back: name the files as data of the other direction.
        impl: as fairseq-preprocess has it with this ``--dataset-impl``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dictionary = letters()
    pair = f"{target}-{source}" if back else f"{source}-{target}"
    for lang in (source, target):
        dictionary.save(str(folder / f"dict.{lang}.txt"))
        for split in ("train", "valid"):
            prefix = folder / f"{split}.{pair}.{lang}"
            if impl == "raw":
                prefix.write_text("\n".join(lines) + "\n")
                continue
            builder = indexed_dataset.make_builder(f"{prefix}.bin", impl, len(dictionary))
            for line in lines:
                builder.add_item(databin.encode(dictionary, line))
            builder.finalize(f"{prefix}.idx")
    return databin.DataBin(str(folder), source, target)


def task_of(data: databin.DataBin) -> TranslationTask:
    cfg = TranslationConfig(
        data=str(data.folder),
        source_lang="aa",
        target_lang="bb",
        left_pad_source=True,
        left_pad_target=False,
        train_subset="train",
        dataset_impl=None,
        required_seq_len_multiple=1,
    )
    return TranslationTask(cfg, data.source, data.target)


def configuration(data: Any, *flags: str) -> Any:
    """fairseq-generate's, with these flags, of a data-bin of letters."""
    parser = options.get_generation_parser(default_task="translation")
    given = [str(data.folder), "--cpu", "-s", "aa", "-t", "bb", "--max-len-b", "8", *flags]
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, given))


def write_model(path: Path, data: Any, arch: str, flags: Sequence[str]) -> Any:
    """A model as it was initialised, which fairseq-train with these flags could have saved."""
    cfg = configuration(data, *flags)
    task = tasks.setup_task(cfg.task)
    args = arguments(arch)
    task_options = cfg.task if isinstance(cfg.task, Namespace) else Namespace(**cfg.task)
    for name, value in vars(task_options).items():
        if name != "_name":
            vars(args).setdefault(name, value)
    args.task, args.left_pad_source = cfg.task._name, "print('evaluated')"
    torch.manual_seed(1)
    model = models.build_model(args, task).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    for name in ("embed_length", "embed_mask_ins"):  # five or six symbols
        if hasattr(model.decoder, name):
            lengths = getattr(model.decoder, name).weight.data
            likely = lengths[5].clone()
            lengths.zero_()
            lengths[5], lengths[6] = likely, -likely
            model.decoder.output_projection.weight.data[:4] = 0  # letters, mostly
    del args.source_lang, args.target_lang, args.data
    torch.save({"args": args, "model": model.state_dict()}, str(path))
    return model


def changed(path: Path, **values: Any) -> None:
    """Other values of a checkpoint's options."""
    state = torch.load(str(path), **({"weights_only": False} if torch.__version__ >= "2" else {}))
    vars(state["args"]).update(values)
    torch.save(state, str(path))
