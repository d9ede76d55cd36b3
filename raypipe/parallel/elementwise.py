"""Whether an optimizer treats a slice of a parameter as it would the whole: AdamW does, Adafactor and Muon do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from raypipe.errors import CutError

__all__ = ["refuse_coupled"]

Maker = Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]

SIDE, STEPS = 4, 3


def refuse_coupled(make: Maker, dims: Mapping[str, int], words: str) -> None:
    """Tries the user's optimizer on small tensors, whole and in two halves, over a few steps.

    Args:
        make: the user's ``optimizer``.
        dims: number of dimensions of each parameter that is split, by its name, for an optimizer with groups by name.
        words: what splits the parameters, for the sentence.

    Raises:
        CutError: an element's update depends on other elements of its parameter.
    """
    try:
        whole = _trained(make, dims, slice(None))
        halves = [_trained(make, dims, slice(0, SIDE // 2)), _trained(make, dims, slice(SIDE // 2, SIDE))]
    except Exception:  # what the user's code refuses here, it refuses or not with the real parameters
        return
    for name, value in whole.items():
        joined = torch.cat([half[name] for half in halves]) if value.dim() else halves[0][name]
        if not torch.allclose(joined, value, rtol=1e-9, atol=1e-12, equal_nan=True):
            raise CutError(
                f"optimizer updates an element of {name} by other elements of it, but {words} leaves each rank with a "
                "slice; use one that works element by element, such as AdamW, Adam or SGD"
            )


def _trained(make: Maker, dims: Mapping[str, int], part: slice) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(0)

    def drawn(count: int) -> Tensor:
        value = torch.randn((SIDE,) * count, generator=noise, dtype=torch.float64)
        return (value[part] if count else value).clone()

    parameters = {name: nn.Parameter(drawn(count)) for name, count in dims.items()}
    optimizer = make(list(parameters.items()))
    for _ in range(STEPS):
        for parameter, count in zip(parameters.values(), dims.values(), strict=True):
            parameter.grad = drawn(count)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}
