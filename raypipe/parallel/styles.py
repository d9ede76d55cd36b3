"""Parallel styles that PyTorch lacks and attention with few key-value heads, or shared inputs, needs.

The division of a layer into columns and rows is Megatron-LM's (Shoeybi et al., 2019, arXiv:1909.08053).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle

__all__ = ["KeyValueParallel", "SharedInput", "SummedGradient", "arrived"]


class SharedInput(ParallelStyle):
    """The input of a module whose column-parallel children all read it (q, k and v; gate and up).

    As one replicated DTensor its gradients are summed once, and not once for each child. It is the argument
    ``hidden_states``, or else the first one.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(functools.partial(_share, device_mesh), with_kwargs=True)
        return module


def _share(
    mesh: DeviceMesh, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def shared(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, DTensor):
            return value
        return DTensor.from_local(value, mesh, [Replicate()], run_check=False)

    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": shared(kwargs["hidden_states"])}
    return (shared(args[0]), *args[1:]) if args else args, kwargs


class SummedGradient(ParallelStyle):
    """A module with whole weights that works on split activations, such as a norm of each head's queries.

    Each rank's gradient is then a part of the sum; ``apply`` notes whose.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return module


class KeyValueParallel(ColwiseParallel):
    """Keys or values with fewer heads than ranks: the weights are split, each rank gets the one head that it needs.

    Replicating the weights instead gives the right loss and wrong gradients, in silence: each rank's gradient is only
    that of its own queries. Here the whole output is gathered, and the gradients of its users are summed.

    Args:
        heads: key-value heads of the whole layer; the group's size is a multiple of them.
        head_dim: features of one.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__(use_local_output=False)
        self.heads, self.head_dim = heads, head_dim

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module = super()._apply(module, device_mesh)
        head = device_mesh.get_local_rank() // (device_mesh.size() // self.heads)
        own = slice(head * self.head_dim, (head + 1) * self.head_dim)
        module.register_forward_hook(functools.partial(_pick, own))
        return module


def _pick(own: slice, module: nn.Module, args: tuple[Any, ...], output: DTensor) -> Tensor:
    whole = output.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    return whole[..., own]


def arrived(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """A forward hook: what a collective returned, when it is there; DTensor's promise of it is a tensor of its own kind
    that nothing but PyTorch can send."""
    return _Arrive.apply(output) if isinstance(output, AsyncCollectiveTensor) else output  # type: ignore[no-untyped-call]


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, promise: Any) -> Tensor:
        there: Tensor = promise.wait()
        return there.view_as(there)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
