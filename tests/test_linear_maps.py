"""``--kd-hidden mse``: linear maps that are trained along, and stay behind."""

import shutil

import pytest
import support
import torch
from support import SGD, assert_same_weights, distil, fairseq, load, train_on_two_ranks, validate
from trainer import Training, write_data, write_teacher

from kd_plugin.errors import UserError
from kd_plugin.objective.states import first_maps, mse

MSE = (
    *("--kd-hidden", "mse", "--kd-hidden-layers", "encoder:-1=-1,decoder:0=0"),
    *("--kd-attention-weight", 0.1, "--kd-attention-layers", "cross:-1=-1"),
)
ANEW = "no linear maps between these layers"


def test_value_and_gradient():
    """Against a loop in double precision; what stands at padding does not matter."""
    generator = torch.Generator().manual_seed(1)
    real = torch.tensor([[False, True, True], [True, True, True]])  # padded on the left
    student, teacher, linear = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 3, 4), (2, 3, 6), (6, 4))
    )
    expected, of_student, of_linear = 0.0, torch.zeros_like(student), torch.zeros_like(linear)
    for b, position in real.nonzero().tolist():
        distance = linear @ student[b, position] - teacher[b, position]
        expected += float((distance**2).sum()) / 12
        of_student[b, position] = linear.t() @ distance / 6
        of_linear += torch.outer(distance, student[b, position]) / 6
    student[0, 0] = float("nan")
    student.requires_grad_()
    linear.requires_grad_()
    found = mse(student, teacher, real, linear)
    found.backward()
    assert found.item() == pytest.approx(expected)
    torch.testing.assert_close(student.grad, of_student)
    torch.testing.assert_close(linear.grad, of_linear)
    with pytest.raises(UserError, match="a teacher 6 wide and of a student 4 wide.*got 5 and 4"):
        mse(student, teacher[..., :5], real, linear)


def test_maps_before_training():
    before = torch.random.get_rng_state()
    one, other = first_maps([(8, 8), (6, 8)]), first_maps([(8, 8), (6, 8)])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one[0], torch.eye(8))
    assert one[1].shape == (6, 8) and torch.equal(one[1], other[1]) and one[1].std() > 0.2


def test_only_mse_has_parameters_and_a_student_like_its_teacher_has_no_distance(tmp_path):
    data, teacher = write_data(tmp_path / "data"), write_teacher(tmp_path, knowing=True)
    task = {"teacher_checkpoint_path": f"{teacher}:{teacher}", "teacher_weights": "3,1"}
    assert not list(Training(data, task, kd_hidden="relations").criterion.parameters())
    begun = Training(data, task, kd_hidden="mse").begin()
    assert [p.shape for p in begun.criterion.parameters()] == [(8, 8)] * 4  # 2 layers, 2 models
    (log,) = begun.update(begun.batches()[:1])
    assert log["kd_hidden"] > 0 and log["kd_hidden_positions"] > 0
    assert all((p.grad != 0).any() for p in begun.criterion.parameters())
    begun.model.load_state_dict(begun.task.source.teacher.members[0].model.state_dict())
    assert begun.validate(begun.batches("valid")[0])["kd_hidden"] == pytest.approx(0, abs=1e-9)


def test_a_dropped_layer_leaves_a_gradient_of_0(tmp_path):
    """Which ranks that average gradients wait for."""
    data, teacher = write_data(tmp_path / "data"), write_teacher(tmp_path, knowing=True)
    begun = Training(data, {"teacher_checkpoint_path": teacher}, kd_hidden="mse").begin()
    encoder = begun.model.encoder
    encoder.layers = Skipped([encoder.layers[0]])
    begun.update(begun.batches()[:1])
    dropped, other = (p.grad for p in begun.criterion.parameters())
    assert (dropped == 0).all() and (other != 0).any()


class Skipped(torch.nn.ModuleList):
    """As layerdrop leaves out all of them."""

    def __iter__(self):
        return iter(())


def test_a_training_without_its_teacher_is_refused_as_ever(tmp_path):
    data = write_data(tmp_path / "data")
    begun = Training(data, {"teacher_checkpoint_path": "gone.pt"}, kd_hidden="mse")
    assert not list(begun.criterion.parameters())
    with pytest.raises(UserError, match=r"gone\.pt: no such checkpoint"):
        begun.begin()


def maps(path):
    return load(path)["criterion"]


@pytest.fixture(scope="module")
def trained(data, teacher, tmp_path_factory):
    """Three updates of a student half as wide as its teacher; the state after two is kept."""
    folder = tmp_path_factory.mktemp("mse")
    options = (*MSE, "--max-update", 3, "--save-interval-updates", 2, "--disable-validation")
    return distil(data, teacher, folder, *options).ok(), folder


def test_they_are_saved_and_resumed_to_the_bit(trained, data, teacher, tmp_path):
    run, folder = trained
    assert all(x > 0 for x in run.series("train_inner", "kd_hidden"))
    last = maps(folder / "checkpoint_last.pt")
    assert [w.shape for w in last.values()] == [(32, 16)] * 2
    assert not torch.equal(last["maps.0"], first_maps([(32, 16)])[0])  # trained along

    shutil.copy(str(folder / "checkpoint_1_2.pt"), str(tmp_path / "checkpoint_last.pt"))
    more = (*MSE, "--max-update", 3, "--disable-validation")
    resumed = distil(data, teacher, tmp_path, *more).ok()
    assert resumed.series("train_inner", "kd_hidden") == run.series("train_inner", "kd_hidden")[2:]
    assert_same_weights(tmp_path / "checkpoint_last.pt", folder / "checkpoint_last.pt")
    for name, weight in maps(tmp_path / "checkpoint_last.pt").items():
        assert torch.equal(weight, last[name])


def test_they_stay_behind(trained, data, tmp_path):
    """A validation, which has no maps, measures everything else; an export has none."""
    checkpoint = trained[1] / "checkpoint_last.pt"
    found = validate(data, checkpoint).ok().metrics()
    assert found["kd_loss"] > 0 and "kd_hidden" not in found
    exported = tmp_path / "model.pt"
    output = ("--format", "fairseq", "--output", exported)
    fairseq("fairseq-kd-export", "--path", checkpoint, "--data", data, *output).ok()
    state = load(exported)
    assert state["criterion"] is None and not any("maps" in name for name in state["model"])


def test_they_start_anew_where_a_checkpoint_has_none(distilled, data, teacher, tmp_path):
    options = (*MSE, "--max-update", 1, "--disable-validation")
    again = [f"--reset-{what}" for what in ("optimizer", "lr-scheduler", "dataloader", "meters")]
    more = ("--restore-file", distilled.checkpoint, *again)
    assert ANEW in distil(data, teacher, tmp_path / "again", *options, *more).ok().text
    more = ("--finetune-from-model", distilled.checkpoint)
    assert ANEW in distil(data, teacher, tmp_path / "tuned", *options, *more).ok().text
    assert len(maps(tmp_path / "tuned" / "checkpoint_last.pt")) == 2


def test_two_ranks_train_the_same_maps_as_one_with_two_batches(data, teacher, tmp_path):
    options = (*SGD, *MSE, "--max-update", 3, "--ddp-backend", "legacy_ddp")
    options = (*options, "--disable-validation")
    arguments = support.kd_arguments(data, teacher, tmp_path / "two", *options)
    two = train_on_two_ranks(*arguments)[0].ok()
    one = distil(data, teacher, tmp_path / "one", *options, "--update-freq", 2).ok()
    expected = one.series("train_inner", "kd_hidden")
    assert two.series("train_inner", "kd_hidden") == pytest.approx(expected, abs=0.0021)
    found, wanted = (maps(tmp_path / name / "checkpoint_last.pt") for name in ("two", "one"))
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)
