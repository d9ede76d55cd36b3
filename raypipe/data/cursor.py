"""Where a run is in its data, and what a source of data is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Cursor", "Source"]


@dataclass(frozen=True, slots=True)
class Cursor:
    """How much of its data a run has consumed: all that a checkpoint needs to go on with the same batches.

    Attributes:
        epoch: number of the epoch, from 0.
        seed: the run's seed; with the epoch it decides the order of the data.
        offset: what is consumed of the epoch, in the source's own unit: rows of a Parquet source, else batches.
    """

    epoch: int = 0
    seed: int = 0
    offset: int = 0

    def __post_init__(self) -> None:
        for name in ("epoch", "seed", "offset"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"a cursor's {name} is {value!r}, but it is a whole number from 0")


class Source(Protocol):
    """Data that can be read from any cursor on."""

    def epoch(self, cursor: Cursor) -> Iterator[tuple[Any, Cursor]]:
        """The rest of the cursor's epoch: its batches in order, each with the cursor after it.

        The same cursor gives the same batches. The iterator's ``close`` (where it has one) ends what reads behind it.
        """
