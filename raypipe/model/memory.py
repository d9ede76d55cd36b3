"""The memory of a stage by kind: weights, gradients, optimizer, activations in flight, and receives posted ahead.

The accounting is the classical one. A parameter has its weight, its gradient and the optimizer's state; AdamW in mixed
precision makes 16 bytes of that (Rajbhandari et al., ZeRO, 2020), and so does AdamW in float32. Activations are what
autograd saved for one microbatch, times the microbatches that the schedule has in flight (Korthikanti et al., 2022),
with the received values and those sent, from which gradients go back. A unit that runs again in its backward keeps its
arguments instead, and what it saves counts while it runs again: for one unit at a time, the largest. What an action
needs besides only while it runs, and the process itself, are not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raypipe.model.recording import Recording
from raypipe.model.saved import Saved

__all__ = ["Bytes", "ParameterBytes", "Sizes", "windows_from", "worst_case"]


@dataclass(frozen=True, slots=True)
class ParameterBytes:
    """Bytes of a parameter's weight, gradient and optimizer state; the last two are 0 where it is frozen."""

    weight: int
    gradient: int = 0
    optimizer: int = 0


@dataclass(frozen=True, slots=True)
class Bytes:
    """Bytes of what a chunk holds.

    Attributes: ``weights`` with buffers; ``gradients``; ``optimizer``; ``activations`` of one microbatch; ``received``,
    one message from each side; ``again``, what the largest unit that runs again saves beside its arguments; ``redone``,
    that of all of them together.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    received: int = 0
    again: int = 0
    redone: int = 0

    def total(self, in_flight: int, ahead: int) -> int:
        """All together, with so many microbatches in flight and receives posted ahead."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.activations * in_flight
            + self.received * min(ahead, in_flight)
            + self.again
        )


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the sizes of chunks are made of.

    Attributes: ``recording``; ``saved`` during it, or None where nothing is trained; ``unit_parameters``, names by
    unit; ``parameters``, bytes by name; ``unit_buffers``, bytes by unit; ``everywhere``, bytes that every chunk holds;
    ``again``, the events of unit calls that run again in their backward.
    """

    recording: Recording
    saved: Saved | None
    unit_parameters: Mapping[str, Sequence[str]]
    parameters: Mapping[str, ParameterBytes]
    unit_buffers: Mapping[str, int]
    everywhere: int = 0
    again: frozenset[int] = frozenset()

    def kept(self, number: int) -> Mapping[int, int]:
        """The pieces of memory that an event keeps for its backward, with their bytes."""
        if self.saved is None:
            return {}
        return (self.saved.arguments if number in self.again else self.saved.by_event).get(number, {})

    def redone(self, number: int) -> int:
        """The bytes that an event saves only when it runs again."""
        return self.saved.beside_arguments(number) if self.saved is not None and number in self.again else 0

    def buffers(self, units: Iterable[str]) -> int:
        """Bytes of the buffers that a process with these units holds."""
        return sum(self.unit_buffers.get(unit, 0) for unit in set(units)) + self.everywhere


def windows_from(sizes: Sizes, start: int) -> Iterator[Bytes]:
    """The bytes of the chunks that begin with unit call ``start``, by their length: 1, 2, ... unit calls."""
    recording = sizes.recording
    edges = [0, *recording.calls[1:], len(recording.events)]
    incoming = recording.live(edges[start]) if start else ()
    memory: dict[int, int] = {}
    if sizes.saved is not None:
        memory.update((sizes.saved.of_value(v), v.spec.nbytes) for v in incoming if v.requires_grad)
    received = sum(recording.travels(v).nbytes for v in incoming)
    arrived = {sizes.saved.of_value(v): v.spec.nbytes for v in incoming} if sizes.saved is not None else {}
    names: set[str] = set()
    units: set[str] = set()
    redone: list[int] = [0]
    for end in range(start, len(edges) - 1):
        for number in range(edges[end], edges[end + 1]):
            event = recording.events[number]
            names.update(event.parameters)
            if event.call is not None:
                units.add(event.name)
                names.update(sizes.unit_parameters[event.name])
            memory.update((piece, arrived.get(piece, count)) for piece, count in sizes.kept(number).items())
            redone.append(sizes.redone(number))
        outgoing = recording.live(edges[end + 1]) if end + 2 < len(edges) else ()
        kept, back = dict(memory), 0
        if sizes.saved is not None:
            trained = [v for v in outgoing if v.requires_grad]
            kept.update((sizes.saved.of_value(v), v.spec.nbytes) for v in trained)
            back = sum(recording.travels(v).nbytes for v in trained)
        # A unit's buffer that is read elsewhere is small (segments, positions) and not counted twice.
        held = [sizes.parameters[name] for name in names if name in sizes.parameters]
        yield Bytes(
            sum(p.weight for p in held) + sizes.buffers(units),
            sum(p.gradient for p in held),
            sum(p.optimizer for p in held),
            sum(kept.values()),
            received + back,
            max(redone),
            sum(redone),
        )


def worst_case(sizes: Sizes, in_flight: Sequence[int], ahead: int) -> Callable[[int], NDArray[np.float64]]:
    """What chunks cost in memory, as ``split.best_split`` asks for it.

    Args:
        sizes: of the model.
        in_flight: the most microbatches in flight of each chunk.
        ahead: receives that a rank posts ahead.
    """
    length = len(sizes.recording.calls)
    found = [list(windows_from(sizes, start)) for start in range(length)]
    tables: dict[int, NDArray[np.float64]] = {}

    def table(part: int) -> NDArray[np.float64]:
        count = in_flight[part]
        if count not in tables:
            tables[count] = np.zeros((length + 1, length + 1))
            for start, row in enumerate(found):
                for more, size in enumerate(row, start=start + 1):
                    tables[count][start, more] = size.total(count, ahead)
        return tables[count]

    return table
