"""What PyTorch's loss functions average over, seen as they run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["Denominators", "is_counted"]


class Denominators(TorchFunctionMode):
    """Sees PyTorch's loss functions with reduction ``"mean"`` and records what each averaged over.

    Around the forward that computes the loss::

        with Denominators() as seen:
            loss = ...
        weight = rule.weigh(microbatch, seen.values())

    Counted are cross-entropies (targets that are not ignored, weighted by their class), and the element-wise losses
    and divergences (their elements). The counts stay tensors until ``values``, so nothing waits for a GPU before.

    Args:
        faked: let these functions return this number, to look at what a loss makes of them and what else is in it.
    """

    def __init__(self, faked: float | None = None) -> None:
        super().__init__()
        self._faked = faked
        self._seen: list[Tensor | int] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        counted = _COUNTED.get(func)
        if counted is None:
            return result
        # Out of sight of other modes: they follow the model, and this is none of it.
        with torch._C.DisableTorchFunction(), torch.no_grad():
            count, signature = counted
            denominator = count(_arguments(signature, args, kwargs or {}))
            if denominator is None:
                return result
            self._seen.append(denominator)
            return result if self._faked is None else torch.full_like(result, self._faked)

    def values(self) -> tuple[float, ...]:
        """What each loss function averaged over, in the order in which they ran."""
        return tuple(float(count) for count in self._seen)


def is_counted(func: Any) -> bool:
    """Whether this is a function that ``Denominators`` looks for."""
    return func in _COUNTED


def _arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    average, reduce = given.get("size_average"), given.get("reduce")
    if average is not None or reduce is not None:  # the words of old, which win over reduction
        given["reduction"] = "none" if reduce is False else "sum" if average is False else "mean"
    return given


_Count = Callable[[dict[str, Any]], Tensor | int | None]


def _cross_entropy(given: dict[str, Any]) -> Tensor | int | None:
    target: Tensor = given["target"]
    weight: Tensor | None = given["weight"]
    if given["reduction"] != "mean":
        return None
    if target.is_floating_point():  # probabilities: over rows, whatever the class weights
        return int(target.numel() // max(1, target.shape[1 if target.dim() > 1 else 0]))
    ignored = given["ignore_index"]
    valid = target != (-100 if ignored is None else ignored)
    if weight is None:
        return valid.sum()
    return (weight[torch.where(valid, target, 0)] * valid).sum()


def _elements(given: dict[str, Any]) -> Tensor | int | None:
    if given["reduction"] != "mean":
        return None
    weight: Tensor | None = given.get("weight")
    if weight is not None:
        return weight.sum()
    return math.prod(torch.broadcast_shapes(given["input"].shape, given["target"].shape))  # type: ignore[no-untyped-call]


def _plain_elements(given: dict[str, Any]) -> Tensor | int | None:
    return _elements({**given, "weight": None})


def _divergence(given: dict[str, Any]) -> Tensor | int | None:
    rows = given["input"].shape[0] if given["reduction"] == "batchmean" and given["input"].dim() else None
    return rows if rows is not None else _plain_elements(given)


_COUNTED: dict[Any, tuple[_Count, inspect.Signature]] = {
    function: (count, inspect.signature(function))
    for name, count in {
        "cross_entropy": _cross_entropy,
        "nll_loss": _cross_entropy,
        "linear_cross_entropy": _cross_entropy,
        "mse_loss": _elements,
        "l1_loss": _elements,
        "smooth_l1_loss": _plain_elements,
        "huber_loss": _plain_elements,
        "binary_cross_entropy": _plain_elements,
        "binary_cross_entropy_with_logits": _plain_elements,
        "kl_div": _divergence,
    }.items()
    if (function := getattr(F, name, None)) is not None
}
