"""What the stages need of Python: python recipes/tools.py FUNCTION ARGUMENTS..."""

import glob
import json
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


STAGES = {f.__name__: f for f in (spm, encode, resumable, progress)}

if __name__ == "__main__":
    STAGES[sys.argv[1]](*sys.argv[2:])
