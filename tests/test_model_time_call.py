"""How long one call takes."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from raypipe.model.cost import CallTime
from raypipe.model.split_backward import splittable
from raypipe.model.time_call import REPEATS, WARM_UP, median_of, timed

CALLS: Counter[float] = Counter()


def slept(seconds: float, result: Tensor) -> Tensor:
    CALLS[seconds] += 1
    time.sleep(seconds)
    return result


SLEEPY = splittable(
    lambda x, w: slept(0.01, x * w),
    lambda g, x, w: slept(0.02, g * w),
    lambda g, x, w: slept(0.04, (g * x).sum()),
)


def test_the_halves_of_a_backward_are_told_apart() -> None:
    CALLS.clear()
    x, weight = torch.ones(4, requires_grad=True), nn.Parameter(torch.ones(()))
    found, result = timed(lambda x: SLEEPY(x, weight), (x,), {}, [weight], True)
    assert found.forward >= 0.01
    assert found.backward >= 0.06
    assert found.input >= 0.02
    assert found.weight >= 0.04
    assert dict.fromkeys((0.01, 0.02, 0.04), 2 * (WARM_UP + REPEATS)) == CALLS  # no half works for the other
    assert result.requires_grad
    assert result.grad_fn is None
    assert (weight.grad, x.grad) == (None, None)


def test_without_halves_none_are_measured() -> None:
    layer = nn.Linear(4, 4)
    found, _ = timed(layer, (torch.ones(2, 4),), {}, list(layer.parameters()), False)
    assert (found.input, found.weight) == (0.0, 0.0)


def test_each_run_has_its_own_arguments() -> None:
    seen: list[Any] = []

    def call(x: Tensor, notes: list[int]) -> Tensor:
        notes.append(1)
        seen.append((x, len(notes)))
        return x.add_(1.0)

    x = torch.zeros(3)
    timed(call, (x, []), {}, [], False)
    assert not x.any()
    assert {count for _, count in seen} == {1}


def test_medians_are_of_each_time() -> None:
    assert median_of([CallTime(1, 9), CallTime(2, 8), CallTime(9, 1)]) == CallTime(2, 8)
