"""Two updates are the same two updates in every loop that fairseq has for them.

The plain loop trains on 24 sentences, all of them in every update: so another loop may cut them
into other batches, spread these over ranks, or compute in another precision, and has to arrive at
the same losses, gradient norm and weights. The distillation is one that would show what a loop
gets wrong: its second update compares with the first one's scores, at another weight.
"""

from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional, Tuple

import pytest
import support
import torch
from support import assert_same_weights, fairseq, kd_arguments, load, train_on_two_ranks

SENTENCES = 24
LEARNING_RATE = 0.5
OPTIONS = (
    *("--train-subset", "valid1", "--max-sentences", SENTENCES, "--max-epoch", 2),
    # SGD: Adam would blow rounding noise in a gradient that is 0 up to its step size
    *("--optimizer", "sgd", "--lr", LEARNING_RATE, "--report-accuracy"),
    *("--kd-temperature", 2, "--kd-selection", "global"),
    *("--kd-weight-schedule", "linear:0.3:0.9:2"),
)
ADAM = ("--optimizer", "adam", "--lr", 0.005)
COMPARED = "training loops compared with the plain one"
LOSSES = ("loss", "nll_loss", "kd_loss", "teacher_nll_loss", "agreement")

# What fairseq has a GPU do, done by the CPU; all else is fairseq's own
STAND_INS = """
import sys
import torch
from fairseq import trainer
from fairseq.models import distributed_fairseq_model
sys.path.insert(0, {checkout!r})
import kd_plugin

# --fp16: numbers the fp32 copy of the weights on each device, and a CPU has no number
torch.cuda.current_device = lambda: None
# an update that overflowed has the gradient norm 0 there
torch.Tensor.cuda = lambda self, *args, **kwargs: self

# --amp: torch scales the loss on a CPU, too, but not by this name
def scaler(init_scale, **more):
    return torch.amp.GradScaler("cpu", init_scale=float(init_scale), **more)

torch.cuda.amp.GradScaler = scaler

# --ddp-backend pytorch_ddp: fairseq always names a GPU
def wrapper(device_ids, output_device, **more):
    return torch.nn.parallel.DistributedDataParallel(**more)

distributed_fairseq_model.DistributedDataParallel = wrapper

# --bf16: fairseq takes a machine without a GPU for a TPU
class Trainer(trainer.Trainer):
    def __init__(self, cfg, *more):
        cfg.common.tpu = False
        super().__init__(cfg, *more)

trainer.Trainer = sys.modules["fairseq_cli.train"].Trainer = Trainer
"""


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> Tuple[Any, ...]:
    """Options for what no CPU can: the plugin, and stand-ins for a GPU."""
    folder = tmp_path_factory.mktemp("plugin") / "stand_ins"
    folder.mkdir()
    (folder / "__init__.py").write_text(STAND_INS.format(checkout=str(support.CHECKOUT)))
    return ("--user-dir", folder)


class Trained(NamedTuple):
    run: support.Run
    checkpoint: Path


def pytest_generate_tests(metafunc):
    long = metafunc.config.getoption("--long")
    if "source" in metafunc.fixturenames:
        sources = ["online", "cached"] if long else ["online"]
        metafunc.parametrize("source", sources, scope="module", indirect=True)
    if "loop" in metafunc.fixturenames:
        chosen = {name: loop for name, loop in LOOPS.items() if long or not loop.long}
        metafunc.parametrize("loop", list(chosen.values()), ids=list(chosen))


@pytest.fixture(scope="module")
def source(request, data, teacher, tmp_path_factory):
    """Where the teacher comes from: options."""
    if request.param == "online":
        return ("--teacher-checkpoint-path", teacher)
    cache = tmp_path_factory.mktemp("cache")
    options = ("--gen-subset", "train,valid1,valid", "--temperatures", 2, "--batch-size", 16)
    support.write_cache(data, teacher, cache, *options).ok()
    return ("--teacher-cache", cache)


@pytest.fixture(scope="module")
def train(data, source, tmp_path_factory):
    """Two updates, in the plain loop or in the one of these options."""

    def train(*more: Any, ranks: int = 1) -> Trained:
        folder = tmp_path_factory.mktemp("student")
        arguments = kd_arguments(data, None, folder, *source, *OPTIONS, *more)
        if ranks == 2:
            run = train_on_two_ranks(*arguments)[0]
        else:
            run = fairseq("fairseq-train", *arguments).ok()
        return Trained(run, folder / "checkpoint_last.pt")

    return train


@pytest.fixture(scope="module")
def plain(train):
    """The plain loop's two updates, one for each set of options."""
    found: Dict[Tuple[Any, ...], Trained] = {}

    def plain(*more: Any) -> Trained:
        if more not in found:
            found[more] = train(*more)
        return found[more]

    return plain


class Near(NamedTuple):
    """How near two trainings are: losses as they are logged, and weights, if they compare."""

    losses: float
    weights: Optional[Dict[str, float]]


EXACTLY = Near(0.0, {})  # weights to the bit
ROUNDED = Near(0.0021, dict(rtol=1e-4, atol=1e-6))  # sums in another order
HALF = Near(0.02, dict(rtol=2e-3, atol=2e-3))  # 11 bits
BFLOAT = Near(0.1, dict(rtol=2e-2, atol=2e-2))  # 8 bits


class Loop(NamedTuple):
    options: Tuple[Any, ...]
    near: Near = EXACTLY
    ranks: int = 1
    plain: Tuple[Any, ...] = ()  # with which the plain loop does the same
    stand_ins: bool = False
    torch: Tuple[int, int] = (1, 12)  # since which a CPU can compute so
    long: bool = False


# three batches in two updates: in the second a rank has none, and likewise in validation
THREE = ("--max-sentences", 8, "--max-epoch", 1, "--batch-size-valid", 10)
ONE_RANK = (*THREE, "--update-freq", 2)
SUBSETS = ("--valid-subset", "valid,test", "--batch-size-valid", 6)
NOTHING_CHANGES = {
    "legacy_ddp": ("--ddp-backend", "legacy_ddp"),
    "amp": ("--amp",),  # without stand-ins a CPU computes as always
    "store-ema": ("--store-ema", "--ema-decay", 0.9),
    "num-workers": ("--num-workers", 2),
    "required-batch-size-multiple": ("--required-batch-size-multiple", 8),
    "checkpoint-activations": ("--checkpoint-activations",),
    "fixed-validation-seed": ("--fixed-validation-seed", 7),
    "several valid subsets": ("--valid-subset", "valid,test"),
}
LOOPS = {
    "all that changes nothing": Loop(sum(NOTHING_CHANGES.values(), ())),
    **{name: Loop(options, long=True) for name, options in NOTHING_CHANGES.items()},
    "batch-size-valid": Loop(("--batch-size-valid", 5), ROUNDED),
    "update-freq": Loop(("--max-sentences", 12, "--update-freq", 2), ROUNDED),
    "two ranks, legacy_ddp": Loop(
        (*THREE, "--ddp-backend", "legacy_ddp"), ROUNDED, ranks=2, plain=ONE_RANK
    ),
    # fairseq 0.12.2's encoder layers hold weights that training never uses
    "two ranks, pytorch_ddp": Loop(
        (*THREE, "--ddp-backend", "pytorch_ddp", "--find-unused-parameters"),
        ROUNDED,
        ranks=2,
        plain=ONE_RANK,
        stand_ins=True,
    ),
    # from a cache that has only one of them
    "two ranks, several valid subsets": Loop(
        (*THREE, *SUBSETS, "--ddp-backend", "legacy_ddp"),
        ROUNDED,
        ranks=2,
        plain=(*ONE_RANK, *SUBSETS),
        long=True,
    ),
    # scale 1: fairseq divides the gradient by it twice (its scaler's step unscales once more)
    "amp, its scaler on": Loop(
        ("--amp", "--fp16-init-scale", 1), ROUNDED, stand_ins=True, torch=(2, 3), long=True
    ),
    "fp16": Loop(("--fp16",), HALF, stand_ins=True, torch=(2, 1)),
    # needs Adam, which blows up whatever rounding leaves of a gradient that is 0
    "memory-efficient-fp16": Loop(
        ("--memory-efficient-fp16", *ADAM), HALF._replace(weights=None), plain=ADAM, torch=(2, 1)
    ),
    "bf16": Loop(("--bf16",), BFLOAT, stand_ins=True),
    "memory-efficient-bf16": Loop(
        ("--memory-efficient-bf16", *ADAM),
        BFLOAT._replace(weights=None),
        plain=ADAM,
        stand_ins=True,
        long=True,
    ),
}


def can(torch_version: Tuple[int, int]) -> bool:
    return tuple(int(n) for n in torch.__version__.split(".")[:2]) >= torch_version


def compare(found: Trained, expected: Trained, near: Near) -> None:
    for tag, prefix, keys in (
        ("train_inner", "", (*LOSSES, "kd_selected", "kd_weight", "gnorm", "wpb")),
        ("valid", "valid_", LOSSES),
    ):
        for key in keys:
            here, there = (one.run.series(tag, prefix + key) for one in (found, expected))
            assert len(there) == 2 or tag == "valid"
            assert here == pytest.approx(there, abs=near.losses), (tag, key)
    if near.weights is not None:
        assert_same_weights(found.checkpoint, expected.checkpoint, **near.weights)


def test_loop(loop, train, plain, stand_ins, count):
    if not can(loop.torch):
        pytest.skip(f"torch {torch.__version__} has no half precision on a CPU")
    more = stand_ins if loop.stand_ins else ()
    found = train(*loop.options, *more, ranks=loop.ranks)
    compare(found, plain(*loop.plain), loop.near)
    count(COMPARED)


def test_sentence_avg(train, plain, count):
    """The same gradient, divided by sentences instead of tokens."""
    expected = plain()
    per_sentence = expected.run.series("train_inner", "wpb")[0] / SENTENCES
    found = train("--sentence-avg", "--lr", LEARNING_RATE / per_sentence)
    for key, factor in (("loss", per_sentence), ("gnorm", per_sentence), ("kd_loss", 1)):
        there = [factor * value for value in expected.run.series("train_inner", key)]
        assert found.run.series("train_inner", key) == pytest.approx(there, rel=1e-3), key
    assert_same_weights(found.checkpoint, expected.checkpoint, **ROUNDED.weights)
    count(COMPARED)


def test_clip_norm(train, plain, count):
    """The same step as at a learning rate that is smaller by as much as the gradient is longer."""
    longest = 0.1
    found = train("--clip-norm", longest)
    norms = found.run.series("train_inner", "gnorm")  # before they are clipped
    assert min(norms) > longest and norms[0] == plain().run.series("train_inner", "gnorm")[0]
    rates = [LEARNING_RATE * longest / norm for norm in norms]
    expected = train("--lr", ",".join(map(str, rates)))
    # norms are logged with three digits
    assert_same_weights(found.checkpoint, expected.checkpoint, rtol=1e-3, atol=1e-4)
    count(COMPARED)


@pytest.mark.parametrize("precision", ["--fp16", "--memory-efficient-fp16", "--amp"])
def test_an_update_that_overflowed_never_happened(precision, train, stand_ins, long, count):
    """The loss scaler gives it up: its scores are compared with by nobody, its number, and so its
    weight, is the next one's."""
    if not can((2, 3)):
        pytest.skip(f"torch {torch.__version__} scales no loss on a CPU")
    if precision.startswith("--memory") and not long:
        pytest.skip("in the long form")
    options = (precision, *stand_ins, *ADAM, "--train-subset", "train", "--max-sentences", 16)
    # weights stay as they are, so that what is found of a batch does not depend on earlier ones
    options += ("--lr", 0, "--disable-validation")
    scale = 2**126 if precision == "--amp" else 2**24
    found = train(*options, "--max-update", 2, "--fp16-init-scale", scale)
    # fairseq goes on with the next batch; amp tries the same one twice more before
    overflows = found.run.text.count("overflow detected")
    skipped = found.run.text.count("AMP: skipping" if precision == "--amp" else "overflow detected")
    assert skipped
    smooth = train(*options, "--max-update", 2 + skipped)
    assert "overflow" not in smooth.run.text

    def series(trained, key):
        return trained.run.series("train_inner", key)

    def scores(trained):
        return load(trained.checkpoint)["extra_state"]["train_iterator"]["kd_queue"]["scores"]

    assert series(found, "num_updates") == [1, 2] and series(found, "kd_weight") == [0.3, 0.6]
    assert series(found, "nll_loss") == series(smooth, "nll_loss")[skipped:]
    assert scores(found).equal(scores(smooth)[-int(sum(series(found, "wpb"))) :])
    count("updates that overflowed", overflows)
