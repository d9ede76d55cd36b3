"""Numbers that are NaN or infinite: where they arose, and the error that says so.

The norm of every gradient is computed in each step, so one look at the norms tells; the gradients are not read again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from raypipe.errors import NonFiniteError
from raypipe.stage.spec import Gradients

__all__ = ["NonFinite", "find_non_finite", "gradient_error", "loss_error", "scale_error"]


@dataclass(frozen=True, slots=True)
class NonFinite:
    """Where it arose.

    Attributes:
        rank: that owns the parameter.
        parameter: its name, or None where it is the loss.
        norm: of its gradient: NaN or infinity.
        position: the parameter's number in model order.
    """

    rank: int
    parameter: str | None = None
    norm: float = math.nan
    position: int = 0

    def __str__(self) -> str:
        return "the loss" if self.parameter is None else f"the gradient of {self.parameter}"


def find_non_finite(gradients: Gradients, norms: Mapping[int, Tensor]) -> NonFinite | None:
    """Of the parameters with a gradient that is not finite the last in model order: a backward comes to it first.

    Args:
        gradients: whose gradients are whose.
        norms: of each rank that is known, float64 of shape [owned].
    """
    bad: dict[str, tuple[int, float]] = {}
    for rank, vector in norms.items():
        if not bool(vector.isfinite().all()):
            named = zip(gradients.owned[rank], vector.tolist(), strict=True)
            bad.update((name, (rank, norm)) for name, norm in named if not math.isfinite(norm))
    if not bad:
        return None
    position, name = max((number, name) for number, name in enumerate(gradients.order) if name in bad)
    return NonFinite(bad[name][0], name, bad[name][1], position)


def gradient_error(found: NonFinite, stage: int, step: int, *, agreed: bool) -> NonFiniteError:
    """The error of a step whose gradients are not finite, where no scale can be blamed.

    Args:
        found: where.
        stage: of its rank.
        step: number of the step.
        agreed: whether all ranks knew before any of them updated its weights.
    """
    others = "no stage has updated its weights"
    if not agreed:
        others = (
            "this stage has not updated its weights, others may have (with max_grad_norm they wait for each other),"
        )
    return NonFiniteError(
        step,
        stage,
        f"{found} has the norm {found.norm}; {others} and the trainer is shut down: look at this step's batch, or "
        "lower the learning rate",
        parameter=found.parameter,
        position=found.position,
    )


def loss_error(loss: float, microbatch: int, stage: int, step: int) -> NonFiniteError:
    """The error of a step whose loss is not finite; it comes before the last backward, so no stage has updated."""
    return NonFiniteError(
        step,
        stage,
        f"the loss of microbatch {microbatch} is {loss}; no stage has updated its weights and the trainer is shut "
        "down: look at this step's batch, or lower the learning rate",
        microbatch=microbatch,
    )


def scale_error(found: NonFinite, stage: int, step: int, scale: float, skipped: int) -> NonFiniteError:
    """The error of a run under fp16 in which no scale makes gradients finite."""
    return NonFiniteError(
        step,
        stage,
        f"{found} was not finite in {skipped} steps in a row, down to a loss scale of {scale:.3g}, so it does not "
        "merely overflow float16; the weights are as they were before and the trainer is shut down: look at the "
        "batches, lower the learning rate, or take precision='bf16', which has the range of float32",
        parameter=found.parameter,
        position=found.position,
    )
