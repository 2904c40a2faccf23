"""A student leaves the plugin behind: it translates without it, and teaches."""

import json
import re
import subprocess
import sys

import pytest
import support
import torch
from support import LANGUAGES, distil, fairseq, hypotheses, script, train_plain
from toy import train_teacher

DECODING = ("--cpu", "--beam", 2, "--max-len-b", 10, "--required-batch-size-multiple", 1)
# it opens the file as stock fairseq does, and as carefully as this torch can
OPENING = """
import inspect, sys, torch
careful = {"weights_only": True} if "weights_only" in inspect.getsource(torch.load) else {}
state = torch.load(sys.argv[1], **careful)
assert "kd_plugin" not in sys.modules and "fairseq" not in sys.modules
print(sorted(state), state["cfg"]["task"])
"""


def exported(path, output, *more, tool=fairseq):
    return tool("fairseq-kd-export", "--path", path, "--output", output, *more)


HUB = """
import sys
from fairseq.models.transformer import TransformerModel
folder, data, sentence = sys.argv[1:]
model = TransformerModel.from_pretrained(folder, "student.pt", data)
assert "kd_plugin" not in sys.modules
print("found:", model.translate(sentence, max_len_b=10))
"""


def python(program, *arguments, **how):
    """What a program prints in a process that has nothing of ours."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        **how,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


OWN = """
import kd_plugin
from fairseq.models import register_model_architecture
from fairseq.models.transformer import tiny_architecture
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask

register_model_architecture("transformer", "own_transformer")(tiny_architecture)

@register_task("own_translation", dataclass=TranslationConfig)
class OwnTask(TranslationTask):
    pass
"""


def test_an_architecture_and_a_task_of_ones_own(data, tmp_path):
    """A folder that imports both: it trains, teaches, and is exported."""
    own = tmp_path / "own"
    own.mkdir()
    here = f"import sys\nsys.path.insert(0, {str(support.CHECKOUT)!r})\n"
    (own / "__init__.py").write_text(here + OWN)
    user_dir = ("--user-dir", own)
    more = (*user_dir, "--task", "own_translation", "--max-update", 60)
    arch = ("--arch", "own_transformer")
    train_plain(data, tmp_path / "teacher", *more, arch=arch).ok()
    teacher = tmp_path / "teacher" / "checkpoint_last.pt"
    distil(data, teacher, tmp_path / "student", *user_dir, "--max-update", 2).ok()
    output = tmp_path / "teacher.pt"
    run = exported(teacher, output, *user_dir, "--verify-sentences", 8).ok()
    assert f"verified in fairseq with --user-dir {own}: 8 sentences" in run.text
    message = exported(teacher, tmp_path / "no.pt").refusal
    assert "'own_translation'" in message and "--task translation says so" in message
    assert not (tmp_path / "no.pt").exists()
    # an architecture that only names a transformer's options needs no folder to be one
    run = exported(teacher, tmp_path / "plain.pt", "--task", "translation").ok()
    assert "no architecture 'own_transformer'; its options are a transformer's" in run.text
    assert "translated the same" in run.text


@pytest.fixture(scope="module")
def stock(distilled, tmp_path_factory):
    """The distilled student, by the installed command."""
    output = tmp_path_factory.mktemp("stock") / "student.pt"
    run = exported(distilled.checkpoint, output, "--verify-sentences", 16, tool=script).ok()
    assert re.search(r"16 sentences of valid translated the same \(beam 5\)", run.text)
    assert [file.name for file in output.parent.iterdir()] == ["student.pt"]
    return output


def test_nothing_of_the_teacher_is_left(stock, distilled):
    content = stock.read_bytes()
    for trace in (b"kd_", b"kd-", b"teacher", str(distilled.folder).encode()):
        assert trace not in content, trace
    assert stock.stat().st_size < distilled.checkpoint.stat().st_size / 2


def test_it_opens_in_a_process_without_the_plugin(stock):
    printed = python(OPENING, stock, cwd=str(stock.parent))
    assert "'_name': 'translation'" in printed


def test_the_hub_interface_opens_it(stock, corpus):
    sentence = (corpus.text / ("test." + support.SOURCE)).read_text().splitlines()[0]
    assert "found: b" in python(HUB, stock.parent, corpus.data, sentence, cwd=str(stock.parent))


def test_it_translates_in_stock_fairseq(stock, distilled, data):
    run = fairseq("fairseq-generate", data, "--path", stock, *DECODING).ok()
    own = fairseq(
        "fairseq-generate", data, *support.USER_DIR, "--path", distilled.checkpoint, *DECODING
    ).ok()
    scored = r"^[HP]-.*$"
    assert len(hypotheses(run.text)) == 16
    assert re.findall(scored, run.text, re.M) == re.findall(scored, own.text, re.M)


def test_its_vocabulary_can_be_verified_when_it_teaches(stock, data, tmp_path):
    """From its own symbol lists: the data folder that it names is gone."""
    state = support.load(stock)
    state["cfg"]["task"]["data"] = str(tmp_path / "gone")
    torch.save(state, str(tmp_path / "student.pt"))
    run = distil(data, tmp_path / "student.pt", tmp_path / "next", "--max-update", 2).ok()
    assert "dictionaries from its checkpoint" in run.text


def test_an_export_can_be_exported(stock, tmp_path):
    run = exported(stock, tmp_path / "again.pt", "--verify-sentences", 4).ok()
    assert "translated the same" in run.text
    first, again = support.load(stock), support.load(tmp_path / "again.pt")
    assert first["cfg"] == again["cfg"] and first["task_state"] == again["task_state"]
    support.assert_same_weights(stock, tmp_path / "again.pt")


@pytest.mark.parametrize("quantization", ["float32", "int8"])
def test_ctranslate2(quantization, distilled, corpus, tmp_path):
    """A folder that translates by its own README, and a record of how it compares."""
    ctranslate2 = pytest.importorskip("ctranslate2")
    output = tmp_path / "student"
    more = ("--format", "ctranslate2", "--quantization", quantization, "--beam", 2)
    run = exported(distilled.checkpoint, output, *more).ok()
    record = json.loads((output / "kd_export.json").read_text())
    found = record["verification"]
    assert record["quantization"] == quantization and record["sentencepiece"] is None
    assert record["ctranslate2"] == ctranslate2.__version__
    assert record["parameters"] > record["parameters_without_embeddings"] > 0
    assert (record["source_lang"], record["target_lang"]) == (support.SOURCE, support.TARGET)
    assert found["sentences"] == 48 and found["max_token_difference_float32"] < 1e-3
    # int8 kernels differ between processors: 1.04 was seen on one, below 1 on others
    assert found["max_token_difference"] < (1e-3 if quantization == "float32" else 1.5)
    assert found["mean_token_difference"] < (1e-4 if quantization == "float32" else 0.25)
    assert abs(found["bleu_drop"]) < (1 if quantization == "float32" else 10)
    assert f"drop {found['bleu_drop']:.2f}" in run.text

    readme = (output / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    sentence = (corpus.text / ("test." + support.SOURCE)).read_text().splitlines()[0]
    printed = python(snippet, cwd=str(output), input=sentence + "\n")
    assert re.fullmatch(r"(b\d\d ?)+", printed.strip())

    again = exported(distilled.checkpoint, output, *more)
    assert again.code == 1 and "already exists" in again.text
    exported(distilled.checkpoint, output, *more, "--overwrite", "--verify-sentences", 8).ok()
    assert json.loads((output / "kd_export.json").read_text())["verification"]["sentences"] == 8
    assert [file.name for file in tmp_path.iterdir()] == ["student"]


def test_ctranslate2_refuses_before_any_work(data, tmp_path):
    pytest.importorskip("ctranslate2")
    lstm = train_teacher(data, tmp_path / "lstm", support.ARCHITECTURES["lstm"], 2)
    run = exported(lstm, tmp_path / "out", "--format", "ctranslate2")
    assert run.code == 1 and "'lstm'" in run.text and "supported models are" in run.text
    assert "| INFO |" not in run.text and not (tmp_path / "out").exists()
    exported(lstm, tmp_path / "out.pt", "--verify-sentences", 4).ok()
    fairseq(
        *("fairseq-generate", data, "--path", tmp_path / "out.pt", *DECODING, *LANGUAGES),
    ).ok()
