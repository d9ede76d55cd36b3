"""The V: two chunks a stage, down the stages and up again, so that stage 0 holds the first chunk and the last.

Stage r of p holds chunk r, its half 0, and chunk 2p-1-r, its half 1. The last stage hands its first half's output to
its own second half, and the loss is on stage 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from .action import Action, Op

__all__ = ["chunk_of", "program_of"]


def chunk_of(half: int, stage: int, stages: int) -> int:
    """The chunk that is ``half`` (0 or 1) of ``stage``."""
    return 2 * stages - 1 - stage if half else stage


def program_of(steps: Iterable[str], stage: int, stages: int, microbatches: int) -> tuple[Action, ...]:
    """The program whose steps are an operation and a half each, such as ``F0`` or ``W1``.

    Each half counts its microbatches by itself: its forwards, its backwards (B and I together) and its weight gradients
    (B and W together). Steps of microbatches that there are not are left out; what is left still runs to its end, since
    no microbatch waits for another.

    Args:
        steps: the steps, in order, maybe of more microbatches.
        stage: the stage, from 0.
        stages: how many there are.
        microbatches: microbatches a step.
    """
    counts: Counter[tuple[str, str]] = Counter()
    program = []
    for step in steps:
        op, half = step[0], step[1]
        microbatch = counts["I" if op == "B" else op, half]
        for counted in "IW" if op == "B" else op:
            counts[counted, half] += 1
        if microbatch < microbatches:
            program.append(Action(chunk_of(int(half), stage, stages), Op(op), microbatch))
    return tuple(program)
