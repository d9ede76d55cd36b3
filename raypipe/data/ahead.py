"""Reading ahead in one background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

__all__ = ["THREAD_NAME", "read_ahead"]

T = TypeVar("T")

THREAD_NAME = "raypipe-data"


class _End:
    """The end of the items, or the exception that was the end of them."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def read_ahead(make: Callable[[], Iterator[T]], depth: int) -> Iterator[T]:
    """The items of ``make()``, at most ``depth`` of them made before they are asked for.

    A thread starts with the first item and is gone after the last one, or when the iterator is closed. An exception in
    it comes out with its own traceback.
    """
    items: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
    room = threading.Semaphore(depth)
    stop = threading.Event()

    def run() -> None:
        error = None
        try:
            iterator = make()
            while room.acquire() and not stop.is_set():
                items.put(next(iterator))
        except StopIteration:
            pass
        except BaseException as caught:
            error = caught
        items.put(_End(error))

    thread = threading.Thread(target=run, name=THREAD_NAME, daemon=True)
    thread.start()
    try:
        while True:
            item = items.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            room.release()
            yield item
    finally:
        stop.set()
        room.release()
        if thread is not threading.current_thread():  # The garbage collector may run this anywhere.
            thread.join()
