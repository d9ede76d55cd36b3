"""Gradients of a model whose weights are nowhere: each is seen once, as it comes, and dropped.

A weight that autograd keeps for the backward is kept by its name and made again there. Of a gradient only its products
with a few random vectors of signs stay: they are linear in it, and their norm tells its own (Johnson and
Lindenstrauss, 1984). So the peak is the largest unit and the activations.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from raypipe.model.build import Skeleton
from raypipe.model.call import Caller
from raypipe.model.denominators import Denominators
from raypipe.model.gradient_check import GradientsOf
from raypipe.model.quiet import quiet
from raypipe.model.recipes import undisturbed
from raypipe.model.streamed import Stream, TensorOf, streamed

__all__ = ["streaming_gradients"]

_VECTORS = 16


def streaming_gradients(
    skeleton: Skeleton, tensor: TensorOf, patterns: Sequence[str] | None, caller: Caller
) -> GradientsOf:
    """``gradient_check.in_process`` for a model without its weights; gives images of the gradients, of shape [16]."""

    def gradients_of(batch: Any) -> tuple[tuple[float, ...], dict[str, Tensor]]:
        own = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch)
        stream = _Stream(tensor)
        with streamed(skeleton, tensor, patterns, stream) as model, quiet(model), torch.enable_grad():
            with Denominators() as seen:
                loss = caller.loss_of(caller.outputs(model, own), own)
            loss.backward()  # type: ignore[no-untyped-call]
        return seen.values(), stream.images

    return gradients_of


class _Stream(Stream):
    """Attributes: ``images`` of the gradients, by name."""

    def __init__(self, tensor: TensorOf) -> None:
        super().__init__(tensor)
        self.images: dict[str, Tensor] = {}

    def _grown(self, name: str, made: Tensor) -> Tensor:
        return cast(Tensor, _Weight.apply(self._anchor, made, name, self.images))  # type: ignore[no-untyped-call]


class _Weight(torch.autograd.Function):
    """A weight that the graph does not hold, and whose gradient goes to its image."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor, name: str, images: dict[str, Tensor]) -> Tensor:
        ctx.name, ctx.images = name, images
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        signs = torch.Generator().manual_seed(zlib.crc32(ctx.name.encode()))
        image, flat = torch.empty(_VECTORS, dtype=torch.float64), gradients[0].flatten()
        with undisturbed():
            for number in range(_VECTORS):
                vector = torch.randint(0, 2, flat.shape, generator=signs, dtype=torch.int8).to(flat.dtype)
                image[number] = (flat * (2 * vector - 1)).sum(dtype=torch.float64) / _VECTORS**0.5
        ctx.images[ctx.name] = ctx.images[ctx.name] + image if ctx.name in ctx.images else image
        return None, None, None, None
