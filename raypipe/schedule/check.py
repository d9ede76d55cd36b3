"""The rules that every schedule keeps, the user's own too.

1. Each program computes something: forwards and backwards, no communication (that follows from the programs).
2. Chunks are numbered from 0 without gaps, each on one stage.
3. Each chunk and microbatch has one F and one backward: B, or I and W. A forward-only schedule has the F alone.
4. On its stage F comes before B and I, and I before W.
5. The backwards of a chunk run in microbatch order: B and I among themselves, B and W among themselves. Both add to
   gradients, so sums are in one order in every schedule, whatever the number of stages.
6. With asynchronous messages, nobody waits for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ..errors import ScheduleError
from .action import Action, Op, Programs
from .draw import draw_programs
from .dry_run import dry_run, needed_by
from .numbers import BACKWARD, FORWARD, INPUT, KINDS, OPS, WEIGHT, Plan, number_of

__all__ = ["check", "check_count"]


class _Fault(NamedTuple):
    sentence: str
    spots: tuple[tuple[int, int], ...] = ()
    missing: tuple[int, Action] | None = None


def check(name: str, programs: Programs, microbatches: int, forward_only: bool = False) -> None:
    """Holds the programs of a schedule against the rules above.

    Args:
        name: the schedule's name, for the error.
        programs: for each stage its actions.
        microbatches: how many microbatches a step has.
        forward_only: whether the schedule is one for evaluation, without backwards.

    Raises:
        ScheduleError: the first rule that is broken: one sentence, then the grid with the spot marked, as in ``>2F0<``.
    """
    check_count("microbatches", microbatches)
    plan = Plan(programs, microbatches, forward_only)
    for rule in _RULES:
        for fault in rule(plan):
            raise ScheduleError(f"schedule {name!r}: {fault.sentence}{_picture(plan, fault)}")


def check_count(name: str, value: object) -> None:
    """Holds that ``value`` is a positive int.

    Raises:
        TypeError: it is no int (a bool is none).
        ValueError: it is 0 or negative.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, but it must be an int of at least 1")
    if value < 1:
        raise ValueError(f"{name} is {value}, but it must be at least 1")


def _picture(plan: Plan, fault: _Fault) -> str:
    programs, spots = plan.programs, fault.spots
    if fault.missing is not None:
        stage, action = fault.missing
        spots = ((stage, len(programs[stage])),)
        programs = (*programs[:stage], (*programs[stage], action), *programs[stage + 1 :])
    return f"\n\n{draw_programs(programs, marks=spots, crop=True)}" if spots else ""


def _content(plan: Plan) -> Iterator[_Fault]:
    if not plan.programs:
        yield _Fault("it has no stages; give one program for each stage")
    for stage, program in enumerate(plan.programs):
        if not program:
            yield _Fault(f"stage {stage} has no actions; give it some, or leave the stage out")
    for stage, index, action in plan.actions():
        if not _is_action(action):
            yield _Fault(f"stage {stage} holds {action!r}, which is no Action; Action.parse makes one of a text")
        if not action.op.computes:
            yield _Fault(
                f"stage {stage} holds {action}, but messages follow from the programs; leave communication out",
                ((stage, index),),
            )
        if plan.forward_only and action.op is not Op.FORWARD:
            yield _Fault(f"stage {stage} computes {action}, but the schedule is forward-only", ((stage, index),))
        if action.microbatch >= plan.microbatches:
            yield _Fault(
                f"stage {stage} computes {action}, but microbatches are numbered 0 to {plan.microbatches - 1}",
                ((stage, index),),
            )


def _is_action(value: object) -> bool:
    # Programs may come from a user's function that no type checker has seen.
    return isinstance(value, Action)


def _placement(plan: Plan) -> Iterator[_Fault]:
    stage_of: dict[int, int] = {}
    for stage, index, action in plan.actions():
        first = stage_of.setdefault(action.chunk, stage)
        if first != stage:
            yield _Fault(
                f"chunk {action.chunk} is on stage {first} and, with {action}, on stage {stage}; "
                "keep each chunk on one stage",
                ((stage, index),),
            )
    if len(stage_of) == 1 + max(stage_of):
        return
    for stage, index, action in plan.actions():
        if action.chunk > 0 and action.chunk - 1 not in stage_of:
            yield _Fault(
                f"there is a chunk {action.chunk} but no chunk {action.chunk - 1}; number chunks from 0 without gaps",
                ((stage, index),),
            )


def _once(plan: Plan) -> Iterator[_Fault]:
    seen: set[int] = set()
    for stage, index, number in plan.numbered():
        if number in seen:
            yield _Fault(f"stage {stage} computes {plan.action(number)} twice; leave one out", ((stage, index),))
        for other in _excluded(number):
            if other in seen:
                yield _Fault(
                    f"stage {stage} computes {plan.action(other)} and {plan.action(number)}, but one backward is "
                    f"either B, or I and W; leave one out",
                    ((stage, index),),
                )
        seen.add(number)


def _excluded(number: int) -> tuple[int, ...]:
    """What cannot be computed where this action is."""
    kind = number % KINDS
    if kind == BACKWARD:
        return number - BACKWARD + INPUT, number - BACKWARD + WEIGHT
    return () if kind == FORWARD else (number - kind + BACKWARD,)


def _complete(plan: Plan) -> Iterator[_Fault]:
    seen = set[int]().union(*plan.numbers)
    stage_of = {action.chunk: stage for stage, _, action in plan.actions()}
    for chunk, stage in sorted(stage_of.items()):
        for microbatch in range(plan.microbatches):
            for kind in _lacking(seen, chunk * plan.microbatches + microbatch, plan.forward_only):
                action = Action(chunk, OPS[kind], microbatch)
                yield _Fault(
                    f"stage {stage} never computes {action}; add it (marked at the end here)", (), (stage, action)
                )


def _lacking(seen: set[int], place: int, forward_only: bool) -> Sequence[int]:
    """The kinds that a chunk and microbatch lack."""
    forwards = () if number_of(place, FORWARD) in seen else (FORWARD,)
    if forward_only or number_of(place, BACKWARD) in seen:
        return forwards
    halves = tuple(kind for kind in (INPUT, WEIGHT) if number_of(place, kind) not in seen)
    return (*forwards, *(halves if len(halves) < 2 else (BACKWARD,)))


def _local_order(plan: Plan) -> Iterator[_Fault]:
    seen: set[int] = set()
    for stage, index, number in plan.numbered():
        seen.add(number)
        kind = number % KINDS
        if kind != FORWARD:
            before = number - kind + (INPUT if kind == WEIGHT else FORWARD)
            if before not in seen:
                yield _Fault(
                    f"stage {stage} computes {plan.action(number)} before {plan.action(before)}; swap them",
                    ((stage, index),),
                )


def _sum_order(plan: Plan) -> Iterator[_Fault]:
    for half in (Op.INPUT, Op.WEIGHT):
        last: dict[int, Action] = {}
        for stage, index, action in plan.actions():
            if action.op is not Op.BACKWARD and action.op is not half:
                continue
            before = last.get(action.chunk)
            if before is not None and before.microbatch > action.microbatch:
                yield _Fault(
                    f"stage {stage} computes {before} before {action}, but the backwards of a chunk run in microbatch "
                    "order, so that gradients are summed in one order; sort them",
                    ((stage, index),),
                )
            last[action.chunk] = action


def _deadlock(plan: Plan) -> Iterator[_Fault]:
    blocked = dry_run(plan.programs).blocked
    if not blocked:
        return
    chunks = 1 + max(action.chunk for _, _, action in plan.actions())
    waits = []
    for stage, index in sorted(blocked.items()):
        action = plan.programs[stage][index]
        message = needed_by(action, chunks)
        if message is not None:
            what = "the gradient" if message.gradient else "the activations"
            waits.append(f"stage {stage} waits at {action} for {what} of chunk {message.chunk}")
    shown = ", ".join(waits[:4]) + (f", and {len(waits) - 4} more stages wait" if len(waits) > 4 else "")
    yield _Fault(
        f"it deadlocks: {shown}; move what is waited for forward in its program", tuple(sorted(blocked.items()))
    )


_RULES: tuple[Callable[[Plan], Iterator[_Fault]], ...] = (
    _content,
    _placement,
    _once,
    _complete,
    _local_order,
    _sum_order,
    _deadlock,
)
