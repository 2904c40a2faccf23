"""How good translations are: sacreBLEU's scores, intervals and significance."""

from typing import Any, Dict, List, Sequence, Tuple

from sacrebleu.metrics import CHRF, TER
from sacrebleu.significance import PairedTest

from ..decoding import Tokenizer

METRICS = ("BLEU", "chrF2", "TER")
TESTS = {"bs": "paired bootstrap resampling", "ar": "paired approximate randomisation"}
_RESAMPLES = 1000  # of the confidence intervals, as sacrebleu --confidence


class _CHRF(CHRF):
    """With scores of one type: sacreBLEU's bootstrap stops where some samples score 0.0."""

    def _compute_f_score(self, statistics: Any) -> float:
        return float(super()._compute_f_score(statistics))


def score(
    translations: Dict[str, List[str]],
    references: Sequence[str],
    *,
    baseline: str,
    tokenizer: Tokenizer,
    test: str,
    samples: int,
) -> Tuple[Dict[str, Dict[str, Any]], Dict[str, str]]:
    """Corpus scores of several systems, and the significance of their difference from a baseline.

    Args:
        translations: running text by system, as many lines as there are references.
        baseline: the system that the others are compared with (Koehn 2004 for the bootstrap,
            Riezler & Maxwell 2005 for approximate randomisation).
        tokenizer: BLEU's.
        test: one of ``TESTS``.
        samples: how many the test draws.

    Returns:
        by system and metric ``score``, the ``mean`` and half-width ``ci`` of its 95% interval, the
        p-value ``p`` of the comparison with the baseline (None for the baseline itself, and for
        translations ``identical`` to its, where resampling would say 1 / (samples + 1)); and the
        signature of each metric.
    """

    def metrics() -> Dict[str, Any]:
        asian = tokenizer.asian  # split only where the text is normalised, too
        ter = TER(normalized=asian, asian_support=asian)
        return {"BLEU": tokenizer.metric(), "chrF2": _CHRF(), "TER": ter}

    scores: Dict[str, Dict[str, Any]] = {}
    signatures: Dict[str, str] = {}
    for name, metric in metrics().items():
        for system, text in translations.items():
            found = metric.corpus_score(text, [references], n_bootstrap=_RESAMPLES)
            scores.setdefault(system, {})[name] = {
                "score": float(found.score),
                "mean": float(found._mean),
                "ci": float(found._ci),
                "p": None,
            }
            if name == "BLEU":
                scores[system]["length_ratio"] = found.sys_len / max(found.ref_len, 1)
        signatures[name] = f"{name} {metric.get_signature()}"

    others = {
        system: text
        for system, text in translations.items()
        if system != baseline and text != translations[baseline]
    }
    for system, text in translations.items():
        scores[system]["identical"] = system != baseline and text == translations[baseline]
    if others:
        systems: List[Tuple[str, Sequence[str]]] = [(baseline, translations[baseline])]
        systems += others.items()
        found = PairedTest(systems, metrics(), [references], test, samples)()[1]
        for name in METRICS:
            for system, result in zip(found["System"], found[name]):
                p = result.p_value  # type: ignore[union-attr]
                scores[str(system)][name]["p"] = None if p is None else float(p)
    return scores, signatures
