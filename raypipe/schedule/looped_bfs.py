"""Looped breadth-first: GPipe with several chunks a stage; all microbatches go through a chunk before the next one.

Source: Lamy-Poirier, "Breadth-First Pipeline Parallelism", 2022. The backwards run in microbatch order here, as in
every schedule of raypipe, so that gradients are summed in one order.
"""

from __future__ import annotations

from .action import Action, Op, Programs

__all__ = ["looped_bfs"]


def looped_bfs(stages: int, microbatches: int, chunks: int = 2) -> Programs:
    """The programs of looped breadth-first: stage r holds chunks r, p+r, 2p+r and so on.

    With p stages, v chunks a stage and m microbatches of equal cost, at least p, (p-1)(F+B)/v of each stage's time is
    idle (F and B are a whole stage's), and every stage holds all vm chunks' activations at its peak, those of m whole
    stages. A chunk's forwards and its backwards each run in one go, so sharded parameters are gathered twice a step.

    Args:
        stages: p, at least 1.
        microbatches: m, at least 1; fewer than stages are allowed.
        chunks: v, chunks a stage, at least 1; with 1 it is GPipe.

    Returns:
        For each stage its 2vm actions.
    """
    programs = []
    for stage in range(stages):
        own = range(stage, stages * chunks, stages)
        forwards = [Action(chunk, Op.FORWARD, microbatch) for chunk in own for microbatch in range(microbatches)]
        backwards = [
            Action(chunk, Op.BACKWARD, microbatch) for chunk in own[::-1] for microbatch in range(microbatches)
        ]
        programs.append((*forwards, *backwards))
    return tuple(programs)
