"""The parameters of one rank of a tensor group: which are slices, and what their gradients count.

The optimizer gets plain tensors that share the memory of DTensor's slices. So it never sees two kinds of parameters in
one group, which ``foreach``, ``fused`` and ``clip_grad_norm_`` refuse, and it sends nothing by itself. Whether a
method may work on slices is checked by ``elementwise``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Partial

from raypipe.errors import CutError
from raypipe.parallel.group import TensorGroup

__all__ = ["Shards"]


class Shards:
    """What a rank holds of its stage's parameters.

    Args:
        group: the tensor group.
        held: the parameters after the split, by name; the same names in the same order on all ranks.
        summed: names of whole parameters that work on split activations: a rank's gradient is a part of a sum.

    Attributes:
        parameters: plain tensors for the optimizer, by name: the slice of a split parameter, of shape [local], and
            every other parameter itself.
    """

    def __init__(self, group: TensorGroup, held: Mapping[str, nn.Parameter], summed: Collection[str] = ()) -> None:
        self._group, self._held, self._summed = group, dict(held), frozenset(summed)
        self.parameters = {name: _plain(parameter) for name, parameter in held.items()}

    def is_split(self, name: str) -> bool:
        """Whether a rank holds a part of this parameter only."""
        parameter = self._held[name]
        return isinstance(parameter, DTensor) and not all(each.is_replicate() for each in parameter.placements)

    def collect(self) -> None:
        """Hands the gradients of a step to ``parameters``, after its last backward.

        The gradient of a whole parameter may be a sum whose parts lie on the ranks (a norm under sequence parallelism,
        a norm of the heads' queries): all of these are summed in one collective a data type, once a step.
        """
        parts: list[Tensor] = []
        for name, own in self.parameters.items():
            parameter = self._held[name]
            gradient = parameter.grad
            if isinstance(parameter, DTensor):
                parameter.grad = None
                own.grad = None
                if gradient is None:
                    continue
                gradient, is_part = _local_gradient(parameter, gradient)
                own.grad = gradient
                if is_part:
                    parts.append(gradient)
            elif name in self._summed and gradient is not None:
                parts.append(gradient)
        self._sum(parts)

    def _sum(self, parts: list[Tensor]) -> None:
        with torch.no_grad():
            for dtype in dict.fromkeys(part.dtype for part in parts):
                same = [part for part in parts if part.dtype == dtype]
                flat = torch.cat([part.flatten() for part in same])
                self._group.sum(flat)
                for part, total in zip(same, torch.split(flat, [part.numel() for part in same]), strict=True):
                    part.copy_(total.view_as(part))

    def norms(self, names: Iterable[str]) -> Tensor:
        """Each parameter's gradient norm, over all ranks; after ``collect``.

        Args:
            names: the same on all ranks.

        Returns:
            Float64 of shape [names], with the same bits on all ranks. A slice's squares are summed over the group, and
            a whole parameter counts once; one without a gradient is 0.
        """
        names = list(names)
        own = torch.zeros(len(names), dtype=torch.float64)
        for place, name in enumerate(names):
            gradient = self.parameters[name].grad
            if gradient is not None and (self.is_split(name) or self._group.rank == 0):
                own[place] = torch.linalg.vector_norm(gradient).double() ** 2
        self._group.sum(own)
        return own.sqrt()

    def check_replicas(self) -> None:
        """Compares the gradients of whole parameters among the ranks; after ``collect``.

        Raises:
            CutError: one differs, so the ranks' copies would drift apart.
        """
        whole = {name: p.grad for name, p in self.parameters.items() if p.grad is not None and not self.is_split(name)}
        if not whole:
            return
        sums = torch.stack([_digest(gradient) for gradient in whole.values()])
        most = torch.cat([sums, -sums])
        self._group.most(most)
        differs = (most[: len(whole)] != -most[len(whole) :]).any(dim=1)
        for name, other in zip(whole, differs.tolist(), strict=True):
            if other:
                raise CutError(
                    f"{name} is whole on every rank of a tensor group, but its gradient differs between them: it "
                    "works on split activations, between a ColwiseParallel and its RowwiseParallel; give its module "
                    "the style raypipe.parallel.styles.SummedGradient() in tensor_parallel_plan, or leave that pair out"
                )

    def full(self, name: str) -> Tensor:
        """The whole parameter, gathered from all ranks, which must all ask for it."""
        parameter = self._held[name].detach()
        return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _plain(parameter: nn.Parameter) -> nn.Parameter:
    if not isinstance(parameter, DTensor):
        return parameter
    with torch.no_grad():
        own = _there(parameter.to_local())
    return nn.Parameter(own, requires_grad=parameter.requires_grad)


def _local_gradient(parameter: DTensor, gradient: Tensor) -> tuple[Tensor, bool]:
    """The gradient of a rank's part, and whether it is still to be summed over the group."""
    if not isinstance(gradient, DTensor):
        return gradient, False
    (has,), (wants,) = gradient.placements, parameter.placements
    if wants.is_replicate() and isinstance(has, Partial) and has.reduce_op == "sum":
        return _there(gradient.to_local()).clone(), True
    if has != wants:
        gradient = gradient.redistribute(placements=[wants])
    return _there(gradient.to_local()), False


def _there(tensor: Tensor) -> Tensor:
    return tensor.wait() if isinstance(tensor, AsyncCollectiveTensor) else tensor


def _digest(gradient: Tensor) -> Tensor:
    """Two numbers that differ where gradients do; NaN counts as a number."""
    flat = torch.nan_to_num(gradient.flatten().double())
    turns = torch.arange(1, flat.numel() + 1, dtype=torch.float64, device=flat.device)
    return torch.stack([flat.sum(), (flat * torch.cos(turns)).sum()])
