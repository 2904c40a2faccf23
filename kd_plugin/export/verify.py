"""What an export is compared on, and what the checkpoint itself says about it."""

import logging
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from fairseq.dataclass.configs import GenerationConfig
from omegaconf import OmegaConf

from .. import decoding
from ..checkpoints import Checkpoint, translation_task
from ..decoding import databin
from ..files import FileError

MAX_TOKENS = 2048  # of a batch

logger = logging.getLogger(__name__)


class Text(NamedTuple):
    """Sentences to compare translations of.

    Attributes:
        folder: a data-bin of these alone.
        task: a translation task that has read them.
        batches: numbers of sentences; as fairseq-generate makes them.
    """

    folder: Path
    subset: str
    task: Any
    corpus: decoding.Corpus
    batches: Sequence[Any]

    @classmethod
    def cut(
        cls,
        data: decoding.DataBin,
        subset: str,
        sentences: int,
        *,
        max_positions: Tuple[int, int],
        folder: Path,
    ) -> "Text":
        """The first sentences of a subset, as a data-bin in a new folder.

        Args:
            sentences: how many; 0 for all.
            max_positions: of the model, on both sides; longer sentences are left out.

        Raises:
            FileError: no such subset, or nothing in it.
        """
        for path in data.dictionary_files():
            shutil.copyfile(str(path), str(folder / path.name))
        for lang, dictionary in zip(data.langs, (data.source, data.target)):
            side = data.side(subset, lang)
            if side is None:
                continue  # which of them, the reader says
            prefix = folder / "{}.{}-{}.{}".format(subset, *data.langs, lang)
            count = min(len(side), sentences or len(side))
            databin.write(prefix, dictionary, (side[i] for i in range(count)))
        task = translation_task(
            *(data.source, data.target, max_positions),
            data=str(folder),
            source_lang=data.langs[0],
            target_lang=data.langs[1],
            left_pad_source=True,
            left_pad_target=False,
            train_subset="train",
            dataset_impl=None,
            required_seq_len_multiple=1,
        )
        if data.side(subset, data.langs[0]) is None:
            decoding.Corpus.of_subset(task, data, subset)  # names what there is
        corpus = decoding.Corpus.of_subset(task, decoding.DataBin(str(folder), *data.langs), subset)
        batches = decoding.plan(task, corpus.dataset, [max_positions], max_tokens=MAX_TOKENS)
        if not batches:
            raise FileError(f"{data.folder}, {subset}: no sentence to verify with")
        return cls(folder, subset, task, corpus, batches)

    def samples(self) -> Iterator[Dict[str, Any]]:
        """The batches, collated."""
        dataset = self.corpus.dataset
        for batch in self.batches:
            yield dataset.collater([dataset[int(i)] for i in batch])

    @property
    def sentences(self) -> int:
        return sum(map(len, self.batches))


def build(checkpoint: Checkpoint, text: Text, beam: int) -> Any:
    """The checkpoint's model, in float32 on the CPU, as fairseq-generate prepares it."""
    cfg = Namespace(generation=generation(beam))
    device = torch.device("cpu")
    return decoding.build_models(
        [checkpoint], text.task, {}, cfg, device=device, dtype=torch.float32
    )[0]


def generation(beam: int) -> Any:
    """fairseq-generate's settings of its search."""
    return OmegaConf.structured(GenerationConfig(beam=beam))


def translations(engine: Any, text: Text) -> Dict[int, decoding.Hypothesis]:
    """The best hypothesis of each sentence."""
    return {i: nbest[0] for found in engine.decode(text.samples()) for i, nbest in found.items()}


def by_fairseq(model: Any, text: Text, beam: int) -> Dict[int, decoding.Hypothesis]:
    return translations(decoding.FairseqEngine(text.task, [model], generation(beam), 1), text)


@torch.no_grad()
def reference_scores(model: Any, text: Text) -> Dict[int, List[float]]:
    """Log-probabilities, in nats, of each reference's tokens; the end of sentence included.

    Sentences with a padding symbol in their text are left out: fairseq's models do not see it, and
    to others it is a symbol like any.
    """
    found, pad = {}, text.task.target_dictionary.pad()
    for sample in text.samples():
        lprobs = model.get_normalized_probs(model(**sample["net_input"]), log_probs=True)
        target = sample["target"]
        scores = lprobs.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        for i, row, mask in zip(sample["id"].tolist(), scores, target.ne(pad)):
            sides = (text.corpus.source, text.corpus.references or [])
            if not any(side[i].eq(pad).any() for side in sides):
                found[i] = row[mask].tolist()
    if not found:
        raise FileError(
            "every sentence to verify on has a padding symbol in its text: take another "
            "--gen-subset or --data, or --no-verify"
        )
    return found


def bleu(
    systems: Sequence[Dict[int, decoding.Hypothesis]],
    text: Text,
    *,
    post_process: Optional[str],
    tokenizer: decoding.Tokenizer,
) -> Tuple[List[float], str]:
    """sacreBLEU's BLEU of several systems on the references, and its signature.

    Args:
        post_process: what it is scored without.
    """
    dictionary, ids = text.task.target_dictionary, sorted(systems[0])
    cfg = Namespace(bpe=None, tokenizer=None, common_eval=Namespace(post_process=post_process))
    to_text, _ = decoding.text_functions(text.task, cfg, text.corpus.data)
    references = [
        # an unknown symbol counts as wrong
        to_text(databin.decode(dictionary, text.corpus.references[i].tolist(), escape_unk=True))
        for i in ids
        if text.corpus.references is not None
    ]
    for note in tokenizer.notes(references):
        logger.warning(note)
    metric = tokenizer.metric()
    scores = [
        metric.corpus_score([to_text(found[i].subwords) for i in ids], [references]).score
        for found in systems
    ]
    return scores, str(metric.get_signature())
