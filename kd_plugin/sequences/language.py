"""Whether a text is in the language that it should be in, as far as a small model can tell."""

from typing import Any, Dict, Sequence

from ..errors import UserError

OWN_LANGUAGES = ("", "")  # those of the data
_SHORT = 20  # characters; of shorter ones nobody can tell: half of single words are taken wrongly


def _plain(code: str) -> str:
    """Both written forms of Norwegian are one language here."""
    return "no" if code in ("nb", "nn") else code


class Languages:
    """The languages of source and target, told by the package py3langid.

    Args:
        codes: of source and target, as the data have them ("de", "de_DE").

    Raises:
        UserError: the package is not there, or does not know one of them.
    """

    def __init__(self, codes: Sequence[str]) -> None:
        try:
            import py3langid
        except ImportError:
            raise UserError(
                "--languages needs the package py3langid: pip install 'kd_plugin[languages]'"
            ) from None
        self._classify: Any = py3langid.classify
        known = {code for code, _ in py3langid.rank("")}
        self.codes = [_plain(code.replace("-", "_").split("_")[0].lower()) for code in codes]
        unknown = [code for code, own in zip(codes, self.codes) if own not in known]
        if unknown:
            raise UserError(
                f"--languages: py3langid does not know {' and '.join(unknown)}; expected two of "
                f"{', '.join(sorted(known))}: give --languages SOURCE,TARGET"
            )
        self._last: Dict[int, Any] = {}

    def wrong(self, texts: Sequence[str]) -> bool:
        """Whether source or target is in another language than its own."""
        return any(self._wrong(side, text) for side, text in enumerate(texts))

    def _wrong(self, side: int, text: str) -> bool:
        if len(text) < _SHORT:
            return False
        # the hypotheses of a sentence have one source
        if self._last.get(side, ("", False))[0] != text:
            found = self._classify(text)[0]
            self._last[side] = text, _plain(found) != self.codes[side]
        return self._last[side][1]
