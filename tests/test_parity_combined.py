"""Replicas, shared-out optimizers, precision and recomputing, together: each keeps its promise beside the others."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import Run, batches_of_tokens, gpt, piped, trainer_of

from raypipe import NonFiniteError

adamw = functools.partial(torch.optim.AdamW, lr=1e-3)
SHARDS = (None, "optimizer")


def assert_same_bits(found: Run, wanted: Run) -> None:
    assert (found.losses, found.norms) == (wanted.losses, wanted.norms)
    assert all(torch.equal(found.state[name], tensor) for name, tensor in wanted.state.items())


class Overflowing(nn.Module):
    """Three units; a sample's ``gain`` scales its loss, so that a large one overflows under fp16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).relu()
        return (x.float() * gain[:, None]).mean()


def samples(gain: float, at: int) -> dict[str, Tensor]:
    batch = {"x": torch.randn(8, 6, generator=torch.Generator().manual_seed(3)), "gain": torch.ones(8)}
    batch["gain"][at] = gain
    return batch


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("at", [1, 6], ids=["first replica", "second replica"])
def test_an_overflow_in_any_replica_skips_the_step_in_all(
    shard: str | None, max_grad_norm: float | None, at: int
) -> None:
    options: dict[str, Any] = {"data_parallel": 2, "shard": shard, "precision": "fp16", "microbatches": 2}
    options |= {"max_grad_norm": max_grad_norm, "microbatch_weight": "samples", "optimizer": adamw}
    with trainer_of(Overflowing(), 3, example=samples(1.0, 0), **options) as trainer:
        assert trainer.train_step(samples(1.0, 0))["skipped"] is False
        before = trainer.state_dict()
        skipped = trainer.train_step(samples(1e5, at))
        assert skipped["skipped"] is True
        assert skipped["non_finite"] is not None
        assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.state_dict().items())
        after = trainer.train_step(samples(1.0, 0))
        assert (after["skipped"], after["loss_scale"]) == (False, skipped["loss_scale"] / 2)
        assert any(not torch.equal(tensor, before[name]) for name, tensor in trainer.state_dict().items())


@pytest.mark.parametrize("at", [1, 6], ids=["first replica", "second replica"])
@pytest.mark.parametrize("weight", ["samples", "targets"])
def test_a_nan_loss_in_any_replica_is_one_error(at: int, weight: str) -> None:
    options: dict[str, Any] = {"data_parallel": 2, "microbatches": 2, "optimizer": adamw}
    with trainer_of(gpt(), 2, microbatch_weight=weight, forward=poisoned, **options) as trainer:
        (batch,) = batches_of_tokens(1)
        trainer.train_step({**batch, "poison": torch.zeros(8)})
        with pytest.raises(NonFiniteError, match="the loss of microbatch"):
            trainer.train_step({**batch, "poison": torch.zeros(8).index_fill(0, torch.tensor([at]), torch.nan)})


def poisoned(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(tokens=batch["tokens"], targets=batch["targets"])
    return loss + batch["poison"].sum()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sharing_out_the_optimizer_changes_no_bit(precision: str) -> None:
    options: dict[str, Any] = {"data_parallel": 2, "microbatches": 2, "precision": precision, "max_grad_norm": 0.5}
    runs = [piped(gpt(), batches_of_tokens(3), 2, optimizer=adamw, shard=shard, **options) for shard in SHARDS]
    assert_same_bits(*runs)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputing_changes_no_bit(schedule: str, precision: str) -> None:
    options: dict[str, Any] = {"data_parallel": 2, "shard": "optimizer", "microbatches": 2, "schedule": schedule}
    options |= {"precision": precision, "optimizer": adamw, "max_grad_norm": 0.5}
    model = gpt(dropout=0.3, layers=4)
    runs = [piped(model, batches_of_tokens(2), 2, recompute=how, **options) for how in ("full", "none")]
    assert_same_bits(*runs)
