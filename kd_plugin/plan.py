"""The flags of task and criterion, read once into one ``Plan``, or refused, every fault at once."""

import math
import re
from argparse import Namespace
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

from fairseq import utils
from fairseq.tasks.translation import TranslationTask

from .checkpoints import TAUGHT, TRANSLATION, AskedTags, Kind, parse_overrides, parse_symbols
from .errors import Faults, UserError
from .flags import (
    ATTENTION_LAYERS,
    CRITERION,
    HIDDEN_LAYERS,
    HIDDEN_WEIGHT,
    INPUTS_EXTRA,
    INPUTS_RATE,
    INPUTS_TEMPERATURE,
    RUN_TEACHER,
    TEMPERATURE,
    WEIGHT,
    TeacherConfig,
)
from .objective import (
    Divergence,
    Parameter,
    Schedule,
    Selection,
    Settings,
    StateTerm,
    divergences,
    ranking,
    schedules,
    selection,
    states,
)
from .teachers import Needs, TeacherSettings


class Inputs(NamedTuple):
    """What the decoder reads in training.

    Attributes:
        how: it is written, one of ``flags.INPUTS``.
        rate: share of the batches whose inputs the student writes, by update.
        temperature: at which it is sampled.
        extra_length: tokens that a sample may have more than the longest reference of its batch.
    """

    how: str
    rate: Schedule
    temperature: float
    extra_length: int

    @property
    def by_student(self) -> bool:
        """Whether the student may write any."""
        return self.how != "reference"


class Plan(NamedTuple):
    """What a training distils, from which teacher, and how strongly.

    Attributes:
        teachers: the teacher that is run, or one for each pair of languages of a multilingual
            student; none with a cache, or where no flag names one.
        caches: the folders that the teacher is read from instead, or for each pair its own.
        beside_cache: what is wrong with flags of a running teacher beside it. It stops a training
            and not a validation, whose flags come from the student's checkpoint.
        ce_weight: constant weight of the cross-entropy; None is what distillation leaves of 1.
        weight: of the divergence, by update.
        adaptive: whether each token scales it by how much better the teacher is.
        temperature: of both distributions, by update.
        ranking_weight: of the ranking term, beside the divergence; 0 is without.
        ranking_k: how many symbols it ranks.
        top_k: distil the teacher's likeliest symbols alone; 0 is all that are known.
        tail: what becomes of the others, one of ``topk.TAILS``.
        inside: what is learnt from the inside of the teacher.
        inputs: what the decoder reads in training.
        scope: names of the pairs of languages within each of which tokens are selected; none are
            all together.
        ignored: how many of each target's first symbols the loss leaves out.
    """

    teachers: Sequence[TeacherSettings]
    caches: Sequence[str]
    beside_cache: Sequence[str]
    label_smoothing: float
    ce_weight: Optional[float]
    weight: Schedule
    adaptive: bool
    temperature: Schedule
    divergence: Divergence
    ranking_weight: float
    ranking_k: int
    top_k: int
    tail: str
    selection: str
    selection_rate: float
    queue_size: int
    inside: Tuple[StateTerm, ...]
    inputs: Inputs
    scope: Sequence[str] = ()
    ignored: int = 0

    @classmethod
    def read(cls, criterion: Any, task: Any) -> "Plan":
        """Read all flags, and refuse those that cannot mean anything, every fault at once.

        Args:
            criterion: fairseq's configuration of ``kd_label_smoothed_cross_entropy``.
            task: with a configuration that has ``TeacherConfig``'s flags, and a target dictionary.

        Raises:
            UserError: flags that are out of range, contradict each other, or would do nothing.
        """
        faults = Faults()
        flags: Any = getattr(task, "cfg", None)
        taught = faults.check(
            hasattr(flags, "teacher_cache"),
            f"the criterion {CRITERION} needs a task with a teacher: --task "
            f"{', '.join(TAUGHT[:-1])} or {TAUGHT[-1]}; got {type(task).__name__}",
        )
        reads_cache = bool(taught and flags.teacher_cache)
        pairs: Sequence[str] = getattr(task, "pairs", ())
        teachers: Sequence[TeacherSettings] = ()
        caches: Sequence[str] = ()
        with faults.collecting():
            if reads_cache:
                caches = read_caches(flags, pairs)
            elif taught:
                teachers = read_teachers(flags, pairs)

        adaptive = criterion.kd_weight_schedule == "adaptive"
        weight = _scheduled(
            "--kd-weight",
            "constant" if adaptive else criterion.kd_weight_schedule,
            criterion.kd_weight,
            default=WEIGHT,
            valid=lambda x: 0 <= x <= 1,
            expected="from 0 to 1",
            faults=faults,
        )
        temperature = _scheduled(
            "--kd-temperature",
            criterion.kd_temperature_schedule,
            criterion.kd_temperature,
            default=TEMPERATURE,
            valid=lambda x: 0 < x < math.inf,
            expected="above 0",
            faults=faults,
        )
        ce = criterion.ce_weight
        faults.check(
            ce is None or 0 <= ce < math.inf, f"--ce-weight must be a number >= 0, got {ce}"
        )
        chosen = choice_value(criterion.kd_selection)
        where = f"--kd-selection {chosen}"
        plan = cls(
            teachers=teachers,
            caches=caches,
            beside_cache=_faults_beside_cache(flags, criterion) if reads_cache else (),
            label_smoothing=criterion.label_smoothing,
            ce_weight=ce,
            weight=weight,
            adaptive=adaptive,
            temperature=temperature,
            divergence=_divergence(choice_value(criterion.kd_divergence), criterion, faults),
            ranking_weight=criterion.kd_ranking_weight,
            ranking_k=_given(
                *(ranking.TOP_K, criterion, faults, criterion.kd_ranking_weight != 0),
                "--kd-ranking-weight 0",
            ),
            top_k=criterion.kd_top_k,
            tail=choice_value(criterion.kd_tail or "bucket"),
            selection=chosen,
            selection_rate=_given(
                selection.RATE, criterion, faults, chosen in selection.WITH_RATE, where
            ),
            queue_size=_given(
                selection.QUEUE_SIZE, criterion, faults, chosen in selection.WITH_QUEUE, where
            ),
            inside=tuple(_inside(criterion, getattr(task, "kind", TRANSLATION), faults)),
            inputs=_inputs(criterion, faults),
            scope=_scope(criterion, chosen, pairs, faults),
            ignored=criterion.ignore_prefix_size,
        )
        plan._check_inputs(criterion, task, faults)
        plan._check_tail(criterion, reads_cache, len(task.target_dictionary), faults)
        plan._check_ranking(len(task.target_dictionary), faults)
        plan._check_use(faults)
        faults.raise_if_any()
        return plan

    def settings(self, update: Optional[int], by_student: bool = False) -> Settings:
        """What the objective minimises after ``update`` updates; None is after the last.

        Which tokens are selected, and what is logged, the criterion decides.

        Args:
            by_student: in a batch that the student wrote, where only the teacher can teach.
        """
        return Settings(
            kd_weight=1.0 if by_student else self.weight(update),
            ce_weight=0.0 if by_student else self.ce_weight,
            temperature=self.temperature(update),
            label_smoothing=self.label_smoothing,
            divergence=self.divergence,
            ranking_weight=self.ranking_weight,
            ranking_k=self.ranking_k,
            top_k=self.top_k,
            tail=self.tail,
            adaptive=self.adaptive and not by_student,
        )

    def new_selection(self) -> Selection:
        """The selection of the flags, with an empty queue if it compares with earlier tokens."""
        return Selection(self.selection, self.selection_rate, self.queue_size, self.scope)

    @property
    def needs(self) -> Needs:
        """What must be asked of a teacher at each target position."""
        return Needs(
            self.top_k,
            ranked=self.ranking_k if self.ranking_weight else 0,
            rest_at=self.temperature if self.tail == "bucket" else None,
            drawn_at=self.temperature if self.tail == "sample" else None,
            layers=tuple(pair for term in self.inside for pair in term.layers),
        )

    # The checks of flags that depend on one another

    def _check_ranking(self, vocabulary: int, faults: Faults) -> None:
        faults.check(
            0 <= self.ranking_weight < math.inf,
            f"--kd-ranking-weight must be a number >= 0, got {self.ranking_weight}",
        )
        if not self.ranking_weight:
            return
        faults.check(
            self.ranking_k <= vocabulary,
            f"--kd-ranking-top-k must be at most the {vocabulary} symbols of the vocabulary, got "
            f"{self.ranking_k}",
        )
        faults.check(
            not self.temperature.steps and self.temperature(None) == 1,
            "--kd-ranking-weight compares probabilities at temperature 1: leave out "
            "--kd-temperature and its schedule",
        )

    def _check_tail(
        self, criterion: Any, reads_cache: bool, vocabulary: int, faults: Faults
    ) -> None:
        cut = self.top_k > 0 or reads_cache
        faults.check(
            0 <= self.top_k <= vocabulary,
            f"--kd-top-k must be from 0 to the {vocabulary} symbols of the vocabulary, got "
            f"{self.top_k}",
        )
        faults.check(
            criterion.kd_tail is None or cut or self.tail == "sample",
            f"--kd-tail {self.tail} is for --kd-top-k and --teacher-cache only",
        )
        if self.tail == "sample":
            faults.check(reads_cache, "--kd-tail sample is for --teacher-cache only")
            faults.check(
                self.top_k == 0,
                "--kd-tail sample takes all symbols of the cache: leave out --kd-top-k",
            )
            faults.check(
                self.divergence.name == "forward-kl",
                "--kd-tail sample is right on average for --kd-divergence forward-kl alone, got "
                f"{self.divergence.name}: take --kd-tail bucket",
            )
        faults.check(
            self.top_k != 1 or self.tail != "renormalise",
            "--kd-top-k 1 with --kd-tail renormalise leaves nothing to learn, because the one "
            "symbol has probability 1 on both sides: take --kd-tail bucket or more symbols",
        )
        if self.divergence.of_logits:
            faults.check(
                self.temperature == schedules.constant(1.0),
                f"--kd-divergence {self.divergence.name} has no temperature: leave out "
                "--kd-temperature and --kd-temperature-schedule",
            )
            faults.check(
                not cut or self.tail == "renormalise",
                f"--kd-divergence {self.divergence.name} with --kd-top-k or --teacher-cache needs "
                "--kd-tail renormalise (a bucket of symbols has no logit)",
            )

    def _check_inputs(self, criterion: Any, task: Any, faults: Faults) -> None:
        if not self.inputs.by_student:
            return
        flag = f"--kd-inputs {self.inputs.how}"
        tags = 0
        if faults.check(
            isinstance(task, TranslationTask) or bool(getattr(task, "pairs", ())),
            f"{flag} is for tasks that translate sentences, as {TRANSLATION.taught} does; got "
            f"{type(task).__name__}",
        ):
            tags = task.student().tags.longer[1]
        faults.check(
            str(criterion.ddp_backend) != "fully_sharded",
            f"{flag} runs the student outside of a training step, which --ddp-backend "
            "fully_sharded cannot: take another backend",
        )
        faults.check(
            criterion.ignore_prefix_size <= tags,
            f"{flag} leaves no prefix of the reference: leave out --ignore-prefix-size"
            if not tags
            else f"{flag} leaves nothing of the reference but the token of its language: give "
            f"--ignore-prefix-size {tags} at most",
        )
        faults.check(
            self.selection == "all" or self.inputs.rate != schedules.constant(1.0),
            "--kd-inputs-rate 1 leaves no reference, and --kd-selection selects among the tokens "
            "of references: leave out --kd-selection",
        )

    def _check_use(self, faults: Faults) -> None:
        if self.weight != schedules.constant(0.0):
            return
        useless = {
            # the weight is that of references alone
            "--kd-top-k": self.top_k > 0 and not self.inputs.by_student,
            "--kd-selection": self.selection != "all",
            "--kd-weight-schedule adaptive": self.adaptive,
            "--kd-ranking-weight": self.ranking_weight > 0 and not self.inputs.by_student,
        }
        flags = ", ".join(flag for flag, given in useless.items() if given)
        faults.check(not flags, f"--kd-weight 0 distils nothing: leave out {flags}")


def _inside(criterion: Any, kind: Kind, faults: Faults) -> Iterator[StateTerm]:
    """The terms of the teacher's inside, if flags ask for any.

    Args:
        kind: of the student: by default its layers learn, those of the sides that it has.
    """

    def present(layers: str) -> str:
        pairs = [pair for pair in layers.split(",") if _sides(pair) <= {*kind.sides}]
        return ",".join(pairs)

    def term(name: str, how: str, weight: float, layers: str, kinds: Sequence[str]) -> Any:
        flag, where = states.FLAG[kinds[0]], states.LAYERS_FLAG[kinds[0]]
        faults.check(
            0 < weight < math.inf, f"--{name}-weight must be a number above 0, got {weight}"
        )
        faults.check(
            str(criterion.ddp_backend) != "fully_sharded",
            f"{flag} looks inside the student, which --ddp-backend fully_sharded takes apart: "
            "choose another --ddp-backend",
        )
        with faults.collecting():
            pairs = states.parse_layers(layers, where, kinds)
            others = {
                pair.kind for pair in pairs if not {*states.SIDES[pair.kind]} <= {*kind.sides}
            }
            faults.check(
                not (kind.reads_frames and others),
                f"{where}: encoders shorten the sound, each in its own way, so their positions "
                f"cannot be compared: leave out {', '.join(sorted(others))}",
            )
            yield StateTerm(*(name.replace("-", "_"), how, weight), pairs)

    weight, layers = criterion.kd_hidden_weight, criterion.kd_hidden_layers
    if criterion.kd_hidden is not None:
        weight = HIDDEN_WEIGHT if weight is None else weight
        how = choice_value(criterion.kd_hidden)
        yield from term("kd-hidden", how, weight, layers or present(HIDDEN_LAYERS), states.HIDDEN)
    else:
        for flag, value in {"--kd-hidden-weight": weight, "--kd-hidden-layers": layers}.items():
            faults.check(value is None, f"{flag} has no effect without --kd-hidden")
    weight, layers = criterion.kd_attention_weight, criterion.kd_attention_layers
    if weight != 0:
        yield from term(
            "kd-attention", "attention", weight, layers or present(ATTENTION_LAYERS), states.MAPS
        )
    else:
        faults.check(
            layers is None, "--kd-attention-layers has no effect with --kd-attention-weight 0"
        )


def _sides(pair: str) -> Set[str]:
    """Of a model, that a pair of layers is about."""
    return {*states.SIDES[pair.partition(":")[0]]}


def read_teacher(task: Any) -> Optional[TeacherSettings]:
    """The teacher of a task's flags; None if they name none.

    Raises:
        UserError: what can be seen to be wrong before any file is opened; every fault at once.
    """
    faults = Faults()
    paths = [path for path in utils.split_paths(task.teacher_checkpoint_path or "") if path]
    overrides, weights = {}, None
    with faults.collecting():
        weights = _weights(task.teacher_weights, len(paths))
    with faults.collecting():
        overrides = parse_overrides(task.teacher_overrides, "--teacher-overrides")
    dtype, on_cpu = choice_value(task.teacher_dtype), choice_value(task.teacher_device) == "cpu"
    faults.check(
        not on_cpu or dtype in ("same", "fp32"),
        f"--teacher-device cpu runs the teacher in fp32; --teacher-dtype {dtype} is not "
        "available there",
    )
    langs = None
    with faults.collecting():
        langs = two_languages(task.teacher_langs)
    before_target = parse_symbols(task.teacher_target_prefix)
    faults.check(
        before_target is None or before_target,
        "--teacher-target-prefix: expected one symbol or more, because a decoder has to begin with "
        "something; got none",
    )
    faults.raise_if_any()
    if not paths:
        return None
    return TeacherSettings(
        paths=paths,
        data=utils.split_paths(task.teacher_data) if task.teacher_data else (),
        weights=weights,
        overrides=overrides,
        dtype="fp32" if on_cpu else dtype,
        on_cpu=on_cpu,
        trust=task.teacher_trust_checkpoint,
        task=task.teacher_task,
        tags=AskedTags(
            family=choice_value(task.teacher_tags) if task.teacher_tags else None,
            languages=langs,
            before_source=parse_symbols(task.teacher_source_prefix),
            after_source=parse_symbols(task.teacher_source_suffix),
            before_target=before_target,
        ),
        user_dir=task.teacher_user_dir,
    )


def read_teachers(task: Any, pairs: Sequence[str]) -> List[TeacherSettings]:
    """Those of a task's flags for each of its pairs of languages, or its one; none if they name
    none.

    A flag has one value for all pairs, or one for each, as in ``de-en=A,fr-en=B``.

    Raises:
        UserError: as ``read_teacher``, or a pair has no teacher, or what is named is no pair.
    """
    faults, texts, default = Faults(), {}, TeacherConfig()
    for name in RUN_TEACHER if pairs else ():
        text = getattr(task, name)
        if isinstance(text, str) and _NAMES_PAIR.match(text):
            texts[name] = _by_pair(text, name, task, pairs, faults)
    faults.raise_if_any()
    found = []
    for pair in pairs or [""]:
        own = {name: of.get(pair, getattr(default, name)) for name, of in texts.items()}
        found.append(read_teacher(Namespace(**{**_flags(task), **own})))
    return [one for one in found if one is not None]


def read_caches(task: Any, pairs: Sequence[str]) -> List[str]:
    """Those of ``--teacher-cache`` for each of a task's pairs of languages, or its one.

    Raises:
        UserError: a pair has none, or what is named is no pair.
    """
    text, faults = task.teacher_cache, Faults()
    if pairs and _NAMES_PAIR.match(text):
        found = _by_pair(text, "teacher_cache", task, pairs, faults)
        faults.raise_if_any()
        return [found[pair] for pair in pairs]
    if len(pairs) > 1:
        example = ",".join(f"{pair}=DIR" for pair in pairs)
        raise UserError(
            f"--teacher-cache: expected a cache for each pair of languages, as in {example}; got "
            f"{text!r}"
        )
    return [text]


_NAMES_PAIR = re.compile(r"\s*([^\s=,:/]+-[^\s=,:/]+)=")


def _by_pair(
    text: str, name: str, task: Any, pairs: Sequence[str], faults: Faults
) -> Dict[str, str]:
    """The values of a flag, by pair; a value may have commas.

    Args:
        task: its configuration.
        pairs: its own, each of which needs a teacher. A flag may also name others that are trained,
            in a validation.
    """
    found: Dict[str, str] = {}
    flag = "--" + name.replace("_", "-")
    trained = [*dict.fromkeys((*task.lang_pairs, *pairs))]
    for part in re.split(r",(?=" + _NAMES_PAIR.pattern.replace("(", "(?:") + ")", text):
        pair, _, value = part.strip().partition("=")
        faults.check(pair not in found, f"{flag} names {pair} twice")
        faults.check(
            pair in trained,
            f"{flag} names {pair}, which is none of --lang-pairs {','.join(trained)}",
        )
        found[pair] = value
    what = {"teacher_checkpoint_path": "teacher", "teacher_cache": "cache"}.get(name)
    without = ", ".join(pair for pair in pairs if not found.get(pair))
    faults.check(
        not (what and without),
        f"{flag} names no {what} for {without}: every pair of --lang-pairs needs one",
    )
    return found


def _flags(task: Any) -> Dict[str, Any]:
    return {name: getattr(task, name) for name in RUN_TEACHER}


def choice_value(value: Any) -> str:
    """A ChoiceEnum's value: fairseq keeps it as a string or as an enum, depending on the way in."""
    return str(getattr(value, "value", value))


def _faults_beside_cache(task: Any, criterion: Any) -> List[str]:
    """Flags of a teacher that is run mean nothing beside a cache, and it holds references alone."""
    default = TeacherConfig()
    useless = ", ".join(
        "--" + name.replace("_", "-")
        for name in RUN_TEACHER
        if choice_value(getattr(task, name)) != choice_value(getattr(default, name))
    )
    advice = f"leave out {useless}, or leave out --teacher-cache"
    faults = [f"with --teacher-cache no teacher is run: {advice}"] if useless else []
    inputs = choice_value(criterion.kd_inputs)
    if inputs != "reference":
        faults.append(
            f"--kd-inputs {inputs} asks the teacher about what the student writes, which no cache "
            "holds: give --teacher-checkpoint-path instead of --teacher-cache"
        )
    return faults


def _scope(criterion: Any, chosen: str, pairs: Sequence[str], faults: Faults) -> Sequence[str]:
    """The pairs of languages within each of which tokens are selected; none without."""
    if choice_value(criterion.kd_selection_scope) == "all":
        return ()
    faults.check(
        chosen in selection.WITH_RATE,
        f"--kd-selection-scope pair has no effect with --kd-selection {chosen}",
    )
    faults.check(pairs, "--kd-selection-scope pair is for tasks of several pairs of languages")
    return pairs


def _divergence(name: str, criterion: Any, faults: Faults) -> Divergence:
    """The divergence of the flags, with its parameter if it takes one."""
    found = divergences.divergence(name)
    for parameter in divergences.PARAMETERS:
        own = parameter is found.parameter
        value = _given(parameter, criterion, faults, own, f"--kd-divergence {name}")
        if own:
            found = divergences.divergence(name, value)
    return found


def _inputs(criterion: Any, faults: Faults) -> Inputs:
    kind, given = choice_value(criterion.kd_inputs), criterion.kd_inputs_rate
    schedule, where = criterion.kd_inputs_rate_schedule, f"--kd-inputs {kind}"
    flags = {
        "--kd-inputs-rate": given is not None,
        "--kd-inputs-rate-schedule": schedule != "constant",
    }
    for flag, is_given in flags.items():
        faults.check(kind != "reference" or not is_given, f"{flag} has no effect with {where}")
    return Inputs(
        kind,
        _scheduled(
            "--kd-inputs-rate",
            schedule,
            given,
            default=INPUTS_RATE,
            valid=lambda x: 0 <= x <= 1,
            expected="from 0 to 1",
            faults=faults,
        ),
        _given(INPUTS_TEMPERATURE, criterion, faults, kind == "sample", where),
        _given(INPUTS_EXTRA, criterion, faults, kind == "sample", where),
    )


def _given(parameter: Parameter, criterion: Any, faults: Faults, applies: bool, where: str) -> Any:
    """A parameter's value, its default where no flag gives it.

    Args:
        applies: whether it means anything with ``where``, the flag that it belongs to.
    """
    given = getattr(criterion, parameter.field)
    if given is None:
        return parameter.default
    if faults.check(applies, f"{parameter.flag} has no effect with {where}"):
        faults.check(
            parameter.valid(given), f"{parameter.flag} must be {parameter.expected}, got {given}"
        )
    return given


def _scheduled(
    flag: str,
    text: str,
    value: Optional[float],
    *,
    default: float,
    valid: Callable[[float], bool],
    expected: str,
    faults: Faults,
) -> Schedule:
    """The schedule of a weight, a temperature or a rate."""
    if text == "constant":
        value = default if value is None else value
        faults.check(valid(value), f"{flag} must be a number {expected}, got {value}")
        return schedules.constant(value)
    faults.check(value is None, f"{flag} {value} and {flag}-schedule {text} exclude each other")
    with faults.collecting():
        return schedules.parse(text, flag + "-schedule", valid, expected)
    return schedules.constant(default)


def two_languages(text: Optional[str]) -> Optional[Tuple[str, str]]:
    """``--teacher-langs``: a source and a target language, or None."""
    found = [part.strip() for part in (text or "").split(",")]
    if text is None:
        return None
    if len(found) != 2 or not all(found):
        raise UserError(
            f"--teacher-langs: expected two languages as in deu_Latn,eng_Latn; got {text!r}"
        )
    return found[0], found[1]


def _weights(text: Optional[str], teachers: int) -> Optional[List[float]]:
    """``--teacher-weights``: a positive number for each teacher, commas between them, or None."""
    try:
        weights = [float(weight) for weight in text.split(",")] if text else None
    except ValueError:
        raise UserError(f"--teacher-weights needs numbers as in 2,1,1; got {text!r}") from None
    if weights and (len(weights) != teachers or not all(0 < w < math.inf for w in weights)):
        raise UserError(
            f"--teacher-weights needs one positive number for each of the {teachers} teachers, got "
            f"{weights}"
        )
    return weights
