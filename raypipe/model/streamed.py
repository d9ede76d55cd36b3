"""Runs a model of husks whose tensors are made when they are used and dropped when their unit returns.

So a process that holds none of the weights can look at a forward: its peak is the largest unit, and the activations.
Autograd would keep the weights too, as leaves of its graph and for a backward. So they are no leaves here, and what it
saves of them is their name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from raypipe.model.build import Skeleton
from raypipe.model.call import Caller
from raypipe.model.denominators import Denominators
from raypipe.model.functions import SHAPES, function_name
from raypipe.model.heap import give_back_freed
from raypipe.model.husk import Husk, names_of, replace_tensors
from raypipe.model.intercept import Watch, install
from raypipe.model.quiet import quiet
from raypipe.model.recipes import undisturbed
from raypipe.model.trial_run import Observe, Observed
from raypipe.model.units import find_units

__all__ = ["Stream", "TensorOf", "streamed", "streaming"]

TensorOf = Callable[[str], Tensor]

RETURN_BYTES = 16 * 2**20
"""How much is made and dropped before freed memory goes back to the system."""


@contextmanager
def streamed(
    skeleton: Skeleton, tensor: TensorOf, patterns: Sequence[str] | None = None, stream: Stream | None = None
) -> Iterator[nn.Module]:
    """A copy of the model that runs as if its weights were there.

    A unit's tensors live for one call of it, so what it changes of them is lost. Outside of units a tensor lives for
    one function.

    Args:
        skeleton: of the model; not changed.
        tensor: gives a parameter or buffer by its first name.
        patterns: the user's ``units``.
        stream: makes the tensors in another way than from ``tensor`` alone.
    """
    model = replace_tensors(skeleton.model, {})
    switch = install(find_units(model, patterns))
    stream = stream or Stream(tensor)
    with switch.on(stream), torch.autograd.graph.saved_tensors_hooks(stream.pack, stream.unpack):
        yield model


def streaming(skeleton: Skeleton, tensor: TensorOf, patterns: Sequence[str] | None, caller: Caller) -> Observe:
    """``trial_run.in_process`` for a model whose weights are nowhere."""
    floating = [name for name, p in names_of(skeleton.model)[0].items() if p.is_floating_point()]

    def observe(batch: Any, *, faked: float | None = None, shaken: bool = False) -> Observed:
        own = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch)
        made = _shaken(tensor, floating[-2:]) if shaken else tensor
        with streamed(skeleton, made, patterns) as model, quiet(model), Denominators(faked) as seen:
            loss = caller.loss_of(caller.outputs(model, own), own)
            return Observed(float(loss), seen.values())

    return observe


def _shaken(tensor: TensorOf, names: Sequence[str]) -> TensorOf:
    """The same with noise on some of them."""

    def noisy(name: str) -> Tensor:
        plain = tensor(name)
        if name not in names:
            return plain
        noise = torch.randn(plain.shape, generator=torch.Generator().manual_seed(names.index(name)))
        return plain + (noise * 2 / math.sqrt(max(1, plain.shape[-1] if plain.dim() else 1))).to(plain)

    return noisy


class Stream(Watch):
    """Makes the tensors that a forward uses, and drops them when their unit returns."""

    def __init__(self, tensor: TensorOf) -> None:
        super().__init__({})
        self._tensor = tensor
        self._made: dict[str, Tensor] = {}
        self._names: dict[int, tuple[str, int]] = {}
        self._unreturned = 0
        self._anchor = torch.zeros((), requires_grad=True)

    def unit_call(self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.inside = True
        try:
            return call(*args, **kwargs)
        finally:
            self.inside = False
            self._forget()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _has_husk((args, kwargs)) and function_name(func) not in SHAPES:
            args, kwargs = pytree.tree_map_only(Husk, self._real, (args, kwargs))
            if not self.inside:
                self._forget()
        return func(*args, **kwargs)

    def pack(self, saved: Tensor) -> Any:
        """A weight's view without its memory; anything else as it is."""
        known = self._names.get(saved.untyped_storage().data_ptr()) if saved.layout == torch.strided else None
        if known is None or known[1] != saved._version:
            return saved
        return _Saved(known[0], saved.dtype, tuple(saved.shape), saved.stride(), int(saved.storage_offset()))

    def unpack(self, saved: Any) -> Tensor:
        """For a forward that itself goes backward: the weight is made anew."""
        if isinstance(saved, _Saved):
            with undisturbed():
                memory = self._tensor(saved.name).detach().untyped_storage()
                return torch.empty(0, dtype=saved.dtype).set_(memory, saved.offset, saved.shape, saved.stride)
        return cast(Tensor, saved)

    def _real(self, husk: Husk) -> Tensor:
        name = husk.husk_name
        if name not in self._made:
            with undisturbed():
                made = self._tensor(name).detach()
            if husk.requires_grad:
                # The graph would hold leaves; without a graph they are as good.
                made = self._grown(name, made) if torch.is_grad_enabled() else made.requires_grad_()
            self._made[name] = made
            self._unreturned += made.nbytes
            self._names[made.untyped_storage().data_ptr()] = name, made._version
        return self._made[name]

    def _grown(self, name: str, made: Tensor) -> Tensor:
        """A tensor that requires a gradient, and is not held by the graph."""
        return cast(Tensor, _Grown.apply(self._anchor, made))  # type: ignore[no-untyped-call]

    def _forget(self) -> None:
        self._made.clear()
        self._names.clear()
        if self._unreturned > RETURN_BYTES:
            self._unreturned = 0
            give_back_freed()  # else glibc keeps holes of all sizes, together more than the model


@dataclass(frozen=True, slots=True)
class _Saved:
    """What autograd saved of a weight."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Grown(torch.autograd.Function):
    """A tensor that requires a gradient, and is not held by the graph."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, made: Tensor) -> Tensor:
        return made.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


def _has_husk(tree: Any) -> bool:
    if isinstance(tree, (list, tuple)):
        return any(map(_has_husk, tree))
    if isinstance(tree, Mapping):
        return any(map(_has_husk, tree.values()))
    return type(tree) is Husk
