"""The one reader of a run's data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy
import torch
from torch.utils import _pytree as pytree

from raypipe.data.cursor import Cursor, Source

__all__ = ["Draw", "Feed"]


@dataclass(frozen=True, slots=True)
class Draw:
    """A batch on its way to a step.

    Attributes:
        batch: what the source gave.
        step: number of the step that consumes it.
        epoch: number of the epoch it belongs to.
        cursor_after: where to go on once the step is done; after an epoch's last batch, the next epoch's start.
        end_of_epoch: it is its epoch's last batch.
        last: it is the run's last batch.
    """

    batch: Any
    step: int
    epoch: int
    cursor_after: Cursor
    end_of_epoch: bool
    last: bool


class Feed(Iterator[Draw]):
    """Draws batches from a source until ``steps`` or ``epochs`` are done, whichever is first.

    It is one batch ahead within an epoch, so that the end is known before a step is queued. ``cursor_after`` is
    that of the batch handed out, not of the batch read ahead. An exception of the data's own code comes out unchanged,
    and only when its own batch is asked for: the batch before it is still handed out.

    Args:
        source: where batches come from.
        start: the first batch's place.
        epochs: epochs to read, the one that ``start`` is in counted as one; None for no such limit.
        steps: batches to read, over as many epochs as that takes; None for no such limit.
        first_step: number of the first step.

    Raises:
        ValueError: ``epochs`` or ``steps`` is negative or no whole number; later, when the first batch is asked for:
            the data is empty.
    """

    def __init__(
        self, source: Source, *, start: Cursor, epochs: int | None, steps: int | None, first_step: int = 0
    ) -> None:
        for name, value in (("epochs", epochs), ("steps", steps), ("first_step", first_step)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise ValueError(f"{name} is {value!r}, but it is a whole number from 0")
        self._source = source
        self._cursor = start
        self._step = first_step
        self._end_step = None if steps is None else first_step + steps
        self._end_epoch = None if epochs is None else start.epoch + epochs
        self._reader: Iterator[tuple[Any, Cursor]] | None = None
        self._ahead: tuple[Any, Cursor] | None = None
        self._failure: Exception | None = None

    def peek(self) -> Any:
        """The batch that comes next, which stays where it is.

        Raises:
            ValueError: the data is empty, or the run is at its end.
        """
        found = self._find()
        if found is None:
            raise ValueError("no batch is left: the run is at its last step or epoch already")
        return found[0]

    def __next__(self) -> Draw:
        found = self._find()
        if found is None:
            self.close()
            raise StopIteration
        batch, after = found
        epoch, step = self._cursor.epoch, self._step
        self._cursor, self._step = after, step + 1
        end_of_epoch = not self._read_ahead()
        if end_of_epoch:
            self._next_epoch()
        return Draw(batch, step, epoch, self._cursor, end_of_epoch, last=self._over)

    def close(self) -> None:
        """Ends what reads in the background; nothing more is drawn. May be called twice."""
        self._end_step, self._ahead, self._failure = self._step, None, None
        self._close_reader()

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _over(self) -> bool:
        return self._step == self._end_step or self._cursor.epoch == self._end_epoch

    def _find(self) -> tuple[Any, Cursor] | None:
        """The next batch, from the next epoch where this one has none left; None at the end of the run."""
        while self._ahead is None and not self._over:
            begun_anew = self._cursor.offset == 0
            if not self._read_ahead():
                if begun_anew:
                    raise ValueError(_empty(self._cursor))
                self._next_epoch()
            self._raise_failure()
        return None if self._over else self._ahead

    def _read_ahead(self) -> bool:
        """Reads one batch of this epoch; False where none is left. An exception is kept for when it is due."""
        self._ahead = None
        if self._failure is not None:
            return True
        try:
            if self._reader is None:
                self._reader = iter(self._source.epoch(self._cursor))
            found = next(self._reader, None)
            # A copy: a generator may fill the same tensors again for its next batch, and that is read before this goes.
            self._ahead = None if found is None else (_copied(found[0]), found[1])
        except Exception as error:
            self._failure = error
            return True
        return self._ahead is not None

    def _raise_failure(self) -> None:
        if self._failure is not None:
            failure = self._failure
            self.close()
            raise failure

    def _next_epoch(self) -> None:
        self._close_reader()
        self._cursor = Cursor(self._cursor.epoch + 1, self._cursor.seed)

    def _close_reader(self) -> None:
        close = getattr(self._reader, "close", None)
        self._reader = None
        if close is not None:
            close()


def _copied(batch: Any) -> Any:
    """The batch with tensors and arrays of its own; one that stands in it twice stays one."""
    copies: dict[int, Any] = {}

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, (torch.Tensor, numpy.ndarray)):
            return leaf
        if id(leaf) not in copies:
            copies[id(leaf)] = leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf.copy()
        return copies[id(leaf)]

    return pytree.tree_map(copy, batch)


def _empty(cursor: Cursor) -> str:
    if cursor.epoch == 0:
        return "the data is empty: it gave no batch; check its path, its filter or drop_last"
    return (
        f"the data gave no batch in epoch {cursor.epoch}: what can be read once only serves one epoch, so give a list "
        "or a function that yields batches, or ask for one epoch"
    )
