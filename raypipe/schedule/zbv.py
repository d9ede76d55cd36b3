"""ZB-V: zero bubble in the memory of 1F1B, with two chunks a stage in a V.

Source: Qi et al., "Zero Bubble Pipeline Parallelism", 2023, section 6; the order is that of
``torch.distributed.pipelining``'s ``ScheduleZBVZeroBubble``.
"""

from __future__ import annotations

from .action import Programs
from .v_shape import program_of

__all__ = ["zbv"]


def zbv(stages: int, microbatches: int) -> Programs:
    """The programs of ZB-V: stage r holds chunks r and 2p-1-r.

    With p stages and m microbatches, at least 2p-1, no stage idles between its first and its last action where
    F = I = W. A step takes (p-1)F/2 longer than a stage's work (F of a whole stage). Every stage holds 2p chunks'
    activations at its peak, those of p whole stages; with fewer microbatches at most min(2m, 2p).

    Args:
        stages: p, at least 1.
        microbatches: m, at least 1; fewer than 2p-1 run as the first of so many.

    Returns:
        For each stage its 6m actions.
    """
    played = max(microbatches, 2 * stages - 1)
    return tuple(program_of(_steps(stage, stages, played), stage, stages, microbatches) for stage in range(stages))


def _steps(stage: int, stages: int, microbatches: int) -> list[str]:
    """The steps of a stage, for at least 2p-1 microbatches."""
    after, before = stages - 1 - stage, stage  # stages after this one, and before it
    turns = microbatches - stages
    warmup = ["F0"] * (2 * after + 1) + ["F1", "F0"] * before + ["F1", "I1", "W1"] * (after + 1)
    turn = ["I0", "W0", "F1", "I1", "W1"]
    steady = ["F0", *turn] * (turns - after) + turn * after  # at the end no forward is left in the first half
    cooldown = ["I0", "I1"] * before + ["I0", "W0"] * (after + 1) + ["W1"] * before + ["W0"] * before
    return warmup + steady + cooldown
