"""Exported models are the same models: in stock fairseq, in CTranslate2, in their numbers."""

import dataclasses
import math
import pickletools
import random
import re
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import support
import torch
from fairseq import options, tasks
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import register_model
from fairseq.models.transformer import TransformerConfig, TransformerModelBase
from letters import write_letters
from omegaconf import OmegaConf

from kd_plugin.checkpoints import Checkpoint, Role, count_parameters
from kd_plugin.commands import export as command
from kd_plugin.decoding import (
    DataBin,
    FairseqEngine,
    Hypothesis,
    Tokenizer,
    databin,
)
from kd_plugin.export import FORMATS, Asked, make
from kd_plugin.export import ctranslate2 as to_ctranslate2
from kd_plugin.export import fairseq as to_fairseq
from kd_plugin.export import verify as verification
from kd_plugin.export.formats import ExportError, Format, Model, Verdict
from kd_plugin.export.vocabulary_map import VocabularyMap
from kd_plugin.files import read_json

LANGS = (support.SOURCE, support.TARGET)
TRANSFORMER = [
    *("--arch", "transformer", "--encoder-layers", 2, "--decoder-layers", 2),
    *("--encoder-embed-dim", 16, "--decoder-embed-dim", 16),
    *("--encoder-ffn-embed-dim", 32, "--decoder-ffn-embed-dim", 32),
    *("--encoder-attention-heads", 2, "--decoder-attention-heads", 2),
]
PRE_NORM = ["--encoder-normalize-before", "--decoder-normalize-before"]
MODELS = {
    "untied": TRANSFORMER,
    "tied": [*TRANSFORMER, "--share-decoder-input-output-embed"],
    "all tied": [*TRANSFORMER, "--share-all-embeddings"],
    "pre-norm": [*TRANSFORMER, *PRE_NORM],
    "learned positions": [*TRANSFORMER, "--encoder-learned-pos", "--decoder-learned-pos"],
    "everything": [
        *(*TRANSFORMER, *PRE_NORM, "--share-all-embeddings", "--layernorm-embedding"),
        *("--encoder-learned-pos", "--decoder-learned-pos", "--activation-fn", "gelu"),
    ],
    "named": [*TRANSFORMER[2:], "--arch", "transformer_iwslt_de_en"],
    "transformer_align": support.ARCHITECTURES["transformer_align"],
}
OTHERS = {
    "lstm": support.ARCHITECTURES["lstm"],
    "fconv": support.ARCHITECTURES["fconv"],
    "lightconv": [
        *support.ARCHITECTURES["lightconv"],
        *("--encoder-layers", 2, "--decoder-layers", 2),
    ],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data-bin with a joined dictionary and two dozen sentences, unknown words among them."""
    folder = tmp_path_factory.mktemp("data")
    dictionary = Dictionary()
    for i in range(30):
        dictionary.add_symbol(f"w{i:02d}", n=30 - i)
    rng = random.Random(1)
    for lang in LANGS:
        dictionary.save(str(folder / f"dict.{lang}.txt"))
        writer = databin.Writer(folder / "valid.{}-{}.{}".format(*LANGS, lang), len(dictionary))
        for _ in range(23):
            words = [f"w{rng.randrange(31):02d}" for _ in range(rng.randint(1, 9))]
            writer.add(databin.encode(dictionary, " ".join(words)))
        writer.add(databin.encode(dictionary, "w01 <pad> w02"))  # which fairseq does not see
        writer.close()
    return folder


def made(data, path, arch, seed=1, args_only=False):
    """A checkpoint as fairseq-train writes it, of a model that has learned nothing."""
    arguments = [data, *support.LANGUAGES, *arch, "--max-source-positions", 64]
    args = options.parse_args_and_arch(
        options.get_training_parser(), [str(a) for a in (*arguments, "--max-target-positions", 64)]
    )
    cfg = convert_namespace_to_omegaconf(args)
    torch.manual_seed(seed)
    model = tasks.setup_task(cfg.task).build_model(cfg.model)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    state = {
        "args": args if args_only else None,
        "cfg": None if args_only else OmegaConf.to_container(cfg, resolve=True, enum_to_str=True),
        "model": model.state_dict(),
        "optimizer_history": [{"num_updates": 7, "lr_scheduler_state": {}}],
        "extra_state": {"train_iterator": {"epoch": 1}},
        "last_optimizer_state": {"state": {0: torch.zeros(3)}},
    }
    torch.save(state, str(path))
    return path


SIDE = {"layers": 2, "embed_dim": 16, "ffn_embed_dim": 32, "attention_heads": 2}
SECTIONS = {
    "both": {"encoder": SIDE, "decoder": SIDE},
    "one": {**{f"encoder_{name}": value for name, value in SIDE.items()}, "decoder": SIDE},
    "other values": {
        "encoder": {**SIDE, "layers": 3, "normalize_before": True, "attention_heads": 4},
        "decoder": {
            **{**SIDE, "layers": 1, "attention_heads": 4},
            **{"normalize_before": True, "learned_pos": True},
        },
        "quant_noise": {"pq": 0.0},
        "activation_fn": "gelu",
    },
}


def made_from_yaml(data, path, options, architecture="transformer"):
    """A checkpoint as fairseq-hydra-train writes it."""
    state = torch.load(str(made(data, path, TRANSFORMER)))
    model = OmegaConf.create({"_name": architecture, "base_layers": 0, **options})
    model.update(max_source_positions=64, max_target_positions=64)
    built = tasks.setup_task(OmegaConf.create(state["cfg"]["task"])).build_model(model)
    for p in built.parameters():
        torch.nn.init.normal_(p, std=0.3)
    # building fills in the defaults of options with a prefix
    state["cfg"]["model"] = OmegaConf.to_container(model, resolve=True, enum_to_str=True)
    torch.save({**state, "model": built.state_dict()}, str(path))
    return path


def read(path):
    return Checkpoint.open(str(path), Role("model"))


def opened(path, data):
    """The checkpoint, and its plain version."""
    checkpoint, both = read(path), DataBin(str(data), *LANGS)
    return checkpoint, to_fairseq.stock_state(checkpoint, both.source, both.target, LANGS)


def text_of(data, folder):
    folder.mkdir()
    bins = DataBin(str(data), *LANGS)
    return verification.Text.cut(bins, "valid", 0, max_positions=(64, 64), folder=folder)


@pytest.mark.parametrize("impl", ["lazy", "raw"])
def test_older_formats_to_verify_on(tmp_path, impl):
    def batches(name, impl):
        data = write_letters(tmp_path / name, *LANGS, impl=impl)
        text = text_of(data.folder, tmp_path / ("text of " + name))
        return [batch["target"].tolist() for batch in text.samples()]

    assert batches("older", impl) == batches("mine", "mmap")


def assert_generates_the_same(path, stock, data, tmp_path):
    exported = tmp_path / "exported.pt"
    torch.save(stock, str(exported))
    text = text_of(data, tmp_path / "text")
    generation = verification.generation(3)
    generation.max_len_b = 12
    engine = FairseqEngine(text.task, [verification.build(read(path), text, 3)], generation, 1)
    expected = verification.translations(engine, text)
    run = support.fairseq(
        "fairseq-generate",
        *(data, "--path", exported, "--gen-subset", "valid", "--cpu", "--beam", 3),
        *("--max-len-b", 12, "--num-workers", 0, "--required-batch-size-multiple", 1),
        *("--max-tokens", verification.MAX_TOKENS, *support.LANGUAGES),
    ).ok()
    assert support.hypotheses(run.text) == [expected[i].subwords for i in sorted(expected)]
    scores = {
        int(line.split("\t")[0][2:]): float(line.split("\t")[1])
        for line in run.text.split("\n")
        if line.startswith("H-")
    }
    for i, hypothesis in expected.items():
        assert scores[i] * 0.693147180559945 == pytest.approx(hypothesis.score, abs=1e-6)


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_stock_fairseq_says_the_same(name, data, tmp_path):
    path = made(data, tmp_path / "model.pt", {**MODELS, **OTHERS}[name])
    _, stock = opened(path, data)
    assert_generates_the_same(path, stock, data, tmp_path)


@pytest.mark.parametrize("name", SECTIONS)
def test_options_in_sections_are_read(name, data, tmp_path):
    """encoder: {layers: 2} of a YAML file, in both formats."""
    path = made_from_yaml(data, tmp_path / "model.pt", SECTIONS[name])
    checkpoint, stock = opened(path, data)
    decoder = SECTIONS[name]["decoder"]
    assert checkpoint.options["decoder_layers"] == decoder["layers"]
    assert "decoder" not in stock["cfg"]["model"]
    assert_generates_the_same(path, stock, data, tmp_path)
    ctranslate2 = pytest.importorskip("ctranslate2")
    to_ctranslate2.check(checkpoint)
    to_ctranslate2.convert(Model(checkpoint, stock), tmp_path / "ct2")
    text = text_of(data, tmp_path / "again")
    expected = verification.reference_scores(verification.build(checkpoint, text, 1), text)
    translator = ctranslate2.Translator(str(tmp_path / "ct2"))
    assert to_ctranslate2.compare_token_scores(expected, translator, text)[0] < 1e-3


def test_a_model_with_a_configuration_of_its_own_class(data, tmp_path):
    """fairseq's newer way to register models: their sections are part of the class."""

    @register_model("toy_of_sections", dataclass=TransformerConfig)
    class _(TransformerModelBase):
        pass

    decoder = {**SIDE, "input_dim": 16, "output_dim": 16}  # the whole configuration says so
    sections = {"encoder": {**SIDE, "layers": 1}, "decoder": decoder}
    path = made_from_yaml(data, tmp_path / "model.pt", sections, "toy_of_sections")
    checkpoint, stock = opened(path, data)
    text = text_of(data, tmp_path / "text")
    torch.save(stock, str(tmp_path / "exported.pt"))
    expected, found = [
        verification.reference_scores(verification.build(read(file), text, 1), text)
        for file in (path, tmp_path / "exported.pt")
    ]
    assert expected == found and checkpoint.max_positions == (64, 64)


@pytest.mark.parametrize("name", ["untied", "lightconv"])
def test_args_of_old_versions(name, data, tmp_path):
    path = made(data, tmp_path / "model.pt", {**MODELS, **OTHERS}[name], args_only=True)
    _, stock = opened(path, data)
    assert stock["args"] is None
    assert_generates_the_same(path, stock, data, tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_ctranslate2_scores_the_same(name, data, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    path = made(data, tmp_path / "model.pt", MODELS[name])
    checkpoint, stock = opened(path, data)
    to_ctranslate2.check(checkpoint)
    to_ctranslate2.convert(Model(checkpoint, stock), tmp_path / "ct2")
    text = text_of(data, tmp_path / "text")
    model = verification.build(checkpoint, text, 1)
    assert checkpoint.max_positions == model.max_positions()
    expected = verification.reference_scores(model, text)
    translator = ctranslate2.Translator(str(tmp_path / "ct2"))
    assert to_ctranslate2.compare_token_scores(expected, translator, text)[0] < 1e-3
    changed = {i: [score + 0.01 for score in scores] for i, scores in expected.items()}
    largest, mean = to_ctranslate2.compare_token_scores(changed, translator, text)
    assert largest == pytest.approx(0.01, abs=1e-3) and mean == pytest.approx(0.01, abs=1e-3)


def test_special_symbols_within_sentences_score_the_same(data, tmp_path):
    """An end of sentence counts in both; of a pad CTranslate2 knows nothing."""
    ctranslate2 = pytest.importorskip("ctranslate2")
    path = made(data, tmp_path / "model.pt", MODELS["tied"])
    checkpoint, stock = opened(path, data)
    to_ctranslate2.convert(Model(checkpoint, stock), tmp_path / "ct2")
    special = tmp_path / "special"
    special.mkdir()
    sides = [
        ["w01 </s> w02", "w03 <pad> w04 w05", "w06 w07", "w08"],
        ["w01 </s> w02", "w03 w04", "w05 <pad> w06", "w07 </s>"],
    ]
    for lang, lines in zip(LANGS, sides):
        shutil.copy(str(data / f"dict.{lang}.txt"), str(special))
        dictionary = Dictionary.load(str(special / f"dict.{lang}.txt"))
        writer = databin.Writer(special / "valid.{}-{}.{}".format(*LANGS, lang), len(dictionary))
        for line in lines:
            writer.add(databin.encode(dictionary, line))
        writer.close()
    text = text_of(special, tmp_path / "text")
    model = verification.build(checkpoint, text, 1)
    translator = ctranslate2.Translator(str(tmp_path / "ct2"))
    expected = verification.reference_scores(model, text)
    assert to_ctranslate2.compare_token_scores(expected, translator, text)[0] < 1e-3


def test_bleu_of_a_language_without_spaces(data, tmp_path, caplog):
    """Scored on text, with the tokenizer that is asked for; and where it says nothing, that."""
    text = text_of(data, tmp_path / "text")
    dictionary = text.task.target_dictionary
    pieces = [dictionary.add_symbol(piece) for piece in ("<0xE4>", "<0xBB>", "<0x8A>", "\u2581")]
    chinese = [dictionary.add_symbol(c) for c in "天气很好我们去散步吧"]
    lines = [[pieces[3], *pieces[:3], *chinese[i:], *chinese[:i]] for i in range(3)]
    references = [torch.tensor([*line, dictionary.eos()]) for line in lines]
    own = SimpleNamespace(source=text.task.source_dictionary, target=dictionary)
    text = text._replace(corpus=text.corpus._replace(references=references, data=own))
    symbols = [" ".join(dictionary.symbols[i] for i in line) for line in lines]
    same = {i: Hypothesis(line, -1.0, True) for i, line in enumerate(symbols)}
    shorter = {i: Hypothesis(line[:-2], -1.0, True) for i, line in enumerate(symbols)}
    for tokenizer, expected in ((Tokenizer.of("zh"), 90), (Tokenizer(), 0)):
        (perfect, good), signature = verification.bleu(
            [same, shorter], text, post_process="sentencepiece", tokenizer=tokenizer
        )
        assert good == pytest.approx(expected, abs=5) and f"|tok:{tokenizer.name}|" in signature
        assert (perfect > 99) == (tokenizer.name == "zh")
        assert ("CANNOT BE TOLD APART" in caplog.text) == (tokenizer.name != "zh")


@pytest.mark.parametrize("name", ["tied", "learned positions"])
def test_ctranslate2_without_positions_that_never_come(name, data, tmp_path):
    """Sentences that fit score as before, and the file is smaller."""
    ctranslate2 = pytest.importorskip("ctranslate2")
    path = made(data, tmp_path / "model.pt", MODELS[name])
    checkpoint, stock = opened(path, data)
    to_ctranslate2.convert(Model(checkpoint, stock), tmp_path / "long")
    short = Model(checkpoint, to_fairseq.shortened(stock, 10))
    to_ctranslate2.convert(short, tmp_path / "short")
    sizes = [(tmp_path / n / "model.bin").stat().st_size for n in ("long", "short")]
    # sinusoidal tables are the same on both sides and written once
    assert sizes[0] - sizes[1] == (64 - 10) * 16 * 4 * (1 if name == "tied" else 2)
    text = text_of(data, tmp_path / "text")
    expected = verification.reference_scores(verification.build(checkpoint, text, 1), text)
    translator = ctranslate2.Translator(str(tmp_path / "short"))
    assert to_ctranslate2.compare_token_scores(expected, translator, text)[0] < 1e-3


@pytest.mark.parametrize("name", OTHERS)
def test_ctranslate2_refuses_other_architectures_by_name(name, data, tmp_path):
    pytest.importorskip("ctranslate2")
    path = made(data, tmp_path / "model.pt", OTHERS[name])
    with pytest.raises(ExportError, match=f"'{name}'"):
        to_ctranslate2.check(read(path))


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--activation-fn", "tanh"], "--activation-fn tanh"),
        (["--no-token-positional-embeddings"], "--no-token-positional-embeddings"),
        (["--encoder-normalize-before"], "--decoder-normalize-before"),
        (["--cross-self-attention"], "--cross-self-attention"),
        (["--adaptive-softmax-cutoff", "10"], "--adaptive-softmax-cutoff"),
        (["--decoder-output-dim", "8"], "--decoder-output-dim"),
    ],
)
def test_ctranslate2_refuses_options_by_name(flags, words, data, tmp_path):
    pytest.importorskip("ctranslate2")
    path = made(data, tmp_path / "model.pt", [*TRANSFORMER, *flags])
    with pytest.raises(ExportError, match=words):
        to_ctranslate2.check(read(path))


def test_what_an_export_holds(data, tmp_path):
    """Plain types, tied weights once, no optimizer, and what fairseq itself reads."""
    path = made(data, tmp_path / "model.pt", MODELS["all tied"])
    _, stock = opened(path, data)
    torch.save(stock, str(tmp_path / "out.pt"))
    with zipfile.ZipFile(str(tmp_path / "out.pt")) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("data.pkl")]
        wanted = {
            arg for op, arg, _ in pickletools.genops(archive.read(name)) if "GLOBAL" in op.name
        }
    assert {word.split(" ")[0] for word in wanted} <= {"torch", "torch._utils", "collections"}
    assert stock["last_optimizer_state"] is None and stock["extra_state"] == {}
    assert stock["cfg"]["criterion"] is None and stock["cfg"]["task"]["_name"] == "translation"
    assert (
        stock["optimizer_history"][0]["num_updates"] == 7 and len(stock["optimizer_history"]) == 1
    )
    assert "save_dir" not in stock["cfg"]["model"] and "lr" not in stock["cfg"]["model"]
    symbols = DataBin(str(data), *LANGS).source.symbols
    assert read(tmp_path / "out.pt").symbols == (symbols, symbols)
    model = stock["model"]
    table = model["encoder.embed_tokens.weight"].data_ptr()
    assert model["decoder.output_projection.weight"].data_ptr() == table
    assert (tmp_path / "out.pt").stat().st_size < path.stat().st_size


def test_half_precision_is_kept(data, tmp_path):
    path = made(data, tmp_path / "model.pt", MODELS["tied"])
    checkpoint = read(path)
    half = {name: weight.half() for name, weight in checkpoint.weights.items()}
    both = DataBin(str(data), *LANGS)
    stock = to_fairseq.stock_state(checkpoint.with_weights(half), both.source, both.target, LANGS)
    for name, weight in stock["model"].items():
        assert name.endswith("_float_tensor") or weight.dtype == torch.float16, name
        if name in half and not name.endswith("_float_tensor"):
            assert weight.equal(half[name])


@pytest.mark.parametrize(
    "name, tables",
    [("untied", 3), ("tied", 2), ("all tied", 1), ("learned positions", 3)],
)
def test_parameters_are_counted_once(name, tables, data, tmp_path):
    path = made(data, tmp_path / "model.pt", MODELS[name])
    checkpoint, stock = opened(path, data)
    # copies of what is tied, as checkpoints from a GPU hold them
    copies = {key: weight.clone() for key, weight in checkpoint.weights.items()}
    # both sides: two attention projections more in the decoder, two linear layers, layer norms
    attention, linear, norm = 4 * (16 * 16 + 16), 2 * 16 * 32 + 32 + 16, 2 * 16
    rest = 2 * (attention + linear + 2 * norm) + 2 * (2 * attention + linear + 3 * norm)
    positions = 2 * (64 + 2) * 16 if name == "learned positions" else 0
    expected = (rest + tables * 34 * 16 + positions, rest)
    assert checkpoint.with_weights(copies).parameters() == expected
    assert count_parameters(stock["model"]) == expected


def test_other_tasks_and_architectures_are_named(data, tmp_path):
    path = made(data, tmp_path / "model.pt", MODELS["tied"])
    checkpoint = read(path)
    other = dataclasses.replace(checkpoint, task_options={"_name": "masked_lm"})
    with pytest.raises(ExportError, match="'masked_lm'; only models of.*translation"):
        to_fairseq.model_arguments(other)
    other = dataclasses.replace(checkpoint, options={"arch": "nobody_knows"})
    with pytest.raises(ExportError, match="no architecture 'nobody_knows'"):
        to_fairseq.model_arguments(other)


def test_dictionaries_of_another_size_are_told(data, tmp_path):
    path = made(data, tmp_path / "model.pt", MODELS["tied"])
    with pytest.raises(ExportError, match="dictionaries of 4 and 4 symbols.*size mismatch"):
        to_fairseq.stock_state(read(path), Dictionary(), Dictionary(), LANGS)


# the command


def run(capsys, *arguments):
    """Exit code and standard error."""
    code = command.main([str(a) for a in arguments])
    return code, capsys.readouterr().err


def test_averaging(data, tmp_path, capsys):
    paths = [made(data, tmp_path / name, MODELS["tied"], seed) for seed, name in enumerate("ab")]
    weights = [read(path).weights for path in paths]
    both, output = ":".join(map(str, paths)), tmp_path / "averaged.pt"
    assert run(capsys, "--path", both, "--average", "--output", output, "--no-verify")[0] == 0
    averaged = read(output).weights
    for name in ("encoder.embed_tokens.weight", "decoder.layers.0.fc1.bias"):
        mean = (weights[0][name] + weights[1][name]) / 2
        torch.testing.assert_close(averaged[name], mean)
    assert support.load(output)["last_optimizer_state"] is None
    absent = run(capsys, "--path", both + ":absent.pt", "--average", "--output", tmp_path / "no.pt")
    assert absent[0] == 1 and "absent.pt: no such checkpoint" in absent[1]
    several = run(capsys, "--path", both, "--output", tmp_path / "no.pt")
    assert several[0] == 1 and "names 2 checkpoints: --average" in several[1]
    assert not (tmp_path / "no.pt").exists()


def test_averaging_is_refused_before_all_are_read(data, tmp_path, capsys):
    """What CTranslate2 does not take is told of the first checkpoint: the second is not there."""
    paths = f"{made(data, tmp_path / 'lstm.pt', OTHERS['lstm'])}:absent.pt"
    arguments = ("--path", paths, "--average", "--output", tmp_path / "no", "--no-verify")
    code, error = run(capsys, *arguments, "--format", "ctranslate2")
    last = error.strip().split("\n")[-1]
    assert code == 1 and "'lstm'" in last and "absent.pt" not in last
    assert not (tmp_path / "no").exists()


def test_averaging_refuses_models_that_are_not_of_one_kind(data, tmp_path, capsys):
    """Weights of the same names and shapes, of which no mean makes sense."""
    one = made(data, tmp_path / "one.pt", TRANSFORMER)
    other = made(data, tmp_path / "other.pt", [*TRANSFORMER, "--encoder-attention-heads", 4])
    moved = tmp_path / "moved"
    shutil.copytree(str(data), str(moved))
    lines = (moved / "dict.bb.txt").read_text().splitlines()
    (moved / "dict.bb.txt").write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    elsewhere = made(moved, tmp_path / "elsewhere.pt", TRANSFORMER)
    for path, words in (
        (other, "encoder_attention_heads is 2 and 4"),
        (elsewhere, "their target dictionaries differ (34 and 34 symbols)"),
    ):
        arguments = ("--path", f"{one}:{path}", "--average", "--output", tmp_path / "no.pt")
        code, error = run(capsys, *arguments, "--no-verify")
        assert code == 1 and f"{one} and model {path} cannot be averaged: {words}" in error
    assert not (tmp_path / "no.pt").exists()


class Names(Format):
    """A format as somebody might add it: the names of the weights, in a text file."""

    name = "names"
    flags = {"--separator": dict(metavar="X", help="between two names")}

    def faults(self, options):
        return [f"--separator {x}" for x in [options.get("separator")] if x == "bad"]

    def write(self, model, output, options):
        output.write_text(options.get("separator", "\n").join(model.stock["model"]))

    def verify(self, model, output, options, proof):
        return Verdict([f"verified on {proof.text.sentences} sentences"], {})


def test_a_further_format_is_a_class_and_a_line(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(FORMATS, "names", Names())
    path, output = made(data, tmp_path / "model.pt", MODELS["tied"]), tmp_path / "names.txt"
    arguments = ("--path", path, "--output", output, "--separator", "|")
    code, error = run(capsys, *arguments)
    assert code == 1 and "--separator needs --format names" in error
    code, error = run(capsys, *arguments, "--format", "names", "--separator", "bad")
    assert code == 1 and error.endswith("fairseq-kd-export: --separator bad\n")
    assert run(capsys, *arguments, "--format", "names", "--verify-sentences", 4)[0] == 0
    assert output.read_text().split("|")[0] == "encoder.version"
    # and without the command
    asked = Asked([str(path)], str(output), "names", overwrite=True)
    exported, size, proved = make(asked)
    assert exported == f"exported {output}" and proved == "| verified on 24 sentences"
    assert size.endswith(f" without embeddings, {output.stat().st_size:,} bytes")
    with pytest.raises(ExportError, match="--format other: expected one of fairseq, ctranslate2"):
        make(asked._replace(format="other"))


def test_what_is_not_the_same_is_not_left_behind(data, tmp_path, monkeypatch, capsys):
    """Neither a new file nor a change of an old one."""
    path = made(data, tmp_path / "model.pt", MODELS["tied"])
    right = to_fairseq.stock_state

    def wrong(*arguments):
        stock = right(*arguments)
        stock["model"]["decoder.layers.0.fc1.bias"][0] += 3
        return stock

    monkeypatch.setattr(to_fairseq, "stock_state", wrong)
    output = tmp_path / "out" / "exported.pt"
    output.parent.mkdir()
    arguments = ("--path", path, "--output", output, "--verify-sentences", 4)
    code, error = run(capsys, *arguments)
    assert code == 1 and "differs from the checkpoint" in error
    assert not list(output.parent.iterdir())
    output.write_bytes(b"an earlier one")
    assert run(capsys, *arguments, "--overwrite")[0] == 1
    assert output.read_bytes() == b"an earlier one" and len(list(output.parent.iterdir())) == 1


def test_ctranslate2_that_scores_otherwise_is_not_left_behind(data, tmp_path, monkeypatch, capsys):
    pytest.importorskip("ctranslate2")
    path = made(data, tmp_path / "model.pt", MODELS["tied"])
    monkeypatch.setattr(
        to_ctranslate2, "compare_token_scores", lambda *arguments: (float("nan"), float("nan"))
    )
    arguments = ("--path", path, "--output", tmp_path / "ct2", "--format", "ctranslate2")
    code, error = run(capsys, *arguments)
    assert code == 1 and "scores are not fairseq's" in error
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]


def test_outputs_that_would_destroy_something_are_refused(data, tmp_path, capsys):
    path = made(data, tmp_path / "model.pt", MODELS["tied"])
    before = path.read_bytes()
    for output, more, words in (
        (path, (), "would overwrite"),
        (path, ("--overwrite",), "would overwrite"),
        (tmp_path, ("--overwrite", "--format", "ctranslate2"), "would overwrite"),
        (data, ("--overwrite", "--format", "ctranslate2"), "replaces only what"),
        (data, ("--overwrite",), "replaces only what"),
        (data, (), "already exists"),
        (tmp_path / "no" / "out.pt", (), "there is no folder"),
    ):
        code, error = run(capsys, "--path", path, "--output", output, *more, "--no-verify")
        assert code == 1 and words in error, error
    assert path.read_bytes() == before and (data / "valid.aa-bb.aa.idx").is_file()


def test_bad_input_is_one_clear_line(data, tmp_path, capsys):
    path = made(data, tmp_path / "model.pt", MODELS["tied"])
    lstm = made(data, tmp_path / "lstm.pt", OTHERS["lstm"])
    other = tmp_path / "other"
    other.mkdir()
    for lang in LANGS:
        (other / f"dict.{lang}.txt").write_text("w01 3\nw00 2\n")
    for arguments, words in (
        (("--path", path, "--gen-subset", "test"), "no subset 'test'"),
        (("--path", path, "--data", other), "is not the model's"),
        (("--path", path, "--data", tmp_path / "absent"), "absent: there is no such folder"),
        (("--path", path, "--quantization", "int8"), "--quantization needs --format ctranslate2"),
        (("--path", path, "--max-positions", 9), "--max-positions needs --format ctranslate2"),
        (("--path", path, "--spm", "absent"), "transformers; --spm absent: no such"),
        (("--path", path, "--beam", 0), "--beam must be"),
        (("--path", path, "--remove-bpe"), "--remove-bpe needs --format ctranslate2"),
        (("--path", path, "--bleu-tokenize", "zh"), "--bleu-tokenize needs --format ctranslate2"),
        (
            ("--path", path, "--format", "ctranslate2", "--bleu-tokenize", "no"),
            "--bleu-tokenize no: expected one of",
        ),
        (("--path", lstm, "--data", other, "--format", "ctranslate2"), "'lstm'"),
        (("--path", path, "--vocabulary-map", data), "--vocabulary-map needs --format ctranslate2"),
        (
            ("--path", path, "--map-candidates", 0, "--format", "ctranslate2"),
            "--map-candidates needs --vocabulary-map; --map-candidates must be 1 or more",
        ),
        (
            ("--path", path, "--vocabulary-map", "no", "absent", "--format", "ctranslate2"),
            "--vocabulary-map no: there is no such folder; --vocabulary-map absent: there is no",
        ),
    ):
        code, error = run(capsys, *arguments, "--output", tmp_path / "out")
        assert code == 1, error
        assert words in error.strip().split("\n")[-1], error
        assert error.strip().split("\n")[-1].startswith("fairseq-kd-export: ")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """The same data with a training set in which w00 to w09 alone are translations."""
    folder = tmp_path_factory.mktemp("trained")
    for file in data.iterdir():
        shutil.copy(str(file), str(folder))
    dictionary = DataBin(str(data), *LANGS).source
    for lang, words in zip(LANGS, (30, 10)):
        writer = databin.Writer(folder / "train.{}-{}.{}".format(*LANGS, lang), len(dictionary))
        for i in range(60):
            sentence = f"w{i % words:02d} w{(i + 1) % words:02d}"
            writer.add(databin.encode(dictionary, sentence))
        writer.close()
    return folder


def test_a_vocabulary_map(data, trained, tmp_path, capsys, monkeypatch):
    """Translations choose among its symbols; with all symbols in it, they are what they were."""
    ctranslate2 = pytest.importorskip("ctranslate2")
    path, output = made(data, tmp_path / "model.pt", MODELS["tied"]), tmp_path / "out"
    flags = ("--path", path, "--output", output, "--format", "ctranslate2", "--beam", 2)
    mapped = (*flags, "--overwrite", "--vocabulary-map", trained, "--map-candidates")
    assert run(capsys, *flags)[0] == 0
    assert "use_vmap" not in (output / "README.md").read_text()
    assert command.main([*map(str, mapped), "2"]) == 0
    printed = capsys.readouterr().out
    assert "is with the vocabulary map; without it" in printed
    translator = ctranslate2.Translator(str(output))

    def translated(word):
        how = {"use_vmap": True, "max_decoding_length": 8}
        return set(translator.translate_batch([[word]], **how)[0].hypotheses[0])

    always = {"<s>", "<unk>", *(f"w{i:02d}" for i in range(10))}
    for i in range(10, 30):
        assert translated(f"w{i}") <= {*always, f"w{i}"}
    assert ", beam_size=5, use_vmap=True)" in (output / "README.md").read_text()
    record = read_json(output / "kd_export.json")
    assert record["vocabulary_map"]["data"] == [str(trained)]
    assert record["vocabulary_map"]["candidates"] == 2
    for symbols in (range(5, 6), range(30)):
        found = VocabularyMap([f"w{i:02d}" for i in symbols], {})
        monkeypatch.setattr(to_ctranslate2, "vocabulary_map", lambda *_, found=found: found)
        assert run(capsys, *mapped, 2)[0] == 0
        figures = read_json(output / "kd_export.json")["verification"]
        same = figures["same_without_map"] == figures["sentences"]
        assert same is (len(symbols) == 30)
    assert figures["bleu_without_map"] == figures["bleu"]


def test_a_vocabulary_map_of_other_data_is_refused(data, trained, tmp_path, capsys):
    """And an older output stays."""
    pytest.importorskip("ctranslate2")
    path, output = made(data, tmp_path / "model.pt", MODELS["tied"]), tmp_path / "out"
    flags = ("--path", path, "--output", output, "--format", "ctranslate2", "--no-verify")
    assert run(capsys, *flags)[0] == 0
    before = support.tree(output)
    other, cut = tmp_path / "other", tmp_path / "cut"
    for folder in (other, cut):
        shutil.copytree(str(trained), str(folder))
    (other / "dict.bb.txt").write_text("w01 3\nw00 2\n")
    (cut / "train.aa-bb.bb.bin").write_bytes(b"")
    for folder, words in (
        (other, "dict.bb.txt in .*other .6 symbols. is not the model's .34 symbols.; --voc"),
        (data, "the vocabulary map is made of train in aa and bb, which is not there"),
        (cut, "damaged or cut short"),
        (tmp_path, "expected a folder of fairseq-preprocess"),
    ):
        code, error = run(capsys, *flags, "--overwrite", "--vocabulary-map", folder)
        assert code == 1 and re.search(words, error.strip().split("\n")[-1]), error
        assert support.tree(output) == before
    assert {file.name for file in tmp_path.iterdir()} == {"model.pt", "out", "other", "cut"}


def test_nothing_to_verify_on(data, tmp_path, capsys):
    """Dictionaries beside the checkpoint are enough to export, but not to prove it."""
    path = made(data, tmp_path / "model.pt", MODELS["tied"])
    state = support.load(path)
    state["cfg"]["task"]["data"] = str(tmp_path / "gone")
    torch.save(state, str(path))
    code, error = run(capsys, "--path", path, "--output", tmp_path / "out.pt")
    assert code == 1 and "its dictionaries were not found; --data DIR" in error
    assert "TAKEN TO BE" not in error and "teacher" not in error
    for lang in LANGS:
        name = f"dict.{lang}.txt"
        (tmp_path / name).write_text((data / name).read_text())
    code, error = run(capsys, "--path", path, "--output", tmp_path / "out.pt")
    assert code == 1 and "names no existing data-bin. --data DIR names one; --no-verify" in error
    code, error = run(capsys, "--path", path, "--output", tmp_path / "out.pt", "--no-verify")
    assert code == 0 and "UNVERIFIED" in error


def test_languages_that_fairseq_train_was_not_told(data, tmp_path, capsys):
    path = made(data, tmp_path / "model.pt", MODELS["tied"])
    state = support.load(path)
    state["cfg"]["task"].update(source_lang=None, target_lang=None)
    torch.save(state, str(path))
    code, error = run(capsys, "--path", path, "--output", tmp_path / "out.pt", "--no-verify")
    assert code == 0, error
    assert read(tmp_path / "out.pt").languages == LANGS
    state["cfg"]["task"]["data"] = str(tmp_path / "gone")
    torch.save(state, str(path))
    code, error = run(capsys, "--path", path, "--output", tmp_path / "no.pt", "--no-verify")
    assert code == 1 and "names no languages" in error


@pytest.mark.parametrize("named", [False, True])
def test_an_export_under_other_names_of_the_languages(named, data, tmp_path, capsys):
    """It is verified on the model's data-bin, whose files have the names of its training."""
    path = made(data, tmp_path / "model.pt", MODELS["tied"])
    flags = ["-s", "x_X", "-t", "y_Y", *(["--data", data] if named else [])]
    code, error = run(capsys, "--path", path, "--output", tmp_path / "out.pt", *flags)
    assert code == 0 and "UNVERIFIED" not in error, error
    assert read(tmp_path / "out.pt").languages == ("x_X", "y_Y")


def test_a_score_that_is_no_number_is_the_largest_difference():
    assert to_fairseq.largest([0.5, 2.0, 1.0]) == 2
    assert math.isnan(to_fairseq.largest([0.0, math.nan, 1.0]))
