"""Makes a corpus of speech from text, as fairseq's speech tasks read it: espeak-ng says each
sentence, in one of several voices and speeds.

    python recipes/spoken.py write OUT SIZE HELD_OUT      sentences of few words: OUT/train.txt, ...
    python recipes/spoken.py say TEXT OUT VOICES SPEEDS   TEXT/train.txt, ... to OUT/train.tsv, ...
    python recipes/spoken.py describe OUT SPM AUGMENT     OUT/config.yaml and its dictionary

What is said is lower case without punctuation, as is usual for speech recognition: numbers should
be words. Features are Kaldi's filter banks, as in fairseq's examples, without needing Kaldi.
"""

import os
import random
import subprocess
import sys
import tempfile
import wave
import zlib

import numpy as np

SPLITS = ("train", "valid", "test")
MEL_BINS = 80

# Sentences that a small model can learn to hear: 8 words in each place, 8 ** 5 sentences
WORDS = (
    "anna peter maria thomas laura david susan martin",
    "buys sees paints sells finds brings keeps wants",
    "two three four five six seven eight nine",
    "red green yellow small heavy old cheap wooden",
    "tables lamps boxes horses bottles flowers windows baskets",
)


def fail(message):
    raise SystemExit("error: " + message)


def complete(path, content):
    """Writes text or an array in one step, so that it is there only if it is complete."""
    with open(path + ".new", "wb") as file:
        if isinstance(content, str):
            file.write(content.encode("utf-8"))
        else:
            np.save(file, content)
    os.replace(path + ".new", path)


def lines_of(path):
    with open(path, encoding="utf-8", newline="\n") as file:
        return [line.rstrip("\r\n") for line in file]


# Text


def write(folder, size, held_out):
    """Sentences, of which none occurs twice: what is tested was never seen in training."""
    rng, counts = random.Random(1), (int(size), int(held_out), int(held_out))
    sentences = set()
    while len(sentences) < min(sum(counts), 8 ** len(WORDS)):
        sentences.add(" ".join(rng.choice(words.split()) for words in WORDS))
    drawn = sorted(sentences)
    rng.shuffle(drawn)
    os.makedirs(folder, exist_ok=True)
    for split, count in zip(SPLITS, counts):
        some, drawn = drawn[:count], drawn[count:]
        complete(os.path.join(folder, split + ".txt"), "".join(line + "\n" for line in some))


def spoken(sentence):
    """What is written of a sentence: its words, without case and punctuation."""
    letters = (c if c.isalnum() or c in "'\u2019" else " " for c in sentence.lower())
    return " ".join("".join(letters).split())


# Sound


def say(text, folder, voices, speeds):
    """Speaks what is not spoken yet, and lists it in TSV files."""
    voices, speeds = voices.split(), speeds.split()
    os.makedirs(os.path.join(folder, "fbank"), exist_ok=True)
    for split in SPLITS:
        rows = ["id\taudio\tn_frames\ttgt_text\tspeaker"]
        sentences = [spoken(line) for line in lines_of(os.path.join(text, split + ".txt"))]
        for i, sentence in enumerate(sentences):
            if not sentence:
                continue
            rng = random.Random("{} {} {}".format(split, i, sentence))
            voice, speed = rng.choice(voices), rng.choice(speeds)
            # of what it holds, so that another sentence in this place is no longer that one
            content = "{} {} {}".format(voice, speed, sentence).encode("utf-8")
            name = "{}-{}-{:08x}".format(split, i, zlib.crc32(content))
            path = os.path.join(folder, "fbank", name + ".npy")
            if not os.path.exists(path):
                complete(path, fbank(*sound_of(sentence, voice, speed)))
            frames = len(np.load(path, mmap_mode="r"))
            row = (name, "fbank/{}.npy".format(name), str(frames), sentence, voice)
            rows.append("\t".join(row))
            if (i + 1) % 500 == 0 or i + 1 == len(sentences):
                print("  {}: {} of {}".format(split, i + 1, len(sentences)), file=sys.stderr)
        complete(os.path.join(folder, split + ".tsv"), "".join(row + "\n" for row in rows))


def sound_of(sentence, voice, speed):
    """What espeak-ng says, as samples of 16 bits (n,), and how many there are in a second."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "said.wav")
        command = ["espeak-ng", "-v", voice, "-s", speed, "-w", path, "--stdin"]
        done = subprocess.run(
            command, input=sentence.encode(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if done.returncode or not os.path.exists(path):
            said = done.stdout.decode(errors="replace").strip()
            fail("{} does not say {!r}: {}".format(" ".join(command), sentence, said))
        with wave.open(path) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
            return samples.astype("float32"), file.getframerate()


def fbank(samples, rate):
    """Kaldi's log mel filter banks with its defaults and no dither, (frames, MEL_BINS) float32:
    windows of 25 ms, one each 10 ms, whose mean is taken out, emphasised and tapered."""
    length, shift = int(rate * 0.025), int(rate * 0.01)
    padded = 1 << (length - 1).bit_length()
    count = 1 + (len(samples) - length) // shift
    if count < 1:
        fail("expected sound of at least 25 ms, got {} samples".format(len(samples)))
    frames = samples[np.arange(count)[:, None] * shift + np.arange(length)].astype("float64")
    frames -= frames.mean(1, keepdims=True)
    frames -= 0.97 * np.concatenate([frames[:, :1], frames[:, :-1]], 1)
    frames *= np.hanning(length) ** 0.85
    power = np.abs(np.fft.rfft(frames, padded)) ** 2

    def mel(hertz):
        return 1127 * np.log(1 + hertz / 700)

    edges = np.linspace(mel(20), mel(rate / 2), MEL_BINS + 2)
    at = mel(np.arange(padded // 2) * rate / padded)[:, None]
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    filters = np.clip(np.minimum((at - low) / (middle - low), (high - at) / (high - middle)), 0, 1)
    energies = power[:, : padded // 2] @ filters
    return np.log(np.maximum(energies, np.finfo("float32").eps)).astype("float32")


# What fairseq has to know


def describe(folder, spm, augment):
    """The YAML file of the data, and the dictionary: the pieces of a SentencePiece model."""
    import sentencepiece
    import yaml

    processor = sentencepiece.SentencePieceProcessor(model_file=spm)
    every = range(processor.get_piece_size())
    real = [i for i in every if not processor.is_control(i) and not processor.is_unknown(i)]
    pieces = "".join(processor.id_to_piece(i) + " 1\n" for i in real)
    complete(os.path.join(folder, "dict.txt"), pieces)
    config = {
        "audio_root": os.path.abspath(folder),
        "bpe_tokenizer": {"bpe": "sentencepiece", "sentencepiece_model": os.path.abspath(spm)},
        "input_channels": 1,
        "input_feat_per_channel": MEL_BINS,
        "vocab_filename": "dict.txt",
        "transforms": {"*": ["utterance_cmvn"]},
    }
    if augment != "0":  # what the SpecAugment paper calls LB
        config["transforms"]["_train"] = ["utterance_cmvn", "specaugment"]
        config["specaugment"] = {
            **dict(time_wrap_W=0, freq_mask_N=1, freq_mask_F=27),
            **dict(time_mask_N=1, time_mask_T=100, time_mask_p=1.0),
        }
    complete(os.path.join(folder, "config.yaml"), yaml.safe_dump(config))


STAGES = {f.__name__: f for f in (write, say, describe)}

if __name__ == "__main__":
    STAGES[sys.argv[1]](*sys.argv[2:])
