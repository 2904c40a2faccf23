"""The criterion ``kd_label_smoothed_cross_entropy``: what a student learns from text and teacher.

For every real target token, with p and q the teacher's and the student's distributions at
temperature T::

    loss = ce_weight * ce  +  kd_weight * T^2 * KL(p || q)

where ce is fairseq's label-smoothed cross-entropy and ce_weight is 1 - kd_weight unless given.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

import torch
from fairseq import utils
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterionConfig,
)

from .objective import NotFiniteTeacherError, Terms, distillation_objective
from .signal import not_finite_teacher

try:
    from fairseq.logging import metrics
except ImportError:  # pragma: no cover
    from fairseq import metrics


@dataclass
class KDLabelSmoothedCrossEntropyCriterionConfig(LabelSmoothedCrossEntropyCriterionConfig):
    kd_weight: float = field(
        default=0.5,
        metadata={"help": "weight of the distillation term, from 0 (plain training) to 1"},
    )
    ce_weight: Optional[float] = field(
        default=None,
        metadata={
            "help": "constant weight of the label-smoothed cross-entropy, >= 0 "
            "(default: 1 - kd_weight)"
        },
    )
    kd_temperature: float = field(
        default=1.0,
        metadata={
            "help": "temperature of both the teacher's and the student's distribution in the "
            "distillation term, > 0 (Hinton et al. 2015); its gradient keeps its size"
        },
    )


@register_criterion(
    "kd_label_smoothed_cross_entropy", dataclass=KDLabelSmoothedCrossEntropyCriterionConfig
)
class KDLabelSmoothedCrossEntropyCriterion(FairseqCriterion):
    def __init__(
        self,
        task,
        sentence_avg,
        label_smoothing,
        ignore_prefix_size=0,
        report_accuracy=False,
        kd_weight=0.5,
        ce_weight=None,
        kd_temperature=1.0,
    ):
        super().__init__(task)
        self._check(task, kd_weight, ce_weight, kd_temperature)
        self.sentence_avg = sentence_avg
        self.label_smoothing = label_smoothing
        self.ignore_prefix_size = ignore_prefix_size
        self.report_accuracy = report_accuracy
        self.kd_weight = kd_weight
        self.ce_weight = 1.0 - kd_weight if ce_weight is None else ce_weight
        self.temperature = kd_temperature

    @staticmethod
    def _check(task, kd_weight, ce_weight, temperature) -> None:
        faults = []
        if not hasattr(task, "asks_a_teacher"):
            faults.append(
                "the criterion kd_label_smoothed_cross_entropy needs --task kd_translation, which "
                "runs the teacher; got {}".format(type(task).__name__)
            )
        if not 0 <= kd_weight <= 1:
            faults.append("--kd-weight must be from 0 to 1, got {}".format(kd_weight))
        if ce_weight is not None and not 0 <= ce_weight < math.inf:
            faults.append("--ce-weight must be a number >= 0, got {}".format(ce_weight))
        if not 0 < temperature < math.inf:
            faults.append("--kd-temperature must be a number > 0, got {}".format(temperature))
        if faults:
            raise ValueError("; ".join(faults))

    def forward(self, model, sample, reduce=True):
        """Compute the loss of a batch; a sum over its tokens, as everywhere in fairseq.

        Returns:
            the loss, the sample size (its denominator), and the logging outputs. Without a teacher
            in ``sample["teacher"]`` (validation where there is none), the student's alone.
        """
        if not reduce:
            raise NotImplementedError("this criterion gives sums only (reduce=True)")
        if getattr(model, "decoder", None) is not None:
            self._refuse_adaptive_softmax(model)
        net_output = model(**sample["net_input"])
        terms, n = self._terms(net_output[0], model.get_targets(sample, net_output), sample)

        sample_size = sample["target"].size(0) if self.sentence_avg else sample["ntokens"]
        logging_output = {
            "loss": terms.loss.data,
            "nll_loss": terms.nll.sum(),
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "sample_size": sample_size,
        }
        if self.report_accuracy:
            logging_output["n_correct"] = terms.correct.sum()
            logging_output["total"] = n
        if terms.kd is not None:
            logging_output["kd_loss"] = terms.kd.sum()
            logging_output["kd_tokens"] = n
        if terms.teacher_nll is not None:
            logging_output["teacher_nll_loss"] = terms.teacher_nll.sum()
            logging_output["n_agree"] = terms.agree.sum()
            logging_output["n_compared"] = n
        return terms.loss, sample_size, logging_output

    def _terms(self, logits, target, sample) -> "tuple[Terms, int]":
        # logits: B x T x V, target: B x T
        real = target.ne(self.padding_idx)
        if self.ignore_prefix_size > 0:
            real[:, : self.ignore_prefix_size] = False
        rows = real.flatten().nonzero().squeeze(-1)
        signal = sample.get("teacher")
        try:
            terms = distillation_objective(
                logits.flatten(0, 1),
                target.flatten(),
                rows,
                signal,
                # without a teacher (validation only) the loss is the student's cross-entropy
                ce_weight=1.0 if signal is None else self.ce_weight,
                kd_weight=self.kd_weight,
                temperature=self.temperature,
                label_smoothing=self.label_smoothing,
                with_metrics=self.report_accuracy or not self.training,
            )
        except NotFiniteTeacherError as error:
            ids = sample["id"][(error.rows // target.size(1)).unique().to(sample["id"].device)]
            raise not_finite_teacher(error.teachers, ids.tolist()) from None
        return terms, rows.numel()

    @staticmethod
    def _refuse_adaptive_softmax(model) -> None:
        if getattr(model.decoder, "adaptive_softmax", None) is not None:
            raise ValueError(
                "the student has an adaptive softmax, which gives no distribution over the whole "
                "vocabulary to distil into; train it without --adaptive-softmax-cutoff"
            )

    @classmethod
    def reduce_metrics(cls, logging_outputs: List[Dict[str, Any]]) -> None:
        """Aggregate the sums of all workers; losses in bits, as fairseq's are."""

        def total(key: str) -> Any:
            return utils.item(sum(log.get(key, 0) for log in logging_outputs))

        ntokens, sample_size = total("ntokens"), total("sample_size")
        metrics.log_scalar("loss", _bits(total("loss"), sample_size), sample_size, round=3)
        metrics.log_scalar("nll_loss", _bits(total("nll_loss"), ntokens), ntokens, round=3)
        metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters["nll_loss"].avg))

        distilled = total("kd_tokens")
        if distilled > 0:
            metrics.log_scalar("kd_loss", _bits(total("kd_loss"), distilled), distilled, round=3)
        compared = total("n_compared")
        if compared > 0:
            metrics.log_scalar(
                "teacher_nll_loss", _bits(total("teacher_nll_loss"), compared), compared, round=3
            )
            metrics.log_scalar("agreement", total("n_agree") / compared, compared, round=4)
        judged = total("total")
        if judged > 0:
            metrics.log_scalar("total", judged)
            metrics.log_scalar("n_correct", total("n_correct"))
            metrics.log_derived(
                "accuracy",
                lambda meters: round(meters["n_correct"].sum * 100.0 / meters["total"].sum, 3)
                if meters["total"].sum > 0
                else float("nan"),
            )

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True


def _bits(nats: float, count: float) -> float:
    return nats / count / math.log(2) if count else 0.0
