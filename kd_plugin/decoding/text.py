"""Symbols and text: what is no text, what subwords spell, and back."""

import os
import re
from itertools import groupby
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

from fairseq.data import Dictionary, data_utils
from fairseq.data.audio.speech_to_text_dataset import SpeechToTextDataset
from omegaconf import DictConfig

from ..files import FileError, digest
from .databin import DataBin, words

_LANGUAGE = r"[a-z]{2,3}(?:_[A-Z][A-Za-z]{1,3})?"
# eng_Latn, __de__, __src__de__, [de_DE], <2de>, >>deu<<
_TAG = re.compile(
    rf"[a-z]{{3}}_[A-Z][a-z]{{3}}|__(?:(?:src|tgt)__)?{_LANGUAGE}__|\[[a-z]{{2,3}}_[A-Z]{{2}}\]"
    rf"|<2{_LANGUAGE}>|>>{_LANGUAGE}<<"
)
# How subwords are marked, and the flag that makes text of them
MARKS = {"\u2581": "--remove-bpe sentencepiece", "@@": "--remove-bpe"}
_ENOUGH = 0.05  # of the symbols with a mark; fewer are text
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_NO_UTF8 = re.compile("[\udc80-\udcff]")  # as Python's surrogateescape marks it


def added(task_has: Dictionary, data_has: Dictionary) -> List[int]:
    """Symbols that a task has put behind those of the data, such as languages and masks."""
    theirs = len(data_has)
    if task_has.symbols[:theirs] != data_has.symbols:
        return []
    return list(range(theirs, len(task_has)))


def split_tags(symbols: Sequence[str]) -> Tuple[List[str], List[str], List[str]]:
    """The tags of languages before a sentence, the sentence, and those behind it."""
    first, last = 0, len(symbols)
    if not last or not (_TAG.fullmatch(symbols[0]) or _TAG.fullmatch(symbols[-1])):
        return [], list(symbols), []
    while first < last and _TAG.fullmatch(symbols[first]):
        first += 1
    while last > first and _TAG.fullmatch(symbols[last - 1]):
        last -= 1
    return list(symbols[:first]), list(symbols[first:last]), list(symbols[last:])


def marks(symbols: Sequence[str]) -> List[str]:
    """Which of ``MARKS`` a dictionary's subwords have."""
    return [
        mark
        for mark in MARKS
        if sum(mark in symbol for symbol in symbols) >= max(1, _ENOUGH * len(symbols))
    ]


def spell(pieces: Sequence[str]) -> str:
    """What SentencePiece's own decoder makes of pieces; some may be bytes of a character.

    fairseq's leaves those as they are: ``<0xE2> <0x82> <0xAC>`` instead of the euro's sign.
    """
    text = "".join(pieces)
    if "<0x" not in text:
        return text.replace("\u2581", " ").strip()
    found = []
    for is_bytes, run in groupby(pieces, lambda piece: bool(_BYTE.fullmatch(piece))):
        if is_bytes:
            spelled = bytes(int(piece[3:5], 16) for piece in run)
            found.append(_NO_UTF8.sub("\ufffd", spelled.decode("utf-8", "surrogateescape")))
        else:
            found.append("".join(run).replace("\u2581", " "))
    return "".join(found).strip()


def remove_subwords(symbols: Sequence[str], post_process: Optional[str]) -> str:
    """Running text as fairseq's ``--post-process`` makes it."""
    if post_process == "sentencepiece":
        return spell(symbols)
    return data_utils.post_process(" ".join(symbols), post_process)


def text_functions(
    task: Any, cfg: Any, data: Optional[DataBin]
) -> Tuple[Callable[[str], str], Callable[[str], str]]:
    """From subwords to running text, as fairseq-generate does it, and back, as -interactive.

    Special symbols and tags of languages are no part of the text.

    Args:
        data: with the dictionaries as they are before the task adds to them; None for speech, whose
            dictionary has all.

    Raises:
        FileError: a model of subwords cannot be read.
    """
    try:
        bpe, tokenizer = task.build_bpe(cfg.bpe), task.build_tokenizer(cfg.tokenizer)
    except Exception as error:  # of the libraries that they are in
        raise FileError(
            f"--bpe or --tokenizer cannot be set up as {cfg.bpe} and {cfg.tokenizer}: "
            f"{' '.join(str(error).split())}"
        ) from error
    post_process = cfg.common_eval.post_process
    if bpe is not None and getattr(cfg.bpe, "_name", None) == "sentencepiece":
        post_process, decode = "sentencepiece", None  # which decodes all that the model encodes
    else:
        decode = None if bpe is None else bpe.decode
    target = task.target_dictionary
    if data is None:
        special = _special(target, target)
        special.update(filter(SpeechToTextDataset.is_lang_tag, target.symbols))
    else:
        special = _special(task.source_dictionary, data.source) | _special(target, data.target)

    def to_text(subwords: str) -> str:
        symbols = words(subwords)
        if not special.isdisjoint(symbols):
            symbols = [symbol for symbol in symbols if symbol not in special]
        _, symbols, _ = split_tags(symbols)
        text = remove_subwords(symbols, post_process)
        text = text if decode is None else decode(text)
        text = text if tokenizer is None else tokenizer.decode(text)
        # a subword model may know both, too; here they end a sentence
        return text.replace("\n", " ").replace("\r", " ")

    def to_subwords(text: str) -> str:
        text = text if tokenizer is None else tokenizer.encode(text)
        return " ".join((text if bpe is None else bpe.encode(text)).split())

    return to_text, to_subwords


def _special(task_has: Dictionary, data_has: Dictionary) -> Set[str]:
    """Symbols that mark something, and are no text."""
    found = {task_has[i] for i in added(task_has, data_has)}
    for index in (task_has.bos(), task_has.pad(), task_has.eos()):
        # a dictionary may say that its </s> is a word of the text
        if task_has.index(task_has[index]) == index:
            found.add(task_has[index])
    return found


def describe_text(cfg: Any) -> Dict[str, Any]:
    """What turns text into subwords and back: contents of models, not their paths."""
    found: Dict[str, Any] = {"remove_bpe": cfg.common_eval.post_process}
    for name in ("bpe", "tokenizer"):
        part = cfg[name]
        if part is not None:
            plain = dict(part) if isinstance(part, DictConfig) else vars(part)
            found[name] = {
                str(k): digest(v) if isinstance(v, str) and os.path.isfile(v) else v
                for k, v in plain.items()
                if isinstance(v, (str, int, bool))
            }
    return found
