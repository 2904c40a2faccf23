"""The criterion ``kd_label_smoothed_cross_entropy``: what a student learns from text and teacher.

For every real target token, with p and q the teacher's and the student's distributions at
temperature T and D a divergence::

    loss = ce_weight * ce  +  kd_weight * selected * c(T) * D(p, q)

ce is fairseq's label-smoothed cross-entropy; ce_weight is 1 - kd_weight * selected unless given.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence

import torch
from fairseq import utils
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.dataclass import ChoiceEnum
from fairseq.logging import metrics

from .objective import divergences, schedules, selection, topk
from .objective.answer import not_finite_teacher
from .objective.chunks import NotFiniteTeacherError, Settings, Terms, distillation_objective
from .plan import CRITERION, choice_value

_KD_WEIGHT, _KD_TEMPERATURE = 0.5, 1.0


@dataclass
class KDLabelSmoothedCrossEntropyCriterionConfig(LabelSmoothedCrossEntropyCriterionConfig):
    kd_weight: Optional[float] = field(
        default=None,
        metadata={
            "help": (
                "weight of the distillation term, from 0 (plain training) to 1 (default: "
                f"{_KD_WEIGHT})"
            )
        },
    )
    ce_weight: Optional[float] = field(
        default=None,
        metadata={
            "help": "constant weight of the label-smoothed cross-entropy, >= 0 (default: what a "
            "token's distillation term leaves of 1)"
        },
    )
    kd_temperature: Optional[float] = field(
        default=None,
        metadata={
            "help": (
                "temperature of both distributions in the distillation term, > 0; its gradient's "
                f"size does not depend on it (Hinton et al. 2015) (default: {_KD_TEMPERATURE})"
            )
        },
    )
    kd_divergence: ChoiceEnum(divergences.NAMES) = field(  # type: ignore
        default="forward-kl",
        metadata={
            "help": "divergence between teacher p and student q: forward-kl KL(p||q) (Kim & Rush "
            "2016), reverse-kl KL(q||p) (Gu et al. 2024), js (Agarwal et al. 2024), tvd (Wen et "
            "al. 2023), skew-kl, skew-reverse-kl (Ko et al. 2024), logit-mse (Ba & Caruana 2014)"
        },
    )
    kd_js_beta: Optional[float] = field(
        default=None,
        metadata={"help": "teacher's share of the mixture in js, between 0 and 1 (default: 0.5)"},
    )
    kd_skew: Optional[float] = field(
        default=None,
        metadata={
            "help": "first distribution's share of the mixture in skew-kl and skew-reverse-kl, at "
            "least 0, below 1 (default: 0.1)"
        },
    )
    kd_top_k: int = field(
        default=0,
        metadata={
            "help": "distil only the teacher's K likeliest symbols, from 0 to all of the "
            "vocabulary (0: all that are known; Tan et al. 2019)"
        },
    )
    kd_tail: Optional[ChoiceEnum(topk.TAILS)] = field(  # type: ignore
        default=None,
        metadata={
            "help": "what becomes of the rest under --kd-top-k: bucket keeps its mass as "
            "one more outcome, renormalise leaves it out (default: bucket)"
        },
    )
    kd_selection: ChoiceEnum(selection.NAMES) = field(  # type: ignore
        default="all",
        metadata={
            "help": "which tokens are distilled: all; the share with the highest student "
            "cross-entropy of the micro-batch (batch) or against the last tokens of all ranks "
            "(global) (Wang et al. 2021); those where the teacher is most certain "
            "(teacher-entropy), right (teacher-correct) or better than the student "
            "(teacher-better), these three of this project"
        },
    )
    kd_selection_rate: Optional[float] = field(
        default=None,
        metadata={
            "help": (
                "share of the tokens that batch, global and teacher-entropy select, above 0, at "
                f"most 1 (default: {selection.DEFAULT_RATE})"
            )
        },
    )
    kd_queue_size: Optional[int] = field(
        default=None,
        metadata={
            "help": (
                "how many of the last tokens global and teacher-entropy compare with, >= 1 "
                f"(default: {selection.DEFAULT_QUEUE_SIZE})"
            )
        },
    )
    kd_weight_schedule: str = field(
        default="constant",
        metadata={
            "help": "how the weight moves: constant, linear:FROM:TO:STEPS or cosine:FROM:TO:STEPS "
            "(Loshchilov & Hutter 2017) over updates (instead of --kd-weight), or adaptive, token "
            "by token: kd_weight * sigmoid(student's nll - teacher's nll), of this project"
        },
    )
    kd_temperature_schedule: str = field(
        default="constant",
        metadata={
            "help": "how the temperature moves over updates: constant, linear:FROM:TO:STEPS or "
            "cosine:FROM:TO:STEPS (Loshchilov & Hutter 2017) (instead of --kd-temperature)"
        },
    )


@register_criterion(CRITERION, dataclass=KDLabelSmoothedCrossEntropyCriterionConfig)
class KDLabelSmoothedCrossEntropyCriterion(FairseqCriterion):
    def __init__(self, cfg: KDLabelSmoothedCrossEntropyCriterionConfig, task: Any) -> None:
        super().__init__(task)
        self.sentence_avg = cfg.sentence_avg
        self.label_smoothing = cfg.label_smoothing
        self.ignore_prefix_size = cfg.ignore_prefix_size
        self.report_accuracy = cfg.report_accuracy
        self._configure(cfg, task)
        # the update whose weight and temperature validation shares; None is after the last
        self._update: Optional[int] = None

    def _configure(self, cfg: KDLabelSmoothedCrossEntropyCriterionConfig, task: Any) -> None:
        """Turn the flags into what training uses, or refuse them, every fault at once."""
        faults: List[str] = []

        def check(fine: bool, message: str, *values: Any) -> bool:
            if not fine:
                faults.append(message.format(*values))
            return fine

        check(
            hasattr(task, "asks_a_teacher"),
            "the criterion kd_label_smoothed_cross_entropy needs --task kd_translation, which runs "
            "the teacher; got {}",
            type(task).__name__,
        )
        ce, name = cfg.ce_weight, choice_value(cfg.kd_divergence)
        check(ce is None or 0 <= ce < math.inf, "--ce-weight must be a number >= 0, got {}", ce)

        self.adaptive = cfg.kd_weight_schedule == "adaptive"
        self.weight = self._scheduled(
            "weight",
            "constant" if self.adaptive else cfg.kd_weight_schedule,
            cfg.kd_weight,
            _KD_WEIGHT,
            lambda x: 0 <= x <= 1,
            "from 0 to 1",
            faults,
        )
        self.temperature = self._scheduled(
            "temperature",
            cfg.kd_temperature_schedule,
            cfg.kd_temperature,
            _KD_TEMPERATURE,
            lambda x: 0 < x < math.inf,
            "above 0",
            faults,
        )

        parameter = divergences.parameter_of(name)
        for flag, keyword, value, fine, expected in (
            ("--kd-js-beta", "beta", cfg.kd_js_beta, lambda x: 0 < x < 1, "between 0 and 1"),
            ("--kd-skew", "skew", cfg.kd_skew, lambda x: 0 <= x < 1, "at least 0, below 1"),
        ):
            if value is not None and check(
                parameter == keyword, "{} means nothing with --kd-divergence {}", flag, name
            ):
                check(fine(value), "{} must be {}, got {}", flag, expected, value)
        given = {"beta": cfg.kd_js_beta, "skew": cfg.kd_skew}.get(parameter or "")
        self.divergence = divergences.divergence(name, given)

        tail = None if cfg.kd_tail is None else choice_value(cfg.kd_tail)
        self.top_k, self.tail = cfg.kd_top_k, tail or "bucket"
        vocabulary = len(task.target_dictionary)
        cached = getattr(getattr(task, "cfg", None), "teacher_cache", None)
        cut = cfg.kd_top_k > 0 or bool(cached)
        check(
            0 <= cfg.kd_top_k <= vocabulary,
            "--kd-top-k must be from 0 to the {} symbols of the vocabulary, got {}",
            vocabulary,
            cfg.kd_top_k,
        )
        check(
            tail is None or cut,
            "--kd-tail {} is for --kd-top-k and --teacher-cache only",
            tail,
        )
        check(
            cfg.kd_top_k != 1 or self.tail == "bucket",
            "--kd-top-k 1 with --kd-tail renormalise leaves nothing to learn, the one symbol has "
            "probability 1 on both sides: take --kd-tail bucket or more symbols",
        )
        if name == "logit-mse":
            check(
                self.temperature == schedules.constant(1.0),
                "--kd-divergence logit-mse has no temperature: leave out --kd-temperature and "
                "--kd-temperature-schedule",
            )
            check(
                not cut or self.tail == "renormalise",
                "--kd-divergence logit-mse with --kd-top-k or --teacher-cache needs --kd-tail "
                "renormalise (a bucket of symbols has no logit)",
            )

        chosen = choice_value(cfg.kd_selection)
        rate, size = cfg.kd_selection_rate, cfg.kd_queue_size
        if rate is not None and check(
            chosen in selection.WITH_RATE,
            "--kd-selection-rate means nothing with --kd-selection {}",
            chosen,
        ):
            check(0 < rate <= 1, "--kd-selection-rate must be above 0, at most 1, got {}", rate)
        if size is not None and check(
            chosen in selection.WITH_QUEUE,
            "--kd-queue-size means nothing with --kd-selection {}",
            chosen,
        ):
            check(size >= 1, "--kd-queue-size must be at least 1, got {}", size)
        if self.weight == schedules.constant(0.0):
            useless = [
                flag
                for flag, given in (
                    ("--kd-top-k", cfg.kd_top_k > 0),
                    ("--kd-selection", chosen != "all"),
                    ("--kd-weight-schedule adaptive", self.adaptive),
                )
                if given
            ]
            check(not useless, "--kd-weight 0 distils nothing: leave out {}", ", ".join(useless))
        if faults:
            raise ValueError("; ".join(faults))
        self.ce_weight = ce
        self.selection = selection.Selection(
            chosen,
            selection.DEFAULT_RATE if rate is None else rate,
            selection.DEFAULT_QUEUE_SIZE if size is None else size,
        )

    def refuse_cache(self, k: int, temperatures: Sequence[float], whole: bool) -> None:
        """Refuse to be taught by a cache that lacks what the flags need, every fault at once.

        Args:
            k: symbols in each of its rows.
            temperatures: at which, beside 1, it knows the mass of all other symbols.
            whole: whether k is the whole vocabulary.
        """
        faults = []
        if k == 1 and self.tail == "renormalise":
            faults.append(
                "one symbol with --kd-tail renormalise leaves nothing to learn, it has probability "
                "1 on both sides: take --kd-tail bucket, or cache more symbols"
            )
        if self.top_k > k:
            faults.append(f"--kd-top-k {self.top_k} is more than the {k} of the cache")
        if self.tail == "bucket" and not whole:
            held = ", ".join(f"{t:g}" for t in sorted({1.0, *temperatures}))
            advice = "take --kd-tail renormalise, or cache with --temperatures"
            if self.temperature.steps:
                faults.append(
                    "--kd-temperature-schedule with --kd-tail bucket needs the mass of the other "
                    f"symbols at every temperature, and the cache holds it at {held}: take "
                    "--kd-tail renormalise"
                )
            elif self.temperature(None) not in (1.0, *temperatures):
                faults.append(
                    f"--kd-temperature {self.temperature(None):g} with --kd-tail bucket: the "
                    f"cache holds the mass of the other symbols at {held}; {advice}"
                )
        if faults:
            raise ValueError("--teacher-cache: " + "; ".join(faults))

    @staticmethod
    def _scheduled(name, text, value, default, valid, expected, faults) -> schedules.Schedule:
        """The schedule of the weight or the temperature."""
        flag = "--kd-" + name
        if text == "constant":
            value = default if value is None else value
            if not valid(value):
                faults.append(f"{flag} must be a number {expected}, got {value}")
            return schedules.constant(value)
        if value is not None:
            both = "{0} {1} and {0}-schedule {2} exclude each other"
            faults.append(both.format(flag, value, text))
        try:
            return schedules.parse(text, flag + "-schedule", valid, expected)
        except ValueError as error:
            faults.append(str(error))
            return schedules.constant(default)

    def train(self, mode: bool = True) -> "KDLabelSmoothedCrossEntropyCriterion":
        """The trainer calls this before each update, also before repeating one that overflowed."""
        if self.selection.queue is not None:
            self.selection.queue.discard_waiting()
        return super().train(mode)

    def forward(self, model, sample, reduce=True):
        """Compute the loss of a batch; a sum over its tokens, as everywhere in fairseq.

        Returns:
            the loss, the sample size (its denominator), and the logging outputs. Without a teacher
            in ``sample["teacher"]`` (validation where there is none), the student's alone.
        """
        if not reduce:
            raise NotImplementedError("this criterion gives sums only (reduce=True)")
        net_output = model(**sample["net_input"])
        target = model.get_targets(sample, net_output)  # B x T
        signal = sample.get("teacher")
        if self.training and signal is not None:
            self._update = signal.num_updates
        terms = self._terms(net_output[0], target, sample["id"], signal)

        queue = self.selection.queue
        if queue is not None and self.training and not signal.is_dummy:
            queue.wait(self.selection.score(terms.tokens))
        sample_size = sample["target"].size(0) if self.sentence_avg else sample["ntokens"]
        logging_output = {
            "loss": terms.loss.data,
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "sample_size": sample_size,
            **self._sums(terms),
        }
        return terms.loss, sample_size, logging_output

    def _terms(self, logits, target, ids, signal) -> Terms:
        real = target.ne(self.padding_idx)
        if self.ignore_prefix_size > 0:
            real[:, : self.ignore_prefix_size] = False
        settings = Settings(
            kd_weight=self.weight(self._update),
            ce_weight=self.ce_weight,
            temperature=self.temperature(self._update),
            label_smoothing=self.label_smoothing,
            divergence=self.divergence,
            top_k=self.top_k,
            tail=self.tail,
            # validation distils every token, so that its kd_loss compares between selections
            selection=self.selection if self.training else selection.Selection("all"),
            adaptive=self.adaptive,
            with_metrics=self.report_accuracy or not self.training,
        )
        try:
            return distillation_objective(
                logits.flatten(0, 1),
                target.flatten(),
                real.flatten().nonzero().squeeze(-1),
                signal,
                settings,
            )
        except NotFiniteTeacherError as error:
            sentences = torch.div(error.rows, target.size(1), rounding_mode="floor")
            bad = sentences.unique().to(ids.device)
            raise not_finite_teacher(error.teachers, ids[bad].tolist()) from None

    def _sums(self, terms: Terms) -> Dict[str, Any]:
        """What is logged: sums over tokens and their counts, the same keys on every rank."""
        tokens, n = terms.tokens, terms.tokens.student_nll.numel()
        sums: Dict[str, Any] = {"nll_loss": tokens.student_nll.sum()}
        if self.report_accuracy and terms.correct is not None:
            sums.update(n_correct=terms.correct.sum(), total=n)
        if terms.kd is None or terms.kd_weight is None:
            return sums
        # a tensor on every rank: ranks whose logs differ in kind cannot be summed
        selected = terms.kd.new_tensor(n) if terms.selected is None else terms.selected.sum()
        unit = math.log(2) if self.divergence.in_nats else 1.0
        sums.update(kd_loss=terms.kd.sum() / unit, kd_tokens=selected)
        if self.training and self.selection.name != "all":
            sums.update(kd_candidates=n)
        if self.adaptive or self.weight.steps:
            sums.update(kd_weight=terms.kd_weight.sum())
        if self.temperature.steps:
            sums.update(kd_temperature=self.temperature(self._update) * n, kd_temperature_tokens=n)
        if terms.agree is not None and tokens.teacher_nll is not None:
            sums.update(
                teacher_nll_loss=tokens.teacher_nll.sum(), n_agree=terms.agree.sum(), n_compared=n
            )
        return sums

    @classmethod
    def reduce_metrics(cls, logging_outputs: List[Dict[str, Any]]) -> None:
        """Aggregate the sums of all workers; losses in bits, as fairseq's are."""

        def total(key: str) -> Any:
            return utils.item(sum(log.get(key, 0) for log in logging_outputs))

        def log_mean(name: str, sum_of: str, count_of: str, unit: float = 1.0) -> None:
            if any(sum_of in log for log in logging_outputs):
                count = total(count_of)
                if count > 0:
                    metrics.log_scalar(name, total(sum_of) / count / unit, count, round=3)

        bit = math.log(2)
        log_mean("loss", "loss", "sample_size", bit)
        log_mean("nll_loss", "nll_loss", "ntokens", bit)
        if total("ntokens") > 0:
            metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters["nll_loss"].avg))
        log_mean("kd_loss", "kd_loss", "kd_tokens")
        log_mean("kd_selected", "kd_tokens", "kd_candidates")
        log_mean("kd_weight", "kd_weight", "kd_tokens")
        log_mean("kd_temperature", "kd_temperature", "kd_temperature_tokens")
        log_mean("teacher_nll_loss", "teacher_nll_loss", "n_compared", bit)
        log_mean("agreement", "n_agree", "n_compared")
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
