"""The checkpoint reader: opens what fairseq writes, refuses everything else unexecuted."""

import argparse
import gc
import importlib
import io
import math
import os
import pickle
import re
import struct
import weakref
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary
from fairseq.logging.meters import AverageMeter
from omegaconf import OmegaConf

from kd_plugin.checkpoints import (
    Checkpoint,
    CheckpointError,
    Role,
    VocabularyError,
    average,
    parse_overrides,
    refuse_cut_short,
    torchfile,
)
from kd_plugin.errors import UserError

TEACHER = Role("teacher", "--teacher-trust-checkpoint", "--teacher-data", "--teacher-overrides")
AVERAGED = Role("model", "--trust-checkpoint", "--data")
SYMBOLS = ["<s>", "<pad>", "</s>", "<unk>", "a", "b"]


def opened(path, role=TEACHER, trust=False):
    return Checkpoint.open(str(path), role, trust)


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
    path = save(fairseq_like(optimizer_history=[{"num_updates": 3}, {"num_updates": 7}]))
    found = opened(path)
    assert found.weights["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (found.architecture, found.task, found.data) == ("lstm", "translation", "bin")
    assert (found.path, str(found), found.updates) == (path, "teacher " + path, 7)
    assert found.languages == (None, None) and found.symbols is None
    assert found.max_positions == (1024, 1024) and found.dtype == torch.float32
    state = torchfile.read(path)
    assert state["extra_state"]["best"] == 4.25
    assert state["extra_state"]["counts"].tolist() == [1, 2, 3]


def test_opens_omegaconf_configurations_of_earlier_versions(save):
    config = OmegaConf.create({"model": {"_name": "lstm", "dropout": 0.1}, "task": {"x": [1]}})
    found = opened(save(fairseq_like(cfg=config)))
    assert found.options == {"_name": "lstm", "dropout": 0.1}
    assert found.task_options == {"x": [1]} and found.task is None and found.data is None


def test_opens_args_of_old_versions(save):
    args = argparse.Namespace(arch="transformer", max_positions=77, data=["bin", "bin2"])
    found = opened(save(fairseq_like(args=args, cfg=None)))
    assert found.max_positions == (77, 77)
    assert (found.architecture, found.task, found.data) == ("transformer", "translation", "bin")


@pytest.mark.parametrize("name", [b"numpy.core.", b"numpy._core."])
def test_opens_what_another_numpy_wrote(name, tmp_path):
    """numpy 2 renamed what its scalars and arrays are pickled with."""
    path = tmp_path / "checkpoint.pt"
    torch.save(fairseq_like(), str(path), _use_new_zipfile_serialization=False)
    content = re.sub(rb"numpy\._?core\.", name, path.read_bytes())
    assert name in content
    path.write_bytes(content)
    state = torchfile.read(str(path))
    assert state["extra_state"]["best"] == 4.25
    assert state["extra_state"]["counts"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("kind", sorted(evil_states("x")))
def test_a_malicious_pickle_is_refused_and_does_not_run(save, tmp_path, kind):
    marker = tmp_path / "executed"
    path = save(evil_states(marker)[kind])
    with pytest.raises(CheckpointError, match="refused") as error:
        opened(path)
    assert not marker.exists()
    name = {"builtins": "eval", "getattr": "__import__"}.get(kind, "mkdir")
    assert name in str(error.value)
    assert "--teacher-trust-checkpoint" in str(error.value)


@pytest.mark.parametrize(
    "role, words, absent",
    [
        (TEACHER, "teacher .*--teacher-trust-checkpoint opens it", " --trust"),
        (AVERAGED, "model .* --trust-checkpoint opens it", "--teacher"),
        (Role("student"), "student .*Nothing was executed.$", "--"),
    ],
)
def test_messages_name_the_flags_of_the_command_at_hand(save, tmp_path, role, words, absent):
    path = save(evil_states(tmp_path / "executed")["nested"])
    with pytest.raises(CheckpointError, match=words) as error:
        opened(path, role)
    assert absent not in str(error.value)


@pytest.mark.parametrize(
    "role, advice",
    [
        (TEACHER, "--teacher-data names the folder with the dict.*.txt it was trained with{}."),
        (AVERAGED, "--data names the folder with the dict.*.txt it was trained with{}."),
        (Role("student"), "Put the dict.*.txt it was trained with beside it{}."),
    ],
)
def test_dictionaries_that_are_found_nowhere(save, tmp_path, caplog, role, advice):
    """They are none, or another's with a warning that names only flags that there are."""
    task = {"data": str(tmp_path / "gone"), "source_lang": "aa", "target_lang": "bb"}
    cfg = {"model": argparse.Namespace(arch="lstm"), "task": task}
    weights = {"encoder.embed_tokens.weight": torch.zeros(5, 2)}
    found = opened(save(fairseq_like(cfg=cfg, model=weights)), role)
    assert found.dictionaries(("xx", "yy")) is None and not caplog.text
    taken = found.dictionaries(("xx", "yy"), otherwise=("data", Dictionary(), Dictionary()))
    assert taken.origin == "taken from the data" and len(taken.source) == 4
    assert f"{role.name} {found.path}: no dict.aa.txt and dict.bb.txt found" in caplog.text
    names = ", as dict.aa.txt and dict.bb.txt"
    if role.data:
        names += " or dict.xx.txt and dict.yy.txt"
    assert "TAKEN TO BE THE DATA'S" in caplog.text and advice.format(names) in caplog.text
    with pytest.raises(VocabularyError, match=f"^{found} has 5 source embeddings") as error:
        found.check_sizes(taken)
    assert str(error.value).endswith(advice.format(""))


def test_a_guessed_folder_is_told_of_once(save, tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for lang in ("aa", "bb"):
        (tmp_path / "here" / f"dict.{lang}.txt").write_text("a 1\n")
    (tmp_path / "models").mkdir()
    task = {"data": "here", "source_lang": "aa", "target_lang": "bb"}
    state = fairseq_like(cfg={"model": argparse.Namespace(arch="lstm"), "task": task})
    for name in ("models/a.pt", "models/b.pt"):
        found = opened(save(state, name), TEACHER)
        for _ in range(2):
            assert found.dictionaries(("aa", "bb")).origin == f"from {tmp_path / 'here'}"
    assert caplog.text.count(f"was found relative to {tmp_path}") == 1


def test_dictionaries_where_they_are(save, tmp_path):
    """In the folder that a flag names, in the checkpoint, beside it, in the data that it names."""
    for where, symbol in (("flag", "f"), (".", "b"), ("data", "d")):
        (tmp_path / where).mkdir(exist_ok=True)
        for language in ("aa", "bb", "cc"):
            (tmp_path / where / f"dict.{language}.txt").write_text(f"{symbol}{language} 1\n")
    task = {"data": str(tmp_path / "data"), "source_lang": "aa"}
    cfg = {"model": argparse.Namespace(arch="lstm"), "task": task}
    symbols = {"source_symbols": SYMBOLS, "target_symbols": SYMBOLS}
    found = opened(save(fairseq_like(cfg=cfg, task_state=symbols)))

    def asked(*arguments, **more):
        source, target, origin = found.dictionaries(*arguments, **more)
        return source.symbols[4], target.symbols[4], origin

    folder = str(tmp_path / "flag")
    assert asked(("xx", "bb"), folder) == ("faa", "fbb", "from " + folder)
    assert asked(("xx", "bb")) == ("a", "a", "from its checkpoint")
    found = opened(save(fairseq_like(cfg=cfg)))
    assert asked(("xx", "bb")) == ("baa", "bbb", "from beside it")
    for path in tmp_path.glob("dict.*"):
        path.unlink()
    assert asked(("xx", "bb")) == ("daa", "dbb", "from " + str(tmp_path / "data"))
    assert found.dictionaries(("aa", "yy")) is None
    with pytest.raises(VocabularyError, match="no dict.aa.txt and dict.yy.txt .*, though dict.aa"):
        found.dictionaries(("aa", "yy"), otherwise=("data", Dictionary(), Dictionary()))
    with pytest.raises(VocabularyError, match="--teacher-data .*: expected dict.aa.txt and dict.z"):
        found.dictionaries(("xx", "zz"), str(tmp_path))


@pytest.mark.parametrize("text", ["dropout=0", "[]", "0", "{", "{1: 2}", "{'a'}", "f()", "a\0b"])
def test_overrides_that_are_not_a_dictionary(text):
    with pytest.raises(UserError, match=r"--model-overrides: expected a dictionary.*; got"):
        parse_overrides(text, "--model-overrides")


@pytest.mark.parametrize("text", ["dropout=0", "[]"])
@pytest.mark.parametrize("command", ["sequences", "cache"])
def test_commands_refuse_such_overrides_in_one_line(tmp_path, capsys, command, text):
    for language in ("aa", "bb"):
        (tmp_path / f"dict.{language}.txt").write_text("a 1\n")
    (tmp_path / "teacher.pt").write_bytes(b"never opened")
    out = {"sequences": "--output", "cache": "--cache"}[command]
    arguments = [str(tmp_path), "--path", str(tmp_path / "teacher.pt"), out, str(tmp_path / "out")]
    arguments += ["-s", "aa", "-t", "bb", "--cpu", "--model-overrides", text]
    main = importlib.import_module("kd_plugin.commands." + command).main
    assert main(arguments) == 1
    expected = "expected a dictionary of options, {'dropout': 0.1} say; got " + repr(text)
    assert capsys.readouterr().err.endswith(
        f"fairseq-kd-{command}: --model-overrides: {expected}\n"
    )


def test_overrides():
    assert parse_overrides("{'dropout': 0}", "--model-overrides") == {"dropout": 0}
    assert parse_overrides("", "--model-overrides") == {}


def test_overrides_of_options_that_there_are_not(save):
    found = opened(save(fairseq_like()))
    with pytest.raises(CheckpointError, match="--teacher-overrides: the model of teacher .* 'x'"):
        found.build(None, {"x": 1, "source_lang": "aa"})


def test_trust_opens_it_all_the_same(save, tmp_path):
    marker = tmp_path / "executed"
    opened(save(evil_states(marker)["nested"]), trust=True)
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
        opened(path)


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
        opened(str(path))
    assert str(path) in str(error.value)


def test_a_truncated_file(save):
    path = save(fairseq_like())
    data = open(path, "rb").read()
    open(path, "wb").write(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        opened(path)


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
        opened(save(state))


def test_a_torchscript_archive(tmp_path):
    path = str(tmp_path / "script.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(CheckpointError, match="TorchScript"):
        opened(path)


def test_no_such_file(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint file"):
        opened(str(tmp_path / "absent.pt"))


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
        opened(save(fairseq_like(model=weights)))
    del weights["nan"], weights["inf"]
    assert "bias" in opened(save(fairseq_like(model=weights))).weights


def test_weights_of_minus_inf(save):
    """Only a bias may hold them, where they rule a symbol out."""
    inf = torch.tensor([0.5, -math.inf])
    weights = {
        "decoder.output_projection.weight": inf.view(1, 2),
        "decoder.layer_norm.weight": inf,
        "encoder.bias": inf.view(1, 2),
        "decoder.fc_out.bias": inf,
    }
    names = "decoder.output_projection.weight, decoder.layer_norm.weight, encoder.bias"
    with pytest.raises(CheckpointError, match=rf"3 of its weights hold NaN or inf \({names}\)"):
        opened(save(fairseq_like(model=weights)))


@pytest.fixture
def trained(tmp_path):
    """Writes a checkpoint of a training, and gives its path."""

    def write(name, weight, options=None, **more):
        state = {
            "cfg": {
                "model": {"_name": "transformer", "encoder_normalize_before": False, "dropout": 0.1}
                if options is None
                else options,
                "task": {"_name": "translation", "source_lang": "aa", "target_lang": "bb"},
            },
            "model": OrderedDict(w=weight, n=torch.tensor([3])),
            "optimizer_history": [{"num_updates": int(name)}],
            "last_optimizer_state": {"state": torch.zeros(1000)},
            **more,
        }
        torch.save(state, str(tmp_path / name))
        return str(tmp_path / name)

    return write


def test_average_is_the_mean_in_the_first_ones_dtype(trained):
    paths = [trained(str(i), torch.tensor([1.0 * i, 2.0 * i]).half()) for i in (1, 2, 6)]
    mean = average(paths, AVERAGED)
    assert mean.weights["w"].dtype == torch.float16
    assert mean.weights["w"].tolist() == [3.0, 6.0]
    assert mean.weights["n"].tolist() == [3]
    assert mean.path == paths[-1] and mean.updates == 6
    assert [opened(path).weights["w"][0] for path in paths] == [1, 2, 6]


def test_average_is_summed_in_float64(trained):
    """In float32 the small one would be lost beside the large ones."""
    values = [1.0, 2.0**-30, -1.0]
    paths = [trained(str(i), torch.tensor([value])) for i, value in enumerate(values)]
    assert average(paths, AVERAGED).weights["w"].item() == pytest.approx(2.0**-30 / 3, rel=1e-6)


def test_average_of_tied_float64_weights(trained):
    """Two names of one storage: adding to one must not add to the other."""
    paths = []
    for value in (1.0, 3.0):
        weight = torch.full((2,), value, dtype=torch.float64)
        tied = OrderedDict(embedding=weight, projection=weight)
        paths.append(trained(str(int(value)), weight, model=tied))
    for weight in average(paths, AVERAGED).weights.values():
        assert weight.tolist() == [2.0, 2.0]


def test_average_holds_one_checkpoint_at_a_time_without_its_optimizer(trained, monkeypatch):
    paths = [trained(str(i), torch.zeros(10)) for i in range(5)]
    alive = []

    def read(path, original=torchfile.read):
        state = original(path)
        optimizer, weight = state["last_optimizer_state"]["state"], state["model"]["w"]
        gc.collect()
        assert [what for what, found in alive if found() is not None] == []
        alive.append((path + ", optimizer", weakref.ref(optimizer)))
        alive.append((path + ", weight", weakref.ref(weight)))
        return state

    monkeypatch.setattr(torchfile, "read", read)
    average(paths, AVERAGED)
    assert len(alive) == 10


def test_average_refuses_different_parameters(trained):
    paths = [trained("1", torch.zeros(2)), trained("2", torch.zeros(3))]
    with pytest.raises(CheckpointError, match="/1 and model .*/2 cannot be averaged.*: w$"):
        average(paths, AVERAGED)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"_name": "lstm"}, "they are a transformer and a lstm"),
        (
            {"_name": "transformer", "encoder_normalize_before": True},
            "encoder_normalize_before is False and True",
        ),
        ({"_name": "transformer", "activation_fn": "gelu"}, "activation_fn is 'relu' and 'gelu'"),
        ({"_name": "transformer", "decoder_attention_heads": 2}, "attention_heads is 8 and 2"),
    ],
)
def test_average_refuses_models_that_compute_something_else(trained, options, words):
    """A pre-norm and a post-norm model have weights of the same names and shapes."""
    paths = [trained("1", torch.zeros(2)), trained("2", torch.zeros(2), options)]
    with pytest.raises(CheckpointError, match=words):
        average(paths, AVERAGED)


def test_average_takes_what_was_trained_otherwise(trained):
    """Another dropout, or a default that one of them does not name."""
    other = {"_name": "transformer", "dropout": 0.3, "max_source_positions": 99}
    paths = [trained("1", torch.zeros(2)), trained("2", torch.ones(2), other)]
    assert average(paths, AVERAGED).weights["w"].tolist() == [0.5, 0.5]


def test_average_refuses_other_symbols_and_languages(trained, tmp_path):
    def symbols(source, target):
        return {"task_state": {"source_symbols": source, "target_symbols": target}}

    moved = [*SYMBOLS[:4], "b", "a"]
    one = trained("1", torch.zeros(2), **symbols(SYMBOLS, SYMBOLS))
    two = trained("2", torch.zeros(2), **symbols(SYMBOLS, moved))
    with pytest.raises(CheckpointError, match="their target dictionaries differ .6 and 6 symb"):
        average([one, two], AVERAGED)
    # stock fairseq leaves the dictionaries in the data folder, here beside the checkpoint
    three = trained("3", torch.zeros(2))
    assert average([one, three], AVERAGED).updates == 3
    for language in ("aa", "bb"):
        (tmp_path / f"dict.{language}.txt").write_text("b 1\na 1\n")
    with pytest.raises(CheckpointError, match="their source dictionaries.*; their target dict"):
        average([one, three], AVERAGED)
    back = {"_name": "translation", "source_lang": "bb", "target_lang": "aa"}
    cfg = {"model": {"_name": "transformer"}, "task": back}
    four = trained("4", torch.zeros(2), **symbols(SYMBOLS, SYMBOLS), cfg=cfg)
    with pytest.raises(CheckpointError, match="they translate aa-bb and bb-aa"):
        average([one, four], AVERAGED)


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
