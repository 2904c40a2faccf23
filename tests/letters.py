"""A data-bin of letters with n-best lists of it."""

from pathlib import Path
from typing import Any, List, NamedTuple

import torch
from fairseq.data import Dictionary, indexed_dataset
from fairseq.tasks.translation import TranslationConfig, TranslationTask

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
    folder: Path, source: str = "aa", target: str = "bb", back: bool = False, impl: str = "mmap"
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
                prefix.write_text("\n".join(LINES) + "\n")
                continue
            builder = indexed_dataset.make_builder(f"{prefix}.bin", impl, len(dictionary))
            for line in LINES:
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
