"""Training runs to compare: the example's GPT, unsplit in this process or through a trainer."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raypipe import PipelineTrainer

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.append(str(EXAMPLES))

from train_gpt import GPT  # noqa: E402

torch.set_num_threads(1)  # as each rank has; two threads on a busy machine wait for each other

__all__ = ["EXAMPLES", "GPT", "Run", "batches_of_tokens", "gpt", "piped", "relative", "trainer_of", "unsplit"]


@dataclass
class Run:
    """What a training gave."""

    losses: list[float]
    norms: list[float]
    state: dict[str, Tensor]


def gpt(*, tied: bool = False, dropout: float = 0.0, layers: int = 3, seed: int = 0) -> nn.Module:
    """The example's model, tiny."""
    torch.manual_seed(seed)
    model: nn.Module = GPT(vocabulary=61, width=16, layers=layers, heads=2, length=12, dropout=dropout, tied=tied)
    return model


def batches_of_tokens(count: int, samples: int = 8, *, length: int = 12, seed: int = 1) -> list[dict[str, Tensor]]:
    """Random tokens and targets."""
    noise = torch.Generator().manual_seed(seed)
    shape = (samples, length)
    return [
        {
            "tokens": torch.randint(0, 61, shape, generator=noise),
            "targets": torch.randint(0, 61, shape, generator=noise),
        }
        for _ in range(count)
    ]


def unsplit(
    model: nn.Module,
    batches: Sequence[Any],
    optimizer: Callable[..., torch.optim.Optimizer],
    *,
    loss: Callable[[nn.Module, Any], Tensor] = lambda model, batch: model(**batch),
    max_grad_norm: float | None = None,
) -> Run:
    """Trains a copy of the model in the ordinary way."""
    model = copy.deepcopy(model).train()
    made = optimizer(list(model.named_parameters()))
    losses, norms = [], []
    for batch in batches:
        value = loss(model, batch)
        value.backward()
        bound = max_grad_norm if max_grad_norm is not None else float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), bound)))
        made.step()
        made.zero_grad()
        losses.append(value.item())
    return Run(losses, norms, model.state_dict())


def trainer_of(model: nn.Module, stages: int, **options: Any) -> PipelineTrainer:
    """A quiet trainer, on the local backend unless said otherwise."""
    return PipelineTrainer(model, stages, **{"backend": "local", "quiet": True, **options})


def piped(model: nn.Module, batches: Sequence[Any], stages: int, **options: Any) -> Run:
    """Trains through a trainer, which must leave the model as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with trainer_of(model, stages, **options) as trainer:
        metrics = [trainer.train_step(batch) for batch in batches]
        state = trainer.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    return Run([m["loss"] for m in metrics], [m["grad_norm"] for m in metrics], state)


def relative(found: Tensor, wanted: Tensor) -> float:
    """The relative difference of two tensors by their norms."""
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
