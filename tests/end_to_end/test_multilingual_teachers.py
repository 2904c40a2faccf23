"""A teacher from stock fairseq's multilingual training, online, in a cache and in the benchmark."""

import json
import math

import numpy as np
import pytest
import torch
from support import (
    LANGUAGES,
    SOURCE,
    TARGET,
    TRAINING,
    distil,
    fairseq,
    kd_arguments,
    load,
    transformer,
    write_cache,
)
from toy import changed

from kd_plugin import benchmark
from kd_plugin.commands import benchmark as command

SYMBOLS = 24  # 20 words and fairseq's special symbols
TAGS = {
    "before_source": [f"__{TARGET}__"],
    "after_source": ["</s>"],
    "before_target": ["</s>", f"__{TARGET}__"],
}
UPDATES = ("--max-update", 12)


@pytest.fixture(scope="module")
def tagged(data, tmp_path_factory):
    """Of three languages, one of them in no data; knows a little."""
    folder = tmp_path_factory.mktemp("tagged")
    assert TRAINING[-len(LANGUAGES) :] == LANGUAGES  # which would have it decode one direction
    fairseq(
        "fairseq-train",
        *(data, "--task", "translation_multi_simple_epoch", *TRAINING[: -len(LANGUAGES)]),
        *("--lang-pairs", f"{SOURCE}-{TARGET}", "--langs", f"{TARGET},cc,{SOURCE}"),
        *("--encoder-langtok", "tgt", "--decoder-langtok", *transformer(32)),
        *("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", 0.1),
        *("--save-dir", folder, "--max-update", 100),
    ).ok()
    return folder / "checkpoint_last.pt"


def by_stock(data, teacher):
    """Log-probabilities of the student's symbols for each target token of valid, sentence by
    sentence, and the reference's in nats: by stock fairseq's task, in float64."""
    from fairseq import checkpoint_utils

    import kd_plugin  # noqa: F401  lets torch open fairseq's checkpoints

    overrides = {"data": str(data), "source_lang": SOURCE, "target_lang": TARGET}
    models, _, task = checkpoint_utils.load_model_ensemble_and_task([str(teacher)], overrides)
    model = models[0].double().eval()
    task.load_dataset("valid")
    dataset, rows, nll = task.dataset("valid"), [], []
    for i in range(len(dataset)):
        batch = dataset.collater([dataset[i]])
        with torch.no_grad():
            logits = model(**batch["net_input"])[0][0][1:, :SYMBOLS]  # the first is the tag's
        rows.append(torch.log_softmax(logits, -1).numpy())
        target = batch["target"][0].numpy()[1:]
        nll.append(-rows[-1][np.arange(len(target)), target])
    return rows, nll


@pytest.fixture(scope="module")
def cached(data, tagged, tmp_path_factory):
    """All symbols of train and valid."""
    folder = tmp_path_factory.mktemp("cache")
    write_cache(data, tagged, folder, "--top-k", SYMBOLS, "--batch-size", 16).ok()
    return folder


def test_a_cache_holds_what_stock_fairseq_says(data, tagged, cached):
    manifest = json.loads((cached / "valid" / "manifest.json").read_text())
    assert manifest["teachers"][0]["tags"] == TAGS
    rows, nll = by_stock(data, tagged)

    def array(name, dtype, *shape):
        return np.fromfile(str(cached / "valid" / (name + ".bin")), dtype).reshape(*shape)

    symbols = array("symbols", "<u2", -1, SYMBOLS).astype(int)
    expected = np.take_along_axis(np.concatenate(rows), symbols, -1)
    found = array("log_probs", "<f2", -1, SYMBOLS)
    np.testing.assert_allclose(found, expected, rtol=6e-4, atol=2e-5)
    found = -array("reference", "<f2", -1)
    np.testing.assert_allclose(found, np.concatenate(nll), rtol=6e-4, atol=2e-5)


def test_online_and_from_a_cache(data, tagged, cached, tmp_path):
    online = distil(data, tagged, tmp_path / "online", *UPDATES, "--report-accuracy").ok()
    tags = f"reads __{TARGET}__ ... </s>, writes after </s> __{TARGET}__"
    assert tags in online.text
    _, nll = by_stock(data, tagged)
    bits = float(np.concatenate(nll).mean()) / math.log(2)
    found = online.records("valid")[-1]["valid_teacher_nll_loss"]
    assert found == pytest.approx(bits, abs=0.0011)
    more = ("--teacher-cache", cached, *UPDATES, "--report-accuracy")
    again = distil(data, None, tmp_path / "cached", *more).ok()
    for key in ("loss", "kd_loss", "teacher_nll_loss"):
        expected = online.series("train_inner", key)
        assert again.series("train_inner", key) == pytest.approx(expected, abs=0.0021), key


def test_a_cache_of_other_tags_is_another(data, tagged, cached, tmp_path):
    more = ("--top-k", SYMBOLS, "--batch-size", 16, "--teacher-source-prefix", "__cc__")
    run = write_cache(data, tagged, cached, *more)
    assert run.code == 1 and "teachers" in run.text and "choose another --cache" in run.text
    other = tmp_path / "other"
    write_cache(data, tagged, other, *more, "--gen-subset", "valid").ok()
    told = json.loads((other / "valid" / "manifest.json").read_text())["teachers"][0]["tags"]
    assert told == {**TAGS, "before_source": ["__cc__"]}
    (other / "train").symlink_to(cached / "train")
    run = distil(data, None, tmp_path / "student", "--teacher-cache", other, *UPDATES)
    assert "were not made with the same teachers" in run.error


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ("--teacher-target-prefix", "", "--teacher-langs", "aa"),
            ["--teacher-target-prefix: expected one", "--teacher-langs: expected two languages"],
        ),
        (("--teacher-source-prefix", f"__{TARGET}_"), ["lacks the tag", f"'__{TARGET}__'"]),
        (("--teacher-tags", "nllb"), ["no tags of nllb", "deu_Latn", "--teacher-langs"]),
        (("--teacher-langs", "dd,bb"), ["dd is none of the languages", "(bb, cc, aa)"]),
        (
            ("--teacher-overrides", "{'max_source_positions': 21}"),
            ["up to 21 source", "at most 20 source and 1023 target tokens beside its tags"],
        ),
        (("--teacher-user-dir", "nowhere"), ["--teacher-user-dir: no such folder"]),
    ],
)
def test_what_is_refused_before_the_first_update(flags, words, data, tagged, tmp_path):
    run = distil(data, tagged, tmp_path / "student", *UPDATES, *flags)
    for word in words:
        assert word in run.error, word
    assert not list(tmp_path.rglob("*.pt"))


def test_the_benchmark_times_it(data, tagged, tmp_path):
    arguments = map(str, kd_arguments(data, tagged, tmp_path / "student"))
    steps = benchmark.Steps(command._configuration([*arguments]), batches=1)
    works = steps.works(["teacher forward", "distilled step", "teacher's validation", "caching"])
    for work in works.values():
        work()  # and does not stumble over targets shorter than what the decoder reads


REGISTERS = """
import pathlib
from fairseq.models import register_model_architecture
from fairseq.models.transformer import base_architecture

pathlib.Path(__file__).with_name("imported").touch()

@register_model_architecture("transformer", "transformer_of_theirs")
def theirs(args):
    args.activation_fn = "relu"
    base_architecture(args)
"""


def test_an_architecture_that_somebodys_folder_registers(data, teacher, tmp_path):
    """Whose options do not tell that it is a transformer; nothing runs unless it is asked for."""

    def theirs(state):
        cfg = state["cfg"]["model"]
        cfg._name = cfg.arch = "transformer_of_theirs"
        del cfg.activation_fn

    path = changed(teacher, tmp_path / "theirs" / "teacher.pt", theirs)
    folder = tmp_path / "their_folder"
    folder.mkdir()
    (folder / "__init__.py").write_text(REGISTERS)
    run = distil(data, path, tmp_path / "student", *UPDATES)
    for word in ("no architecture 'transformer_of_theirs'", "--teacher-user-dir"):
        assert word in run.error, word
    assert not (folder / "imported").exists()
    run = distil(data, path, tmp_path / "student", *UPDATES, "--teacher-user-dir", folder).ok()
    assert (folder / "imported").exists()
    expected = distil(data, teacher, tmp_path / "same", *UPDATES).ok()
    key = "valid_teacher_nll_loss"
    assert run.records("valid")[-1][key] == expected.records("valid")[-1][key]
    assert "activation_fn" in vars(load(teacher)["cfg"]["model"])
