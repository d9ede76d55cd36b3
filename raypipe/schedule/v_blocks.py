"""V-half and V-min: a half and a third of 1F1B's activations, with two chunks a stage in a V.

Both repeat one building block, the six actions of a microbatch on a stage, every six time slots. How long a block holds
its activations decides how many blocks are in flight at a time.

Source: Qi et al., "Pipeline Parallelism with Controllable Memory", 2024; the slots of the blocks are those of its
authors' public code, zero-bubble-pipeline-parallelism.
"""

from __future__ import annotations

from collections import deque

from .action import Action, Op, Programs
from .squeeze import squeeze
from .v_shape import chunk_of

__all__ = ["v_half", "v_min"]

_PERIOD = 6
"""Slots from a microbatch to the next one: F, I and W of two halves."""


def v_half(stages: int, microbatches: int) -> Programs:
    """The programs of V-half: stage r holds chunks r and 2p-1-r.

    A stage holds at most 2 floor((p+2)/2) chunks' activations at its peak, those of about p/2 whole stages. With m at
    least p and F = I = W a step takes 7(p-1)/4 forwards of a whole stage longer than a stage's work where p is odd,
    (7p-10)/4 where it is even; 1F1B takes 3(p-1). No microbatch adds to that where W+2F >= 2I and W+2I >= 2F.

    Args:
        stages: p, at least 1.
        microbatches: m, at least 1; fewer than stages are allowed.

    Returns:
        For each stage its 6m actions.
    """
    p, delay = stages, 3 * (stages % 2 == 0)
    blocks = [(2 * r, 3 * p - 2 - r, 3 * p - 1 + delay + 2 * r, 6 * p - 2 + delay - r) for r in range(p)]
    return _programs(blocks, microbatches, most=2 * ((p + 2) // 2))


def v_min(stages: int, microbatches: int) -> Programs:
    """The programs of V-min: stage r holds chunks r and 2p-1-r.

    A stage holds at most 2 floor((p+4)/3) chunks' activations at its peak, those of about p/3 whole stages. With m at
    least p, p above 1 and F = I = W a step takes at most 2p - 5/2 forwards of a whole stage longer than a stage's work.
    Where F, I and W differ its stages wait for each other at every microbatch.

    Args:
        stages: p, at least 1.
        microbatches: m, at least 1; fewer than stages are allowed.

    Returns:
        For each stage its 6m actions.
    """
    p, delay = stages, 2 * (stages % 3 == 0)
    blocks = [(r, 2 * p - 1 - r, 2 * p + delay + r, 4 * p - 1 + delay - r) for r in range(p)]
    return _programs(blocks, microbatches, most=2 * ((p + 4) // 3))


def _programs(blocks: list[tuple[int, int, int, int]], microbatches: int, most: int) -> Programs:
    """The programs of blocks: for each stage the slots of the first microbatch's F0, F1, I1 and I0."""
    kinds = ((0, Op.FORWARD), (1, Op.FORWARD), (1, Op.INPUT), (0, Op.INPUT))
    rows = []
    for stage, block in enumerate(blocks):
        row: dict[int, Action] = {}
        for first, (half, op) in zip(block, kinds, strict=True):
            chunk = chunk_of(half, stage, len(blocks))
            # The delays above are such that no two of a stage's slots are equal modulo the period.
            row |= {first + _PERIOD * number: Action(chunk, op, number) for number in range(microbatches)}
        rows.append(_with_weights(row))
    # As in the source: steady from stage 0's first I0 to its last F0.
    steady = range(blocks[0][3], blocks[0][0] + _PERIOD * (microbatches - 1) + 1)
    return squeeze(rows, most, steady)


def _with_weights(row: dict[int, Action]) -> dict[int, Action]:
    """``row`` with the weight gradients in the free slots, first come, first served."""
    full: dict[int, Action] = {}
    waiting: deque[Action] = deque()
    slot, last = 0, max(row)
    while slot <= last or waiting:
        if slot in row:
            full[slot] = action = row[slot]
            if action.op is Op.INPUT:
                waiting.append(Action(action.chunk, Op.WEIGHT, action.microbatch))
        elif waiting:
            full[slot] = waiting.popleft()
        slot += 1
    return full
