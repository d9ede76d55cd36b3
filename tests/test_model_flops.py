from __future__ import annotations

from pipes import recorded

import pytest
import torch
from torch import Tensor, nn


def backward_of(model: nn.Module, x: Tensor) -> list[tuple[int, int]]:
    recording = recorded(model, (x, x))
    return [(recording.events[event].flops, recording.events[event].backward_flops) for event in recording.calls]


def test_a_backward_has_a_product_for_each_operand_that_needs_a_gradient() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    model[1].requires_grad_(False)
    own = 2 * 4 * 8 * 8
    # The input needs none; the frozen layer passes a gradient on and has none of its own.
    assert backward_of(model, torch.rand(4, 8)) == [(own, own), (own, own), (own, 2 * own)]


def test_a_convolution_is_a_product_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    first, second = backward_of(model, torch.rand(2, 3, 8, 8))
    assert first[1] == first[0] > 0
    assert second[1] == 2 * second[0] > 0


@pytest.mark.parametrize("trained", [True, False])
def test_attention_on_a_cpu_is_counted(trained: bool) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4), requires_grad=trained)

        def forward(self, x: Tensor) -> Tensor:
            x = x * self.scale
            return nn.functional.scaled_dot_product_attention(x, x, x)

    (counted,) = backward_of(nn.Sequential(Attention()), torch.rand(2, 3, 5, 4))
    products = 2 * (2 * 3 * 5 * 5 * 4 * 2)
    assert counted == (products, products * 5 // 2 if trained else 0)
