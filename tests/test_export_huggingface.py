"""Folders for transformers say what fairseq says: scores, translations, tokens.

So do their ONNX files, in onnxruntime and on the page of docs/browser.
"""

import functools
import http.server
import json
import os
import random
import re
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import browser
import pytest
import subwords
import support
import torch
from fairseq.data import Dictionary
from test_export import LANGS, PRE_NORM, TRANSFORMER, made, read, run

from kd_plugin.decoding import databin
from kd_plugin.export import Asked, make
from kd_plugin.export import huggingface as to_huggingface
from kd_plugin.export.formats import RECORD, ExportError
from kd_plugin.files import FileError

WORDS = ("ein", "eine", "Hund", "Hunde", "läuft", "laufen", "Straße", "straßen", "über", "die", "²")
ALL = "--share-all-embeddings"
LEARNED = ["--layernorm-embedding", "--encoder-learned-pos", "--decoder-learned-pos"]
# Options of fairseq's, and the class that they make
CLASSES = {
    "post-norm": ([ALL], "MarianMTModel"),
    "learned positions": ([ALL, *LEARNED[1:], "--activation-fn", "gelu"], "MarianMTModel"),
    "untied": ([], "MarianMTModel"),
    "pre-norm": ([ALL, *PRE_NORM, "--no-scale-embedding"], "M2M100ForConditionalGeneration"),
    "BART": ([ALL, *LEARNED], "BartForConditionalGeneration"),
    "mBART": ([ALL, *LEARNED, *PRE_NORM], "MBartForConditionalGeneration"),
    "mBART with sinusoids": (
        [ALL, LEARNED[0], *PRE_NORM, "--activation-fn", "gelu_accurate"],
        "MBartForConditionalGeneration",
    ),
}


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("transformers")


def text(rng):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 8)))


@pytest.fixture(scope="module")
def bins(tmp_path_factory):
    """A data-bin with a joined dictionary, one with two, and the SentencePiece model of both.

    As with real data, the dictionaries lack pieces of the model.
    """
    folder, rng = tmp_path_factory.mktemp("bins"), random.Random(1)
    model = subwords.train([text(rng) for _ in range(200)], "bpe", 60)
    (folder / "spm.model").write_bytes(model)
    pieces = sorted(subwords.written(model))
    rng.shuffle(pieces)
    encoded = [subwords.encode(model, [text(rng) for _ in range(22)]) for _ in LANGS]
    for name, kept in (("joined", (pieces[3:], pieces[3:])), ("two", (pieces[3:], pieces[:-5]))):
        (folder / name).mkdir()
        for lang, symbols, lines in zip(LANGS, kept, encoded):
            dictionary = Dictionary()
            for symbol in symbols:
                dictionary.add_symbol(symbol)
            dictionary.save(str(folder / name / f"dict.{lang}.txt"))
            prefix = folder / name / "valid.{}-{}.{}".format(*LANGS, lang)
            databin.write(
                prefix, dictionary, (databin.encode(dictionary, " ".join(line)) for line in lines)
            )
    return folder


@pytest.fixture
def here(monkeypatch):
    """The program of the proof runs in this process, which has imported transformers already."""

    def there(command, cwd, env, **how):
        monkeypatch.setattr(sys, "argv", ["-c", *command[command.index("-c") + 2 :]])
        names = ("fairseq", "kd_plugin")
        modules = SimpleNamespace(modules=[], argv=sys.argv)
        program = command[command.index("-c") + 1].replace("import json, sys", "import json")
        assert all(name in program for name in names)
        exec(compile(program, "<proof>", "exec"), {"sys": modules})
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(to_huggingface.subprocess, "run", there)


def asked(bins, data, path, output, **more):
    options = {"spm": str(bins / "spm.model")}
    return Asked([str(path)], str(output), "transformers", options, data=str(bins / data), **more)


@pytest.mark.parametrize("name", CLASSES)
def test_what_it_says_is_what_fairseq_says(name, library, bins, here, tmp_path):
    flags, model = CLASSES[name]
    data = "joined" if ALL in flags else "two"
    path = made(bins / data, tmp_path / "model.pt", [*TRANSFORMER, *flags])
    # sentences of these mBARTs do not end, and beam search is compared where they do
    beam = 1 if "mBART" in name else 3
    lines = make(asked(bins, data, path, tmp_path / "out", beam=beam))
    found = json.loads((tmp_path / "out" / RECORD).read_text())["verification"]
    assert found["class"] == model and model in lines[2]
    assert found["max_token_difference"] < 1e-5
    assert found["sentences"] == found["same_greedy"] == 22
    assert found["same_beam"] == found["ended_beam"]


@pytest.mark.parametrize("limits", [(64, 40), (40, 64)])
def test_another_limit_on_each_side(limits, library, bins, here, tmp_path):
    """A table of positions there has one length; what generates and tokenises knows both."""
    path = made(bins / "joined", tmp_path / "model.pt", [*TRANSFORMER, ALL, *LEARNED])
    state = support.load(path)
    for side, module, limit in zip(("source", "target"), ("encoder", "decoder"), limits):
        vars(state["cfg"]["model"])[f"max_{side}_positions"] = limit
        table = f"{module}.embed_positions.weight"
        state["model"][table] = state["model"][table][: limit + 2]
    torch.save(state, str(path))
    make(asked(bins, "joined", path, tmp_path / "out", beam=2))
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["max_length"] == limits[1] - 1 + 2
    tokenizer = library.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert len(tokenizer("Hund " * 99, truncation=True)["input_ids"]) == limits[0]


ODD = [
    *("", " ", "  Hund \t die  ", "</s>", "<s> <unk> <pad>", ">>die<< Hund", "Hund >> die << über"),
    *("\ufb01ne Straße", "\u00a0Hund\u3000", "日本語 😀 Hund", "e\u0301 \u0308"),
    *("Hund\u200bdie", "\u2581"),
]


@pytest.mark.parametrize("data", ["joined", "two"])
def test_tokens_are_those_of_sentencepiece_and_the_dictionary(data, library, bins, tmp_path):
    path = made(bins / data, tmp_path / "model.pt", TRANSFORMER)
    make(asked(bins, data, path, tmp_path / "out", verify=False))
    tokenizer = library.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    rng = random.Random(2)
    letters = "".join(WORDS) + "  xyz.,-<>/"
    lines = [text(rng) for _ in range(500)]
    lines += ["".join(rng.choice(letters) for _ in range(20)) for _ in range(500)]
    # Marian's tokenizer takes ">>...<<" for the tag of a language
    lines += [line for line in ODD if data == "joined" or ">>" not in line]
    lines = [line for line in lines if data == "joined" or ">>" not in line]
    source, target = [Dictionary.load(str(bins / data / f"dict.{lang}.txt")) for lang in LANGS]
    encoded = subwords.encode((bins / "spm.model").read_bytes(), lines)
    expected = [databin.indices(source, " ".join(line)) for line in encoded]
    assert tokenizer(lines)["input_ids"] == expected
    assert sum(ids.count(source.unk()) for ids in expected) > 100
    ids = [databin.indices(target, "\u2581die \u2581Hund")]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == ["die Hund"]


@pytest.mark.parametrize(
    "flags, reasons",
    [
        (
            ["--encoder-normalize-before", "--adaptive-softmax-cutoff", "10"],
            ["--adaptive-softmax-cutoff", "given together", "M2M100 needs --share-all-embeddings"],
        ),
        ([ALL, *PRE_NORM, *LEARNED[1:]], ["learned positions needs --layernorm-embedding"]),
        ([*LEARNED], ["Bart needs --share-all-embeddings"]),
        ([ALL, "--no-token-positional-embeddings"], ["--no-token-positional-embeddings"]),
    ],
)
def test_what_fits_none_is_refused_by_name(flags, reasons, library, bins, tmp_path):
    path = made(bins / "joined", tmp_path / "model.pt", [*TRANSFORMER, *flags])
    with pytest.raises(ExportError, match="has no class for model") as told:
        to_huggingface.check(read(path))
    assert all(reason in str(told.value) for reason in reasons)


def test_other_architectures_and_weights_are_refused_by_name(library, bins, tmp_path):
    path = made(bins / "joined", tmp_path / "lstm.pt", support.ARCHITECTURES["lstm"])
    with pytest.raises(ExportError, match="'lstm' is none of fairseq's transformers"):
        to_huggingface.check(read(path))


def test_without_transformers(bins, tmp_path, monkeypatch, capsys):
    def missing(flag):
        raise FileError(f"{flag} needs transformers (no module): pip install")

    monkeypatch.setattr(to_huggingface, "open_library", missing)
    path = made(bins / "joined", tmp_path / "model.pt", [*TRANSFORMER, ALL])
    arguments = ("--path", path, "--output", tmp_path / "out", "--format", "transformers")
    code, error = run(capsys, *arguments, "--spm", bins / "spm.model")
    assert code == 1 and "--format transformers needs transformers" in error
    code, error = run(capsys, *arguments)
    assert code == 1 and "--format transformers needs --spm" in error
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]


def test_symbols_that_occur_twice(library, bins, tmp_path):
    path = made(bins / "joined", tmp_path / "model.pt", [*TRANSFORMER, ALL])
    symbols = ["<s>", "<pad>", "</s>", "<unk>", "a", "b", "a"]
    model = SimpleNamespace(
        stock={"task_state": {"source_symbols": symbols, "target_symbols": symbols[:-1]}},
        checkpoint=read(path),
    )
    with pytest.raises(ExportError, match=r"its source dictionary holds 1 symbols more.*'a'"):
        to_huggingface.symbols(model)


def test_what_is_not_the_same_is_not_left_behind(library, bins, here, tmp_path, monkeypatch):
    """And an older output stays, until a good one replaces it."""
    path = made(bins / "joined", tmp_path / "model.pt", [*TRANSFORMER, ALL])
    wanted = asked(bins, "joined", path, tmp_path / "out", beam=1)
    make(wanted)
    before = support.tree(tmp_path / "out")
    settings = to_huggingface._settings
    with monkeypatch.context() as patch:
        patch.setattr(
            to_huggingface, "_settings", lambda *a: {**settings(*a), "scale_embedding": False}
        )
        with pytest.raises(ExportError, match="says: tokens' scores differ by up to"):
            make(wanted._replace(overwrite=True))
    other = tmp_path / "other.model"
    rng = random.Random(3)
    other.write_bytes(subwords.train([text(rng) for _ in range(200)], "char", 60))
    with pytest.raises(ExportError, match="not the model that they were made with"):
        make(wanted._replace(overwrite=True, options={"spm": str(other)}))
    assert support.tree(tmp_path / "out") == before
    make(wanted._replace(overwrite=True, verify=False))
    assert "nothing was measured" in (tmp_path / "out" / "README.md").read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.pt", "other.model", "out"]


def test_half_precision_stays_half(library, bins, here, tmp_path):
    path = made(bins / "joined", tmp_path / "model.pt", [*TRANSFORMER, ALL])
    state = support.load(path)
    state["model"] = {name: weight.half() for name, weight in state["model"].items()}
    torch.save(state, str(path))
    make(asked(bins, "joined", path, tmp_path / "out", beam=1))
    from safetensors.torch import load_file

    weights = load_file(str(tmp_path / "out" / "model.safetensors"))
    assert {weight.dtype for weight in weights.values()} == {torch.float16}


def test_the_card(library, bins, tmp_path, monkeypatch, capsys):
    """What the README says, of a folder that a process of transformers alone has verified."""
    path = made(bins / "joined", tmp_path / "model.pt", [*TRANSFORMER, ALL, *PRE_NORM])
    lines = make(asked(bins, "joined", path, tmp_path / "out", beam=2))
    assert lines[3].startswith("| the same translations of 22 by greedy search, of ")
    card = (tmp_path / "out" / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "`model.pt`, SHA-256" in card and "7 updates" in card and "of 22 translations" in card
    monkeypatch.chdir(tmp_path / "out")
    monkeypatch.setattr("builtins.input", lambda: "ein Hund läuft über die Straße")
    exec(snippet, {})
    assert len(capsys.readouterr().out.splitlines()) == 1
    found = json.loads((tmp_path / "out" / RECORD).read_text())
    assert found["format"] == "transformers" and found["verification"]["beam"] == 2


# ONNX, and the page that translates with it

PAGE = Path(__file__).parent.parent / "docs" / "browser"
STATE = """new Promise((done) => setInterval(() => {
    const state = document.querySelector("#state").textContent;
    if (state === "ready" || /expected|seconds/.test(state)) done(state);
}, 20))"""
SUBMIT = """(text) => {
    document.querySelector("#text").value = text;
    document.querySelector("form").requestSubmit();
}"""


@pytest.fixture(scope="module", params=["post-norm", "untied", "pre-norm", "BART", "mBART"])
def onnx(request, library, bins, tmp_path_factory):
    """The folder for transformers, and what the command in the guide makes of it."""
    pytest.importorskip("optimum.onnxruntime")
    from optimum.commands import optimum_cli

    tmp_path = tmp_path_factory.mktemp("onnx")
    flags, _ = CLASSES[request.param]
    data = "joined" if ALL in flags else "two"
    path = made(bins / data, tmp_path / "model.pt", [*TRANSFORMER, *flags])
    make(asked(bins, data, path, tmp_path / "hf", verify=False))
    command = "optimum-cli export onnx --task text2text-generation-with-past --model".split()
    with mock.patch.object(
        sys, "argv", [*command, *map(str, (tmp_path / "hf", tmp_path / "onnx"))]
    ):
        optimum_cli.main()
    return tmp_path / "hf", tmp_path / "onnx"


def by_transformers(library, folder, texts):
    """Translations by greedy search, and scores of what follows the begin in each of them."""
    tokenizer = library.AutoTokenizer.from_pretrained(str(folder))
    model = library.AutoModelForSeq2SeqLM.from_pretrained(str(folder)).eval()
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    written = model.generate(**inputs, num_beams=1, early_stopping=False, do_sample=False)
    return tokenizer.batch_decode(written, skip_special_tokens=True), written, model


@torch.no_grad()
def test_onnx_says_the_same(onnx, library):
    from optimum.onnxruntime import ORTModelForSeq2SeqLM

    there, files = onnx
    rng = random.Random(4)
    texts = [text(rng) for _ in range(8)]
    expected, written, model = by_transformers(library, there, texts)
    session = ORTModelForSeq2SeqLM.from_pretrained(str(files))
    tokenizer = library.AutoTokenizer.from_pretrained(str(files))
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    own = session.generate(**inputs, num_beams=1, early_stopping=False)
    assert tokenizer.batch_decode(own, skip_special_tokens=True) == expected
    before = written[:, :-1]
    scores, others = [
        one(**inputs, decoder_input_ids=before, use_cache=False).logits.log_softmax(-1)
        for one in (model, session)
    ]
    chosen = written[:, 1:].unsqueeze(-1)
    real = written[:, 1:].ne(model.config.pad_token_id)
    difference = (scores - others).gather(-1, chosen)[..., 0][real].abs().max()
    assert difference < 1e-4


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """What opens the page in a browser, and the folder that it comes from."""
    if browser.found() is None:
        pytest.skip("no Chromium")
    site = tmp_path_factory.mktemp("site")
    for file in PAGE.iterdir():
        shutil.copy(str(file), str(site))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def end_headers(self):
            self.send_header("Cache-Control", "no-store")
            super().end_headers()

    handler = functools.partial(Handler, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with browser.browser(tmp_path_factory.mktemp("profile")) as opened:
            address = f"http://127.0.0.1:{server.server_port}/index.html"
            yield lambda: opened.go(address) or opened, site
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "kind, more",
    [
        ("bpe", {}),
        ("unigram", {"byte_fallback": True}),
        ("unigram", {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}),
    ],
)
def test_the_pages_pieces_are_those_of_sentencepiece(kind, more, page):
    show, _ = page
    rng = random.Random(5)
    model = subwords.train([text(rng) for _ in range(300)], kind, 320, **more)
    letters = "".join(WORDS) + "   xyz.,-<>/\u2581\u00a0\u0301\ufb01\u3000\u200b日½Ａ"
    lines = [text(rng) for _ in range(100)] + ODD
    lines += ["".join(rng.choice(letters) for _ in range(20)) for _ in range(300)]
    found = show().value(
        f"""import("./translator.mjs").then(({{ SentencePiece }}) => {{
            const model = new SentencePiece(new Uint8Array({list(model)}));
            return {json.dumps(lines)}.map((line) => model.encode(line));
        }})"""
    )
    assert found == subwords.encode(model, lines)


def test_the_page_joins_bytes_to_characters(page):
    show, _ = page
    symbols = ["\u2581a", "<0xE2>", "<0x82>", "<0xAC>", "b", "<0x41>", "\u2581", "</s>"]
    found = show().value(
        f"""import("./translator.mjs").then(({{ Translator }}) => {{
            const own = {{ symbols: {json.dumps(symbols)}, special: new Set(["</s>"]) }};
            return Translator.prototype.decode.call(own, [0, 1, 2, 3, 4, 5, 6, 0, 7]);
        }})"""
    )
    assert found == "a\u20acbA  a"


def test_the_page_says_what_is_missing(page):
    show, site = page
    shutil.rmtree(str(site / "onnxruntime"), ignore_errors=True)
    told = show().value(STATE)
    assert told.startswith("expected onnxruntime-web in the folder onnxruntime")
    (site / "onnxruntime").mkdir()
    (site / "onnxruntime" / "ort.wasm.bundle.min.mjs").write_text("export const env = {wasm: {}};")
    shutil.rmtree(str(site / "model"), ignore_errors=True)
    assert show().value(STATE).startswith("expected the file config.json in http:")


def test_the_page_translates_as_transformers_do(onnx, page, library):
    """With the build of onnxruntime-web in the folder that KD_ONNXRUNTIME_WEB names."""
    build = os.environ.get("KD_ONNXRUNTIME_WEB")
    if not build:
        pytest.skip("no onnxruntime-web")
    show, site = page
    there, files = onnx
    for name, folder in (("onnxruntime", build), ("model", files)):
        shutil.rmtree(str(site / name), ignore_errors=True)
        shutil.copytree(str(folder), str(site / name))
    rng = random.Random(6)
    texts = [text(rng) for _ in range(4)]
    expected, _, _ = by_transformers(library, there, texts)
    opened = show()
    assert opened.value(STATE) == "ready"
    opened.value(f"({SUBMIT})({json.dumps(chr(10).join(texts))})")
    assert opened.value(STATE).endswith(" seconds")
    assert opened.value('document.querySelector("#translation").value').split("\n") == expected
