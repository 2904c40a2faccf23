"""What a choice asks of the hypotheses, opened: models, files, and values kept beside the lists."""

import contextlib
from typing import Any, Iterator, NamedTuple, Sequence

import torch

from ..decoding import DataBin, Tokenizer, databin
from ..decoding.corpus import Corpus
from .backward import Backward, open_direction, probe
from .choice import Choice
from .hypotheses import HypothesisStore
from .language import Languages
from .values import BlockValues, Given, Kept, Measures, plain_measures

_PROBED = 64  # sentences


class Running(NamedTuple):
    """How models are run.

    Attributes:
        trust: open them with the full pickle machinery.
    """

    device: torch.device
    dtype: torch.dtype
    trust: bool = False


@contextlib.contextmanager
def opened(
    choice: Choice,
    read: DataBin,
    *,
    backward_files: Sequence[Any],
    store: HypothesisStore,
    text: Any,
    tokenizer: Tokenizer,
    how: Running,
) -> Iterator[Measures]:
    """The measures of a choice.

    Args:
        read: the data-bin whose symbols a backward model reads.
        backward_files: checksums of that model's.
        store: the lists, beside which values are kept.
        text: how subwords become text, as plain types.
        tokenizer: of BLEU.
        how: a backward model runs.

    Raises:
        UserError: a file that values are from cannot be used.
    """
    with contextlib.ExitStack() as used:

        def kept(values: BlockValues, **depends_on: Any) -> BlockValues:
            known = Kept(values, store.values({"text": text, **depends_on}))
            used.callback(known.close)
            return known

        backward = None
        if choice.backward_path:
            direction = open_direction(choice.backward_path, read, *how)
            backward = kept(
                Backward(direction),
                backward=backward_files,
                precision=str(how.dtype),
            )
        measures = plain_measures(choice.select, choice.metric, tokenizer)
        measures = measures._replace(backward=backward)
        given = None
        if choice.select == "scores":
            assert choice.scores is not None
            given = Given(choice.scores)
            measures = measures._replace(order=given)
        elif choice.selector.uses_metric:
            order = kept(
                measures.order,
                select=choice.select,
                metric=choice.metric,
                tokenizer=tokenizer.name if choice.uses_bleu else None,
            )
            measures = measures._replace(order=order)
        yield measures
        if given is not None:
            given.end()


def check(
    choice: Choice,
    corpus: Corpus,
    read: DataBin,
    how: Running,
) -> None:
    """What would stop a choice, before anything is decoded.

    Args:
        corpus: whose references a backward model must know something of.
        read: the data-bin whose symbols that model reads.

    Raises:
        UserError: something would.
    """
    if choice.languages is not None:
        Languages(choice.languages)
    if choice.backward_path is None:
        return
    direction = open_direction(choice.backward_path, read, *how)
    if corpus.references is None or corpus.data is not read:
        return
    some = range(0, len(corpus.source), max(len(corpus.source) // _PROBED, 1))
    pairs = [
        [
            databin.words(databin.decode(dictionary, sentences[i].tolist()))
            for dictionary, sentences in (
                (read.target, corpus.references),
                (read.source, corpus.source),
            )
        ]
        for i in some
    ]
    pairs = [p for p in pairs if all(len(s) < most for s, most in zip(p, direction.longest))]
    if pairs:
        sources, targets = map(list, zip(*pairs))
        probe(direction, direction.score(sources, targets), "references")
