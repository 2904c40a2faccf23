"""What a task adds to the data's dictionaries and sentences before its model reads them."""

from typing import Any, List, Mapping, NamedTuple, Sequence, Tuple

from fairseq.data import Dictionary

# mBART's: tags of languages behind both sides
PRETRAINED_BART = "translation_from_pretrained_bart"

_BOS, _EOS = Dictionary().bos_word, Dictionary().eos_word


class Tags(NamedTuple):
    """Symbols that a model reads beside those of a sentence pair.

    Attributes:
        before_source, after_source: around the source with its end of sentence.
        before_target: what the decoder begins with, before the target.
    """

    before_source: Tuple[str, ...] = ()
    after_source: Tuple[str, ...] = ()
    before_target: Tuple[str, ...] = (_EOS,)

    @property
    def longer(self) -> Tuple[int, int]:
        """By how many tokens its source and its decoder's input are longer than the sentences."""
        return len(self.before_source) + len(self.after_source), len(self.before_target) - 1


def added_symbols(task: Any, options: Mapping[str, Any]) -> List[str]:
    """The symbols that a task puts behind those of the dictionaries' files, unless they are there.

    Args:
        task: its name; ``options``: its configuration.
    """
    if task != PRETRAINED_BART:
        return []
    return [*map(_tag, languages(options)), "<mask>"]


def languages(options: Mapping[str, Any]) -> List[str]:
    """Those of ``PRETRAINED_BART``."""
    return str(options.get("langs") or "").split(",")


def tags(task: Any, options: Mapping[str, Any], pair: Sequence[str]) -> Tags:
    """What a task adds to sentences of these two languages."""
    if task != PRETRAINED_BART:
        return Tags()
    begin = (_BOS,) if options.get("prepend_bos") else ()
    source, target = map(_tag, pair)
    return Tags(begin, (source,), (target, *begin))


def _tag(language: str) -> str:
    return f"[{language}]"
