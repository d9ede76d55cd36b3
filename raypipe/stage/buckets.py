"""Gradients and weights end to end in a few large messages: one for each parameter would pay its latency each time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["BUCKET_BYTES", "Bucket", "flat_gradients", "flat_weights", "make_buckets", "set_gradients", "set_weights"]

BUCKET_BYTES = 25 * 2**20
"""How large a message grows before the next one is begun, as in PyTorch's DistributedDataParallel."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Parameters of one dtype that the same ranks hold.

    Attributes: ``ranks``, sorted; ``parts``, for each of them the parameters that it owns.
    """

    ranks: tuple[int, ...]
    parts: tuple[tuple[nn.Parameter, ...], ...]

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """All of them, by owner."""
        return tuple(parameter for part in self.parts for parameter in part)


def make_buckets(
    rank: int,
    parameters: Mapping[str, nn.Parameter],
    shared: Mapping[tuple[int, ...], Sequence[str]],
    stepped_by: Callable[[int], Sequence[str]],
) -> list[Bucket]:
    """The buckets of one rank, in an order that any two ranks have alike in what they share.

    Args:
        rank: this one.
        parameters: held by it, by name.
        shared: names by the ranks that hold them.
        stepped_by: names by the rank that owns them.
    """
    buckets = []
    for ranks, names in shared.items():
        if rank not in ranks:
            continue
        stepped = {each: set(stepped_by(each)) for each in ranks}
        for group in _groups(names, parameters):
            parts = [tuple(parameters[name] for name in group if name in stepped[each]) for each in ranks]
            buckets.append(Bucket(ranks, tuple(parts)))
    return buckets


def _groups(names: Iterable[str], parameters: Mapping[str, nn.Parameter]) -> list[list[str]]:
    """The names in groups of one dtype and of up to ``BUCKET_BYTES``; a larger parameter is a group of its own."""
    done: list[list[str]] = []
    filling: dict[torch.dtype, tuple[list[str], int]] = {}
    for name in names:
        parameter = parameters[name]
        group, size = filling.get(parameter.dtype, ([], 0))
        if group and size + parameter.nbytes > BUCKET_BYTES:
            done.append(group)
            group, size = [], 0
        filling[parameter.dtype] = ([*group, name], size + parameter.nbytes)
    return done + [group for group, _ in filling.values()]


def flat_gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Their gradients end to end, zeros where there is none; then for each a 1 where there is one, else a 0.

    Raises:
        ValueError: a gradient is sparse.
    """
    first = parameters[0]
    if any(p.grad is not None and p.grad.layout != torch.strided for p in parameters):
        raise ValueError(
            "a parameter that several ranks hold has a sparse gradient, but those are summed dense; build its "
            "nn.Embedding with sparse=False"
        )
    came = torch.tensor([p.grad is not None for p in parameters], dtype=first.dtype, device=first.device)
    gradients = [p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in parameters]
    return torch.cat([*gradients, came])


def set_gradients(parameters: Sequence[nn.Parameter], flat: Tensor) -> None:
    """Takes sums of ``flat_gradients`` apart. A parameter without a gradient on any rank stays without: optimizers skip
    it then. Gradients become views of ``flat``, where their layout allows."""
    came = flat[-len(parameters) :].tolist()
    start = 0
    for parameter, count in zip(parameters, came, strict=True):
        view = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
        if not count:
            parameter.grad = None
        elif parameter.is_contiguous():
            parameter.grad = view
        else:
            parameter.grad = torch.empty_like(parameter).copy_(view)


def flat_weights(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Their values end to end."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in parameters])


def set_weights(parameters: Sequence[nn.Parameter], flat: Tensor) -> None:
    """Copies values from ``flat`` into them."""
    start = 0
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(flat[start : start + parameter.numel()].view(parameter.shape))
            start += parameter.numel()
