"""What is learnt from the inside of a teacher, against references that are written apart: fairseq's
own ways to hidden states and attention, and loops over sentences without padding."""

import math
from unittest import mock

import pytest
import torch
from fairseq import models
from fairseq.modules import MultiheadAttention
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from trainer import (
    SOURCE,
    TARGET,
    Training,
    arguments,
    dictionary,
    new_task,
    save_dictionaries,
    write_data,
    write_mbart,
)

from kd_plugin.checkpoints import Checkpoint, CheckpointError
from kd_plugin.errors import UserError
from kd_plugin.objective import Inside, LayerPair, Place, StateTerm, states
from kd_plugin.objective.states import HIDDEN, MAPS
from kd_plugin.teachers import (
    TRAINING,
    Teacher,
    TeacherSettings,
    hidden_widths,
    looking_inside,
    width,
)
from kd_plugin.teachers.states import lacking

KINDS = HIDDEN + MAPS


# References


def by_fairseq(model, net_input):
    """What fairseq itself tells of the inside of a transformer, by place; differentiable."""
    seen, real = {}, MultiheadAttention.forward

    def forward(self, *args, **given):
        output = real(self, *args, **{**given, "need_weights": True})
        seen[self] = output[1].mean(0) if output[1].dim() == 4 else output[1]  # of each head
        return output

    model.train()  # it has no dropout, and 0.12.2's fast path has no states
    with mock.patch.object(MultiheadAttention, "forward", forward):
        encoded = model.encoder(
            *(net_input["src_tokens"], net_input["src_lengths"]), return_all_hiddens=True
        )
        more = model.decoder(net_input["prev_output_tokens"], encoder_out=encoded)[1]
    layers = {"encoder": encoded["encoder_states"][1:], "decoder": more["inner_states"][1:]}
    found = {
        Place(kind, i): state.transpose(0, 1)
        for kind, of_kind in layers.items()
        for i, state in enumerate(of_kind)
    }
    for i, layer in enumerate(model.encoder.layers):
        found[Place("encoder-self", i)] = seen[layer.self_attn]
    for i, layer in enumerate(model.decoder.layers):
        found[Place("decoder-self", i)] = seen[layer.self_attn]
        found[Place("cross", i)] = seen[layer.encoder_attn]
    return found


def kl(p, q):
    p, q = p[p > 0], q[p > 0]
    return (p * (p / q).log()).sum()


def relations(student, teacher, real):
    """Sentence by sentence, without padding."""

    def rows(states):
        return torch.softmax(states @ states.T / states.size(-1) ** 0.5, -1)

    return sum(kl(rows(t[r]), rows(s[r])) for s, t, r in zip(student, teacher, real))


def attention(student, teacher, queries, keys):
    total = 0
    for s, t, query, key in zip(student, teacher, queries, keys):
        s, t = s[query][:, key], t[query][:, key]
        total = total + kl(t / t.sum(-1, keepdim=True), s / s.sum(-1, keepdim=True))
    return total


# The losses


def case(kind, seed=0, width=6, spoilt=math.nan):
    """Random states or maps of three sentences, padded on the left, with anything at padding."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.arange(5) >= torch.tensor([[0], [3], [2]])
    if kind in HIDDEN:
        made = torch.randn(3, 5, width, generator=generator, dtype=torch.double)
        return made.masked_fill(~real.unsqueeze(-1), spoilt), real
    made = torch.randn(3, 5, 5, generator=generator, dtype=torch.double).exp()
    made = made * real.unsqueeze(1)
    made[0, :, 1] = 0  # masked
    made = made / made.sum(-1, keepdim=True)
    return made.masked_fill(~real.unsqueeze(2), spoilt), real


def compare(kind, student, teachers, real, **counted):
    how, masks = "relations" if kind in HIDDEN else "attention", dict.fromkeys(HIDDEN, real)
    term, place = StateTerm("", how, 1.0, (LayerPair(kind, 0, 0),)), Place(kind, 0)
    side = states.SIDES[kind][0]
    teachers = [
        Inside({place: t}, weight, {} if shared is None else {side: shared})
        for t, weight, shared in teachers
    ]
    return states.compare(term, {place: student}, teachers, masks, {**masks, **counted})


@pytest.mark.parametrize("kind", ["encoder", "encoder-self"])
def test_value_and_gradient(kind):
    """Teachers of other widths; what stands at padding matters neither here nor there."""
    student, real = case(kind)
    teacher, _ = case(kind, seed=1, width=9)
    found, expected = student.clone().requires_grad_(), student.clone().requires_grad_()
    value = compare(kind, found, [(teacher, 1.0, None)], real)
    reference = (
        relations(expected, teacher, real)
        if kind in HIDDEN
        else attention(expected, teacher, real, real)
    )
    value.value.backward()
    reference.backward()
    torch.testing.assert_close(value.value.detach(), reference.detach())
    at = real.unsqueeze(-1).expand_as(student)
    torch.testing.assert_close(found.grad[at], expected.grad[at])
    assert (found.grad[~at] == 0).all()
    assert value.positions == 10
    assert compare(kind, student, [(student, 1.0, None)], real).value.abs() < 1e-14


@pytest.mark.parametrize("kind", ["encoder", "encoder-self"])
def test_tags_neither_count_nor_are_keys(kind):
    """In the second sentence a symbol of the student's is a tag to one of two teachers."""
    student, real = case(kind)
    one, two = case(kind, seed=1, width=9)[0], case(kind, seed=2, width=4)[0]
    shared = torch.ones_like(real)
    shared[1, 4] = False
    found = compare(kind, student, [(one, 0.25, None), (two, 0.75, shared)], real)
    both = [(one, real), (two, real & shared)]
    values = [
        relations(student, t, r) if kind in HIDDEN else attention(student, t, r, r) for t, r in both
    ]
    torch.testing.assert_close(found.value, 0.25 * values[0] + 0.75 * values[1])
    assert found.positions == 0.25 * 10 + 0.75 * 9


def test_attention_that_a_student_does_not_give_at_all_costs_much_and_is_finite():
    student, real = torch.tensor([[[1.0, 0.0]]]).requires_grad_(), torch.ones(1, 1).bool()
    value = states.attention(student, torch.tensor([[[0.5, 0.5]]]), real, real.expand(1, 2))
    value.backward()
    assert 40 < value < math.inf and student.grad.isfinite().all()


# Looking inside


def described(arch="transformer", width=8, heads=2, layers=2, **more):
    args = arguments(arch, width)
    for side in ("encoder", "decoder"):
        vars(args)[f"{side}_attention_heads"] = heads
        vars(args)[f"{side}_layers"] = "[(8, 3)] * 2" if arch == "fconv" else layers
    vars(args).update(max_source_positions=64, max_target_positions=64, **more)
    return args


def build(*of, **more):
    args = described(*of, **more)
    torch.manual_seed(args.encoder_embed_dim)
    task = TranslationTask(TranslationConfig(), dictionary(SOURCE), dictionary(TARGET))
    return models.build_model(args, task)


def batch(*sentences, pad=1, end=2):
    """As fairseq's: sources padded on the left, targets on the right."""
    sources = [[*s, end] for s, _ in sentences]
    width, most = max(map(len, sources)), max(len(t) for _, t in sentences)
    return {
        "src_tokens": torch.tensor([[pad] * (width - len(s)) + s for s in sources]),
        "src_lengths": torch.tensor([len(s) for s in sources]),
        "prev_output_tokens": torch.tensor(
            [[end, *t] + [pad] * (most - len(t)) for _, t in sentences]
        ),
    }


SENTENCES = [([4, 5, 6, 7], [4]), ([9, 10], [5, 6, 7]), ([8], [8, 9])]


def look(model, net_input, kinds=KINDS, layers=(0, -1)):
    places = [Place(kind, layer) for kind in kinds for layer in layers]
    with looking_inside(model, places) as found:
        output = model(**net_input)[0]
    return found, output


def left_behind(model):
    return [
        name
        for name, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    ]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_transformers_states_are_fairseqs(mode):
    model, net_input = build(), batch(*SENTENCES)
    expected = by_fairseq(model, net_input)
    getattr(model, mode)()
    with torch.no_grad():
        plain = model(**net_input)[0]
        found, output = look(model, net_input)
        again = model(**net_input)[0]
    assert torch.equal(plain, again) and not left_behind(model)
    torch.testing.assert_close(plain, output)
    real = {"encoder": net_input["src_tokens"].ne(1), "decoder": output[..., 0].isfinite()}
    for kind in KINDS:
        at = real[states.SIDES[kind][0]]
        for layer in (0, 1):
            seen = found[Place(kind, -layer)]
            torch.testing.assert_close(seen[at], expected[Place(kind, layer)][at].detach())


@pytest.mark.parametrize(
    "arch, more",
    [
        ("lstm", {}),
        ("lstm", {"encoder_bidirectional": True, "decoder_hidden_size": 6}),
        ("fconv", {"encoder_embed_dim": 6, "decoder_embed_dim": 6, "decoder_out_embed_dim": 10}),
        ("transformer", {"encoder_embed_dim": 12}),
    ],
)
def test_configurations_and_models_tell_how_wide_states_are(arch, more, tmp_path):
    model, path = build(arch, **more).eval(), tmp_path / "teacher.pt"
    torch.save({"args": described(arch, **more), "model": model.state_dict()}, str(path))
    found, _ = look(model, batch(*SENTENCES), HIDDEN, (-1,))
    for (kind, _), state in found.items():
        assert width(model, kind) == state.size(-1)
        assert hidden_widths(TeacherSettings([str(path)]), [kind]) == [{kind: state.size(-1)}]


@pytest.mark.parametrize("arch", ["lstm", "fconv", "transformer"])
def test_padding_changes_no_state(arch):
    """Of each sentence in a batch as of the sentence alone."""
    model, kinds = build(arch).eval(), KINDS if arch == "transformer" else HIDDEN
    assert lacking(model, [Place(kind, -1) for kind in kinds], "it") == []
    with torch.no_grad():
        together, _ = look(model, batch(*SENTENCES), kinds, (-1,))
        for i, pair in enumerate(SENTENCES):
            alone, _ = look(model, batch(pair), kinds, (-1,))
            for place, state in alone.items():
                mine = together[place][i]
                for at, side in enumerate(states.SIDES[place.kind]):
                    n, more = state.size(at + 1), mine.size(at)
                    mine = mine.narrow(at, more - n if side == "encoder" else 0, n)
                torch.testing.assert_close(mine, state[0], rtol=1e-4, atol=1e-5)


def test_a_training_draws_the_same_random_numbers():
    """Dropout drops the same, and what is found is before it."""
    model, net_input = build(dropout=0.4, attention_dropout=0.4).train(), batch(*SENTENCES)
    torch.manual_seed(1)
    plain = model(**net_input)[0]
    torch.manual_seed(1)
    found, output = look(model, net_input)
    assert torch.equal(plain, output)
    for kind in MAPS:
        rows = found[Place(kind, -1)].sum(-1)
        torch.testing.assert_close(rows, torch.ones_like(rows))


def test_a_layer_that_is_dropped_contributes_nothing():
    model, net_input = build(encoder_layerdrop=1.0).train(), batch(*SENTENCES)
    found, _ = look(model, net_input)
    assert {place.kind for place in found} == {"decoder", "decoder-self", "cross"}
    real = net_input["src_tokens"].ne(1)
    term = StateTerm("", "relations", 1.0, (LayerPair("encoder", -1, -1),))
    result = states.compare(term, found, [], {"encoder": real}, dict.fromkeys(HIDDEN, real))
    assert result.value == 0 and result.positions == 0


def test_nothing_is_left_behind_after_an_exception():
    model, net_input = build().eval(), batch(*SENTENCES)
    fast = [getattr(layer, "can_use_fastpath", None) for layer in model.encoder.layers]
    with mock.patch.object(type(model.decoder), "output_layer", side_effect=KeyError("stopped")):
        with pytest.raises(KeyError, match="stopped"):
            look(model, net_input, layers=(0, 1, -1))
    assert not left_behind(model)
    assert fast == [getattr(layer, "can_use_fastpath", None) for layer in model.encoder.layers]


def test_checkpointed_activations_give_the_same_gradient():
    net_input, found_gradients = batch(*SENTENCES), []
    for checkpointed in (False, True):
        model = build(checkpoint_activations=checkpointed).train()
        found, output = look(model, net_input, HIDDEN)
        sum((state**3).sum() for state in [output, *found.values()]).backward()
        found_gradients.append(gradients(model))
        places = [Place(kind, -1) for kind in KINDS]
        refused = "--checkpoint-activations" in str(lacking(model, places, "x", learns=True))
        assert refused == checkpointed and not lacking(model, places, "x")
    for one, other in zip(*found_gradients):
        torch.testing.assert_close(one, other)


def test_what_models_lack_is_named():
    places = [Place("encoder", -3), Place("decoder", 1), Place("decoder", 2), Place("cross", 5)]
    assert lacking(build(), places, "teacher t.pt") == [
        "teacher t.pt has 2 layers of encoder, from 0 to 1 or from -1 to -2: --kd-hidden-layers "
        "asks for -3",
        "teacher t.pt has 2 layers of decoder, from 0 to 1 or from -1 to -2: --kd-hidden-layers "
        "asks for 2",
        "teacher t.pt has 2 layers of cross, from 0 to 1 or from -1 to -2: --kd-attention-layers "
        "asks for 5",
    ]
    (reason,) = lacking(build("lstm"), [Place("cross", -1)], "the student")
    assert "the student: LSTMDecoder has no layers that give attention" in reason
    assert "leave out cross in --kd-attention-layers" in reason
    (reason,) = lacking(build("lstm"), [Place("encoder", 1)], "the student")
    assert "has 1 layer of encoder" in reason
    odd = build()
    del odd.encoder.layers
    assert "no layers that give a hidden state" in lacking(odd, [Place("encoder", 0)], "it")[0]


# The criterion

FLAGS = {
    "kd_hidden": {
        "kd_hidden": "relations",
        "kd_hidden_weight": 0.7,
        "kd_hidden_layers": "encoder:0=2,encoder:-1=0,decoder:-1=-1",
    },
    "kd_attention": {
        "kd_attention_weight": 0.7,
        "kd_attention_layers": "encoder-self:-1=0,decoder-self:0=2,cross:-1=1",
    },
}
PAIRS = {
    "kd_hidden": [("encoder", 0, 2), ("encoder", 1, 0), ("decoder", 1, 2)],
    "kd_attention": [("encoder-self", 1, 0), ("decoder-self", 0, 2), ("cross", 1, 1)],
}


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def save(model, folder):
    folder.mkdir(exist_ok=True)
    save_dictionaries(folder, dictionary(SOURCE), dictionary(TARGET))
    torch.save({"args": model_args(model), "model": model.state_dict()}, str(folder / "t.pt"))
    return str(folder / "t.pt")


def model_args(model):
    args = arguments("transformer", model.encoder.embed_tokens.embedding_dim)
    for side in ("encoder", "decoder"):
        layers = getattr(model, side).layers
        vars(args)[f"{side}_layers"] = len(layers)
        vars(args)[f"{side}_attention_heads"] = layers[0].self_attn.num_heads
    return args


@pytest.fixture
def teacher(tmp_path):
    return save(build(width=12, heads=3, layers=3), tmp_path / "teacher")


def begun(data, teacher, model=None, weights=None, **flags):
    """A training of a float64 student whose teacher is open, good or not."""
    cfg = {"teacher_checkpoint_path": teacher, "teacher_weights": weights}
    training = Training(data, cfg, **flags)
    training.model = (model or build()).double()
    training.load("train")
    training.task.source.begin_validation(training.model)
    return training


def outcome(training, sentences=(0, 1, 2, 3, 4)):
    """Gradient of the sum over a batch, and what is logged."""
    dataset = training.task.dataset("train")
    sample = dataset.collater([dataset[i] for i in sentences])
    (log,) = training.update([sample])
    return gradients(training.model), log, sample


def gradients(model):
    """Taken from it; zeros of the parameters that fairseq 0.12.2 has twice."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = None
    return found


@pytest.mark.parametrize("name", FLAGS)
def test_the_term_and_its_gradient_are_added(name, data, teacher):
    """Layers at both ends, unequal widths, heads and depths; sources padded on the left."""
    plain, log, sample = outcome(begun(data, teacher))
    training = begun(data, teacher, **FLAGS[name])
    gradient, more, _ = outcome(training)
    assert name not in log
    ours = by_fairseq(training.model, sample["net_input"])
    theirs = by_fairseq(training.task.source.teacher.members[0].model, sample["net_input"])
    masks = {
        "encoder": sample["net_input"]["src_tokens"].ne(1),
        "decoder": sample["target"].ne(1),
    }
    assert not masks["encoder"][:, 0].all() and masks["encoder"][:, -1].all()
    expected, positions = 0, 0
    for kind, i, j in PAIRS[name]:
        mine, their = ours[Place(kind, i)], theirs[Place(kind, j)].detach()
        on = [masks[side] for side in states.SIDES[kind]]
        expected += (relations if kind in HIDDEN else attention)(mine, their, *on)
        positions += on[0].sum()
    # fairseq's own attention takes its softmax in float32
    near = dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(more["loss"] - log["loss"], 0.7 * expected.detach(), **near)
    torch.testing.assert_close(more[name] * math.log(2), expected.detach(), **near)
    assert more[f"{name}_positions"] == positions
    (0.7 * expected).backward()
    for one, other, reference in zip(plain, gradient, gradients(training.model)):
        torch.testing.assert_close(other - one, reference, rtol=1e-4, atol=1e-6)


def every(layers=True):
    """All flags, of the last layers or of others."""
    flags = {**FLAGS["kd_hidden"], **FLAGS["kd_attention"]}
    return {k: v for k, v in flags.items() if layers or not k.endswith("layers")}


def test_a_student_that_is_its_teacher_has_nothing_to_learn(data, tmp_path):
    _, log, _ = outcome(begun(data, save(build(), tmp_path), build(), **every(layers=False)))
    assert log["kd_hidden"].abs() < 1e-9 and log["kd_attention"].abs() < 1e-9


def test_a_batch_is_the_sum_of_its_parts_in_any_order(data, teacher):
    training = begun(data, teacher, **every())
    whole, log, _ = outcome(training, [3, 0, 4, 2, 1])
    parts = [outcome(training, part) for part in ([0, 1], [2], [3, 4])]
    for name in ("kd_hidden", "kd_attention", "kd_hidden_positions", "kd_attention_positions"):
        torch.testing.assert_close(sum(part[1][name] for part in parts), log[name])
    for one, *others in zip(whole, *(part[0] for part in parts)):
        torch.testing.assert_close(sum(others), one)


def test_the_ignored_prefix_does_not_count(data, teacher):
    _, log, sample = outcome(begun(data, teacher, ignore_prefix_size=1, **every(layers=False)))
    sources, targets = sample["net_input"]["src_tokens"].ne(1).sum(), sample["target"].ne(1).sum()
    assert log["kd_hidden_positions"] == sources + targets - 5
    assert log["kd_attention_positions"] == sources + 2 * (targets - 5)


def test_an_ensemble_weighs_its_members(data, teacher, tmp_path):
    other = save(build(width=4, heads=1, layers=3), tmp_path / "other")
    both, one, two = (
        outcome(begun(data, path, weights=weights, **every()))[1]
        for path, weights in ((f"{teacher}:{other}", "3,1"), (teacher, None), (other, None))
    )
    for name in ("kd_hidden", "kd_attention", "kd_hidden_positions"):
        torch.testing.assert_close(both[name], 0.75 * one[name] + 0.25 * two[name])
    assert one["kd_attention"] != two["kd_attention"]


def test_validation_logs_the_same_terms(data, teacher):
    training = begun(data, teacher, **every())
    training.load("valid")
    log = training.validate(training.batches("valid")[0])
    assert log["kd_hidden"] > 0 and log["kd_attention"] > 0


@pytest.mark.parametrize("bos", [False, True])
def test_what_is_inside_a_tagged_teacher_is_found_at_the_students_positions(bos, tmp_path):
    data = write_data(tmp_path / "data")
    path, model, own = write_mbart(tmp_path, data, bos)
    student = new_task(data=str(data))
    batches = []
    student.load_dataset("train")
    for task in (own, student):
        dataset = task.dataset("train")
        batches.append(dataset.collater([dataset[i] for i in range(len(dataset))]))
    expected = by_fairseq(model, batches[0]["net_input"])
    opened, places = Teacher.open(TeacherSettings([path]), student.student()), []
    places = [Place(kind, -1) for kind in KINDS]
    with torch.no_grad():
        (inside,) = opened(batches[1], places=places).inside()
    assert inside.shared["encoder"][batches[1]["net_input"]["src_tokens"].ne(1)].all()
    for at, i in enumerate(batches[1]["id"].tolist()):
        there = batches[0]["id"].tolist().index(i)
        keep = []
        for made, side in zip(batches, (there, at)):
            tokens = made["net_input"]["src_tokens"][side]
            keep.append({"encoder": tokens.ne(1).nonzero().squeeze(1)})
            keep[-1]["decoder"] = made["target"][side].ne(1).nonzero().squeeze(1)
        for side in HIDDEN:  # the teacher's begin with a <s>, perhaps, and end with a tag
            keep[0][side] = keep[0][side][int(bos) :][: len(keep[1][side])]
        for place, state in inside.states.items():
            theirs, ours = expected[Place(place.kind, 0)][there], state[at]
            for dim, side in enumerate(states.SIDES[place.kind]):
                theirs = theirs.index_select(dim, keep[0][side])
                ours = ours.index_select(dim, keep[1][side])
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "text", ["encoder", "encoder:1", "cross:0=0", "encoder:a=0", "encoder:0=0,encoder:0=0", ""]
)
def test_layers_that_are_not_understood(text):
    with pytest.raises(UserError, match="--kd-hidden-layers: "):
        states.parse_layers(text, "--kd-hidden-layers", HIDDEN)


def test_layers_beyond_a_models_are_refused_when_training_begins(data, teacher):
    flags = {"kd_hidden": "relations", "kd_hidden_layers": "encoder:2=3"}
    with pytest.raises(UserError, match="the student has 2 layers of.* 2; teacher .* has 3 layers"):
        begun(data, teacher, **flags)


def test_a_student_that_learnt_from_named_layers_can_be_opened(tmp_path):
    """Options called layers are code to some models of fairseq's; these are not."""
    path, args = tmp_path / "student.pt", described()
    args.kd_hidden_layers, args.kd_attention_layers = "encoder:-1=-1,decoder:0=0", "cross:0=0"
    torch.save({"args": args, "model": build().state_dict()}, str(path))
    assert Checkpoint.open(str(path), TRAINING).options["kd_hidden_layers"]
    args.decoder_layers = args.kd_hidden_layers
    torch.save({"args": args, "model": build().state_dict()}, str(path))
    with pytest.raises(CheckpointError, match="option decoder_layers is 'encoder:-1.*Nothing was"):
        Checkpoint.open(str(path), TRAINING)
