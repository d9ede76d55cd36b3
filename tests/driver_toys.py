"""Workers without a model, for the tests of the driver: a step's batch says what each rank does."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
import torch

from raypipe.errors import StageError
from raypipe.stage.protocol import Progress, RankWork
from raypipe.topology import Topology
from raypipe.transport.base import Transport, Wiring

Act = Callable[["Toy", int], Any]


@dataclass
class Toy:
    """Does what the batch says for its rank, then meets the other ranks, as a real step's neighbours would."""

    rank: int
    transport: Transport | None = None
    doing: str = "idle"
    since: float = field(default_factory=time.monotonic)
    waits_for: int | None = None

    def connect(self, transport: Transport) -> None:
        self.transport = transport

    def train_step(self, step: int, batch: dict[int, Act]) -> RankWork[Any]:
        assert self.transport is not None
        self._at("0F0")
        try:
            value = batch[self.rank](self, step) if self.rank in batch else None
            handle = self.transport.all_gather(torch.tensor([self.rank]), [1] * self.transport.size)
            self.waits_for = handle.source if handle.source is not None else (self.rank + 1) % self.transport.size
            yield handle
        except BaseException as error:
            raise StageError(self.rank, "0F0", step, error, chunk=self.rank, microbatch=0) from None
        self.waits_for = None
        self._at("idle")
        return self.rank, step, value, [int(part) for part in handle.result()]

    def forward_step(self, step: int, batch: Any, kind: str) -> RankWork[Any]:
        yield from ()
        return self.rank, step, kind, batch

    def state(self) -> Any:
        return {"rank": self.rank}

    def progress(self) -> Progress:
        return Progress(0, self.doing, time.monotonic() - self.since, self.waits_for)

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()

    def _at(self, doing: str) -> None:
        self.doing, self.since = doing, time.monotonic()


class ToldError(Exception):
    """An exception that Ray cannot rebuild: two arguments, one of them kept."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.number = number


def builds(ranks: int) -> list[bytes]:
    """One toy a rank."""
    return [cloudpickle.dumps(_Build(rank)) for rank in range(ranks)]


def wiring(ranks: int) -> Wiring:
    """No channels: the toys only meet."""
    return Wiring(size=ranks, pairs=())


def topology(ranks: int) -> Topology:
    """A pipeline of single ranks."""
    return Topology(stages=ranks)


@dataclass(frozen=True)
class _Build:
    rank: int

    def __call__(self) -> Toy:
        return Toy(self.rank)


def pids(toy: Toy, step: int) -> int:
    """An act: the process."""
    return os.getpid()


def told(toy: Toy, step: int) -> None:
    """An act: fails with a plain error."""
    raise ValueError(f"rank {toy.rank} dislikes step {step}")


def nap(toy: Toy, step: int) -> None:
    """An act: takes far longer than any test's deadline."""
    time.sleep(1000)


def everywhere(act: Act, ranks: Sequence[int]) -> dict[int, Act]:
    """A batch that says the same to several ranks."""
    return dict.fromkeys(ranks, act)
