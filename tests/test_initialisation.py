"""A student's start is its teacher, without the layers and the symbols that it does not take."""

import random
import re
from pathlib import Path
from typing import Any, List, NamedTuple, Sequence

import pytest
import support
import torch
import trainer
from fairseq import models, options, tasks
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks.multilingual_translation import MultilingualTranslationTask
from omegaconf import OmegaConf
from support import in_process

from kd_plugin.checkpoints import Checkpoint, Dictionaries, Role, kind_of
from kd_plugin.errors import UserError
from kd_plugin.initialisation import Asked, make
from kd_plugin.initialisation.layers import evenly

LANGS = (support.SOURCE, support.TARGET)
ALL = "--share-all-embeddings"
PRE_NORM = ["--encoder-normalize-before", "--decoder-normalize-before"]
LEARNED = ["--encoder-learned-pos", "--decoder-learned-pos"]
SIZES = [
    *("--encoder-layers", 3, "--decoder-layers", 3),
    *("--encoder-embed-dim", 16, "--decoder-embed-dim", 16, "--encoder-ffn-embed-dim", 32),
    *("--encoder-attention-heads", 2, "--decoder-attention-heads", 4),
]
LONGEST = ["--max-source-positions", 40, "--max-target-positions", 30]
TRANSFORMER = ["--arch", "transformer", *SIZES]
TEACHERS = {
    "untied": TRANSFORMER,
    "tied outputs": [*TRANSFORMER, "--share-decoder-input-output-embed"],
    "all tied, pre-norm": [*TRANSFORMER, ALL, *PRE_NORM],
    "learned positions": [*TRANSFORMER, *LEARNED, *LONGEST, "--activation-fn", "gelu"],
    "another name": ["--arch", "transformer_iwslt_de_en", *SIZES[:4], "--encoder-embed-dim", 8],
    "bart": ["--arch", "bart_base", *SIZES, *LONGEST],
    "mbart": ["--arch", "mbart_base", *SIZES, "--no-scale-embedding"],
    "language model": [
        *("--arch", "transformer_lm", "--decoder-layers", 3, "--decoder-embed-dim", 16),
        *("--decoder-input-dim", 16, "--decoder-output-dim", 16, "--decoder-ffn-embed-dim", 32),
    ],
}
JOINED = ("all tied, pre-norm", "bart", "mbart", "language model")


def words(letter: str, count: int) -> List[str]:
    return [f"{letter}{i}" for i in range(count)]


def dictionary(symbols: Sequence[str]) -> Dictionary:
    made = Dictionary()
    for symbol in symbols:
        made.add_symbol(symbol)
    return made


def save(folder: Path, source: Sequence[str], target: Sequence[str]) -> Path:
    """Under the names that a data-bin of two languages has, and that of text."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, symbols in zip((*LANGS, None), (source, target, source)):
        dictionary(symbols).save(str(folder / (f"dict.{name}.txt" if name else "dict.txt")))
    return folder


def built(arguments: Sequence[Any], source: Dictionary, target: Dictionary) -> Any:
    """What fairseq-train builds, and its configuration."""
    reads_text = any("transformer_lm" in str(word) for word in arguments)
    task = ["--task", "language_modeling"] if reads_text else support.LANGUAGES
    given = [str(word) for word in ("data", *task, *arguments)]
    args = options.parse_args_and_arch(options.get_training_parser(), given)
    cfg = convert_namespace_to_omegaconf(args)
    kind = kind_of(cfg.task._name, args.arch)
    task = kind.new_task(Dictionaries(source, target, ""), (1024, 1024))
    return models.build_model(cfg.model, task), cfg


class Teacher(NamedTuple):
    path: Path
    model: Any
    source: Dictionary
    target: Dictionary


def teacher_of(name: str, folder: Path) -> Teacher:
    source, target = words("a", 11), words("b", 7)
    if name in JOINED:
        source = target = words("a", 11)
    save(folder, source, target)
    torch.manual_seed(1)
    both = dictionary(source), dictionary(target)
    model, cfg = built(TEACHERS[name], *both)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    plain = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    state = {"args": None, "cfg": plain, "model": model.state_dict()}
    state.update(optimizer_history=[{"num_updates": 7}], last_optimizer_state={"state": {}})
    torch.save(state, str(folder / "teacher.pt"))
    return Teacher(folder / "teacher.pt", model, *both)


@pytest.fixture(params=TEACHERS)
def teacher(request, tmp_path) -> Teacher:
    return teacher_of(request.param, tmp_path / "teacher")


def students_model(made: Any, path: Path, source: Dictionary, target: Dictionary) -> Any:
    """What ``fairseq-train`` makes of the flags, with the weights of the checkpoint."""
    state = support.load(path)
    assert state["last_optimizer_state"] is None
    assert state["optimizer_history"][-1]["num_updates"] == 0
    model, cfg = built(made.flags, source, target)
    model.load_state_dict(state["model"], strict=True, model_cfg=cfg.model)
    return model


def outputs(model: Any, source: Dictionary, target: Dictionary) -> torch.Tensor:
    """Logits of a batch, in float64, with padding among it."""
    rng = random.Random(4)
    model = model.double().eval()

    def rows(one: Dictionary, first: List[int], pad_left: bool) -> torch.Tensor:
        # words that every student knows
        known = sorted(one.indices[word] for word in one.symbols if word[1:] in ("1", "3", "4"))
        known.sort(key=lambda i: one.symbols[i])
        lines = [[*first, *(rng.choice(known) for _ in range(n))] for n in (5, 3)]
        pads = [[one.pad()] * (len(lines[0]) - len(line)) for line in lines]
        return torch.tensor([p + r if pad_left else r + p for p, r in zip(pads, lines)])

    read, written = rows(source, [], True), rows(target, [target.eos()], False)
    if not hasattr(model, "encoder"):
        return model(written)[0]
    return model(read, torch.tensor([5, 3]), written)[0]


def without(model: Any, encoder: Sequence[int], decoder: Sequence[int]) -> Any:
    """A model that goes through some of its layers."""
    for side, kept in (("encoder", encoder), ("decoder", decoder)):
        if hasattr(model, side):
            part = getattr(model, side)
            part.layers = torch.nn.ModuleList([part.layers[i] for i in kept])
            part.num_layers = len(kept)
    return model


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    """In float64; fairseq 0.12.2 goes through its encoder's layers in one of two ways."""
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_with_all_layers_it_is_its_teacher(teacher, tmp_path):
    made = make(Asked(str(teacher.path), str(tmp_path / "student.pt")))
    both = teacher.source, teacher.target
    student = students_model(made, tmp_path / "student.pt", *both)
    assert_same(outputs(student, *both), outputs(teacher.model, *both))


def test_layers_and_symbols_that_it_does_not_take(teacher, tmp_path):
    """Against the teacher's own model without these layers: the same logits, in the student's order
    of symbols."""
    mine = []
    for seed, theirs in enumerate((teacher.source, teacher.target)):
        kept = [s for s in theirs.symbols[theirs.nspecial :] if s[1:] not in ("0", "5")]
        random.Random(7 if teacher.source == teacher.target else seed).shuffle(kept)
        mine.append(kept)
    folder = save(tmp_path / "dictionaries", *mine)
    has_encoder = hasattr(teacher.model, "encoder")
    made = make(
        Asked(
            *(str(teacher.path), str(tmp_path / "student.pt")),
            encoder_layers="0,2" if has_encoder else None,
            decoder_layers="2,0,0",
            dictionary=str(folder),
        )
    )
    source, target = map(dictionary, mine)
    student = students_model(made, tmp_path / "student.pt", source, target)
    expected = outputs(without(teacher.model, (0, 2), (2, 0, 0)), teacher.source, teacher.target)
    columns = [teacher.target.index(symbol) for symbol in target.symbols]
    found = outputs(student, source, target)
    assert_same(found, expected[..., columns])
    opened = Checkpoint.open(str(tmp_path / "student.pt"), Role("student"))
    assert opened.symbols == (source.symbols, target.symbols)


def test_symbols_that_the_teacher_lacks(tmp_path):
    teacher = teacher_of("untied", tmp_path / "teacher")
    source, target = ["a1", "new", "a0", "madeupword0000"], ["b3", "other", "b1"]
    folder, output = save(tmp_path / "dictionaries", source, target), tmp_path / "student.pt"
    asked = Asked(str(teacher.path), str(output), dictionary=str(folder))
    with pytest.raises(UserError, match=r"source .*lacks 1 of the student's 8: 'new'. --new-sym"):
        make(asked)
    assert not output.exists()
    made = make(asked._replace(new_symbols="random"))
    text = "\n".join(made.lines)
    start = "which start at random"
    assert (
        f"source dictionary: 8 symbols; the teacher has 15, lacks 1 of them, {start}: 'new'" in text
    )
    assert "; 1 that are padding" in text and f"lacks 1 of them, {start}: 'other'" in text
    weights, theirs = support.load(output)["model"], teacher.model.state_dict()
    both = dictionary(source), dictionary(target)
    for name, one, other in (
        ("encoder.embed_tokens.weight", both[0], teacher.source),
        ("decoder.embed_tokens.weight", both[1], teacher.target),
        ("decoder.output_projection.weight", both[1], teacher.target),
    ):
        for i, symbol in enumerate(one.symbols):
            if symbol in other.indices:
                assert torch.equal(weights[name][i], theirs[name][other.index(symbol)])
            else:  # fairseq's start: a mean of 0 and a deviation of 16 ** -0.5
                assert 0.1 < weights[name][i].std() < 0.5 and weights[name][i].abs().max() < 1.25
    again = make(asked._replace(new_symbols="random", output=str(tmp_path / "again.pt")))
    support.assert_same_weights(output, tmp_path / "again.pt")
    assert again.flags[2:] == made.flags[2:]


def test_tied_tables_get_the_same_new_rows(tmp_path):
    teacher = teacher_of("all tied, pre-norm", tmp_path / "teacher")
    folder = save(tmp_path / "dictionaries", ["new", "a1"], ["new", "a1"])
    output = tmp_path / "student.pt"
    make(Asked(str(teacher.path), str(output), dictionary=str(folder), new_symbols="random"))
    weights = support.load(output)["model"]
    table = weights["encoder.embed_tokens.weight"]
    assert torch.equal(table, weights["decoder.output_projection.weight"])
    assert table[4].abs().sum() > 0


def test_one_dictionary_for_both_languages(tmp_path):
    """As fairseq-kd-vocabulary writes it."""
    teacher = teacher_of("all tied, pre-norm", tmp_path / "teacher")
    cut = tmp_path / "cut"
    cut.mkdir()
    dictionary(["a4", "a1"]).save(str(cut / "dict.txt"))
    make(Asked(str(teacher.path), str(tmp_path / "student.pt"), dictionary=str(cut)))
    weights, theirs = support.load(tmp_path / "student.pt")["model"], teacher.model.state_dict()
    rows = [0, 1, 2, 3, teacher.source.index("a4"), teacher.source.index("a1")]
    assert torch.equal(
        weights["encoder.embed_tokens.weight"], theirs["encoder.embed_tokens.weight"][rows]
    )


@pytest.mark.parametrize("task", [None, "translation"])
def test_a_multilingual_teacher(task, tmp_path):
    """Tags stay for the same task; one pair needs none."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    data = trainer.write_data(tmp_path / "data")
    path, model, its_task = trainer.write_mbart(folder, data, bos=False)
    trainer.save_dictionaries(folder, *map(trainer.dictionary, (trainer.SOURCE, trainer.TARGET)))
    asked = Asked(path, str(tmp_path / "student.pt"), decoder_layers="0", task=task)
    if task:
        with pytest.raises(UserError, match=r"needs --dictionary.*adds '\[bb\]', .*'<mask>'"):
            make(asked)
    # its architecture has on what its configuration has off
    with pytest.raises(UserError, match="no flags of fairseq-train build a mbart_base"):
        make(asked._replace(dictionary=str(data)))
    state = support.load(path)
    state["args"].share_all_embeddings = True
    for name in ("encoder.embed_tokens", "decoder.embed_tokens", "decoder.output_projection"):
        state["model"][name + ".weight"] = state["model"]["decoder.embed_tokens.weight"]
    torch.save(state, path)
    trainer.save_dictionaries(folder, *[trainer.dictionary(trainer.TARGET)] * 2)
    few = save(tmp_path / "few", "CAB", "CAB")
    make(asked._replace(dictionary=str(few)))
    student = support.load(tmp_path / "student.pt")
    symbols = student["task_state"]["source_symbols"]
    assert symbols[4:] == [*"CAB", *([] if task else ["[bb]", "[xx]", "[aa]", "<mask>"])]
    theirs = state["model"]["decoder.embed_tokens.weight"]
    rows = [its_task.target_dictionary.index(symbol) for symbol in symbols]
    assert torch.equal(student["model"]["decoder.embed_tokens.weight"], theirs[rows])


def test_a_model_for_each_direction(tmp_path):
    symbols = {lang: dictionary(words(lang[0], 5)) for lang in ("aa", "bb", "cc")}
    for lang, one in symbols.items():
        one.save(str(tmp_path / f"dict.{lang}.txt"))
    given = ["data", "--task", "multilingual_translation", "--lang-pairs", "aa-bb,cc-bb"]
    given += ["--arch", "multilingual_transformer", *map(str, SIZES)]
    args = options.parse_args_and_arch(options.get_training_parser(), given)
    args.lang_pairs, args.source_lang, args.target_lang = args.lang_pairs.split(","), None, None
    task = MultilingualTranslationTask(args, symbols, training=True)
    model = task.build_model(args)
    torch.save({"args": args, "model": model.state_dict()}, str(tmp_path / "teacher.pt"))
    asked = Asked(str(tmp_path / "teacher.pt"), str(tmp_path / "student.pt"), layers="2:1")
    with pytest.raises(UserError, match="names no languages: give --source-lang"):
        make(asked)
    made = make(asked._replace(source_lang="cc", target_lang="bb"))
    both = symbols["cc"], symbols["bb"]
    student = students_model(made, tmp_path / "student.pt", *both)
    own = without(model.models["cc-bb"], (0, 2), (0,))
    assert_same(outputs(student, *both), outputs(own, *both))


def test_layers_are_spread_evenly():
    assert evenly(3, 6) == [0, 2, 5]
    assert evenly(2, 6) == [0, 5]
    assert evenly(4, 6) == [0, 2, 3, 5]
    assert evenly(6, 12) == [0, 2, 4, 7, 9, 11]
    assert evenly(3, 12) == [0, 5, 11]
    assert evenly(1, 6) == [0]
    for layers in range(1, 26):
        for count in range(1, layers + 1):
            found = evenly(count, layers)
            assert len(set(found)) == count and found == sorted(found)
            assert found[0] == 0 and (count == 1 or found[-1] == layers - 1)


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Teacher:
    return teacher_of("untied", tmp_path_factory.mktemp("untied"))


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--encoder-layers", "0,3"], "--encoder-layers: there is no layer 3; .*has 3 layers"),
        (["--decoder-layers", "0;1"], "--decoder-layers 0;1: expected the teacher's layers"),
        (["--layers", "4:0"], "expected 1 to 3 for the encoder, got 4; .*for the decoder, got 0"),
        (["--layers", "3"], "--layers 3: .*encoder and decoder have: 6:3 say"),
        (["--layers", "1:1", "--decoder-layers", "0"], "give one or the other"),
        (["--dictionary", "nowhere"], "--dictionary nowhere: there is no such folder"),
        (["--encoder-embed-dim", "32"], "--encoder-embed-dim: expected 16, .*, got 32"),
        (["--decoder-attention-heads", "2"], "--decoder-attention-heads: expected 4, .*, got 2"),
        (["--encoder-normalize-before"], "--encoder-normalize-before: expected False"),
        (["--fp16", "--tpu"], "fairseq-train refuses these flags"),
        ([ALL], "--share-all-embeddings: expected False, .*, got True"),
        (["--no-such-flag"], "fairseq-train refuses these flags: .*--no-such-flag"),
        (["--source-lang", "xx"], "dictionaries were not found; --teacher-data DIR"),
    ],
)
def test_refusals(flags, reason, untied, tmp_path):
    output = tmp_path / "student.pt"
    run = in_process("fairseq-kd-init", untied.path, "--output", output, *flags)
    assert re.search(reason, run.refusal), run.refusal
    assert [*tmp_path.iterdir()] == []


def test_flags_of_a_training_with_a_teacher(untied, tmp_path):
    """--task says how the others are read, --seed is the training's."""
    flags = ["--task", "kd_translation", "--teacher-checkpoint-path", "t.pt", "--seed", "7"]
    flags += ["--criterion", "kd_label_smoothed_cross_entropy", "--kd-weight", "0.9"]
    command = ["fairseq-kd-init", untied.path, "--output", tmp_path / "student.pt", *flags]
    printed = in_process(*command).ok().text.splitlines()[-1]
    assert printed.endswith(" ".join(flags))
    other = in_process(*command, "--overwrite", "--task", "kd_language_modeling").refusal
    assert "--task kd_language_modeling: " in other and "kd_translation say" in other


def test_an_output_that_is_there(untied, tmp_path):
    output = tmp_path / "student.pt"
    output.write_text("mine")
    command = ["fairseq-kd-init", untied.path, "--output", output]
    assert "already exists; choose another, or --overwrite" in in_process(*command).refusal
    wrong = in_process(*command, "--overwrite", "--layers", "9:9").refusal
    assert "expected 1 to 3" in wrong and output.read_text() == "mine"
    teacher = in_process("fairseq-kd-init", untied.path, "--output", untied.path, "--overwrite")
    assert "would overwrite the teacher" in teacher.refusal
    in_process(*command, "--overwrite", "--layers", "1:1").ok()
    assert [*tmp_path.iterdir()] == [output] and output.stat().st_size > 1000


def changed(teacher: Teacher, folder: Path, **values: Any) -> Path:
    state = support.load(teacher.path)
    for name, value in values.items():
        vars(state["cfg"]["model"])[name] = value
    save(folder, teacher.source.symbols[4:], teacher.target.symbols[4:])
    torch.save(state, str(folder / "teacher.pt"))
    return folder / "teacher.pt"


@pytest.mark.parametrize(
    "option, value, why",
    [
        ("layer_wise_attention", True, "reads the encoder's layer of its own number"),
        ("adaptive_input", True, "in clusters by frequency"),
        ("adaptive_softmax_cutoff", [5, 8], "in clusters by frequency"),
    ],
)
def test_models_that_cannot_be_taken_apart(option, value, why, untied, tmp_path):
    path = changed(untied, tmp_path / "teacher", **{option: value})
    run = in_process("fairseq-kd-init", path, "--output", tmp_path / "student.pt")
    assert "cannot be taken apart: it has --" + option.replace("_", "-") in run.refusal
    assert why in run.refusal


def test_other_models_are_refused_by_name(untied, tmp_path):
    args = trainer.arguments("lstm")
    save(tmp_path, "abc", "abc")
    both = dictionary("abc"), dictionary("abc")
    task = tasks.translation.TranslationTask(tasks.translation.TranslationConfig(), *both)
    model = models.build_model(args, task)
    torch.save({"args": args, "model": model.state_dict()}, str(tmp_path / "teacher.pt"))
    with pytest.raises(UserError, match="is a lstm: only layers of fairseq's transformers"):
        make(Asked(str(tmp_path / "teacher.pt"), str(tmp_path / "student.pt")))


def test_two_dictionaries_for_a_shared_table(tmp_path):
    teacher = teacher_of("all tied, pre-norm", tmp_path / "teacher")
    folder = save(tmp_path / "dictionaries", ["a1"], ["a2"])
    with pytest.raises(UserError, match="expected the same dictionary for both sides"):
        make(Asked(str(teacher.path), str(tmp_path / "student.pt"), dictionary=str(folder)))
