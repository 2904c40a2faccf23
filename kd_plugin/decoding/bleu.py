"""The words that BLEU counts: sacreBLEU's tokenizer for the target language."""

import re
from typing import Any, List, NamedTuple, Optional, Sequence

from sacrebleu.metrics import BLEU

from ..errors import UserError

# sacreBLEU's own rule, for every code by which these languages go: zho_Hans, zh_CN, cmn, ...
_DEFAULT = "13a"
_TOKENIZERS = {"zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}
_CODES = {
    "zh": ("zh", "zho", "chi", "cmn", "yue", "wuu", "nan", "hak", "gan", "lzh", "cn"),
    "ja": ("ja", "jpn", "jp"),
    "ko": ("ko", "kor"),
}
# Thai, Lao, Tibetan, Burmese, Khmer, Chinese and Japanese with their punctuation
_UNSPACED = re.compile(
    "[\u0e00-\u109f\u1780-\u17ff\ua9e0-\ua9ff\uaa60-\uaa7f"
    "\u3000-\u30ff\u3400-\u9fff\uff00-\uffef\U00020000-\U0003ffff]{8,}"
)
_LOOKED_AT = 1000  # sentences


class Tokenizer(NamedTuple):
    """What tells the words of a language apart.

    Attributes:
        name: of sacreBLEU's ``--tokenize``.
        asian: whether TER, too, has to split Chinese characters.
        note: what the user should know of the choice.
        asked: whether it was chosen by name.
    """

    name: str = _DEFAULT
    asian: bool = False
    note: Optional[str] = None
    asked: bool = False

    @classmethod
    def of(cls, lang: str, asked: Optional[str] = None) -> "Tokenizer":
        """The one that was asked for or, without that, the language's.

        Raises:
            UserError: what was asked for is unknown, or cannot be used here.
        """
        code = language(lang)
        name = asked or _TOKENIZERS.get(code, _DEFAULT)
        asian = code in ("zh", "ja") or name in ("zh", "ja-mecab")
        try:
            BLEU(tokenize=name)
        except (KeyError, RuntimeError, ImportError, OSError, AssertionError) as error:
            if asked is not None:
                wrong = f"expected one of {', '.join(BLEU.TOKENIZERS)}"
                if asked in BLEU.TOKENIZERS:
                    wrong = f"sacreBLEU cannot use it here: {' '.join(str(error).split())}"
                raise UserError(f"--bleu-tokenize {asked}: {wrong}") from None
            return cls(
                "char",
                asian,
                f"BLEU of {lang} COUNTS CHARACTERS, not words, and is not comparable with others': "
                f"sacreBLEU's tokenizer {name} cannot be used here (pip install "
                f"'sacrebleu[{code}]'). --bleu-tokenize chooses another.",
            )
        return cls(name, asian, asked=asked is not None)

    @property
    def is_usual(self) -> bool:
        """Whether it is sacreBLEU's for languages without one of their own, unasked."""
        return self.name == _DEFAULT and not self.asked

    def metric(self, **options: Any) -> BLEU:
        return BLEU(tokenize=self.name, **options)

    def length_ratio(self, texts: Sequence[str], references: Sequence[str]) -> float:
        """Words of the texts divided by those of the references."""
        split = self.metric().tokenizer
        length, expected = (
            sum(len(split(line.rstrip()).split()) for line in lines)
            for lines in (texts, references)
        )
        return length / max(expected, 1)

    def notes(self, references: Sequence[str]) -> List[str]:
        """What a user should know before believing a BLEU on these references."""
        split = self.metric().tokenizer
        tokens = [token for text in references[:_LOOKED_AT] for token in split(text).split()]
        long = sum(len(run) for token in tokens for run in _UNSPACED.findall(token))
        found = [self.note] if self.note else []
        if 2 * long > sum(map(len, tokens)):
            found.append(
                "WORDS CANNOT BE TOLD APART: the references have no spaces between them, and "
                f"sacreBLEU's tokenizer {self.name} does not split them, so BLEU compares whole "
                "phrases, and so may TER. chrF needs no words; --bleu-tokenize flores200 (which "
                "sacreBLEU downloads), char or, for Chinese, zh splits them."
            )
        return found


def language(code: str) -> str:
    """zh, ja or ko, if a code of fairseq's, FLORES's or mBART's is of one of them; else nothing."""
    first, *rest = re.findall("[a-z]+", code.lower()) or [""]
    found = [name for name, codes in _CODES.items() if first in codes and "latn" not in rest]
    return found[0] if found else ""
