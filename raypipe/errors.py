"""The errors of raypipe.

    RaypipeError
    ├── ScheduleError        a schedule that computes the wrong thing or deadlocks   (also a ValueError)
    ├── CutError             a model that cannot be split exactly                    (also a ValueError)
    ├── BatchError           a batch that cannot be split exactly                    (also a ValueError)
    ├── ResourcesError       the cluster lacks the room, or its nodes do not fit together
    └── StepError            a step that did not end
        ├── StageError       an exception of the user's code, or of ours, on one stage
        ├── StageLost        a stage's process is gone
        ├── StageStuck       a stage makes no progress
        ├── NonFiniteError   a loss or a gradient that is NaN or infinite
        └── PeerLost         a neighbour's connection closed: secondary, never the cause

All of them survive pickling with their attributes.
"""

from __future__ import annotations

import functools
import traceback
from typing import Any

__all__ = [
    "BatchError",
    "CutError",
    "NonFiniteError",
    "PeerLost",
    "RaypipeError",
    "ResourcesError",
    "ScheduleError",
    "StageError",
    "StageLost",
    "StageStuck",
    "StepError",
]


class RaypipeError(Exception):
    """Any error that raypipe raises by itself."""


class ScheduleError(RaypipeError, ValueError):
    """A schedule that misses or repeats an action, or that can deadlock."""


class CutError(RaypipeError, ValueError):
    """A model that cannot be split exactly; the sentence names both ends of what stands in the way."""


class BatchError(RaypipeError, ValueError):
    """A batch that cannot be cut into microbatches exactly."""


class ResourcesError(RaypipeError):
    """The cluster has no room for all ranks, or its nodes differ in versions."""


class StepError(RaypipeError):
    """A step that did not end."""


class StageError(StepError):
    """An exception on one stage.

    Attributes:
        stage: number of the stage, from 0.
        chunk: number of the chunk, or None outside the actions.
        action: text of the action such as ``2F0``, or a word such as ``optimizer``.
        microbatch: number of the microbatch, or None outside the actions.
        step: number of the step, from 0.
        cause: the exception itself where it could be pickled, else its text.
        replica: number of the pipeline's copy, or None where there is only one.
        trace: the cause's own traceback as text; it is the end of this error's text.
    """

    def __init__(
        self,
        stage: int,
        action: str,
        step: int,
        cause: BaseException | str,
        *,
        chunk: int | None = None,
        microbatch: int | None = None,
        trace: str | None = None,
        replica: int | None = None,
    ) -> None:
        if trace is None:
            trace = "".join(traceback.format_exception(cause)) if isinstance(cause, BaseException) else cause
        self.stage, self.action, self.step, self.cause = stage, action, step, cause
        self.chunk, self.microbatch, self.trace, self.replica = chunk, microbatch, trace, replica
        piece = "" if microbatch is None else f", microbatch {microbatch}"
        where = _named(stage, replica)
        super().__init__(f"{where}, action {action}{piece}, step {step} failed:\n\n{trace.rstrip()}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_stage_error, (
            self.stage,
            self.action,
            self.step,
            _picklable(self.cause),
            self.chunk,
            self.microbatch,
            self.trace,
            self.replica,
        )


class StageLost(StepError):
    """The process of a stage is gone (killed, out of memory, its node lost).

    Attributes: ``stage``, ``rank``, ``reason`` (what the runtime knows of it), ``step`` (or None), ``replica`` (or None
    where there is only one).
    """

    def __init__(self, stage: int, rank: int, reason: str, step: int | None = None, replica: int | None = None) -> None:
        self.stage, self.rank, self.reason, self.step, self.replica = stage, rank, reason, step, replica
        when = "" if step is None else f" in step {step}"
        super().__init__(f"{_named(stage, replica)} (rank {rank}) is gone{when}: {reason}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.stage, self.rank, self.reason, self.step, self.replica)


class StageStuck(StepError):
    """A stage is at one action for longer than ``step_timeout_s``.

    Attributes: ``stage``, ``action``, ``seconds``, ``ranks`` (what every rank was doing, one line each), ``replica``
    (or None where there is only one).
    """

    def __init__(
        self, stage: int, action: str, seconds: float, ranks: tuple[str, ...] = (), replica: int | None = None
    ) -> None:
        self.stage, self.action, self.seconds, self.ranks, self.replica = stage, action, seconds, ranks, replica
        lines = "".join(f"\n  {line}" for line in ranks)
        super().__init__(
            f"{_named(stage, replica)} has been at action {action} for {seconds:.0f} s; raise step_timeout_s if that "
            f"is normal{lines}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.stage, self.action, self.seconds, self.ranks, self.replica)


class NonFiniteError(StepError):
    """A loss or a gradient is NaN or infinite. Nothing is trained with it: the trainer is shut down.

    Attributes: ``step``, ``stage``, ``reason``; ``microbatch`` whose loss it is, or None; ``parameter`` whose gradient
    it is, or None; ``position``, that parameter's number in model order (a backward comes to the last one first).
    """

    def __init__(
        self,
        step: int,
        stage: int,
        reason: str,
        *,
        microbatch: int | None = None,
        parameter: str | None = None,
        position: int = 0,
    ) -> None:
        self.step, self.stage, self.reason = step, stage, reason
        self.microbatch, self.parameter, self.position = microbatch, parameter, position
        super().__init__(f"stage {stage}, step {step}: {reason}")

    def __reduce__(self) -> tuple[Any, ...]:
        where = functools.partial(
            type(self), microbatch=self.microbatch, parameter=self.parameter, position=self.position
        )
        return where, (self.step, self.stage, self.reason)


class PeerLost(StepError):
    """The connection to another rank closed or timed out. It follows a failure elsewhere and never hides it.

    Attributes: ``peer`` (its rank, or None), ``reason``.
    """

    def __init__(self, peer: int | None, reason: str) -> None:
        self.peer, self.reason = peer, reason
        super().__init__(f"lost the connection to {'a peer' if peer is None else f'rank {peer}'}: {reason}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.peer, self.reason)


def _named(stage: int, replica: int | None) -> str:
    return f"stage {stage}" if replica is None else f"stage {stage} of replica {replica}"


def _picklable(cause: BaseException | str) -> BaseException | str:
    """The exception itself where it survives a round of pickling, else its last line."""
    import cloudpickle

    try:
        cloudpickle.loads(cloudpickle.dumps(cause))
    except Exception:
        return "".join(traceback.format_exception_only(cause)).strip() if isinstance(cause, BaseException) else cause
    return cause


def _rebuild_stage_error(
    stage: int,
    action: str,
    step: int,
    cause: BaseException | str,
    chunk: int | None,
    microbatch: int | None,
    trace: str,
    replica: int | None = None,
) -> StageError:
    return StageError(stage, action, step, cause, chunk=chunk, microbatch=microbatch, trace=trace, replica=replica)
