"""1F1B: a backward as soon as it can run, so that few activations are alive.

Source: Narayanan et al., "PipeDream: Generalized Pipeline Parallelism for DNN Training", 2019; with a flush at the end
of the step ("Memory-Efficient Pipeline-Parallel DNN Training", 2021), so that it computes what GPipe computes.
"""

from __future__ import annotations

from .action import Action, Op, Programs

__all__ = ["one_f_one_b"]


def one_f_one_b(stages: int, microbatches: int) -> Programs:
    """The programs of 1F1B, one chunk a stage.

    With p stages and m microbatches of equal cost, a share (p-1)/(m+p-1) of the stages' time is idle, as in GPipe, but
    stage r holds the activations of min(m, p-r) microbatches at its peak.

    Args:
        stages: p, at least 1.
        microbatches: m, at least 1; fewer than stages is allowed.

    Returns:
        For each stage its 2m actions.
    """
    return tuple(_program(stage, stages, microbatches) for stage in range(stages))


def _program(stage: int, stages: int, microbatches: int) -> tuple[Action, ...]:
    num_warmup = min(microbatches, stages - stage - 1)
    forwards = [Action(stage, Op.FORWARD, microbatch) for microbatch in range(microbatches)]
    backwards = [Action(stage, Op.BACKWARD, microbatch) for microbatch in range(microbatches)]

    warmup = forwards[:num_warmup]
    steady = [action for pair in zip(forwards[num_warmup:], backwards, strict=False) for action in pair]
    cooldown = backwards[microbatches - num_warmup :]
    return (*warmup, *steady, *cooldown)
