"""Models as people write them, each with a batch of four samples. Here: what crosses between blocks, of every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from parity import Case
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CASES", "SAMPLES", "WIDTH", "Stack", "case", "chain", "mse", "stack", "vectors"]

WIDTH, SAMPLES = 8, 4

CASES: dict[str, Callable[[], Case]] = {}
"""By name: makes a model and its batch, always the same."""


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    def seeded() -> Case:
        torch.manual_seed(3)
        return make()

    CASES[make.__name__] = seeded
    return seeded


def mse(outputs: Any, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets)


def vectors(*shape: int) -> tuple[Tensor, Tensor]:
    """A pair of inputs and targets."""
    return torch.randn(SAMPLES, *(shape or (WIDTH,))), torch.randn(SAMPLES, *(shape or (WIDTH,)))


class Stack(nn.Module):
    """Four blocks and the code between them: ``run(model, x)``. The model carries a lambda as its attribute."""

    def __init__(self, run: Callable[[Any, Any], Any], make: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make() if make else nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.run = run
        self.scale = lambda x: x * 1.5

    def forward(self, x: Any) -> Any:
        return self.run(self, x)


def stack(run: Callable[[Any, Any], Any], make: Callable[[], nn.Module] | None = None, **options: Any) -> Case:
    return Case(Stack(run, make), vectors(), {"loss": mse, **options})


# What crosses between blocks.


class Dicts(nn.Linear):
    """Takes and returns a dict of everything."""

    def forward(self, given: Any, *, flag: bool = False) -> Any:  # type: ignore[override]
        h = torch.tanh(super().forward(given["h"]))
        order = h.detach().argsort(-1)
        rest = (order, given["rest"][1] + 1, None, 0.5, [True, "word", h[:, :2].double()])
        return {"h": h * 2 if flag else h, "rest": rest, "positive": h > 0, "mask": given.get("mask")}


@case
def dicts_between_blocks() -> Case:
    def run(model: Any, x: Tensor) -> Tensor:
        given: Any = {"h": x, "rest": (None, 3), "mask": None}
        for block in model.blocks:
            given = block(given, flag=given["mask"] is None)
            order, number, nothing, half, (is_true, word, double) = given["rest"]
            assert nothing is None
            if is_true and word == "word":
                h = given["h"] * number * half + double.sum(1, keepdim=True).float()
                given["h"] = torch.where(given["positive"], h, h.gather(1, order))
        return given["h"]  # type: ignore[no-any-return]

    return stack(run, lambda: Dicts(WIDTH, WIDTH))


class Tuples(nn.Linear):
    def forward(self, x: Tensor, side: Tensor, kept: Any = None, *rest: Any) -> Any:  # type: ignore[override]
        h = torch.tanh(super().forward(x))
        return h, side + h.detach().mean(-1, keepdim=True), [kept], 7, *rest


@case
def tuples_between_blocks() -> Case:
    def run(model: Any, x: Tensor) -> Tensor:
        given: Any = (x, torch.zeros(len(x), 1))
        for block in model.blocks:
            given = block(*given[:4])
        h, side, _, number = given[:4]
        return h * number + side  # type: ignore[no-any-return]

    return stack(run, lambda: Tuples(WIDTH, WIDTH))


class Pair(NamedTuple):
    h: Tensor
    gate: Tensor


class Named(nn.Linear):
    def forward(self, given: Any) -> Pair:  # type: ignore[override]
        h = super().forward(given.h if isinstance(given, Pair) else given)
        return Pair(h.sin(), h.sigmoid())


@case
def namedtuples_between_blocks() -> Case:
    def run(model: Any, x: Any) -> Tensor:
        for block in model.blocks:
            x = block(x)
            x = x._replace(h=x.h * x.gate)
        return x.h  # type: ignore[no-any-return]

    return stack(run, lambda: Named(WIDTH, WIDTH))


@case
def residuals_outside() -> Case:
    def run(model: Any, x: Tensor) -> Tensor:
        first = x = model.scale(x)
        for block in model.blocks:
            x = x + torch.tanh(block(x)) + first
        return x

    return stack(run)


@case
def in_place_on_what_crosses() -> Case:
    def run(model: Any, x: Tensor) -> Tensor:
        for number, block in enumerate(model.blocks):
            h = block(x)
            h += x
            h.masked_fill_(h.detach() > 2, 0.25 * number)
            h[:, number].mul_(0.5)
            x = h.clamp_(min=-1).relu_() - 0.1
        return x

    return stack(run)


@case
def in_place_modules() -> Case:
    return stack(lambda model, x: chain(model, x), lambda: nn.Sequential(nn.ELU(inplace=True), nn.Linear(WIDTH, WIDTH)))


def chain(model: Any, x: Any) -> Any:
    for block in model.blocks:
        x = block(x)
    return x


@case
def in_place_into_an_early_value() -> Case:
    """The third block's result is added to the first one's in place, which the fourth reads."""

    def run(model: Any, x: Tensor) -> Tensor:
        first = model.blocks[0](x)
        second = model.blocks[1](first.tanh())
        third = model.blocks[2](second)
        first += third
        return model.blocks[3](first) + second  # type: ignore[no-any-return]

    return stack(run)


@case
def without_gradients_in_between() -> Case:
    def run(model: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = model.blocks[0](x)
        h = model.blocks[1](x)
        weight = F.softmax(h.detach(), -1)
        h = model.blocks[2](h * weight)
        return model.blocks[3](h + teacher)  # type: ignore[no-any-return]

    return stack(run)


@case
def a_block_whose_result_is_thrown_away() -> Case:
    def run(model: Any, x: Tensor) -> Tensor:
        h = model.blocks[0](x)
        model.blocks[1](h)
        return model.blocks[3](model.blocks[2](h).tanh())  # type: ignore[no-any-return]

    return stack(run)


@case
def a_gradient_that_is_cut_off() -> Case:
    """No gradient reaches the first two blocks, though they compute."""

    def run(model: Any, x: Tensor) -> Tensor:
        h = model.blocks[1](model.blocks[0](x).tanh()).detach()
        return model.blocks[3](model.blocks[2](h).tanh()) + h  # type: ignore[no-any-return]

    return stack(run)
