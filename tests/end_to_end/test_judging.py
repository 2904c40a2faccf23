"""fairseq-kd-report: two models and an exported one, from decoding to the page."""

import json
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import sacrebleu
import support
from support import LANGUAGES, USER_DIR, fairseq, start, transformer, tree
from toy import binarise, permuted_dictionaries, train_teacher

from kd_plugin.files import temporary

HOW = ("--cpu", "--beam", 3, "--repeats", 2, "--num-workers", 0, *LANGUAGES)


def judge(data, output, models, *more, tool=fairseq, **how):
    named = [f"{name}={path}" for name, path in models.items()]
    return tool(
        "fairseq-kd-report", data, *("--output", output, *HOW, *more), "--models", *named, **how
    )


def report_of(folder):
    return json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def int8(data, distilled, tmp_path_factory):
    pytest.importorskip("ctranslate2")
    folder = tmp_path_factory.mktemp("int8") / "model"
    fairseq(
        "fairseq-kd-export",
        *("--path", distilled.checkpoint, "--format", "ctranslate2", "--quantization", "int8"),
        *("--output", folder, "--data", data, "--no-verify", "--vocabulary-map", data),
    ).ok()
    return folder


class Judged(NamedTuple):
    folder: Path
    run: support.Run
    report: dict


@pytest.fixture(scope="module")
def judged(corpus, teacher, distilled, int8, tmp_path_factory) -> Judged:
    folder = tmp_path_factory.mktemp("judged") / "report"
    log = folder.parent / "train.log"
    log.write_text(distilled.run.text)
    run = judge(
        *(f"{corpus.data}/", folder),
        {"teacher": teacher, "student": distilled.checkpoint, "int8": int8},
        *("--greedy", "--reference", corpus.text / "test.bb", "--logs", f"student={log}"),
        spawns=True,
    ).ok()
    return Judged(folder, run, report_of(folder))


def test_what_is_written(judged):
    names = {name for name in tree(judged.folder) if not name.startswith(("measured", "trans"))}
    assert names == {
        *("report.json", "report.md", "report.html", "settings.json"),
        *("quality-speed.png", "curves-nll_loss.png", "curves-kd_loss.png", "curves-agreement.png"),
        *(f"differences-{kind}.png" for kind in ("frequency", "position", "length", "entropy")),
    }
    systems = [system["name"] for system in judged.report["systems"]]
    assert systems == [
        *("teacher", "teacher, greedy", "student", "student, greedy", "int8", "int8, greedy"),
    ]
    assert "| student, greedy |" in judged.run.text
    page = (judged.folder / "report.html").read_text(encoding="utf-8")
    for system in judged.report["systems"]:
        assert f"{system['scores']['BLEU']['score']:.2f}" in page


def test_translations_are_fairseq_generates_and_scores_sacrebleus(corpus, teacher, judged):
    references = (corpus.text / "test.bb").read_text().splitlines()
    for beam, file, name in (
        (3, "teacher.txt", "teacher"),
        (1, "teacher.greedy.txt", "teacher, greedy"),
    ):
        run = fairseq(
            "fairseq-generate",
            *(corpus.data, *USER_DIR, "--path", teacher, "--cpu", "--beam", beam, *LANGUAGES),
        ).ok()
        lines = (judged.folder / "translations" / file).read_text().splitlines()
        assert lines == support.hypotheses(run.text) and len(lines) == len(references) == 16
        (system,) = [s for s in judged.report["systems"] if s["name"] == name]
        for metric, score in (
            ("BLEU", sacrebleu.corpus_bleu(lines, [references])),
            ("chrF2", sacrebleu.corpus_chrf(lines, [references])),
            ("TER", sacrebleu.corpus_ter(lines, [references])),
        ):
            assert system["scores"][metric]["score"] == pytest.approx(score.score)


def test_the_length_on_train_is_that_of_the_same_translations(corpus, teacher, tmp_path):
    """Of a training set that is the test set, all of it and a part."""
    data = tmp_path / "data"
    shutil.copytree(str(corpus.data), str(data))
    for path in data.glob("test.*"):
        shutil.copy(str(path), str(data / path.name.replace("test", "train", 1)))

    def lengths(*more):
        models = {"teacher": teacher}
        judge(data, tmp_path / "r", models, "--greedy", "--repeats", 1, *more).ok()
        systems = report_of(tmp_path / "r")["systems"]
        assert systems[1]["length_ratio_on_train"] is None  # greedy
        return systems[0]["length_ratio"], systems[0]["length_ratio_on_train"]

    of_test, of_train = lengths()
    assert of_test == of_train
    assert lengths("--train-sample", 3) not in [(of_test, of_test), (of_test, None)]
    assert lengths("--train-sample", 0) == (of_test, None)


def test_costs_and_sizes(judged, teacher, distilled, int8):
    models = {model["name"]: model for model in judged.report["models"]}
    weights = support.load(distilled.checkpoint)["model"]
    # input and output embeddings of the decoder are one
    expected = sum(
        tensor.numel()
        for name, tensor in support.used_weights(distilled.checkpoint).items()
        if name != "decoder.output_projection.weight"
    )
    tables = weights["encoder.embed_tokens.weight"].numel()
    tables += weights["decoder.embed_tokens.weight"].numel()
    assert models["student"]["parameters"] == models["int8"]["parameters"] == expected
    assert models["student"]["parameters_without_embeddings"] == expected - tables
    assert models["student"]["bytes"] == 4 * expected < models["student"]["file_bytes"]
    assert models["int8"]["bytes"] == (int8 / "model.bin").stat().st_size
    assert models["int8"]["file_bytes"] == sum(f.stat().st_size for f in int8.iterdir())
    assert models["int8"]["precision"] == "int8"
    assert [name for name, model in models.items() if model["vocabulary_map"]] == ["int8"]
    assert "| ctranslate2; int8, vocabulary map |" in (judged.folder / "report.md").read_text()
    for system in judged.report["systems"]:
        assert len(system["seconds"]) == 2 and system["left_out"] == 0
        speeds = sorted(16 / seconds for seconds in system["seconds"])
        assert system["sentences_per_second"]["median"] == pytest.approx(sum(speeds) / 2)
    teacher_row = judged.report["systems"][0]
    for system in judged.report["systems"]:
        for key, of in (
            ("speedup", lambda row: row["sentences_per_second"]["median"]),
            ("kept", lambda row: row["scores"]["BLEU"]["score"]),
        ):
            assert system[key] == pytest.approx(of(system) / of(teacher_row))
    assert all(model["peak_memory_bytes"] > 0 for model in models.values())


def test_the_student_is_compared_as_training_did(judged, corpus, teacher, distilled):
    assert set(judged.report["differences"]) == {"student"}
    assert "CTranslate2" in judged.report["not_compared"]["int8"]
    found = judged.report["differences"]["student"]
    options = ("--teacher-checkpoint-path", teacher, "--valid-subset", "test")
    valid = support.validate(corpus.data, distilled.checkpoint, *options).ok().metrics("test")
    assert found["all"]["kl"] == pytest.approx(valid["kd_loss"], abs=1e-3)
    assert found["all"]["nll"] == pytest.approx(valid["nll_loss"], abs=1e-3)
    assert found["all"]["teacher_nll"] == pytest.approx(valid["teacher_nll_loss"], abs=1e-3)
    assert found["all"]["agreement"] == pytest.approx(valid["agreement"], abs=1e-3)
    train = (corpus.text / "train.bb").read_text().split()
    words = (corpus.text / "test.bb").read_text().split()
    frequencies = {bucket["label"]: bucket["tokens"] for bucket in found["by"]["frequency"]}
    assert frequencies.pop("end of sentence") == 16
    assert len(frequencies) > 1
    for label, (low, high) in {"10 to 99": (10, 100), "100 to 999": (100, 1000)}.items():
        expected = sum(low <= train.count(word) < high for word in words)
        assert frequencies.get(label, 0) == expected
    for kind in found["by"].values():
        assert sum(bucket["tokens"] for bucket in kind) == found["all"]["tokens"]
    worst = found["farthest"][0]
    for who in ("teacher", "student"):
        lines = (judged.folder / "translations" / (who + ".txt")).read_text().splitlines()
        assert worst[who] == lines[worst["number"] - 1]
    assert worst["tokens"][-1]["symbol"] == "</s>"
    assert [t["symbol"] for t in worst["tokens"][:-1]] == worst["reference"].split()
    assert worst["kl"] == max(sentence["kl"] for sentence in found["farthest"])
    curve = judged.report["curves"]["student"]
    assert len(curve["train"]["kd_loss"]) == 60 and curve["valid"]["agreement"]


def test_the_same_again_decodes_nothing(corpus, judged):
    before = tree(judged.folder)
    models = {model["name"]: model["path"] for model in judged.report["models"]}
    assert "opening teacher" in judged.run.text
    log = judged.folder.parent / "train.log"
    again = judge(
        *(corpus.data, judged.folder, models, "--greedy"),
        *("--reference", corpus.text / "test.bb", "--logs", f"student={log}"),
    ).ok()
    assert "opening" not in again.text
    assert tree(judged.folder) == before


def test_scores_from_elsewhere(corpus, judged, tmp_path):
    """Texts go out, their scores come back; nothing is decoded for it."""
    output, texts = tmp_path / "r", tmp_path / "texts"
    shutil.copytree(str(judged.folder), str(output))
    models = {model["name"]: model["path"] for model in judged.report["models"]}
    lines, means = [], {}
    for path in sorted((output / "translations").iterdir()):
        words = [len(line.split()) for line in path.read_text().splitlines()]
        lines += [f"{texts / path.name}\tSegment {i}\tscore: {n}" for i, n in enumerate(words)]
        means[path.name] = sum(words) / len(words)
    (tmp_path / "words.tsv").write_text("\n".join(lines))
    again = judge(
        *(corpus.data, output, models, "--greedy", "--reference", corpus.text / "test.bb"),
        *("--scores", f"words:{tmp_path / 'words.tsv'}", "--write-for-scoring", texts),
    ).ok()
    assert "opening" not in again.text
    assert f"comet-score -s {texts}/src.txt -t {texts}/teacher.txt " in again.text
    for name in ("src", "ref"):
        side = corpus.text / f"test.{'aa' if name == 'src' else 'bb'}"
        assert (texts / f"{name}.txt").read_text() == side.read_text()
    for name, mean in means.items():
        assert (texts / name).read_bytes() == (output / "translations" / name).read_bytes()
        (system,) = [s for s in report_of(output)["systems"] if s["file"] + ".txt" == name]
        assert system["scores"]["words"]["score"] == pytest.approx(mean)
    found = report_of(output)["examples"]
    measures = {order["measure"] for order in found["orders"]}
    assert measures == {None, "chrF2", "words"} and len(found["rows"]) == 16


def test_killed_and_run_again(data, teacher, distilled, tmp_path):
    models = {"teacher": teacher, "student": distilled.checkpoint}
    named = [f"{name}={path}" for name, path in models.items()]

    def arguments(repeats):
        return (data, "--output", tmp_path / "r", *HOW, "--repeats", repeats, "--models", *named)

    # it does not end by itself; its processes do when it is gone
    first = start("fairseq-kd-report", *arguments(10**6), spawns=True)
    while not list((tmp_path / "r").glob("measured/*/student.json")):
        assert first.process.is_alive(), first.text
        time.sleep(0.05)
    first.process.kill()
    first.finish()
    (measured,) = (tmp_path / "r").glob("measured/*/student.json")
    passes = len(json.loads(measured.read_text())["seconds"]["3"])
    run = fairseq("fairseq-kd-report", *arguments(passes + 2)).ok()
    report = report_of(tmp_path / "r")
    assert [len(system["seconds"]) for system in report["systems"]] == [passes + 2] * 2
    assert "several runs of the command" in report["notes"][0] and "opening student" in run.text


def test_killed_while_the_report_was_written(data, teacher, tmp_path):
    """The settings come last; what a file was called before it was whole is cleared away."""
    output, models = tmp_path / "r", {"teacher": teacher}
    judge(data, output, models).ok()
    translations = output / "translations" / "teacher.txt"
    whole = tree(output)
    for path in (output / "settings.json", translations):
        path.rename(temporary(path))
    run = judge(data, output, models).ok()
    assert "opening" not in run.text and tree(output).keys() == whole.keys()
    (output / "settings.json").unlink()
    (output / "letter.txt").write_text("dear")
    assert "did not write" in judge(data, output, models).refusal


def test_a_broken_model_stands_in_the_table(data, teacher, tmp_path):
    broken = tmp_path / "broken.pt"
    broken.write_bytes(teacher.read_bytes()[:5000])
    run = judge(data, tmp_path / "r", {"teacher": teacher, "broken": broken})
    assert "1 of 2 models failed (broken)" in run.refusal
    report = report_of(tmp_path / "r")
    assert report["systems"][0]["scores"] and report["systems"][1]["scores"] is None
    error = report["models"][1]["error"]
    assert error.startswith(f"student {broken}: cannot be read as a fairseq checkpoint")
    assert "broken failed: " in (tmp_path / "r" / "report.md").read_text()
    assert report["not_compared"] == {"broken": "it failed"}


def test_other_settings_and_other_folders(data, corpus, teacher, judged, tmp_path):
    output = tmp_path / "r"
    shutil.copytree(str(judged.folder), str(output))
    before = tree(output)
    message = judge(data, output, {"teacher": teacher}, "--lenpen", 2).refusal
    assert "generation: lenpen is 2" in message and "--overwrite" in message
    assert tree(output) == before
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"x")
    run = judge(data, output, {"teacher": broken}, "--lenpen", 2, "--overwrite")
    assert "broken.pt" in run.refusal
    kept = tree(output)
    assert {name: kept[name] for name in before} == before
    judge(data, output, {"teacher": teacher}, "--lenpen", 2, "--overwrite").ok()
    assert sorted(path.name for path in (output / "translations").iterdir()) == ["teacher.txt"]
    assert len(list((output / "measured").iterdir())) == 1
    assert [m["name"] for m in report_of(output)["models"]] == ["teacher"]
    assert not list(output.glob("curves*.png"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    message = judge(data, tmp_path / "mine", {"teacher": teacher}).refusal
    assert "did not write" in message
    assert tree(tmp_path / "mine") == {"letter.txt": b"dear"}


def test_a_vocabulary_of_its_own(corpus, teacher, judged, tmp_path):
    """Scores are on text: a model with other dictionaries is judged on a data-bin of its own."""
    options = permuted_dictionaries(corpus, tmp_path)
    test = ("--testpref", corpus.text / "test")
    other = binarise(corpus.text, tmp_path / "other", *options, *test)
    stranger = train_teacher(other, tmp_path / "stranger", transformer(16), 20)
    models = {"teacher": teacher, "stranger": stranger}
    run = judge(corpus.data, tmp_path / "r", models)
    assert "1 of 2 models failed (stranger)" in run.refusal
    error = report_of(tmp_path / "r")["models"][1]["error"]
    assert error.startswith(f"student {stranger}: its source dictionary")
    assert "--model-data NAME=DIR" in error and "teacher" not in error
    judge(corpus.data, tmp_path / "r", models, "--model-data", f"stranger={other}").ok()
    report = report_of(tmp_path / "r")
    assert report["systems"][1]["scores"] and report["models"][1]["error"] is None
    assert report["not_compared"]["stranger"] == "it has a vocabulary of its own"


def test_wrong_input(data, corpus, teacher, tmp_path):
    models = {"teacher": teacher}
    (tmp_path / "short").write_text("one line\n")
    for more, words in (
        (("--gen-subset", "tset"), "no subset 'tset'"),
        (("--reference", tmp_path / "short"), "expected 16 lines, as many as test has"),
        (("--reference", tmp_path / "none"), "no such file"),
        (("--logs", "x"), "NAME=FILE"),
        (("--bleu-tokenize", "no"), "--bleu-tokenize no: expected one of"),
        (("--teacher", "boss"), "--teacher boss: the models are named teacher"),
        (("--nbest", 2, "--repeats", 0), "--repeats must be 1 or more"),
        (("--lm-path", "x", "--amp"), "--lm-path cannot be used here"),
        (("--scores", "COMET"), "--scores: expected NAME=METRIC:FILE, or METRIC:FILE"),
        (("--scores", f"teacher=DA:{tmp_path / 'short'}"), "line 1: expected a number between"),
        (("--scores", f"teacher=KL:{tmp_path / 'short'}"), "KL is computed here"),
        (
            ("--metrics", "bleu", "--scores", f"teacher=Sentence BLEU:{tmp_path / 'short'}"),
            "Sentence BLEU is computed here",
        ),
        (("--write-for-scoring", tmp_path), "it holds other files than those of this test set"),
    ):
        message = judge(data, tmp_path / "r", models, *more, tool=support.in_process).refusal
        assert words in message, message
        assert not (tmp_path / "r" / "report.json").exists()
    message = judge(data, tmp_path / "r", {"teacher": tmp_path / "gone.pt"}).refusal
    assert "no such file" in message


def test_help():
    run = fairseq("fairseq-kd-report", "--help").ok()
    for flag in ("--models", "--significance-samples", "--reference", "--lenpen", "--source-lang"):
        assert flag in run.text
