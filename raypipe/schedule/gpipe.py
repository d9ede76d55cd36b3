"""GPipe: all forwards, then all backwards.

Source: Huang et al., "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism", 2019. The
backwards run in microbatch order here, as in every schedule of raypipe, so that gradients are summed in one order.
"""

from __future__ import annotations

from .action import Action, Op, Programs

__all__ = ["gpipe"]


def gpipe(stages: int, microbatches: int) -> Programs:
    """GPipe's programs, one chunk a stage.

    With p stages and m microbatches of equal cost, a share (p-1)/(m+p-1) of the stages' time is idle, and every stage
    holds the activations of m microbatches at its peak.

    Args:
        stages: p, at least 1.
        microbatches: m, at least 1.

    Returns:
        For each stage its 2m actions.
    """
    return tuple(
        tuple(Action(stage, op, microbatch) for op in (Op.FORWARD, Op.BACKWARD) for microbatch in range(microbatches))
        for stage in range(stages)
    )
