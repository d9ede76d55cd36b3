from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raypipe.model.once import Once, copied, statistics_of

W = 4


def never(**changed: bool) -> str:
    unit = nn.Linear(W, W)
    once = Once(unit, ((torch.rand(W),), {}))
    told = {"changes_argument": False, "leaves": False, "reads_hidden": False, "inside_checkpoint": False}
    return once.why(**{**told, **changed})


def test_a_plain_call_may_run_again() -> None:
    assert never() == ""


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("changes_argument", "changes an argument in place"),
        ("leaves", "leaves tensors where others find them"),
        ("reads_hidden", "reads tensors that other units keep"),
        ("inside_checkpoint", "runs inside a checkpoint of the model's own"),
    ],
)
def test_what_the_recording_saw(what: str, text: str) -> None:
    assert never(**{what: True}) == text


def why(unit: nn.Module, *arguments: Any) -> str:
    """The reason after a real call."""
    once = Once(unit, (arguments, {}))
    unit(*arguments)
    return once.why(False, False, False, False)


class Changing(nn.Module):
    """Does what it is told beside its work."""

    count: Tensor

    def __init__(self, way: str) -> None:
        super().__init__()
        self.inner, self.way, self.calls, self.width = nn.Linear(W, W), way, 0, W
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "number":
            self.calls += 1
        elif self.way == "buffer":
            self.count += 1
        elif self.way == "other buffer":
            self.count = self.count + 1
        return self.inner(x)


def test_what_is_changed_beside_the_result() -> None:
    x = torch.rand(2, W)
    assert why(Changing("nothing"), x) == ""
    assert why(Changing("number"), x) == "changes its attribute calls"
    assert why(nn.Sequential(Changing("number")), x) == "changes its attribute 0.calls"
    assert why(Changing("buffer"), x) == "changes its buffer count"
    assert why(Changing("other buffer"), x) == "changes its buffer count"


def test_hooks_would_run_twice() -> None:
    unit = nn.Sequential(nn.Linear(W, W))
    unit[0].register_forward_hook(lambda *_: None)
    assert why(unit, torch.rand(2, W)) == "has hooks, which would run twice"


def test_running_statistics_are_no_reason() -> None:
    unit = nn.Sequential(nn.BatchNorm1d(W), nn.InstanceNorm1d(W, track_running_stats=True))
    assert why(unit, torch.rand(2, W, 3)) == ""
    assert statistics_of(unit) == list(unit)
    assert statistics_of(unit.eval()) == []


def test_a_norm_of_ones_own_may_read_its_statistics() -> None:
    class Renorm(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.running_mean

    assert why(nn.Sequential(Renorm(W)), torch.rand(2, W)) == "changes its buffer 0.num_batches_tracked"


def test_statistics_that_a_norm_changes_unseen() -> None:
    """PyTorch's kernels do not count up the versions of running statistics."""
    norm, unit = nn.BatchNorm1d(W), Changing("nothing")
    for module, reason in ((norm, ""), (unit, "changes its buffer count")):
        once = Once(module, ((), {}))
        assert once.why(False, False, False, False, module.buffers()) == reason


class Cache:
    def __init__(self, *held: Any) -> None:
        self.held = list(held)


def test_a_copy_keeps_no_value_alive() -> None:
    mask, value = torch.rand(3), torch.rand(3, requires_grad=True) * 2
    cache = Cache(mask, value)
    made = copied(cache)
    assert made is not cache
    assert made.held is not cache.held
    assert made.held[0] is mask
    assert (made.held[1].device.type, made.held[1].shape) == ("meta", value.shape)
    again = copied(made)
    assert again.held[1].device.type == "meta"


def test_plain_arguments_are_not_copied() -> None:
    module = nn.Linear(W, W)
    assert copied(module) is module
    assert copied(3) == 3
    assert copied(None) is None


def test_what_cannot_be_copied_is_a_reason() -> None:
    class Ignoring(nn.Linear):
        def forward(self, x: Tensor, other: Any = None) -> Tensor:
            return super().forward(x)

    assert why(Ignoring(W, W), torch.rand(2, W), Cache(1)) == ""
    assert why(Ignoring(W, W), torch.rand(2, W), threading.Lock()) == "gets an argument that cannot be copied"
