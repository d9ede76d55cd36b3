"""The pipeline in three dimensions on Ray: stages, tensor groups and replicas, against the unsplit model."""

from __future__ import annotations

from typing import Any

import pytest
from tensor_models import tokens
from test_stage_tensor import MODELS, assert_trains_like_unsplit, batch_of, trained

pytestmark = pytest.mark.ray

GRIDS = [(1, 2, 1), (2, 2, 1), (2, 1, 2), (2, 2, 2), (4, 1, 2)]
SHARDS = (None, "optimizer")


def told(replicas: int, shard: str | None) -> dict[str, Any]:
    return {"data_parallel": replicas, "shard": shard if replicas > 1 else None}


@pytest.mark.slow
@pytest.mark.parametrize("shard", SHARDS)
def test_eight_ranks_train_like_one(ray_session: object, shard: str | None) -> None:
    assert_trains_like_unsplit("llama", 2, 2, **told(2, shard))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "grid", "shard"),
    [("gpt", grid, shard) for grid in GRIDS for shard in SHARDS if grid[2] > 1 or shard is None]
    + [("llama_tied", GRIDS[-1], "optimizer")],
)
def test_every_grid_trains_like_one(
    ray_session: object, name: str, grid: tuple[int, int, int], shard: str | None
) -> None:
    stages, tensor, replicas = grid
    assert_trains_like_unsplit(name, stages, tensor, **told(replicas, shard))


@pytest.mark.slow
def test_units_of_a_tensor_group_run_again(ray_session: object) -> None:
    assert_trains_like_unsplit("llama", 2, 2, recompute="full", schedule="zb_h1", **told(2, "optimizer"))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_tensor_group_in_mixed_precision(ray_session: object, precision: str) -> None:
    model = MODELS["small"][0]().float()
    batches = [batch_of(model, ids) for ids in tokens()]
    one = trained(model, batches, 1, 1, precision=precision)
    two = trained(model, batches, 2, 2, MODELS["small"][1](), precision=precision, **told(2, "optimizer"))
    assert two[0] == pytest.approx(one[0], rel=2e-2)
    assert two[3]["loss"] == pytest.approx(one[3]["loss"], rel=2e-2)
