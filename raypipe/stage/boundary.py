"""What crosses between two chunks, worked out once per recording: shapes, gradients, memory layout.

A message is contiguous. A transposed tensor (channels last, attention heads) goes in the order of its memory and is
seen through its own strides again on the other side: kernels choose their path by strides, and equal strides give equal
bits. Under bf16 what is float32 and has a gradient travels in bfloat16, and so does that gradient; at both ends it is
float32, so sums and what a unit does in float32 lose nothing more than that one rounding.

A message of gradients ends with a flag for each: whether one came at all. What no gradient reaches must stay without
one, since a gradient of zeros is something else to weight decay and momentum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from raypipe.errors import CutError
from raypipe.model.event import Value
from raypipe.model.recording import Recording
from raypipe.tensors import TensorSpec

__all__ = ["Boundary", "boundaries"]


class Boundary:
    """The values of one cut, and how they travel.

    Args:
        recording: that the values are of.
        values: alive at the cut.
        changed: storages that are changed in place after it.
        trained: whether a trainable parameter was read before it; else nobody asks for gradients.

    Attributes: ``specs`` of the tensors that go forward; ``gradient_specs`` of those that come back, flags last.
    """

    def __init__(self, recording: Recording, values: Sequence[Value], changed: set[int], trained: bool) -> None:
        self._recording, self._values, self._trained = recording, tuple(values), trained
        self._orders = tuple(_memory_order(value) for value in values)
        self._changed = tuple(value.requires_grad and value.storage in changed for value in values)
        self._any_changed = any(self._changed)
        travel = [recording.travels(value) for value in values]
        self.specs = tuple(_packed_spec(spec, order) for spec, order in zip(travel, self._orders, strict=True))
        back = [
            (v.spec.dtype, s, order)
            for v, s, order in zip(values, travel, self._orders, strict=True)
            if v.requires_grad
        ]
        self._back = tuple((dtype, spec.dtype, order) for dtype, spec, order in back)
        asked = tuple(s for v, s in zip(values, self.specs, strict=True) if v.requires_grad and trained)
        self.gradient_specs = (*asked, TensorSpec((len(asked),), torch.bool)) if asked else ()
        self._all_came = torch.ones(len(asked), dtype=torch.bool)

    def pack(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The message of the values' tensors."""
        there = zip(tensors, self.specs, self._orders, strict=True)
        return [_pack(tensor.detach(), spec.dtype, order) for tensor, spec, order in there]

    def unpack(self, message: Sequence[Tensor], *, training: bool) -> tuple[list[Tensor], list[Tensor]]:
        """The leaves that collect gradients, and the tensors to compute with."""
        there = zip(message, self._values, self._orders, strict=True)
        tensors = [_unpack(tensor, value.spec.dtype, order) for tensor, value, order in there]
        if not training:
            return [], tensors
        leaves = [t.requires_grad_() for t, v in zip(tensors, self._values, strict=True) if v.requires_grad]
        if self._any_changed:  # autograd forbids changing a leaf in place
            tensors = [t.clone() if changed else t for t, changed in zip(tensors, self._changed, strict=True)]
        return leaves, tensors

    def roots(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Those of the values' tensors that gradients come back for.

        Raises:
            CutError: a tensor requires a gradient and was not planned to, or the other way round.
        """
        for value, tensor in zip(self._values, tensors, strict=True):
            if tensor.requires_grad != value.requires_grad:
                raise CutError(
                    f"{self._recording.describe(value)} {'requires' if tensor.requires_grad else 'does not require'} a "
                    "gradient, unlike when it was planned; put its maker into one unit with its users (units=[...])"
                )
        return [tensor for tensor in tensors if tensor.requires_grad and self._trained]

    def pack_gradients(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """The message of the leaves' gradients; a leaf that none reached has its place in it, as its shape is known."""
        if not self.gradient_specs:
            return []
        came = [leaf.grad is not None for leaf in leaves]
        gradients = [
            _pack(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, low, order)
            for leaf, (_, low, order) in zip(leaves, self._back, strict=True)
        ]
        return [*gradients, self._all_came if all(came) else torch.tensor(came)]

    def unpack_gradients(self, message: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of ``roots``, None for those that none reached."""
        if not message:
            return []
        *gradients, there = message
        return [
            _unpack(tensor, dtype, order) if came else None
            for tensor, (dtype, _, order), came in zip(gradients, self._back, there.tolist(), strict=True)
        ]


def boundaries(recording: Recording, cuts: tuple[int, ...], trained: int = 0) -> tuple[Boundary, ...]:
    """The boundary before each chunk, and an empty one at the end.

    Args:
        recording: of a microbatch's signature.
        cuts: the unit call that each chunk but the first starts with.
        trained: the first event that reads a trainable parameter.
    """
    windows = recording.windows(cuts)
    before = [Boundary(recording, w.inputs, recording.mutated_after(w.start), trained < w.start) for w in windows]
    return (*before, Boundary(recording, (), set(), False))


def _pack(tensor: Tensor, dtype: torch.dtype, order: tuple[int, ...] | None) -> Tensor:
    return (tensor if order is None else tensor.permute(order)).to(dtype).contiguous()


def _unpack(tensor: Tensor, dtype: torch.dtype, order: tuple[int, ...] | None) -> Tensor:
    tensor = tensor.to(dtype)
    return tensor if order is None else tensor.permute(sorted(range(len(order)), key=order.__getitem__))


def _packed_spec(spec: TensorSpec, order: tuple[int, ...] | None) -> TensorSpec:
    return spec if order is None else replace(spec, shape=tuple(spec.shape[dim] for dim in order))


def _memory_order(value: Value) -> tuple[int, ...] | None:
    """The dimensions from the widest stride to the narrowest, or None where that is their own order or not dense."""
    shape, stride = value.spec.shape, value.stride
    order = tuple(sorted(range(len(shape)), key=lambda dim: -stride[dim]))
    if order == tuple(range(len(shape))):
        return None
    expected = 1
    for dim in reversed(order):
        if shape[dim] != 1 and stride[dim] != expected:
            return None
        expected *= shape[dim]
    return order
