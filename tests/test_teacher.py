"""A teacher on its own: what it says about a batch, whatever its checkpoint and vocabulary."""

import re
from argparse import Namespace

import pytest
import torch
from fairseq import models
from fairseq.data import Dictionary
from fairseq.models.transformer import base_architecture
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from kd_plugin.teacher import Student, Teacher

SOURCE, TARGET = "abcdefg", "ABCDEFGHI"


def dictionary(symbols):
    made = Dictionary()
    for symbol in symbols:
        made.add_symbol(symbol)
    return made


def write_teacher(folder, source=SOURCE, target=TARGET):
    """A transformer as it was initialised, with its dictionaries beside it."""
    sides = {"layers": 1, "embed_dim": 8, "ffn_embed_dim": 16, "attention_heads": 2}
    args = Namespace(arch="transformer", source_lang="aa", target_lang="bb")
    for side in ("encoder", "decoder"):
        vars(args).update({"{}_{}".format(side, key): value for key, value in sides.items()})
    base_architecture(args)
    source, target = dictionary(source), dictionary(target)
    task = TranslationTask(TranslationConfig(), source, target)
    torch.manual_seed(1)
    model = models.build_model(args, task)
    source.save(str(folder / "dict.aa.txt"))
    target.save(str(folder / "dict.bb.txt"))
    torch.save({"args": args, "model": model.state_dict()}, str(folder / "teacher.pt"))
    return str(folder / "teacher.pt")


@pytest.fixture
def teacher(tmp_path):
    return write_teacher(tmp_path)


SENTENCES = [("abac", "ABAC"), ("gfe", "GIFE"), ("d", "DH")]


def logits(path, source=SOURCE, target=TARGET):
    """What a teacher says to a student of these symbols, (tokens, the student's vocabulary)."""
    source, target = dictionary(source), dictionary(target)
    opened = Teacher.open([path], Student(source, target, "aa", "bb"))

    def batch(symbols, sentences, bos):
        rows = [[*bos, *map(symbols.index, s), *[symbols.pad()] * (4 - len(s))] for s in sentences]
        return torch.tensor(rows)

    sources, targets = zip(*SENTENCES)
    signal = opened(
        {
            "src_tokens": batch(source, sources, []),
            "src_lengths": torch.tensor([len(s) for s in sources]),
            "prev_output_tokens": batch(target, targets, [target.eos()]),
        }
    )
    return signal.logits(torch.arange(15))


@pytest.mark.parametrize("copies", [True, False])
def test_second_copies_of_weights_come_and_go_between_versions(copies, teacher):
    """fairseq 0.12.2 writes them, and later ones know nothing of them."""
    expected = logits(teacher)
    state = torch.load(teacher)
    weights = {k: w for k, w in state["model"].items() if not re.search(r"_(weight|bias)$", k)}
    if copies:
        layer = "encoder.layers.0."
        for kind in ("weight", "bias"):
            parts = [weights["{}self_attn.{}_proj.{}".format(layer, p, kind)] for p in "qkv"]
            weights[layer + "in_proj_" + kind] = torch.cat(parts)
            weights[layer + "out_proj_" + kind] = weights[layer + "self_attn.out_proj." + kind]
            for fc in ("fc1", "fc2"):
                weights["{}{}_{}".format(layer, fc, kind)] = weights[layer + fc + "." + kind]
    torch.save({**state, "model": weights}, teacher)
    assert torch.equal(logits(teacher), expected)
