"""Parquet files as a source of batches, shuffled in bounded memory and resumable at any row."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import Any

import pyarrow as pa

from raypipe.data.ahead import read_ahead
from raypipe.data.columns import from_arrow
from raypipe.data.cursor import Cursor
from raypipe.data.files import Lane, ParquetFiles
from raypipe.data.order import Order

__all__ = ["ParquetSource", "parquet"]

_BATCHES_AHEAD = 2


def parquet(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    columns: Sequence[str],
    batch_size: int,
    shuffle: bool = True,
    seed: int = 0,
    drop_last: bool = False,
    *,
    buffer_mb: int = 64,
) -> ParquetSource:
    """Batches of Parquet files.

    A batch is a dict of column names. A column of numbers is a tensor ``[B]``, one of lists of numbers ``[B, L]``,
    text and bytes are a list. Tensors have the column's own type: integers narrower than 64 bits stay so (an
    embedding then wants ``.long()``). Rows of one list column have the same length within a batch.

    The shuffle is over all files. Permuted row groups are read in 8 lanes at once into windows of ``buffer_mb``
    / 2, and each window is permuted (``order.py``): data that fits into one window is permuted as a whole; beyond it,
    files with many or small row groups mix better than one row group larger than the window, whose rows are
    shuffled only among their neighbours. The order is a pure function of both seeds and the epoch, for the same files,
    columns and ``buffer_mb``.

    One thread reads ahead. It holds about ``buffer_mb`` of rows, a few batches, and 256 KiB and a page of each column
    for each lane, whatever the size of files and row groups; the process grows by up to twice ``buffer_mb``, since the
    allocator keeps some of what was freed. To start inside an epoch costs one window, and the
    decoding of at most 8 row groups up to where their lanes go on; what lies before is not read.

    Args:
        path: a file, a folder (with its subfolders), a URI of a file system that Arrow knows, or a list of these.
        columns: the columns to read.
        batch_size: rows in a batch.
        shuffle: False keeps the order of the files (sorted by name in a folder) and their rows.
        seed: mixed with the run's own seed, for another order of the same data.
        drop_last: leave out the last batch of an epoch where it is smaller.
        buffer_mb: MiB of decoded rows to shuffle in.

    Raises:
        TypeError: ``columns`` is no list of names, or ``path`` no path.
        ValueError: no Parquet file is there; a column is missing or of a type that a tensor has not; there are no
            rows; a number is out of range.
    """
    return ParquetSource(path, columns, batch_size, shuffle, seed, drop_last, buffer_mb)


class ParquetSource:
    """What ``parquet`` gives. A cursor's offset counts rows.

    Attributes:
        rows: rows of an epoch.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        columns: Sequence[str],
        batch_size: int,
        shuffle: bool,
        seed: int,
        drop_last: bool,
        buffer_mb: int,
    ) -> None:
        self._batch_size = _whole("batch_size", batch_size, least=1)
        self._seed = _whole("seed", seed, least=0)
        self._shuffle, self._drop_last = shuffle, drop_last
        self._columns = _names(columns)
        paths = _paths(path)
        self._files = ParquetFiles(paths, self._columns)
        # Half of the buffer: a window is copied once when its slices are put together.
        self._window_rows = max(1, (_whole("buffer_mb", buffer_mb, least=1) << 20) // 2 // self._files.row_bytes)
        self.rows = self._files.rows
        if not len(self):
            least = f"fewer than one batch of {batch_size}, and drop_last leaves that out" if self.rows else "no batch"
            raise ValueError(f"the Parquet data at {', '.join(paths)} has {self.rows} rows: {least}")

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.rows // self._batch_size if self._drop_last else -(-self.rows // self._batch_size)

    def epoch(self, cursor: Cursor) -> Iterator[tuple[dict[str, Any], Cursor]]:
        """The batches of the cursor's epoch from its row on. A thread reads until the iterator ends or is closed.

        Raises:
            ValueError: the data has fewer rows than the cursor is beyond.
        """
        if cursor.offset > self.rows:
            raise ValueError(
                f"the run goes on after row {cursor.offset} of epoch {cursor.epoch}, but the data has {self.rows} "
                "rows: give the data that the checkpoint was made with"
            )
        return read_ahead(partial(self._batches, cursor), _BATCHES_AHEAD)

    def _batches(self, cursor: Cursor) -> Iterator[tuple[dict[str, Any], Cursor]]:
        for table in self._tables(cursor):
            cursor = replace(cursor, offset=cursor.offset + table.num_rows)
            yield {name: from_arrow(name, table.column(name)) for name in self._columns}, cursor

    def _tables(self, cursor: Cursor) -> Iterator[pa.Table]:
        """The rows from the cursor on, ``batch_size`` at a time."""
        pieces: list[pa.Table] = []
        missing = self._batch_size
        windows = self._windows(cursor)
        # No loop variable may hold a window while the next one is read: that would double the memory.
        while (window := next(windows, None)) is not None:
            table, places = window
            done = 0
            while done < len(places):
                piece = table.take(places[done : done + missing])
                done, missing = done + piece.num_rows, missing - piece.num_rows
                pieces.append(piece)
                if not missing:
                    yield pa.concat_tables(pieces)
                    pieces, missing = [], self._batch_size
            del table, window
        if pieces and not self._drop_last:
            yield pa.concat_tables(pieces)

    def _windows(self, cursor: Cursor) -> Iterator[tuple[pa.Table, Any]]:
        """Windows of rows, each with the places of its rows that are still to come, in the epoch's order."""
        seeds = (self._seed, cursor.seed, cursor.epoch) if self._shuffle else None
        order = Order(self._files.groups, self._window_rows, seeds)
        first = order.window_of(cursor.offset)
        slice_rows = max(1, self._window_rows // (4 * len(order.lanes)))
        lanes = [
            Lane(self._files, groups, order.lane_start(number, first), slice_rows)
            for number, groups in enumerate(order.lanes)
        ]
        try:
            for window in range(first, order.windows):
                skip = max(0, cursor.offset - order.start(window))
                yield _read_window(order, lanes, window), order.places(window)[skip:]
        finally:
            for lane in lanes:
                lane.close()


def _read_window(order: Order, lanes: Sequence[Lane], window: int) -> pa.Table:
    pieces = [
        piece
        for number, lane in enumerate(lanes)
        for piece in lane.read(order.lane_start(number, window + 1) - order.lane_start(number, window))
    ]
    return pa.Table.from_batches(pieces).combine_chunks()


def _whole(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise ValueError(f"{name} is {value!r}, but it is a whole number from {least}")
    return int(value)


def _names(columns: object) -> list[str]:
    if isinstance(columns, str) or not isinstance(columns, Sequence) or not all(isinstance(n, str) for n in columns):
        raise TypeError(f"columns is {columns!r}, but it is a list of column names, such as ['tokens', 'targets']")
    if not columns or len(set(columns)) < len(columns):
        raise ValueError(f"columns is {columns!r}, but it names at least one column, and none twice")
    return list(columns)


def _paths(path: object) -> list[str]:
    listed = list(path) if isinstance(path, (list, tuple)) else [path]
    names = [os.fspath(one) for one in listed if isinstance(one, (str, os.PathLike))]
    if len(names) < len(listed):
        raise TypeError(f"path is {path!r}, but it is a file, a folder, or a list of these")
    if not names:
        raise ValueError("path is an empty list, but there is at least one file or folder to read")
    return names
