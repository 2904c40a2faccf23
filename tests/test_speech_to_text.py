"""Speech: teachers that hear it, and teachers that read its transcript, in this process."""

from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq import models
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from speech import AUGMENT, FEATURES, SOUNDS, spaced, write_speech, write_tsv
from trainer import (
    SENTENCES,
    SOURCE,
    TARGET,
    Training,
    criterion_config,
    dictionary,
    task_config,
    write_teacher,
)

from kd_plugin.cache import CacheError, TaughtDataset
from kd_plugin.cache.fill import fill, open_writer
from kd_plugin.cache.reader import CachedSubset
from kd_plugin.checkpoints import SPEECH, TRANSLATION
from kd_plugin.errors import UserError
from kd_plugin.report.systems import Model, kind_of_models
from kd_plugin.tasks.speech_to_text import KDSpeechToTextConfig, KDSpeechToTextTask
from kd_plugin.teachers import Teacher, TeacherSettings

READS = {"teacher_reads": "transcript"}


def arguments(width=8, features=FEATURES, arch="s2t_transformer", **more):
    args = Namespace(arch=arch, criterion="cross_entropy", task="speech_to_text", dropout=0.0)
    for side in ("encoder", "decoder"):
        sizes = {"layers": 1, "embed_dim": width, "ffn_embed_dim": 16, "attention_heads": 2}
        vars(args).update({f"{side}_{key}": value for key, value in sizes.items()})
    vars(args).update(dict(conv_channels=8, conv_kernel_sizes="3", conv_out_channels=4))
    vars(args).update(dict(input_feat_per_channel=features, input_channels=1))
    vars(args).update(dict(max_source_positions=600, max_target_positions=16, **more))
    models.ARCH_CONFIG_REGISTRY[arch](args)
    return args


class Listening(Training):
    """A training of a student that listens."""

    def __init__(self, data, teacher=None, flags=(), **criterion):
        flags = {"data": str(data), "teacher_checkpoint_path": teacher, **dict(flags)}
        config = task_config(flags, KDSpeechToTextConfig, "kd_speech_to_text")
        self.task = KDSpeechToTextTask.setup_task(config)
        torch.manual_seed(2)
        self.model = self.task.build_model(arguments())
        self.criterion = self.task.build_criterion(criterion_config(**criterion))
        self.updates = 0
        self.optimizer = Namespace(
            backward=lambda loss: loss.backward(), step=lambda: None, zero_grad=lambda: None
        )


def write_listener(folder, data, symbols=TARGET, rounds=8, ignore_prefix_size=0, **more):
    """A model that knows what is said in ``data`` a little, with its dictionary beside it.

    Args:
        rounds: over the data.
        more: options of the model.
    """
    folder.mkdir(exist_ok=True)
    args, own = arguments(12, **more), dictionary(symbols)
    own.save(str(folder / "dict.txt"))
    torch.manual_seed(1)
    model = models.build_model(args, Namespace(target_dictionary=own))
    heard = Listening(data, ignore_prefix_size=ignore_prefix_size)
    heard.task.load_dataset("train")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    to_own = torch.tensor([own.index(symbol) for symbol in heard.task.tgt_dict.symbols])
    for _ in range(rounds):
        for batch in heard.batches():
            read = {**batch["net_input"]}
            read["prev_output_tokens"] = to_own[read["prev_output_tokens"]]
            logits = model(**read)[0].transpose(1, 2)
            optimizer.zero_grad()
            target = to_own[batch["target"]]
            torch.nn.functional.cross_entropy(logits, target, ignore_index=1).backward()
            optimizer.step()
    model.eval()
    torch.save({"args": args, "model": model.state_dict()}, str(folder / "teacher.pt"))
    return str(folder / "teacher.pt"), model


def write(folder, utterances=SENTENCES, **more):
    return write_speech(folder, utterances, SOURCE, TARGET, **more)


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "data")


@pytest.fixture
def teacher(tmp_path, data):
    return write_listener(tmp_path / "teacher", data)


@pytest.fixture
def reader(tmp_path):
    (tmp_path / "reader").mkdir()
    return write_teacher(tmp_path / "reader", knowing=True)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_of(criterion, model, sample):
    model.zero_grad()
    loss, size, log = criterion(model, sample)
    loss.backward()
    return loss.item(), size, gradients(model), log


def taught(training, batch):
    """The batch with the answer about it."""
    return {**batch, "teacher": training.task.source.answer(batch, SimpleNamespace(amp=False))}


def test_weight_0_is_stock(data, teacher):
    t = Listening(data, teacher[0], kd_weight=0.0, label_smoothing=0.1).begin()
    stock = LabelSmoothedCrossEntropyCriterion(t.task, False, 0.1)
    t.criterion.train()
    for batch in t.batches():
        loss, size, found, _ = loss_of(t.criterion, t.model, taught(t, batch))
        plain, plain_size, expected, _ = loss_of(stock, t.model, batch)
        assert size == plain_size and loss == pytest.approx(plain, rel=1e-6)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def expected_loss(training, theirs, batch):
    """0.7 T^2 KL(p || q) + 0.3 ce in float64, T = 2, summed over the target tokens; backward."""
    training.model.zero_grad()
    net_input = {**batch["net_input"], "src_tokens": batch["net_input"]["src_tokens"].double()}
    real = batch["target"].ne(1)
    ours = training.model(**net_input)[0][real]
    p, q = (torch.log_softmax(z / 2, -1) for z in (theirs[real], ours))
    ce = torch.nn.functional.cross_entropy(ours, batch["target"][real], reduction="sum")
    loss = 0.7 * 4 * (p.exp() * (p - q)).sum() + 0.3 * ce
    loss.backward()
    return loss.item()


def in_double(batch):
    net_input = batch["net_input"]
    return {**batch, "net_input": {**net_input, "src_tokens": net_input["src_tokens"].double()}}


def test_value_and_gradient_are_those_of_the_formula(data, teacher):
    path, model = teacher
    t = Listening(data, path, kd_weight=0.7, kd_temperature=2.0, label_smoothing=0.0).begin()
    t.criterion.train()
    t.model.double()
    model.double()
    for batch in map(in_double, t.batches()):
        loss, _, found, _ = loss_of(t.criterion, t.model, taught(t, batch))
        with torch.no_grad():
            theirs = model(**batch["net_input"])[0]
        assert loss == pytest.approx(expected_loss(t, theirs, batch), rel=1e-5)
        for name, gradient in gradients(t.model).items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_teacher_of_text_reads_what_the_student_hears(data, reader):
    """Against its own forward pass on each transcript alone."""
    t = Listening(data, reader, READS, kd_weight=0.7, kd_temperature=2.0, label_smoothing=0.0)
    t.begin()
    t.criterion.train()
    t.model.double()
    (member,) = t.task.source.teacher.members
    own, said = dictionary(SOURCE), {}
    for text, written in SENTENCES["train"]:
        said[written] = torch.tensor([[own.index(letter) for letter in text] + [own.eos()]])
    for batch in map(in_double, t.batches()):
        loss, _, found, _ = loss_of(t.criterion, t.model, taught(t, batch))
        rows = []
        for target, inputs in zip(batch["target"], batch["net_input"]["prev_output_tokens"]):
            source = said["".join(TARGET[i - 4] for i in target.tolist() if i >= 4)]
            with torch.no_grad():
                lengths = torch.tensor([source.size(1)])
                rows.append(member.model(source, lengths, inputs[None])[0][0])
        theirs = torch.stack(rows).double()
        assert loss == pytest.approx(expected_loss(t, theirs, batch), rel=1e-5)
        for name, gradient in gradients(t.model).items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_transcripts_are_cut_into_subwords_as_the_yaml_says(tmp_path, reader):
    """fairseq's characters: each becomes a symbol."""
    folder = write(tmp_path / "data", src_bpe_tokenizer={"bpe": "characters"})
    plain = write(tmp_path / "plain")
    for split, pairs in SENTENCES.items():
        rows = [line.split("\t") for line in (folder / f"{split}.tsv").read_text().splitlines()]
        unspaced = [[*row[:3], pair[0], row[4]] for row, pair in zip(rows[1:], pairs)]
        write_tsv(folder / f"{split}.tsv", unspaced)
    both = []
    for one in (folder, plain):
        t = Listening(one, reader, READS)
        t.task.load_dataset("train")
        both.append([batch["transcript"]["src_tokens"] for batch in t.batches()])
    assert all(torch.equal(a, b) for a, b in zip(*both))


def answers(path, data, **flags):
    """Logits for each target token of the first batch, in the student's order."""
    t = Listening(data, flags=flags)
    t.task.load_dataset("train")
    batch = t.batches()[0]
    opened = Teacher.open(TeacherSettings([path]), t.task.student())
    rows = batch["target"].flatten().ne(1).nonzero().squeeze(-1)
    return opened(batch).rows(rows, torch.zeros(())).logits, batch


def test_a_dictionary_in_another_order_and_larger_is_mapped(data, tmp_path):
    symbols = "xIHGFEDCBAy"
    path, model = write_listener(tmp_path / "teacher", data, symbols)
    found, batch = answers(path, data)
    theirs, ours = dictionary(symbols), dictionary(TARGET)
    to_theirs = torch.tensor([theirs.index(symbol) for symbol in ours.symbols])
    read = {**batch["net_input"]}
    read["prev_output_tokens"] = to_theirs[read["prev_output_tokens"]]
    with torch.no_grad():
        expected = model(**read)[0][batch["target"].ne(1)][:, to_theirs]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    path, _ = write_listener(tmp_path / "smaller", data, TARGET[:-1], rounds=0)
    with pytest.raises(UserError, match="er's dictionary .* lacks 1 .* 13: 'I'.*vocab_filename"):
        answers(path, data)


@pytest.mark.parametrize("arch", ["convtransformer", "s2t_berard"])
def test_other_architectures_teach(arch, data, tmp_path):
    more = dict(
        input_layers="[8]",
        conv_layers="[(4, 3, 2)]",
        num_blstm_layers=1,
        lstm_size=8,
        decoder_hidden_dim=16,
    )
    path, model = write_listener(tmp_path / "teacher", data, rounds=0, arch=arch, **more)
    found, batch = answers(path, data)
    with torch.no_grad():
        expected = model(**batch["net_input"])[0][batch["target"].ne(1)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_vocabulary_that_the_yaml_names(data, teacher, tmp_path):
    """Of the teacher's folder: spm_unigram8000.txt, say, beside its config.yaml."""
    path, _ = teacher
    folder = tmp_path / "teacher"
    (folder / "dict.txt").rename(folder / "letters.txt")
    (folder / "config.yaml").write_text("vocab_filename: letters.txt\n")
    Listening(data, path).begin()
    (folder / "config.yaml").write_text("- no\n- mapping\n")
    with pytest.raises(UserError, match="cannot be read as the configuration of a speech task"):
        Listening(data, path).begin()


# Chance


def test_what_chance_does_depends_on_epoch_and_sample_alone(tmp_path):
    folder = write(tmp_path / "data", **AUGMENT)
    task = Listening(folder).task
    task.load_dataset("train")
    task.load_dataset("valid")
    dataset = task.dataset("train")

    def heard(order=(0, 1, 2)):
        return {i: dataset[i]["item"].source for i in order}

    first = heard()
    np.random.rand()
    again = heard((2, 0, 1))
    assert all(torch.equal(first[i], again[i]) for i in first)
    dataset.set_epoch(2)
    assert not all(torch.equal(first[i], one) for i, one in heard().items())
    valid = task.dataset("valid")
    plain = np.load(str(folder / "audio" / "valid0.npy"))
    assert np.array_equal(valid[0]["item"].source.numpy(), plain)  # _train alone is augmented


def test_the_teacher_hears_what_the_student_hears(tmp_path, data):
    path, model = write_listener(tmp_path / "teacher", data)
    t = Listening(write(tmp_path / "augmented", **AUGMENT), path).begin()
    for batch in t.batches():
        answer = t.task.source.answer(batch, SimpleNamespace(amp=False))
        rows = batch["target"].flatten().ne(1).nonzero().squeeze(-1)
        with torch.no_grad():
            expected = model(**batch["net_input"])[0].flatten(0, 1)[rows]
        found = answer.rows(rows, torch.zeros(())).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# Caches


def write_cache(task, folder, subset="train"):
    teacher = task.source.teacher
    header = {
        **dict(subset=subset, k=len(task.target_dictionary), temperatures=[]),
        **teacher.describe(),
        **task.describe_data(task.cfg.data, subset, True, True),
    }
    writer = open_writer(task, teacher.max_positions(), str(folder), header, max_sentences=3)
    assert fill(task, teacher, writer, 0)
    return CachedSubset(
        str(folder), subset, lambda whole: task.describe_data(task.cfg.data, subset, True, whole)
    )


@pytest.mark.parametrize("flags", [{}, READS], ids=["speech", "transcript"])
def test_the_cache_is_the_teacher(flags, data, teacher, reader, tmp_path):
    t = Listening(data, reader if flags else teacher[0], flags, kd_weight=1.0).begin()
    write_cache(t.task, tmp_path / "cache")
    t.criterion.train()
    online = [loss_of(t.criterion, t.model, taught(t, batch)) for batch in t.batches()]
    cached = {**flags, "teacher_cache": str(tmp_path / "cache")}
    o = Listening(data, flags=cached, kd_weight=1.0).begin()
    o.criterion.train()
    assert isinstance(o.task.dataset("train"), TaughtDataset)
    for batch, (loss, _, expected, _) in zip(o.batches(), online):
        found, _, ours, _ = loss_of(o.criterion, o.model, taught(o, batch))
        assert found == pytest.approx(loss, rel=2e-3)
        for name, gradient in expected.items():
            torch.testing.assert_close(ours[name], gradient, rtol=0.01, atol=2e-3, msg=name)


def test_a_cache_of_other_data_is_refused(data, teacher, reader, tmp_path):
    write_cache(Listening(data, teacher[0]).begin().task, tmp_path / "cache")
    write_cache(Listening(data, reader, READS).begin().task, tmp_path / "read")
    for name, flags, more, words in (
        ("cache", {}, {}, None),
        ("cache", {}, AUGMENT, "cannot be used with specaugment, which changes the sound of train"),
        ("read", READS, AUGMENT, None),  # nothing of the transcript changes
        ("cache", READS, {}, "settings: teacher_reads is transcript here, speech there"),
        ("cache", {}, {"noise": 0.2}, "data: audio differs"),
        ("cache", {}, {"transforms": {"*": ["utterance_cmvn"]}}, "settings: transforms"),
        ("cache", {}, {"use_sample_rate": 8000}, "use_sample_rate is 8000 here, None there"),
        ("read", READS, {"src_bpe_tokenizer": {"bpe": "characters"}}, "src_bpe_tokenizer"),
    ):
        folder = write(tmp_path / f"data{len(list(tmp_path.iterdir()))}", **more)
        other = Listening(folder, flags={**flags, "teacher_cache": str(tmp_path / name)})
        if words is None:
            other.begin()
        else:
            with pytest.raises(CacheError, match=words):
                other.begin()


def test_several_training_files(tmp_path, teacher):
    """Samples of both are told apart, also in a cache; drawn ones have none."""
    texts = {"train_a": SENTENCES["train"], "train_b": SENTENCES["valid"], **SENTENCES}
    flags = {"train_subset": "train_a,train_b"}
    folder = write(tmp_path / "several", texts)
    t = Listening(folder, teacher[0], flags, kd_weight=1.0)
    t.load("train_a,train_b")
    t.task.begin_epoch(1, t.model)
    batches = t.batches("train_a,train_b")
    assert sorted(i for batch in batches for i in batch["id"].tolist()) == list(range(7))
    subset = write_cache(t.task, tmp_path / "cache", "train_a,train_b")
    assert subset.lengths().tolist() == [len(text) + 1 for _, text in texts["train_a"]] + [
        len(text) + 1 for _, text in texts["train_b"]
    ]
    drawn = write(tmp_path / "drawn", texts, sampling_alpha=0.5)
    for row in ("train_a", "train_b"):  # languages that weights go by
        rows = [line.split("\t") for line in (drawn / f"{row}.tsv").read_text().splitlines()]
        write_tsv(
            *(drawn / f"{row}.tsv", [[*one, row] for one in rows[1:]]),
            columns=[*rows[0], "src_lang"],
        )
    refused = Listening(drawn, flags={**flags, "teacher_cache": str(tmp_path / "cache")})
    refused.load("train_a,train_b")
    with pytest.raises(CacheError, match="sampling_alpha, which draws other utterances"):
        refused.task.begin_epoch(1, refused.model)
    t = Listening(drawn, teacher[0], {**flags, **READS})
    t.load("train_a,train_b")
    dataset = t.task.dataset("train_a,train_b")
    for i in range(len(dataset)):
        sample = dataset[i]
        part = dict((b, a) for a, b in SENTENCES["train"] + SENTENCES["valid"])
        written = "".join(TARGET[s - 4] for s in sample["item"].target.tolist()[:-1])
        assert sample["transcript"].tolist()[:-1] == [SOURCE.index(c) + 4 for c in part[written]]


# Refusals


def test_what_cannot_teach_speech(data, teacher, reader, tmp_path):
    wide, _ = write_listener(tmp_path / "wide", data, rounds=0, features=16)
    adaptive, _ = write_listener(
        tmp_path / "adaptive",
        data,
        rounds=0,
        adaptive_softmax_cutoff="6,8",
        tie_adaptive_weights=False,
    )
    other = tmp_path / "other"
    other.mkdir()
    fewer = write_teacher(other, source=SOURCE[:-1], knowing=False)
    for path, flags, words in (
        (reader, {}, "translation model.*speech_to_text needs a speech-to-text.*-reads transcript"),
        (teacher[0], READS, "speech-to-text model .*--teacher-reads transcript needs an encoder-d"),
        (wide, {}, "trained with --input-feat-per-channel 16, and the student with.* 8"),
        (adaptive, {}, "adaptive softmax, which gives no distribution"),
        (fewer, READS, "transcript dictionary .* lacks 1 of the student's 11: 'g'.*src_vocab_f"),
        (teacher[0], {"teacher_tags": "m2m"}, "no particular language: leave out --teacher-tags"),
    ):
        with pytest.raises(UserError, match=words):
            Listening(data, path, flags).begin()
    with pytest.raises(UserError, match="a speech-to-text model.*translation needs an encoder"):
        from kd_plugin.teachers import Student

        student = Student(dictionary(SOURCE), dictionary(TARGET), "aa", "bb", TRANSLATION)
        Teacher.open(TeacherSettings([teacher[0]]), student)


def test_data_that_cannot_be_taught(data, teacher, reader, tmp_path):
    rows = [line.split("\t") for line in (data / "train.tsv").read_text().splitlines()]
    silent = [[*row[:3], text, row[4]] for row, text in zip(rows[1:], ["", spaced("gfe"), " "])]
    write_tsv(data / "train.tsv", silent)
    with pytest.raises(UserError, match=r"2 of 3 .*src_text.*: train0 \(line 2\), train2 \(line 4"):
        Listening(data, reader, READS).begin()
    write_tsv(data / "train.tsv", [row[:4] for row in silent], ["id", "audio", "n_frames", "text"])
    with pytest.raises(UserError, match="train.tsv has no column 'tgt_text'"):
        Listening(data, teacher[0]).begin()
    (data / "src_dict.txt").unlink()
    with pytest.raises(UserError, match="expected the dictionary of the transcripts in .*src_dict"):
        Listening(data, reader, READS)
    bad = write(tmp_path / "bad")
    np.save(str(bad / "audio" / "train1.npy"), np.full_like(SOUNDS[0], np.nan, dtype="float32"))
    with pytest.raises(UserError, match=r"features of train hold NaN or inf: utterances \[1\]"):
        Listening(bad, teacher[0]).begin()


def test_flags_that_mean_nothing_here(data):
    with pytest.raises(UserError, match="--kd-inputs argmax is for tasks that translate"):
        Listening(data, kd_inputs="argmax")
    with pytest.raises(UserError, match="without one use --task speech_to_text"):
        Listening(data).begin()
    with pytest.raises(UserError, match="positions cannot be compared: leave out cross, encoder"):
        Listening(data, kd_attention_weight=1.0, kd_attention_layers="encoder-self:0=0,cross:0=0")


def test_the_inside_of_the_decoder(data, teacher, reader):
    for path, flags in ((teacher[0], {}), (reader, READS)):
        t = Listening(data, path, flags, kd_hidden="relations", kd_attention_weight=0.5).begin()
        log = t.update(t.batches()[:1])[0]
        assert log["kd_hidden"] > 0 and log["kd_attention"] > 0


def test_tags_of_languages(tmp_path):
    """With prepend_tgt_lang_tag the first target symbol is the tag, which no loss counts."""
    symbols = [*TARGET, "<lang:xx>"]
    folder = write_speech(tmp_path / "data", SENTENCES, SOURCE, symbols, prepend_tgt_lang_tag=True)
    for split in SENTENCES:
        rows = [line.split("\t") for line in (folder / f"{split}.tsv").read_text().splitlines()]
        write_tsv(
            *(folder / f"{split}.tsv", [[*row, "xx"] for row in rows[1:]]), [*rows[0], "tgt_lang"]
        )
    with pytest.raises(ValueError, match="ignore-prefix-size 1"):
        Listening(folder)
    path, _ = write_listener(tmp_path / "teacher", folder, symbols, ignore_prefix_size=1)
    t = Listening(folder, path, kd_weight=0.5, ignore_prefix_size=1).begin()
    batch = t.batches()[0]
    assert batch["target"][:, 0].eq(t.task.tgt_dict.index("<lang:xx>")).all()
    write_cache(t.task, tmp_path / "cache")
    cached = {"teacher_cache": str(tmp_path / "cache")}
    o = Listening(folder, flags=cached, kd_weight=0.5, ignore_prefix_size=1).begin()
    logs = [one.update(one.batches()[:1])[0] for one in (t, o)]
    assert float(logs[0]["kd_loss"]) == pytest.approx(float(logs[1]["kd_loss"]), rel=2e-3)
    assert logs[0]["kd_tokens"] == logs[0]["ntokens"] - 2


def test_reports_are_of_one_kind_of_model(data, teacher, reader):
    speech, text = Model("hears", teacher[0], str(data)), Model("reads", reader, str(data))
    assert kind_of_models([speech]) is SPEECH
    with pytest.raises(UserError, match="one kind, .*reads: an enc.*; hears: a speech-to-text"):
        kind_of_models([text, speech])
