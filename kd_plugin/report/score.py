"""How good translations are: scores, with sacreBLEU's intervals and tests of significance."""

from typing import Any, Dict, List, Sequence, Tuple

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
    scores: Dict[str, Dict[str, Any]] = {}
    signatures: Dict[str, str] = {}
    for name, metric in made.items():
        for system, text in translations.items():
            found = metric.corpus_score(text, [references], n_bootstrap=_RESAMPLES)
            scores.setdefault(system, {})[name] = {
                "score": float(found.score),
                "mean": float(found._mean),
                "ci": float(found._ci),
                "p": None,
            }
        signatures[name] = f"{name} {metric.get_signature()}"

    others = {
        system: text
        for system, text in translations.items()
        if system != baseline and text != translations[baseline]
    }
    for system, text in translations.items():
        scores[system]["length_ratio"] = tokenizer.length_ratio(text, references)
        scores[system]["identical"] = system != baseline and text == translations[baseline]
    if others:
        systems: List[Tuple[str, Sequence[str]]] = [(baseline, translations[baseline])]
        systems += others.items()
        found = PairedTest(systems, made, [references], test, samples)()[1]
        for name in made:
            for system, result in zip(found["System"], found[name]):
                p = result.p_value  # type: ignore[union-attr]
                scores[str(system)][name]["p"] = None if p is None else float(p)
    return scores, signatures
