"""Run a teacher over a subset and write its answers."""

import contextlib
import functools
import json
import logging
import os
import zlib
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import torch
from fairseq import utils
from torch import Tensor

from ..objective.answer import NotFiniteTeacherError, rows_ahead, rows_at_once
from ..timing import progress_bar
from .dataset import target_tokens
from .layout import CacheError
from .writer import CacheWriter, teacher_rows, uniform_of_sentence

logger = logging.getLogger(__name__)


def open_writer(
    task: Any,
    limits: Sequence[int],
    cache: str,
    header: Dict[str, Any],
    *,
    max_tokens: Optional[int] = None,
    max_sentences: Optional[int] = None,
    num_shards: int = 1,
    shard_id: int = 0,
) -> CacheWriter:
    """Plan the batches of a loaded subset, and return what writes one shard of its cache.

    Args:
        task: one with a teacher, and with the subset loaded.
        limits: longest source and target, in tokens, that the teacher can read.
        cache: the cache's folder.
        header: what the manifest will say: of the subset, the teacher and the data; ``k`` and
            ``temperatures``.
        max_tokens, max_sentences: most of a batch, as fairseq's flags.

    Raises:
        CacheError: K is more than there are symbols, a sentence longer than a batch may be, or
            there are no references.
    """
    vocabulary, k = len(task.target_dictionary), header["k"]
    if not 1 <= k <= vocabulary:
        raise CacheError(
            f"--top-k must be from 1 to the {vocabulary} symbols of the vocabulary, got {k}"
        )
    dataset = task.samples(header["subset"])
    tokens = task.lengths(dataset)
    if tokens is None:
        raise CacheError(
            f"a teacher cache needs references, and {header['subset']} of {task.cfg.data} has none"
        )
    readable = (task.lengths_read(dataset) <= np.array(limits)).all(axis=1)
    student, lengths = task.student(), np.zeros(len(tokens), dtype=np.int64)
    words = functools.partial(
        target_tokens, dataset, pad=student.target.pad(), tags=student.tags.longer[1]
    )
    for sentence in np.flatnonzero(readable):
        lengths[sentence] = len(words(sentence))
    too_long = np.count_nonzero(~readable)
    if too_long:
        samples, most = task.kind.samples[0], task.kind.lengths(*limits)
        left_out = (
            f"{too_long} of {len(readable)} {samples} of {header['subset']} are longer than the "
            f"teacher can read ({most})"
        )
        advice = task.kind.shorten.format(*limits)
        if not readable.any():
            raise CacheError(f"{left_out}. {advice}")
        logger.warning(f"{left_out}: they are not cached, and training must do without. {advice}")
    return CacheWriter(
        cache,
        {**header, "vocabulary": vocabulary},
        lengths,
        _plan(
            dataset,
            tokens,
            np.flatnonzero(lengths),
            max_tokens=max_tokens,
            max_sentences=max_sentences,
        ),
        targets=words,
        num_shards=num_shards,
        shard_id=shard_id,
    )


def fill(task: Any, teacher: Any, writer: CacheWriter, num_workers: int = 1) -> bool:
    """Write a shard of the cache, from where it stopped.

    Args:
        teacher: a placed ``Teacher``.
        num_workers: processes that read batches ahead.

    Returns:
        whether the cache is complete now.

    Raises:
        CacheError: it cannot be written; Busy: another process writes this shard.
        UserError: the teacher gave NaN, +inf or no probability at all.
    """
    dataset = task.samples(writer.header["subset"])
    with contextlib.closing(writer):
        writer.begin()
        if writer.done < len(writer.batches):
            _run(task, teacher, dataset, writer, num_workers=num_workers)
        return writer.finish()


def _plan(
    dataset: Any,
    lengths: np.ndarray,
    sentences: np.ndarray,
    *,
    max_tokens: Optional[int],
    max_sentences: Optional[int],
) -> List[np.ndarray]:
    """Sentences of like lengths together, as validation has them; the same ones always.

    Args:
        lengths: source and target tokens of each sentence of the dataset, (n, 2).
        sentences: those to be cached, in order.
    """
    order = sentences[np.argsort(lengths[sentences, 1], kind="stable")]
    order = order[np.argsort(lengths[order, 0], kind="stable")]
    longest = lengths[order].max(initial=0)
    if max_tokens is not None and longest > max_tokens:
        raise CacheError(
            f"the longest sentence has {longest} tokens, more than --max-tokens {max_tokens}: "
            "raise it"
        )
    # without a multiple: newer fairseq would leave sentences out
    batches = dataset.batch_by_size(
        order,
        max_tokens=max_tokens,
        max_sentences=max_sentences,
        required_batch_size_multiple=1,
    )
    return [np.asarray(batch, dtype=np.int64) for batch in batches]


def _run(task: Any, teacher: Any, dataset: Any, writer: CacheWriter, *, num_workers: int) -> None:
    tokens = [int(writer.lengths[batch].sum()) for batch in writer.batches]
    batches: Any = writer.batches[writer.done :]
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=dataset.collater,
        num_workers=num_workers,
        worker_init_fn=writer.shards.release,
    )
    description, done = f"caching {writer.header['subset']}", sum(tokens[: writer.done])
    with progress_bar(sum(tokens), description, "tokens", done, unit_scale=True) as progress:
        for batch in loader:
            plan = writer.batches[writer.done]
            writer.append(rows_of_batch(task, teacher, batch, plan, header=writer.header))
            progress.update(int(writer.lengths[plan].sum()))


@torch.no_grad()
def rows_of_batch(
    task: Any, teacher: Any, batch: Dict[str, Any], plan: np.ndarray, *, header: Dict[str, Any]
) -> Dict[str, np.ndarray]:
    """What the cache holds of a collated batch, its sentences in the order of the plan.

    Args:
        header: of the cache; with ``vocabulary``, ``k``, ``temperatures`` and, to draw from the
            tail, ``tail_samples`` and ``files``.
    """
    ids = batch["id"].numpy()
    if teacher.device.type == "cuda":
        batch = utils.move_to_cuda(batch)
    answer, target = teacher(batch), batch["target"]
    real = task.student().words(target)
    flat = _in_order(real, ids, plan)
    uniform = _uniform(real, ids, plan, header)
    size = rows_at_once(flat.device, header["vocabulary"])
    parts, done = [], 0
    for block in flat.split(size * rows_ahead(flat.device)):
        block_answer = answer.rows(block, torch.empty(0, device=block.device))
        for start in range(0, len(block), size):
            here = slice(start, start + size)
            part = block_answer.rows(here)
            if part.bad().any():
                bad = block[here][part.bad()]
                error = NotFiniteTeacherError(answer.not_finite(bad), bad)
                raise error.naming(ids, target.size(1))
            references = target.flatten()[block[here]]
            chances = None if uniform is None else uniform[done : done + len(references)]
            done += len(references)
            parts.append(
                teacher_rows(part, references, header["k"], header["temperatures"], chances)
            )
    return {name: np.concatenate([rows[name] for rows in parts]) for name in parts[0]}


def _uniform(
    real: Tensor, ids: np.ndarray, plan: np.ndarray, header: Dict[str, Any]
) -> Optional[np.ndarray]:
    """Random numbers to draw each row's tail with, (tokens, S), in the order of the plan.

    They depend on the data, the sentence and the position in it alone: a cache is the same however
    its sentences are batched and its shards are cut.
    """
    samples = header.get("tail_samples", 0)
    if not samples:
        return None
    seed = zlib.crc32(json.dumps(header["files"], sort_keys=True).encode())
    rows = dict(zip(ids.tolist(), real.sum(-1).tolist()))
    sentences = [uniform_of_sentence(seed, i, rows[i], samples) for i in plan.tolist()]
    return np.concatenate(sentences)


def _in_order(real: Tensor, ids: np.ndarray, plan: np.ndarray) -> Tensor:
    """The flat target rows of a batch, its sentences in the order of the plan."""
    where = {sentence: i for i, sentence in enumerate(ids.tolist())}
    order = torch.tensor([where[sentence] for sentence in plan.tolist()], device=real.device)
    flat = torch.arange(real.numel(), device=real.device).view_as(real)
    return flat[order][real[order]]


def summary_lines(manifest: Dict[str, Any], folder: Any, samples: str = "sentences") -> List[str]:
    """What a user wants to know of a finished cache.

    Args:
        samples: what the data consist of.
    """
    s, draws = manifest["summary"], manifest.get("tail_samples", 0)
    drawn = f" and {draws} drawn from the tail" if draws else ""
    teachers = " + ".join(os.path.basename(teacher["path"]) for teacher in manifest["teachers"])
    return [
        f"{folder}: {manifest['sentences']} {samples}, {manifest['rows']} target tokens, top "
        f"{manifest['k']}{drawn} of {teachers}",
        f"  {s['bytes'] / 1e6:.1f} MB, {s['bytes_per_token']:.2f} bytes per target token",
        f"  covered probability mass: mean {s['covered_mean']:.4f}, 1st percentile "
        f"{s['covered_1st_percentile']:.4f}; the shape of the rest is worth "
        f"{s['tail_bits']:.3f} bits per token",
        f"  teacher: nll_loss {s['nll_loss']:.3f}, entropy {s['entropy']:.3f} bits per token, "
        f"agreement with the reference {s['agreement']:.4f}, calibration error "
        f"{s['calibration_error']:.4f}",
    ]
