from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raypipe.errors import BatchError
from raypipe.model.call import Caller
from raypipe.model.gradient_check import check_gradients, in_process
from raypipe.model.microbatch import find_layout
from raypipe.model.probe import find_rule
from raypipe.model.weights import LossRule, Rule


class Toy(nn.Module):
    """A loss by hand, and a second layer that only a small term trains."""

    def __init__(self, coefficient: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.main, self.side = nn.Linear(4, 4), nn.Linear(4, 3)
        self.p, self.coefficient = 0.5, coefficient

    def forward(self, x: Tensor) -> Tensor:
        share = self.side(x).softmax(-1).mean(0)
        main = nn.functional.dropout(self.main(x), self.p).square().mean((0, 1))
        return main + self.coefficient * share.square().sum()


def checked(model: nn.Module, rule: Rule = Rule.SAMPLES) -> None:
    batch = {"x": torch.randn(3, 4, generator=torch.Generator().manual_seed(0))}
    check_gradients(in_process(model, Caller()), batch, find_layout(batch), LossRule(rule))


def test_a_term_too_small_for_the_loss_shows_in_a_gradient() -> None:
    checked(Toy(0.0))
    with pytest.raises(BatchError, match=r"the gradient of side\..* give microbatch_weight") as error:
        checked(Toy(1e-4))
    assert "\n" not in str(error.value)
    batch = {"x": torch.randn(6, 4)}
    with pytest.raises(BatchError, match="give microbatch_weight"):
        find_rule(Toy(1e-4), Caller(), batch, find_layout(batch))
    assert find_rule(Toy(0.0), Caller(), batch, find_layout(batch)).weight is Rule.SAMPLES


def test_a_wrong_rule_shows_too() -> None:
    with pytest.raises(BatchError, match=r"the gradient of main\."):
        checked(Toy(0.0), Rule.SUM)


def test_the_model_and_the_random_state_are_left_alone() -> None:
    model = Toy(0.0)
    model.main.weight.grad = torch.ones(4, 4)
    before, state = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    checked(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(model.main.weight.grad, torch.ones(4, 4))
    assert model.side.weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_without_a_backward_here_is_not_refused() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise RuntimeError("mine")

    class Custom(Toy):
        def forward(self, x: Tensor) -> Tensor:
            return Broken.apply(super().forward(x))  # type: ignore[no-any-return, no-untyped-call]

    checked(Custom(1e-4))
