"""A student of several pairs of languages, each taught by a teacher of its own, or all by one."""

import math
import shutil
from argparse import ArgumentParser, Namespace

import pytest
import torch
from fairseq import models
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.data import Dictionary
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from support import in_process, load, tree
from test_states import by_fairseq, kl, relations
from trainer import (
    SENTENCES,
    SOURCE,
    TARGET,
    Training,
    arguments,
    criterion_config,
    dictionary,
    save_dictionaries,
    write_data,
    write_teacher,
)

from kd_plugin.checkpoints import Checkpoint
from kd_plugin.errors import UserError
from kd_plugin.objective import Place, Settings, distillation_objective
from kd_plugin.objective.selection import ScoreQueue, ScoreQueues, Selection, TokenStatistics
from kd_plugin.objective.states import MAPS, SIDES
from kd_plugin.tasks.translation_multi_simple_epoch import KDTranslationMultiSimpleEpochTask
from kd_plugin.teachers import Step

NAME = "kd_translation_multi_simple_epoch"
PAIRS = ("aa-bb", "cc-bb")
# the other pair's, longer and shorter, so that a batch of both has padding
OTHERS = {
    "train": [("gfe", "GIFE"), ("abac", "ABAC"), ("bb", "B")],
    "valid": [("d", "DH"), ("acf", "CA")],
}
TEXT = dict(zip(PAIRS, (SENTENCES, OTHERS)))
REPLACING = ("--encoder-langtok", "src", "--decoder-langtok", "--lang-tok-replacing-bos-eos")
BOTH = ("--encoder-langtok", "tgt", "--decoder-langtok")
TAGS = [(), ("--encoder-langtok", "src"), BOTH, REPLACING]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("multi")
    return write_pairs(folder, SENTENCES, OTHERS)


def write_pairs(folder, first, second):
    data, other = write_data(folder / "data", first), write_data(folder / "other", second)
    for file in other.iterdir():
        file.rename(data / file.name.replace("aa", "cc")) if "aa" in file.name else None
    return data


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """One with the data's dictionaries, one with more symbols in another order."""
    folders = [tmp_path_factory.mktemp(pair) for pair in PAIRS]
    first = write_teacher(folders[0], knowing=True)
    second = write_teacher(folders[1], SOURCE[::-1] + "x", "y" + TARGET[::-1], knowing=True)
    for name in ("dict.aa.txt", "dict.bb.txt"):  # it translates from cc
        text = (folders[1] / name).read_text()
        (folders[1] / name.replace("aa", "cc")).write_text(text)
    state = load(second)
    state["args"].source_lang = "cc"
    torch.save(state, second)
    return first, second


def named(teachers, pairs=PAIRS):
    return ("--teacher-checkpoint-path", ",".join(map("{}={}".format, pairs, teachers)))


class Learning(Training):
    def __init__(self, data, *flags, pairs=PAIRS, **criterion):
        parser = ArgumentParser()
        KDTranslationMultiSimpleEpochTask.add_args(parser)
        given = (data, "--lang-pairs", ",".join(pairs), *flags)
        args = parser.parse_args([*map(str, given)])
        vars(args).update(train_subset="train", dataset_impl=None, disable_validation=False)
        vars(args).update(save_dir="nowhere", restore_file="checkpoint_last.pt", seed=1)
        vars(args).update(update_ordered_indices_seed=False, _name=NAME)
        self.task = KDTranslationMultiSimpleEpochTask.setup_task(args)
        torch.manual_seed(2)
        self.model = self.task.build_model(arguments())
        self.criterion = self.task.build_criterion(criterion_config(**criterion))
        self.updates = 0
        self.optimizer = Namespace(
            backward=lambda loss: loss.backward(), step=lambda: None, zero_grad=lambda: None
        )

    def opened(self):
        """Teachers that need not know anything."""
        for subset in ("valid", "train"):
            self.load(subset)
        for source in self.task.source.sources:
            source._open(self.model)
        return self

    def batch(self, subset="train"):
        """All its sentences, of both pairs."""
        dataset = self.task.dataset(subset)
        return dataset.collater([dataset[i] for i in range(len(dataset))])


def taught(training, batch):
    return training.task._taught(batch, Step())


def loss_of(criterion, model, sample):
    model.zero_grad()
    loss, size, log = criterion(model, sample)
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return loss.item(), size, grads, log


def own_logits(path, source, target, tags=((), ("</s>",), ("</s>",))):
    """A teacher's rows for one sentence, by its symbols, from nothing but its own forward pass.

    Args:
        tags: before and behind the source, and before the target.
    """
    state = load(path)
    read, write = (
        Dictionary.load(f"{path.rpartition('/')[0]}/dict.{lang}.txt")
        for lang in (state["args"].source_lang or "aa", "bb")
    )
    for symbol in getattr(state["args"], "added", ()):
        read.add_symbol(symbol), write.add_symbol(symbol)
    model = models.build_model(state["args"], TranslationTask(TranslationConfig(), read, write))
    model.load_state_dict(state["model"])
    model.eval()
    words = [read.index(symbol) for symbol in (*tags[0], *source, *tags[1])]
    before = [write.index(symbol) for symbol in (*tags[2], *target)]
    with torch.no_grad():
        logits = model(torch.tensor([words]), torch.tensor([len(words)]), torch.tensor([before]))[
            0
        ][0]
    return logits[len(tags[2]) - 1 :], write.symbols


@pytest.mark.parametrize("tags", TAGS)
def test_each_sentence_is_asked_of_its_pairs_teacher(tags, data, teachers):
    t = Learning(data, *named(teachers), *tags, ignore_prefix_size=int(tags == BOTH)).opened()
    batch = t.batch()
    answer = t.task.source.answer(batch, Step())
    width, seen = batch["target"].size(1), set()
    for number, (pair, sentence) in enumerate(zip(batch["pair"].tolist(), batch["id"].tolist())):
        source, target = TEXT[PAIRS[pair]]["train"][sentence]
        expected, symbols = own_logits(teachers[pair], source, target)
        first = number * width + (tags == BOTH)
        found = answer.rows(torch.arange(first, first + len(target) + 1), torch.zeros(())).logits
        ours = t.task.target_dictionary
        for symbol in ours.symbols:
            column = found[:, ours.index(symbol)]
            if symbol in symbols:
                torch.testing.assert_close(
                    column, expected[:, symbols.index(symbol)], rtol=1e-4, atol=1e-5
                )
            else:  # a token of a language
                assert symbol.startswith("__") and column.eq(-math.inf).all()
        seen.add((pair, sentence))
    assert len(seen) == len(batch["id"]) == 8


def write_multilingual(folder, tags):
    """A teacher of fairseq's task with the data's dictionaries and tags, which knows nothing."""
    folder.mkdir()
    args = arguments()
    args.task, args.langs, args.lang_pairs = NAME[3:], ["bb", "cc", "aa"], list(PAIRS)
    args.source_lang = args.target_lang = None
    args.encoder_langtok = tags[1] if tags else None
    args.decoder_langtok = "--decoder-langtok" in tags
    args.lang_tok_replacing_bos_eos = tags == REPLACING
    args.added = [f"__{name}__" for name in args.langs]
    sides = []
    for text, langs in ((SOURCE, ("aa", "cc")), (TARGET, ("bb",))):
        own = dictionary(text)
        for lang in langs:
            own.save(str(folder / f"dict.{lang}.txt"))
        for symbol in args.added:
            own.add_symbol(symbol)
        sides.append(own)
    torch.manual_seed(4)
    model = models.build_model(args, TranslationTask(TranslationConfig(), *sides))
    torch.save({"args": args, "model": model.state_dict()}, str(folder / "teacher.pt"))
    return str(folder / "teacher.pt")


@pytest.mark.parametrize("tags", [("--encoder-langtok", "src"), BOTH, REPLACING])
@pytest.mark.parametrize("students", [(), BOTH, REPLACING])
def test_one_teacher_for_all_pairs(students, tags, data, tmp_path):
    """It reads its own tags, whatever the student's are; its weights are there once."""
    path = write_multilingual(tmp_path / "teacher", tags)
    flags = ("--teacher-checkpoint-path", path, *students)
    ignored = int(students == BOTH and tags != BOTH)
    t = Learning(data, *flags, ignore_prefix_size=ignored).opened()
    one, two = (source.teacher.members[0] for source in t.task.source.sources)
    assert one.model is two.model
    batch = t.batch()
    # in one pass where pairs do not differ in what is taken out and put in
    differ = students != tags and "src" in (*students, *tags)
    assert len([*t.task.source.asked(batch)]) == 1 + differ
    answer, width = t.task.source.answer(batch, Step()), batch["target"].size(1)
    for number, (pair, sentence) in enumerate(zip(batch["pair"].tolist(), batch["id"].tolist())):
        language = PAIRS[pair][:2] if tags[1] == "src" else "bb"
        tag, target_tag = f"__{language}__", ("__bb__",)
        read = ((tag,), ("</s>",), ("</s>", *(target_tag if tags == BOTH else ())))
        if tags == REPLACING:
            read = ((), (tag,), target_tag)
        source, target = TEXT[PAIRS[pair]]["train"][sentence]
        expected, symbols = own_logits(path, source, target, read)
        first = number * width + (students == BOTH)
        found = answer.rows(torch.arange(first, first + len(target) + 1), torch.zeros(())).logits
        order = [symbols.index(symbol) for symbol in t.task.target_dictionary.symbols]
        torch.testing.assert_close(found, expected[:, order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tags", TAGS)
def test_weight_0_is_stock_and_sums_are_those_of_pairs(tags, data, teachers):
    prefix = int(tags == BOTH)
    common = dict(label_smoothing=0.1, ignore_prefix_size=prefix)
    t = Learning(data, *named(teachers), *tags, kd_weight=0.0, **common).begin()
    stock = LabelSmoothedCrossEntropyCriterion(t.task, False, 0.1, prefix)
    t.criterion.train()
    batch = t.batch()
    loss, size, found, log = loss_of(t.criterion, t.model, taught(t, batch))
    plain, plain_size, expected, _ = loss_of(stock, t.model, batch)
    assert size == plain_size and loss == pytest.approx(plain, rel=1e-6)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for name in ("nll_loss", "kd_loss", "kd_tokens"):
        parts = [float(log[f"{name}_{pair}"]) for pair in PAIRS]
        assert min(parts) > 0 and sum(parts) == pytest.approx(float(log[name]), rel=1e-5)
    # a batch of one pair has the same keys
    only = t.task.dataset("train")
    other = t.criterion(t.model, taught(t, only.collater([only[0], only[1]])))[2]
    assert other.keys() == log.keys() and other["tokens_of_cc-bb"] == 0


def test_one_pair_without_tags_is_kd_translation(tmp_path):
    """In loss and gradient, with the languages' tokens in both vocabularies."""
    data, added = write_data(tmp_path / "data"), ["__aa__", "__bb__"]
    (tmp_path / "teacher").mkdir()
    sides = [[*text, *added] for text in (SOURCE, TARGET)]
    teacher = write_teacher(tmp_path / "teacher", *sides, knowing=True)
    save_dictionaries(data, *map(dictionary, sides))
    common = dict(label_smoothing=0.1, kd_weight=0.7, kd_temperature=2.0)
    common.update(kd_hidden="mse", kd_attention_weight=0.5)
    t = Learning(data, *named([teacher]), pairs=PAIRS[:1], **common).begin()
    o = Training(data, {"teacher_checkpoint_path": teacher}, **common).begin()
    dataset = o.task.dataset("train")
    same = dataset.collater([dataset[i] for i in range(len(dataset))])
    o.criterion.train(), t.criterion.train()
    expected, size, gradients, log = loss_of(o.criterion, o.model, taught(o, same))
    loss, ours, found, more = loss_of(t.criterion, t.model, taught(t, t.batch()))
    assert (loss, ours) == (expected, size)
    for name in ("kd_loss", "kd_hidden", "kd_hidden_positions", "kd_attention"):
        assert log[name] == more[name] > 0
    assert all(torch.equal(one, other) for one, other in zip(found, gradients))


def test_tokens_are_selected_within_their_pair(data, teachers):
    """In a batch, and by queues of their own, which a checkpoint keeps by name."""
    nll = torch.tensor([5.0, 1.0, 4.0, 2.0, 0.5, 0.1])
    group = torch.tensor([0, 1, 0, 1, 0, 0])
    tokens = TokenStatistics(nll, group=group)
    assert Selection("batch", 0.5)(tokens).tolist() == [True, False, True, True, False, False]
    within = Selection("batch", 0.5, groups=PAIRS)(tokens)
    assert within.tolist() == [True, False, True, True, False, False]
    within = Selection("batch", 0.25, groups=PAIRS)(tokens)
    assert within.tolist() == [True, False, False, False, False, False]
    within = Selection("batch", 1.0, groups=PAIRS)(tokens)
    assert within.all()

    queue = ScoreQueues(3, PAIRS)
    assert queue.above_quantile(nll, 0.5, group) is None and queue.is_empty
    queue.begin()
    queue.observe(nll[:1], group[:1])
    queue.commit()
    found = queue.above_quantile(nll, 0.5, group)
    assert found.tolist() == [False, True, False, True, False, False]
    queue.begin()
    queue.observe(nll[1:], group[1:])
    queue.commit()
    kept = {name: one.scores.tolist() for name, one in queue.queues.items()}
    assert kept == {"aa-bb": pytest.approx([4.0, 0.5, 0.1]), "cc-bb": [1.0, 2.0]}
    assert queue.above_quantile(nll, 0.5, group).tolist() == [True, False, True, True, False, False]
    resumed = ScoreQueues(3, PAIRS[::-1])
    resumed.load_state_dict(queue.state_dict())
    assert resumed.queues["cc-bb"].scores.tolist() == [1.0, 2.0] and not resumed.is_new
    for other in (ScoreQueue(3), ScoreQueues(3, PAIRS)):  # of another scope: starts anew
        of_other_scope = ScoreQueue(3) if isinstance(other, ScoreQueues) else queue
        other.load_state_dict(of_other_scope.state_dict())
        assert other.is_empty and other.is_new

    options = dict(kd_selection="global", kd_selection_scope="pair", kd_queue_size=1000)
    t = Learning(data, *named(teachers), **options).begin()
    t.update([t.batch()])
    sizes = {name: one.scores.numel() for name, one in t.task.queue.queues.items()}
    assert sizes == {
        pair: sum(len(target) + 1 for _, target in TEXT[pair]["train"]) for pair in PAIRS
    }


def test_selection_by_pair_in_chunks_is_that_of_the_whole():
    torch.manual_seed(0)
    logits, target = torch.randn(40, 5000), torch.randint(5000, (40,))
    group, rows = torch.arange(40) % 2, torch.arange(40)
    selection = Selection("batch", 0.3, groups=PAIRS)
    found = distillation_objective(
        logits, target, rows, _Says(), Settings(selection=selection), group
    )
    nll = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    for number in (0, 1):
        here = group == number
        assert found.selected[here].sum() == 6
        assert nll[here][found.selected[here]].min() > nll[here][~found.selected[here]].max()


class _Says:
    def rows(self, index, like):
        from kd_plugin.objective import Dense

        return Dense(torch.zeros(len(index), 5000))


def test_parts_of_a_batch_are_as_wide_as_their_sentences(data, teachers):
    """An LSTM reads no others."""
    t = Learning(data, *named(teachers)).opened()
    parts = [*t.task.source._parts(t.batch())]
    assert len(parts) == 2
    for _, own, part in parts:
        inputs = own["net_input"]
        assert inputs["src_tokens"].size(1) == inputs["src_lengths"].max() == len(part.columns)


# The inside of teachers, and what the student writes


def one_by_one(t, batch):
    """Of each sentence: its pair, and by side the positions at which student and teacher read or
    predict the same; and what fairseq tells of both models, given the sentence alone."""
    members = [source.teacher.members[0] for source in t.task.source.sources]
    for i, (pair, number) in enumerate(zip(batch["pair"].tolist(), batch["id"].tolist())):
        inputs, words = batch["net_input"], TEXT[PAIRS[pair]]["train"][number]
        source, target = (inputs[name][i] for name in ("src_tokens", "prev_output_tokens"))
        source, target = source[source.ne(1)], target[target.ne(1)]
        ours = by_fairseq(t.model, alone(source, target))
        folder = members[pair].path.rpartition("/")[0]
        sides = [Dictionary.load(f"{folder}/dict.{lang}.txt") for lang in PAIRS[pair].split("-")]
        read, write = ([own.index(x) for x in text] for own, text in zip(sides, words))
        theirs = by_fairseq(
            members[pair].model, alone(torch.tensor([*read, 2]), torch.tensor([2, *write]))
        )
        tag = int(len(source) > len(read) + 1)
        ends = int(source[-1]) == 2  # and not with a tag
        same = {
            "encoder": [(p + tag, p) for p in range(len(read) + ends)],
            "decoder": [(p + len(target) - 1 - len(write), p) for p in range(len(write) + 1)],
        }
        yield pair, same, ours, theirs


def alone(source, target):
    lengths = torch.tensor([len(source)])
    return {
        "src_tokens": source[None],
        "src_lengths": lengths,
        "prev_output_tokens": target[None],
    }


@pytest.mark.parametrize("tags", TAGS)
def test_each_sentence_learns_from_the_inside_of_its_pairs_teacher(tags, data, teachers):
    """Term by term against the sentences alone, in value and in gradients of the linear maps."""
    common = dict(ignore_prefix_size=int(tags == BOTH), kd_weight=0.0)
    for how in ("relations", "mse"):
        flags = dict(kd_hidden=how, kd_attention_weight=0.25, **common)
        t = Learning(data, *named(teachers), *tags, **flags).opened()
        t.criterion.train()
        maps = [*t.criterion.parameters()]
        assert len(maps) == (4 if how == "mse" else 0)  # of two layers and two teachers
        torch.manual_seed(3)
        for linear in maps:
            torch.nn.init.normal_(linear)
        batch = t.batch()
        loss, _, log = t.criterion(t.model, taught(t, batch))
        loss.backward()
        found = [linear.grad.clone() for linear in maps]
        t.criterion.zero_grad()
        hidden = cross = positions = 0.0
        for pair, same, ours, theirs in one_by_one(t, batch):
            for number, side in enumerate(("encoder", "decoder")):
                own, at = zip(*same[side])
                mine = ours[Place(side, 0)][0][[*own]].detach()
                other = theirs[Place(side, 0)][0][[*at]].detach()
                if how == "mse":
                    away = mine @ maps[2 * number + pair].t() - other
                    hidden = hidden + (away**2).sum() / (2 * other.size(1))
                else:
                    everything = torch.ones(1, len(own), dtype=torch.bool)
                    hidden = hidden + relations(mine[None], other[None], everything) / math.log(2)
                positions += len(own)
            for kind in MAPS:
                (own_q, q), (own_k, k) = (zip(*same[side]) for side in SIDES[kind])
                mine = ours[Place(kind, 0)][0][[*own_q]][:, [*own_k]].detach()
                other = theirs[Place(kind, 0)][0][[*q]][:, [*k]].detach()
                for s, p in zip(mine, other):
                    cross += float(kl(p / p.sum(), s / s.sum())) / math.log(2)
        assert float(log["kd_hidden"]) == pytest.approx(hidden.item(), rel=1e-4)
        assert float(log["kd_attention"]) == pytest.approx(cross, rel=1e-4)
        assert log["kd_hidden_positions"] == positions
        if how == "mse":
            hidden.backward()
            for one, linear in zip(found, maps):
                torch.testing.assert_close(one, linear.grad, rtol=1e-3, atol=1e-5)


def test_maps_of_teachers_that_a_batch_does_not_ask(data, teachers):
    """Have a gradient of 0, which ranks that average gradients wait for. One teacher of all
    pairs has one map for a layer."""
    t = Learning(data, *named(teachers), kd_hidden="mse").begin()
    dataset = t.task.dataset("train")
    samples = [dataset[i] for i in range(len(dataset))]
    (log,) = t.update([dataset.collater([s for s in samples if s[1]["id"] % 2])])
    assert log["kd_loss_cc-bb"] > 0 == log["kd_loss_aa-bb"] and log["kd_hidden"] > 0
    grads = [linear.grad.abs().sum().item() for linear in t.criterion.parameters()]
    assert grads[0] == grads[2] == 0 and grads[1] > 0 and grads[3] > 0


def test_a_student_that_is_its_teacher_has_nothing_to_learn_inside(data, tmp_path):
    path = write_multilingual(tmp_path / "teacher", BOTH)
    flags = dict(kd_hidden="mse", kd_attention_weight=1.0, ignore_prefix_size=1)
    order = ("--langs", "bb,cc,aa")  # the teacher's, of which its symbols are
    t = Learning(data, "--teacher-checkpoint-path", path, *BOTH, *order, **flags).opened()
    assert len([*t.criterion.parameters()]) == 2  # for all pairs together
    t.model.load_state_dict(t.task.source.sources[0].teacher.members[0].model.state_dict())
    log = t.validate(t.batch())
    for name in ("kd_hidden", "kd_attention"):
        assert log[name + "_positions"] > 0 and float(log[name]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "tags, left",
    [*((tags, False) for tags in TAGS), (BOTH, True)],  # fairseq replaces ends on the right alone
    ids=[*map(str, range(len(TAGS))), "left"],
)
def test_the_student_writes_words_behind_the_tokens_of_languages(tags, left, data, teachers):
    """As it likes them best, one by one; no token of a language is written."""
    flags = ("--left-pad-target", left)
    for how in ("argmax", "sample"):
        own = dict(kd_inputs=how, kd_inputs_rate=1.0, ignore_prefix_size=int(tags == BOTH))
        if how == "sample":
            own.update(kd_inputs_temperature=1e-4, kd_inputs_extra_length=1)
        t = Learning(data, *named(teachers), *tags, *flags, **own).begin()
        t.model.encoder.embed_tokens.weight.data.mul_(3)
        ours = t.task.target_dictionary
        never = [1, *(i for i, x in enumerate(ours.symbols) if x.startswith("__"))]
        batch = t.batch()
        made, step = t.task.inputs(batch, Step(update=0), 0)
        assert step.inputs == how and made["pair"] is batch["pair"]
        for i, target in enumerate(batch["target"]):
            reference = target[target.ne(1)].tolist()
            read = batch["net_input"]["prev_output_tokens"][i]
            read = read[read.ne(1)].tolist()
            source = batch["net_input"]["src_tokens"][i]
            source = source[source.ne(1)]
            kept = int(tags == BOTH)
            written, before = reference[:kept], read[: 1 + kept]
            for at in range(kept, batch["target"].size(1)):
                if how == "argmax" and at == len(reference) - 1:
                    written.append(2)
                    break
                inputs = before if how == "sample" else read[: at + 1]
                t.model.eval()
                with torch.no_grad():
                    row = t.model(**alone(source, torch.tensor(inputs)))[0][0, -1]
                row[never + ([2] if how == "argmax" else [])] = -math.inf
                written.append(int(row.argmax()))
                before.append(written[-1])
                if how == "sample" and written[-1] == 2:
                    break
            else:
                written.append(2)
            found, inputs = made["target"][i], made["net_input"]["prev_output_tokens"][i]
            assert found[found.ne(1)].tolist() == written
            assert inputs[inputs.ne(1)].tolist() == [read[0], *written[:-1]]
        if left:
            continue  # fairseq's --ignore-prefix-size counts from the left edge
        (log,) = t.update([batch])
        assert log["kd_inputs"] == log["kd_tokens"] > 0
        for pair in PAIRS:
            assert log[f"kd_loss_{pair}"] > 0 == log[f"nll_loss_{pair}"] == log[f"tokens_of_{pair}"]


def test_scores_of_references_alone_in_the_queue_of_each_pair(data, teachers):
    own = dict(kd_inputs="argmax", kd_inputs_rate_schedule="linear:1:0:1", kd_selection="global")
    t = Learning(data, *named(teachers), **own, kd_selection_scope="pair").begin()
    (log,) = t.update([t.batch()])
    assert log["kd_inputs"] > 0 and t.task.queue.is_empty
    t.update([t.batch()])
    assert not t.task.queue.is_empty


@pytest.mark.parametrize(
    "flags, criterion, words",
    [
        (
            ("A", "--decoder-langtok"),
            {"kd_inputs": "argmax", "ignore_prefix_size": 2},
            "--kd-inputs argmax leaves nothing .* token of its language: .*-prefix-size 1 at most",
        ),
        (("A",), {"kd_inputs": "sample", "ignore_prefix_size": 1}, "leave out --ignore-prefix-"),
        (
            ("A", "--enable-reservsed-directions-shared-datasets"),
            {},
            "leave out --enable-reservsed-.*: fairseq then reads a pair from the files of its rev",
        ),
        (("aa-bb=A",), {}, "names no teacher for cc-bb: every pair of --lang-pairs"),
        (("aa-bb=,cc-bb=B",), {}, "names no teacher for aa-bb"),
        (("aa-bb=A,cc-bb=B,aa-bb=C",), {}, "names aa-bb twice"),
        (
            ("aa-bb=A,cc-bb=B,bb-cc=C",),
            {},
            "names bb-cc, which is none of .* aa-bb,cc-bb",
        ),
        (("A", "--teacher-langs", "aa-bb=x,cc-bb=c,b"), {}, "expected two languages.*'x'"),
        (("A", "--teacher-cache", "C"), {}, "cache for each pair .*, as in aa-bb=DIR,cc-bb=DIR"),
        (("A", "--teacher-cache", "aa-bb=C"), {}, "--teacher-cache names no cache for cc-bb"),
        (("A", "--teacher-cache", "aa-bb=C,aa-bb=D"), {}, "--teacher-cache names aa-bb twice"),
        (("A",), {"kd_selection_scope": "pair"}, "no effect with --kd-selection all"),
        (("A", "--extra-data", "{'mined': 'x'}"), {}, "no teacher is asked about such data"),
    ],
)
def test_flags_that_are_refused(flags, criterion, words, data):
    with pytest.raises(UserError, match=words):
        Learning(data, "--teacher-checkpoint-path", *flags, **criterion)


def test_a_pair_named_twice(data):
    with pytest.raises(UserError, match="--lang-pairs names aa-bb twice"):
        Learning(data, pairs=("aa-bb", "aa-bb", "cc-bb"))


def test_what_cannot_teach(data, teachers, tmp_path):
    for name in ("few", "wide", "lm"):
        (tmp_path / name).mkdir()
    few = write_teacher(tmp_path / "few", target=TARGET[:-1])
    adaptive = write_teacher(tmp_path / "wide")
    state = load(adaptive)
    state["args"].adaptive_softmax_cutoff = "4,8"
    torch.save(state, adaptive)
    for flags, criterion, words in (
        (named(teachers[::-1]), {}, "aa-bb: teacher .* translates cc-bb, expected was aa-bb"),
        (named((few, teachers[1])), {}, "aa-bb: teacher .* lacks 1 of the student's .*: 'I'"),
        (named(teachers) + BOTH, {}, "aa-bb: .*give --ignore-prefix-size 1"),
        ((), {}, "without one use --task translation_multi_simple_epoch"),
    ):
        with pytest.raises(UserError, match=words):
            Learning(data, *flags, **criterion).begin()
    with pytest.raises(UserError, match="aa-bb: teacher"):
        Learning(data, *named((adaptive, teachers[1]))).begin()
    with pytest.raises(UserError, match="is for tasks of several pairs of languages"):
        Training(data, {}, kd_selection="batch", kd_selection_scope="pair")


def test_lengths_are_told_as_the_student_counts_them(data, teachers):
    """A teacher of 1024 and a student's tag: what it reads may be longer by that."""
    overrides = ("--teacher-overrides", "{'max_source_positions': 4}")
    flags = (*named(teachers), "--encoder-langtok", "src")
    with pytest.raises(UserError, match="of up to 6 source .* reads at most 5 source"):
        Learning(data, *flags, *overrides).begin()
    Learning(data, *flags, "--teacher-overrides", "{'max_source_positions': 5}").begin()


# Caches


def write_cache(data, teacher, pair, folder, *flags):
    """With all symbols."""
    source, target = pair.split("-")
    how = ("--batch-size", 2, "--top-k", 16, "--cpu", "--num-workers", 0)
    return in_process(
        *("fairseq-kd-cache", data, "--task", NAME, "--lang-pairs", ",".join(PAIRS)),
        *("-s", source, "-t", target, "--path", teacher, "--cache", folder, *how, *flags),
    )


@pytest.fixture(scope="module")
def caches(data, teachers, tmp_path_factory):
    """Made for a student without tags."""
    folder = tmp_path_factory.mktemp("caches")
    for pair, teacher in zip(PAIRS, teachers):
        assert "top 16 of teacher.pt" in write_cache(data, teacher, pair, folder / pair).ok().text
    return folder


def cached(caches, pairs=PAIRS):
    return ("--teacher-cache", ",".join(f"{pair}={caches / pair}" for pair in pairs))


@pytest.mark.parametrize("tags", TAGS)
def test_caches_are_their_teachers(tags, data, teachers, caches):
    """Whatever tags the student reads: the answers are about words."""
    common = dict(kd_weight=1.0, ignore_prefix_size=int(tags == BOTH))
    t = Learning(data, *named(teachers), *tags, **common).begin()
    o = Learning(data, *cached(caches), *tags, **common).begin()
    t.criterion.train(), o.criterion.train()
    online, size, expected, log = loss_of(t.criterion, t.model, taught(t, t.batch()))
    loss, ours, found, more = loss_of(o.criterion, o.model, taught(o, o.batch()))
    assert (loss, ours) == (pytest.approx(online, rel=2e-3), size) and more.keys() == log.keys()
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=0.01, atol=2e-3)
    for name in (f"kd_loss_{pair}" for pair in PAIRS):
        assert float(more[name]) == pytest.approx(float(log[name]), rel=2e-3)
    theirs, ours = (float(one.validate(one.batch("valid"))["teacher_nll_loss"]) for one in (t, o))
    assert ours == pytest.approx(theirs, rel=2e-3)


def test_a_cache_is_the_same_whatever_the_student_reads(data, teachers, caches, tmp_path):
    write_cache(data, teachers[0], PAIRS[0], tmp_path / "cache", *BOTH).ok()
    ours, theirs = (
        {name: content for name, content in tree(folder).items() if name.endswith(".bin")}
        for folder in (tmp_path / "cache", caches / PAIRS[0])
    )
    assert ours == theirs and len(ours) == 12


def test_caches_that_do_not_fit(data, teachers, caches, tmp_path):
    write_cache(data, teachers[1], PAIRS[1], tmp_path / "few", "--top-k", 3).ok()
    swapped = f"aa-bb={caches / 'cc-bb'},cc-bb={caches / 'aa-bb'}"
    for flags, words in (
        (("--teacher-cache", swapped), "aa-bb: .* source_lang is aa here, cc there.*; cc-bb: the"),
        ((*cached(caches), "--langs", "aa,cc,bb"), "language_tokens: 1 is __cc__ here, __bb__ the"),
        ((*cached(caches), *BOTH), "about which a cache says nothing: give --ignore-prefix-size 1"),
        ((*cached(caches), "--truncate-source"), "aa-bb: .*settings: truncate_source is 1024 here"),
        (cached(tmp_path), "aa-bb: no cache of the subset train in .*; cc-bb: no cache"),
        (
            ("--teacher-cache", f"aa-bb={caches / 'aa-bb'},cc-bb={tmp_path / 'few'}"),
            "few/train were not made with the same top k",
        ),
    ):
        with pytest.raises(UserError, match=words):
            Learning(data, *flags).begin()
    found = in_process(
        "fairseq-kd-cache",
        data,
        "--task",
        NAME,
        "--lang-pairs",
        "aa-bb,cc-bb",
        "--path",
        teachers[0],
        "--cache",
        tmp_path / "both",
        "--cpu",
    )
    assert "name one of --lang-pairs aa-bb,cc-bb with --source-lang and" in found.refusal
    assert not (tmp_path / "both").exists()


def test_a_subset_that_one_pair_has_no_cache_of(data, caches, tmp_path):
    """Is validated without: the log has the same fields for every batch."""
    shutil.copytree(str(caches), str(tmp_path / "caches"))
    shutil.rmtree(str(tmp_path / "caches" / "cc-bb" / "valid"))
    t = Learning(data, *cached(tmp_path / "caches")).begin()
    assert "kd_loss" not in t.validate(t.batch("valid"))
    assert t.update([t.batch()])[0]["kd_loss_cc-bb"] > 0


def test_caches_of_several_folders(data, teachers, tmp_path):
    """Of which one pair is in the first one alone."""
    more = write_pairs(tmp_path, {"train": SENTENCES["train"][3:]}, OTHERS)
    for file in more.glob("*.cc-bb.*"):
        file.unlink()
    both = f"{data}:{more}"
    folders = {"aa-bb": f"{tmp_path / 'one'}:{tmp_path / 'two'}", "cc-bb": tmp_path / "other"}
    for (pair, folder), teacher in zip(folders.items(), teachers):
        write_cache(both, teacher, pair, folder).ok()
    flags = ("--teacher-cache", ",".join(map("{}={}".format, *zip(*folders.items()))))
    t = Learning(both, *flags).begin()
    t.task.load_dataset("train", epoch=2)
    t.criterion.train()
    batch = t.batch()
    found = sorted(zip(batch["pair"].tolist(), batch["id"].tolist()))
    assert found == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    assert t.criterion(t.model, taught(t, batch))[2]["kd_loss_cc-bb"] > 0
    one = ("--teacher-cache", f"aa-bb={tmp_path / 'one'},cc-bb={tmp_path / 'other'}")
    with pytest.raises(UserError, match="aa-bb: .*expected a cache for each of the 2 data folders"):
        Learning(both, *one).begin()


def test_a_file_of_several_pairs_is_read_once(data, tmp_path, monkeypatch):
    path, read = write_multilingual(tmp_path / "teacher", BOTH), []
    real = Checkpoint.open
    monkeypatch.setattr(Checkpoint, "open", lambda *one: read.append(one[0]) or real(*one))
    Learning(data, "--teacher-checkpoint-path", path, *BOTH).opened()
    assert read == [path]


def test_a_sentence_without_any_probability_is_named_with_its_pair(data, teachers):
    t = Learning(data, *named(teachers)).begin()
    with torch.no_grad():
        (member,) = t.task.source.sources[1].teacher.members
        member.model.encoder.embed_tokens.weight.fill_(math.nan)
    t.criterion.train()
    batch = t.batch()
    with pytest.raises(UserError, match=r"with ids \[cc-bb \d, cc-bb \d, cc-bb \d\]"):
        t.criterion(t.model, taught(t, batch))


def test_folders_are_read_in_turn(data, teachers, tmp_path):
    part = {"train": SENTENCES["train"][3:]}
    more = write_pairs(tmp_path, part, {"train": OTHERS["train"][:1]})
    t = Learning(f"{data}:{more}", *named(teachers)).begin()
    assert len(t.task.dataset("train")) == 8
    t.task.load_dataset("train", epoch=2)
    batch = t.batch()
    found = sorted(zip(batch["pair"].tolist(), batch["id"].tolist()))
    assert found == [(0, 0), (0, 1), (1, 0)]
    t.criterion.train()
    assert t.criterion(t.model, taught(t, t.batch()))[2]["kd_loss_cc-bb"] > 0


def test_a_resumed_pass_goes_on_in_its_order(data, teachers):
    """Virtual epochs are parts of one order, which belongs to the epoch that began it."""
    flags = (*named(teachers), "--virtual-epoch-size", 3, "--sampling-method", "temperature")

    def ids(task, epoch):
        dataset = task.dataset("train")
        dataset.set_epoch(epoch)
        return [dataset[i][1]["id"] for i in range(len(dataset))]

    whole = Learning(data, *flags)
    whole.load("train")
    expected = [ids(whole.task, epoch) for epoch in range(1, 5)]
    for epoch in (2, 3):
        resumed = Learning(data, *flags)
        resumed.task.load_dataset("train", epoch=epoch)
        assert ids(resumed.task, epoch) == expected[epoch - 1]
