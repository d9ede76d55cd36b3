"""What both sides of a comparison train, and what one side's turn at it gave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Task", "Turn"]


@dataclass(frozen=True)
class Task:
    """What both sides train; it can be pickled.

    Attributes: ``model`` and ``batch`` make the same ones each time; ``counts``, how many of the model's layers each
    chunk holds, in the model's order; ``chunks``, how many of them a stage holds.
    """

    model: Callable[[], nn.Sequential]
    batch: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    microbatches: int
    counts: Sequence[int]
    chunks: int = 1

    def __post_init__(self) -> None:
        if not self.counts or len(self.counts) % self.chunks:
            raise ValueError(
                f"counts has {len(self.counts)} numbers, but every stage holds {self.chunks} chunks; give one number "
                "for each chunk"
            )

    @property
    def stages(self) -> int:
        """How many stages."""
        return len(self.counts) // self.chunks

    def chunk(self, number: int) -> nn.Sequential:
        """One chunk of a model made for it."""
        first = sum(self.counts[:number])
        layers = list(self.model())
        return nn.Sequential(*layers[first : first + self.counts[number]])


@dataclass(frozen=True)
class Turn:
    """Some steps in a row: when the first ``began`` on rank 0, when each has ended on all ranks (``ends``), ``seconds``
    of them all as the driver saw it, and the last step's ``loss``."""

    began: float
    ends: list[float]
    seconds: float
    loss: float

    @property
    def periods(self) -> list[float]:
        """Seconds from each step's end to the next one's, the first one's from its start."""
        return [after - before for before, after in pairwise([self.began, *self.ends])]
