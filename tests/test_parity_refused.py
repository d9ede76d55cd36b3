"""What no cut reproduces: a sentence with the value, where it comes from and where it is used; no rank is started."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from home_made import WIDTH, Stack, mse, vectors
from parity import Case, assert_exact, cuts_of
from torch import Tensor, nn
from torch.nn import functional as F
from training import piped, trainer_of

from raypipe import CutError


def if_positive(model: Any, x: Tensor) -> Tensor:
    h = model.blocks[0](x)
    if h.mean() > 0:
        h = h * 2
    return model.blocks[3](model.blocks[2](model.blocks[1](h)))  # type: ignore[no-any-return]


def while_large(model: Any, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = block(x)
        while float(x.detach().abs().max()) > 1:
            x = x / 2
    return x


def by_item(model: Any, x: Tensor) -> Tensor:
    for block in model.blocks:
        h = block(x)
        x = h / h.detach().std().item()
    return x


def by_numpy(model: Any, x: Tensor) -> Tensor:
    h = model.blocks[0](x)
    order = h.detach().numpy().argsort(-1)
    return model.blocks[3](model.blocks[2](model.blocks[1](h.gather(1, torch.from_numpy(order)))))  # type: ignore[no-any-return]


def early_exit(model: Any, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = block(x)
        if torch.equal(x, x.clamp(-1, 1)):
            break
    return x


def selected(model: Any, x: Tensor) -> Tensor:
    h = model.blocks[0](x)
    h = h[h.sum(1) > -1e9]
    return model.blocks[3](model.blocks[2](model.blocks[1](h)))  # type: ignore[no-any-return]


def through_an_attribute(model: Any, x: Tensor) -> Tensor:
    x = model.blocks[0](x)
    x = model.blocks[2](model.blocks[1](x)) + model.blocks[0].kept
    return model.blocks[3](x)  # type: ignore[no-any-return]


class Keeping(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        self.kept = h.tanh().mean(1, keepdim=True)
        return h


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


def rounded(model: Any, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = Straight.apply(block(x))  # type: ignore[no-untyped-call]
    return x


def mapped(model: Any, x: Tensor) -> Tensor:
    h = model.blocks[0](x)
    h = torch.vmap(lambda row: row / row.norm())(h)
    return model.blocks[3](model.blocks[2](model.blocks[1](h)))  # type: ignore[no-any-return]


def running_mean(model: Any, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = block(x)
    model.mean.lerp_(x.detach().mean(0), 0.1)
    return x - model.mean


def hooked(model: Any, x: Tensor) -> Tensor:
    h = model.blocks[1](model.blocks[0](x))
    h.register_hook(lambda gradient: gradient.clamp(-1, 1))
    return model.blocks[3](model.blocks[2](h))  # type: ignore[no-any-return]


HERE = r"test_parity_refused.py:\d+"
VALUE = "torch.float32 tensor"


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        (
            if_positive,
            rf"{HERE} asks a torch.bool tensor \(\) made by \w*gt\w* \({HERE}\) for its data \(__bool__\)",
        ),
        (while_large, rf"{HERE} asks a torch.float32 tensor \(\) made by max \({HERE}\) for its data \(__float__\)"),
        (by_item, rf"{HERE} asks a torch.float32 tensor \(\) made by std \({HERE}\) for its data \(item\)"),
        (by_numpy, rf"{HERE} asks a torch.float32 tensor \(2, 8\) made by detach \({HERE}\) for its data \(numpy\)"),
        (
            early_exit,
            rf"{HERE} asks a {VALUE} \(2, 8\) made by blocks.0 \({HERE}\) for its data \(equal\)",
        ),
        (selected, rf"{HERE} asks a torch.float32 tensor \(2, 8\) made by blocks.0 .* for its data \(__getitem__\)"),
        (rounded, rf"round at {HERE} .*runs inside the autograd function Straight, applied outside of every unit"),
        (mapped, rf"{VALUE} \(2, 8\), made inside a unit and not returned by it .* at {HERE}"),
        (running_mean, rf"lerp_ at {HERE} changes the buffer mean outside of every unit"),
        (hooked, rf"{HERE} calls register_hook on a torch.float32 tensor \(2, 8\) made by blocks.1"),
    ],
)
def test_what_no_cut_reproduces_is_refused_before_anything_starts(run: Any, sentence: str) -> None:
    torch.manual_seed(0)
    model = Stack(run, lambda: Keeping(WIDTH, WIDTH))
    model.register_buffer("mean", torch.zeros(WIDTH))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with trainer_of(model, 2, loss=mse, microbatches=2) as trainer:
        with pytest.raises(CutError, match=sentence) as error:
            trainer.train_step(vectors())
        assert trainer._gang is None
    assert "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_value_that_an_attribute_kept_is_carried() -> None:
    def make() -> Case:
        torch.manual_seed(0)
        return Case(Stack(through_an_attribute, lambda: Keeping(WIDTH, WIDTH)), vectors(), {"loss": mse})

    assert_exact(make, cuts_of(2))


def inside(model: Any, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = block(x)
    return x


class Deciding(nn.Linear):
    """The same things inside of a unit, where they are nobody else's business."""

    def forward(self, x: Tensor) -> Tensor:
        h = Straight.apply(super().forward(x) * 4) / 4  # type: ignore[no-untyped-call]
        if h.mean() > 1e9:
            h = h * 2
        h = h / max(1.0, h.detach().abs().max().item())
        return torch.vmap(lambda row: row.sin())(h)


def test_inside_a_unit_all_of_it_works() -> None:
    torch.manual_seed(0)
    model, batch = Stack(inside, lambda: Deciding(WIDTH, WIDTH)), vectors()
    parts = [mse(model(x), y) for x, y in zip(batch[0].chunk(2), batch[1].chunk(2), strict=True)]
    found = piped(model, [batch], 3, loss=mse, microbatches=2, microbatch_weight="samples")
    assert found.losses[0] == pytest.approx(float(sum(parts).detach()) / 2, rel=1e-6)  # type: ignore[union-attr]


def test_another_way_for_a_later_batch_is_an_error_and_no_wrong_number() -> None:
    """What only a later batch shows ends the run with the reason."""

    def run(model: Any, given: dict[str, Tensor]) -> Tensor:
        x, kept = given["x"], given["mask"].nonzero()[:, 0]
        for block in model.blocks:
            x = x.index_add(0, kept, block(x[kept]))
        return F.mse_loss(x, given["y"])

    x, y = vectors()
    full, half = torch.ones(4, dtype=torch.bool), torch.tensor([True, False, True, True])
    with trainer_of(Stack(inside), 2, forward=run, microbatches=1) as trainer:
        trainer.train_step({"x": x, "y": y, "mask": full})
        with pytest.raises(Exception, match=r"made by __getitem__ .* the shape depends on the data"):
            trainer.train_step({"x": x, "y": y, "mask": half})
