"""What a stage keeps for its backwards, at the peak: a stage runs one action at a time, so its order alone tells."""

from __future__ import annotations

from collections.abc import Sequence

from .action import Action, Op, Programs

__all__ = ["peak_bytes", "peak_bytes_again", "peak_in_flight"]


def peak_in_flight(programs: Programs) -> tuple[int, ...]:
    """For each stage the most microbatches whose forward has started and whose backward has not ended.

    A stage with several chunks counts a microbatch once for each of them that holds it. Forward-only, nothing is kept
    from one microbatch to the next.
    """
    return tuple(_in_flight(program) for program in programs)


def peak_bytes(programs: Programs, kept: Sequence[float], input_share: float = 0.0) -> tuple[float, ...]:
    """For each stage the most bytes that its chunks keep at one time.

    Args:
        programs: for each stage its actions.
        kept: for each chunk what it keeps of one microbatch, from its forward until B or W has ended.
        input_share: which share of it, 0 to 1, I gives back.
    """
    return tuple(_bytes(program, kept, input_share) for program in programs)


def peak_bytes_again(
    programs: Programs, kept: Sequence[float], again: Sequence[float], redone: Sequence[float]
) -> tuple[float, ...]:
    """The same where units of a chunk run again in their backward.

    Args:
        programs: for each stage its actions.
        kept: for each chunk what it keeps of one microbatch, from its forward until B or W has ended.
        again: for each chunk what comes on top while B runs: the largest unit's.
        redone: for each chunk what comes on top from the begin of I to the end of W: all of its units'.
    """
    return tuple(_bytes_again(program, kept, again, redone) for program in programs)


def _bytes_again(
    program: Sequence[Action], kept: Sequence[float], again: Sequence[float], redone: Sequence[float]
) -> float:
    alive = peak = 0.0
    keeps = _keeps(program)
    for action in program:
        chunk = action.chunk
        if action.op is Op.FORWARD:
            alive = alive + kept[chunk] if keeps else kept[chunk]
        elif action.op is Op.INPUT:
            alive += redone[chunk]
        elif action.op is Op.WEIGHT:
            alive -= kept[chunk] + redone[chunk]
        else:
            peak = max(peak, alive + again[chunk])
            alive -= kept[chunk]
        peak = max(peak, alive)
    return peak


def _in_flight(program: Sequence[Action]) -> int:
    forward, inputs = Op.FORWARD, Op.INPUT
    alive = peak = 0
    keeps = _keeps(program)
    for action in program:
        op = action.op
        if op is forward:
            alive = alive + 1 if keeps else 1
            if alive > peak:
                peak = alive
        elif op is not inputs:
            alive -= 1
    return peak


def _bytes(program: Sequence[Action], kept: Sequence[float], input_share: float) -> float:
    if not _keeps(program):
        return max((kept[action.chunk] for action in program), default=0.0)
    forward, inputs, weights = Op.FORWARD, Op.INPUT, Op.WEIGHT
    whole = {action.chunk: 0 for action in program}  # microbatches of which all is kept
    rest = dict.fromkeys(whole, 0)  # those of which I has given its share back
    peak = 0.0
    for action in program:
        chunk, op = action.chunk, action.op
        if op is forward:
            whole[chunk] += 1
            # From the counts each time, so that sums of fractions do not drift.
            alive = sum(kept[c] * (whole[c] + (1 - input_share) * rest[c]) for c in whole)
            if alive > peak:
                peak = alive
        elif op is inputs:
            whole[chunk] -= 1
            rest[chunk] += 1
        elif op is weights:
            rest[chunk] -= 1
        else:
            whole[chunk] -= 1
    return peak


def _keeps(program: Sequence[Action]) -> bool:
    forward = Op.FORWARD
    return any(action.op is not forward for action in program)
