"""The one reader: knows the end before the last step, resumes, and passes the data's own errors on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raypipe.data import Cursor, Draw, Feed, open_source, parquet


def feed(data: Any, *, start: Cursor | None = None, epochs: int | None = None, steps: int | None = None) -> Feed:
    return Feed(open_source(data), start=start or Cursor(), epochs=epochs, steps=steps)


def row(draw: Draw) -> tuple[Any, ...]:
    return draw.batch, draw.step, draw.epoch, draw.end_of_epoch, draw.last


@pytest.mark.parametrize(
    ("epochs", "steps", "expected"),
    [
        (1, None, [("a", 0, 0, False, False), ("b", 1, 0, True, True)]),
        (None, 1, [("a", 0, 0, False, True)]),
        (None, 2, [("a", 0, 0, False, False), ("b", 1, 0, True, True)]),
        (None, 3, [("a", 0, 0, False, False), ("b", 1, 0, True, False), ("a", 2, 1, False, True)]),
        (1, 3, [("a", 0, 0, False, False), ("b", 1, 0, True, True)]),
        (2, 3, [("a", 0, 0, False, False), ("b", 1, 0, True, False), ("a", 2, 1, False, True)]),
        (0, None, []),
        (None, 0, []),
    ],
)
def test_where_it_stops(epochs: int | None, steps: int | None, expected: list[tuple[Any, ...]]) -> None:
    assert [row(draw) for draw in feed(["a", "b"], epochs=epochs, steps=steps)] == expected


def test_the_cursor_is_that_of_what_was_handed_out() -> None:
    draws = list(feed(["a", "b"], epochs=2, start=Cursor(seed=9)))
    assert [draw.cursor_after for draw in draws] == [
        Cursor(0, 9, 1),
        Cursor(1, 9, 0),
        Cursor(1, 9, 1),
        Cursor(2, 9, 0),
    ]


@pytest.mark.parametrize("done", range(8))
def test_going_on_from_any_draw(done: int) -> None:
    def batches() -> Iterator[int]:
        yield from range(3)

    whole = list(feed(batches, steps=8))
    start = whole[done - 1].cursor_after if done else Cursor()
    rest = Feed(open_source(batches), start=start, epochs=None, steps=8 - done, first_step=done)
    assert list(rest) == whole[done:]


def test_a_start_at_an_epochs_very_end_goes_on_with_the_next() -> None:
    assert [row(draw) for draw in feed(["a", "b"], start=Cursor(offset=2), steps=1)] == [("a", 0, 1, False, True)]
    assert list(feed(["a", "b"], start=Cursor(offset=2), epochs=1)) == []


def test_peek_puts_back() -> None:
    reader = feed(iter("abc"), epochs=1)
    assert reader.peek() == reader.peek() == "a"
    assert [draw.batch for draw in reader] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="no batch is left"):
        reader.peek()


def test_reading_is_one_batch_ahead_and_never_past_the_last_step() -> None:
    read = []

    def batches() -> Iterator[int]:
        for number in range(10):
            read.append(number)
            yield number

    reader = feed(batches, steps=3)
    next(reader)
    assert read == [0, 1]
    list(reader)
    assert read == [0, 1, 2, 3]  # one more tells whether the epoch ends there


@pytest.mark.parametrize("data", [[], lambda: iter(()), iter(())])
def test_empty_data(data: Any) -> None:
    with pytest.raises(ValueError, match="the data is empty: it gave no batch"):
        feed(data, steps=2).peek()
    with pytest.raises(ValueError, match="the data is empty: it gave no batch"):
        next(feed(data, epochs=1))


def test_data_for_one_epoch_when_two_are_needed() -> None:
    reader = feed((n for n in range(2)), steps=3)
    assert [next(reader).batch, next(reader).batch] == [0, 1]
    with pytest.raises(ValueError, match="generator, which can be read once only"):
        next(reader)

    once = iter(range(2))
    reader = feed(lambda: once, epochs=2)
    assert [next(reader).batch, next(reader).batch] == [0, 1]
    with pytest.raises(ValueError, match="gave no batch in epoch 1"):
        next(reader)


class OwnError(Exception):
    pass


def failing() -> Iterator[int]:
    yield 0
    yield 1
    raise OwnError("disk on fire")


def test_an_exception_of_the_data_comes_out_unchanged_and_when_it_is_due() -> None:
    reader = feed(failing, epochs=1)
    draws = [next(reader), next(reader)]
    assert [row(draw) for draw in draws] == [(0, 0, 0, False, False), (1, 1, 0, False, False)]
    with pytest.raises(OwnError, match="disk on fire") as caught:
        next(reader)
    assert caught.value.__cause__ is None
    assert caught.traceback[-1].name == "failing"
    assert list(reader) == []
    assert [draw.last for draw in feed(failing, steps=2)] == [False, True]


def test_two_runs_over_one_generator_object_lose_no_batch() -> None:
    source = open_source(iter(range(6)))
    first = list(Feed(source, start=Cursor(), epochs=None, steps=2))
    second = list(Feed(source, start=first[-1].cursor_after, epochs=1, steps=None, first_step=2))
    assert [draw.batch for draw in first + second] == list(range(6))
    assert [draw.step for draw in first + second] == list(range(6))


def test_close_ends_the_thread_behind(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": range(1000)}), tmp_path / "x.parquet")

    def reading() -> int:
        return sum(thread.name == "raypipe-data" for thread in threading.enumerate())

    with feed(parquet(tmp_path, ["x"], 10), epochs=5) as reader:
        next(reader)
        assert reading() == 1
    assert reading() == 0
    assert list(reader) == []
    reader.close()
    draws = list(feed(parquet(tmp_path, ["x"], 10), epochs=2))
    assert [draw.step for draw in draws if draw.end_of_epoch] == [99, 199]
    assert reading() == 0


@pytest.mark.parametrize("limits", [{"epochs": -1, "steps": None}, {"epochs": None, "steps": 1.5}])
def test_bad_limits(limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="but it is a whole number from 0"):
        Feed(open_source([1]), start=Cursor(), **limits)


def test_a_generator_that_fills_the_same_tensors_again_does_no_harm() -> None:
    def batches():
        buffer = torch.zeros(2)
        for number in range(3):
            yield {"x": buffer.fill_(number), "same": buffer}

    with Feed(open_source(batches), start=Cursor(), epochs=1, steps=None) as feed:
        drawn = [draw.batch for draw in feed]
    assert [batch["x"].tolist() for batch in drawn] == [[0, 0], [1, 1], [2, 2]]
    assert drawn[0]["x"] is drawn[0]["same"]
