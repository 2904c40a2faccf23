"""How good translations are: scores, with sacreBLEU's intervals and tests of significance."""

from typing import Any, Dict, List, Sequence, Tuple

from sacrebleu.metrics.base import Metric
from sacrebleu.significance import PairedTest

from ..decoding import Tokenizer
from . import metrics as columns

TESTS = {"bs": "paired bootstrap resampling", "ar": "paired approximate randomisation"}
_RESAMPLES = 1000  # of the confidence intervals, as sacrebleu --confidence


def score(
    translations: Dict[str, List[str]],
    references: Sequence[str],
    *,
    baseline: str,
    tokenizer: Tokenizer,
    test: str,
    samples: int,
    metrics: Sequence[str] = columns.USUAL,
) -> Tuple[Dict[str, Dict[str, Any]], Dict[str, str]]:
    """Corpus scores of several systems, and the significance of their difference from a baseline.

    Args:
        translations: running text by system, as many lines as there are references.
        baseline: the system that the others are compared with (Koehn 2004 for the bootstrap,
            Riezler & Maxwell 2005 for approximate randomisation).
        tokenizer: what tells words apart.
        test: one of ``TESTS``.
        samples: how many the test draws.
        metrics: of ``metrics.METRICS``.

    Returns:
        by system ``length_ratio``, and by system and metric ``score``, the ``mean`` and half-width
        ``ci`` of its 95% interval, the p-value ``p`` of the comparison with the baseline (None for
        the baseline itself, and for translations ``identical`` to its, where resampling would say
        1 / (samples + 1)); and the signature of each metric.
    """
    made = columns.make(metrics, tokenizer)
    scores = _scores(translations, references, made, baseline=baseline, test=test, samples=samples)
    for system, text in translations.items():
        scores[system]["length_ratio"] = tokenizer.length_ratio(text, references)
        scores[system]["identical"] = system != baseline and text == translations[baseline]
    return scores, {name: f"{name} {metric.get_signature()}" for name, metric in made.items()}


def average(
    metric: str, values: Dict[str, List[float]], *, baseline: str, test: str, samples: int
) -> Dict[str, Dict[str, Any]]:
    """Means over sentences, with the same intervals and tests.

    Args:
        metric: what they are called.
        values: of each sentence, by system.
        baseline: None of the others is tested if it is not among these.

    Returns:
        by system ``score``, ``mean``, ``ci`` and ``p`` as ``score`` has them, and whether it is
        ``identical`` to the baseline in every sentence.
    """
    # sacreBLEU reads text alone, and resamples what its metrics find in it
    texts = {system: list(map(repr, own)) for system, own in values.items()}
    nothing = [""] * max(map(len, texts.values()))
    mean = {metric: columns.mean_of(metric)}
    found = _scores(texts, nothing, mean, baseline=baseline, test=test, samples=samples)
    return {
        system: {
            **own[metric],
            "identical": system != baseline and values[system] == values.get(baseline),
        }
        for system, own in found.items()
    }


def _scores(
    texts: Dict[str, List[str]],
    references: Sequence[str],
    made: Dict[str, Metric],
    *,
    baseline: str,
    test: str,
    samples: int,
) -> Dict[str, Dict[str, Any]]:
    """By system and metric, as ``score`` returns them."""
    scores: Dict[str, Dict[str, Any]] = {system: {} for system in texts}
    for name, metric in made.items():
        for system, text in texts.items():
            found = metric.corpus_score(text, [references], n_bootstrap=_RESAMPLES)
            scores[system][name] = {
                "score": float(found.score),
                "mean": float(found._mean),
                "ci": float(found._ci),
                "p": None,
            }
    base = texts.get(baseline)
    others = [(system, text) for system, text in texts.items() if text != base]
    if base is not None and others:
        systems: List[Tuple[str, Sequence[str]]] = [(baseline, base), *others]
        tested = PairedTest(systems, made, [references], test, samples)()[1]
        for name in made:
            for one, result in zip(tested["System"], tested[name]):
                p = result.p_value  # type: ignore[union-attr]
                scores[str(one)][name]["p"] = None if p is None else float(p)
    return scores
