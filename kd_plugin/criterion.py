"""The criterion ``kd_label_smoothed_cross_entropy``: a student learns from text and from a teacher.

For every real target token, with p and q the teacher's and the student's distributions at
temperature T, and D a divergence::

    loss = ce_weight * ce  +  kd_weight * selected * (c(T) * D(p, q) + ranking_weight * R(p, q))

ce is fairseq's label-smoothed cross-entropy on the reference, at temperature 1. ce_weight is
1 - kd_weight * selected unless ``--ce-weight`` gives it. c(T) keeps the size of the gradient
independent of T. R, off by default, ranks the likeliest symbols. The task puts the teacher's
answer into ``sample["teacher"]``; ``objective.distillation_objective`` computes value and gradient.

Terms of hidden states and attention, off by default, are added with weights of their own
(``objective.states``): sums over source and target positions. The linear maps of
``--kd-hidden mse`` are the only parameters here; a student has nothing of them.

A batch that the student wrote has no reference: there ce_weight is 0, kd_weight 1, all is selected.

Everything is a sum over tokens. The trainer divides once, by the sample size of all batches of an
update, so a batch is the sum of its parts, however it is split.
"""

import itertools
import logging
import math
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from fairseq import utils
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.logging import metrics

from .flags import CRITERION, KDLabelSmoothedCrossEntropyCriterionConfig
from .objective import (
    Found,
    Inside,
    NotFiniteTeacherError,
    Place,
    ScoreQueue,
    Selection,
    StateTerm,
    Terms,
    distillation_objective,
    states,
)
from .plan import Plan
from .teachers import Step, looking_inside

logger = logging.getLogger(__name__)

# Sums that only mean something where the batch's target is a reference
_OF_REFERENCES = ("nll_loss", "n_correct", "total", "teacher_nll_loss", "n_agree", "n_compared")
_TOKENS_OF = "tokens_of_"  # begins the names of sums, one for each pair of languages
_OF_REFERENCES_OF_PAIRS = ("nll_loss_", "n_agree_", _TOKENS_OF)


@register_criterion(CRITERION, dataclass=KDLabelSmoothedCrossEntropyCriterionConfig)
class KDLabelSmoothedCrossEntropyCriterion(FairseqCriterion):
    def __init__(self, cfg: KDLabelSmoothedCrossEntropyCriterionConfig, task: Any) -> None:
        super().__init__(task)
        self.plan = Plan.read(cfg, task)
        self.selection = self.plan.new_selection()
        self.sentence_avg = cfg.sentence_avg
        self.ignore_prefix_size = cfg.ignore_prefix_size
        self.report_accuracy = cfg.report_accuracy
        self.pairs = getattr(task, "pairs", ())  # of languages, of a multilingual student
        self.batches = itertools.count()  # numbers those of the update under way
        # Validation uses the weight and temperature of the last update; outside training, the final
        self._update: Optional[int] = None
        # The linear maps of --kd-hidden mse: the only parameters, and in a training alone
        self.maps: Optional[torch.nn.ParameterList] = None

    def add_maps(self, maps: List[torch.Tensor]) -> None:
        """Let linear maps be trained along, one for each pair of layers and model of the teacher.

        The optimizer must not have been built yet.
        """
        self.maps = torch.nn.ParameterList([torch.nn.Parameter(one) for one in maps])

    def load_state_dict(self, state_dict: Any, strict: bool = True) -> Any:
        """The maps of a checkpoint, if it has those that are trained here.

        One of another distillation, or of a plain training, has others or none.
        """
        found = state_dict or {}
        ours, theirs = ({k: w.shape for k, w in s.items()} for s in (self.state_dict(), found))
        if ours == theirs:
            return super().load_state_dict(found, strict)
        logger.warning(
            "--kd-hidden mse: the checkpoint has no linear maps between these layers, and they "
            "start anew. To go on from it, and not only from its weights, --reset-optimizer is "
            "needed as well: the optimizer's state has nothing of them"
        )
        return None

    @property
    def queue(self) -> Optional[ScoreQueue]:
        """Scores of the last tokens, where the selection compares with them."""
        return self.selection.queue

    def train(self, mode: bool = True) -> "KDLabelSmoothedCrossEntropyCriterion":
        """The trainer calls this before each update, also before repeating one that overflowed."""
        self.batches = itertools.count()
        if self.queue is not None:
            self.queue.begin()
        return super().train(mode)

    def forward(self, model, sample, reduce=True):
        """The loss of a batch.

        Returns:
            the sum over its tokens, the sample size to divide it by, and what is logged. Without a
            teacher (validation where there is none), the student's cross-entropy alone.
        """
        if not reduce:
            raise NotImplementedError("this criterion gives sums only (reduce=True)")
        step = sample.get("step", Step())
        if self.training:
            self._update = step.update
        theirs = self._teachers_inside(sample)
        places = [pair.of_student for term in self._inner for pair in term.layers] if theirs else []
        with looking_inside(model, places) as ours:
            net_output = model(**sample["net_input"])
        target = model.get_targets(sample, net_output)  # B x T
        terms = self._terms(net_output[0], target, sample)
        if self.queue is not None and self.training and not step.is_dummy:
            # the queue holds how hard references are: nothing of what the student wrote
            nothing = terms.tokens.student_nll[:0]
            scores = nothing if step.by_student else self.selection.score(terms.tokens)
            group = terms.tokens.group
            self.queue.observe(scores, None if group is None else group[: len(scores)])
        loss, sums = terms.loss, self._sums(terms, step)
        if theirs:
            source = sample["net_input"]["src_tokens"]
            for term, found in self._compared(ours, theirs, target, source):
                loss = loss + term.weight * found.value
                sums[term.name] = found.value.detach() / term.unit
                sums[f"{term.name}_positions"] = found.positions

        sample_size = sample["target"].size(0) if self.sentence_avg else sample["ntokens"]
        logging_output = {
            "loss": loss.data,
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "sample_size": sample_size,
            **sums,
        }
        return loss, sample_size, logging_output

    @property
    def _inner(self) -> List[StateTerm]:
        """The terms of the inside; outside training nobody has the maps that some need."""
        return [t for t in self.plan.inside if not t.has_maps or self.maps is not None]

    def _teachers_inside(self, sample: Dict[str, Any]) -> List[Inside]:
        """What was found inside the teacher's models; nothing where it was not looked for."""
        answer = sample.get("teacher")
        return answer.inside() if self._inner and answer is not None else []

    def _compared(
        self,
        ours: Dict[Place, torch.Tensor],
        theirs: List[Inside],
        target: torch.Tensor,
        source: torch.Tensor,
    ) -> Iterator[Tuple[StateTerm, Found]]:
        """The terms that compare student and teacher inside.

        Args:
            target: B x T; source: B x S.
        """
        positions = {"decoder": target.ne(self.padding_idx)}
        if not self.task.kind.reads_frames:
            positions["encoder"] = source.ne(self.task.source_dictionary.pad())
        counted = {**positions, "decoder": self._real(target)}
        for term in self._inner:
            maps = self.maps if term.has_maps and self.maps is not None else ()
            yield term, states.compare(term, ours, theirs, positions, counted, [*maps])

    def _real(self, target: torch.Tensor) -> torch.Tensor:
        """Which target tokens the loss is summed over, bool B x T."""
        real = target.ne(self.padding_idx)
        if self.ignore_prefix_size > 0:
            real[:, : self.ignore_prefix_size] = False
        return real

    def _terms(self, logits: torch.Tensor, target: torch.Tensor, sample: Dict[str, Any]) -> Terms:
        """The objective on the real target tokens of a batch: logits B x T x V, target B x T."""
        by_student = sample.get("step", Step()).by_student
        settings = self.plan.settings(self._update, by_student)._replace(
            # validation distils every token, so that its kd_loss compares between selections;
            # what the student wrote has no reference to judge tokens by
            selection=self.selection if self.training and not by_student else Selection("all"),
            with_metrics=self.report_accuracy or not self.training,
        )
        try:
            return distillation_objective(
                logits.flatten(0, 1),
                target.flatten(),
                self._real(target).flatten().nonzero().squeeze(-1),
                sample.get("teacher"),
                settings,
                sample["pair"].repeat_interleave(target.size(1)) if self.pairs else None,
            )
        except NotFiniteTeacherError as error:
            ids = sample["id"].tolist()
            if self.pairs:  # a number is a sentence's within its pair
                ids = [f"{self.pairs[n]} {i}" for n, i in zip(sample["pair"].tolist(), ids)]
            raise error.naming(ids, target.size(1)) from None

    def _sums(self, terms: Terms, step: Step) -> Dict[str, Any]:
        """What is logged: sums over tokens and their counts, the same keys on every rank."""
        sums = {**self._of_tokens(terms), **self._of_pairs(terms)}
        if self.training and self.plan.inputs.by_student:
            sums["kd_inputs"] = terms.tokens.student_nll.numel() if step.by_student else 0
        if step.by_student:
            # what the student itself wrote says nothing of how well it knows references
            sums.update({key: _nothing(sums[key]) for key in filter(_is_of_references, sums)})
        return sums

    def _of_tokens(self, terms: Terms) -> Dict[str, Any]:
        """The sums, with the batch's target taken for a reference."""
        tokens, n = terms.tokens, terms.tokens.student_nll.numel()
        sums: Dict[str, Any] = {"nll_loss": tokens.student_nll.sum()}
        if self.report_accuracy and terms.correct is not None:
            sums.update(n_correct=terms.correct.sum(), total=n)
        if terms.kd is None or terms.kd_weight is None:
            return sums
        # a tensor on every rank: ranks whose logs differ in kind cannot be summed
        selected = terms.kd.new_tensor(n) if terms.selected is None else terms.selected.sum()
        sums.update(kd_loss=terms.kd.sum() / self._unit, kd_tokens=selected)
        if self.training and self.plan.selection != "all":
            sums.update(kd_candidates=n)
        if self.plan.adaptive or self.plan.weight.steps:
            sums.update(kd_weight=terms.kd_weight.sum())
        if self.plan.temperature.steps:
            temperature = self.plan.temperature(self._update)
            sums.update(kd_temperature=temperature * n, kd_temperature_tokens=n)
        if terms.ranking is not None:
            sums.update(kd_ranking=terms.ranking.sum())
        if terms.agree is not None and tokens.teacher_nll is not None:
            sums.update(
                teacher_nll_loss=tokens.teacher_nll.sum(), n_agree=terms.agree.sum(), n_compared=n
            )
        return sums

    def _of_pairs(self, terms: Terms) -> Dict[str, Any]:
        """The sums over the tokens of each pair of languages, also of those that have none here:
        the same keys on every rank."""
        tokens, values = terms.tokens, {}
        if not self.pairs or tokens.group is None:
            return {}
        values[_TOKENS_OF] = torch.ones_like(tokens.student_nll)
        values["nll_loss_"] = tokens.student_nll
        if terms.kd is not None:
            selected = values[_TOKENS_OF] if terms.selected is None else terms.selected
            values["kd_loss_"] = terms.kd / self._unit
            values["kd_tokens_"] = selected.to(terms.kd)
        if terms.agree is not None:
            values["n_agree_"] = terms.agree.to(tokens.student_nll)
        sums: Dict[str, Any] = {}
        for name, each in values.items():
            of_pairs = each.new_zeros(len(self.pairs)).index_add_(0, tokens.group, each)
            sums.update(zip([name + pair for pair in self.pairs], of_pairs.unbind()))
        return sums

    @property
    def _unit(self) -> float:
        """Of the divergence, as it is logged."""
        return math.log(2) if self.plan.divergence.in_nats else 1.0

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
        n = total("ntokens") - total("kd_inputs")  # tokens of references
        if n > 0:
            metrics.log_scalar("nll_loss", total("nll_loss") / n / bit, n, round=3)
            metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters["nll_loss"].avg))
        log_mean("kd_inputs", "kd_inputs", "ntokens")
        log_mean("kd_loss", "kd_loss", "kd_tokens")
        log_mean("kd_ranking", "kd_ranking", "kd_tokens")
        log_mean("kd_selected", "kd_tokens", "kd_candidates")
        log_mean("kd_weight", "kd_weight", "kd_tokens")
        log_mean("kd_temperature", "kd_temperature", "kd_temperature_tokens")
        log_mean("kd_hidden", "kd_hidden", "kd_hidden_positions")
        log_mean("kd_attention", "kd_attention", "kd_attention_positions")
        log_mean("teacher_nll_loss", "teacher_nll_loss", "n_compared", bit)
        log_mean("agreement", "n_agree", "n_compared")
        for key in [key for key in logging_outputs[0] if key.startswith(_TOKENS_OF)]:
            pair = key[len(_TOKENS_OF) :]
            log_mean(f"nll_loss_{pair}", f"nll_loss_{pair}", key, bit)
            log_mean(f"kd_loss_{pair}", f"kd_loss_{pair}", f"kd_tokens_{pair}")
            log_mean(f"agreement_{pair}", f"n_agree_{pair}", key)
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


def _is_of_references(name: str) -> bool:
    return name in _OF_REFERENCES or name.startswith(_OF_REFERENCES_OF_PAIRS)


def _nothing(value: Any) -> Any:
    """A 0 of the same kind: ranks whose logs differ in kind cannot be summed."""
    return torch.zeros_like(value) if torch.is_tensor(value) else 0
