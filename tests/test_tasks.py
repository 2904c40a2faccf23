"""Models of other tasks: decoded as stock fairseq decodes them with their own, or named."""

from argparse import Namespace

import pytest
import torch
from fairseq import tasks
from fairseq.tasks import TASK_REGISTRY, register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from letters import changed, configuration, write_letters, write_model
from trainer import arguments

from kd_plugin import decoding
from kd_plugin.checkpoints import (
    SECOND_COPIES,
    Checkpoint,
    CheckpointError,
    Role,
    translates_otherwise,
)
from kd_plugin.commands import report as report_command
from kd_plugin.commands.arguments import parse_like_fairseq
from kd_plugin.errors import UserError
from kd_plugin.report import decode
from kd_plugin.report.systems import Model
from kd_plugin.sequences import decoded
from kd_plugin.teachers import Student, Teacher, TeacherSettings

ROLE = Role("teacher", "--trust-checkpoint", task="--task")
REFINING = (
    *("levenshtein_transformer", "nonautoregressive_transformer", "cmlm_transformer"),
    "insertion_transformer",
)
ONE_DIRECTION = ("--lang-pairs", "aa-bb")
MULTILINGUAL = ("--task", "multilingual_translation", "--lang-pairs", "aa-bb,bb-aa")
SIMPLE_EPOCH = ("--task", "translation_multi_simple_epoch", "--lang-pairs", "aa-bb,bb-aa")
OTHERS = {
    **{arch: (arch, ("--task", "translation_lev")) for arch in REFINING},
    "one of each direction": ("multilingual_transformer", MULTILINGUAL),
    "tagged, multilingual": (
        "multilingual_transformer",
        (*MULTILINGUAL, "--encoder-langtok", "tgt", "--decoder-langtok"),
    ),
    "tagged, simple epoch": (
        "transformer",
        (*SIMPLE_EPOCH, "--encoder-langtok", "src", "--decoder-langtok"),
    ),
    "tags that replace": (
        "transformer",
        (*SIMPLE_EPOCH, "--encoder-langtok", "tgt", "--decoder-langtok")
        + ("--lang-tok-replacing-bos-eos",),
    ),
}


@pytest.fixture
def data(tmp_path):
    return write_letters(tmp_path / "data")


def by_stock(data, model, flags):
    """Symbols and score of each translation, as fairseq-generate with these flags finds them."""
    cfg = configuration(data, *flags)
    task = tasks.setup_task(cfg.task)
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    generator = task.build_generator([model], cfg.generation)
    dataset.ordered_indices()  # as fairseq's iterators ask for first
    sample = dataset.collater([dataset[i] for i in range(len(dataset))])
    found = task.inference_step(generator, [model], sample)
    strip = getattr(generator, "symbols_to_strip_from_output", {generator.eos})
    return {
        i: (
            task.target_dictionary.string(one[0]["tokens"], extra_symbols_to_ignore=strip),
            float(one[0]["score"]),
        )
        for i, one in zip(sample["id"].tolist(), found)
    }


def by_us(data, path, *flags):
    cfg = configuration(data, *flags)
    task = decoding.own_task(cfg, decoding.set_up_task(cfg), [str(path)], ROLE)
    checkpoints = decoding.open_checkpoints([str(path)], task, ROLE)
    device = torch.device("cpu")
    built = decoding.build_models(checkpoints, task, {}, cfg, device=device, dtype=torch.float32)
    corpus = decoding.Corpus.of_subset(task, data, "valid")
    # what is written into the student's data are the sentences as they were binarised
    assert [one.tolist() for one in corpus.source] == [
        one.tolist() for one in data.side("valid", "aa")
    ]
    engine = decoding.FairseqEngine(task, built, cfg.generation, 1)
    plan = decoding.plan(
        task, corpus.dataset, [one.max_positions() for one in built], max_sentences=99
    )
    batches = [corpus.dataset.collater([corpus.dataset[int(i)] for i in batch]) for batch in plan]
    return {i: nbest[0] for found in engine.decode(batches) for i, nbest in found.items()}, engine


@pytest.mark.parametrize("name", OTHERS)
def test_models_of_other_tasks_are_decoded_as_stock_does(name, data, tmp_path, capsys):
    arch, flags = OTHERS[name]
    model = write_model(tmp_path / "model.pt", data, arch, flags)
    expected = by_stock(data, model, flags)
    assert arch not in REFINING or any(subwords for subwords, _ in expected.values())
    found, engine = by_us(data, tmp_path / "model.pt")
    assert {i: one.subwords for i, one in found.items()} == {
        i: subwords for i, (subwords, _) in expected.items()
    }
    for i, (_, score) in expected.items():
        assert found[i].score == pytest.approx(score, abs=1e-5)
    assert engine.refines is (arch in REFINING)
    if engine.refines:
        assert all(one.finished for one in found.values())
    assert "evaluated" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["levenshtein_transformer", "tagged, simple epoch"])
def test_the_report_decodes_them_so(name, data, tmp_path, monkeypatch):
    arch, flags = OTHERS[name]
    model = write_model(tmp_path / "model.pt", data, arch, flags)
    # of the process of all tests
    monkeypatch.setattr(decode.Memory, "forget_peak", lambda self: None)
    given = [str(data.folder), "--models", "x=y", "--output", "z", "--cpu", "-s", "aa", "-t", "bb"]
    given += ["--gen-subset", "valid", "--max-len-b", "8"]

    def decoder(*more):
        parsed = parse_like_fairseq(report_command.make_parser(), [*given, *more])
        one = Model("model", str(tmp_path / "model.pt"), str(data.folder))
        return decode._Decoder(one, ROLE, parsed)

    opened = decoder()
    done = opened.decode(5, Namespace(send=lambda _: None))
    expected = by_stock(data, model, flags)
    assert done.outcomes == [expected[i][0] for i in range(len(expected))]
    assert opened.facts["refines"] is (arch in REFINING)
    with pytest.raises(UserError):  # in one sentence
        decoder("--task", "translation")


@pytest.mark.parametrize("name", ["tagged, simple epoch", "tagged, multilingual"])
def test_ctranslate2_decodes_models_of_translation_alone(name, data, tmp_path):
    """Tags of languages would be lost without a word."""
    write_model(tmp_path / "model.pt", data, *OTHERS[name])
    cfg = configuration(data)
    task = decoding.own_task(cfg, decoding.set_up_task(cfg), [str(tmp_path / "model.pt")], ROLE)
    (checkpoint,) = decoding.open_checkpoints([str(tmp_path / "model.pt")], task, ROLE)
    with pytest.raises(UserError, match="--engine ctranslate2: .*--engine fairseq takes any"):
        decoded.convert_for_ctranslate2(checkpoint, task, ("aa", "bb"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_more_iterations_are_the_users_to_ask_for(data, tmp_path):
    arch, flags = OTHERS["cmlm_transformer"]
    model = write_model(tmp_path / "model.pt", data, arch, flags)
    expected = by_stock(data, model, (*flags, "--iter-decode-max-iter", "1"))
    found, _ = by_us(data, tmp_path / "model.pt", "--iter-decode-max-iter", "1")
    assert {i: one.score for i, one in found.items()} == pytest.approx(
        {i: score for i, (_, score) in expected.items()}, abs=1e-5
    )
    assert expected != by_stock(data, model, flags)


@pytest.mark.parametrize("arch", REFINING)
def test_a_model_is_never_decoded_the_other_way(arch, data, tmp_path):
    """Left to right it would give rubbish, or an error in the middle of fairseq."""
    cfg = configuration(data)
    task = decoding.set_up_task(cfg)
    refining = write_model(tmp_path / "model.pt", data, arch, ("--task", "translation_lev"))
    with pytest.raises(UserError, match="not autoregressive.*with --task translation_lev"):
        decoding.FairseqEngine(task, [refining], cfg.generation, 1)
    plain = write_model(tmp_path / "plain.pt", data, "transformer", ())
    cfg = configuration(data, "--task", "translation_lev")
    task = decoding.set_up_task(cfg)
    with pytest.raises(UserError, match="translates from left to right"):
        decoding.FairseqEngine(task, [plain], cfg.generation, 1)
    cfg.generation.nbest = 2
    with pytest.raises(UserError, match="--nbest and --sampling"):
        decoding.FairseqEngine(task, [refining], cfg.generation, 1)
    cfg.generation.nbest, cfg.generation.iter_decode_with_beam = 1, 2
    if not refining.allow_length_beam:
        engine = decoding.FairseqEngine(task, [refining], cfg.generation, 1)
        corpus = decoding.Corpus.of_subset(task, data, "valid")
        batch = corpus.dataset.collater([corpus.dataset[0]])
        with pytest.raises(UserError, match="does not support decoding with length beam"):
            list(engine.decode([batch]))


@pytest.mark.parametrize(
    "values, words",
    [
        ({"task": "denoising"}, "task 'denoising'; expected translation or one of"),
        ({"task": "forked"}, "no such task: --user-dir imports.*--task translation says so"),
        (
            {"task": "translation_multi_simple_epoch", "lang_dict": "/dev/zero"},
            "reads files that the checkpoint names \\(lang_dict /dev/zero\\).*--trust-checkpoint",
        ),
    ],
)
def test_tasks_that_cannot_be_set_up_are_named(values, words, data, tmp_path):
    path = tmp_path / "model.pt"
    write_model(path, data, "transformer", ())
    changed(path, **values)
    cfg = configuration(data)
    with pytest.raises(CheckpointError, match=words):
        decoding.own_task(cfg, decoding.set_up_task(cfg), [str(path)], ROLE)


@pytest.mark.parametrize(
    "values",
    [
        {"task": "translation_from_pretrained_bart", "langs": "a_A,b_B", "prepend_bos": False},
        {"task": "translation_multi_simple_epoch", "lang_pairs": "a_A-b_B", "langs": None},
        {"task": "multilingual_translation", "lang_pairs": ["a_A-b_B"]},
    ],
)
def test_data_whose_languages_have_other_names_than_the_tags(values, data, tmp_path):
    """mBART's task would read an unknown symbol for each tag; the others end in tracebacks."""
    path = tmp_path / "model.pt"
    write_model(path, data, "transformer", ())
    changed(path, **values)
    cfg = configuration(data)
    with pytest.raises(UserError, match="names the languages aa and bb; .* knows a_A, b_B: give"):
        decoding.own_task(cfg, decoding.set_up_task(cfg), [str(path)], ROLE)


def test_an_ensemble_has_one_task(data, tmp_path):
    paths = [str(tmp_path / name) for name in ("a.pt", "b.pt")]
    write_model(paths[0], data, "transformer", ())
    write_model(paths[1], data, *OTHERS["tagged, simple epoch"])
    cfg = configuration(data)
    with pytest.raises(CheckpointError, match="models of one task"):
        decoding.own_task(cfg, decoding.set_up_task(cfg), paths, ROLE)


# translation by another name


@pytest.fixture
def forked():
    """Tasks of a fork: one trains otherwise, another reads its data otherwise."""

    @register_task("forked", dataclass=TranslationConfig)
    class Forked(TranslationTask):
        def train_step(self, *args, **kwargs):
            raise NotImplementedError

    @register_task("forked_data", dataclass=TranslationConfig)
    class ForkedData(TranslationTask):
        def load_dataset(self, *args, **kwargs):
            raise NotImplementedError

    yield
    for kind in (Forked, ForkedData):
        tasks.TASK_CLASS_NAMES.discard(kind.__name__)
    for name in ("forked", "forked_data"):
        del TASK_REGISTRY[name], tasks.TASK_DATACLASS_REGISTRY[name]


def test_what_is_translation_by_another_name(forked, data, tmp_path):
    path = tmp_path / "model.pt"
    write_model(path, data, "transformer", ())
    for name, same, otherwise in (
        ("translation", True, False),
        ("kd_translation", True, False),
        ("forked", True, False),
        ("forked_data", False, True),
        ("translation_lev", False, True),
        ("multilingual_translation", False, True),
        ("translation_from_pretrained_xlm", False, False),  # its dictionaries have one symbol more
        ("online_backtranslation", False, False),
        ("language_modeling", False, False),
        ("unknown", False, False),
    ):
        changed(path, task=name)
        checkpoint = Checkpoint.open(str(path), ROLE)
        assert checkpoint.is_translation is same, name
        assert translates_otherwise(name) is otherwise, name
        assert checkpoint.as_task("translation").is_translation
        assert checkpoint.as_task(None) is checkpoint


def test_it_teaches_if_it_is_registered_or_said(forked, data, tmp_path):
    path = tmp_path / "model.pt"
    write_model(path, data, "transformer", ())
    student = Student(data.source, data.target, "aa", "bb")

    def opened(name, said=None):
        changed(path, task=name)
        return Teacher.open(TeacherSettings([str(path)], task=said), student)

    opened("forked")
    opened("unknown", "translation")
    with pytest.raises(UserError, match="--teacher-task translation says so"):
        opened("unknown")
    with pytest.raises(UserError, match="'forked_data'.*Sequence-level distillation"):
        opened("forked_data")
    opened("forked_data", "translation")
    write_model(path, data, *OTHERS["levenshtein_transformer"])
    with pytest.raises(UserError, match="is a LevenshteinTransformerModel: .*autoregressive"):
        opened("translation_lev", "translation")


def test_an_architecture_of_ones_own_is_named(data, tmp_path):
    path = tmp_path / "model.pt"
    write_model(path, data, "lstm", ())
    changed(path, arch="mine")
    checkpoint = Checkpoint.open(str(path), ROLE)
    for work in (
        checkpoint.complete_options,
        lambda: checkpoint.build(decoding.set_up_task(configuration(data))),
    ):
        with pytest.raises(CheckpointError, match="no architecture 'mine'.*--user-dir"):
            work()


def test_what_directions_share_is_counted_once(data, tmp_path):
    arch, flags = "multilingual_transformer", (*MULTILINGUAL, "--decoder-langtok")
    model = write_model(tmp_path / "model.pt", data, arch, flags)
    state = model.state_dict()
    twice = {name.replace("aa-bb", "bb-aa"): weight.clone() for name, weight in state.items()}
    torch.save(
        {
            "args": Namespace(
                **{**vars(arguments("transformer")), "task": "multilingual_translation"}
            ),
            "model": {**state, **twice},
        },
        str(tmp_path / "both.pt"),
    )
    total, _ = Checkpoint.open(str(tmp_path / "both.pt"), ROLE).parameters()
    once = dict(model.named_parameters())
    assert total == sum(w.numel() for n, w in once.items() if not SECOND_COPIES.search(n))
