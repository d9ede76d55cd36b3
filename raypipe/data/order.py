"""The order of an epoch's rows: pure arithmetic on numbers of rows, nothing is read.

A shuffle over files that do not fit into memory has two levels. The row groups of all files are permuted and dealt to a
few lanes; a lane is read from its start to its end. A window takes the next rows of every lane, in equal shares, and is
permuted as a whole. So a window holds rows from several places of the data at once, and where all of it fits into one
window, the shuffle is a plain permutation. Each permutation has its own seed, and a window's place in every lane is
known by arithmetic: any window can be made without the ones before it.

The two levels are those of a shuffled shard order with a shuffle buffer (tf.data, WebDataset), with windows in place
of a sliding buffer because a sliding buffer's state cannot be resumed without replaying it.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

__all__ = ["Order", "RowGroup"]

_LANES = 8


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A row group of a Parquet file: the smallest piece that can be read without what stands before it."""

    file: int
    index: int
    rows: int


class Order:
    """The order of one epoch.

    Args:
        groups: all row groups, in the order of the files.
        window_rows: rows in a window, at most a few more.
        seeds: what the order is a function of; None leaves the rows as they are in the files.
    """

    def __init__(self, groups: Sequence[RowGroup], window_rows: int, seeds: tuple[int, ...] | None) -> None:
        self._seeds = seeds
        self.rows = sum(group.rows for group in groups)
        self.windows = -(-self.rows // window_rows)
        self.lanes = [list(groups)] if seeds is None else _deal(groups, numpy.random.default_rng([*seeds, 0]))
        self._lane_rows = [sum(group.rows for group in lane) for lane in self.lanes]

    def lane_start(self, lane: int, window: int) -> int:
        """Rows of ``lane`` before ``window``."""
        return self._lane_rows[lane] * window // self.windows

    def start(self, window: int) -> int:
        """Rows of the epoch before ``window``."""
        return sum(self.lane_start(lane, window) for lane in range(len(self.lanes)))

    def window_of(self, row: int) -> int:
        """The window that holds the epoch's row number ``row``, or the number of windows after the last row."""
        if row >= self.rows:
            return self.windows
        return bisect.bisect_right(range(self.windows), row, key=self.start) - 1

    def places(self, window: int) -> numpy.ndarray[tuple[int], numpy.dtype[numpy.int64]]:
        """For each row of a window in the epoch's order: its place among the rows that the lanes give in turn."""
        count = self.start(window + 1) - self.start(window)
        if self._seeds is None:
            return numpy.arange(count, dtype=numpy.int64)
        return numpy.random.default_rng([*self._seeds, 1 + window]).permutation(count)


def _deal(groups: Sequence[RowGroup], generator: numpy.random.Generator) -> list[list[RowGroup]]:
    """Permuted row groups dealt to lanes of about the same number of rows."""
    lanes: list[list[RowGroup]] = [[] for _ in range(min(_LANES, len(groups)))]
    rows = [0] * len(lanes)
    for place in generator.permutation(len(groups)):
        shortest = rows.index(min(rows))
        lanes[shortest].append(groups[place])
        rows[shortest] += groups[place].rows
    return lanes
