"""What is asked for, and what all that answers it works with."""

import copy
from typing import Any, Callable, NamedTuple, Optional, Sequence, Tuple

import torch
from fairseq import utils
from omegaconf import open_dict

from .. import decoding
from ..decoding import Around, Corpus, DataBin
from ..files import FileError
from .choice import Choice
from .hypotheses import HypothesisStore
from .language import OWN_LANGUAGES
from .mixing import IN_ORDER, Wanted

ENGINES = ("fairseq", "ctranslate2")


class Asked(NamedTuple):
    """What is to be distilled, for whom, and which part of it by this process.

    Attributes:
        cfg: fairseq's configuration, as ``fairseq-generate`` makes it: the data and the subset,
            the teacher's checkpoints (``--path``), search, batches, precision.
        output: the data-bin to write.
        choice: which hypotheses, and what drops a sentence.
        hypotheses: folder of the n-best lists; None is in ``output``.
        source_text: file with source sentences to translate instead of the subset.
        mix: training sets that come before the distilled one, or are all that is written, without
            ``--path``.
        mix_order: of the whole, one of ``mixing.ORDERS``; fairseq's ``--seed`` decides the random
            one, and which sentences of a set are taken.
        student_data: data-bin of a student with other dictionaries than the teacher's.
        student_spm: that student's SentencePiece model.
        student_langs: what that data-bin calls the languages, if not as the teacher's does.
        task_given: decode with the task of ``cfg``, whatever the checkpoints were trained for.
            Without it, that holds for another task than ``translation`` alone.
        engine: what decodes, one of ``ENGINES``.
        teacher_spm: SentencePiece models of a CTranslate2 folder that ``--path`` names: of both
            sides, or of the source and the target.
        teacher_tokenizer: or its tokenizer of Hugging Face's.
        around: tokens that such a teacher reads and writes around sentences.
        compute_type: CTranslate2's precision; None is int8 on a CPU and float16 on a GPU.
        trust: open checkpoints with the full pickle machinery.
        overwrite: replace what other settings made in ``output``.
        imported: files of translations made elsewhere, instead of a teacher; "-" is standard input.
        import_format: of ``exchange.FORMATS``; None to recognise it.
        import_as: "text" or "subwords" of the target's dictionary; None to find out.
        import_source: what the files' own sources are for: ``exchange.CHECK``, ``USE`` as the
            source text, or ``IGNORE``; None is ``USE`` if there is nothing else, else ``CHECK``.
        import_incomplete: whether sentences may lack a translation.
        write_nbest: file for the lists, to be scored or translated elsewhere.
        num_shards, shard_id: this process decodes every ``num_shards``-th batch.
        device_id: the GPU.
    """

    cfg: Any
    output: str
    choice: Choice = Choice()
    hypotheses: Optional[str] = None
    source_text: Optional[str] = None
    mix: Sequence[Wanted] = ()
    mix_order: str = IN_ORDER
    student_data: Optional[str] = None
    student_spm: Optional[str] = None
    student_langs: Optional[Tuple[str, str]] = None
    task_given: bool = False
    engine: str = "fairseq"
    teacher_spm: Sequence[str] = ()
    teacher_tokenizer: Optional[str] = None
    around: Around = Around()
    compute_type: Optional[str] = None
    trust: bool = False
    overwrite: bool = False
    imported: Sequence[str] = ()
    import_format: Optional[str] = None
    import_as: Optional[str] = None
    import_source: Optional[str] = None
    import_incomplete: bool = False
    write_nbest: Optional[str] = None
    num_shards: int = 1
    shard_id: int = 0
    device_id: int = 0


class Opened(NamedTuple):
    """What is asked for, with its data.

    Attributes:
        asked: it; languages of the data are named.
        cfg: fairseq's configuration, with limits of batches and languages.
        task: of these, with the dictionaries of the data.
        data: the data-bin that is translated.
        to_text, to_subwords: between subwords of the data and running text.
        device, dtype: where models run, and in which precision.
    """

    asked: Asked
    cfg: Any
    task: Any
    data: DataBin
    to_text: Callable[[str], str]
    to_subwords: Callable[[str], str]
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, asked: Asked) -> "Opened":
        """Raises UserError: there is no such data, device or task, or it cannot be read."""
        cfg = copy.deepcopy(asked.cfg)
        utils.import_user_module(cfg.common)
        with open_dict(cfg):
            cfg.dataset.max_tokens, cfg.dataset.batch_size = decoding.batch_limits(cfg)
        device, dtype = decoding.placement(cfg, asked.device_id)
        task = decoding.set_up_task(cfg)
        data = DataBin(cfg.task.data, cfg.task.source_lang, cfg.task.target_lang)
        if asked.choice.languages == OWN_LANGUAGES:
            asked = asked._replace(choice=asked.choice._replace(languages=data.langs))
        return cls(asked, cfg, task, data, *decoding.text_functions(task, cfg, data), device, dtype)

    @property
    def subset(self) -> str:
        return self.cfg.dataset.gen_subset

    @property
    def source_text_is_raw(self) -> bool:
        """Whether the source is a file of running text, and not of symbols of the data."""
        return bool(self.asked.source_text and (self.cfg.bpe or self.cfg.tokenizer))

    def corpus(self, store: HypothesisStore, subset: Optional[Corpus] = None) -> Corpus:
        """The subset, or the source text.

        Args:
            store: beside which the binarised form of a text is kept.
            subset: if it has been read.

        Raises:
            FileError: it cannot be read, or lacks references that are needed.
        """
        text = self.asked.source_text
        if text:
            self.refuse_without_references(text)
            return Corpus.of_text(
                *(self.task, self.data, text),
                to_subwords=self.to_subwords,
                prefix=store.beside("source", "files", "source_text_encoding", "truncate_source"),
            )
        corpus = subset or Corpus.of_subset(self.task, self.data, self.subset)
        if corpus.references is None:
            self.refuse_without_references(f"{self.cfg.task.data}, {self.subset}")
        return corpus

    def refuse_without_references(self, where: str) -> None:
        """Raises FileError: references are needed."""
        if self.asked.choice.needs_references:
            raise FileError(
                f"--select {self.asked.choice.select} and --min-closeness need references, and "
                f"{where} has none"
            )
