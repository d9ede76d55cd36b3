"""``schedule="auto"``: which schedules may be chosen from, and by what limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .catalog import chunks_of, names

__all__ = ["Auto"]

_INTERLEAVED = (2, 3, 4)
"""Chunks a stage that are tried where a schedule takes any number."""


@dataclass(frozen=True, slots=True)
class Auto:
    """Asks for the schedule with the least simulated makespan, of those that fit the memory.

    Every candidate is simulated with the times of the model's units as they are measured before the run, forward, input
    gradient and weight gradient apart, with messages of the boundaries' bytes, and with the bytes that each
    stage would hold.

    Raises:
        TypeError: a limit that is no number, or candidates that are no names.
        ValueError: a limit that is not positive, or an unknown name.
    """

    memory_bytes: float | None = None
    """What one stage may hold at its peak, in bytes; None: the memory of a GPU, or on CPUs this machine's, shared by
    its stages."""
    candidates: Sequence[str] | None = None
    """Names to choose from; None: all."""
    latency: float = 3e-4
    """Of a message between two stages, in seconds (measured: processes of one machine over TCP)."""
    bandwidth: float = 1.4e9
    """Of a channel, in bytes a second (measured likewise)."""

    def __post_init__(self) -> None:
        limits = {"memory_bytes": self.memory_bytes, "latency": self.latency, "bandwidth": self.bandwidth}
        for name, value in limits.items():
            if not (value is None and name == "memory_bytes"):
                _check_limit(name, value)
        if self.candidates is not None:
            if not isinstance(self.candidates, (list, tuple)) or not self.candidates:
                raise TypeError(f"candidates is {self.candidates!r}, but it must be names such as ('1f1b', 'zbv')")
            for name in self.candidates:
                chunks_of(name)
            object.__setattr__(self, "candidates", tuple(self.candidates))

    def tried(self, chunks: int | None) -> list[tuple[str, int]]:
        """The schedules to choose from: names with their chunks a stage.

        Args:
            chunks: the only number that is wanted, if any.
        """
        found = []
        for name in self.candidates or names():
            numbers = (chunks,) if chunks is not None else (chunks_of(name), *_INTERLEAVED)
            found += [(name, number) for number in dict.fromkeys(numbers) if _takes(name, number)]
        return found


def _check_limit(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, but it must be a number")
    if not math.isfinite(value) or value < 0 or (value == 0 and name != "latency"):
        raise ValueError(f"{name} is {value!r}, but it must be positive")


def _takes(name: str, chunks: int) -> bool:
    try:
        return chunks_of(name, chunks) == chunks
    except ValueError:
        return False
