"""Kernels inside of units whose sizes only data can tell."""

from __future__ import annotations

from pipes import WIDTH, Stack, assert_exact, batch, recorded

import pytest
import torch
from torch import Tensor, nn

EXPERTS = 3


class Routed(nn.Module):
    """Each row through the expert that it likes most: the rows are split by how many each expert has."""

    def __init__(self, least: int = 0) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))
        self.least = least

    def forward(self, x: Tensor) -> Tensor:
        liked = self.router(x).argmax(-1)
        sizes = (torch.nn.functional.one_hot(liked, EXPERTS).sum(0)).tolist()
        order = liked.argsort()
        sizes = [max(size, self.least) for size in sizes]
        parts = x[order].split(sizes)
        routed = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        return x + routed[order.argsort()]


def chain(model: Stack, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = torch.tanh(block(x))
    return x


def test_rows_that_are_split_by_their_expert() -> None:
    model = Stack(chain, Routed)
    assert_exact(model, batch())
    (first, *_) = recorded(model, batch()).events
    assert first.guessed
    rows = len(batch()["x"])
    assert first.flops >= 2 * rows * WIDTH * (WIDTH + EXPERTS)  # the experts compute all rows, whoever has them


def test_stand_ins_of_sizes_may_also_be_too_large() -> None:
    """A forward that asks for at least so many rows each: more than there are."""
    assert recorded(Stack(chain, lambda: Routed(least=100)), batch()).events[0].guessed


def test_sizes_that_nobody_guessed_must_sum() -> None:
    class Splitting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.cat(x.split([1, 1])))

    with pytest.raises(RuntimeError, match="split_sizes to sum exactly"):
        recorded(Stack(chain, lambda: Splitting(WIDTH, WIDTH)), batch())
