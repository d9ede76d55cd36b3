"""Reading ahead: bounded, in order, and never a thread left behind."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator

import pytest

from raypipe.data.ahead import THREAD_NAME, read_ahead


def threads() -> int:
    return sum(thread.name == THREAD_NAME for thread in threading.enumerate())


def wait_until_still(made: list[int]) -> int:
    count = -1
    while count != len(made):
        count = len(made)
        time.sleep(0.05)
    return count


def test_items_in_order_and_no_more_than_depth_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    reader = read_ahead(items, depth=3)
    assert threads() == 0
    assert next(reader) == 0
    assert wait_until_still(made) == 4
    assert list(reader) == list(range(1, 20))
    assert threads() == 0


def test_an_exception_keeps_its_place_and_its_traceback() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise KeyError("column")

    reader = read_ahead(broken, depth=5)
    assert next(reader) == 1
    with pytest.raises(KeyError, match="column") as caught:
        next(reader)
    assert caught.traceback[-1].name == "broken"
    assert threads() == 0


def test_dropping_the_iterator_ends_the_thread() -> None:
    reader = read_ahead(lambda: iter(range(1000)), depth=2)
    next(reader)
    assert threads() == 1
    del reader
    gc.collect()
    assert threads() == 0
