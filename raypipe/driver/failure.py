"""From what is known of the ranks to one decision and one error. Pure: no Ray, no clock.

Errors in order of precedence. A rank that fails closes its channels, so most ranks of a failed step report only that a
neighbour went away; whatever is higher in this list explains what is below it:

    1. an error of the code on a rank: StageError, CutError, BatchError, ...
    2. StageLost
    3. StageStuck
    4. PeerLost, or a StageError whose cause is one
"""

from __future__ import annotations

from enum import Enum

from raypipe.driver.status import GroupStatus
from raypipe.errors import NonFiniteError, PeerLost, StageError, StageLost, StageStuck, StepError

__all__ = ["Decision", "decide", "explains", "first_cause"]

CODE, LOST, STUCK, SECONDARY = range(4)


class Decision(Enum):
    """What to do about a failed step."""

    RETRY = "retry"
    """Tear the gang down and start it again from the last committed checkpoint."""
    RAISE = "raise"
    """Give the first cause to the user."""


def decide(status: GroupStatus, budget: int) -> Decision:
    """Whether a failure is worth another start.

    Args:
        status: what is known of the ranks; at least one has failed.
        budget: how many restarts are left, as ``FailureConfig.max_failures`` counts them; negative: without end.

    Returns:
        RAISE where no restart is left, or where the model or the batch itself was refused or gave numbers that are not
        finite: that would fail again.
    """
    cause = first_cause(status)
    if budget == 0 or isinstance(cause, NonFiniteError) or not isinstance(cause, StepError):
        return Decision.RAISE
    return Decision.RETRY


def first_cause(status: GroupStatus) -> BaseException:
    """The error that explains the others; among equals that of the lowest rank.

    Raises:
        ValueError: no rank has failed.
    """
    errors = status.errors
    if not errors:
        raise ValueError("no rank has failed, so there is no first cause")
    return min(errors.values(), key=_precedence)


def explains(status: GroupStatus) -> bool:
    """Whether some rank has failed by itself, not merely because another went away."""
    return any(_precedence(error)[0] != SECONDARY for error in status.errors.values())


def _precedence(error: BaseException) -> tuple[int, int]:
    if isinstance(error, PeerLost):
        # Below a StageError around the same news, which knows the action.
        return SECONDARY, True
    if isinstance(error, StageError) and isinstance(error.cause, PeerLost):
        return SECONDARY, False
    if isinstance(error, StageLost):
        return LOST, False
    if isinstance(error, StageStuck):
        return STUCK, False
    # A backward carries a NaN from the last parameter of the model to the first.
    return CODE, -error.position if isinstance(error, NonFiniteError) else 0
