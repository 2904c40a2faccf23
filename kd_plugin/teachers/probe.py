"""The last net before training: does the teacher know this data at all?"""

import logging
import math
from typing import Any, Optional

import numpy as np
import torch

from ..files import FileError, refuse_unknown_numbers
from ..objective import NotFiniteTeacherError, rows_ahead, rows_at_once
from .run import Teacher, TeacherError
from .view import Student, read_of

logger = logging.getLogger(__name__)

_SENTENCES, _BATCH, _LONGEST = 64, 8, 512


@torch.no_grad()
def probe(
    teacher: Teacher, dataset: Any, lengths: Optional[np.ndarray], student: Student, subset: str
) -> None:
    """Refuse a teacher that is worse than a uniform guess on some samples of the data.

    Args:
        dataset: sentence pairs, or blocks of text, in the student's vocabulary; ``subset`` is its
            name.
        lengths: source and target tokens of each, (n, 2); None of a text without targets.

    Raises:
        UserError: it is, or it gives NaN, or the data hold numbers that no symbol has.
    """
    if lengths is None:
        return
    source, target = teacher.max_positions()
    fits = np.flatnonzero((lengths <= [source, min(target, _LONGEST)]).all(axis=1))
    if len(fits) == 0:
        return
    samples = student.kind.samples[0]
    chosen = fits[np.linspace(0, len(fits) - 1, min(_SENTENCES, len(fits))).astype(int)]
    nll, count = 0.0, 0
    for start in range(0, len(chosen), _BATCH):
        batch = dataset.collater([dataset[int(i)] for i in chosen[start : start + _BATCH]])
        tokens: Any = read_of(batch)["src_tokens"]
        if not student.kind.reads_frames:
            refuse_unknown_numbers(tokens.flatten(), len(student.source))
        elif not tokens.isfinite().all():
            bad = batch["id"][~tokens.isfinite().flatten(1).all(1)].tolist()
            raise FileError(f"the features of {subset} hold NaN or inf: utterances {bad}")
        refuse_unknown_numbers(batch["target"].flatten(), len(student.target))
        found = token_losses(teacher, batch, student)
        nll, count = nll + found.sum().item(), count + found.numel()
    bits, guess = nll / count / math.log(2), math.log2(len(student.target))
    logger.info(
        f"teacher on {len(chosen)} {samples} of {subset}: nll_loss {bits:.3f} (a uniform guess has "
        f"{guess:.3f})"
    )
    if not bits <= guess:
        raise TeacherError(
            f"the teacher knows nothing of this data: on {len(chosen)} {samples} of {subset} its "
            f"nll_loss is {bits:.2f} bits per token, a uniform guess over the "
            f"{len(student.target)} symbols has {guess:.2f}. Likely causes: its vocabulary is "
            "in a different order from the dictionaries found for it (--teacher-data), it "
            "translates in the other direction, it uses a different subword model, or it was "
            "trained for only a few updates."
        )


@torch.no_grad()
def token_losses(teacher: Teacher, batch: Any, student: Student) -> torch.Tensor:
    """The teacher's nll of each target token of a batch that is no padding or tag: nats, float64.

    A few rows at a time.

    Raises:
        NotFiniteTeacherError: it gives NaN.
    """
    target = batch["target"].flatten()
    rows = student.words(batch["target"]).flatten().nonzero().squeeze(-1)
    answer = teacher(batch)
    like = torch.zeros((), device=teacher.device)
    size = rows_at_once(like.device, len(student.target)) * rows_ahead(like.device)
    parts = []
    for block in rows.split(size):
        dense = answer.rows(block, like)
        bad = block[dense.bad().cpu()]
        if bad.numel():
            error = NotFiniteTeacherError(answer.not_finite(bad), bad)
            raise error.naming(batch["id"].tolist(), batch["target"].size(1))
        parts.append(dense.nll(target[block].to(like.device)).double().cpu())
    return torch.cat(parts)
