"""What a report is asked to judge and what it finds, and what a test set must say of itself."""

import abc
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ..checkpoints import Kind
from ..teachers import Student
from . import metrics as columns
from .given import ScoreFile
from .measured import Measured, Sample
from .systems import Model, System, trained_for


class Asked(NamedTuple):
    """A report to make.

    Attributes:
        models: the models to judge, all of one kind: they translate, write down speech, or are
            language models.
        teacher: the model that the others are students of.
        baseline: the model that significance is tested against.
        options: fairseq-generate's, parsed, which name the task, the test set, the search and the
            device. Not fairseq's ``cfg``, as the other pipelines take it: that is made of them anew
            for each model, with the model's data and path.
        output: folder to write: ``report.json``, ``.md``, ``.html``, PNG files, ``translations``.
        beam: of the search; with ``greedy``, beam 1 beside it.
        repeats: passes over the data that are timed.
        reference: file with the raw references; None for those of the data-bin.
        metrics: what quality is measured by, of ``METRICS``; the first comes first in all tables
            and is what pictures show.
        tokenize: BLEU's, as sacrebleu's ``--tokenize``; None for the target language's.
        scores: files of scores that were computed elsewhere.
        test, samples: of significance: one of ``TESTS``, and how many samples it draws.
        logs: files of fairseq-train's logs, by name.
        examples: how many sentences to show from each end of every order; fewer where that would be
            more than ``MOST_EXAMPLES`` in all.
        train_sample: how many sentences of the training set to translate, too, for their length.
        for_scoring: folder to write source, references and translations to, for others to score.
        trust: open checkpoints with the full pickle machinery.
        overwrite: replace a report of other settings in ``output``.
    """

    models: Sequence[Model]
    teacher: Model
    baseline: Model
    options: Namespace
    output: str
    beam: int = 5
    greedy: bool = False
    repeats: int = 3
    reference: Optional[str] = None
    metrics: Sequence[str] = columns.USUAL
    tokenize: Optional[str] = None
    scores: Sequence[ScoreFile] = ()
    test: str = "bs"
    samples: int = 1000
    logs: Dict[str, str] = {}
    examples: int = 10
    train_sample: int = 500
    for_scoring: Optional[str] = None
    trust: bool = False
    overwrite: bool = False

    @property
    def trained_for(self) -> Optional[str]:
        """The models' task, whatever their checkpoints say; None is what those say."""
        return trained_for(self.options)

    def systems(self) -> List[System]:
        beams = [self.beam, *([1] if self.greedy and self.beam != 1 else [])]
        return [System(model, beam, beam == self.beam) for model in self.models for beam in beams]


class Results(NamedTuple):
    """What there is to report on.

    Attributes:
        measured: by model's name.
        failures: why a model failed, by its name.
    """

    asked: Asked
    data: "TestSet"
    measured: Dict[str, Measured]
    failures: Dict[str, str]

    def outcomes(self, system: System) -> List[Any]:
        return self.measured[system.model.name].outcomes[system.beam]

    def systems(self) -> List[System]:
        """Those of models that did not fail."""
        return [s for s in self.asked.systems() if s.model.name not in self.failures]

    def baseline(self) -> System:
        """What the others are compared with: another one if the baseline itself failed."""
        systems = self.systems()
        return next((s for s in systems if s.main and s.model == self.asked.baseline), systems[0])


class Judged(NamedTuple):
    """How good systems are.

    Attributes:
        metrics: what quality is measured by, the most important first: "name", "source",
            "lower_is_better", "at_a_glance" of each.
        signatures: of each metric, by its name: how it is computed.
        rows: by system's name, what its row says of it, "scores" among it.
        more: what else the report says.
    """

    metrics: List[Dict[str, Any]]
    signatures: Dict[str, str]
    rows: Dict[str, Dict[str, Any]]
    more: Dict[str, Any]


class Worth(NamedTuple):
    """How good sentences are by one measure.

    Attributes:
        name: of the measure.
        lower_is_better: what its values mean.
        decimals: that are shown of them.
        values: of each sentence, by system's name; perhaps not of all systems.
    """

    name: str
    lower_is_better: bool
    decimals: int
    values: Mapping[str, Sequence[float]]


class TestSet(abc.ABC):
    """The data that models of one kind are judged on. All that differs between kinds is here.

    Attributes:
        kind: of models.
        cfg: fairseq's configuration.
        task: fairseq's, which has read the data.
        folder: the data-bin.
        dataset: of sentences or blocks, to be batched.
        student: what models must fit to be compared.
        sample: of the training set, to be judged, too; None without one.
        speed: the entry of a row that speeds are compared by.
        kinds: of tokens, by which differences from the teacher are told.
    """

    kind: Kind
    cfg: Any
    task: Any
    folder: Path
    dataset: Any
    student: Student
    sample: Optional[Sample] = None
    speed: str
    kinds: Sequence[str]

    @abc.abstractmethod
    def describe(self, asked: Asked) -> Dict[str, Any]:
        """What the report says of the data."""

    @abc.abstractmethod
    def settings(self) -> Dict[str, Any]:
        """What outcomes depend on, beside model and device, as plain types."""

    def settings_of(self, model: Model) -> Dict[str, Any]:
        """The same of a data-bin of the model's own."""
        return {}

    @abc.abstractmethod
    def notes(self, results: Results) -> List[str]:
        """What a reader of the costs should know."""

    @abc.abstractmethod
    def judge(self, results: Results, baseline: System) -> Judged:
        """Quality of all that did not fail.

        Args:
            baseline: what the others are compared with.
        """

    def refuse_comparison(self, model: Model) -> None:  # noqa: B027
        """Refuse to compare a model with another token by token.

        Raises:
            UserError: the data cannot tell.
        """

    @abc.abstractmethod
    def batches(self, limits: Sequence[Tuple[int, int]]) -> Iterator[Dict[str, Any]]:
        """Batches of what no model finds too long, with references.

        Args:
            limits: longest source and target of each model.
        """

    @abc.abstractmethod
    def training_set(self) -> Optional[Any]:
        """The target side of the training sentences; None where there is none."""

    def texts(self, i: int) -> Dict[str, Optional[str]]:
        """A sentence to show: "source" and "reference"; None is nothing to show."""
        return {"source": None, "reference": None}

    def said(self, i: int, results: Results, system: System) -> Optional[str]:
        """What a system makes of it; None is nothing to show."""
        return None

    @abc.abstractmethod
    def worth(self, results: Results) -> List[Worth]:
        """How good each sentence is, by one measure after the other."""

    def files(self, results: Results) -> Dict[str, Sequence[str]]:
        """Lines to write, by name."""
        return {}

    def for_scoring(self, results: Results) -> Dict[str, Sequence[str]]:
        """Lines that others need to score translations, by name."""
        return {}
