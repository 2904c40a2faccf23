"""What a model reads beside the sentences of the data: tags of languages, mostly.

Which, its task says, or the convention of a family of models, or flags.
"""

import difflib
import re
from typing import (
    Any,
    Collection,
    Dict,
    Iterable,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

from fairseq.data import Dictionary

from .dictionaries import VocabularyError

PRETRAINED_BART = "translation_from_pretrained_bart"  # mBART's: tags behind both sides
SIMPLE_EPOCH = "translation_multi_simple_epoch"  # tags before both sides, or at their ends' place
EACH_DIRECTION = "multilingual_translation"  # tags in the place of ends, a model for each direction
MULTILINGUAL = (PRETRAINED_BART, SIMPLE_EPOCH, EACH_DIRECTION)

_BOS, _EOS = Dictionary().bos_word, Dictionary().eos_word
_MASK = "<mask>"
_STYLES = {"multilingual": "__{}__", "mbart": "[{}]"}
# what fairseq's branch nllb adds with --add-data-source-prefix-tags
_DATA_SOURCES = ("<MINED_DATA>", "<MMT_BT_DATA>", "<SMT_BT_DATA>")
_NEAREST = 3  # symbols to name in a message


class Tags(NamedTuple):
    """Symbols that a model reads beside those of a sentence pair.

    Attributes:
        before_source: before the source.
        after_source: behind it, in the place of its end of sentence.
        before_target: what the decoder begins with, before the target.
    """

    before_source: Tuple[str, ...] = ()
    after_source: Tuple[str, ...] = (_EOS,)
    before_target: Tuple[str, ...] = (_EOS,)

    @property
    def longer(self) -> Tuple[int, int]:
        """By how many tokens its source and its decoder's input are longer than the sentences."""
        return len(self.before_source) + len(self.after_source) - 1, len(self.before_target) - 1

    def __str__(self) -> str:
        source = " ".join((*self.before_source, "...", *self.after_source))
        return f"reads {source}, writes after {' '.join(self.before_target)}"

    def refuse_lacking(self, source: Sequence[str], target: Sequence[str], owner: str) -> None:
        """Refuse symbols that a model does not know.

        Args:
            source, target: those that it knows; ``owner``: what messages call it.

        Raises:
            VocabularyError: one is lacking; the message names those that are written most alike.
        """
        for side, symbols, known in (
            ("source", self.before_source + self.after_source, source),
            ("target", self.before_target, target),
        ):
            for symbol in symbols:
                if symbol not in known:
                    raise VocabularyError(
                        f"{owner}: its {side} dictionary ({len(known)} symbols) lacks the tag "
                        f"{symbol!r}{_alike(symbol, known)}"
                    )


class AskedTags(NamedTuple):
    """What flags say of tags; None leaves it to the model's task.

    Attributes:
        family: of models whose convention holds, one of ``FAMILIES``.
        languages: what the model calls the source and the target language.
        before_source, after_source, before_target: in the place of those of the family or task.
    """

    family: Optional[str] = None
    languages: Optional[Tuple[str, str]] = None
    before_source: Optional[Tuple[str, ...]] = None
    after_source: Optional[Tuple[str, ...]] = None
    before_target: Optional[Tuple[str, ...]] = None

    def instead_of(self, own: Tags) -> Tags:
        """The lists that are asked for, and the others of ``own``."""
        asked = {name: getattr(self, name) for name in Tags._fields}
        return own._replace(**{name: one for name, one in asked.items() if one is not None})


def parse_symbols(text: Optional[str]) -> Optional[Tuple[str, ...]]:
    """The symbols that a flag lists, with spaces or commas between; None of None."""
    return None if text is None else tuple(part for part in re.split(r"[\s,]+", text) if part)


# Families of models whose convention is known


class _Family(NamedTuple):
    code: str  # of a language, as a pattern
    forms: Tuple[str, ...]  # of a tag, in one toolkit or another
    example: str


# All of them put the source's tag before the source, and have the decoder begin with the end of
# sentence and the target's tag: Fan et al. 2021, section 3; NLLB Team 2022, section 6.1.1 (older
# tokenizers of NLLB put the source's tag last, by mistake); Tang et al. 2020, section 3.
_FAMILIES = {
    "m2m": _Family("[a-z]{2,3}", ("__{}__",), "de"),
    "nllb": _Family("[a-z]{3}_[A-Z][a-z]{3}", ("{}", "__{}__"), "deu_Latn"),
    "mbart50": _Family("[a-z]{2}_[A-Z]{2}", ("{}", "[{}]", "__{}__"), "de_DE"),
}
FAMILIES = tuple(_FAMILIES)


def family_tags(
    family: str, languages: Sequence[str], source: Collection[str], target: Collection[str]
) -> Tags:
    """The tags of a family of multilingual models: M2M-100, NLLB-200, mBART-50.

    Source: ``__de__ ... </s>``; the decoder's input: ``</s> __en__ ...``; with the family's codes,
    in fairseq's or in Hugging Face's form, whichever the model's symbols have.

    Args:
        family: one of ``FAMILIES``.
        languages: source and target: a code of the family's, or what it begins with before its
            first ``_``: ``deu`` for ``deu_Latn``, ``de`` for ``de_DE``.
        source, target: the model's symbols.

    Raises:
        VocabularyError: none of the model's symbols is a tag of the language, or several are.
    """
    kind = _FAMILIES[family]

    def tag(language: str, side: str, symbols: Collection[str]) -> str:
        found: Dict[str, str] = {}  # codes, and their symbols
        for form in kind.forms:
            pattern = re.compile(re.escape(form).replace(r"\{\}", f"({kind.code})"))
            for symbol in symbols:
                match = pattern.fullmatch(symbol)
                if match:
                    found.setdefault(match[1], symbol)
        if not found:
            raise VocabularyError(
                f"the model's {side} dictionary has no tags of {family}: expected symbols as "
                f"{' or '.join(form.format(kind.example) for form in kind.forms)}"
            )
        return found[name_of(language, sorted(found), f"the {side}'s tags of {family}")]

    return Tags(
        before_source=(tag(languages[0], "source", source),),
        before_target=(_EOS, tag(languages[1], "target", target)),
    )


def name_of(language: str, known: Sequence[str], whose: str) -> str:
    """What a model calls a language: by the same name, or by the only one that begins with it and
    ``_``. Nothing else is safe: of NLLB's, ``est_Latn`` alone begins with ``es``.

    Args:
        known: names of languages; ``whose``: they are, for messages.

    Raises:
        VocabularyError: it is none of them, or several.
    """
    longer = [name for name in known if name.startswith(language + "_")]
    if language in known:
        return language
    if len(longer) == 1:
        return longer[0]
    if longer:
        raise VocabularyError(f"{language} may be {' or '.join(longer)} of {whose}: name one")
    alike = [name for name in known if name.startswith(language[:2])]
    listed = alike or difflib.get_close_matches(language, known, 8, 0.4) or known
    some = ", ".join(listed[:8]) + (", ..." if len(listed) > 8 or len(known) > len(listed) else "")
    raise VocabularyError(f"{language} is none of {whose} ({some}): name the one that it is")


def nearest(symbol: str, known: Iterable[str]) -> List[str]:
    """The few symbols that are most like one, the likest first."""
    # comparing a symbol with hundreds of thousands takes seconds, and most are far too short
    near = [other for other in known if abs(len(other) - len(symbol)) <= len(symbol) // 2]
    return difflib.get_close_matches(symbol, near, _NEAREST, 0.5)


def _alike(symbol: str, known: Sequence[str]) -> str:
    found = nearest(symbol, known)
    return f"; nearest are {', '.join(map(repr, found))}" if found else ""


# Tasks


def listed(names: Any) -> List[str]:
    """What a flag of fairseq's lists; some are split when they are read, others later."""
    parts = names.split(",") if isinstance(names, str) else [*(names or ())]
    return [part.strip() for part in map(str, parts) if part.strip()]


def languages(task: Any, options: Mapping[str, Any]) -> List[str]:
    """Those that a multilingual task knows; none where a file lists them, or of other tasks."""
    if task in (PRETRAINED_BART, SIMPLE_EPOCH) and options.get("langs"):
        return listed(options["langs"])
    if task == EACH_DIRECTION or (task == SIMPLE_EPOCH and not options.get("lang_dict")):
        pairs = [pair.split("-") for pair in listed(options.get("lang_pairs"))]
        return sorted({name for pair in pairs for name in pair})
    return []


def added_symbols(task: Any, options: Mapping[str, Any]) -> List[str]:
    """The symbols that a task puts behind those of the dictionaries' files, unless they are there.

    Args:
        task: its name; ``options``: its configuration.
    """
    known = languages(task, options)
    if task == PRETRAINED_BART:
        return [*(_STYLES["mbart"].format(name) for name in known), _MASK]
    if task == EACH_DIRECTION and (options.get("encoder_langtok") or _tags_target(options)):
        return [_STYLES["multilingual"].format(name) for name in known]
    if task != SIMPLE_EPOCH:
        return []
    kinds = listed(options.get("langtoks_specs")) or ["main"]
    added = [_tag(name, options, kind) for kind in kinds for name in known]
    if options.get("lang_tok_style") == "mbart" or "mono_dae" in (options.get("extra_data") or ()):
        added.append(_MASK)
    return [*added, *(_DATA_SOURCES if options.get("add_data_source_prefix_tags") else ())]


def tags_of(task: Any, options: Mapping[str, Any], pair: Sequence[str]) -> Tags:
    """What a task adds to sentences of these two languages."""
    if task == PRETRAINED_BART:
        begin = (_BOS,) if options.get("prepend_bos") else ()
        source, target = map(_STYLES["mbart"].format, pair)
        return Tags(begin, (_EOS, source), (target, *begin))
    if task not in (SIMPLE_EPOCH, EACH_DIRECTION):
        return Tags()
    source_kind, target_kind = options.get("encoder_langtok"), _tags_target(options) and "tgt"
    if task == SIMPLE_EPOCH:
        own = options.get("langtoks") or {}
        source_kind, target_kind = own.get("main") or (source_kind, target_kind)
    replacing = task == EACH_DIRECTION or options.get("lang_tok_replacing_bos_eos")
    found = Tags()
    if source_kind:
        tag = (_tag(pair[not source_kind.startswith("src")], options, source_kind),)
        found = found._replace(**{"after_source" if replacing else "before_source": tag})
    if target_kind:
        tag = (_tag(pair[1], options, target_kind),)
        found = found._replace(before_target=tag if replacing else (_EOS, *tag))
    return found


def _tags_target(options: Mapping[str, Any]) -> bool:
    return bool(options.get("decoder_langtok"))


def _tag(language: str, options: Mapping[str, Any], kind: str) -> str:
    """The tag of a language in data of one kind: ``main``, or by its last letters."""
    for end in ("dae", "mined"):
        if kind.endswith(end):
            language = f"{language}_{end}"
            break
    style = options.get("lang_tok_style") or "multilingual"
    if style not in _STYLES:
        raise VocabularyError(f"no tags of languages have the style {style!r}")
    return _STYLES[style].format(language)
