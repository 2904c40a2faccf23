"""How fast students translate that nobody has trained yet: their speed depends on sizes alone."""

import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional

import numpy as np
import torch
from fairseq import tasks
from fairseq.data import Dictionary
from omegaconf import OmegaConf, open_dict

from .. import decoding
from ..checkpoints import Checkpoint, Role
from ..errors import UserError
from ..export import export_ctranslate2
from ..timing import Quartiles, Timings

_LANGS = ("source", "target")
_BATCHES = 4  # of each worker in a round


class Students(NamedTuple):
    """Students by the flags that they would be trained with.

    Attributes:
        configurations: fairseq's, by the student's name.
        length: subwords of each source and of each translation.
        mapped: target symbols that a vocabulary map leaves of a batch; None is without one.
    """

    configurations: Mapping[str, Any]
    length: int = 25
    mapped: Optional[int] = None

    def speeds(self, vocabulary: int, repeats: int) -> Dict[str, Any]:
        """Greedy search in int8 by CTranslate2 on the CPU; all sentences and translations are of
        one length.

        Args:
            vocabulary: symbols of the joined dictionary.
            repeats: rounds to measure, in which the students take turns.

        Raises:
            UserError: fairseq cannot build a student, or CTranslate2 does not take it.
        """
        with tempfile.TemporaryDirectory() as folder:
            facts, works = {}, {}
            for number, (name, cfg) in enumerate(self.configurations.items()):
                of_one = Path(folder) / str(number)
                of_one.mkdir()
                facts[name] = _export(name, cfg, vocabulary, of_one, self.length)
                works[name] = self._work(of_one / "int8", vocabulary)
                if self.mapped is not None:  # the same folder, opened again
                    line = " ".join(_symbols(min(self.mapped, vocabulary)))
                    (of_one / "int8" / decoding.VOCABULARY_MAP).write_text(f"\t{line}\n")
                    mapped = f"{name}, {self.mapped} symbols"
                    facts[mapped] = facts[name]
                    works[mapped] = self._work(of_one / "int8", vocabulary)
            timings = Timings(works, repeats, f"translations, V = {vocabulary}")
        sentences, first = self._sentences(), next(iter(works))
        speeds = {}
        for name in works:
            seconds = timings.seconds[name]
            ratios = [one / other for one, other in zip(timings.seconds[first], seconds)]
            speeds[name] = {
                **facts[name],
                "sentences_per_second": Quartiles.of([sentences / s for s in seconds])._asdict(),
                "to_first": Quartiles.of(ratios)._asdict(),
            }
        return {"vocabulary": vocabulary, "length": self.length, "students": speeds}

    def _sentences(self) -> int:
        return (
            _BATCHES
            * decoding.threads()
            * max(decoding.BATCH_ON_CPU["max_batch_size"] // self.length, 1)
        )

    def _work(self, model: Path, vocabulary: int) -> Callable[[], None]:
        """Translate as many sentences of random symbols as all workers have some batches of."""
        translator = decoding.open_translator(model, "cpu", 0, "default")
        symbols, random = np.array(_symbols(vocabulary)), np.random.RandomState(1)
        shape = (self._sentences(), self.length)
        sources = symbols[random.randint(len(symbols), size=shape)].tolist()
        mapped = (model / decoding.VOCABULARY_MAP).is_file()

        def work() -> None:
            translator.translate_batch(
                sources,
                beam_size=1,
                min_decoding_length=self.length,
                max_decoding_length=self.length,
                max_input_length=0,
                use_vmap=mapped,
                **decoding.BATCH_ON_CPU,
            )

        return work


def _symbols(vocabulary: int) -> List[str]:
    """A dictionary's, without the special ones; at most as many as it has in all."""
    return [f"w{i}" for i in range(vocabulary - Dictionary().nspecial)]


def _export(name: str, cfg: Any, vocabulary: int, folder: Path, length: int) -> Dict[str, Any]:
    """A student of random weights as ``int8`` in a folder; its sizes.

    Args:
        length: of the sentences that it has to take.
    """
    dictionary = Dictionary()
    for symbol in _symbols(vocabulary):
        dictionary.add_symbol(symbol)
    for lang in _LANGS:
        dictionary.save(str(folder / f"dict.{lang}.txt"))
    with open_dict(cfg):
        cfg.task.data, (cfg.task.source_lang, cfg.task.target_lang) = str(folder), _LANGS
    torch.manual_seed(1)
    try:
        model = tasks.setup_task(cfg.task).build_model(cfg.model)
    except (ValueError, AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"fairseq cannot build the student {name}: {reason}") from error
    file = str(folder / "student.pt")
    state = {
        "cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True),
        "model": model.state_dict(),
        "optimizer_history": [{"num_updates": 0, "lr_scheduler_state": {}}],
        "extra_state": {},
    }
    torch.save(state, file)
    del model, state
    checkpoint = Checkpoint.open(file, Role("student"))
    if length >= min(checkpoint.max_positions):
        raise UserError(
            f"--sentence-length {length}: the student {name} takes sentences of up to "
            f"{min(checkpoint.max_positions) - 1} subwords"
        )
    export_ctranslate2(
        *(checkpoint, dictionary, dictionary, _LANGS),
        folder=folder / "int8",
        quantization="int8",
    )
    total, inner = checkpoint.parameters()
    return {
        "parameters": total,
        "parameters_without_embeddings": inner,
        "bytes": (folder / "int8" / "model.bin").stat().st_size,
    }
