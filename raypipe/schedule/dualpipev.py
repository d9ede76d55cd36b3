"""DualPipeV: DualPipe cut in half, with two chunks a stage in a V; a forward stands beside a backward to overlap.

Source: the cut-in-half DualPipe of Sea AI Lab, from DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, and its public
code, DualPipe; the order is that of ``torch.distributed.pipelining``'s ``ScheduleDualPipeV``. Where the sources overlap
a forward with a backward, they follow each other here.
"""

from __future__ import annotations

from .action import Programs
from .v_shape import program_of

__all__ = ["dualpipev"]


def dualpipev(stages: int, microbatches: int) -> Programs:
    """The programs of DualPipeV: stage r holds chunks r and 2p-1-r.

    The steady state is pairs of a forward and a whole backward of the other half. Backwards are split in the warm-up
    and in the cool-down only, where another stage waits. Where a pair runs as one in the time of F&B, about
    (p/2-1)(F&B+B-3W) of a stage's time is idle. One after the other, with m at least 2p and F = I = W, a step takes
    (p-1)F/2 longer than a stage's work (F of a whole stage). Every stage holds 2p+1 chunks' activations at its peak,
    those of p + 1/2 whole stages; with fewer microbatches at most min(2m, 2p+1).

    Args:
        stages: p, at least 1.
        microbatches: m, at least 1; fewer than 2p run as the first of so many.

    Returns:
        For each stage its actions: 2m forwards and 2m backwards, whole or in two.
    """
    played = max(microbatches, 2 * stages)
    return tuple(program_of(_steps(stage, stages, played), stage, stages, microbatches) for stage in range(stages))


def _steps(stage: int, stages: int, microbatches: int) -> list[str]:
    """The steps of a stage, for at least 2p microbatches."""
    after, upto = stages - 1 - stage, stage + 1  # stages after this one; up to and with it
    warmup = ["F0"] * (2 * after) + ["F0", "F1"] * upto + ["I1", "W1", "F1"] * after
    steady = ["F0", "B1", "F1", "B0"] * (microbatches - 2 * stages + upto) + ["B1", "F1", "B0"] * after
    # The first half of the last backwards is whole; W of the others waits till there is nothing else to do.
    whole, split = ["B1", "B0"] * upto, ["I1", "I0"] * upto
    waiting = [step.replace("I", "W") for step in split[upto:] + ["I0"] * after]
    cooldown = whole[:upto] + split[upto:]
    for weight in waiting[:after]:
        cooldown += [weight, "I0"]
    return warmup + steady + cooldown + waiting[after:]
