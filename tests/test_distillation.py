"""The task through fairseq's calls: where the teacher's answers come from, and what is refused."""

import logging
import os
from argparse import Namespace

import numpy as np
import pytest
import torch
from trainer import (
    SENTENCES,
    Training,
    criterion_config,
    fairseq_train,
    new_task,
    write_data,
    write_teacher,
)

from kd_plugin.cache import CacheError
from kd_plugin.commands import cache as command
from kd_plugin.errors import UserError
from kd_plugin.flags import CRITERION
from kd_plugin.teachers import RunningTeacher, Step, TeacherError

SELECTING = {"kd_selection": "global", "kd_queue_size": 50}


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


@pytest.fixture
def teacher(tmp_path):
    return write_teacher(tmp_path, knowing=True)


def training(data, teacher, **criterion):
    return Training(data, {"teacher_checkpoint_path": teacher}, **criterion)


# Before the first update


def dataset(*lengths):
    """As far as the task asks a dataset before training: sentences this long on both sides."""
    sizes = np.array(lengths)
    return Namespace(src_sizes=sizes, tgt_sizes=sizes)


def task(longest, **flags):
    """With a teacher that reads so many tokens on both sides."""
    made = new_task(teacher_checkpoint_path="teacher.pt", **flags)
    made.build_criterion(criterion_config())
    made.source.teacher = model(longest)
    return made


def model(longest=1024):
    return Namespace(max_positions=lambda: (longest, longest), longer=(0, 0))


def test_what_needs_no_file_is_refused_with_the_criterions_flags():
    t = new_task(
        teacher_checkpoint_path="a.pt:b.pt",
        teacher_weights="1,2,3",
        teacher_overrides="dropout=0",
        teacher_device="cpu",
        teacher_dtype="fp16",
    )
    with pytest.raises(ValueError) as error:
        t.build_criterion(criterion_config(kd_weight=2.0))
    for flag in ("--kd-weight", "--teacher-weights", "--teacher-overrides", "--teacher-dtype"):
        assert flag in str(error.value)
    assert "each of the 2 teachers" in str(error.value)


def test_validation_longer_than_the_teacher_reads_is_refused_before_training():
    t = task(6)
    t.datasets = {"train": dataset(3, 6), "valid": dataset(2), "valid1": dataset(4, 9)}
    with pytest.raises(
        TeacherError, match="up to 9 source and 9 target tokens.* 6 source and 6 target"
    ):
        t.begin_epoch(1, model())


@pytest.mark.parametrize(
    "flags, student",
    [
        ({"disable_validation": True}, model()),
        ({"max_source_positions": 6, "max_target_positions": 6}, model()),
        ({}, model(6)),
    ],
    ids=["no validation", "limits", "short student"],
)
def test_long_sentences_that_are_left_out_do_not_matter(flags, student):
    t = task(6, **flags)
    t.datasets = {"train": dataset(3, 6), "valid": dataset(4, 9)}
    t.begin_epoch(1, student)


def test_a_training_needs_a_teacher_and_says_how_to_name_one(data):
    with pytest.raises(TeacherError, match="--teacher-checkpoint-path or --teacher-cache"):
        Training(data, {}).begin()


def test_a_validation_without_any_teacher_says_so_once(data, caplog):
    alone = Training(data, {})
    alone.load("valid")
    with caplog.at_level(logging.WARNING):
        logs = [alone.validate(batch) for batch in alone.batches("valid") * 2]
    assert all("kd_loss" not in log for log in logs)
    assert sum("validating the student alone" in message for message in caplog.messages) == 1


def test_another_criterion_is_refused(data):
    config = criterion_config()
    config._name = "cross_entropy"
    with pytest.raises(UserError, match="needs --criterion kd_label_smoothed.*got cross_entropy"):
        new_task().build_criterion(config)


def test_a_student_with_an_adaptive_softmax_is_refused(data, teacher):
    begun = training(data, teacher)
    begun.load("train")
    begun.model.decoder.adaptive_softmax = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match="the student has an adaptive softmax"):
        begun.task.begin_epoch(1, begun.model)


def test_flags_of_a_running_teacher_beside_a_cache_are_refused(data, teacher, caplog):
    """In a training; a validation has some of its flags from the student's checkpoint."""
    flags = {"teacher_checkpoint_path": teacher, "teacher_cache": "c", "teacher_dtype": "bf16"}
    with pytest.raises(UserError) as error:
        Training(data, flags).begin()
    alone = Training(data, flags)
    alone.load("valid")
    with caplog.at_level(logging.WARNING):
        assert alone.validate(alone.batches("valid")[0])["nll_loss"] > 0
    assert any("leave out --teacher-cache" in message for message in caplog.messages)
    for flag in ("--teacher-checkpoint-path, --teacher-dtype", "leave out --teacher-cache"):
        assert flag in str(error.value)


def test_inputs_of_the_student_are_refused_where_they_cannot_be():
    t = new_task()
    t.build_criterion(criterion_config(ddp_backend="fully_sharded"))
    with pytest.raises(UserError, match="--ddp-backend fully_sharded cannot: take another"):
        t.build_criterion(criterion_config(ddp_backend="fully_sharded", kd_inputs="argmax"))
    t = new_task(data="data", teacher_cache="c")
    t.build_criterion(criterion_config(kd_inputs="sample"))
    with pytest.raises(CacheError, match="--kd-inputs sample asks the teacher about what the stu"):
        t.source.begin_training(None, None, None, "train")


def test_translating_never_opens_a_teacher(data):
    """Without a criterion it is neither a training nor a validation."""
    t = new_task(data=str(data), teacher_checkpoint_path="gone.pt", teacher_cache="gone")
    t.load_dataset("valid")
    assert "teacher" not in t.dataset("valid")[0]
    assert t.source.answer({}, Step()) is None


# The data: stock fairseq's batches, whatever its flags

MANY = {"train": SENTENCES["train"] * 8, "valid": SENTENCES["valid"] * 8}
FOLDERS = "--disable-validation"
# Stock fairseq's buckets need an older numpy; 0.12.2 miscounts the remainder of a resumed epoch
OF_ONE_END = "--num-batch-buckets 2 --max-tokens 100"
if np.__version__ >= "2":
    OF_ONE_END = "--skip-remainder-batch"
BATCH_FLAGS = {
    "none": "",
    "seed": "--update-ordered-indices-seed",
    "new batches": "--update-epoch-batch-itr=True --update-ordered-indices-seed",
    "one seed": "--update-epoch-batch-itr=True",
    "order": "--grouped-shuffling --curriculum 1 --update-freq 2",
    "subsets": "--train-subset tuned --valid-subset train,valid --max-tokens-valid 20 "
    "--batch-size-valid 3 --validate-interval 2 --max-valid-steps 2 --fixed-validation-seed 7 "
    "--ignore-unused-valid-subsets",
    "joined": "--combine-valid-subsets --upsample-primary 2 --required-batch-size-multiple 2",
    "cut": "--max-source-positions 4 --truncate-source --max-target-positions 4 "
    "--skip-invalid-size-inputs-valid-test --data-buffer-size 2 --max-tokens 12",
    "padding": "--left-pad-source --required-seq-len-multiple 4 --load-alignments",
    "of one end": OF_ONE_END,
    "folders": FOLDERS,
}


@pytest.mark.parametrize("flags", BATCH_FLAGS.values(), ids=BATCH_FLAGS)
def test_batches_are_stock_fairseqs(flags, teacher, tmp_path):
    """Also those of a training that was stopped within its second epoch: as without the stop."""
    more = {"tuned": MANY["train"]}
    if "--combine-valid-subsets" in flags:
        more.update(train1=MANY["valid"], valid1=MANY["train"])
    data = [write_data(tmp_path / "data", {**MANY, **more})]
    if flags is FOLDERS:
        data.append(write_data(tmp_path / "more", {"train": SENTENCES["train"][::-1] * 5}))
    flags = [":".join(map(str, data)), "--batch-size", 4, "--max-epoch", 3, *flags.split()]
    taught = ("--task", "kd_translation", "--teacher-checkpoint-path", teacher)

    def batches(criterion, name, *more):
        folder = ("--save-dir", tmp_path / name, "--no-epoch-checkpoints")
        given = fairseq_train(*flags, "--criterion", criterion, *folder, *more)
        return [(kind, batch["id"].tolist(), batch["target"].tolist()) for kind, batch in given]

    def training(found):
        return [batch for batch in found if batch[0] == "train"]

    stock = batches("label_smoothed_cross_entropy", "stock")
    assert batches(CRITERION, "whole", *taught) == stock
    half = len(training(stock)) // 2 // (2 if "--update-freq" in flags else 1)
    stopped = batches(CRITERION, "stopped", *taught, "--max-update", half)
    resumed = batches(CRITERION, "stopped", *taught)
    assert training(resumed) and training(stopped) + training(resumed) == training(stock)


# A teacher that runs


def test_the_trainers_batch_stays_as_it_was(data, teacher):
    """It keeps the first one, as a dummy batch."""
    begun = training(data, teacher).begin()
    batch = begun.batches()[0]
    before = {key: value for key, value in batch.items()}
    (log,) = begun.update([batch])
    assert batch.keys() == before.keys() and all(batch[key] is before[key] for key in before)
    assert log["kd_tokens"] == log["ntokens"] and log["kd_loss"] > 0


def test_the_teacher_is_opened_and_probed_once(data, teacher, caplog):
    begun = training(data, teacher)
    with caplog.at_level(logging.INFO):
        begun.begin()
        opened = begun.task.source.teacher
        begun.task.begin_epoch(2, begun.model)
    assert begun.task.source.teacher is opened
    assert sum("uniform guess" in message for message in caplog.messages) == 1
    assert not any(parameter.requires_grad for parameter in opened.members[0].model.parameters())
    assert not {id(p) for p in begun.model.parameters()} & {
        id(p) for p in opened.members[0].model.parameters()
    }


def test_validation_by_itself_uses_a_teacher_that_is_there(data, teacher):
    alone = training(data, teacher)
    alone.load("valid")
    log = alone.validate(alone.batches("valid")[0])
    assert log["n_compared"] == log["ntokens"] and log["kd_loss"] > 0


def test_validation_by_itself_goes_without_a_teacher_that_is_gone(data, teacher, caplog):
    alone = training(data, teacher)
    os.remove(teacher)
    alone.load("valid")
    with caplog.at_level(logging.WARNING):
        logs = [alone.validate(batch) for batch in alone.batches("valid") * 2]
    assert all("kd_loss" not in log and log["nll_loss"] > 0 for log in logs)
    assert sum("validating the student alone" in message for message in caplog.messages) == 1


def test_a_training_does_not_go_on_without_its_teacher(data, teacher):
    begun = training(data, teacher)
    os.remove(teacher)
    with pytest.raises(UserError, match="teacher.pt"):
        begun.begin()


def test_data_with_numbers_that_no_symbol_has_are_refused(data, teacher, tmp_path):
    """Found by the probe, before a model looks them up."""
    for lang in ("aa", "bb"):
        lines = (data / f"dict.{lang}.txt").read_text().splitlines()
        (data / f"dict.{lang}.txt").write_text("\n".join(lines[:-3]) + "\n")
    with pytest.raises(UserError, match="holds symbol number"):
        training(data, teacher).begin()


# A teacher in a cache


@pytest.fixture
def cache(data, teacher, tmp_path):
    """The folder, for tests that spoil it."""
    return make_cache(data, teacher, tmp_path / "cache")


def make_cache(data, teacher, folder, k=4):
    arguments = ["--path", teacher, "--cache", folder, "--top-k", k, "--cpu", "--num-workers", 0]
    assert command.main([str(a) for a in (data, *arguments, "-s", "aa", "-t", "bb")]) == 0
    return folder


def test_a_cache_for_each_of_several_data_folders(teacher, tmp_path):
    """Each sentence has its own rows in each epoch, over a stop within the third one, too."""
    texts = [MANY, *({"train": SENTENCES["train"][::step] * 5} for step in (-1, 2))]
    data = [write_data(tmp_path / f"data-{i}", text) for i, text in enumerate(texts)]
    data, caches = (
        ":".join(map(str, paths)) for paths in (data, [tmp_path / f"cache-{i}" for i in range(3)])
    )
    make_cache(data, teacher, caches)
    assert {path.name for path in tmp_path.glob("cache-*/*")} == {"train", "valid"}
    assert not (tmp_path / "cache-1" / "valid").exists()

    def answers(name, *flags):
        folder = ("--save-dir", tmp_path / name, "--no-epoch-checkpoints", "--max-epoch", 4)
        task = ("--task", "kd_translation", "--criterion", CRITERION, "--batch-size", 4)
        given = fairseq_train(data, *folder, *task, *flags)
        return [(b["id"].tolist(), *told(b)) for kind, b in given if kind == "train"]

    def told(batch):
        target, real = batch["target"].flatten(), batch["target"].ne(1).flatten().nonzero()[:, 0]
        rows = batch["teacher"].rows(real, torch.zeros(0))
        return rows.nll(target[real]), rows.best()

    online = answers("online", "--teacher-checkpoint-path", teacher)
    flags = ("--teacher-cache", caches)
    stop = len(online) // 2 + 3
    found = answers("cached", *flags, "--max-update", stop) + answers("cached", *flags)
    assert len(found) == len(online) > 2 * stop - 8
    for (ids, nll, best), (same, expected, likeliest) in zip(found, online):
        assert ids == same and best.tolist() == likeliest.tolist()
        torch.testing.assert_close(nll, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda caches, make: caches[:1], "a cache for each of the 2 data folders.*got 1"),
        (lambda caches, make: [*caches, "more"], "a cache for each of the 2 data folders.*got 3"),
        (lambda caches, make: caches[::-1], "was made from something other"),
        (lambda caches, make: [caches[0], make(k=3)], "not made with the same.*top k"),
        (lambda caches, make: [caches[0], "nowhere"], "no cache of the subset train in nowhere"),
    ],
)
def test_caches_that_do_not_fit_their_folders_stop_before_the_first_update(
    spoil, words, teacher, tmp_path
):
    data = [
        write_data(tmp_path / "a", SENTENCES),
        write_data(tmp_path / "b", {**SENTENCES, "train": SENTENCES["train"][::-1]}),
    ]
    caches = [str(make_cache(d, teacher, tmp_path / f"cache-{d.name}")) for d in data]
    caches = spoil(caches, lambda k: str(make_cache(data[1], teacher, tmp_path / "k", k)))
    with pytest.raises(CacheError, match=words):
        cached(":".join(map(str, data)), ":".join(caches)).begin()


def test_caching_needs_a_folder_for_each_of_several(teacher, tmp_path, capsys):
    data = [write_data(tmp_path / name, SENTENCES) for name in "ab"]
    arguments = ["--path", teacher, "--cache", tmp_path / "one", "--cpu", "-s", "aa", "-t", "bb"]
    assert command.main([str(a) for a in (":".join(map(str, data)), *arguments)]) == 1
    assert "expected a folder for each of the 2 data folders" in capsys.readouterr().err


def cached(data, cache, **criterion):
    return Training(data, {"teacher_cache": str(cache)}, **criterion)


def test_a_cached_teacher_teaches_and_validates(data, cache):
    begun = cached(data, cache).begin()
    for batch in begun.batches():
        (log,) = begun.update([batch])
        assert log["kd_tokens"] == log["ntokens"] and log["kd_loss"] > 0
    assert begun.validate(begun.batches("valid")[0])["n_compared"] > 0


def test_the_cache_of_another_corpus_stops_a_training_and_not_a_validation(
    data, cache, tmp_path, caplog
):
    other = {**SENTENCES, "train": SENTENCES["train"][::-1], "valid": SENTENCES["valid"][::-1]}
    begun = cached(write_data(tmp_path / "other", other), cache)
    with pytest.raises(CacheError) as error:
        begun.begin()
    assert "valid.aa-bb.aa.bin" in str(error.value) and "train.aa-bb.aa.bin" in str(error.value)
    with caplog.at_level(logging.WARNING):
        log = begun.validate(begun.batches("valid")[0])
    assert "kd_loss" not in log
    assert sum("validating the student alone" in message for message in caplog.messages) == 1


def test_a_dummy_batch_that_no_cache_knows_logs_what_the_other_ranks_log(data, cache):
    begun = cached(data, cache).begin()
    batch = begun.batches()[0]
    (expected,) = begun.update([batch])
    unknown = {key: value for key, value in batch.items() if key != "teacher"}
    (log,) = begun.update([unknown], dummy=True)
    assert log.keys() == expected.keys()


def test_a_subset_that_is_not_cached_is_validated_alone(data, cache):
    import shutil

    shutil.rmtree(str(cache / "valid"))
    begun = cached(data, cache).begin()
    assert "kd_loss" not in begun.validate(begun.batches("valid")[0])


def test_a_manifest_that_is_no_json_stops_a_training_and_not_a_validation(data, cache, caplog):
    (cache / "valid" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="manifest.json"):
        cached(data, cache).begin()
    alone = cached(data, cache)
    alone.load("valid")
    with caplog.at_level(logging.WARNING):
        assert "kd_loss" not in alone.validate(alone.batches("valid")[0])
    assert any("validating the student alone" in message for message in caplog.messages)


def test_padding_symbols_in_a_text_are_cached_as_they_are_trained(teacher, tmp_path):
    """The objective leaves them out; with every symbol in the cache it is the running teacher's."""
    spoiled = [(["a", "<pad>", "b"], ["A", "<pad>", "B"]), ("ac", ["<pad>", "A"])]
    data = write_data(
        tmp_path / "spoiled", {"train": spoiled + SENTENCES["train"], "valid": SENTENCES["valid"]}
    )
    folder = make_cache(data, teacher, tmp_path / "full", k=13)

    def losses(**flags):
        begun = Training(data, flags).begin()
        logs = begun.update(begun.batches())
        return [float(log[key]) for log in logs for key in ("loss", "kd_loss", "kd_tokens")]

    online = losses(teacher_checkpoint_path=teacher)
    assert losses(teacher_cache=str(folder)) == pytest.approx(online, rel=2e-3)


@pytest.mark.parametrize("cached_teacher", [False, True])
def test_how_sentences_are_padded_changes_no_loss(data, teacher, cache, cached_teacher):
    named = (
        {"teacher_cache": str(cache)} if cached_teacher else {"teacher_checkpoint_path": teacher}
    )

    def losses(**flags):
        begun = Training(data, {**named, **flags}).begin()
        logs = begun.update(begun.batches())
        return [float(log[key]) for log in logs for key in ("loss", "kd_loss")]

    expected = pytest.approx(losses(), rel=1e-5)
    for flags in ({"left_pad_source": False}, {"left_pad_target": True}):
        assert losses(**flags, required_seq_len_multiple=8) == expected, flags


# The queue of scores


def test_scores_enter_when_the_update_is_done(data, teacher):
    begun = training(data, teacher, **SELECTING).begin()
    queue = begun.task.queue
    first, second = begun.batches()[:2]
    begun.update([first, second])
    tokens = int(first["ntokens"] + second["ntokens"])
    assert queue.scores.numel() == tokens

    before = queue.scores.clone()
    begun.update([second], overflows=True)  # and is repeated
    assert torch.equal(queue.scores, before)
    begun.update([second])
    assert queue.scores.numel() == tokens + int(second["ntokens"])
    begun.validate(begun.batches("valid")[0])
    begun.update([first], dummy=True)
    assert queue.scores.numel() == tokens + int(second["ntokens"])


def test_the_queue_travels_in_the_train_iterators_state(data, teacher, caplog):
    begun = training(data, teacher, **SELECTING).begin()
    begun.update(begun.batches())
    state = begun.iterator.state_dict()

    resumed = training(data, teacher, **SELECTING).begin()
    resumed.iterator.load_state_dict(state)
    resumed.updates = 1
    with caplog.at_level(logging.WARNING):
        resumed.update(resumed.batches())
    assert not any("--reset-dataloader" in message for message in caplog.messages)
    begun.update(begun.batches())
    assert torch.equal(resumed.task.queue.scores, begun.task.queue.scores)


def test_a_lost_queue_is_said_once(data, teacher, caplog):
    resumed = training(data, teacher, **SELECTING).begin()
    resumed.updates = 7
    with caplog.at_level(logging.WARNING):
        resumed.update(resumed.batches(), overflows=True)
        resumed.update(resumed.batches())
        resumed.update(resumed.batches())
    assert sum("--reset-dataloader" in message for message in caplog.messages) == 1


def test_the_students_checkpoint_holds_its_vocabulary_and_nothing_of_the_teacher(data, teacher):
    begun = training(data, teacher).begin()
    state = begun.task.state_dict()
    assert state == {
        "source_symbols": begun.task.src_dict.symbols,
        "target_symbols": begun.task.tgt_dict.symbols,
    }
    assert isinstance(begun.task.source, RunningTeacher)


@pytest.mark.parametrize("flag", [None, "lazy", "cached"])
def test_data_in_the_older_format_are_read_whole(tmp_path, flag):
    """A file that the task left open would be one with that of fairseq's workers."""
    mine, older = write_data(tmp_path / "mine"), write_data(tmp_path / "older", impl="lazy")
    expected = Training(mine, {})
    expected.load("train")
    training = Training(older, {"dataset_impl": flag})
    iterator = training.load("train").next_epoch_itr(shuffle=False)
    dataset = training.task.dataset("train")
    assert all(len(side.cache_index) == len(dataset) for side in (dataset.src, dataset.tgt))
    assert dataset.src.data_file is None and dataset.tgt.data_file is None
    assert sum(len(batch["id"]) for batch in iterator) == len(dataset)
    for ours, theirs in zip(training.batches(), expected.batches()):
        assert torch.equal(ours["target"], theirs["target"])
        assert torch.equal(ours["net_input"]["src_tokens"], theirs["net_input"]["src_tokens"])
