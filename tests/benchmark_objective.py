"""Time the objective alone: python tests/benchmark_objective.py THREADS VOCABULARY ROWS [all]

Forward and backward of fairseq's label-smoothed cross-entropy, of the objective with teacher
logits given, and of the usual dense KL on top of fairseq's loss; interleaved, median of 7 repeats,
seconds.
"all" adds the other divergences, top-k and the selections.
"""

import statistics
import sys
import time

import torch
import torch.nn.functional as F
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss

from kd_plugin.divergences import NAMES, divergence
from kd_plugin.objective import Settings, distillation_objective
from kd_plugin.selection import Selection
from kd_plugin.signal import Member, TeacherSignal


def main(threads, vocabulary, n, everything=None):
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    n, vocabulary = int(n), int(vocabulary)
    student = torch.randn(n, vocabulary).mul_(3).requires_grad_()
    teacher = torch.randn(n, vocabulary).mul_(3)
    target = torch.randint(4, vocabulary, (n,))
    rows = torch.arange(n)
    signal = TeacherSignal([Member("teacher", lambda rows: teacher[rows])])

    def stock():
        log_q = torch.log_softmax(student, -1, dtype=torch.float32)
        return label_smoothed_nll_loss(log_q, target, 0.1, ignore_index=1)[0]

    def dense(t):
        log_q = torch.log_softmax(student / t, -1)
        kl = F.kl_div(log_q, torch.softmax(teacher / t, -1), reduction="none").sum()
        return 0.5 * stock() + 0.5 * t * t * kl

    def ours(**settings):
        settings = Settings(label_smoothing=0.1, **settings)
        return lambda: distillation_objective(student, target, rows, signal, settings).loss

    losses = {
        "label_smoothed_cross_entropy": stock,
        "forward-kl, T = 1": ours(),
        "forward-kl, T = 1.7": ours(temperature=1.7),
        "dense KL, T = 1": lambda: dense(1.0),
        "dense KL, T = 1.7": lambda: dense(1.7),
    }
    if everything:
        losses.update({name: ours(divergence=divergence(name)) for name in NAMES[1:]})
        losses["top-k 8"] = ours(top_k=8)
        for name in ("batch", "teacher-correct", "teacher-better", "teacher-entropy"):
            losses["selection " + name] = ours(selection=Selection(name))
    times = {name: [] for name in losses}
    for _ in range(8):
        for name, loss in losses.items():
            student.grad = None
            start = time.perf_counter()
            loss().backward()
            times[name].append(time.perf_counter() - start)
    for name, seconds in times.items():
        print("{:32} {:.3f}".format(name, statistics.median(seconds[1:])))


if __name__ == "__main__":
    main(*sys.argv[1:])
