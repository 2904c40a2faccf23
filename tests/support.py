"""Run fairseq's commands as processes of their own and read what they leave behind.

Importing fairseq and torch takes seconds, so most runs are forked from a server that has done so
once (``fairseq``). It never imports the plugin: each run does so itself, by the way that is tested,
in a tenth of a second. The plugin's own commands run from there as ``python -m`` in the checkout.
``script`` starts the installed command itself, and each command is started so by some test.
"""

import atexit
import contextlib
import gc
import importlib
import io
import json
import logging
import multiprocessing
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional

CHECKOUT = Path(__file__).resolve().parents[1]
PLUGIN = CHECKOUT / "kd_plugin"
_PREFIX = Path(sys.prefix).resolve()
SCRIPTS = Path(sys.executable).parent

SOURCE, TARGET = "aa", "bb"

_MODULES = {
    "fairseq-train": "fairseq_cli.train",
    "fairseq-generate": "fairseq_cli.generate",
    "fairseq-interactive": "fairseq_cli.interactive",
    "fairseq-validate": "fairseq_cli.validate",
    "fairseq-eval-lm": "fairseq_cli.eval_lm",
    "fairseq-preprocess": "fairseq_cli.preprocess",
}
_COMMANDS = {
    "fairseq-kd-benchmark": "kd_plugin.commands.benchmark",
    "fairseq-kd-cache": "kd_plugin.commands.cache",
    "fairseq-kd-export": "kd_plugin.commands.export",
    "fairseq-kd-init": "kd_plugin.commands.init",
    "fairseq-kd-report": "kd_plugin.commands.report",
    "fairseq-kd-sequences": "kd_plugin.commands.sequences",
    "fairseq-kd-vocabulary": "kd_plugin.commands.vocabulary",
}
# What runs import as they go, at a second for some (the first optimizer imports torch._dynamo).
# One that is not there (older torch, no extra) is left out.
_LATE = ["torch._dynamo", "ctranslate2", "matplotlib.pyplot", "sacrebleu", "sentencepiece"]
_forked = multiprocessing.get_context("forkserver")
_forked.set_forkserver_preload(["pytest", *_MODULES.values(), *_LATE])


class Run(NamedTuple):
    """How a command ended: its exit code, and everything it wrote."""

    code: int
    text: str

    def records(self, tag: str) -> List[Dict[str, Any]]:
        """JSON log records of ``train_inner``, ``train`` or a validation subset, numbers parsed."""
        lines = re.findall(rf"\| INFO \| {tag} \| (\{{.*\}})$", self.text, re.MULTILINE)
        return [{k: _number(v) for k, v in json.loads(line).items()} for line in lines]

    def series(self, tag: str, key: str) -> List[float]:
        return [record[key] for record in self.records(tag)]

    def ok(self) -> "Run":
        if self.code != 0:
            raise AssertionError(f"exit code {self.code}:\n{self.text[-5000:]}")
        return self

    def metrics(self, subset: str = "valid") -> Dict[str, Any]:
        """What ``fairseq-validate`` found, by name."""
        (record,) = self.records(subset)
        return {key.replace(subset + "_", ""): value for key, value in record.items()}

    @property
    def refusal(self) -> str:
        """The one sentence with which a command of the plugin's ends."""
        assert self.code == 1 and "Traceback" not in self.text, self.text[-3000:]
        return self.text.strip().splitlines()[-1]

    @property
    def error(self) -> str:
        """The last exception's message (the line that a user reads first)."""
        assert self.code != 0, "expected an error, but the command succeeded:\n" + self.text[-3000:]
        lines = re.findall(r"^[\w.]*(?:Error|Exit)\b.*$", self.text, re.MULTILINE)
        return lines[-1] if lines else self.text[-2000:]


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


class Started:
    """A command under way."""

    def __init__(self, process: Any, log: str) -> None:
        self.process, self.log = process, log

    @property
    def text(self) -> str:
        return Path(self.log).read_text(errors="replace")

    def finish(self, timeout: float = 180) -> Run:
        self.process.join(timeout)
        if self.process.is_alive():
            self.stop()
            raise AssertionError(f"still running after {timeout} s:\n{self.text[-5000:]}")
        text = self.text
        os.unlink(self.log)
        return Run(self.process.exitcode, text)

    def stop(self) -> None:
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def kill_all(self) -> None:
        """kill -9 of it and whatever it has started; it must lead a group."""
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()


def start(
    tool: str,
    *arguments: Any,
    cwd: Any = None,
    stdin: Any = os.devnull,
    file_limit: Optional[int] = None,
    killed_by_limit: bool = False,
    leads_group: bool = False,
    spawns: bool = False,
) -> Started:
    """Start a command in a forked process.

    Args:
        file_limit: bytes of the longest file it can write: as on a full disk, more fails.
        killed_by_limit: instead the kernel kills it.
        leads_group: it and what it starts are a process group of their own.
        spawns: its own processes are new ones where it asks for that (CUDA needs it); otherwise
            they are forked, too, which saves their imports.
    """
    handle, log = tempfile.mkstemp(prefix="fairseq-", suffix=".log")
    os.close(handle)
    folder = str(cwd or tempfile.gettempdir())
    process = _forked.Process(
        target=_main,
        args=(tool, [str(a) for a in arguments], folder, log, str(stdin)),
        kwargs=dict(
            file_limit=file_limit,
            killed_by_limit=killed_by_limit,
            leads_group=leads_group,
            spawns=spawns,
        ),
    )
    process.start()
    return Started(process, log)


def together(*started: Started) -> List[Run]:
    """Wait for commands that wait for each other; when one fails, the others are stopped."""
    try:
        return [one.finish().ok() for one in started]
    finally:
        for one in started:
            one.stop()


def fairseq(tool: str, *arguments: Any, timeout: float = 180, **how: Any) -> Run:
    """Run a fairseq command in a process forked from one that has imported fairseq."""
    return start(tool, *arguments, **how).finish(timeout)


def script(
    tool: str,
    *arguments: Any,
    cwd: Any = None,
    env: Optional[Dict[str, str]] = None,
    stdin: str = "",
    timeout: float = 180,
) -> Run:
    """Run the installed command, as a user does."""
    done = subprocess.run(
        [str(SCRIPTS / tool), *map(str, arguments)],
        cwd=str(cwd or tempfile.gettempdir()),
        env={**os.environ, **(env or {})},
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
        timeout=timeout,
    )
    return Run(done.returncode, done.stdout)


def in_process(tool: str, *arguments: Any) -> Run:
    """Run a command in this process, which has imported all that it needs: for refusals.

    Of a training that gets beyond them, this process would keep what it leaves in fairseq.
    """
    import kd_plugin  # noqa: F401  so --user-dir has nothing more to do

    given = [str(a) for a in arguments]
    if "--user-dir" in given:
        where = given.index("--user-dir")
        del given[where : where + 2]
    text = io.StringIO()
    log = logging.StreamHandler(text)
    log.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(name)s | %(message)s"))
    logging.getLogger().addHandler(log)
    before, sys.argv = sys.argv, [tool, *given]
    code: Any
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            code = _call(tool)
    except SystemExit as ended:
        code = ended.code
    except Exception:
        traceback.print_exc(file=text)
        code = 1
    finally:
        sys.argv = before
        logging.getLogger().removeHandler(log)
    return Run(code or 0, text.getvalue())


def _call(tool: str) -> Any:
    if tool in _COMMANDS:
        return importlib.import_module(_COMMANDS[tool]).main()
    return importlib.import_module(_MODULES[tool]).cli_main()


def _main(
    tool: str,
    arguments: List[str],
    cwd: str,
    log: str,
    stdin: str,
    file_limit: Optional[int],
    killed_by_limit: bool,
    leads_group: bool,
    spawns: bool,
) -> None:
    gc.freeze()  # what the server has imported stays: no collection has to look through it
    if leads_group:
        os.setpgrp()
    if not spawns:
        fork = multiprocessing.get_context("fork")
        multiprocessing.get_context = lambda method=None: fork
    # As in any process: workers of a server's would outlive a kill, each waiting for the other.
    multiprocessing.set_start_method("fork", force=True)
    out = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.dup2(os.open(stdin, os.O_RDONLY), 0)
    sys.stdin = open(0, closefd=False)
    os.chdir(cwd)
    # The tests' own folders must not help a run to find the plugin; the environment may lie in the
    # checkout, and stays.
    sys.path[:] = [
        p for p in sys.path if p and (_is_inside(p, _PREFIX) or not _is_inside(p, CHECKOUT))
    ]
    sys.argv = [tool, *arguments]
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if killed_by_limit else signal.SIG_IGN)
    try:
        if tool in _COMMANDS:
            sys.path.insert(0, str(CHECKOUT))
        sys.exit(_call(tool) or 0)  # Python 3.8 ends a process with 1 for None
    except Exception:
        sys.stdout.flush()
        traceback.print_exc()
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # a forked process leaves that out


def _is_inside(path: str, folder: Path) -> bool:
    path = os.path.realpath(path)
    return path == str(folder) or path.startswith(str(folder) + os.sep)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# options that the runs of the tests share

USER_DIR = ("--user-dir", PLUGIN)
LANGUAGES = ("--source-lang", SOURCE, "--target-lang", TARGET)


def transformer(dim: int, arch: str = "transformer") -> List[Any]:
    sides = [
        option
        for side in ("--encoder", "--decoder")
        for option in (
            *(side + "-embed-dim", dim, side + "-ffn-embed-dim", 2 * dim),
            *(side + "-layers", 1, side + "-attention-heads", 2),
        )
    ]
    return ["--arch", arch, *sides, "--share-decoder-input-output-embed", "--dropout", 0]


ARCHITECTURES: Dict[str, List[Any]] = {
    "transformer": transformer(16),
    "transformer_align": [
        *transformer(16, "transformer_align"),
        *("--alignment-layer", 0, "--alignment-heads", 1),
    ],
    "lstm": [
        *("--arch", "lstm", "--dropout", 0),
        *("--encoder-embed-dim", 16, "--encoder-hidden-size", 16, "--encoder-layers", 1),
        *("--decoder-embed-dim", 16, "--decoder-hidden-size", 16, "--decoder-layers", 1),
        *("--decoder-out-embed-dim", 16),
    ],
    "fconv": [
        *("--arch", "fconv", "--dropout", 0, "--encoder-embed-dim", 16, "--decoder-embed-dim", 16),
        *("--encoder-layers", "[(16, 3)]", "--decoder-layers", "[(16, 3)]"),
        *("--decoder-out-embed-dim", 16),
    ],
    "lightconv": [
        *transformer(16, "lightconv"),
        *("--encoder-kernel-size-list", "[3]", "--decoder-kernel-size-list", "[3]"),
        *("--encoder-conv-type", "lightweight", "--decoder-conv-type", "lightweight"),
    ],
}
STUDENT = ARCHITECTURES["transformer"]

_TRAINING = (
    *("--cpu", "--optimizer", "adam", "--lr", 0.005, "--max-sentences", 16, "--seed", 3),
    *("--required-batch-size-multiple", 1, "--num-workers", 0),
    *("--log-format", "json", "--log-interval", 1, "--no-epoch-checkpoints"),
    *("--valid-subset", "valid", "--ignore-unused-valid-subsets"),
)
TRAINING = (*_TRAINING, *LANGUAGES)
_KD_CRITERION = ("--criterion", "kd_label_smoothed_cross_entropy", "--label-smoothing", 0.1)
KD = ("--task", "kd_translation", *_KD_CRITERION)
STOCK = (
    *("--task", "translation", "--criterion", "label_smoothed_cross_entropy"),
    *("--label-smoothing", 0.1),
)


def language_model(data: Any, save_dir: Any, *more: Any, kd: bool = False, dim: int = 16) -> List:
    """Arguments of a training of a language model, by fairseq's own task or by ours; later ones
    override earlier ones."""
    task = ["--task", "language_modeling", "--criterion", "label_smoothed_cross_entropy"]
    task += ["--label-smoothing", 0.1]
    if kd:
        task = [*USER_DIR, "--task", "kd_language_modeling", *_KD_CRITERION]
    sizes = {"embed-dim": dim, "ffn-embed-dim": 2 * dim, "layers": 1, "attention-heads": 2}
    sizes.update({"input-dim": dim, "output-dim": dim})
    model = [part for name, size in sizes.items() for part in (f"--decoder-{name}", size)]
    shape = ["--arch", "transformer_lm", "--dropout", 0, *model, "--tokens-per-sample", 16]
    return [data, *task, *_TRAINING, *shape, "--save-dir", save_dir, *more]


def listener(
    data: Any, save_dir: Any, *more: Any, kd: bool = False, dim: int = 16, yaml: str = "config.yaml"
) -> List:
    """Arguments of a training on speech, by fairseq's own task or by ours; later ones override
    earlier ones."""
    task = ["--task", "speech_to_text", *STOCK[2:]]
    if kd:
        task = [*USER_DIR, "--task", "kd_speech_to_text", *_KD_CRITERION]
    model = [*transformer(dim, "s2t_transformer"), "--conv-kernel-sizes", 3, "--conv-channels", dim]
    return [data, *task, *_TRAINING, *model, "--config-yaml", yaml, "--save-dir", save_dir, *more]


# Adam would blow rounding noise in a gradient that is 0 up to its step size
SGD = ("--optimizer", "sgd", "--lr", 0.5, "--clip-norm", 1.0)


def train_plain(data: Any, save_dir: Any, *more: Any, arch: Any = STUDENT) -> Run:
    """fairseq's own training of a student."""
    arguments = (data, *STOCK, *TRAINING, *arch, "--save-dir", save_dir, *more)
    return fairseq("fairseq-train", *arguments)


def kd_arguments(data: Any, teacher: Any, save_dir: Any, *more: Any, arch: Any = STUDENT) -> List:
    """Arguments of a distillation; later ones override earlier ones."""
    given = () if teacher is None else ("--teacher-checkpoint-path", teacher)
    return [data, *USER_DIR, *KD, *TRAINING, *arch, "--save-dir", save_dir, *given, *more]


def distil(
    data: Any,
    teacher: Any,
    save_dir: Any,
    *more: Any,
    arch: Any = STUDENT,
    tool: Callable[..., Run] = fairseq,
    **how: Any,
) -> Run:
    arguments = kd_arguments(data, teacher, save_dir, *more, arch=arch)
    return tool("fairseq-train", *arguments, **how)


def validate(data: Any, checkpoint: Any, *more: Any, tool: Callable[..., Run] = fairseq) -> Run:
    """``fairseq-validate`` of a student; later arguments override earlier ones."""
    return tool(
        "fairseq-validate",
        *(data, *USER_DIR, "--task", "kd_translation", "--path", checkpoint, "--cpu"),
        *("--max-sentences", 16, "--required-batch-size-multiple", 1, "--num-workers", 0),
        *("--valid-subset", "valid", "--log-format", "json", *LANGUAGES, *more),
    )


def cache_arguments(data: Any, teacher: Any, cache: Any, *more: Any) -> List[Any]:
    """Arguments of ``fairseq-kd-cache``; later ones override earlier ones."""
    given = ("--path", teacher, "--cache", cache)
    return [data, *given, "--cpu", *LANGUAGES, "--num-workers", 0, *more]


def write_cache(
    data: Any,
    teacher: Any,
    cache: Any,
    *more: Any,
    tool: Callable[..., Run] = fairseq,
    **how: Any,
) -> Run:
    return tool("fairseq-kd-cache", *cache_arguments(data, teacher, cache, *more), **how)


def sequence_arguments(data: Any, teacher: Any, output: Any, *more: Any) -> List[Any]:
    """Arguments of ``fairseq-kd-sequences``; later ones override earlier ones."""
    given = ("--path", teacher, "--output", output, "--batch-size", 64)
    return [data, *given, "--cpu", *LANGUAGES, "--num-workers", 0, *more]


def write_sequences(
    data: Any,
    teacher: Any,
    output: Any,
    *more: Any,
    tool: Callable[..., Run] = fairseq,
    **how: Any,
) -> Run:
    arguments = sequence_arguments(data, teacher, output, *more)
    return tool("fairseq-kd-sequences", *arguments, **how)


def start_two_ranks(*arguments: Any, **how: Any) -> List[Started]:
    """fairseq-train as two processes that talk over gloo; ``{rank}`` in an argument is the rank."""
    address = f"tcp://127.0.0.1:{free_port()}"
    ranks = []
    for rank in (0, 1):
        own = [str(argument).replace("{rank}", str(rank)) for argument in arguments]
        ranks.append(
            start(
                *("fairseq-train", *own),
                *("--distributed-backend", "gloo", "--distributed-no-spawn"),
                *("--distributed-world-size", 2, "--distributed-rank", rank, "--device-id", 0),
                *("--distributed-init-method", address),
                **how,
            )
        )
    return ranks


def train_on_two_ranks(*arguments: Any) -> List[Run]:
    """As ``start_two_ranks``, to the end."""
    return together(*start_two_ranks(*arguments))


# what runs leave behind


def tree(folder: Any) -> Dict[str, bytes]:
    """All files of a folder but locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def assert_same_files(one: Any, other: Any) -> None:
    """Two folders are the same to the byte; otherwise it is told in which files they differ."""
    ours, theirs = tree(one), tree(other)
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []


def load(path: Any) -> Dict[str, Any]:
    """Open a checkpoint that a test made."""
    import torch

    more = {} if torch.__version__.startswith("1.") else {"weights_only": False}
    return torch.load(str(path), map_location="cpu", **more)


# fairseq 0.12.2 keeps second copies of some weights for a fast path in eval mode; only the
# originals are trained and restored
_UNUSED = re.compile(r"(_float_tensor|\.version|(in_proj|out_proj|fc1|fc2)_(weight|bias))$")


def used_weights(path: Any) -> Dict[str, Any]:
    return {k: v for k, v in load(path)["model"].items() if not _UNUSED.search(k)}


def assert_same_weights(one: Any, other: Any, **tolerance: float) -> None:
    """Two checkpoints hold the same used weights: bitwise, or within ``rtol`` and ``atol``."""
    import torch

    ours, theirs = used_weights(one), used_weights(other)
    assert list(ours) == list(theirs)
    for name in ours:
        if tolerance:
            torch.testing.assert_close(ours[name], theirs[name], msg=name, **tolerance)
        else:
            assert torch.equal(ours[name], theirs[name]), name


def hypotheses(text: str) -> List[str]:
    """The translations in ``fairseq-generate``'s output, in the order of the data set."""
    found = re.findall(r"^H-(\d+)\t\S+\t(.*)$", text, re.MULTILINE)
    return [sentence for _, sentence in sorted(found, key=lambda pair: int(pair[0]))]
