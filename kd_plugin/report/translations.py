"""Translations of a test set: what a report of models that translate says of them."""

import hashlib
import json
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from fairseq import utils
from omegaconf import OmegaConf

from .. import decoding
from ..checkpoints import TRANSLATION
from ..decoding import databin
from ..errors import UserError
from ..teachers import Student
from ..timing import Quartiles
from . import given
from . import metrics as columns
from .asked import Asked, Judged, Results, TestSet, Worth
from .measured import Sample
from .score import TESTS, average, score
from .systems import Model, System, configuration
from .tables import KL


class Translations(TestSet):
    """Sentences as fairseq reads them, and as text.

    Raises:
        UserError: the data or the references cannot be read, or are not there.
    """

    kind = TRANSLATION
    speed = "sentences_per_second"
    kinds: Sequence[str] = ("frequency", "position", "length", "entropy")
    own = "the data-bin's own references"

    def __init__(self, asked: Asked) -> None:
        self.asked, self.cfg = asked, configuration(asked.options)
        utils.import_user_module(self.cfg.common)
        self.references = self._references(self._read())
        self.tokenizer = decoding.Tokenizer.of(self.languages[1], asked.tokenize)
        self.doubts = columns.doubts(asked.metrics, self.tokenizer, self.references)
        systems = {system.file: system.name for system in asked.systems()}
        computed = [column["name"] for column in columns.describe(asked.metrics)]
        computed += [columns.of_sentences(asked.metrics, self.tokenizer)[0], KL]
        self.given = given.read(asked.scores, systems, len(self.source), computed)
        if asked.for_scoring is not None:
            given.check_folder(Path(asked.for_scoring), self._inputs(), list(systems))
        self.sample = self._sample()

    def _read(self) -> Optional[List[str]]:
        """Read the data, and take from them what does not depend on what is asked.

        Returns:
            their own references; None without any.
        """
        cfg = self.cfg
        self.task = task = decoding.set_up_task(cfg)
        langs = task.cfg.source_lang, task.cfg.target_lang
        self.bins = bins = decoding.DataBin(cfg.task.data, *langs)
        self.folder = bins.folder
        corpus = decoding.Corpus.of_subset(task, bins, cfg.dataset.gen_subset)
        self.dataset = corpus.dataset
        self.languages = langs
        self.student = Student(task.source_dictionary, task.target_dictionary, *langs)
        self._to_text, _ = decoding.text_functions(task, cfg, bins)
        self.source = self._texts(corpus.source, bins.source)
        own = corpus.references
        # whether the data-bin has references, which models are compared on
        self.binarised = own is not None
        return None if own is None else self._texts(own, bins.target, escape_unk=True)

    def _inputs(self) -> Dict[str, Sequence[str]]:
        """What a translation is judged by."""
        return {given.SOURCE: self.source, given.REFERENCE: self.references}

    def _texts(self, sentences: Any, dictionary: Any, escape_unk: bool = False) -> List[str]:
        indices = (sentences[i].tolist() for i in range(len(sentences)))
        return [
            self._to_text(databin.decode(dictionary, own, escape_unk=escape_unk)) for own in indices
        ]

    def _references(self, own: Optional[List[str]]) -> List[str]:
        file = self.asked.reference
        if file is not None:
            references = _read_lines(file)
            if len(references) != len(self.source):
                raise UserError(
                    f"--reference {file}: expected {len(self.source)} lines, as many as "
                    f"{self.cfg.dataset.gen_subset} has {self.kind.samples[0]}; got "
                    f"{len(references)}"
                )
            return references
        if own is None:
            raise UserError(
                f"{self.folder} has no {self.student.target_lang} references: give a file with "
                "--reference"
            )
        return own

    def _sample(self) -> Optional[Sample]:
        most = self.asked.train_sample
        if not most:
            return None
        corpus = decoding.Corpus.of_sample(self.task, self.bins, "train", most)
        if corpus is None or corpus.references is None:
            return None
        content = [one.tolist() for side in (corpus.source, corpus.references) for one in side]
        key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
        references = self._texts(corpus.references, self.bins.target, escape_unk=True)
        return Sample(most, key, references)

    def describe(self, asked: Asked) -> Dict[str, Any]:
        return {
            "languages": list(self.languages),
            self.kind.samples[0]: len(self.references),
            "references": asked.reference or self.own,
            "beam": asked.beam,
            "doubts": self.doubts,
        }

    def settings(self) -> Dict[str, Any]:
        generation = OmegaConf.to_container(self.cfg.generation)
        assert isinstance(generation, dict)
        return {
            **self._describe_data(),
            "generation": {k: v for k, v in generation.items() if k not in ("beam", "nbest")},
            "text": decoding.describe_text(self.cfg),
        }

    def _describe_data(self) -> Dict[str, Any]:
        """What translations depend on in the data, as plain types."""
        return self._describe(self.bins)

    def settings_of(self, model: Model) -> Dict[str, Any]:
        langs = model.langs or self.bins.langs
        renamed = f"--model-langs {model.name}={{}}"
        return self._describe(decoding.DataBin(model.data, *langs, renamed=renamed))

    def _describe(self, bins: decoding.DataBin) -> Dict[str, Any]:
        return decoding.describe(bins, self.cfg.dataset.gen_subset, None, self.cfg.task)

    def notes(self, results: Results) -> List[str]:
        asked, generation, notes = results.asked, self.cfg.generation, []
        refine = [name for name, one in results.measured.items() if one.facts.get("refines")]
        if refine:
            notes.append(
                f"Not autoregressive: {', '.join(refine)}. What they write is refined up to "
                f"{generation.iter_decode_max_iter} times; the beam is for the other models."
            )
        elif decoding.refining_flags(generation):
            notes.append(
                f"{', '.join(decoding.refining_flags(generation))}: without effect, all models are "
                "autoregressive."
            )
        good = [one for name, one in results.measured.items() if name not in results.failures]
        lines = (line for one in good for line in one.outcomes.get(asked.beam, ()) if line)
        marked = any("\u2581" in line or "@@ " in line for line in lines)
        if marked and not any(decoding.describe_text(self.cfg).values()):
            notes.append(
                "The translations are in SUBWORDS, so scores mean nothing: was --remove-bpe "
                "forgotten?"
            )
        return notes

    def judge(self, results: Results, baseline: System) -> Judged:
        asked, systems = results.asked, results.systems()
        scores, signatures = score(
            {one.name: [text or "" for text in results.outcomes(one)] for one in systems},
            self.references,
            baseline=baseline.name,
            tokenizer=self.tokenizer,
            test=asked.test,
            samples=asked.samples,
            metrics=asked.metrics,
        )
        for metric, values in self.given.items():
            signatures[metric] = f"{metric}, the mean of the sentences' scores"
            known = {one.name: values[one.name] for one in systems if one.name in values}
            if known:
                means = average(
                    metric, known, baseline=baseline.name, test=asked.test, samples=asked.samples
                )
            for one in systems:
                scores[one.name][metric] = means[one.name] if one.name in known else None
        return Judged(
            [*columns.describe(asked.metrics), *given.describe(self.given, asked.scores)],
            signatures,
            {one.name: self._row(one, results, scores[one.name], signatures) for one in systems},
            {
                "baseline": baseline.name,
                "significance": f"{TESTS[asked.test]}, {asked.samples:,} samples",
            },
        )

    def _row(
        self,
        system: System,
        results: Results,
        scores: Dict[str, Any],
        metrics: Dict[str, str],
    ) -> Dict[str, Any]:
        translations = results.outcomes(system)
        translated = sum(text is not None for text in translations)
        seconds = results.measured[system.model.name].seconds[system.beam]
        return {
            "scores": {metric: scores[metric] for metric in metrics},
            "length_ratio": scores["length_ratio"],
            "length_ratio_on_train": self._length_on_train(system, results),
            "identical": scores["identical"],
            "left_out": len(translations) - translated,
            self.speed: Quartiles.of([translated / s for s in seconds])._asdict(),
        }

    def _length_on_train(self, system: System, results: Results) -> Optional[float]:
        """Of the translations of the training set's sample over their references."""
        found = results.measured[system.model.name].sampled
        if self.sample is None or found is None or not system.main:
            return None
        both = zip(found[1], self.sample.references)
        pairs = [(text, own) for text, own in both if text is not None]
        if not pairs:
            return None
        translations, references = zip(*pairs)
        return self.tokenizer.length_ratio(translations, references)

    def refuse_comparison(self, model: Model) -> None:
        if not self.binarised:
            raise UserError("the data-bin has no references")

    def batches(self, limits: Sequence[Tuple[int, int]]) -> Iterator[Dict[str, Any]]:
        plan = decoding.plan(
            *(self.task, self.dataset, limits),
            max_tokens=self.cfg.dataset.max_tokens,
            max_sentences=self.cfg.dataset.batch_size,
            required_multiple=1,
            seed=self.cfg.common.seed,
        )
        return (self.dataset.collater([self.dataset[int(i)] for i in batch]) for batch in plan)

    def training_set(self) -> Optional[Any]:
        return self.bins.side("train", self.bins.langs[1])

    def texts(self, i: int) -> Dict[str, Optional[str]]:
        return {"source": self.source[i] or None, "reference": self.references[i]}

    def said(self, i: int, results: Results, system: System) -> Optional[str]:
        return results.outcomes(system)[i]

    def worth(self, results: Results) -> List[Worth]:
        name, lower, value = columns.of_sentences(results.asked.metrics, self.tokenizer)
        found = {
            system.name: [
                value(text or "", reference)
                for text, reference in zip(results.outcomes(system), self.references)
            ]
            for system in results.systems()
            if system.main
        }
        described = given.describe(self.given, results.asked.scores)
        return [
            Worth(name, lower, 2, found),
            *(
                Worth(one["name"], one["lower_is_better"], one["decimals"], self.given[one["name"]])
                for one in described
            ),
        ]

    def for_scoring(self, results: Results) -> Dict[str, Sequence[str]]:
        return {**self._inputs(), **self.files(results)}

    def files(self, results: Results) -> Dict[str, Sequence[str]]:
        return {
            f"{one.file}.txt": [line or "" for line in results.outcomes(one)]
            for one in results.systems()
        }


def _read_lines(path: str) -> List[str]:
    try:
        # only \n ends a line, as for fairseq
        with open(path, encoding="utf-8", newline="\n") as file:
            return [line.rstrip("\r\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--reference {path} cannot be read ({error})") from None
