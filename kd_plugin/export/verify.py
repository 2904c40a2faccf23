"""What an export is compared on, and what the checkpoint itself says about it."""

import logging
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from fairseq.dataclass.configs import GenerationConfig
from fairseq.sequence_scorer import SequenceScorer
from fairseq.tasks.language_modeling import LanguageModelingTask
from omegaconf import OmegaConf

from .. import decoding
from ..checkpoints import Checkpoint, translation_task
from ..decoding import databin
from ..files import FileError

MAX_TOKENS = 2048  # of a batch
_LONGEST_BLOCK = 512

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


class Blocks(NamedTuple):
    """Text to compare a language model's scores of, cut into blocks of one length.

    Attributes:
        folder: a data-bin of this text alone.
        task: a language model's, which has read it.
        flags: of fairseq-eval-lm, to read it in the same way.
    """

    folder: Path
    subset: str
    task: Any
    flags: List[str]

    @classmethod
    def cut(
        cls,
        data: decoding.DataBin,
        subset: str,
        sentences: int,
        *,
        options: Mapping[str, Any],
        longest: int,
        folder: Path,
    ) -> "Blocks":
        """The first sentences of a subset, as a data-bin in a new folder.

        Args:
            sentences: how many; 0 for all.
            options: of the model's task.
            longest: tokens of the longest block that the model reads.

        Raises:
            FileError: no such subset, or nothing in it.
        """
        side = data.side(subset, "")
        if side is None or not len(side):
            raise FileError(f"{data.folder}, {subset}: no text to verify with")
        shutil.copyfile(str(data.dictionary_files()[0]), str(folder / "dict.txt"))
        count = min(len(side), sentences or len(side))
        databin.write(folder / subset, data.source, (side[i] for i in range(count)))
        begins = bool(options.get("add_bos_token"))
        tokens = max(min(longest, _LONGEST_BLOCK) - begins, 1)
        outputs = options.get("output_dictionary_size", -1)
        flags = ["--tokens-per-sample", str(tokens), "--output-dictionary-size", str(outputs)]
        flags += ["--add-bos-token"] if begins else []
        cfg = Namespace(
            **{"data": str(folder), "sample_break_mode": "none", "tokens_per_sample": tokens},
            **{"output_dictionary_size": outputs, "add_bos_token": begins, "seed": 1},
            **{"shorten_method": "none", "shorten_data_split_list": "", "dataset_impl": None},
            **dict.fromkeys(("self_target", "future_target", "past_target"), False),
            **dict.fromkeys(("pad_to_fixed_length", "pad_to_fixed_bsz"), False),
            **{"use_plasma_view": False, "plasma_path": ""},
        )
        task = LanguageModelingTask.setup_task(cfg)
        task.load_dataset(subset)
        return cls(folder, subset, task, flags)

    @torch.no_grad()
    def scores(self, model: Any) -> Dict[int, List[float]]:
        """Log-probabilities of each block's tokens, in nats, as fairseq-eval-lm counts them."""
        scorer, dataset = (
            SequenceScorer(self.task.target_dictionary),
            self.task.dataset(self.subset),
        )
        begins = int(self.task.args.add_bos_token)  # a symbol that the target begins with, too
        found = {}
        for i in range(len(dataset)):
            ((best,),) = scorer.generate([model], dataset.collater([dataset[i]]))
            found[i] = best["positional_scores"][begins:].tolist()
        return found


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
