"""Everyday kinds of data as sources.

All count batches. None of them can jump: to resume inside an epoch, the batches before it are made and dropped (a list
apart). What they draw from the global random number generators is a function of (seed, epoch), so that the same
cursor gives the same batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from types import GeneratorType
from typing import Any

import torch
from torch.utils.data import DataLoader

from raypipe.data.columns import from_numpy
from raypipe.data.cursor import Cursor
from raypipe.data.randomness import Randomness, mixed_seed

__all__ = ["FunctionSource", "IterableSource", "ListSource", "LoaderSource", "OnceSource", "RaySource"]

_END = object()


class ListSource:
    """A list of batches, in its order."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches = batches

    def epoch(self, cursor: Cursor) -> Iterator[tuple[Any, Cursor]]:
        _check_reached(cursor, len(self._batches))
        for offset in range(cursor.offset, len(self._batches)):
            yield self._batches[offset], replace(cursor, offset=offset + 1)


class IterableSource:
    """An object that can be iterated anew for every epoch."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches

    def epoch(self, cursor: Cursor) -> Iterator[tuple[Any, Cursor]]:
        return _read(lambda: self._batches, cursor)


class FunctionSource:
    """A function without arguments that is called once an epoch and gives the epoch's batches."""

    def __init__(self, function: Callable[[], Iterable[Any]]) -> None:
        self._function = function

    def epoch(self, cursor: Cursor) -> Iterator[tuple[Any, Cursor]]:
        return _read(self._call, cursor)

    def _call(self) -> Iterable[Any]:
        batches = self._function()
        if not isinstance(batches, Iterable):
            raise TypeError(f"the data's function gave {type(batches).__name__}, but it yields or returns batches")
        return batches


class LoaderSource:
    """A PyTorch DataLoader.

    ``set_epoch`` is called on its samplers and dataset where they have it. A ``torch.Generator`` that the user gave is
    in its own state for epoch 0, so that the order is the one of a plain loop over the loader; later epochs seed it
    from its own seed, the cursor's seed and the epoch. It is put back afterwards.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        outer = [loader, loader.sampler, loader.batch_sampler, loader.dataset]
        parts = [*outer, getattr(loader.batch_sampler, "sampler", None)]
        self._parts = list({id(part): part for part in parts if part is not None}.values())
        found = (getattr(part, "generator", None) for part in self._parts)
        generators = {id(one): one for one in found if isinstance(one, torch.Generator)}
        self._states = [(one, one.get_state()) for one in generators.values()]

    def epoch(self, cursor: Cursor) -> Iterator[tuple[Any, Cursor]]:
        for part in self._parts:
            set_epoch = getattr(part, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(cursor.epoch)
        for generator, state in self._states:
            generator.set_state(state)
            if cursor.epoch:
                generator.manual_seed(mixed_seed(generator.initial_seed() % 2**64, cursor.seed, cursor.epoch))
        try:
            yield from _read(lambda: self._loader, cursor)
        finally:
            for generator, state in self._states:
                generator.set_state(state)


class OnceSource:
    """An iterator, such as a generator object: it serves one epoch.

    It keeps the last batch, because a reader that stops is one batch ahead of what it has handed out.
    """

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches
        self._begun: tuple[int, Randomness] | None = None
        self._count = 0
        self._last: Any = None

    def epoch(self, cursor: Cursor) -> Iterator[tuple[Any, Cursor]]:
        if self._begun is None:
            self._begun = cursor.epoch, Randomness(cursor.seed, cursor.epoch)
        epoch, randomness = self._begun
        if cursor.epoch != epoch or cursor.offset < self._count - 1:
            raise ValueError(
                f"the data is a {type(self._batches).__name__}, which can be read once only, and more than one epoch "
                "(or a second start) was asked for: give a list, or the function that makes it"
            )
        if self._count and cursor.offset == self._count - 1:
            yield self._last, replace(cursor, offset=self._count)
        while True:
            with randomness:
                batch = next(self._batches, _END)
            if batch is _END:
                _check_reached(cursor, self._count)
                return
            self._count, self._last = self._count + 1, batch
            if self._count > cursor.offset:
                yield batch, replace(cursor, offset=self._count)


class RaySource:
    """A ``ray.data.Dataset``, read by its own ``iter_batches``.

    Batches are dicts of tensors; columns of strings and the like are lists. Ray Data keeps no position, and its order
    is fixed only where the dataset's ``preserve_order`` option is set: without it, a resumed epoch skips as many rows,
    not the same ones. ``raypipe.data.parquet`` has neither limit.

    Args:
        dataset: the dataset.
        batch_size: rows in a batch; the default is Ray's own.
        drop_last: leave out the last batch of an epoch where it is smaller.
    """

    def __init__(self, dataset: Any, batch_size: int = 256, drop_last: bool = False) -> None:
        self._dataset, self._batch_size, self._drop_last = dataset, batch_size, drop_last

    def epoch(self, cursor: Cursor) -> Iterator[tuple[Any, Cursor]]:
        return _read(self._iterate, cursor)

    def _iterate(self) -> Iterator[dict[str, Any]]:
        batches = self._dataset.iter_batches(
            batch_size=self._batch_size, batch_format="numpy", drop_last=self._drop_last
        )
        for batch in batches:
            yield {name: from_numpy(name, column) for name, column in batch.items()}


def _read(make: Callable[[], Iterable[Any]], cursor: Cursor) -> Iterator[tuple[Any, Cursor]]:
    """The batches of a fresh iteration from the cursor's offset on."""
    randomness = Randomness(cursor.seed, cursor.epoch)
    with randomness:
        iterator = iter(make())
    count = 0
    # A generator is ours to close; another iterator may be the user's own and outlive the epoch.
    closing = contextlib.closing(iterator) if isinstance(iterator, GeneratorType) else contextlib.nullcontext()
    with closing:
        while True:
            with randomness:
                batch = next(iterator, _END)
            if batch is _END:
                break
            count += 1
            if count > cursor.offset:
                yield batch, replace(cursor, offset=count)
    _check_reached(cursor, count)


def _check_reached(cursor: Cursor, batches: int) -> None:
    if cursor.offset > batches:
        raise ValueError(
            f"the run goes on after batch {cursor.offset} of epoch {cursor.epoch}, but the data has {batches} batches: "
            "give the data that the checkpoint was made with"
        )
