from __future__ import annotations

import pytest
import torch
from tensor_models import ends, pairs, small, tokens

from raypipe import PipelineTrainer
from raypipe.errors import CutError


def planned(ranks, **options):
    ids = tokens()[0]
    example = {"tokens": ids[:, :-1], "targets": ids[:, 1:]}
    plan = {**pairs(), **ends()}
    return PipelineTrainer(
        small(), 1, tensor_parallel=ranks, tensor_parallel_plan=plan, example=example, quiet=True, **options
    ).plan()


def test_a_rank_holds_its_part_of_what_is_split() -> None:
    (whole,), (half,) = planned(1).stages, planned(2).stages
    model = small()
    cut = sum(
        p.numel() - (31 * 16 if p.shape[0] == 61 else p.numel() // 2)
        for name, p in model.named_parameters()
        if not ("norm" in name or name.endswith(("out.bias", "down.bias")))
    )
    assert whole.parameters - half.parameters == cut
    assert whole.weights_bytes - half.weights_bytes == whole.gradients_bytes - half.gradients_bytes == 4 * cut
    # AdamW's two moments; each parameter's count of steps stays whole.
    assert half.optimizer_bytes == pytest.approx(whole.optimizer_bytes - 8 * cut, rel=0.02)
    assert half.activations_bytes == whole.activations_bytes
    assert "tensor_parallel=2: parameters, weights" in str(planned(2))


def test_ranks_and_channels() -> None:
    ids = tokens()[0]
    example = {"tokens": ids[:, :-1], "targets": ids[:, 1:]}
    plan = PipelineTrainer(
        small(tied=True),
        2,
        tensor_parallel=2,
        tensor_parallel_plan={**pairs(), **ends()},
        example=example,
        quiet=True,
    ).plan()
    assert plan.topology.size == 4
    assert plan.topology.leaders(0) == (0, 2)
    wiring = plan.wiring()
    assert wiring.pairs == ((0, 2), (1, 3), (2, 0), (3, 1))  # each rank to its counterpart
    assert wiring.groups == ((0, 2), (1, 3))  # the embedding's slices, which are the head's
    owned = plan.gradients().owned
    assert owned[1] == owned[3] == ()
    assert "embedding.weight" in owned[0]


def test_an_optimizer_that_needs_whole_parameters_is_refused() -> None:
    with pytest.raises(CutError, match="tensor_parallel=2 leaves each rank with a slice"):
        planned(2, optimizer=torch.optim.Adafactor)
