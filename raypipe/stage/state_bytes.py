"""How many bytes of state an optimizer keeps for each parameter, found by letting it take a step without memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from raypipe.stage.spec import OptimizerMaker

__all__ = ["state_bytes"]


def state_bytes(make: OptimizerMaker, parameters: Mapping[str, Tensor]) -> dict[str, int] | None:
    """Bytes of optimizer state by the parameter's name.

    The optimizer is made on fake tensors of the parameters' shapes and takes one step, in which only the first
    parameter of each shape, dtype and group has a gradient: equal parameters keep equal state.

    Args:
        make: the user's ``optimizer``.
        parameters: those that are trained, or husks of them.

    Returns:
        None where the optimizer cannot take such a step, since it reads its parameters' data.
    """
    if not parameters:
        return {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fakes = {
            name: nn.Parameter(torch.empty(tuple(p.shape), dtype=p.dtype, device=p.device))
            for name, p in parameters.items()
        }
    try:
        optimizer = make(list(fakes.items()))
        groups = {id(p): n for n, group in enumerate(optimizer.param_groups) for p in group["params"]}
        first: dict[object, nn.Parameter] = {}
        for fake in fakes.values():
            first.setdefault(_kind(fake, groups.get(id(fake))), fake)
        for fake in first.values():
            fake.grad = torch.empty_like(fake)
        optimizer.step()
    except Exception:  # whatever the user's code raises on fakes; it is tried on ordinary stand-ins elsewhere
        return None
    kept = {kind: sum(map(_bytes, pytree.tree_leaves(optimizer.state.get(fake, {})))) for kind, fake in first.items()}
    return {name: kept[_kind(fake, groups.get(id(fake)))] for name, fake in fakes.items()}


def _kind(parameter: Tensor, group: int | None) -> object:
    return tuple(parameter.shape), parameter.dtype, group


def _bytes(leaf: object) -> int:
    return leaf.numel() * leaf.element_size() if isinstance(leaf, Tensor) else 0
