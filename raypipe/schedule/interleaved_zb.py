"""Interleaved zero-bubble: interleaved 1F1B whose weight gradients fill the time in which a stage would wait.

Source: ZB-H1 of Qi et al., "Zero Bubble Pipeline Parallelism", 2023, with several chunks a stage, as
``torch.distributed.pipelining`` has it in its ``ScheduleInterleavedZeroBubble``.
"""

from __future__ import annotations

from .action import Op, Programs
from .interleaved import largest_round, turns
from .weight_gradients import weights_behind

__all__ = ["interleaved_zb"]


def interleaved_zb(stages: int, microbatches: int, chunks: int = 2) -> Programs:
    """The programs of interleaved zero-bubble: stage r holds chunks r, p+r, 2p+r and so on.

    With p stages, v chunks a stage and m microbatches, at least p, (p-1)(F+I-W)/v of each stage's time is idle where W
    is at most F and I (those of a whole stage). Every stage holds min(vm, (v-1)g + p) chunks' activations at its peak,
    where g is ``largest_round(p, m)``: those of p whole stages where g = p.

    Args:
        stages: p, at least 1.
        microbatches: m, at least 1; fewer than stages and no multiple of them are allowed.
        chunks: v, chunks a stage, at least 1; with 1 it is ZB-H1.

    Returns:
        For each stage its 3vm actions.
    """
    most = (chunks - 1) * largest_round(stages, microbatches) + stages
    return tuple(
        weights_behind(
            turns(stage, stages, microbatches, chunks, Op.FORWARD),
            turns(stage, stages, microbatches, chunks, Op.INPUT),
            num_warmup=most - stage,
            behind=stage,
        )
        for stage in range(stages)
    )
