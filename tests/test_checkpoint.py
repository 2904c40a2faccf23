"""The checkpoint reader: opens what fairseq writes, refuses everything else unexecuted."""

import argparse
import io
import math
import os
import pickle
import re
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from fairseq.logging.meters import AverageMeter
from omegaconf import OmegaConf

from kd_plugin.checkpoints.checkpoint import (
    CheckpointError,
    average,
    get,
    read_checkpoint,
    refuse_cut_short,
    section,
)


def fairseq_like(**more):
    return {
        "args": None,
        "cfg": {
            "model": argparse.Namespace(arch="lstm"),
            "task": {"_name": "translation", "data": "bin"},
        },
        "model": OrderedDict(weight=torch.arange(6.0).view(2, 3), version=torch.tensor([3])),
        "extra_state": {
            "metrics": OrderedDict(default=[(10, "loss", AverageMeter(3), {"val": 1.0})]),
            "best": np.float64(4.25),
            "counts": np.array([1, 2, 3]),
        },
        "last_optimizer_state": {"state": {0: {"step": 1, "exp_avg": torch.zeros(3)}}},
        **more,
    }


@pytest.fixture(params=["zip", "legacy"])
def save(request, tmp_path):
    def write(state, name="checkpoint.pt"):
        path = str(tmp_path / name)
        torch.save(state, path, _use_new_zipfile_serialization=request.param == "zip")
        return path

    return write


class Marker:
    """Unpickles into a call that leaves a file behind."""

    def __init__(self, path, call=os.mkdir):
        self.path, self.call = str(path), call

    def __reduce__(self):
        return (self.call, (self.path,))


def evil_states(marker):
    return {
        "reduce": {"model": Marker(marker)},
        "nested": fairseq_like(hidden=[{"deep": (Marker(marker),)}]),
        "in the optimizer state": fairseq_like(last_optimizer_state={"state": Marker(marker)}),
        "builtins": fairseq_like(x=Marker(f"open({str(marker)!r}, 'w')", eval)),
        "getattr": fairseq_like(x=Marker("os", __import__)),
    }


def test_opens_what_fairseq_writes(save):
    state = read_checkpoint(save(fairseq_like()))
    assert state["model"]["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert state["extra_state"]["best"] == 4.25
    assert state["extra_state"]["counts"].tolist() == [1, 2, 3]
    assert get(section(state, "model"), "arch") == "lstm"
    assert get(section(state, "task"), "data") == "bin"


def test_opens_omegaconf_configurations_of_earlier_versions(save):
    config = OmegaConf.create({"model": {"_name": "lstm", "dropout": 0.1}, "task": {"x": [1]}})
    state = read_checkpoint(save(fairseq_like(cfg=config)))
    assert get(section(state, "model"), "dropout") == 0.1
    assert get(section(state, "task"), "absent", "default") == "default"


def test_opens_args_of_old_versions(save):
    args = argparse.Namespace(arch="transformer", max_positions=77, data=["bin", "bin2"])
    state = read_checkpoint(save(fairseq_like(args=args, cfg=None)))
    assert get(section(state, "model"), "max_source_positions") == 77
    assert get(section(state, "task"), "task") == "translation"
    assert get(section(state, "task"), "data") == "bin"


@pytest.mark.parametrize("name", [b"numpy.core.", b"numpy._core."])
def test_opens_what_another_numpy_wrote(name, tmp_path):
    """numpy 2 renamed what its scalars and arrays are pickled with."""
    path = tmp_path / "checkpoint.pt"
    torch.save(fairseq_like(), str(path), _use_new_zipfile_serialization=False)
    content = re.sub(rb"numpy\._?core\.", name, path.read_bytes())
    assert name in content
    path.write_bytes(content)
    state = read_checkpoint(str(path))
    assert state["extra_state"]["best"] == 4.25
    assert state["extra_state"]["counts"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("kind", sorted(evil_states("x")))
def test_a_malicious_pickle_is_refused_and_does_not_run(save, tmp_path, kind):
    marker = tmp_path / "executed"
    path = save(evil_states(marker)[kind])
    with pytest.raises(CheckpointError, match="refused") as error:
        read_checkpoint(path)
    assert not marker.exists()
    name = {"builtins": "eval", "getattr": "__import__"}.get(kind, "mkdir")
    assert name in str(error.value)
    assert "--teacher-trust-checkpoint" in str(error.value)


def test_trust_opens_it_all_the_same(save, tmp_path):
    marker = tmp_path / "executed"
    read_checkpoint(save(evil_states(marker)["nested"]), trust=True)
    assert marker.exists()


def test_a_dotted_name_does_not_slip_through(tmp_path):
    # protocol 4 would look "Namespace.__init__.__globals__" up attribute by attribute
    stream = (
        pickle.PROTO
        + struct.pack("<B", 4)
        + pickle.SHORT_BINUNICODE
        + b"\x08argparse"
        + pickle.SHORT_BINUNICODE
        + b"\x1eNamespace.__init__.__globals__"
        + pickle.STACK_GLOBAL
        + pickle.STOP
    )
    path = str(tmp_path / "dotted.pt")
    whole = str(tmp_path / "whole.pt")
    torch.save(fairseq_like(), whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as out:
        for entry in source.namelist():
            data = stream if entry.endswith("data.pkl") else source.read(entry)
            out.writestr(entry, data)
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "cannot be read .* it is empty"),
        (b"pointer of size 3\nmore\n", "it is text that begins with 'pointer of size 3'"),
        (b"  <!DOCTYPE html><title>404</title>", "it is text that begins with '<!DOCTYPE html>"),
        (b"short", "something else"),
        ("kein Prüfpunkt: Würfel".encode(), "something else"),
        (pickle.dumps({"model": 1}), "something else"),
    ],
)
def test_a_file_of_another_kind_is_named_so(tmp_path, content, words):
    path = tmp_path / "other.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as error:
        read_checkpoint(str(path))
    assert str(path) in str(error.value)


def test_a_truncated_file(save):
    path = save(fairseq_like())
    data = open(path, "rb").read()
    open(path, "wb").write(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "state, words",
    [
        (torch.zeros(3), "found Tensor"),
        ({"weight": torch.zeros(3)}, "'weight'"),
        ({"model": {}, "args": None, "cfg": None}, "neither 'cfg' nor 'args'"),
    ],
)
def test_other_things_that_torch_saved(save, state, words):
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(save(state))


def test_a_torchscript_archive(tmp_path):
    path = str(tmp_path / "script.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_checkpoint(path)


def test_no_such_file(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint file"):
        read_checkpoint(str(tmp_path / "absent.pt"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_no_numbers(save, dtype):
    numbers = torch.tensor([1.0, -2.0], dtype=dtype)
    weights = {
        "nan": numbers * math.nan,
        "inf": numbers * math.inf,
        "embeddings": numbers,
        "bias": torch.tensor([0.5, -math.inf], dtype=dtype),  # rules a symbol out
        "nothing": numbers[:0],
        # memory that fairseq never wrote to, and never reads
        "decoder.embed_positions._float_tensor": numbers[:1] * math.nan,
        "decoder.layers.0.in_proj_weight": numbers * math.nan,
    }
    with pytest.raises(CheckpointError, match=r"2 of its weights hold NaN or inf \(nan, inf\)"):
        read_checkpoint(save(fairseq_like(model=weights)))
    del weights["nan"], weights["inf"]
    assert "bias" in read_checkpoint(save(fairseq_like(model=weights)))["model"]


def test_average_is_the_mean_in_the_first_ones_dtype():
    states = [
        {"model": OrderedDict(w=torch.tensor([1.0 * i, 2.0 * i]).half(), n=torch.tensor([3]))}
        for i in (1, 2, 6)
    ]
    mean = average(states)
    assert mean["w"].dtype == torch.float16
    assert mean["w"].tolist() == [3.0, 6.0]
    assert mean["n"].tolist() == [3]


def test_average_refuses_different_models():
    states = [{"model": {"w": torch.zeros(2)}}, {"model": {"w": torch.zeros(3)}}]
    with pytest.raises(CheckpointError, match="1 and 2 cannot be averaged.*w"):
        average(states)


def test_stock_torch_load_opens_fairseq_checkpoints_once_the_plugin_is_imported(save):
    """What lets stock fairseq resume and generate where torch checks globals by default."""
    import kd_plugin  # noqa: F401

    buffer = io.BytesIO(open(save(fairseq_like()), "rb").read())
    assert "model" in torch.load(buffer, map_location="cpu")


def test_a_checkpoint_that_was_not_written_to_its_end(tmp_path):
    """Wherever it was cut; the newest of fairseq's others that is whole is named."""
    last = tmp_path / "checkpoint_last.pt"
    refuse_cut_short(str(last))  # there is none
    torch.save({"model": {"w": torch.zeros(100)}}, str(last))
    refuse_cut_short(str(last))
    whole = last.read_bytes()
    for size in [0, 1, 2, 3, 30, len(whole) // 2, len(whole) - 1]:
        last.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="last.pt is cut short.* No whole checkpoint"):
            refuse_cut_short(str(last))
    for age, (name, content) in enumerate(
        [
            ("checkpoint_best.pt", whole[:100]),
            ("checkpoint_1_40.pt.tmp", whole),
            ("averaged.pt", whole),
            ("checkpoint_1_30.pt", whole),
            ("checkpoint_1_20.pt", whole),
        ]
    ):
        (tmp_path / name).write_bytes(content)
        os.utime(str(tmp_path / name), (1000 - age, 1000 - age))
    with pytest.raises(CheckpointError, match="--restore-file .*/checkpoint_1_30.pt, once"):
        refuse_cut_short(str(last))
    legacy = tmp_path / "legacy.pt"
    torch.save({"model": {}}, str(legacy), _use_new_zipfile_serialization=False)
    refuse_cut_short(str(legacy))
