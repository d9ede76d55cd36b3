"""Running a model's forward to look at its loss, without leaving a trace."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from raypipe.model.call import Caller
from raypipe.model.denominators import Denominators
from raypipe.model.quiet import quiet

__all__ = ["Observe", "Observed", "in_process", "tolerance_of"]


@dataclass(frozen=True, slots=True)
class Observed:
    """A loss, and what each loss function on its way averaged over."""

    loss: float
    denominators: tuple[float, ...] = ()


class Observe(Protocol):
    """Runs a model's forward on a batch, without randomness, and leaves no trace."""

    def __call__(self, batch: Any, *, faked: float | None = None, shaken: bool = False) -> Observed:
        """``faked``: what loss functions return instead; ``shaken``: with noise on the last parameters."""


def in_process(model: nn.Module, caller: Caller) -> Observe:
    """Runs the model in this process, and leaves its parameters, buffers, modes and the random states as they were."""

    def observe(batch: Any, *, faked: float | None = None, shaken: bool = False) -> Observed:
        # The model may write into its batch, and the pieces are views of the joined one.
        own = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, batch)
        with _shaken(model, shaken), quiet(model), Denominators(faked) as seen:
            loss = caller.loss_of(caller.outputs(model, own), own)
            return Observed(float(loss), seen.values())

    return observe


@contextmanager
def _shaken(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Swaps the last two parameters for noisy copies, so that the outputs differ from sample to sample."""
    floating = [p for p in model.parameters() if p.is_floating_point()] if wanted else []
    noise = torch.Generator().manual_seed(0)
    noisy = {}
    for parameter in floating[-2:]:
        step = (
            torch.randn(parameter.shape, generator=noise)
            * 2
            / math.sqrt(max(1, parameter.shape[-1] if parameter.dim() else 1))
        )
        noisy[id(parameter)] = nn.Parameter(parameter.detach() + step.to(parameter), requires_grad=False)
    swapped = [
        (module, name, parameter)
        for module in (model.modules() if noisy else ())
        for name, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in noisy
    ]
    try:
        for module, name, parameter in swapped:
            module._parameters[name] = noisy[id(parameter)]
        yield
    finally:
        for module, name, parameter in swapped:
            module._parameters[name] = parameter


def tolerance_of(model: nn.Module, low: torch.dtype | None = None) -> float:
    """Relative differences that rounding makes between two batch sizes, for the coarsest dtype, autocast's included."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    dtypes = [torch.float32 if low is None else low, *(t.dtype for t in tensors)]
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    if coarsest > torch.finfo(torch.float32).eps:
        return 2 * coarsest
    # TensorFloat-32, on by default for convolutions.
    return 1e-3 if any(t.is_cuda for t in tensors) else 2e-5
