"""Teachers that translate: any task, any vocabulary, checked against the data they will read."""

import logging
from typing import Any, Dict, List, Sequence, Tuple

import torch
from fairseq import tasks
from fairseq.data import Dictionary
from fairseq.tasks.translation import TranslationTask

from ..checkpoints import checkpoint
from ..files import FileError
from ..teachers.run import TeacherError, build_model, check_sizes, find_dictionaries

logger = logging.getLogger(__name__)


def placement(cfg: Any, device_id: int) -> Tuple[torch.device, torch.dtype]:
    """Where fairseq's flags have models run, and in which precision.

    Raises:
        FileError: in one that the device has not.
    """
    cuda = torch.cuda.is_available() and not cfg.common.cpu
    if cfg.common.fp16 and not cuda:
        raise FileError("--fp16 needs a GPU; on a CPU take --bf16 or neither")
    if cuda:
        torch.cuda.set_device(device_id)
    dtype = torch.float32
    if cfg.common.fp16 or cfg.common.bf16:
        dtype = torch.float16 if cfg.common.fp16 else torch.bfloat16
    return torch.device("cuda", device_id) if cuda else torch.device("cpu"), dtype


def set_up_task(cfg: Any) -> Any:
    """The task of fairseq's flags, with the dictionaries of its data.

    The languages that it finds by itself are put into ``cfg.task``, too.

    Raises:
        FileError: they cannot be read, or nothing says which languages.
    """
    try:
        task = tasks.setup_task(cfg.task)
    except Exception as error:  # fairseq's is a bare Exception, or an assertion
        raise FileError(
            f"{cfg.task.data}: the data cannot be read: {error or repr(error)}"
        ) from error
    if isinstance(task, TranslationTask):
        cfg.task.source_lang, cfg.task.target_lang = task.cfg.source_lang, task.cfg.target_lang
    if not all(getattr(cfg.task, name, None) for name in ("source_lang", "target_lang")):
        raise FileError("--source-lang and --target-lang: say between which languages")
    return task


_TO_DISTIL = (
    "Decode data that was binarised with the teacher's own dictionaries and subwords "
    "(fairseq-preprocess --srcdict --tgtdict), and name the student's with --student-data DIR "
    "--student-spm MODEL."
)


def read_teachers(
    paths: Sequence[str],
    task: Any,
    overrides: Dict[str, Any],
    trust: bool,
    otherwise: str = _TO_DISTIL,
) -> List[Tuple[str, Dict[str, Any]]]:
    """Read checkpoints whose dictionaries are the task's.

    Args:
        otherwise: what to do if they are not.

    Raises:
        TeacherError: they are not; CheckpointError: a file cannot be read.
    """
    found = []
    for path in paths:
        state = checkpoint.read_checkpoint(path, trust)
        # other tasks add language symbols to the dictionaries' files
        if isinstance(task, TranslationTask):
            _check_dictionaries(path, state, task, overrides, otherwise)
        found.append((path, state))
    return found


def _check_dictionaries(
    path: str, state: Dict[str, Any], task: Any, overrides: Dict[str, Any], otherwise: str
) -> None:
    langs = (task.cfg.source_lang, task.cfg.target_lang)
    trained = checkpoint.section(state, "task")
    theirs = [
        overrides.get(key, checkpoint.get(trained, key)) for key in ("source_lang", "target_lang")
    ]
    if theirs == [langs[1], langs[0]]:
        logger.warning(
            "teacher {} WAS TRAINED TO TRANSLATE FROM {} TO {}, not from {} to {}: if that is not "
            "meant, swap --source-lang and --target-lang".format(path, *theirs, *langs)
        )
    ours = (task.source_dictionary, task.target_dictionary)
    found = find_dictionaries(path, state, *langs, overrides=overrides)
    if found is None:
        check_sizes(path, state, *ours, "of the data")
        return
    for side, mine, theirs in zip(("source", "target"), ours, found):
        different = _differing(mine, theirs)
        if different:
            raise TeacherError(
                f"teacher {path}: its {side} dictionary ({found[2]}, {len(theirs)} symbols) is "
                f"not the data's ({len(mine)} symbols); {different}. {otherwise} If the "
                "dictionaries found are not its own, put those beside the checkpoint."
            )
    check_sizes(path, state, *ours, "of the data")


def _differing(mine: Dictionary, theirs: Dictionary) -> str:
    if mine.symbols == theirs.symbols:
        return ""
    for i, (a, b) in enumerate(zip(mine.symbols, theirs.symbols)):
        if a != b:
            return f"number {i} is {a!r} in the data and {b!r} there"
    return "one is the beginning of the other"


def build_teachers(
    states: Sequence[Tuple[str, Dict[str, Any]]],
    task: Any,
    overrides: Dict[str, Any],
    cfg: Any,
    device: torch.device,
    dtype: torch.dtype,
) -> List[Any]:
    """The models of checkpoints, placed and prepared as fairseq-generate does.

    Their parameters require gradients, though none are computed: torch folds a batch of single
    symbols into one matrix product only then, and decoding takes a third longer otherwise.
    """
    models = []
    for path, state in states:
        model = build_model(path, state, task, overrides)
        model = model.to(device=device, dtype=dtype)
        model.prepare_for_inference_(cfg)
        models.append(model)
    return models
