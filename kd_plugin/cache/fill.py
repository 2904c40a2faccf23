"""Run a teacher over a subset and write what it says."""

import os
import sys
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
import torch
from fairseq import utils
from torch import Tensor
from tqdm import tqdm

from ..objective.answer import RunningAnswer, not_finite_teacher, rows_ahead, rows_at_once
from . import layout
from .layout import CacheError
from .writer import CacheWriter, teacher_rows


def fill(
    task: Any,
    teacher: Any,
    subset: str,
    cache: str,
    k: int,
    temperatures: Sequence[float],
    about_teacher: Dict[str, Any],
    max_tokens: Any = None,
    max_sentences: Any = None,
    num_workers: int = 1,
    num_shards: int = 1,
    shard_id: int = 0,
    combine: bool = False,
) -> Tuple[bool, CacheWriter]:
    """Write one shard of the cache of a loaded subset, from where it stopped.

    Args:
        task: a ``kd_translation`` task with the subset loaded.
        teacher: a placed ``Teacher``.
        about_teacher: what the manifest says of it.
        combine: whether the subset was loaded with train1, train2, ...

    Returns:
        whether the cache is complete now, and its writer.

    Raises:
        CacheError: it cannot be written.
        RuntimeError: the teacher gave NaN, +inf or no probability at all.
    """
    dataset, vocabulary = task.dataset(subset), len(task.target_dictionary)
    if not 1 <= k <= vocabulary:
        raise CacheError(
            f"--top-k must be from 1 to the {vocabulary} symbols of the vocabulary, got {k}"
        )
    limits = [min(pair) for pair in zip(teacher.max_positions(), task.max_positions())]
    lengths = _readable_lengths(dataset, limits)
    header = {
        "subset": subset,
        "k": k,
        "temperatures": list(temperatures),
        "vocabulary": vocabulary,
        **about_teacher,
        **layout.describe_data(task, subset, combine),
    }
    batches = _plan(dataset, lengths, max_tokens, max_sentences)
    writer = CacheWriter(
        cache, header, lengths, batches, num_shards=num_shards, shard_id=shard_id
    )
    writer.begin()
    if writer.done < len(writer.batches):
        _run(task, teacher, dataset, writer, num_workers)
    return writer.finish(lambda i: dataset.tgt[i].numpy()), writer


def _readable_lengths(dataset: Any, limits: Sequence[int]) -> np.ndarray:
    readable = (dataset.src_sizes <= limits[0]) & (dataset.tgt_sizes <= limits[1])
    return np.where(readable, dataset.tgt_sizes, 0)


def _plan(
    dataset: Any, lengths: np.ndarray, max_tokens: Any, max_sentences: Any
) -> List[np.ndarray]:
    """Sentences of like lengths together, as validation has them; the same ones always."""
    order = np.flatnonzero(lengths)
    order = order[np.argsort(dataset.tgt_sizes[order], kind="stable")]
    order = order[np.argsort(dataset.src_sizes[order], kind="stable")]
    longest = max(dataset.src_sizes[order].max(), lengths.max()) if len(order) else 0
    if max_tokens is not None and longest > max_tokens:
        raise CacheError(
            f"the longest sentence has {longest} tokens, more than --max-tokens {max_tokens}: "
            "give at least as many"
        )
    # without a multiple: newer fairseq would leave sentences out
    batches = dataset.batch_by_size(
        order,
        max_tokens=max_tokens,
        max_sentences=max_sentences,
        required_batch_size_multiple=1,
    )
    return [np.asarray(batch, dtype=np.int64) for batch in batches]


def _run(task: Any, teacher: Any, dataset: Any, writer: CacheWriter, num_workers: int) -> None:
    tokens = [int(writer.lengths[batch].sum()) for batch in writer.batches]
    batches: Any = writer.batches[writer.done :]
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=dataset.collater,
        num_workers=num_workers,
        worker_init_fn=writer.shards.release,
    )
    progress = tqdm(
        total=sum(tokens),
        initial=sum(tokens[: writer.done]),
        desc=f"caching {writer.header['subset']}",
        unit="tokens",
        unit_scale=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
    with progress:
        for batch in loader:
            plan = writer.batches[writer.done]
            writer.append(rows_of_batch(task, teacher, batch, plan, writer.header))
            progress.update(int(writer.lengths[plan].sum()))


@torch.no_grad()
def rows_of_batch(
    task: Any, teacher: Any, batch: Dict[str, Any], plan: np.ndarray, header: Dict[str, Any]
) -> Dict[str, np.ndarray]:
    """What the cache holds of a collated batch, its sentences in the order of the plan."""
    ids, pad = batch["id"].numpy(), task.target_dictionary.pad()
    if teacher.device.type == "cuda":
        batch = utils.move_to_cuda(batch)
    signal, target = teacher(batch["net_input"]), batch["target"]
    rows = _in_order(target.ne(pad), ids, plan)
    size = rows_at_once(rows.device, header["vocabulary"])
    parts = []
    for block in rows.split(size * rows_ahead(rows.device)):
        word = signal.rows(block, torch.empty(0, device=block.device))
        for start in range(0, len(block), size):
            here = slice(start, start + size)
            some = word.rows(here)
            if some.bad().any():
                _refuse(signal, block[here][some.bad()], ids, target.size(1))
            references = target.flatten()[block[here]]
            parts.append(teacher_rows(some, references, header["k"], header["temperatures"]))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _refuse(signal: RunningAnswer, bad: Tensor, ids: np.ndarray, width: int) -> None:
    sentences = sorted({int(ids[row // width]) for row in bad.tolist()})
    raise not_finite_teacher(" and ".join(signal.not_finite(bad)), sentences)


def _in_order(real: Tensor, ids: np.ndarray, plan: np.ndarray) -> Tensor:
    """The flat target rows of a batch, its sentences in the order of the plan."""
    where = {sentence: i for i, sentence in enumerate(ids.tolist())}
    order = torch.tensor([where[sentence] for sentence in plan.tolist()], device=real.device)
    flat = torch.arange(real.numel(), device=real.device).view_as(real)
    return flat[order][real[order]]


def summary_lines(manifest: Dict[str, Any], folder: Any) -> List[str]:
    """What a user wants to know of a finished cache."""
    s = manifest["summary"]
    return [
        f"{folder}: {manifest['sentences']} sentences, {manifest['rows']} target tokens, top "
        f"{manifest['k']} of "
        f"{' + '.join((os.path.basename(teacher['path']) for teacher in manifest['teachers']))}",
        f"  {s['bytes'] / 1000000.0:.1f} MB, {s['bytes_per_token']:.2f} bytes per target token",
        "  covered probability mass: mean {covered_mean:.4f}, 1st percentile "
        "{covered_1st_percentile:.4f}".format(**s),
        "  teacher: nll_loss {nll_loss:.3f}, entropy {entropy:.3f} bits per token, agreement with "
        "the reference {agreement:.4f}".format(**s),
    ]
