"""The flags of task and criterion: what they come to, and what is refused."""

from argparse import Namespace

import pytest
from fairseq.data import Dictionary
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from kd_plugin.flags import KDLabelSmoothedCrossEntropyCriterionConfig, TeacherConfig
from kd_plugin.objective import LayerPair, schedules
from kd_plugin.plan import Plan
from kd_plugin.teachers import Needs


def plan(task=None, **flags):
    """Of a vocabulary of 10 symbols."""
    config = KDLabelSmoothedCrossEntropyCriterionConfig(sentence_avg=False)
    for name, value in flags.items():
        assert hasattr(config, name), name
        setattr(config, name, value)
    cfg = TeacherConfig() if task is None else task
    return Plan.read(config, Namespace(cfg=cfg, target_dictionary=range(10)))


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(kd_weight=1.5), ["--kd-weight must be a number from 0 to 1, got 1.5"]),
        (dict(kd_weight=float("nan")), ["--kd-weight"]),
        (dict(ce_weight=-1.0), ["--ce-weight"]),
        (dict(kd_temperature=0.0), ["--kd-temperature must be a number above 0"]),
        (dict(kd_divergence="tvd", kd_skew=0.2), ["--kd-skew has no effect", "tvd"]),
        (dict(kd_divergence="js", kd_js_beta=1.0), ["--kd-js-beta must be between 0 and 1"]),
        (dict(kd_top_k=11), ["--kd-top-k", "10 symbols"]),
        (dict(kd_tail="bucket"), ["--kd-tail bucket is for --kd-top-k and --teacher-cache only"]),
        (
            dict(kd_tail="sample", kd_top_k=3, kd_divergence="js"),
            [
                "--kd-tail sample is for --teacher-cache only",
                "leave out --kd-top-k",
                "--kd-divergence forward-kl alone, got js",
            ],
        ),
        (dict(kd_selection_rate=0.5), ["--kd-selection-rate has no effect", "all"]),
        (dict(kd_selection="batch", kd_selection_rate=0.0), ["--kd-selection-rate must be"]),
        (dict(kd_selection="batch", kd_queue_size=5), ["--kd-queue-size has no effect"]),
        (dict(kd_weight=0.9, kd_weight_schedule="linear:0:1:5"), ["-schedule linear", "exclude"]),
        (dict(kd_weight=0.5, kd_weight_schedule="linear:0:1:5"), ["--kd-weight 0.5", "exclude"]),
        (
            dict(kd_temperature=1.0, kd_temperature_schedule="linear:1:2:5"),
            ["--kd-temperature 1.0", "exclude"],
        ),
        (dict(kd_weight_schedule="linear:0:2:5"), ["--kd-weight-schedule must be"]),
        (dict(kd_top_k=1, kd_tail="renormalise"), ["--kd-top-k 1 with --kd-tail renormalise"]),
        (dict(kd_weight=0.0, kd_ranking_weight=1.0), ["distils nothing", "--kd-ranking-weight"]),
        (dict(kd_ranking_weight=1.0, kd_ranking_top_k=11), ["at most the 10 symbols", "got 11"]),
        (
            dict(kd_hidden_weight=1.0, kd_hidden_layers="encoder:0=0", kd_attention_layers="x"),
            [
                "--kd-hidden-weight has no effect without --kd-hidden;",
                "--kd-hidden-layers has no effect without --kd-hidden;",
                "--kd-attention-layers has no effect with --kd-attention-weight 0",
            ],
        ),
        (
            dict(
                **dict(kd_hidden="relations", kd_hidden_weight=0.0, kd_hidden_layers="encoder:1"),
                **dict(kd_attention_weight=-1.0, kd_attention_layers="encoder:0=0"),
                **dict(ddp_backend="fully_sharded", kd_weight=2.0),
            ),
            [
                "--kd-weight must be",
                "--kd-hidden-weight must be a number above 0, got 0",
                "--kd-hidden-layers: expected STUDENT=TEACHER layers of encoder, decoder,",
                "--kd-hidden looks inside the student, which --ddp-backend fully_sharded",
                "--kd-attention-weight must be a number above 0, got -1",
                "--kd-attention-layers: expected STUDENT=TEACHER layers of encoder-self,",
                "--kd-attention-weight looks inside the student",
            ],
        ),
        (
            dict(
                **dict(kd_inputs="argmax", kd_inputs_temperature=2.0, kd_inputs_extra_length=1),
                **dict(kd_inputs_rate=1.5, ignore_prefix_size=1),
            ),
            [
                "--kd-inputs-rate must be a number from 0 to 1, got 1.5",
                "--kd-inputs-temperature has no effect with --kd-inputs argmax",
                "--kd-inputs-extra-length has no effect with --kd-inputs argmax",
                "leave out --ignore-prefix-size",
                "for tasks that translate sentences, as kd_translation does; got Namespace",
            ],
        ),
        (
            dict(kd_inputs="sample", kd_inputs_temperature=0.0, kd_inputs_extra_length=-1),
            ["--kd-inputs-temperature must be above 0", "-extra-length must be at least 0, got -1"],
        ),
        (
            dict(kd_inputs_rate=0.5, kd_inputs_rate_schedule="linear:0:1:9"),
            ["--kd-inputs-rate 0.5 and", "exclude", "no effect with --kd-inputs reference"],
        ),
        (
            dict(kd_inputs_temperature=1.0, kd_inputs_rate_schedule="linear:0:2:9"),
            ["-temperature has no effect with --kd-inputs reference", "-schedule must be"],
        ),
        (
            dict(kd_inputs="sample", kd_inputs_rate=1.0, kd_selection="batch"),
            ["--kd-inputs-rate 1 leaves no reference", "leave out --kd-selection"],
        ),
        (dict(kd_weight=0.0, kd_top_k=3), ["--kd-weight 0 distils nothing", "out --kd-top-k"]),
        (
            dict(kd_weight=0.0, kd_selection="batch", kd_weight_schedule="adaptive"),
            ["--kd-weight 0 distils nothing", "--kd-selection, --kd-weight-schedule adaptive"],
        ),
        (
            dict(kd_divergence="logit-mse", kd_temperature=2.0, kd_top_k=3, kd_skew=0.1),
            ["logit-mse has no temperature", "--kd-tail renormalise", "--kd-skew has no effect"],
        ),
    ],
)
def test_what_cannot_mean_anything_is_refused_all_at_once(flags, words):
    with pytest.raises(ValueError) as error:
        plan(**flags)
    for word in words:
        assert word in str(error.value)


def test_weight_0_alone_is_plain_training():
    assert plan(kd_weight=0.0).weight(None) == 0
    assert (plan().weight(None), plan().temperature(None)) == (0.5, 1.0)


def test_settings_follow_the_updates():
    moving = plan(kd_weight_schedule="linear:0:1:10", kd_temperature_schedule="linear:1:3:4")
    found = [moving.settings(update) for update in (0, 2, 10, None)]
    assert [s.kd_weight for s in found] == pytest.approx([0, 0.2, 1, 1])
    assert [s.temperature for s in found] == pytest.approx([1, 2, 3, 3])


@pytest.mark.parametrize(
    "flags, parameter",
    [
        (dict(kd_divergence="js", kd_js_beta=0.3), 0.3),
        (dict(kd_divergence="js"), 0.5),
        (dict(kd_divergence="skew-kl", kd_skew=0.0), 0.0),
        (dict(kd_divergence="skew-reverse-kl"), 0.1),
    ],
)
def test_the_parameter_of_a_divergence_reaches_it(flags, parameter):
    """KL(p || m) is what the parameter changes; of one row, by hand."""
    import torch

    from kd_plugin.objective.divergences import distribution

    p, q = torch.tensor([0.7, 0.3]).double(), torch.tensor([0.2, 0.8]).double()
    value, _ = plan(**flags).divergence.function(
        distribution(p.log()[None]), distribution(q.log()[None])
    )

    def kl(a, b):
        return (a * (a / b).log()).sum()

    x = parameter
    expected = {
        "js": x * kl(p, x * p + (1 - x) * q) + (1 - x) * kl(q, x * p + (1 - x) * q),
        "skew-kl": kl(p, x * p + (1 - x) * q),
        "skew-reverse-kl": kl(q, x * q + (1 - x) * p),
    }[flags["kd_divergence"]]
    torch.testing.assert_close(value[0], expected)


def test_what_a_cache_cannot_give():
    """In a cache of 4 symbols of 10, with the others' mass at temperatures 1 and 2."""
    fixed, moving = schedules.constant(2.0), schedules.Schedule("linear", 1.0, 2.0, 5)
    for needs, held, words in (
        (Needs(4, fixed), (4, [2.0], False), []),
        (Needs(0, None), (4, [], False), []),
        (Needs(10, moving), (10, [], True), []),
        (Needs(5, None), (4, [], False), ["--kd-top-k 5 is more than the 4"]),
        (Needs(0, fixed), (4, [], False), ["--kd-temperature 2 with --kd-tail bucket", "at 1;"]),
        (Needs(0, moving), (4, [2.0], False), ["-schedule with --kd-tail bucket", "at 1, 2"]),
        (Needs(0, None), (1, [], False), ["one symbol with --kd-tail renormalise"]),
        (Needs(2, fixed), (1, [], False), ["--kd-top-k 2", "--kd-temperature 2"]),
        (Needs(drawn_at=fixed), (4, [2.0], False, 3), []),
        (Needs(ranked=4), (4, [], False), []),
        (
            Needs(11, layers=(LayerPair("cross", 0, 0), LayerPair("encoder", 0, 0))),
            *((10, [], True), ["leave out --kd-attention-weight and --kd-hidden,", "-top-k 11"]),
        ),
        (Needs(ranked=5, drawn_at=fixed), (4, [2.0], False, 3), ["--kd-ranking-top-k 5", "the 4"]),
        (Needs(drawn_at=moving), (10, [], True), []),
        (Needs(drawn_at=fixed), (4, [2.0], False), ["holds none", "--tail-samples"]),
        (Needs(drawn_at=fixed), (4, [1.0], False, 3), ["--kd-temperature 2", "temperature 1,"]),
        (Needs(drawn_at=moving), (4, [2.0], False, 3), ["--kd-temperature-schedule with"]),
    ):
        reasons = needs.unmet(*held)
        assert bool(reasons) == bool(words), (needs, held)
        for word in words:
            assert word in "; ".join(reasons)


def test_what_a_plan_needs():
    assert plan().needs == Needs(0, schedules.constant(1.0))
    assert plan(kd_top_k=3, kd_tail="renormalise").needs == Needs(3, None)
    assert plan(kd_ranking_weight=1.0).needs.ranked == 5 and plan().needs.ranked == 0


def test_what_is_learnt_from_the_inside():
    assert plan().inside == () and plan().needs.layers == ()
    made = plan(kd_hidden="relations", kd_attention_weight=2.0, kd_attention_layers="cross:0=-2")
    assert [(term.name, term.how, term.weight) for term in made.inside] == [
        ("kd_hidden", "relations", 1.0),
        ("kd_attention", "attention", 2.0),
    ]
    assert made.needs.layers == (
        LayerPair("encoder", -1, -1),
        LayerPair("decoder", -1, -1),
        LayerPair("cross", 0, -2),
    )


def test_a_cache_allows_a_tail():
    assert plan(TeacherConfig(teacher_cache="c"), kd_tail="renormalise").caches == ["c"]


def test_teachers_of_the_flags():
    config = TeacherConfig(
        teacher_checkpoint_path="a.pt:b.pt",
        teacher_data="one:two",
        teacher_weights="2,1",
        teacher_overrides="{'dropout': 0.1}",
        teacher_device="cpu",
    )
    (found,) = plan(config).teachers
    assert found.paths == ["a.pt", "b.pt"] and found.data == ["one", "two"]
    assert found.weights == [2.0, 1.0] and found.overrides == {"dropout": 0.1}
    assert (found.dtype, found.on_cpu, found.trust) == ("fp32", True, False)
    assert plan().teachers == []


def test_another_task_is_refused():
    for cfg in (TranslationConfig(), None):
        task = TranslationTask(TranslationConfig(), Dictionary(), Dictionary())
        task.cfg = cfg  # tasks without dataclasses have none
        with pytest.raises(ValueError, match="needs a task with a teacher.*got TranslationTask"):
            Plan.read(KDLabelSmoothedCrossEntropyCriterionConfig(sentence_avg=False), task)
