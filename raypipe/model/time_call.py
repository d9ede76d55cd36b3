"""How long one call takes, forward and backward, and the backward's halves."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from raypipe.model.cost import CallTime
from raypipe.model.split_backward import SplitBackward
from raypipe.model.trees import held_by, tensors_in
from raypipe.model.weight_queue import WeightQueue

__all__ = ["REPEATS", "WARM_UP", "fresh", "median_of", "timed"]

WARM_UP, REPEATS = 1, 3


def timed(
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    trained: Sequence[Tensor],
    halves: bool,
) -> tuple[CallTime, Any]:
    """The time of a call alone, and what it returned, detached.

    Args:
        call: the unit.
        args: its arguments, of which each run gets its own copy.
        kwargs: likewise.
        trained: the parameters that get gradients.
        halves: whether to measure the backward's halves too.
    """
    times = []
    for _ in range(WARM_UP + REPEATS):
        time, result = _once(call, args, kwargs, trained, None)
        if halves:
            time = time + _once(call, args, kwargs, trained, WeightQueue())[0]
        times.append(time)
    detached = pytree.tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), result)
    return median_of(times[WARM_UP:]), detached


def _once(
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    trained: Sequence[Tensor],
    queue: WeightQueue | None,
) -> tuple[CallTime, Any]:
    """One forward and backward: whole, or its two halves where there is a queue for the second."""
    own_args, own_kwargs = pytree.tree_map(_own, (args, kwargs))
    sources = [*(t for _, t in tensors_in((own_args, own_kwargs)) if t.requires_grad), *trained]
    split = contextlib.nullcontext() if queue is None else SplitBackward(queue)
    start = perf_counter()
    with split:
        result = call(*own_args, **own_kwargs)
    forward = perf_counter() - start
    roots = [t for _, t in tensors_in(result) if t.requires_grad]
    ones = [torch.ones_like(root) for root in roots]
    begin = perf_counter()
    if roots and sources:
        with split:
            torch.autograd.backward(roots, ones)  # not grad(), which reentrant checkpoints refuse
    middle = perf_counter()
    if queue is not None:
        queue.drain()
    end = perf_counter()
    for parameter in trained:
        parameter.grad = None
    if queue is None:
        return CallTime(forward, middle - begin), result
    return CallTime(0.0, 0.0, middle - begin, end - middle), result


def median_of(times: Sequence[CallTime]) -> CallTime:
    """The median of each of their times."""
    return CallTime(*(median(getattr(time, name.name) for time in times) for name in fields(CallTime)))


def _own(leaf: Any) -> Any:
    """An argument that the call may change; a non-leaf, since autograd forbids changing a leaf in place."""
    if isinstance(leaf, Tensor):
        return fresh(leaf)
    try:
        return copy.deepcopy(leaf, {id(t): t.detach() for t in held_by(leaf)})
    except Exception:  # what cannot be copied is given as it is
        return leaf


def fresh(tensor: Tensor) -> Tensor:
    """A copy that is no leaf."""
    made = tensor.detach().clone()
    return made.requires_grad_().view_as(made) if tensor.requires_grad else made
