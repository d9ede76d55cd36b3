"""ZB-H1 and ZB-H2: 1F1B whose weight gradients fill the time in which a stage would wait, one chunk a stage.

Source: Qi et al., "Zero Bubble Pipeline Parallelism", 2023: the two schedules that its section 2 makes by hand.
"""

from __future__ import annotations

from .action import Action, Op, Programs
from .weight_gradients import weights_behind

__all__ = ["zb_h1", "zb_h2"]


def zb_h1(stages: int, microbatches: int) -> Programs:
    """The programs of ZB-H1, which holds what 1F1B's first stage holds.

    With p stages and m microbatches, at least p, (p-1)(F+I-W) of a stage's time is idle where W is at most F and I: a
    third of 1F1B's where they are equal. Every stage holds the activations of min(m, p) microbatches at its peak.

    Args:
        stages: p, at least 1.
        microbatches: m, at least 1; fewer than stages are allowed.

    Returns:
        For each stage its 3m actions.
    """
    return tuple(_program(stage, microbatches, num_warmup=stages - stage, behind=stage) for stage in range(stages))


def zb_h2(stages: int, microbatches: int) -> Programs:
    """The programs of ZB-H2, which fills the warm-up with forwards and the cool-down with weight gradients.

    With p stages and m microbatches, at least 2p-1, a stage idles at most (p-1)(F+I-2W) between its first and its last
    action where W is at most F and I: not at all where they are equal. The stages start one after another and end so
    too: a step takes up to (p-1)F longer than that, time that only the next step's work can fill. Every stage holds the
    activations of min(m, 2p-1) microbatches at its peak.

    Args:
        stages: p, at least 1.
        microbatches: m, at least 1; fewer than stages are allowed.

    Returns:
        For each stage its 3m actions.
    """
    return tuple(
        _program(stage, microbatches, num_warmup=2 * (stages - stage) - 1, behind=2 * stage) for stage in range(stages)
    )


def _program(stage: int, microbatches: int, num_warmup: int, behind: int) -> tuple[Action, ...]:
    forwards = [Action(stage, Op.FORWARD, microbatch) for microbatch in range(microbatches)]
    inputs = [Action(stage, Op.INPUT, microbatch) for microbatch in range(microbatches)]
    return weights_behind(forwards, inputs, num_warmup, behind)
