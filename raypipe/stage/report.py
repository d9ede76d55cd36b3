"""What a rank sends back after a step: small, and the same for every backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raypipe.observe.events import Trace

__all__ = ["ForwardReport", "TrainReport"]


@dataclass(frozen=True, slots=True)
class TrainReport:
    """One rank's training step.

    Attributes:
        step: its number.
        samples: of the whole batch.
        microbatches: how many this replica's share of it was cut into.
        loss: what that share adds to the batch's loss, on the last stage, else None.
        divisor: what the gradients' norms are still to be divided by, on the last stage, else None.
        norms: float64 of shape [owned], of the gradients of the parameters that this rank owns.
        lr: of each of its parameter groups.
        trace: when it did what.
        refused: why the batch was not trained on, on the last stage, else None.
        loss_scale: of this step under fp16, else None.
        non_finite: where the number arose because of which the step was skipped under fp16, else None.
    """

    step: int
    samples: int
    microbatches: int
    loss: float | None
    divisor: float | None
    norms: NDArray[np.float64]
    lr: tuple[float, ...]
    trace: Trace
    refused: str | None = None
    loss_scale: float | None = None
    non_finite: str | None = None


@dataclass(frozen=True, slots=True)
class ForwardReport:
    """One rank's evaluation or prediction of one batch; everything but ``samples`` is there on the last stage only.

    Attributes:
        samples: of the batch.
        loss: of the batch, where evaluated.
        weight: of the batch's loss among others.
        metrics: the user's, of the batch.
        outputs: the model's, packed by ``data.wire``, where predicted.
        refused: why there is no loss, where no weight is right for all of its terms.
    """

    samples: int
    loss: float | None = None
    weight: float = 0.0
    metrics: Mapping[str, float] | None = None
    outputs: Any = None
    refused: str | None = None

    @property
    def is_last(self) -> bool:
        """Whether it is of the stage that ran the model to its end, wherever the schedule has put that."""
        return self.metrics is not None or self.outputs is not None or self.refused is not None
