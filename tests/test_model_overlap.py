from __future__ import annotations

import pytest
import torch
from torch import nn
from training import trainer_of


class Views(nn.Module):
    """Two layers whose weights lie in one memory, one after the other or over each other."""

    def __init__(self, second: slice) -> None:
        super().__init__()
        memory = torch.randn(8, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))
        for layer, part in zip(self.layers, (slice(0, 4), second), strict=True):
            layer.weight = nn.Parameter(memory[part])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


@pytest.mark.parametrize("built", [True, False], ids=["module", "callable"])
@pytest.mark.parametrize("second", [slice(0, 4), slice(3, 7)])
def test_parameters_in_the_same_memory_are_refused(second: slice, built: bool) -> None:
    model = Views(second) if built else lambda: Views(second)
    with pytest.raises(ValueError, match=r"layers\.0\.weight and layers\.1\.weight are two tensors in the same memory"):
        trainer_of(model, 2, example={"x": torch.ones(2, 4)})


@pytest.mark.parametrize("built", [True, False], ids=["module", "callable"])
def test_neighbours_in_one_memory_are_fine(built: bool) -> None:
    model = Views(slice(4, 8)) if built else lambda: Views(slice(4, 8))
    with trainer_of(model, 2, microbatches=1) as trainer:
        trainer.train_step({"x": torch.ones(2, 4)})
