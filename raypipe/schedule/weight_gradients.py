"""Where W goes: 1F1B whose backwards are input gradients only, with the weight gradients some way behind.

Only the input gradient (I) is waited for by another stage. So the weight gradient (W) may run at any later time, and
fills the time in which a stage would wait.

Source: Qi et al., "Zero Bubble Pipeline Parallelism", 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

from .action import Action, Op

__all__ = ["weights_behind"]


def weights_behind(
    forwards: Sequence[Action], inputs: Sequence[Action], num_warmup: int, behind: int
) -> tuple[Action, ...]:
    """``num_warmup`` forwards, then in turn I, W and F while there are any, with W ``behind`` turns behind its I.

    At most min(n, num_warmup + behind) of the n forwards are in flight, all of it by the time of the first W.

    Args:
        forwards: the stage's forwards, in order.
        inputs: as many input gradients, in order; the weight gradients have the same order.
        num_warmup: forwards before the first I, at least 1.
        behind: how many input gradients wait for their weight gradient in the steady state.
    """
    program = [*forwards[:num_warmup]]
    for turn, action in enumerate(inputs):
        program.append(action)
        if turn >= behind:
            program.append(_weight(inputs[turn - behind]))
        program += forwards[num_warmup + turn : num_warmup + turn + 1]
    program += map(_weight, inputs[max(0, len(inputs) - behind) :])
    return tuple(program)


def _weight(action: Action) -> Action:
    return Action(action.chunk, Op.WEIGHT, action.microbatch)
