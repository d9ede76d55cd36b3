"""A unit call that keeps its arguments alone, and runs again in its backward.

Activation checkpointing (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016), by PyTorch's
``torch.utils.checkpoint`` without reentrance: autograd's graph is the first run's, and the second only makes what that
graph had saved. So gradients are the same bits, whole or in halves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from raypipe.model.compiled import compiled_again
from raypipe.model.once import copied, statistics_of
from raypipe.model.seeds import run_under
from raypipe.model.trees import PLAIN

__all__ = ["recomputed"]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor argument stands among the inputs of the checkpoint."""

    number: int


def recomputed(call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The call's result; its backward runs it again, under the same link of the chain of seeds.

    The generators' states are not kept: the link makes them anew, and what a unit draws depends on nothing else.
    PyTorch's own way (``preserve_rng_state``) would restore the same numbers at the cost of a copy for each call.

    A compiled unit has its checkpoint inside of the compiled code.

    Args:
        call: a unit's, bound to it.
        args: its arguments. Tensors are kept as autograd keeps them, so one that is changed in place before the
            backward is an error; of other objects a copy is kept as they were before the call.
        kwargs: likewise.
    """
    unit: nn.Module = call.__self__  # type: ignore[attr-defined]
    leaves, tree = pytree.tree_flatten((args, dict(kwargs)))
    compiled = compiled_again(unit)
    if compiled is not None:
        objects = any(not isinstance(leaf, (*PLAIN, Tensor)) for leaf in leaves)
        return call(*args, **kwargs) if objects else compiled(*args, **kwargs)
    tensors: dict[int, Tensor] = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
    places = {name: _Place(number) for number, name in enumerate(tensors)}  # one tensor given twice stays one
    others = [places[id(leaf)] if isinstance(leaf, Tensor) else copied(leaf) for leaf in leaves]
    link = torch.default_generator.initial_seed()
    first: list[Any] = [(args, kwargs)]

    def run(*inputs: Tensor) -> Any:
        if first:
            own_args, own_kwargs = first.pop()
            return call(*own_args, **own_kwargs)
        given = [inputs[leaf.number] if isinstance(leaf, _Place) else copied(leaf) for leaf in others]
        own_args, own_kwargs = pytree.tree_unflatten(given, tree)
        with _statistics_apart(unit), _no_fast_path():
            return run_under(link, lambda: call(*own_args, **own_kwargs))

    return checkpoint(run, *tensors.values(), use_reentrant=False, preserve_rng_state=False)


@contextmanager
def _statistics_apart(unit: nn.Module) -> Iterator[None]:
    """Meanwhile norms write their running statistics elsewhere: the first run has counted the microbatch."""
    kept = [(norm, dict(norm._buffers)) for norm in statistics_of(unit)]
    for norm, buffers in kept:
        norm._buffers.update((name, b if b is None else b.clone()) for name, b in buffers.items())
    try:
        yield
    finally:
        for norm, buffers in kept:
            norm._buffers.update(buffers)


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """As ``Switch.on`` has it for the first run."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
