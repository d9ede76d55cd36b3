from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from raypipe.stage.state_bytes import state_bytes


@pytest.mark.parametrize(
    ("make", "weight"),
    [
        (lambda named: torch.optim.AdamW(named, lr=1e-3), 2 * 400 + 4),
        (lambda named: torch.optim.AdamW(named, amsgrad=True), 3 * 400 + 4),
        (lambda named: torch.optim.SGD(named, lr=0.1), 0),
        (lambda named: torch.optim.SGD(named, lr=0.1, momentum=0.9), 400),
    ],
)
def test_the_bytes_are_those_of_a_real_step(make: Any, weight: int) -> None:
    parameters = {
        "w": nn.Parameter(torch.rand(10, 10)),
        "v": nn.Parameter(torch.rand(10, 10)),
        "b": nn.Parameter(torch.rand(3)),
    }
    found = state_bytes(make, parameters)
    optimizer = make(list(parameters.items()))
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    real = {
        name: sum(t.nbytes for t in optimizer.state.get(p, {}).values() if t is not None)
        for name, p in parameters.items()
    }
    assert found == real
    assert real["v"] == weight


def test_groups_have_states_of_their_own() -> None:
    parameters = {name: nn.Parameter(torch.rand(10)) for name in ("one", "other")}

    def make(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": [named[0][1]], "momentum": 0.9}, {"params": [named[1][1]]}], lr=0.1)

    assert state_bytes(make, parameters) == {"one": 40, "other": 0}


def test_an_optimizer_that_reads_data_is_not_known() -> None:
    class Reads(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            float(self.param_groups[0]["params"][0].sum())

    assert state_bytes(lambda named: Reads(named, lr=0.1), {"w": nn.Parameter(torch.rand(2))}) is None
    assert state_bytes(lambda named: torch.optim.SGD(named, lr=0.1), {}) == {}
