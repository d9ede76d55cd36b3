"""Every kind of data as a source: the same batches from the same cursor, and one sentence for what is no data."""

from __future__ import annotations

import pathlib
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from raypipe.data import Cursor, Source, open_source


def numbered() -> Iterator[dict[str, torch.Tensor]]:
    for number in range(6):
        yield {"number": torch.tensor(number), "noise": torch.rand(3) + random.random() + numpy.random.rand()}


class Anew:
    """Iterable again and again, with random numbers of its own process."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return numbered()


class Streamed(IterableDataset[dict[str, torch.Tensor]]):
    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return numbered()


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(40)), batch_size=4, **options)


SOURCES: dict[str, Callable[[], Any]] = {
    "list": lambda: list(numbered()),
    "iterable": Anew,
    "function": lambda: numbered,
    "loader": loader,
    "loader, shuffled": lambda: loader(shuffle=True),
    "loader, with a generator": lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(3)),
    "loader of a stream": lambda: DataLoader(Streamed(), batch_size=None),
}


def drawn(source: Source, cursor: Cursor) -> list[tuple[Any, Cursor]]:
    return list(source.epoch(cursor))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    pairs = zip(one.values(), other.values(), strict=True) if isinstance(one, dict) else zip(one, other, strict=True)
    return all(same(left, right) for left, right in pairs)


@pytest.mark.parametrize("kind", SOURCES)
def test_a_cursor_gives_the_same_batches_in_another_process_or_state(kind: str) -> None:
    data = SOURCES[kind]()
    source = open_source(data)
    for epoch in (0, 1, 3):
        whole = drawn(source, Cursor(epoch, seed=7))
        assert [cursor for _, cursor in whole] == [Cursor(epoch, 7, n + 1) for n in range(len(whole))]
        for offset in (0, 1, 4, len(whole)):
            torch.rand(5)  # the global generators are elsewhere now
            random.random()
            again = open_source(data if kind == "list" else SOURCES[kind]())
            rest = drawn(again, Cursor(epoch, 7, offset))
            assert len(rest) == len(whole) - offset
            for (batch, after), (expected, expected_after) in zip(rest, whole[offset:], strict=True):
                assert after == expected_after
                assert same(batch, expected)


@pytest.mark.parametrize("kind", ["function", "loader, shuffled", "loader, with a generator"])
def test_epochs_and_seeds_differ(kind: str) -> None:
    source = open_source(SOURCES[kind]())
    first, second, other = (drawn(source, cursor)[0][0] for cursor in (Cursor(1), Cursor(2), Cursor(1, seed=1)))
    assert not same(first, second)
    assert not same(first, other)


def test_reading_leaves_the_global_generators_alone() -> None:
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()  # type: ignore[index]
    for kind in SOURCES:
        if kind != "list":
            for _ in open_source(SOURCES[kind]()).epoch(Cursor()):
                assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (numpy.random.get_state()[1] == states[2]).all()  # type: ignore[index]


def test_a_loaders_own_generator_gives_a_plain_loops_first_epoch() -> None:
    plain = [batch for (batch,) in loader(shuffle=True, generator=torch.Generator().manual_seed(3))]
    mine = loader(shuffle=True, generator=torch.Generator().manual_seed(3))
    source = open_source(mine)
    before = mine.generator.get_state()
    for _ in range(2):
        assert same([batch for (batch,), _ in drawn(source, Cursor())], plain)
    assert torch.equal(mine.generator.get_state(), before)


def test_workers_of_a_loader(recwarn: pytest.WarningsRecorder) -> None:
    source = open_source(loader(shuffle=True, num_workers=1))
    whole = drawn(source, Cursor(1))
    rest = drawn(source, Cursor(1, offset=8))
    assert same([batch for batch, _ in rest], [batch for batch, _ in whole[8:]])


def test_set_epoch_is_called() -> None:
    dataset = TensorDataset(torch.arange(40))
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=True)
    source = open_source(DataLoader(dataset, batch_size=4, sampler=sampler))
    drawn(source, Cursor(epoch=5))
    assert sampler.epoch == 5
    assert not same([b for b, _ in drawn(source, Cursor(1))], [b for b, _ in drawn(source, Cursor(2))])


def test_a_generator_object_serves_one_epoch() -> None:
    source = open_source(numbered())
    reader = source.epoch(Cursor(seed=1))
    first = [next(reader) for _ in range(3)]
    reader.close()  # type: ignore[attr-defined]
    # The reader was one ahead of the run: the batch it read is served again.
    rest = drawn(source, first[1][1])
    assert [int(batch["number"]) for batch, _ in rest] == [2, 3, 4, 5]
    assert same(rest[0][0], first[2][0])
    for cursor in (Cursor(), Cursor(epoch=1)):
        with pytest.raises(ValueError, match=r"a generator, which can be read once only.*give a list, or the function"):
            drawn(source, cursor)


def test_a_function_is_closed_with_its_reader() -> None:
    ends = []

    def batches() -> Iterator[int]:
        try:
            yield from range(10)
        finally:
            ends.append("closed")

    reader = open_source(batches).epoch(Cursor())
    assert next(reader) == (0, Cursor(offset=1))
    reader.close()  # type: ignore[attr-defined]
    assert ends == ["closed"]


def test_a_function_that_gives_no_batches() -> None:
    with pytest.raises(TypeError, match="the data's function gave NoneType"):
        drawn(open_source(lambda: None), Cursor())


@pytest.mark.parametrize("kind", SOURCES)
def test_a_cursor_beyond_the_data(kind: str) -> None:
    with pytest.raises(ValueError, match=r"goes on after batch 50 of epoch 0, but the data has (6|10) batches"):
        drawn(open_source(SOURCES[kind]()), Cursor(offset=50))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (3, "a int"),
        (None, "a NoneType"),
        ({"x": torch.zeros(2)}, "a dict: it looks like one batch"),
        ((torch.zeros(2), torch.zeros(2)), "a tuple: it looks like one batch"),
        (torch.zeros(2), "a Tensor: it looks like one batch"),
        (numpy.zeros(2), "a ndarray: it looks like one batch"),
        ("train/", "a str: read files with raypipe.data.parquet"),
        (pathlib.Path("train"), "a PosixPath: read files with raypipe.data.parquet"),
        (TensorDataset(torch.zeros(2)), "a TensorDataset: it gives single samples; wrap it in a DataLoader"),
        (torch.nn.Sequential(), "a Sequential: a model gives no batches"),
        (Anew, "the class Anew itself"),
        (lambda size: [], "the function <lambda> cannot be called without arguments: missing a required argument"),
    ],
)
def test_what_is_no_data(data: object, what: str) -> None:
    with pytest.raises(TypeError, match=f"data is a list of batches, .* but .*{re.escape(what)}"):
        open_source(data)


def test_a_source_is_taken_as_it_is() -> None:
    source = open_source([1, 2])
    assert open_source(source) is source


@pytest.mark.parametrize("values", [{"epoch": -1}, {"offset": 1.5}, {"seed": True}])
def test_bad_cursors(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"a cursor's .* but it is a whole number from 0"):
        Cursor(**values)
