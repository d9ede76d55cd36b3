"""Compiled units train as eager ones do."""

from __future__ import annotations

import functools
import os
import shutil
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import nn
from training import Run, batches_of_tokens, gpt, piped, trainer_of

from raypipe.driver.cluster import Session

adamw = functools.partial(torch.optim.AdamW, lr=1e-2, eps=1e-4)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),  # of the compiler's own imports
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # dynamo asks, and hides it
    pytest.mark.skipif(
        not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))),
        reason="no C++ compiler; apt-get install g++",
    ),
]


def assert_close(found: Run, wanted: Run) -> None:
    assert found.losses == pytest.approx(wanted.losses, rel=1e-5)
    for key, tensor in wanted.state.items():
        torch.testing.assert_close(found.state[key], tensor, rtol=1e-4, atol=1e-5, msg=key)


def both(model: nn.Module, batches: list[Any], **options: Any) -> tuple[Run, Run]:
    told = {"stages": 2, "microbatches": 2, "optimizer": adamw, **options}
    return piped(model, batches, compile=True, **told), piped(model, batches, **{**told, "backend": "local"})


@pytest.mark.slow
def test_one_kind_of_unit_with_dropout() -> None:
    """Two equal units, three steps, the masks of eager dropout."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.3)) for _ in range(2)))
    batches = [(torch.rand(8, 8), torch.rand(8, 8)) for _ in range(3)]
    assert_close(*both(model, batches, stages=1, units=["*"], loss=nn.functional.mse_loss))


@pytest.mark.slow
def test_a_gpt_with_dropout_two_lengths_and_evaluation() -> None:
    model, told = gpt(layers=2, dropout=0.1), {"microbatches": 2, "optimizer": adamw}
    batches = [*batches_of_tokens(2), *batches_of_tokens(1, length=9)]
    valid = batches_of_tokens(1, seed=5)
    seen = []
    for compiled in (False, True):
        with trainer_of(model, 1, compile=compiled, **told) as trainer:
            losses = [trainer.train_step(batch)["loss"] for batch in batches]
            losses += [trainer.evaluate(valid)["loss"], trainer.train_step(batches[0])["loss"]]
            seen.append(Run(losses, [], trainer.state_dict()))
    assert_close(seen[1], seen[0])


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_models_and_schedules(name: str, schedule: str) -> None:
    if name == "gpt":
        model, batches = gpt(layers=4, dropout=0.1), batches_of_tokens(3)
    else:
        model, batches = FAMILIES[name].build(dropout=0.1), [FAMILIES[name].batch(8, seed=seed) for seed in range(3)]
    assert_close(*both(model, batches, schedule=schedule))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_compiled_units_that_run_again(name: str) -> None:
    if name == "gpt":
        model, batches = gpt(layers=4, dropout=0.1), batches_of_tokens(3)
    else:
        model = FAMILIES[name].build(dropout=0.1, use_cache=False)
        batches = [FAMILIES[name].batch(8, seed=seed) for seed in range(3)]
    told: dict[str, Any] = {"compile": True, "recompute": "full"}
    with trainer_of(model, 2, example=batches[0], microbatches=2, **told) as trainer:
        assert len(trainer.plan().recomputed.units) >= 4
    assert_close(*both(model, batches, recompute="full"))


@pytest.mark.slow
@pytest.mark.ray
def test_over_ray(ray_session: Session) -> None:
    assert_close(*both(gpt(layers=2, dropout=0.1), batches_of_tokens(3), backend="ray"))


@pytest.mark.slow
def test_a_loss_inside_a_unit_is_weighed() -> None:
    """What its cross-entropy averages over has to be seen, so that unit stays eager."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(8, 5)

        def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return nn.functional.cross_entropy(self.out(pair[0]), pair[1], ignore_index=0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.head = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), Head()

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = torch.tanh(block(x))
            return self.head((x, y))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    batch = {"x": torch.rand(6, 8), "y": torch.tensor([0, 0, 1, 2, 3, 4])}
    assert_close(*both(Model(), [batch] * 2))
