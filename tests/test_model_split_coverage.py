from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn

from raypipe.model.build import make_skeleton
from raypipe.model.record import record
from raypipe.model.split_coverage import coverage
from raypipe.model.twin import Twin


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.split, self.both, self.unused = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(8))
        self.frozen = nn.Parameter(torch.ones(4, 4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.both(self.split(x) @ self.frozen) + self.both.weight.sum()
        return torch.cat([y, y @ self.both.weight.T], -1) * self.scale


def test_what_is_split_and_what_keeps_the_rest_whole() -> None:
    model = Mixed()
    found = coverage(lambda: model(torch.randn(3, 4)), dict(model.named_parameters()))
    assert found.split == {"split.weight": 64, "split.bias": 16}
    assert found.whole == {"both.weight": 64, "scale": 32}
    assert found.functions == {"both.weight": ("sum",), "scale": ("mul",)}
    assert found.share() == 80 / 176
    assert found.share(["split.weight", "scale"]) == 64 / 96
    assert found.share(["split.weight"]) == 1.0
    assert found.share(["frozen", "unused.weight"]) == 1.0  # nothing to wait for
    assert all(p.grad is None for p in model.parameters())


def test_hooks_keep_a_parameter_whole() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.register_hook(lambda gradient: None)
    model[1].weight.register_hook(lambda gradient: None)
    found = coverage(lambda: model(torch.randn(3, 4)), dict(model.named_parameters()))
    assert set(found.whole) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert found.functions["0.weight"] == ("linear",)
    assert found.share() == 0.0


def test_a_shared_parameter_counts_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    names = dict(model.named_parameters(remove_duplicate=False))
    assert coverage(lambda: model(torch.randn(3, 4)), names).split == {"0.weight": 64}


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "t5", "bert_masked"])
def test_a_recording_on_fake_tensors_tells_it_too(name: str) -> None:
    family = FAMILIES[name]
    model, batch = family.build(), family.batch(2)
    found = coverage(lambda: model(**batch), dict(model.named_parameters()))
    assert found.share() > 0.97
    twin = Twin(make_skeleton(model).model)
    run = lambda: record(twin, lambda fake: fake(**copy.deepcopy(batch)))  # noqa: E731
    assert coverage(run, dict(twin.model.named_parameters())) == found
    assert found.share(twin.unit_parameters[next(iter(twin.units))]) > 0.9
