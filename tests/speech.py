"""Spoken letters for tests: features of few numbers, in the files of fairseq's speech tasks."""

from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import yaml

FEATURES, FRAMES = 8, 6  # of a frame; of a letter
SOUNDS = np.random.RandomState(0).randn(26, FRAMES, FEATURES)

# (what is said, what is to be written)
Utterance = Tuple[str, str]


def sound(letters: str, noise: float, rng: np.random.RandomState) -> np.ndarray:
    """Features (frames, FEATURES) of letters from a to z, one after the other."""
    spoken = np.concatenate([SOUNDS[ord(letter) - ord("a")] for letter in letters.lower()])
    return (spoken + noise * rng.randn(*spoken.shape)).astype("float32")


def write_speech(
    folder: Path,
    utterances: Dict[str, Sequence[Utterance]],
    source: Sequence[str],
    target: Sequence[str],
    noise: float = 0.1,
    **more: Any,
) -> Path:
    """A data folder of ``speech_to_text``: a TSV file for each subset, whose audio lies in .npy.

    Args:
        source, target: the dictionaries' symbols.
        more: fields of ``config.yaml``.
    """
    (folder / "audio").mkdir(parents=True)
    rng = np.random.RandomState(1)
    for split, pairs in utterances.items():
        rows: List[List[Any]] = []
        for i, (said, written) in enumerate(pairs):
            features = sound(said, noise, rng)
            np.save(str(folder / "audio" / f"{split}{i}.npy"), features)
            rows.append(
                [f"{split}{i}", f"{split}{i}.npy", len(features), *map(spaced, (said, written))]
            )
        write_tsv(folder / f"{split}.tsv", rows)
    for name, symbols in (("src_dict.txt", source), ("dict.txt", target)):
        (folder / name).write_text("".join(f"{symbol} 1\n" for symbol in symbols))
    config = {"input_feat_per_channel": FEATURES, "audio_root": str(folder / "audio"), **more}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def spaced(text: str) -> str:
    return " ".join(text)


def write_tsv(path: Path, rows: Sequence[Sequence[Any]], columns: Optional[Sequence[str]] = None):
    lines = [columns or ["id", "audio", "n_frames", "src_text", "tgt_text"], *rows]
    path.write_text("".join("\t".join(map(str, line)) + "\n" for line in lines))


# SpecAugment as it masks features of so few numbers
AUGMENT = {
    "transforms": {"_train": ["specaugment"]},
    "specaugment": {
        **dict(freq_mask_F=3, freq_mask_N=1, time_mask_N=1, time_mask_T=4, time_mask_p=1.0),
        **dict(time_wrap_W=0),
    },
}
