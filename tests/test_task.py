"""The task on its own: what it refuses before the first update."""

from argparse import Namespace

import numpy as np
import pytest
from fairseq.data import Dictionary
from omegaconf import OmegaConf

from kd_plugin.criterion import KDLabelSmoothedCrossEntropyCriterionConfig
from kd_plugin.tasks.translation import KDTranslationConfig, KDTranslationTask
from kd_plugin.teachers.run import TeacherError


def dataset(*lengths):
    """As far as the task asks a dataset before training: sentences this long on both sides."""
    sizes = np.array(lengths)
    return Namespace(src_sizes=sizes, tgt_sizes=sizes)


def task(**more):
    config = KDTranslationConfig(train_subset="train", disable_validation=False)
    for name, value in more.items():
        assert hasattr(config, name), name
        setattr(config, name, value)
    return KDTranslationTask(config, Dictionary(), Dictionary())


def model(longest=1024):
    return Namespace(max_positions=lambda: (longest, longest))


def criterion(**more):
    """Its configuration."""
    config = KDLabelSmoothedCrossEntropyCriterionConfig(sentence_avg=False, **more)
    config._name = "kd_label_smoothed_cross_entropy"
    return OmegaConf.structured(config)


def test_what_needs_no_file_is_refused_with_the_criterions_flags():
    t = task(
        teacher_checkpoint_path="a.pt:b.pt",
        teacher_weights="1,2,3",
        teacher_overrides="dropout=0",
        teacher_device="cpu",
        teacher_dtype="fp16",
    )
    with pytest.raises(ValueError) as error:
        t.build_criterion(criterion(kd_weight=2.0))
    for flag in ("--kd-weight", "--teacher-weights", "--teacher-overrides", "--teacher-dtype"):
        assert flag in str(error.value)
    assert "each of the 2 teachers" in str(error.value)


def test_validation_longer_than_the_teacher_reads_is_refused_before_training():
    t = task()
    t.teacher = model(6)
    t.datasets = {"train": dataset(3, 6), "valid": dataset(2), "valid1": dataset(4, 9)}
    with pytest.raises(TeacherError, match="up to 9 source and 9 target tokens.* 6 and 6"):
        t.begin_epoch(1, model())


@pytest.mark.parametrize(
    "flags, student",
    [
        ({"disable_validation": True}, model()),
        ({"max_source_positions": 6, "max_target_positions": 6}, model()),
        ({}, model(6)),
    ],
    ids=["no validation", "limits", "short student"],
)
def test_long_sentences_that_are_left_out_do_not_matter(flags, student):
    t = task(**flags)
    t.teacher = model(6)
    t.datasets = {"train": dataset(3, 6), "valid": dataset(4, 9)}
    t.begin_epoch(1, student)
