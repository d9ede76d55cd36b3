"""Models as people write them, cut anywhere: the loss and gradients of the unsplit model."""

from __future__ import annotations

import copy
import functools
from typing import Any

import home_made_modules  # noqa: F401  (its cases)
import home_made_networks  # noqa: F401
import pytest
import torch
from home_made import CASES, WIDTH, Stack, chain, mse, vectors
from parity import EVERY, Step, assert_exact, assert_same_step, batch_step, cuts_of, split_step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from training import Run, piped

from raypipe.driver.cluster import Session


@pytest.mark.parametrize("name", CASES)
def test_home_made_models(name: str) -> None:
    assert_exact(CASES[name], cuts_of(list(CASES).index(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_home_made_models_in_every_cut(name: str) -> None:
    assert_exact(CASES[name], EVERY)


def test_a_difference_would_be_seen() -> None:
    """So the tests above can fail."""
    case = CASES["residuals_outside"]()
    step = split_step(case, 2, "gpipe", 2)
    with torch.no_grad():
        case.model.blocks[3].bias[0] += 1e-2  # type: ignore[index, union-attr]
    with pytest.raises(AssertionError):
        assert_same_step(step, batch_step(case))
    with pytest.raises(AssertionError, match="has no gradient"):
        assert_same_step(Step(step.loss, {}), step)


# Over Ray, where model and batch are pickled and every rank is a process.


OVER_RAY = ("dicts_between_blocks", "unet", "recurrent", "a_dataclass_returned", "a_module_dict_and_any_arguments")


@pytest.mark.ray
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in OVER_RAY[:2] else pytest.mark.slow) for n in OVER_RAY]
)
def test_home_made_models_over_ray(name: str, ray_session: Session) -> None:
    """The same bits as in one process."""
    case = CASES[name]()
    options: dict[str, Any] = {"optimizer": functools.partial(torch.optim.SGD, lr=0.5), "microbatches": 2}
    options |= case.options
    wanted = piped(case.model, [case.batch], 3, **options)
    assert_bit_equal(piped(case.model, [case.batch], 3, backend="ray", **options), wanted)
    assert any(not torch.equal(tensor, case.model.state_dict()[name]) for name, tensor in wanted.state.items())


# Dropout: the same numbers however the model is cut.


def assert_bit_equal(found: Run, wanted: Run) -> None:
    assert found.losses == wanted.losses
    for name, tensor in wanted.state.items():
        assert torch.equal(found.state[name], tensor), name


class Attending(nn.Module):
    """Dropout in a module, in attention, by a function between units, and of noise made by hand."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.3, batch_first=True)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(3))
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.2, batch_first=True)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.dropout(self.drop(layer(x)), 0.1, self.training)
            x = x * (torch.rand_like(x) > 0.1)
        h, _ = self.attention(x, x, x)
        return F.mse_loss(h + torch.randn_like(x) * 0.1, y)


def attending() -> tuple[nn.Module, Any]:
    return Attending(), {"x": torch.randn(4, 5, WIDTH), "y": torch.randn(4, 5, WIDTH)}


def convolving() -> tuple[nn.Module, Any]:
    """Whole channels dropped, and recurrent dropout."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolutions = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))
            self.channels = nn.Dropout2d(0.4)
            self.rnn = nn.GRU(WIDTH, WIDTH, 2, batch_first=True, dropout=0.3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            for convolution in self.convolutions:
                x = self.channels(F.leaky_relu_(convolution(x)))
            return F.mse_loss(self.rnn(F.alpha_dropout(x.mean(1), 0.2, self.training))[0], y)

    return Model(), {"x": torch.randn(4, 2, WIDTH, WIDTH), "y": torch.randn(4, WIDTH, WIDTH)}


def dropped(make: Any, stages: int, schedule: str, backend: str = "local") -> Run:
    torch.manual_seed(0)
    model, batch = make()
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-2)
    options = {"schedule": schedule, "backend": backend, "microbatches": 2, "optimizer": optimizer}
    return piped(model, [batch, batch], stages, **options)


@pytest.mark.parametrize("make", [attending, convolving])
def test_dropout_is_bit_equal_for_every_cut(make: Any) -> None:
    wanted = dropped(make, 1, "gpipe")
    assert wanted.losses[0] != wanted.losses[1]
    for stages, schedule in ((2, "1f1b"), (3, "gpipe"), (4, "1f1b")):
        assert_bit_equal(dropped(make, stages, schedule), wanted)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("make", [attending, convolving])
def test_dropout_is_bit_equal_over_ray(make: Any, ray_session: Session) -> None:
    assert_bit_equal(dropped(make, 4, "1f1b", "ray"), dropped(make, 1, "gpipe"))


# Statistics of a microbatch.


def with_norm() -> nn.Module:
    torch.manual_seed(0)
    return Stack(
        lambda model, x: chain(model, x), lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    )


def with_spectral_norm() -> nn.Module:
    torch.manual_seed(0)
    return Stack(chain, lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            with_norm,
            r"blocks.0.1 is a BatchNorm1d, whose statistics .*batch_norm='microbatch'.*microbatches=1",
        ),
        (
            with_spectral_norm,
            r"changes the buffer blocks.0.parametrizations.weight.0._[uv].*microbatches=1",
        ),
    ],
)
def test_statistics_of_a_batch_are_refused_over_microbatches(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        piped(make(), [vectors()], 2, loss=mse, microbatches=2)


@pytest.mark.parametrize("make", [with_norm, with_spectral_norm])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_statistics_of_a_microbatch_are_those_of_its_own_forward(make: Any, microbatches: int) -> None:
    """``batch_norm="microbatch"``: one forward in train mode for each, in order, and the mean of their gradients."""
    batches = [vectors(), vectors()]
    lr = 0.1
    whole = make()
    optimizer = torch.optim.SGD(whole.parameters(), lr=lr)
    losses = []
    for x, y in batches:
        parts = [mse(whole(a), b) for a, b in zip(x.chunk(microbatches), y.chunk(microbatches), strict=True)]
        loss = sum(parts) / microbatches
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # type: ignore[union-attr]
    options: dict[str, Any] = {"loss": mse, "microbatches": microbatches}
    options |= {"optimizer": functools.partial(torch.optim.SGD, lr=lr), "batch_norm": "microbatch"}
    for stages, schedule in ((1, "gpipe"), (3, "1f1b"), (4, "gpipe")):
        found = piped(make(), batches, stages, schedule=schedule, **options)
        assert found.losses == pytest.approx(losses, rel=1e-6)
        for name, tensor in whole.state_dict().items():
            torch.testing.assert_close(found.state[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
