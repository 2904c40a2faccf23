"""A training in this process: fairseq's calls of the task in their order, without its Trainer.

Data, student and teacher are real, and so small that a whole training takes a tenth of a second.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List, Tuple
from unittest import mock

import torch
from fairseq import models, options
from fairseq.data import Dictionary, indexed_dataset
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks import FairseqTask
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from fairseq.tasks.translation_from_pretrained_bart import TranslationFromPretrainedBARTTask
from fairseq_cli import train
from omegaconf import OmegaConf

from kd_plugin.decoding import databin
from kd_plugin.flags import CRITERION, KDLabelSmoothedCrossEntropyCriterionConfig
from kd_plugin.tasks.translation import KDTranslationConfig, KDTranslationTask

SOURCE, TARGET = "abcdefg", "ABCDEFGHI"
SENTENCES = {
    "train": [("abac", "ABAC"), ("gfe", "GIFE"), ("d", "DH"), ("bb", "B"), ("acf", "CA")],
    "valid": [("ab", "BAC"), ("fed", "DEF")],
}


def dictionary(symbols: str) -> Dictionary:
    made = Dictionary()
    for symbol in symbols:
        made.add_symbol(symbol)
    return made


def save_dictionaries(folder: Path, source: Dictionary, target: Dictionary) -> None:
    source.save(str(folder / "dict.aa.txt"))
    target.save(str(folder / "dict.bb.txt"))


def write_teacher(
    folder: Path,
    source: str = SOURCE,
    target: str = TARGET,
    arch: str = "transformer",
    knowing: bool = False,
) -> str:
    """A model as it was initialised, with its dictionaries beside it.

    Args:
        knowing: teach it ``SENTENCES``, so that it beats a uniform guess on them.
    """
    args = arguments(arch)
    sides = dictionary(source), dictionary(target)
    torch.manual_seed(1)
    model = models.build_model(args, TranslationTask(TranslationConfig(), *sides))
    if knowing:
        _teach(model, *sides)
    save_dictionaries(folder, *sides)
    torch.save({"args": args, "model": model.state_dict()}, str(folder / "teacher.pt"))
    return str(folder / "teacher.pt")


def write_mbart(folder: Path, data: Path, bos: bool) -> Tuple[str, Any, Any]:
    """A model that knows a little, of a task that adds tags to sentences, and that task."""
    args = arguments("mbart_base")
    vars(args).update(
        **dict(task="translation_from_pretrained_bart", langs="bb,xx,aa", prepend_bos=bos),
        **dict(data=str(data), dataset_impl=None, upsample_primary=1, load_alignments=False),
        **dict(left_pad_source=True, left_pad_target=False),
        **dict(max_source_positions=12, max_target_positions=10),
    )
    task = TranslationFromPretrainedBARTTask(args, dictionary(SOURCE), dictionary(TARGET))
    task.args = args
    torch.manual_seed(1)
    model = models.build_model(args, task)
    task.load_dataset("train")
    batch = task.dataset("train").collater([*task.dataset("train")])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        logits = model(**batch["net_input"])[0].transpose(1, 2)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, batch["target"], ignore_index=1).backward()
        optimizer.step()
    model.eval()
    torch.save({"args": args, "model": model.state_dict()}, str(folder / "teacher.pt"))
    return str(folder / "teacher.pt"), model, task


def _teach(model: Any, source: Dictionary, target: Dictionary) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(5):
        for a, b in SENTENCES["train"]:
            read = databin.encode(source, " ".join(a)).long()[None]
            expected = databin.encode(target, " ".join(b)).long()[None]
            shifted = torch.cat([expected[:, -1:], expected[:, :-1]], dim=1)
            logits = model(read, torch.tensor([read.size(1)]), shifted)[0]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits[0], expected[0]).backward()
            optimizer.step()


def arguments(arch: str = "transformer", width: int = 8) -> Namespace:
    """Of a model with one layer on each side."""
    sides = {"layers": 1, "embed_dim": width, "ffn_embed_dim": 16, "attention_heads": 2}
    sides.update(hidden_size=width, out_embed_dim=width)  # an lstm's
    args = Namespace(arch=arch, criterion="cross_entropy", source_lang="aa", target_lang="bb")
    args.dropout = 0.0  # two trainings are the same
    args.share_all_embeddings = False  # BART's default, for a joined dictionary
    args.task = "translation"
    for side in ("encoder", "decoder"):
        vars(args).update({f"{side}_{key}": value for key, value in sides.items()})
    models.ARCH_CONFIG_REGISTRY[arch](args)
    return args


def write_data(
    folder: Path, sentences: Dict[str, List[Any]] = SENTENCES, impl: str = "mmap"
) -> Path:
    """A data-bin; each character is a symbol.

    Args:
        impl: as fairseq-preprocess has it with this ``--dataset-impl``.
    """
    folder.mkdir()
    sides = dictionary(SOURCE), dictionary(TARGET)
    save_dictionaries(folder, *sides)
    for split, pairs in sentences.items():
        for lang, own, texts in zip(("aa", "bb"), sides, zip(*pairs)):
            prefix = folder / f"{split}.aa-bb.{lang}"
            builder = indexed_dataset.make_builder(f"{prefix}.bin", impl, len(own))
            for text in texts:
                builder.add_item(databin.encode(own, " ".join(text)))
            builder.finalize(f"{prefix}.idx")
    return folder


def new_task(**flags: Any) -> KDTranslationTask:
    """A task with these flags, on its own."""
    return KDTranslationTask(_translation(flags), dictionary(SOURCE), dictionary(TARGET))


def _translation(flags: Dict[str, Any]) -> KDTranslationConfig:
    own = dict(source_lang="aa", target_lang="bb", required_seq_len_multiple=1)
    return task_config({**own, **flags}, KDTranslationConfig, "kd_translation")


def task_config(flags: Dict[str, Any], kind: Any, name: str) -> Any:
    """A task's configuration, with what fairseq's other configurations would give it."""
    config = kind(
        train_subset="train",
        disable_validation=False,
        save_dir="nowhere",
        restore_file="checkpoint_last.pt",
        update_ordered_indices_seed=False,
        seed=1,
    )
    if hasattr(config, "dataset_impl"):
        config.dataset_impl = None
    for field, value in flags.items():
        assert hasattr(config, field), field
        setattr(config, field, value)
    config._name = name
    return config


def criterion_config(**flags: Any) -> Any:
    defaults = dict(sentence_avg=False, ddp_backend="pytorch_ddp")
    config = KDLabelSmoothedCrossEntropyCriterionConfig(**{**defaults, **flags})
    config._name = CRITERION
    return OmegaConf.structured(config)


def fairseq_train(*flags: Any) -> List[Tuple[str, Dict[str, Any]]]:
    """fairseq-train in this process.

    Returns:
        the batches that its task was given, each after "train" or "valid".
    """
    sizes = ("layers=1", "embed-dim=8", "ffn-embed-dim=16", "attention-heads=2")
    student = [f"--{side}-{size}" for side in ("encoder", "decoder") for size in sizes]
    common = ("--arch=transformer", "--dropout=0", "--optimizer=sgd", "--lr=0.1", "--seed=3")
    parser = options.get_training_parser()
    data = ("-s=aa", "-t=bb", "--num-workers=0", "--cpu")
    args = options.parse_args_and_arch(parser, [*map(str, flags), *common, *student, *data])
    given: List[Tuple[str, Dict[str, Any]]] = []

    def noting(kind: str) -> Any:
        real = getattr(FairseqTask, kind + "_step")

        def step(task: Any, sample: Any, *rest: Any, **more: Any) -> Any:
            given.append((kind, sample))
            return real(task, sample, *rest, **more)

        return mock.patch.object(FairseqTask, kind + "_step", step)

    with noting("train"), noting("valid"):
        train.main(convert_namespace_to_omegaconf(args))
    return given


class Training:
    """What fairseq-train does with the task, up to the first update.

    Args:
        task: the task's flags; ``criterion``: the criterion's.
    """

    def __init__(self, data: Path, task: Dict[str, Any], **criterion: Any) -> None:
        self.task = KDTranslationTask.setup_task(_translation({"data": str(data), **task}))
        torch.manual_seed(2)
        self.model = self.task.build_model(arguments())
        self.criterion = self.task.build_criterion(criterion_config(**criterion))
        self.updates = 0
        self.optimizer = Namespace(
            backward=lambda loss: loss.backward(), step=lambda: None, zero_grad=lambda: None
        )

    positions: Any = (1024, 1024)  # tokens of the longest source and target

    def load(self, subset: str) -> Any:
        """Its batch iterator."""
        self.task.load_dataset(subset)
        return self.task.get_batch_iterator(
            self.task.dataset(subset),
            max_sentences=2,
            max_positions=self.positions,
            seed=1,
            epoch=1,
        )

    def begin(self) -> "Training":
        """Everything before the first update."""
        self.load("valid")
        self.iterator = self.load("train")
        self.iterator.next_epoch_itr(shuffle=False)
        self.task.begin_epoch(1, self.model)
        return self

    def batches(self, subset: str = "train") -> List[Dict[str, Any]]:
        dataset = self.task.dataset(subset)
        order = range(len(dataset))
        return [dataset.collater([dataset[i] for i in order[at : at + 2]]) for at in order[::2]]

    def update(self, batches: List[Dict[str, Any]], overflows: bool = False, dummy: bool = False):
        """One update of several micro-batches; returns what each logs."""
        self.criterion.train()
        logs = [
            self.task.train_step(
                *(batch, self.model, self.criterion, self.optimizer, self.updates),
                ignore_grad=dummy,
            )[2]
            for batch in batches
        ]
        if not overflows:
            self.task.optimizer_step(self.optimizer, self.model, self.updates)
            self.updates += 1
        return logs

    def validate(self, batch: Dict[str, Any]) -> Dict[str, Any]:
        """What it logs."""
        self.criterion.eval()
        return self.task.valid_step(batch, self.model, self.criterion)[2]
