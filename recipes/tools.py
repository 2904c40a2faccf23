"""What the stages need of Python: python recipes/tools.py FUNCTION ARGUMENTS..."""

import glob
import importlib
import json
import logging
import os
import re
import shutil
import sys
import zipfile


def fail(message):
    raise SystemExit("error: " + message)


def lines_of(path):
    # Only \n ends a line, as for fairseq: others, such as U+2028, occur inside sentences.
    with open(path, encoding="utf-8", newline="\n") as file:
        return [line.rstrip("\n") for line in file]


def complete(path, text):
    """Writes the file in one step, so that it is there only if it is complete."""
    with open(path + ".new", "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
    os.replace(path + ".new", path)


def spm(model, size, *texts):
    """Trains a SentencePiece BPE model of all characters that occur."""
    import sentencepiece

    try:
        sentencepiece.SentencePieceTrainer.train(
            input=",".join(texts),
            model_prefix=model + ".new",
            vocab_size=int(size),
            model_type="bpe",
            character_coverage=1.0,
            minloglevel=2,
        )
    except RuntimeError as error:
        fail("SentencePiece finds no {} symbols here; set VOCAB.\n  {}".format(size, error))
    os.remove(model + ".new.vocab")
    os.replace(model + ".new.model", model)


def encode(model, text, out):
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    pieces = (" ".join(processor.encode(line.strip(), out_type=str)) for line in lines_of(text))
    complete(out, "".join(line + "\n" for line in pieces))


def resumable(folder):
    """Replaces a checkpoint_last.pt that a kill cut short by the newest checkpoint that is whole.

    fairseq copies it there in place, so its original is beside it.
    """
    last = os.path.join(folder, "checkpoint_last.pt")
    if not os.path.exists(last) or zipfile.is_zipfile(last):
        return
    os.remove(last)
    paths = glob.glob(os.path.join(glob.escape(folder), "checkpoint*.pt"))
    whole = sorted(filter(zipfile.is_zipfile, paths), key=os.path.getmtime)
    if whole:
        shutil.copyfile(whole[-1], last + ".new")
        os.replace(last + ".new", last)
    how = "going on from " + whole[-1] if whole else "starting again"
    print("{} was cut short: {}".format(last, how), file=sys.stderr)


def progress(name):
    """fairseq's json log in, a line per validation out, and on a terminal a moving line between."""
    moving = sys.stderr.isatty()

    def show(text, end):
        sys.stderr.write(("\r\033[K" if moving else "") + text + end)
        sys.stderr.flush()

    for line in sys.stdin:
        match = re.search(r"\| (train_inner|valid) \| (\{.*\})", line)
        if not match:
            continue
        values = json.loads(match.group(2))
        if match.group(1) == "valid":
            shown = [("nll", "valid_nll_loss"), ("kd", "valid_kd_loss"), ("BLEU", "valid_bleu")]
            scores = ["{} {}".format(n, values[k]) for n, k in shown if k in values]
            text = "  {}: epoch {}, update {}, valid {}".format(
                name, values["epoch"], values["valid_num_updates"], ", ".join(scores)
            )
            show(text, "\n")
        elif moving:
            text = "  {}: epoch {}, update {}, {} target tokens/s".format(
                name, values["epoch"], values["num_updates"], values.get("wps", "?")
            )
            show(text, "")


def parameters(user_dir, checkpoint):
    """How many parameters a checkpoint holds, shared ones counted once."""
    logging.disable(logging.INFO)  # fairseq's advice on what else could be installed
    plugin = os.path.abspath(user_dir)
    sys.path.insert(0, os.path.dirname(plugin))
    name = os.path.basename(plugin)
    reader = importlib.import_module(name + ".checkpoint")
    export = importlib.import_module(name + ".export")
    return export.parameters(reader.read_checkpoint(checkpoint))[0]


def device():
    """What the speed was measured on."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "CPU, {} threads".format(torch.get_num_threads())


def score(user_dir, checkpoint, log, references, out, tokenize="13a"):
    """fairseq-generate's log to OUT.txt, the translations in the order of the text, and OUT.json.

    `references` is a file, or "binarised" for those that fairseq-generate prints.
    """
    from sacrebleu.metrics import BLEU, CHRF

    found, targets, speed = {}, {}, None
    for line in lines_of(log):
        match = re.match(r"(H|T)-(\d+)\t(.*)", line)
        if match:
            kind, number, text = match.groups()
            if kind == "H":
                found[int(number)] = text.split("\t", 1)[1]  # after the score
            else:
                targets[int(number)] = text
        speed = re.search(r"\(([\d.]+) sentences/s, ([\d.]+) tokens/s\)", line) or speed
    if not found or not speed:
        fail("no translations in {}".format(log))
    if references == "binarised":
        references = [targets[i] for i in sorted(targets)]
        if max(targets) >= len(targets):
            fail("without raw references, every sentence of test has to be translated")
    else:
        references = lines_of(references)
    if max(found) >= len(references):
        count = max(found) + 1
        fail("{}: {} translations, {} references".format(log, count, len(references)))
    # fairseq leaves out sentences that are longer than the model reads: they count as wrong.
    hypotheses = [found.get(i, "") for i in range(len(references))]
    complete(out + ".txt", "".join(line + "\n" for line in hypotheses))
    result = {
        "checkpoint": checkpoint,
        "parameters": parameters(user_dir, checkpoint),
        "sentences": len(references),
        "left_out": len(references) - len(found),
        "device": device(),
        "sentences_per_second": float(speed.group(1)),
        "tokens_per_second": float(speed.group(2)),
    }
    for name, metric in (("bleu", BLEU(tokenize=tokenize)), ("chrf", CHRF())):
        result[name] = metric.corpus_score(hypotheses, [references]).score
        result[name + "_signature"] = str(metric.get_signature())
    complete(out + ".json", json.dumps(result, indent=2) + "\n")


def result(work, name):
    """What `score` found, or None."""
    try:
        with open(os.path.join(work, "eval", name + ".json"), encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return None


def table(work, *names):
    """Prints what `score` found for all names as one Markdown table."""
    results = {name: result(work, name) for name in names}
    greedy = {name: result(work, name + ".greedy") for name in names}
    with_greedy = all(greedy.values())
    print(
        "| model | parameters | BLEU | chrF2 |{} tokens/s | sentences/s |".format(
            " BLEU greedy | chrF2 greedy |" if with_greedy else ""
        )
    )
    print("|---|---:|---:|---:|---:|---:|" + "---:|---:|" * with_greedy)
    notes = []
    for name in names:
        r, g = results[name], greedy[name]
        print(
            "| {} | {:,} | {:.2f} | {:.2f} |{} {:,.0f} | {:,.1f} |".format(
                name.replace("_", " "), r["parameters"], r["bleu"], r["chrf"],
                " {:.2f} | {:.2f} |".format(g["bleu"], g["chrf"]) if with_greedy else "",
                r["tokens_per_second"], r["sentences_per_second"],
            )
        )  # fmt: skip
        if r["left_out"]:
            notes.append("- {}: {} sentences were not translated".format(name, r["left_out"]))
    print("\nsacreBLEU on {} sentences of test:\n".format(r["sentences"]))
    print("- BLEU " + r["bleu_signature"])
    print("- chrF2 " + r["chrf_signature"])
    print("- speed: fairseq-generate's own, {}; a busy machine disturbs it".format(r["device"]))
    print("".join(note + "\n" for note in notes), end="")


STAGES = {f.__name__: f for f in (spm, encode, resumable, progress, score, table)}

if __name__ == "__main__":
    STAGES[sys.argv[1]](*sys.argv[2:])
