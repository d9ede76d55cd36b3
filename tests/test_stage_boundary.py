from __future__ import annotations

from pipes import WIDTH, Stack, batch, recorded
from typing import Any

import pytest
import torch
from torch import Tensor

from raypipe.errors import CutError
from raypipe.stage.boundary import Boundary, boundaries


def spread(model: Any, x: Tensor) -> Tensor:
    """Across the cut go a transposed tensor, one without gradient, and one that is changed later."""
    h = model.blocks[0](x)
    turned, index, kept = h.T * 1, h.argmax(-1), h * 2
    x = model.blocks[1](x)
    kept.mul_(3.0)
    return x + turned.T + index[:, None] + kept


def boundary() -> Boundary:
    middle = boundaries(recorded(Stack(spread), batch()), (1,))[1]
    assert len(middle.specs) == 3
    return middle


def test_messages_are_contiguous_and_strides_come_back() -> None:
    turned, index, kept = torch.randn(4, WIDTH).T, torch.arange(4), torch.randn(4, WIDTH)
    message = boundary().pack([turned, index, kept])
    assert all(t.is_contiguous() for t in message)
    assert [(tuple(t.shape), t.dtype) for t in message] == [(s.shape, s.dtype) for s in boundary().specs]
    _, tensors = boundary().unpack(message, training=False)
    assert torch.equal(tensors[0], turned)
    assert tensors[0].stride() == turned.stride()


def test_leaves_collect_gradients_and_what_is_changed_in_place_is_no_leaf() -> None:
    message = [torch.randn(s.shape).to(s.dtype) for s in boundary().specs]
    leaves, (turned, index, kept) = boundary().unpack(message, training=True)
    assert leaves[0] is turned
    assert leaves[1] is not kept
    assert not index.requires_grad
    kept.mul_(3.0)
    (turned.sum() + kept.sum()).backward()
    one, three = boundary().unpack_gradients(boundary().pack_gradients(leaves))
    assert torch.equal(one, torch.ones(WIDTH, 4))
    assert torch.equal(three, torch.full((4, WIDTH), 3.0))


def test_a_leaf_that_no_gradient_reached_is_told_from_one_of_zeros() -> None:
    message = [torch.randn(s.shape).to(s.dtype) for s in boundary().specs]
    leaves, (turned, _, _) = boundary().unpack(message, training=True)
    (turned * 0).sum().backward()
    sent = boundary().pack_gradients(leaves)
    assert [(tuple(t.shape), t.dtype) for t in sent] == [(s.shape, s.dtype) for s in boundary().gradient_specs]
    zeros, none = boundary().unpack_gradients(sent)
    assert zeros is not None
    assert not zeros.any()
    assert none is None


def test_no_gradient_goes_where_nothing_is_trained() -> None:
    """A hook may make a frozen embedding's result require one, which reentrant checkpointing needs."""
    recording = recorded(Stack(spread), batch())
    before = boundaries(recording, (1,), recording.calls[1])[1]
    message = [torch.randn(s.shape).to(s.dtype) for s in before.specs]
    leaves, _ = before.unpack(message, training=True)
    assert len(leaves) == 2
    assert before.gradient_specs == ()
    assert before.pack_gradients(leaves) == before.unpack_gradients([]) == []
    assert before.roots([leaves[0], message[1], leaves[1]]) == []
    assert boundaries(recording, (1,), recording.calls[1] - 1)[1].gradient_specs


def test_a_gradient_that_was_not_planned_is_refused() -> None:
    tensors = [torch.randn(WIDTH, 4), torch.arange(4), torch.randn(4, WIDTH, requires_grad=True)]
    with pytest.raises(CutError, match=r"made by mul \(.*\) does not require a gradient, unlike when it was planned"):
        boundary().roots(tensors)
    assert len(boundary().roots([tensors[0].requires_grad_(), *tensors[1:]])) == 2


def test_under_bf16_what_has_a_gradient_travels_in_half_the_bytes_both_ways() -> None:
    recording = recorded(Stack(spread), batch())
    recording.low = torch.bfloat16
    low = boundaries(recording, (1,))[1]
    assert [s.dtype for s in low.specs] == [torch.bfloat16, torch.int64, torch.bfloat16]
    assert [s.dtype for s in low.gradient_specs] == [torch.bfloat16, torch.bfloat16, torch.bool]
    for own, plain in zip(low.specs, boundary().specs, strict=True):
        assert own.shape == plain.shape
        assert own.nbytes == (plain.nbytes // 2 if plain.dtype is torch.float32 else plain.nbytes)
    turned, index, kept = torch.randn(4, WIDTH).T, torch.arange(4), torch.randn(4, WIDTH)
    message = low.pack([turned, index, kept])
    assert [(tuple(t.shape), t.dtype) for t in message] == [(s.shape, s.dtype) for s in low.specs]
    leaves, tensors = low.unpack(message, training=True)
    assert [t.dtype for t in tensors] == [torch.float32, torch.int64, torch.float32]
    assert tensors[0].stride() == turned.stride()
    assert torch.equal(tensors[0], turned.bfloat16().float())
    (leaves[0] * 1.001).sum().backward()
    sent = low.pack_gradients(leaves)
    assert [(tuple(t.shape), t.dtype) for t in sent] == [(s.shape, s.dtype) for s in low.gradient_specs]
    one, none = low.unpack_gradients(sent)
    assert one is not None
    assert one.dtype is torch.float32
    assert torch.equal(one, torch.full((WIDTH, 4), 1.001).bfloat16().float())
    assert none is None


def test_without_a_gradient_a_value_keeps_its_digits() -> None:
    """Masks and positions in float32, and all that an evaluation sends."""
    with torch.no_grad():
        recording = recorded(Stack(spread), batch())
    recording.low = torch.bfloat16
    assert [s.dtype for s in boundaries(recording, (1,))[1].specs] == [torch.float32, torch.int64, torch.float32]
