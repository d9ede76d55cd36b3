from __future__ import annotations

import math

import torch

from raypipe.stage.loss_scale import LossScale


def test_the_rules_are_those_of_pytorchs_scaler() -> None:
    """A long run with a few overflows: the scale is the same after each step."""
    theirs, ours = torch.amp.GradScaler("cpu"), LossScale()
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    skipped = {3, 4, 2500, 2501, 4700}
    for step in range(6800):
        theirs.scale(torch.zeros(1))
        parameter.grad = torch.tensor([math.inf if step in skipped else 1.0])
        theirs.step(optimizer)
        theirs.update()
        ours.update(skipped=step in skipped)
        assert ours.value == theirs.get_scale(), step
    assert ours.value == 65536.0 / 2**5 * 2**3  # doubled after 2005, 4502 and 6701 steps


def test_a_scale_that_cannot_help_is_told() -> None:
    scale = LossScale()
    for _ in range(29):
        scale.update(skipped=True)
    assert (scale.exhausted, scale.skipped) == (False, 29)
    scale.update(skipped=True)
    assert (scale.exhausted, scale.skipped) == (True, 30)
    scale.update(skipped=False)
    assert scale.skipped == 0


def test_it_never_grows_to_infinity() -> None:
    scale = LossScale()
    scale.value = torch.finfo(torch.float32).max / 1.5
    for _ in range(2000):
        scale.update(skipped=False)
    assert scale.value == torch.finfo(torch.float32).max / 1.5
