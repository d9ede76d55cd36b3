"""Where a model is cut, and what each chunk then holds.

What is cut is the sequence of unit calls. A contiguous split that makes the heaviest chunk as light as possible is
found exactly, by dynamic programming (the classical linear partition problem).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from raypipe.errors import CutError
from raypipe.model.cuts import too_few_places
from raypipe.model.recording import Recording

__all__ = ["Chunk", "Partition", "check_balance", "lightest_split", "partition"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one chunk computes and holds.

    Attributes: ``units``, a name for each of its unit calls; ``parameters``, names of those that it holds; ``flops`` of
    its forward for the microbatch of the recording; ``boundary_bytes`` that it sends forward for it.
    """

    units: tuple[str, ...]
    parameters: tuple[str, ...]
    flops: int
    boundary_bytes: int


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
) -> Partition:
    """Cuts a recorded model into ``chunks`` chunks.

    Args:
        recording: of one microbatch, with FLOPs where they are to balance.
        unit_parameters: names of the parameters inside each unit.
        sizes: number of elements of each parameter.
        chunks: how many.
        balance: ``"flops"``, ``"parameters"``, or the number of unit calls in each chunk.

    Raises:
        ValueError: there are fewer unit calls than chunks, or a given balance does not add up.
        CutError: a given cut parts what has to stay in one chunk, or too few other cuts are left.
    """
    names = recording.names
    if chunks > len(names):
        raise ValueError(
            f"stages={chunks} is more than the {len(names)} units that this model can be cut into ({_some(names)}); "
            f"use at most {len(names)} stages, or name smaller units with units=[...]"
        )
    if isinstance(balance, str):
        if chunks > len(names) - len(recording.forbidden):
            raise CutError(too_few_places(names, recording.forbidden, chunks))
        counts = lightest_split(_costs(recording, unit_parameters, sizes, balance), chunks, recording.forbidden)
    else:
        counts = _given(balance, names, chunks)
    cuts = tuple(accumulate(counts))[:-1]
    windows = recording.windows(cuts)
    made = []
    for window in windows:
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
                sum(value.spec.nbytes for value in window.outputs),
            )
        )
    return Partition(cuts, tuple(made))


def lightest_split(costs: Sequence[float], parts: int, forbidden: Collection[int] = ()) -> tuple[int, ...]:
    """Lengths of ``parts`` contiguous, non-empty parts whose largest sum is the smallest possible.

    No part begins at an index in ``forbidden``; so many parts must be possible.
    """
    prefix = [0.0, *accumulate(costs)]
    best = [[float("inf")] * (len(costs) + 1) for _ in range(parts + 1)]
    choice = [[0] * (len(costs) + 1) for _ in range(parts + 1)]
    best[0][0] = 0.0
    for part in range(1, parts + 1):
        for end in range(part, len(costs) + 1):
            for start in range(part - 1, end):
                if start in forbidden:
                    continue
                worst = max(best[part - 1][start], prefix[end] - prefix[start])
                if worst < best[part][end]:
                    best[part][end], choice[part][end] = worst, start
    lengths, end = [], len(costs)
    for part in range(parts, 0, -1):
        start = choice[part][end]
        lengths.append(end - start)
        end = start
    return tuple(reversed(lengths))


def _costs(
    recording: Recording, unit_parameters: Mapping[str, Sequence[str]], sizes: Mapping[str, int], balance: str
) -> list[float]:
    """A cost for each unit call; what comes after a call, up to the next, belongs to it."""
    flops = [0.0] * len(recording.calls)
    parameters = [0.0] * len(recording.calls)
    call, seen = 0, set()
    for event in recording.events:
        names = list(event.parameters)
        if event.call is not None:
            call = event.call
            names += unit_parameters[event.name]
        flops[call] += event.flops
        parameters[call] += sum(sizes[name] for name in dict.fromkeys(names) if name not in seen)
        seen.update(names)
    if balance == "flops" and any(flops):
        # Equal FLOPs are told apart by a millionth of the parameters, so that an embedding is not free.
        return [flop + weight * 1e-6 for flop, weight in zip(flops, parameters, strict=True)]
    return parameters


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


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:3])}, ... {names[-1]}"


def check_balance(balance: object) -> str | Sequence[int]:
    """The ``balance`` argument, or one sentence about what is wrong with it."""
    if isinstance(balance, str):
        if balance in ("flops", "parameters"):
            return balance
        later = balance in ("time", "memory")
        raise ValueError(
            f"balance={balance!r} is {'not built yet' if later else 'unknown'}; use 'flops', 'parameters' or a list of "
            "unit calls for each chunk"
        )
    if isinstance(balance, (list, tuple)):
        return balance
    raise TypeError(f"balance is a {type(balance).__name__}; use 'flops', 'parameters' or a list of whole numbers")
