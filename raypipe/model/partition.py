"""Where a model is cut, and what each chunk then holds.

What is cut is the sequence of unit calls. A contiguous split that makes the costliest stage as cheap as possible is
found (exactly where a stage holds one chunk: split.py, split_stages.py), by what ``balance`` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from raypipe.errors import CutError
from raypipe.model.cost import CallTime, call_costs
from raypipe.model.cuts import too_few_places
from raypipe.model.recording import Recording
from raypipe.model.split import best_split
from raypipe.model.split_stages import staged_split

__all__ = ["Chunk", "Partition", "check_balance", "partition"]

BALANCES = ("flops", "parameters", "time", "memory")
_BALANCES = ", ".join(map(repr, BALANCES))


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one chunk computes and holds.

    Attributes: ``units``, a name for each of its unit calls; ``parameters``, names of those that it holds; ``flops`` of
    its forward for the microbatch of the recording, and ``backward_flops``; ``boundary_bytes`` that it sends forward
    for it; ``time`` of both, where it was measured; ``buffers``, names of units' buffers that it reads outside of their
    units.
    """

    units: tuple[str, ...]
    parameters: tuple[str, ...]
    flops: int
    boundary_bytes: int
    backward_flops: int = 0
    time: CallTime | None = None
    buffers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Partition:
    """The cut of a model.

    Attributes: ``cuts``, the unit call that each chunk but the first starts with; ``chunks``; ``shared``, for each
    parameter that several chunks hold, their numbers.
    """

    cuts: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def shared(self) -> dict[str, tuple[int, ...]]:
        """The chunks that hold each parameter that several hold."""
        holders: dict[str, list[int]] = {}
        for number, chunk in enumerate(self.chunks):
            for name in chunk.parameters:
                holders.setdefault(name, []).append(number)
        return {name: tuple(chunks) for name, chunks in holders.items() if len(chunks) > 1}


def partition(
    recording: Recording,
    unit_parameters: Mapping[str, Sequence[str]],
    sizes: Mapping[str, int],
    chunks: int,
    balance: str | Sequence[int] = "flops",
    *,
    placement: Sequence[int] | None = None,
    times: Sequence[CallTime] | None = None,
    memory: Callable[[int], NDArray[np.float64]] | None = None,
) -> Partition:
    """Cuts a recorded model into ``chunks`` chunks.

    Args:
        recording: of one microbatch, with FLOPs where they are to balance.
        unit_parameters: names of the parameters inside each unit.
        sizes: number of elements of each parameter.
        chunks: how many.
        balance: ``"flops"``, ``"parameters"``, ``"time"``, ``"memory"``, or the number of unit calls in each chunk.
        placement: the stage of each chunk, where a stage holds several; None: one each.
        times: of each unit call, where they are to balance.
        memory: by chunk, what it would hold (see ``memory.worst_case``), where that is to balance.

    Raises:
        ValueError: there are fewer unit calls than chunks, or a given balance does not add up.
        CutError: a given cut parts what has to stay in one chunk, or too few other cuts are left.
    """
    names = recording.names
    if chunks > len(names):
        raise ValueError(_too_many(chunks, len(set(placement or range(chunks))), names))
    if isinstance(balance, str):
        if chunks > len(names) - len(recording.forbidden):
            raise CutError(too_few_places(names, recording.forbidden, chunks))
        if balance == "memory" and memory is not None:
            counts = best_split(memory, len(names), chunks, recording.forbidden)
        else:
            costs = call_costs(recording, unit_parameters, sizes, balance, times)
            counts = staged_split(costs, placement or range(chunks), recording.forbidden)
    else:
        counts = _given(balance, names, chunks)
    cuts = tuple(accumulate(counts))[:-1]
    return Partition(cuts, _chunks(recording, unit_parameters, sizes, cuts, times))


def _chunks(
    recording: Recording,
    unit_parameters: Mapping[str, Sequence[str]],
    sizes: Mapping[str, int],
    cuts: tuple[int, ...],
    times: Sequence[CallTime] | None,
) -> tuple[Chunk, ...]:
    made = []
    for window in recording.windows(cuts):
        events = recording.events[window.start : window.end]
        held: dict[str, None] = {}
        for event in events:
            held.update(dict.fromkeys(event.parameters))
            if event.call is not None:
                held.update(dict.fromkeys(unit_parameters[event.name]))
        made.append(
            Chunk(
                tuple(event.name for event in events if event.call is not None),
                tuple(name for name in sizes if name in held),
                sum(event.flops for event in events),
                sum(recording.travels(value).nbytes for value in window.outputs),
                sum(event.backward_flops for event in events),
                None if times is None else _sum(times[event.call] for event in events if event.call is not None),
                tuple(name for name in held if name not in sizes),
            )
        )
    return tuple(made)


def _sum(times: Iterable[CallTime]) -> CallTime:
    return sum(times, CallTime(0.0, 0.0))


def _given(balance: Sequence[int], names: Sequence[str], chunks: int) -> tuple[int, ...]:
    if len(balance) != chunks:
        raise ValueError(
            f"balance={list(balance)} has {len(balance)} entries for {chunks} chunks; give one for each chunk"
        )
    if any(not isinstance(count, int) or isinstance(count, bool) or count < 1 for count in balance):
        raise ValueError(f"balance={list(balance)} must be whole numbers of at least 1: unit calls for each chunk")
    if sum(balance) != len(names):
        raise ValueError(
            f"balance={list(balance)} sums to {sum(balance)}, but the model has {len(names)} unit calls "
            f"({_some(names)})"
        )
    return tuple(balance)


def _too_many(chunks: int, stages: int, names: Sequence[str]) -> str:
    each = chunks // stages
    asked = f"stages={stages}" if each == 1 else f"stages={stages} with {each} chunks each"
    room = len(names) // each
    most = f"use at most {room} stage{'s' if room > 1 else ''}" if room else "use another schedule"
    return (
        f"{asked} is more than the {len(names)} units that this model can be cut into ({_some(names)}); {most}, or "
        "name smaller units with units=[...]"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:3])}, ... {names[-1]}"


def check_balance(balance: object) -> str | Sequence[int]:
    """The ``balance`` argument, or one sentence about what is wrong with it."""
    if isinstance(balance, str):
        if balance in BALANCES:
            return balance
        raise ValueError(f"balance={balance!r} is unknown; use {_BALANCES} or a list of unit calls for each chunk")
    if isinstance(balance, (list, tuple)):
        return balance
    raise TypeError(f"balance is a {type(balance).__name__}; use {_BALANCES} or a list of whole numbers")
