"""Language models that teach and learn: what differs from translation, in this process."""

from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq import models
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.data import indexed_dataset
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from trainer import Training, criterion_config, dictionary, task_config, write_teacher

from kd_plugin import export
from kd_plugin.cache import CacheError, TaughtDataset
from kd_plugin.cache.fill import fill, open_writer
from kd_plugin.cache.reader import CachedSubset
from kd_plugin.checkpoints import Role
from kd_plugin.commands import report as report_command
from kd_plugin.commands.arguments import parse_like_fairseq
from kd_plugin.decoding import databin
from kd_plugin.errors import UserError
from kd_plugin.report import Model, scoring
from kd_plugin.report.blocks import TextInBlocks
from kd_plugin.tasks.language_modeling import KDLanguageModelingConfig, KDLanguageModelingTask
from kd_plugin.teachers import Student, Teacher, TeacherSettings

SYMBOLS = "abcdefgh"
TEXT = {"train": ["abca", "bbcd", "efgh", "a", "hgfe", "dcba", "abab"], "valid": ["abc", "hgd"]}
BLOCK = 6
# fairseq makes the last with numpy before 2 alone
MODES = ["none", "complete", "complete_doc", *(["eos"] if hasattr(np, "compat") else [])]


def write_text(folder):
    folder.mkdir()
    own = dictionary(SYMBOLS)
    own.save(str(folder / "dict.txt"))
    for split, sentences in TEXT.items():
        builder = indexed_dataset.make_builder(str(folder / f"{split}.bin"), "mmap", len(own))
        for sentence in sentences:
            builder.add_item(databin.encode(own, " ".join(sentence)))
        builder.finalize(str(folder / f"{split}.idx"))
    return folder


def arguments(width=8, arch="transformer_lm", **more):
    sizes = {"layers": 1, "embed_dim": width, "ffn_embed_dim": 16, "attention_heads": 2}
    sizes.update(input_dim=width, output_dim=width)
    args = Namespace(arch=arch, criterion="cross_entropy", task="language_modeling", dropout=0.0)
    vars(args).update({f"decoder_{key}": value for key, value in sizes.items()})
    vars(args).update(dict(tokens_per_sample=BLOCK, max_target_positions=16, add_bos_token=False))
    vars(args).update(decoder_hidden_size=width, decoder_out_embed_dim=width, **more)
    models.ARCH_CONFIG_REGISTRY[arch](args)
    return args


def write_lm(folder, symbols=SYMBOLS, seed=1, outputs=None, **more):
    """A model that knows ``TEXT`` a little, with its dictionary beside it.

    Args:
        outputs: how many of its symbols it predicts.
    """
    folder.mkdir(exist_ok=True)
    args, own = arguments(12, **more), dictionary(symbols)
    args.output_dictionary_size = -1 if outputs is None else outputs
    own.save(str(folder / "dict.txt"))
    torch.manual_seed(seed)
    task = LanguageModelingTask(LanguageModelingConfig(), own, dictionary(symbols))
    if outputs is not None:
        task.output_dictionary = dictionary(symbols[: outputs - 4])
    model = models.build_model(args, task)
    if outputs is None and not more.get("adaptive_softmax_cutoff"):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(8):
            for sentence in TEXT["train"]:
                target = databin.encode(own, " ".join(sentence)).long()[None]
                logits = model(torch.cat([target[:, -1:], target[:, :-1]], 1))[0]
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(logits[0], target[0]).backward()
                optimizer.step()
    model.eval()
    torch.save({"args": args, "model": model.state_dict()}, str(folder / "teacher.pt"))
    return str(folder / "teacher.pt"), model


class Learning(Training):
    """A training of a language model."""

    def __init__(self, data, teacher=None, arch="transformer_lm", flags=(), **criterion):
        flags = {
            **dict(data=str(data), teacher_checkpoint_path=teacher, tokens_per_sample=BLOCK),
            **dict(use_plasma_view=False, batch_size=None, batch_size_valid=None, tpu=False),
            **dict(flags),
        }
        config = task_config(flags, KDLanguageModelingConfig, "kd_language_modeling")
        self.task = KDLanguageModelingTask.setup_task(config)
        torch.manual_seed(2)
        self.model = self.task.build_model(arguments(arch=arch))
        self.criterion = self.task.build_criterion(criterion_config(**criterion))
        self.updates = 0
        self.optimizer = Namespace(
            backward=lambda loss: loss.backward(), step=lambda: None, zero_grad=lambda: None
        )

    positions = 16


@pytest.fixture
def data(tmp_path):
    return write_text(tmp_path / "data")


@pytest.fixture
def teacher(tmp_path):
    return write_lm(tmp_path / "teacher")


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


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_weight_0_is_stock(mode, bos, data, tmp_path):
    path, _ = write_lm(tmp_path / "teacher", add_bos_token=bos)
    flags = {"sample_break_mode": mode, "add_bos_token": bos}
    t = Learning(data, path, flags=flags, kd_weight=0.0, label_smoothing=0.1).begin()
    stock = LabelSmoothedCrossEntropyCriterion(t.task, False, 0.1)
    t.criterion.train()
    for batch in t.batches():
        loss, size, found, _ = loss_of(t.criterion, t.model, taught(t, batch))
        plain, plain_size, expected, _ = loss_of(stock, t.model, batch)
        assert size == plain_size and loss == pytest.approx(plain, rel=1e-6)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_value_and_gradient_are_those_of_the_formula(data, teacher):
    """Computed anew in float64: 0.7 T^2 KL(p || q) + 0.3 ce, summed over the target tokens."""
    path, model = teacher
    t = Learning(data, path, kd_weight=0.7, kd_temperature=2.0, label_smoothing=0.0).begin()
    t.criterion.train()
    t.model.double()
    model.double()
    for batch in t.batches():
        loss, _, found, _ = loss_of(t.criterion, t.model, taught(t, batch))
        t.model.zero_grad()
        net_input, real = batch["net_input"], batch["target"].ne(1)
        ours = t.model(**net_input)[0][real]
        with torch.no_grad():
            theirs = model(**net_input)[0][real]
        p, q = (torch.log_softmax(z / 2, -1) for z in (theirs, ours))
        ce = torch.nn.functional.cross_entropy(ours, batch["target"][real], reduction="sum")
        expected = 0.7 * 4 * (p.exp() * (p - q)).sum() + 0.3 * ce
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        for name, gradient in gradients(t.model).items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def answers(path, data, **settings):
    """Logits for each target token of the first batch, in the student's order."""
    t = Learning(data)
    t.task.load_dataset("train")
    (batch, *_) = t.batches()
    opened = Teacher.open(TeacherSettings([path], **settings), t.task.student())
    rows = batch["target"].flatten().ne(1).nonzero().squeeze(-1)
    return opened(batch).rows(rows, torch.zeros(())).logits, batch


def test_a_dictionary_in_another_order_and_larger_is_mapped(data, tmp_path):
    symbols = "xhgfedcbay"
    path, model = write_lm(tmp_path / "teacher", symbols)
    found, batch = answers(path, data)
    theirs, ours = dictionary(symbols), dictionary(SYMBOLS)
    to_theirs = torch.tensor([theirs.index(symbol) for symbol in ours.symbols])
    with torch.no_grad():
        logits = model(to_theirs[batch["net_input"]["src_tokens"]])[0]
    expected = logits[batch["target"].ne(1)][:, to_theirs]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    path, _ = write_lm(tmp_path / "smaller", "abcdefg")
    with pytest.raises(UserError, match="lacks 1 of the student's 12: 'h'"):
        answers(path, data)


@pytest.mark.parametrize("arch", ["lstm_lm", "fconv_lm"])
def test_other_architectures_teach(arch, data, tmp_path):
    more = dict(decoder_layers="[(8, 3)]") if arch == "fconv_lm" else {}
    path, model = write_lm(tmp_path / "teacher", arch=arch, **more)
    found, batch = answers(path, data)
    with torch.no_grad():
        expected = model(**batch["net_input"])[0][batch["target"].ne(1)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_cache_is_the_teacher(data, teacher, tmp_path):
    """With K = V, also of blocks with <s>; half precision is what it may differ by."""
    path, _ = write_lm(tmp_path / "bos", add_bos_token=True)
    t = Learning(data, path, flags={"add_bos_token": True}, kd_weight=1.0).begin()
    subset = write_cache(t.task, tmp_path / "cache")
    dataset = t.task.dataset("train")
    assert subset.lengths().tolist() == [len(one["target"]) for one in dataset]
    cached = TaughtDataset(dataset, subset, 1)
    t.criterion.train()
    online = [loss_of(t.criterion, t.model, taught(t, batch)) for batch in t.batches()]
    flags = {"add_bos_token": True, "teacher_cache": str(tmp_path / "cache")}
    o = Learning(data, flags=flags, kd_weight=1.0).begin()
    o.criterion.train()
    assert isinstance(o.task.dataset("train"), TaughtDataset) and len(cached) == len(dataset)
    for batch, (loss, _, expected, _) in zip(o.batches(), online):
        found, _, ours, _ = loss_of(o.criterion, o.model, taught(o, batch))
        assert found == pytest.approx(loss, rel=2e-3)
        for name, gradient in expected.items():
            torch.testing.assert_close(ours[name], gradient, rtol=0.01, atol=2e-3, msg=name)


def write_cache(task, folder):
    teacher = task.source.teacher
    limits = teacher.max_positions()
    header = {
        **dict(subset="train", k=len(task.target_dictionary), temperatures=[]),
        **teacher.describe(),
        **task.describe_data(task.cfg.data, "train", True, True),
    }
    writer = open_writer(task, limits, str(folder), header, max_sentences=3)
    assert fill(task, teacher, writer, 0)
    return CachedSubset(
        str(folder), "train", lambda whole: task.describe_data(task.cfg.data, "train", True, whole)
    )


def test_a_cache_of_other_blocks_is_refused(data, teacher, tmp_path):
    t = Learning(data, teacher[0]).begin()
    write_cache(t.task, tmp_path / "cache")
    for flags, words in (
        ({"tokens_per_sample": 4}, "settings: tokens_per_sample is 4 here, 6 there"),
        ({"sample_break_mode": "complete"}, "settings: sample_break_mode is complete here, none"),
        ({"add_bos_token": True}, "settings: add_bos_token is True here, False there"),
        ({"shorten_method": "truncate"}, "settings: shorten_method is truncate here, none"),
        ({"shorten_method": "random_crop"}, "random_crop, which crops otherwise in each epoch"),
    ):
        other = Learning(data, flags={**flags, "teacher_cache": str(tmp_path / "cache")})
        with pytest.raises(CacheError, match=words):
            other.begin()
    # blocks are whole sentences there, whatever the number
    a, b = (
        Learning(data, flags={"sample_break_mode": "eos", "tokens_per_sample": n}).task
        for n in (4, 6)
    )
    assert a.data_settings() == b.data_settings()


def test_what_cannot_teach_a_language_model(data, tmp_path):
    translation = write_teacher(tmp_path)
    lm, _ = write_lm(tmp_path / "lm")
    bos, _ = write_lm(tmp_path / "bos", add_bos_token=True)
    both, _ = write_lm(tmp_path / "both", self_target=True)
    short, _ = write_lm(tmp_path / "short")
    adaptive, _ = write_lm(
        tmp_path / "adaptive", adaptive_softmax_cutoff="6,8", decoder_output_dim=12
    )
    some, _ = write_lm(tmp_path / "some", outputs=8)
    for path, flags, words in (
        (translation, {}, "encoder-decoder translation model .*language_modeling needs a decoder"),
        (bos, {}, "was trained with --add-bos-token, and the student with no --add-bos-token"),
        (lm, {"add_bos_token": True}, "with no --add-bos-token, and the student with --add-bos"),
        (both, {}, "was trained with --self-target, and the student with no --self-target"),
        (adaptive, {}, "adaptive softmax, which gives no distribution"),
        (some, {}, "er's dictionary \\(8 symbols\\) lacks 4 .*student. Binarise .* --only-source"),
        (lm, {"output_dictionary_size": 8}, "and the student with --output-dictionary-size 8"),
        (lm, {"tokens_per_sample": 20}, "blocks of up to 20 tokens, the teacher reads at most 16 "),
        (lm, {"teacher_tags": "m2m"}, "no particular language: leave out --teacher-tags"),
    ):
        training = Learning(data, path, flags=flags)
        training.positions = 64
        with pytest.raises(UserError, match=words):
            training.begin()
    student = Student(dictionary("ab"), dictionary("ab"), "aa", "bb")
    with pytest.raises(UserError, match="decoder-only language model.*translation needs an enc"):
        Teacher.open(TeacherSettings([lm]), student)


def test_the_first_symbols_alone(data, tmp_path):
    """A student of fewer outputs learns from a teacher of the same ones."""
    path, model = write_lm(tmp_path / "some", outputs=8)
    t = Learning(data, path, flags={"output_dictionary_size": 8}, kd_weight=1.0)
    t.load("train")
    t.task.source._open(t.model)  # it knows nothing: training would refuse it
    t.criterion.train()
    batch = t.batches()[0]
    assert batch["target"].max() < 8
    _, _, found, log = loss_of(t.criterion, t.model, taught(t, batch))
    real = batch["target"].ne(1)
    with torch.no_grad():
        p = torch.log_softmax(model(**batch["net_input"])[0][real], -1)
        q = torch.log_softmax(t.model(**batch["net_input"])[0][real], -1)
    assert p.size(-1) == 8
    assert float(log["kd_loss"]) == pytest.approx(
        float((p.exp() * (p - q)).sum() / np.log(2)), rel=1e-4
    )


def test_flags_that_mean_nothing_here(data):
    with pytest.raises(UserError, match="leave out --self-target and --past-target; got.*self"):
        Learning(data, flags={"self_target": True})
    with pytest.raises(UserError, match="--kd-inputs argmax is for tasks that translate"):
        Learning(data, kd_inputs="argmax")
    with pytest.raises(UserError, match="without one use --task language_modeling"):
        Learning(data).begin()
    if "eos" not in MODES:
        with pytest.raises(UserError, match="eos: fairseq makes such blocks with numpy below 2"):
            Learning(data, flags={"sample_break_mode": "eos"}).begin()


def test_text_without_blocks_is_not_looked_over(data):
    """What fairseq-interactive reads, and fairseq-eval-lm with --context-window."""
    task = Learning(data).task
    task.load_dataset("valid")
    batches = task.eval_lm_dataloader(task.dataset("valid"), num_workers=0, context_window=2)
    assert sum(batch["ntokens"] for batch in batches) > 0
    if "eos" in MODES:
        text = task.build_dataset_for_inference([torch.tensor([4, 5, 2])], [3])
        (batch,) = task.get_batch_iterator(text, max_tokens=9, max_positions=16).next_epoch_itr()
        assert batch["net_input"]["src_tokens"].tolist() == [[2, 4, 5]]


def test_the_inside_of_decoders(data, teacher):
    t = Learning(data, teacher[0], kd_hidden="relations", kd_attention_weight=1.0).begin()
    (log, *_) = t.update(t.batches())
    assert log["kd_hidden"] > 0 and log["kd_attention"] > 0
    t = Learning(data, teacher[0], kd_hidden="mse").begin()
    assert [tuple(one.shape) for one in t.criterion.maps] == [(12, 8)]
    with pytest.raises(UserError, match="student has no encoder: leave out encoder in --kd-hidd"):
        Learning(data, teacher[0], kd_hidden="relations", kd_hidden_layers="encoder:0=0").begin()


# reports and exports


def parsed(data, *more):
    given = [str(data), "--models", "x=y", "--output", "z", "--cpu", "--gen-subset", "valid"]
    given += ["--tokens-per-sample", str(BLOCK), *more]
    return parse_like_fairseq(report_command.make_parser("language_modeling"), given)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("mode", ["none", "complete"])
def test_a_block_is_scored_as_its_model_says(mode, bos, data, tmp_path, monkeypatch):
    """Against log-probabilities in float64 of the blocks' own text, however it is batched."""
    monkeypatch.setattr(scoring.Memory, "forget_peak", lambda self: None)
    path, model = write_lm(tmp_path / "lm", add_bos_token=bos)
    options = parsed(data, "--sample-break-mode", mode, *["--add-bos-token"][: int(bos)])
    scorer = scoring.Scorer(Model("lm", path, str(data)), Role("model"), options)
    done = scorer.decode(5, Namespace(send=lambda _: None))
    own = dictionary(SYMBOLS)
    text = [databin.encode(own, " ".join(s)).tolist() for s in TEXT["valid"]]
    assert [len(tokens) for tokens in text] == [4, 4]
    blocks = [text[0] + text[1][:2], text[1][2:]] if mode == "none" else text
    found, before = [], own.eos()
    for block in blocks:
        inputs = [own.bos()] * bos + [before] + block[:-1]
        lprobs = model(torch.tensor([inputs]))[0][0].double().log_softmax(-1)[int(bos) :]
        found.append(-lprobs[range(len(block)), block].sum().item() / np.log(2))
        before = block[-1] if mode == "none" else own.eos()
    assert done.outcomes == pytest.approx(found, rel=1e-5) and done.tokens == 8


def test_blocks_that_a_model_cannot_read_are_refused(data, teacher):
    long = parsed(data, "--tokens-per-sample", "20", "--sample-break-mode", "none")
    TextInBlocks(long)  # the text has 8 tokens
    model, role = Model("lm", teacher[0], str(data)), Role("model")
    scoring.Scorer(model, role, long)
    train = parsed(data, "--gen-subset", "train", "--tokens-per-sample", "20")
    with pytest.raises(UserError, match="reads 16 tokens at most, and the longest block has 20"):
        scoring.Scorer(model, role, train)
    with pytest.raises(UserError, match="the subset 'other' .* cannot be read"):
        TextInBlocks(parsed(data, "--gen-subset", "other"))


def test_models_of_two_kinds_are_refused(data, teacher, tmp_path, capsys):
    (tmp_path / "mt").mkdir()
    translates = write_teacher(tmp_path / "mt")
    models = [f"a={teacher[0]}", f"b={translates}", f"c={tmp_path}/no.pt"]
    command = [str(data), "--output", str(tmp_path / "report"), "--models"]
    assert report_command.main([*command, *models]) == 1
    assert (
        "expected models of one kind, and got a: a decoder-only language model; b: an encoder"
        in capsys.readouterr().err
    )
    useless = ["--greedy", "--reference", "x", "--lenpen", "0.5"]
    assert report_command.main([*command, models[0], *useless]) == 1
    told = capsys.readouterr().err
    assert "--greedy, --reference, --lenpen: of no use to language models" in told
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("bos, outputs", [(False, None), (True, 9)])
def test_an_export_builds_in_stock_fairseq(bos, outputs, data, tmp_path):
    path, model = write_lm(tmp_path / "lm", add_bos_token=bos, outputs=outputs)
    lines = export.make(
        export.Asked([path], str(tmp_path / "out.pt"), data=str(data), task="language_modeling")
    )
    assert "verified in stock fairseq: 8 tokens of valid scored the same" in lines[-1]
    state = torch.load(str(tmp_path / "out.pt"))
    own = dictionary(SYMBOLS).symbols
    assert state["task_state"] == {"source_symbols": own, "target_symbols": own[:outputs]}
    with pytest.raises(UserError, match="decoder-only language model, which --format fairseq"):
        export.make(export.Asked([path], str(tmp_path / "x"), "ctranslate2", data=str(data)))
    with pytest.raises(UserError, match="leave out --source-lang"):
        export.make(export.Asked([path], str(tmp_path / "x"), source_lang="aa", data=str(data)))
    assert not (tmp_path / "x").exists()
