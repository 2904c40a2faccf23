"""What is distilled: a subset of a data-bin, or a text of source sentences alone."""

import contextlib
import logging
import os
import re
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from fairseq import utils
from fairseq.data import FairseqDataset
from fairseq.tasks.translation import TranslationTask
from omegaconf import DictConfig

from ..checkpoints import reads_as_translation
from ..files import FileError, digest, read_whole, reading_binarised, remove, temporary
from ..shards import line_ends
from ..timing import progress_bar
from . import databin
from .databin import DataBin
from .reading import TextReading

# Of a batch, where neither --max-tokens nor --batch-size is given; as fairseq-generate
DEFAULT_MAX_TOKENS = 12000

logger = logging.getLogger(__name__)


def batch_limits(cfg: Any) -> Tuple[Optional[int], Optional[int]]:
    """Most tokens and most sentences of a batch that fairseq's configuration asks for."""
    max_tokens, max_sentences = cfg.dataset.max_tokens, cfg.dataset.batch_size
    if max_tokens is None and max_sentences is None:
        max_tokens = DEFAULT_MAX_TOKENS
    return max_tokens, max_sentences


class Corpus(NamedTuple):
    """Sentences in the teacher's indices, end of sentence included.

    Attributes:
        dataset: as the teacher's task reads it, to be batched.
        references: None for source sentences alone.
        data: the data-bin that the dictionaries are from.
    """

    dataset: Any
    source: Sequence[torch.Tensor]
    references: Optional[Sequence[torch.Tensor]]
    data: DataBin

    @classmethod
    def of_subset(cls, task: Any, data: DataBin, subset: str) -> "Corpus":
        """A subset as fairseq-generate reads it.

        Raises:
            FileError: there is none.
        """
        source, references = [data.side(subset, lang) for lang in data.langs]
        if source is None:
            found = ", ".join(sorted(data.splits())) or "none"
            raise FileError(
                f"{data.folder}: no subset {subset!r} for {'-'.join(data.langs)}; there are {found}"
            )
        more = sorted(split for split in data.splits() if re.match(r"train\d+$", split))
        if subset == "train" and more:
            logger.warning(
                f"{data.folder}: only train is translated, and fairseq-train would read "
                f"{', '.join(more)} with it: binarise them into one, or run again with "
                f"--gen-subset {more[0]} and another --output"
            )
        if references is not None and len(references) != len(source):
            raise FileError(
                f"{data.folder}: {subset} has {len(source)} sentences in {data.langs[0]} and "
                f"{len(references)} in {data.langs[1]}: binarise both sides again, from files with "
                "as many lines"
            )
        if isinstance(task, TranslationTask) and references is not None:
            task.cfg.dataset_impl = "raw" if data.is_raw(subset) else None  # as it lies there
            task.load_dataset(subset)
            dataset = task.dataset(subset)
            read_whole(dataset)
            if reads_as_translation(type(task)):
                return cls(dataset, dataset.src, dataset.tgt, data)
            return cls(dataset, source, references, data)  # without the symbols that it adds
        # multilingual tasks load a training set to sample from it, or to mix languages
        return cls(_for_inference(task, source), source, references, data)

    @classmethod
    def of_sample(cls, task: Any, data: DataBin, subset: str, most: int) -> Optional["Corpus"]:
        """Some sentences of a subset, drawn the same way each time; None without both sides."""
        sides = [side for side in (data.side(subset, lang) for lang in data.langs) if side]
        if len(sides) < 2 or len(sides[0]) != len(sides[1]):
            return None
        generator = np.random.default_rng(1)
        which = generator.choice(len(sides[0]), min(most, len(sides[0])), replace=False)
        source, references = [[side[int(i)] for i in np.sort(which)] for side in sides]
        dataset = _for_inference(task, source, [len(tokens) for tokens in source])
        return cls(dataset, source, references, data)

    @classmethod
    def of_text(
        cls,
        task: Any,
        data: DataBin,
        text: str,
        *,
        to_subwords: Callable[[str], str],
        prefix: Path,
        lines: Optional[Iterable[str]] = None,
    ) -> "Corpus":
        """Source sentences, one per line.

        Args:
            text: the file, which messages name.
            lines: what to read instead of the file.
            prefix: where their binarised form is kept for the next time.

        Raises:
            FileError: there are none, they are not UTF-8, or what was kept is damaged.
        """
        if not databin.exists(str(prefix)):
            prefix.parent.mkdir(parents=True, exist_ok=True)
            cut = None
            if getattr(task.cfg, "truncate_source", False):
                cut = task.cfg.max_source_positions
            _binarise(text, lines, data, to_subwords, cut=cut, prefix=prefix)
        with reading_binarised(prefix, "Delete both files and run the same command again"):
            source = databin.read(str(prefix))
        return cls(_for_inference(task, source), source, None, data)


class SourceLines:
    """The lines of ``--source-text``, without their ends; only where each ends is held in memory.

    Processes may share it.
    """

    def __init__(self, path: str) -> None:
        self.path, self._ends = path, line_ends(Path(path))
        size = os.path.getsize(path)
        if (self._ends[-1] if len(self._ends) else 0) < size:
            self._ends = np.append(self._ends, size)
        self._content: Any = np.memmap(path, np.uint8, mode="r") if size else b""

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> str:
        line = bytes(self._content[self._ends[i - 1] if i else 0 : self._ends[i]])
        try:
            return line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise FileError(
                f"--source-text {self.path}, line {i + 1}: not UTF-8 ({error.reason})"
            ) from None


class TextDataset(FairseqDataset):
    """Sentences in the tokens of a teacher that reads text.

    Args:
        reading: the teacher's.
        text: the running text of a sentence.
        sentences: how many there are.
    """

    def __init__(self, reading: TextReading, text: Callable[[int], str], sentences: int) -> None:
        self._reading, self._text, self._sentences = reading, text, sentences
        self._sizes: Optional[np.ndarray] = None

    @property
    def sizes(self) -> np.ndarray:
        """How many tokens the teacher reads of each sentence, int32; found when first asked."""
        if self._sizes is None:
            self._sizes = np.zeros(len(self), dtype=np.int32)
            with progress_bar(len(self), "reading", "sentences") as progress:
                for i in range(len(self)):
                    self._sizes[i] = max(self._reading.length(self[i][1]), 1)
                    progress.update(1)
        return self._sizes

    def __len__(self) -> int:
        return self._sentences

    def __getitem__(self, i: int) -> Tuple[int, List[str]]:
        return int(i), self._reading.tokens(self._text(int(i)))

    def collater(self, samples: Sequence[Tuple[int, List[str]]]) -> Dict[str, Any]:
        return {
            "id": torch.tensor([i for i, _ in samples]),
            "tokens": [tokens for _, tokens in samples],
        }

    # for fairseq's batches

    def num_tokens(self, index: int) -> int:
        return int(self.sizes[index])

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        return self.sizes[indices]

    def size(self, index: int) -> int:
        return self.num_tokens(index)

    def ordered_indices(self) -> np.ndarray:
        return np.argsort(self.sizes, kind="mergesort")

    def filter_indices_by_size(
        self, indices: np.ndarray, max_sizes: Any
    ) -> Tuple[np.ndarray, List[int]]:
        fits = self.sizes[indices] <= max_sizes[0]
        return indices[fits], indices[~fits].tolist()


def _for_inference(task: Any, source: Any, sizes: Any = None) -> Any:
    dataset = task.build_dataset_for_inference(source, source.sizes if sizes is None else sizes)
    # multilingual_translation has one of several, and decodes what that one gives
    key = getattr(dataset, "eval_key", None)
    return dataset if key is None else dataset.datasets[key]


def _binarise(
    text: str,
    lines: Optional[Iterable[str]],
    data: DataBin,
    to_subwords: Callable[[str], str],
    *,
    cut: Optional[int],
    prefix: Path,
) -> None:
    new = temporary(prefix)
    writer = databin.Writer(new, len(data.source))
    unknown = 0
    try:
        with contextlib.ExitStack() as stack:
            if lines is None:
                lines = stack.enter_context(open(text, encoding="utf-8", newline="\n"))
            for line in lines:
                tokens = databin.encode(data.source, to_subwords(line.rstrip("\r\n")))
                if cut is not None and len(tokens) > cut:
                    tokens = torch.cat([tokens[: cut - 1], tokens[-1:]])
                writer.add(tokens)
                unknown += int(tokens.eq(data.source.unk()).sum())
        if writer.sentences == 0:
            raise FileError(f"--source-text {text}: expected at least one line, found none")
        databin.warn_of_unknown(unknown, writer.tokens, text)
        writer.close()
        for end in (".bin", ".idx"):  # without the second one there is none
            os.replace(str(new) + end, str(prefix) + end)
    except UnicodeDecodeError as error:
        raise FileError(f"--source-text {text}: not UTF-8 ({error})") from None
    finally:
        for end in (".bin", ".idx"):
            remove(Path(str(new) + end))


def plan(
    task: Any,
    dataset: Any,
    max_positions: Sequence[Any],
    *,
    max_tokens: Optional[int] = None,
    max_sentences: Optional[int] = None,
    required_multiple: int = 1,
    seed: int = 1,
) -> List[np.ndarray]:
    """The batches of fairseq-generate, in its order; sentences that are too long are left out.

    Args:
        max_positions: of each model.
        max_tokens, max_sentences: most of a batch.

    Raises:
        FileError: a sentence is longer than a batch may be, or fairseq leaves out others, too.
    """
    limits = utils.resolve_max_positions(task.max_positions(), *max_positions)
    if isinstance(limits, dict):  # multilingual_translation's, by direction
        (limits,) = limits.values()
    # a column for the source, and one for references if the dataset has them; sound has lengths
    sizes = np.asarray(getattr(dataset, "lengths", dataset.sizes)).reshape(len(dataset), -1)
    sizes = sizes[(sizes <= np.atleast_1d(limits)[: sizes.shape[1]]).all(axis=1)]
    longest = sizes.max(initial=0)
    if max_tokens is not None and longest > max_tokens:
        raise FileError(
            f"the longest sentence has {longest} tokens, more than --max-tokens {max_tokens}: "
            "raise it"
        )
    batches = task.get_batch_iterator(
        dataset=dataset,
        max_tokens=max_tokens,
        max_sentences=max_sentences,
        max_positions=limits,
        ignore_invalid_inputs=True,
        required_batch_size_multiple=required_multiple,
        seed=seed,
        num_shards=1,
        shard_id=0,
    ).frozen_batches
    found = [np.asarray(batch, dtype=np.int64) for batch in batches]
    planned = sum(map(len, found))
    if planned < len(sizes):
        raise FileError(
            f"this fairseq leaves {len(sizes) - planned} sentences out with "
            f"--required-batch-size-multiple {required_multiple}: take 1"
        )
    return found


def describe(
    data: DataBin, subset: str, source_text: Optional[str], task_cfg: Any
) -> Dict[str, Any]:
    """What hypotheses depend on in the data: contents, not paths."""
    names = {path.name: path for path in data.dictionary_files()}
    if source_text is None:
        names.update({path.name: path for path in data.splits().get(subset, [])})
    files = {name: digest(str(path)) for name, path in names.items()}
    if source_text is not None:
        files["source text"] = digest(source_text)
    options = dict(task_cfg) if isinstance(task_cfg, DictConfig) else vars(task_cfg)
    cut = options.get("truncate_source", False)
    return {
        "subset": subset if source_text is None else None,
        "files": files,
        # of a multilingual task, what tells the teacher which language to write
        "languages": {k: repr(v) for k, v in options.items() if "lang" in str(k)},
        "truncate_source": options.get("max_source_positions") if cut else None,
    }
