"""Asks the ranks of a slow step what they are doing."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import ray

from raypipe.driver.actors import CONTROL
from raypipe.driver.stuck import View
from raypipe.stage.protocol import Progress

__all__ = ["Watch"]


class Watch:
    """The last answers of the ranks in one wait.

    A rank is asked again once it has answered, so a rank that is stopped costs one open call.
    """

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = actors
        self._began = time.monotonic()
        self._asked: dict[int, tuple[Any, float]] = {}
        self._answers: dict[int, Progress] = {}

    def poll(self, ranks: Iterable[int]) -> None:
        """Takes the answers that have come and asks anew; does not block."""
        now = time.monotonic()
        for rank in ranks:
            if rank in self._asked and not self._take(rank):
                continue
            call = self._actors[rank].progress.options(concurrency_group=CONTROL, name="progress").remote()
            self._asked[rank] = (call, now)

    def views(self, running: Iterable[int]) -> list[View]:
        """What is known of every rank, after the answers that have come since."""
        now, still = time.monotonic(), set(running)
        for rank in list(self._asked):
            self._take(rank)
        return [
            View(
                rank=rank,
                finished=rank not in still,
                progress=self._answers.get(rank),
                silent_s=now - self._asked[rank][1] if rank in self._asked else 0.0,
                waited_s=now - self._began,
            )
            for rank in range(len(self._actors))
        ]

    def _take(self, rank: int) -> bool:
        """Takes a rank's answer where it has come; a rank that is gone is told of by its step's call."""
        call, _ = self._asked[rank]
        if not ray.wait([call], timeout=0)[0]:
            return False
        del self._asked[rank]
        try:
            self._answers[rank] = ray.get(call)
        except Exception:
            self._answers.pop(rank, None)
        return True
