"""A teacher on its own: what it says about a batch, whatever its checkpoint and vocabulary."""

import re

import pytest
import torch
from trainer import SOURCE, TARGET, dictionary, save_dictionaries, write_teacher

from kd_plugin.teachers import Student, Teacher, TeacherSettings


# a transformer's logits are projected when they are asked for, an lstm's are not
@pytest.fixture(params=["transformer", "lstm"])
def arch(request):
    return request.param


SENTENCES = [("abac", "ABAC"), ("gfe", "GIFE"), ("d", "DH")]


def logits(path, source=SOURCE, target=TARGET):
    """What a teacher says to a student of these symbols, (tokens, the student's vocabulary)."""
    source, target = dictionary(source), dictionary(target)
    opened = Teacher.open(TeacherSettings([path]), Student(source, target, "aa", "bb"))

    def batch(symbols, sentences, bos):
        rows = [[*bos, *map(symbols.index, s), *[symbols.pad()] * (4 - len(s))] for s in sentences]
        return torch.tensor(rows)

    sources, targets = zip(*SENTENCES)
    answer = opened(
        {
            "src_tokens": batch(source, sources, []),
            "src_lengths": torch.tensor([len(s) for s in sources]),
            "prev_output_tokens": batch(target, targets, [target.eos()]),
        }
    )
    return answer.logits(torch.arange(15))


@pytest.mark.parametrize("copies", [True, False])
def test_second_copies_of_weights_come_and_go_between_versions(copies, tmp_path):
    """fairseq 0.12.2 writes them, and later ones know nothing of them."""
    teacher = write_teacher(tmp_path)
    expected = logits(teacher)
    state = torch.load(teacher)
    weights = {k: w for k, w in state["model"].items() if not re.search(r"_(weight|bias)$", k)}
    if copies:
        layer = "encoder.layers.0."
        for kind in ("weight", "bias"):
            parts = [weights[f"{layer}self_attn.{p}_proj.{kind}"] for p in "qkv"]
            weights[layer + "in_proj_" + kind] = torch.cat(parts)
            weights[layer + "out_proj_" + kind] = weights[layer + "self_attn.out_proj." + kind]
            for fc in ("fc1", "fc2"):
                weights[f"{layer}{fc}_{kind}"] = weights[layer + fc + "." + kind]
    torch.save({**state, "model": weights}, teacher)
    assert torch.equal(logits(teacher), expected)


def test_another_order_of_its_dictionaries_changes_nothing(arch, tmp_path):
    """Its rows move along, so that it is the same teacher."""
    teacher = write_teacher(tmp_path, arch=arch)
    expected = logits(teacher)
    state = torch.load(teacher)
    moved = dictionary("gcafdbe"), dictionary("CIBADHGEF")
    for side, before, after in zip(
        ("encoder", "decoder"), (dictionary(SOURCE), dictionary(TARGET)), moved
    ):
        rows = torch.tensor([before.index(symbol) for symbol in after.symbols])
        for name, weight in state["model"].items():
            if re.match(side + r"\.(embed_tokens|output_projection|fc_out)\.", name):
                state["model"][name] = weight[rows]
    torch.save(state, teacher)
    save_dictionaries(tmp_path, *moved)
    torch.testing.assert_close(logits(teacher), expected, rtol=1e-6, atol=1e-6)


def test_more_symbols_than_the_students_are_as_if_they_were_impossible(arch, tmp_path):
    """The student's get the teacher's probabilities, given that it is one of them."""
    larger = "uabcvdefgw", "xABCDyEFGHIz"
    teacher = write_teacher(tmp_path, *larger, arch=arch)
    p = torch.softmax(logits(teacher, *larger).double(), -1)
    theirs, ours = dictionary(larger[1]), dictionary("IHGFEDCBA")
    p = p[:, [theirs.index(symbol) for symbol in ours.symbols]]
    assert (p.sum(-1) < 0.9).all()
    found = torch.softmax(logits(teacher, SOURCE, "IHGFEDCBA").double(), -1)
    torch.testing.assert_close(found, p / p.sum(-1, keepdim=True), rtol=1e-5, atol=1e-7)


def test_the_probe_looks_at_a_few_rows_of_the_vocabulary_at_a_time(tmp_path, monkeypatch):
    """All positions of eight long sentences at once would be gigabytes of logits."""
    from trainer import SENTENCES, new_task, write_data

    from kd_plugin.teachers import probe as public
    from kd_plugin.teachers import run

    teacher = write_teacher(tmp_path, knowing=True)
    task = new_task(data=str(write_data(tmp_path / "data")))
    task.load_dataset("train")
    opened = Teacher.open(TeacherSettings([teacher]), task.student())
    sizes = []
    rows = run.RunningAnswer.rows

    def watched(self, index, like):
        sizes.append(len(index))
        return rows(self, index, like)

    monkeypatch.setattr(run.RunningAnswer, "rows", watched)
    module = __import__("sys").modules["kd_plugin.teachers.probe"]
    monkeypatch.setattr(module, "rows_at_once", lambda device, vocabulary: 1)
    monkeypatch.setattr(module, "rows_ahead", lambda device: 3)
    public(opened, task.dataset("train"), task.student(), "train")
    tokens = sum(len(target) + 1 for _, target in SENTENCES["train"])
    assert max(sizes) == 3 and sum(sizes) == tokens
