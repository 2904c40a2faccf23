"""What the objective costs by itself, the teacher's logits given."""

from typing import Any, Callable, Dict

import torch
import torch.nn.functional as F
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss
from torch import Tensor

from ..objective import Member, RunningAnswer, Settings, distillation_objective, divergence
from ..objective.divergences import NAMES
from ..timing import Timings
from .machine import peak_allocated

STOCK = "label_smoothed_cross_entropy"


def objective_costs(
    *,
    rows: int,
    vocabulary: int,
    repeats: int,
    device: torch.device,
    dtype: torch.dtype,
    every_divergence: bool = False,
) -> Dict[str, Any]:
    """Forward and backward of the objective, the teacher's logits given, metrics off.

    Against fairseq's label-smoothed cross-entropy by itself, and against the usual dense KL on top
    of that. Extra memory is the most that is held at one time beyond the student's logits, their
    gradient and the teacher's logits, as a share of one logits tensor.
    """
    generator = torch.Generator().manual_seed(1)
    shape = (rows, vocabulary)
    student = (3 * torch.randn(shape, generator=generator)).to(device, dtype).requires_grad_()
    teacher = (3 * torch.randn(shape, generator=generator)).to(device, dtype)
    target = torch.randint(4, vocabulary, (rows,), generator=generator).to(device)
    every_row = torch.arange(rows, device=device)
    answer = RunningAnswer([Member("teacher", lambda some: teacher[some])])

    def stock() -> Tensor:
        log_q = torch.log_softmax(student, dim=-1, dtype=torch.float32)
        return label_smoothed_nll_loss(log_q, target, 0.1, ignore_index=1)[0]

    def dense(t: float) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            log_q = torch.log_softmax(student / t, dim=-1, dtype=torch.float32)
            p = torch.softmax(teacher / t, dim=-1, dtype=torch.float32)
            kl = F.kl_div(log_q, p, reduction="none").sum()
            return 0.5 * stock() + 0.5 * t * t * kl

        return loss

    def ours(**chosen: Any) -> Callable[[], Tensor]:
        settings = Settings(label_smoothing=0.1, **chosen)
        return lambda: distillation_objective(student, target, every_row, answer, settings).loss

    losses = {
        STOCK: stock,
        "dense KL, T = 1": dense(1.0),
        "dense KL, T = 1.7": dense(1.7),
        "forward-kl, T = 1": ours(),
        "forward-kl, T = 1.7": ours(temperature=1.7),
    }
    if every_divergence:
        losses.update({name: ours(divergence=divergence(name)) for name in NAMES[1:]})
        losses["forward-kl, top-k 8"] = ours(top_k=8)
        losses["forward-kl, ranking"] = ours(ranking_weight=1.0)

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def work() -> None:
            student.grad = None
            loss().backward()

        return work

    works = {name: step(loss) for name, loss in losses.items()}
    timings = Timings(works, repeats, f"objective, V = {vocabulary}")
    one_tensor = student.numel() * student.element_size()
    costs = {}
    for name, work in works.items():
        costs[name] = {
            "seconds": timings.quartiles(name)._asdict(),
            "to_stock": timings.ratio(name, STOCK)._asdict(),
            # the gradient is what is left, and what every training has
            "extra_memory": max(peak_allocated(work, device) - one_tensor, 0) / one_tensor,
        }
        usual = "dense KL, T = 1.7" if name.endswith("1.7") else "dense KL, T = 1"
        costs[name]["to_dense"] = timings.ratio(name, usual)._asdict()
    return {"rows": rows, "vocabulary": vocabulary, "costs": costs}
