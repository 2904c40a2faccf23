"""Looking inside a model while it reads a batch."""

import contextlib
import inspect
import math
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence

import torch
from fairseq.models.fconv import FConvDecoder, FConvEncoder
from fairseq.models.lstm import LSTMDecoder, LSTMEncoder
from fairseq.modules import MultiheadAttention
from torch import Tensor, nn

from ..errors import UserError
from ..objective import Place
from ..objective.states import HIDDEN, LAYERS_FLAG, MAPS, SIDES, full_precision

# Where a model has the attention of each kind: on which side, and under which name in its layers
_ATTENTION = {
    "encoder-self": ("encoder", "self_attn"),
    "decoder-self": ("decoder", "self_attn"),
    "cross": ("decoder", "encoder_attn"),
}


@contextlib.contextmanager
def looking_inside(model: Any, places: Sequence[Place]) -> Iterator[Dict[Place, Tensor]]:
    """What is found at these places in the one call of ``model`` inside the block.

    Behind the block the dictionary holds it: states as (B, L, d), attention as averages over heads
    (B, queries, keys), before dropout. A layer that layerdrop left out is not in it. The model may
    be wrapped for distributed training. Nothing stays behind, also after an exception; without
    places, nothing is touched at all.

    Raises:
        UserError: a layer gives something else than a state for each position.
    """
    found: Dict[Place, Tensor] = {}
    if not places:
        yield found
        return
    seen: Dict[Place, List[Any]] = {place: [] for place in places}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_fast_path(model))
        for place, calls in seen.items():
            watch = _noting_inputs if place.kind in MAPS else _noting_outputs
            stack.enter_context(watch(_stack(model, place.kind).layers[place.layer], calls))
        yield found
    for place, calls in seen.items():
        if not calls:
            continue
        state = _stack(model, place.kind).read(calls)
        if not isinstance(state, Tensor) or state.dim() != 3:
            raise UserError(f"{_named(model, place.kind)} gives no hidden state for each position")
        found[place] = state


def lacking(model: Any, places: Sequence[Place], owner: str, learns: bool = False) -> List[str]:
    """Why a model has not all of these places, every reason.

    Args:
        owner: what messages call it.
        learns: whether gradients will be asked for.
    """
    reasons = []
    for kind in dict.fromkeys(place.kind for place in places):
        hidden, stack = kind in HIDDEN, _find(model, kind)
        flag = LAYERS_FLAG[kind]
        if _side(model, kind) is None:
            side = SIDES[kind][0]
            reasons.append(f"{owner} has no {side}: leave out {kind} in {flag}")
            continue
        if stack is None:
            what = "a hidden state for each position" if hidden else "attention as transformers do"
            reasons.append(
                f"{owner}: {_named(model, kind)} has no layers that give {what}: leave out {kind} "
                f"in {flag}"
            )
            continue
        count = len(stack.layers)
        asked = [place.layer for place in places if place.kind == kind]
        beyond = [str(layer) for layer in asked if not -count <= layer < count]
        if beyond:
            reasons.append(
                f"{owner} has {count} layer{'s' if count > 1 else ''} of {kind}, from 0 to "
                f"{count - 1} or from -1 to -{count}: {flag} asks for {', '.join(beyond)}"
            )
        elif learns and not hidden and _is_checkpointed(model, kind):
            reasons.append(
                f"--kd-attention-weight learns through {owner}'s attention, of which "
                "--checkpoint-activations and --offload-activations keep nothing: leave out either"
            )
    return list(dict.fromkeys(reasons))


class _Stack(NamedTuple):
    """The layers of an encoder or a decoder, and how to read what one gives in a forward pass.

    ``read`` takes the outputs of all its calls (of attention: the inputs), and gives (B, L, d) or
    (B, queries, keys).
    """

    layers: Sequence[Any]
    read: Callable[[List[Any]], Any]
    width: Optional[int] = None  # of states, where the module knows it


def _stack(model: Any, kind: str) -> _Stack:
    found = _find(model, kind)
    assert found is not None  # others are refused when training begins
    return found


def _find(model: Any, kind: str) -> Optional[_Stack]:
    if kind in MAPS:
        found = [getattr(layer, _ATTENTION[kind][1], None) for layer in _layers(model, kind)]
        usable = found and all(map(_can_be_read, found))
        return _Stack(found, lambda calls: _attention_map(**calls[0])) if usable else None
    side = _side(model, kind)
    if isinstance(side, LSTMEncoder):
        left_pad = side.left_pad
        return _Stack([side.lstm], lambda o: _unpacked(o[0][0], left_pad), side.output_units)
    if isinstance(side, LSTMDecoder):
        size = side.hidden_size
        return _Stack(side.layers, lambda o: torch.stack([h for h, _ in o], 1), size)
    if isinstance(side, (FConvEncoder, FConvDecoder)) and side.fc2 is not None:
        # the outputs of single convolutions are not yet gated: there is one state, behind them all
        return _Stack([side.fc2], lambda outputs: outputs[0], side.fc2.out_features)
    layers = _layers(model, kind)
    # fairseq's other layers give T x B x C
    if not layers:
        return None
    return _Stack(layers, _batch_first, getattr(layers[0], "embed_dim", None))


def width(model: Any, kind: str) -> Optional[int]:
    """Of the hidden states of a model's encoder or decoder; None where nobody knows."""
    stack = _find(model, kind)
    return None if stack is None else stack.width


def _side(model: Any, kind: str) -> Any:
    return getattr(model, _ATTENTION[kind][0] if kind in MAPS else kind, None)


def _layers(model: Any, kind: str) -> List[Any]:
    layers = getattr(_side(model, kind), "layers", None)
    # not by iterating: layerdrop would draw random numbers
    return [layers[i] for i in range(len(layers))] if isinstance(layers, nn.ModuleList) else []


def _is_checkpointed(model: Any, kind: str) -> bool:
    """Whether layers forget what is inside them until the backward pass."""
    return any(hasattr(layer, "precheckpoint_forward") for layer in _layers(model, kind))


def _named(model: Any, kind: str) -> str:
    return type(_side(model, kind)).__name__


# Hidden states


@contextlib.contextmanager
def _noting_outputs(layer: nn.Module, calls: List[Any]) -> Iterator[None]:
    handle = layer.register_forward_hook(lambda module, args, output: calls.append(output))
    try:
        yield
    finally:
        handle.remove()


def _batch_first(outputs: List[Any]) -> Any:
    output = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    return output.transpose(0, 1) if isinstance(output, Tensor) and output.dim() > 1 else output


def _unpacked(packed: Any, left_pad: bool) -> Tensor:
    """States of an LSTM (B, L, d) as the sentences are padded; any at padding."""
    states, lengths = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
    if not left_pad:
        return states
    width = states.size(1)
    index = (torch.arange(width) - (width - lengths).unsqueeze(1)).clamp(min=0).to(states.device)
    return states.gather(1, index.unsqueeze(-1).expand_as(states))


@contextlib.contextmanager
def _without_fast_path(model: Any) -> Iterator[None]:
    """fairseq 0.12.2's encoder layers have one in evaluation, which gives B x T x C.

    All of them take it, or none: the encoder looks at the first one, and transposes for it.
    """
    layers = _layers(model, "encoder")
    fast = [layer for layer in layers if getattr(layer, "can_use_fastpath", False)]
    try:
        for layer in fast:
            layer.can_use_fastpath = False
        yield
    finally:
        for layer in fast:
            layer.can_use_fastpath = True


# Attention


def _can_be_read(attention: Any) -> bool:
    """Whether ``_attention_map`` is what it computes."""
    return (
        type(attention) is MultiheadAttention
        # neither, where a decoder attends to itself and to the encoder at once
        and (attention.self_attention or attention.encoder_decoder_attention)
        and attention.bias_k is None
        and not attention.add_zero_attn
        and not getattr(attention, "use_xformers", False)
    )


@contextlib.contextmanager
def _noting_inputs(attention: nn.Module, calls: List[Any]) -> Iterator[None]:
    """Hooks of torch 1.12 do not see keyword arguments: each call is wrapped instead."""
    before, forward = attention.__dict__.get("forward"), attention.forward
    signature = inspect.signature(forward)

    def noting(*args: Any, **given: Any) -> Any:
        arguments = signature.bind(*args, **given).arguments
        names = ("query", "key", "key_padding_mask", "attn_mask")
        calls.append({"attention": attention, **{name: arguments.get(name) for name in names}})
        return forward(*args, **given)

    attention.forward = noting  # type: ignore
    try:
        yield
    finally:
        if before is None:
            del attention.forward
        else:
            attention.forward = before


def _attention_map(
    attention: Any,
    query: Tensor,
    key: Tensor,
    key_padding_mask: Optional[Tensor],
    attn_mask: Optional[Tensor],
) -> Tensor:
    """Weights averaged over heads, (B, queries, keys), before dropout.

    Computed again, because the attention of a forward pass either gives none or drops some out.

    Args:
        query, key: (L, B, C) of each its own L.
        key_padding_mask: (B, keys); ``attn_mask``: (queries, keys), added, or bool.
    """
    heads = (attention.num_heads, -1)
    q = attention.q_proj(query).unflatten(-1, heads)
    k = attention.k_proj(key).unflatten(-1, heads)
    wide = torch.promote_types(q.dtype, torch.float32)
    with full_precision():
        scores = torch.einsum("qbhd,kbhd->bhqk", q.to(wide) * attention.scaling, k.to(wide))
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            scores = scores + attn_mask.to(wide)
        elif attn_mask is not None:
            scores = scores.masked_fill(attn_mask, -math.inf)
        if key_padding_mask is not None:
            padding = key_padding_mask.to(torch.bool)
            scores = scores.masked_fill(padding[:, None, None], -math.inf)
        return torch.softmax(scores, dim=-1).mean(1)
