"""What a rank tells the others of a step's losses, and what it makes of the step's end.

One replica's last stage sees the losses of its share alone; a batch is refused, skipped or found not to be finite as a
whole. Every rank comes to the same end from what was told.
"""

from __future__ import annotations

import math

from raypipe.stage.loss_scale import LossScale
from raypipe.stage.losses import Losses
from raypipe.stage.non_finite import gradient_error, loss_error, scale_error
from raypipe.stage.optimizer import Update
from raypipe.stage.spec import PipelineSpec
from raypipe.stage.tally import Tally, refusal_of

__all__ = ["Verdict"]


class Verdict:
    """Of one rank, for all of its steps.

    Args:
        spec: the whole pipeline.
        rank: this one.
        is_last: whether it runs the model to its end.
    """

    def __init__(self, spec: PipelineSpec, rank: int, *, is_last: bool) -> None:
        self._topology, self._rule = spec.topology, spec.rule
        self._stage, self._several = spec.topology.place(rank).stage, spec.topology.replicas > 1
        self._is_last = is_last
        self._loss_scale = LossScale() if spec.caller.precision.scales_loss else None

    @property
    def scales(self) -> bool:
        """Whether losses are scaled, so that all ranks have to agree on each step."""
        return self._loss_scale is not None

    @property
    def scale(self) -> float:
        """What the next step's losses are multiplied by."""
        return 1.0 if self._loss_scale is None else self._loss_scale.value

    def is_early(self, losses: Losses, step: int) -> bool:
        """Whether the losses, all of which are known, can be told before the step's end.

        Raises:
            NonFiniteError: one is not finite, and no scale can be blamed. The last backward is still to come, so no
                rank has all of its gradients and none has stepped.
        """
        if not self._is_last:
            return False
        refused = losses.refusal()
        found = losses.non_finite() if refused is None and not self.scales else None
        if found is not None:
            number, loss = found
            raise loss_error(loss, number, self._stage, step)
        return self._several or losses.trains or refused is not None  # else the step's end says what is wrong

    def told(self, losses: Losses) -> float | list[float]:
        """What the optimizers are told: the divisor, 0 for a batch that is refused, NaN where a loss is not finite."""
        if self._is_last and self._several:
            return losses.tally().vector()
        if self._is_last and losses.refusal() is None:
            return losses.total() if losses.non_finite() is None else math.nan
        return 0.0 if self._is_last or losses.divisor == 0 else 1.0

    def settle(self, update: Update, losses: Losses, step: int, *, agreed: bool) -> str | None:
        """After the update: fits the scale, and says where a number was not finite, if the step was skipped for that.

        Args:
            update: of the step.
            losses: of the step.
            step: its number.
            agreed: whether all ranks knew of each other's gradients before any of them stepped.

        Raises:
            NonFiniteError: a gradient was not finite, and no scale can be blamed.
        """
        found = update.non_finite
        stage = None if found is None else self._topology.place(found.rank).stage
        if self._loss_scale is None:
            if found is not None and stage is not None:
                raise gradient_error(found, stage, step, agreed=agreed)
            return None
        if not update.refused:
            self._loss_scale.update(skipped=found is not None)
        if found is None or stage is None:
            return None
        if self._loss_scale.exhausted:
            raise scale_error(found, stage, step, self._loss_scale.value, self._loss_scale.skipped)
        loss = losses.non_finite() if self._is_last else None  # it comes before any gradient
        return f"stage {stage}, {found}" if loss is None else f"stage {self._stage}, the loss of microbatch {loss[0]}"

    def outcome(self, losses: Losses, update: Update) -> tuple[float | None, float | None, str | None]:
        """On the last stage: the loss, what norms are still to be divided by, and why the batch was refused."""
        if not self._is_last:
            return None, None, None
        tallies = [Tally.read(numbers) for numbers in update.told] if self._several else [losses.tally()]
        refused = losses.refusal_of_terms() or refusal_of(self._rule, tallies)
        if refused is not None:
            return None, 1.0, refused
        if not any(tally.trains for tally in tallies):
            losses.total()  # raises
        total = self._rule.total([tally.weight for tally in tallies])
        return losses.loss(total), total / self._rule.unit if losses.divisor is None else 1.0, None
