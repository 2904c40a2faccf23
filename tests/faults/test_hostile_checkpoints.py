"""A stranger's checkpoints, opened by the one function that opens them all."""

import multiprocessing
import re
import resource
import subprocess
import sys
from pathlib import Path

import fairseq
import hostile
import pytest
import torch

from kd_plugin.checkpoints import Checkpoint, CheckpointError, Role
from kd_plugin.checkpoints.untrusted import BUILDABLE, EVALUATED, Plain

MODEL = Role("model", "--trust-checkpoint")
ALLOWED = 400 << 20  # bytes beyond what the process had
# what torch < 2.6 does by default
OPEN_WITH_PICKLE = """
import sys
sys.path.insert(0, sys.argv[1])
import hostile, torch
hostile.extension_known()
more = {} if torch.__version__.startswith("1.") else {"weights_only": False}
for path in sys.argv[2:]:
    try:
        torch.load(path, **more)
    except Exception:
        pass
"""


def write(folder, files):
    paths = {what: folder / f"{i}.pt" for i, what in enumerate(files)}
    for what, content in files.items():
        paths[what].write_bytes(content)
    return paths


def open_all(paths, pipe):
    """In a process that may take little more memory than it has."""
    hostile.extension_known()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ALLOWED, used + ALLOWED))
    for what, path in paths.items():
        try:
            Checkpoint.open(str(path), MODEL)
            pipe.send((what, "opened"))
        except CheckpointError as error:
            pipe.send((what, str(error)))
        except BaseException as error:
            pipe.send((what, repr(error)))
    pipe.close()


def outcomes(paths):
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=open_all, args=(paths, theirs))
    process.start()
    theirs.close()
    found = {}
    while len(found) < len(paths):
        assert ours.poll(120), f"it does not end with {list(paths)[len(found)]!r}"
        try:
            what, outcome = ours.recv()
        except EOFError:
            raise AssertionError(f"{list(paths)[len(found)]!r} ends the process") from None
        found[what] = outcome
    process.join()
    return found


def not_refused(paths):
    """What became of files for which there was no sentence, or too much memory needed."""
    return {
        what: outcome
        for what, outcome in outcomes(paths).items()
        if not outcome.startswith(f"model {paths[what]}: ") or "MemoryError" in outcome
    }


def test_what_executes_code(tmp_path, count):
    marker = tmp_path / "executed"
    paths = write(tmp_path, hostile.executing(marker))
    assert not_refused(paths) == {}
    assert not marker.exists()
    count("checkpoints that execute code, given to the reader", len(paths))


def test_that_it_would(tmp_path):
    """Otherwise the test above shows nothing."""
    markers = {what: tmp_path / f"executed {what}" for what in hostile.executing(tmp_path)}
    files = {what: hostile.executing(marker)[what] for what, marker in markers.items()}
    paths = write(tmp_path, files).values()
    here = Path(__file__).parent
    command = [sys.executable, "-c", OPEN_WITH_PICKLE, str(here), *map(str, paths)]
    subprocess.run(command, stderr=subprocess.DEVNULL, check=True)
    assert [what for what, marker in markers.items() if not marker.exists()] == []


def test_what_claims_any_size_or_is_none(tmp_path, count):
    paths = write(tmp_path, hostile.lying())
    # it has no such number of objects, and room is made for none
    assert not_refused(paths) == {"zip, the object number 2^31": "opened"}
    count("malformed checkpoints, given to the reader", len(paths))


def test_that_their_like_can_be_opened(tmp_path):
    """What the malformed ones are made from is well-formed."""
    parts = {"weight": hostile.WEIGHT}
    files = {
        "zip": hostile.zipped(hostile.checkpoint()),
        "legacy": hostile.legacy(hostile.checkpoint(), b"\6" + bytes(31), ["0"]),
        "whole": hostile.saved(hostile.state()),
        "more": hostile.zipped(hostile.checkpoint(model=hostile.pairs(parts))),
    }
    for what, path in write(tmp_path, files).items():
        weight = Checkpoint.open(str(path), MODEL).weights["weight"]
        assert weight.shape == (2, 3) and weight.dtype == torch.float32, what


@pytest.mark.parametrize("arch", sorted(hostile.built(Path())))
def test_options_that_are_code(arch, tmp_path, count):
    marker, path = tmp_path / "executed", tmp_path / "evil.pt"
    options = hostile.built(marker)[arch]
    named = {"arch": arch, "_name": arch, **options}
    within = {"arch": None, "_name": None, arch: options}  # fairseq finds the name there, too
    for model, words in (
        (named, "would execute|evaluates, or opens"),
        (within, "would execute|names no architecture"),
    ):
        torch.save(hostile.configured(hostile.state(), **model), str(path))
        with pytest.raises(CheckpointError, match=words):
            Checkpoint.open(str(path), MODEL)
        assert not marker.exists()
        count("checkpoints that execute code, given to the reader")


def test_what_building_evaluates_in_this_fairseq():
    """Modules whose models are built for a stranger evaluate known options, and open nothing."""
    folder = Path(fairseq.__file__).parent
    for path in [*folder.glob("models/**/*.py"), *folder.glob("modules/**/*.py")]:
        parts = path.relative_to(folder).with_suffix("").parts
        module = ".".join(("fairseq", *parts)).replace(".__init__", "")
        if BUILDABLE.match(module) or module == "fairseq.modules.multihead_attention":
            code = path.read_text()
            # not x of a command line's type, nor model.eval()
            for name in re.findall(r"\beval(?:_\w+)?\((?:\w+\.)*(\w+)", code):
                assert name == "x" or EVALUATED.match(name), (module, name)
            if ".speech_to_text." in module:
                # it opens what options name that are emptied when a checkpoint is read
                found = re.findall(r"(?:args\.|\")(load_pretrained_\w+)", code)
                assert Plain().of(dict.fromkeys(found, "x")) == dict.fromkeys(found), module
                code = re.sub(r"load_pretrained_component_from_model\(", "", code)
            assert not re.search(
                r"torch\.load\(|load_(checkpoint|model|pretrained_comp)\w*\(", code
            )
