"""A teacher on its own: what it says about a batch, whatever its checkpoint and vocabulary."""

import ast
import re
import shutil

import pytest
import torch
from trainer import (
    SOURCE,
    TARGET,
    dictionary,
    new_task,
    save_dictionaries,
    write_data,
    write_mbart,
    write_teacher,
)

from kd_plugin.checkpoints import VocabularyError
from kd_plugin.errors import UserError
from kd_plugin.teachers import Student, Teacher, TeacherError, TeacherSettings


# a transformer's logits are projected when they are asked for, an lstm's are not
@pytest.fixture(params=["transformer", "lstm", "bart_base"])
def arch(request):
    return request.param


SENTENCES = [("abac", "ABAC"), ("gfe", "GIFE"), ("d", "DH")]


def logits(path, source=SOURCE, target=TARGET, **settings):
    """What a teacher says to a student of these symbols, (tokens, the student's vocabulary)."""
    source, target = dictionary(source), dictionary(target)
    opened = Teacher.open(TeacherSettings([path], **settings), Student(source, target, "aa", "bb"))

    def batch(symbols, sentences, bos):
        rows = [[*bos, *map(symbols.index, s), *[symbols.pad()] * (4 - len(s))] for s in sentences]
        return torch.tensor(rows)

    sources, targets = zip(*SENTENCES)
    inputs = {
        "src_tokens": batch(source, sources, []),
        "src_lengths": torch.tensor([len(s) for s in sources]),
        "prev_output_tokens": batch(target, targets, [target.eos()]),
    }
    answer = opened({"net_input": inputs})
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


def renamed(teacher, folder):
    """A teacher whose data called the languages a_A and b_B; its dictionaries have their order."""
    state = torch.load(teacher)
    vars(state["args"]).update(source_lang="a_A", target_lang="b_B")
    torch.save(state, teacher)
    for lang, name in (("aa", "a_A"), ("bb", "b_B")):
        (folder / f"dict.{lang}.txt").rename(folder / f"dict.{name}.txt")


def advised_overrides(error):
    return ast.literal_eval(re.search(r'--teacher-overrides "(.*)"', str(error.value)).group(1))


def test_what_is_advised_for_other_names_of_languages_leads_to_the_same_teacher(tmp_path):
    """Its own names name its dictionaries, whose order is not the student's."""
    teacher = write_teacher(tmp_path, "gcafdbe", "CIBADHGEF")
    expected = logits(teacher)
    renamed(teacher, tmp_path)
    save_dictionaries(tmp_path, dictionary(SOURCE), dictionary(TARGET))  # the student's, beside it
    for data in ([], [str(tmp_path)]):
        with pytest.raises(TeacherError, match="translates a_A-b_B, expected was aa-bb") as error:
            logits(teacher, data=data)
        assert torch.equal(logits(teacher, overrides=advised_overrides(error), data=data), expected)
    assert not torch.equal(expected, logits(write_teacher(tmp_path)))


def test_dictionaries_that_have_the_students_names_must_be_named(tmp_path):
    """Beside a teacher of other names they may be the student's; --teacher-data says that they are
    its own."""
    teacher = write_teacher(tmp_path, "gcafdbe", "CIBADHGEF")
    expected = logits(teacher)
    renamed(teacher, tmp_path)
    own = tmp_path / "own"
    own.mkdir()
    for lang, name in (("aa", "a_A"), ("bb", "b_B")):
        (tmp_path / f"dict.{name}.txt").rename(own / f"dict.{lang}.txt")
        shutil.copy(str(own / f"dict.{lang}.txt"), str(tmp_path))
    names = {"source_lang": "aa", "target_lang": "bb"}
    with pytest.raises(VocabularyError) as error:
        logits(teacher, overrides=names)
    expected_words = (
        "no dict.a_A.txt and dict.b_B.txt found beside it or in the data folder that it names, "
        f"though dict.aa.txt, dict.bb.txt in {tmp_path}. --teacher-data names the folder with the "
        "dict.*.txt it was trained with, as dict.a_A.txt and dict.b_B.txt or dict.aa.txt and "
        "dict.bb.txt."
    )
    assert expected_words in str(error.value)
    assert torch.equal(logits(teacher, overrides=names, data=[str(own)]), expected)
    (own / "dict.aa.txt").unlink()
    with pytest.raises(VocabularyError, match="dict.b_B.txt or dict.aa.txt and dict.bb.txt there"):
        logits(teacher, overrides=names, data=[str(own)])


@pytest.mark.parametrize("left", [dict(), dict(left_pad_source=False, left_pad_target=True)])
@pytest.mark.parametrize("bos", [False, True])
def test_an_mbart_reads_what_its_own_task_makes_of_a_sentence(bos, left, tmp_path):
    """The tags of languages are neither in the student's data nor in its dictionaries."""
    data = write_data(tmp_path / "data")
    teacher, model, own = write_mbart(tmp_path, data, bos)
    student = new_task(data=str(data), **left)
    batches = []
    student.load_dataset("train")
    for task in (own, student):
        dataset = task.dataset("train")
        batch = dataset.collater([dataset[i] for i in range(len(dataset))])
        batches.append((batch["id"].tolist(), batch["net_input"], batch["target"]))
    (ids, net_input, targets), (order, inputs, targets_of_student) = batches
    known, end = len(student.target_dictionary), student.target_dictionary.eos()
    lp = torch.log_softmax(model(**net_input)[0][..., :known], -1)
    expected = {}
    for i, row, target in zip(ids, lp, targets.tolist()):
        last = target.index(end)  # behind it is a tag, before it perhaps a <s>
        expected[i] = row[int(bos) : last + 1]
    opened = Teacher.open(TeacherSettings([teacher]), student.student())
    assert opened.max_positions() == (11 - bos, 10 - bos)
    answer, width = opened({"net_input": inputs}), targets_of_student.size(1)
    for at, (i, target) in enumerate(zip(order, targets_of_student)):
        rows = target.ne(student.target_dictionary.pad()).nonzero().squeeze(1) + at * width
        found = torch.log_softmax(answer.logits(rows), -1)
        torch.testing.assert_close(found, expected[i], rtol=1e-5, atol=1e-5)
    assert len(expected) == len(order) == 5


def test_an_mbart_of_languages_that_nothing_names(tmp_path):
    data = write_data(tmp_path / "data")
    teacher, _, _ = write_mbart(tmp_path, data, False)
    state = torch.load(teacher)
    vars(state["args"]).update(source_lang=None, langs="bb,xx,yy")
    torch.save(state, teacher)
    with pytest.raises(UserError, match=r"aa is none of the languages of .* \(bb, xx, yy\): name"):
        logits(teacher)


def test_the_probe_looks_at_a_few_rows_of_the_vocabulary_at_a_time(tmp_path, monkeypatch):
    """All positions of eight long sentences at once would be gigabytes of logits."""
    from trainer import SENTENCES, new_task, write_data

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
    task.probe(opened, "train")
    tokens = sum(len(target) + 1 for _, target in SENTENCES["train"])
    assert max(sizes) == 3 and sum(sizes) == tokens
