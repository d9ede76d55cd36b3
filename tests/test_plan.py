from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from training import batches_of_tokens, gpt, trainer_of

from raypipe.options import Options
from raypipe.plan import Plan
from raypipe.planning import make_plan


def plan_of(model: nn.Module, stages: int, **options: Any) -> Plan:
    return make_plan(model, Options(stages, backend="local", microbatches=4, **options), batches_of_tokens(1)[0])


def test_every_weight_is_on_one_stage() -> None:
    model = gpt()
    plan = plan_of(model, 3)
    held = [plan.held_by(stage) for stage in range(3)]
    assert [name for names in held for name in names] == [name for name, _ in model.named_parameters()]
    assert sum(len(plan.tensors_of(stage)) for stage in range(3)) == len(model.state_dict())
    assert plan.gradients().owned == tuple(held)
    assert plan.gradients().shared == {}


def test_a_tied_weight_is_on_both_ends_and_counts_once() -> None:
    plan = plan_of(gpt(tied=True), 3)
    gradients = plan.gradients()
    assert gradients.shared == {(0, 2): ("embedding.weight",)}
    assert "embedding.weight" in gradients.owned[0]
    assert not any("embedding.weight" in names or "head.weight" in names for names in gradients.owned[1:])
    assert len(gradients.order) == len(set(gradients.order)) == sum(map(len, gradients.owned))
    assert plan.wiring().groups == ((0, 2),)


def test_neighbours_have_channels_both_ways() -> None:
    assert plan_of(gpt(), 3).wiring().pairs == ((0, 1), (1, 0), (1, 2), (2, 1))
    assert plan_of(gpt(), 1).wiring().pairs == ()


def test_frozen_weights_have_no_gradients() -> None:
    model = gpt()
    model.embedding.requires_grad_(False)
    gradients = plan_of(model, 2).gradients()
    assert "embedding.weight" not in gradients.order
    assert "embedding.weight" in plan_of(model, 2).held_by(0)


def test_balance_decides_the_cuts() -> None:
    assert plan_of(gpt(), 3, balance=[1, 4, 2]).partition.cuts == (1, 5)
    by_weights = plan_of(gpt(layers=8), 4, balance="parameters")
    sizes = [sum(t.numel() for t in by_weights.tensors_of(stage).values()) for stage in range(4)]
    assert max(sizes) < 1.5 * min(sizes)


def test_the_optimizer_is_tried_with_each_stages_own_parameters_and_without_its_memory() -> None:
    seen: list[dict[str, tuple[torch.Size, bool]]] = []

    def optimizer(parameters: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        seen.append({name: (p.shape, isinstance(p, FakeTensor)) for name, p in parameters})
        return torch.optim.AdamW(parameters, fused=True)

    model = gpt()
    plan = plan_of(model, 3, optimizer=optimizer)
    whole, *stages = seen  # first, on fakes, for the size of its state
    assert list(whole) == list(dict(model.named_parameters()))
    assert [tuple(named) for named in stages] == [plan.held_by(stage) for stage in range(3)]
    shapes = {name: (p.shape, True) for name, p in model.named_parameters()}
    assert {name: shape for named in stages for name, shape in named.items()} == shapes


def test_a_plan_starts_nothing_and_needs_no_loss_for_a_prediction() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).eval()
    batch = (torch.rand(4, 4), torch.rand(4, 4))
    plan = make_plan(model, Options(2), batch, training=False)
    assert plan.rule is None


def test_a_plan_prints_as_a_table() -> None:
    trainer = trainer_of(gpt(tied=True), 3, example=batches_of_tokens(1)[0], microbatches=4)
    text = str(trainer.plan())
    assert repr(trainer.plan()) == text
    lines = text.splitlines()
    assert lines[0].split("  ")[0] == "stage"
    for word in ("units", "parameters", "forward FLOPs", "backward FLOPs", "sends"):
        assert word in lines[0]
    for word in ("weights", "gradients", "optimizer", "activations in flight", "receives", "sum"):
        assert word in lines[6]
    assert [line.split()[0] for line in lines[2:5]] == ["0", "1", "2"]
    assert [line.split()[4] for line in lines[8:11]] == ["3", "2", "1"]
    assert "embedding" in lines[2]
    assert "head" in lines[4]
    assert lines[11] == "shared: embedding.weight (chunks 0, 2)"
    assert "3 stages, 4 microbatches of 8 samples" in lines[12]
    assert "predicted bubble" in lines[12]
    assert lines[13].startswith("imbalance 1.")
    assert "(data parallelism)" in " ".join(text.split())
    assert all(len(line) <= 120 for line in lines)


def test_sixteen_bytes_a_parameter() -> None:
    """AdamW in float32; a step counter of 4 bytes for each tensor comes on top."""
    model = gpt()
    plan = plan_of(model, 2)
    for number, stage in enumerate(plan.stages):
        buffers = sum(t.nbytes for name, t in plan.tensors_of(number).items() if name not in plan.held_by(number))
        assert stage.weights_bytes == 4 * stage.parameters + buffers
        assert stage.gradients_bytes == 4 * stage.parameters
        assert stage.optimizer_bytes == 8 * stage.parameters + 4 * len(plan.held_by(number))


def test_sixteen_bytes_a_parameter_in_mixed_precision() -> None:
    """With an optimizer that keeps a float32 master of bfloat16 weights: 2 + 2 + 4 + 4 + 4."""

    class Mixed(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        self.state[p] = {name: p.float() for name in ("master", "mean", "square")}

    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))).bfloat16()
    batch = (torch.rand(4, 8).bfloat16(), torch.rand(4, 8).bfloat16())
    options = Options(2, loss=nn.functional.mse_loss, optimizer=lambda named: Mixed(named, {}), microbatches=2)
    for stage in make_plan(model, options, batch).stages:
        own = stage.weights_bytes + stage.gradients_bytes + (stage.optimizer_bytes or 0)
        assert own == 16 * stage.parameters


def test_frozen_parameters_have_weights_alone() -> None:
    model = gpt()
    model.blocks.requires_grad_(False)
    stage = plan_of(model, 3, balance=[2, 3, 2], optimizer=lambda named: torch.optim.SGD(named, lr=0.1)).stages[1]
    assert stage.weights_bytes > 0
    assert (stage.gradients_bytes, stage.optimizer_bytes) == (0, 0)


def test_memory_decides_the_cuts() -> None:
    """Early stages have more microbatches in flight, so they get fewer blocks."""
    stages = plan_of(gpt(layers=9), 3, balance="memory").stages
    assert len(stages[0].units) < len(stages[2].units)
    even = plan_of(gpt(layers=9), 3, balance=[5, 4, 4]).stages
    assert max(stage.total_bytes for stage in stages) < max(stage.total_bytes for stage in even)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_a_callable_is_planned_as_what_it_builds(name: str) -> None:
    family = FAMILIES[name]
    for balance in ("flops", "memory"):
        given, promised = (
            trainer_of(model, 3, microbatches=2, balance=balance, example=family.batch(4)).plan()
            for model in (family.build(), family.build)
        )
        assert promised.stages == given.stages
        assert (promised.partition, promised.rule) == (given.partition, given.rule)
        assert str(promised) == str(given)


def test_a_plan_with_units_that_run_again() -> None:
    whole, again = plan_of(gpt(layers=6), 2), plan_of(gpt(layers=6), 2, recompute="full")
    for one, other in zip(again.stages, whole.stages, strict=True):
        assert one.activations_bytes < 0.5 * other.activations_bytes
        assert 0 < one.recompute_bytes < other.peak_activations_bytes
        assert one.total_bytes < other.total_bytes
        assert one.backward_flops > other.backward_flops
        assert one.forward_flops == other.forward_flops
        assert one.backward_flops < other.backward_flops + one.forward_flops + 1
    text = " ".join(str(again).split())
    assert "recompute: blocks.0 .. norm (7) in the backward; left whole: embedding .. head (3)" in text
    assert "run again" in text
    assert "recompute" not in str(whole)


def test_a_choice_of_units_is_asked_by_name() -> None:
    plan = plan_of(gpt(), 2, recompute=lambda name: name == "blocks.1")
    assert plan.recomputed.units == plan.spec().recompute == ("blocks.1",)
    assert "recompute: blocks.1 in the backward" in str(plan)


def test_memory_and_times_follow_what_runs_again() -> None:
    model = gpt(layers=6)
    told = {"balance": "memory", "schedule": "gpipe"}
    first = plan_of(model, 2, recompute=lambda name: name in [f"blocks.{number}" for number in range(4)], **told)
    assert first.partition.cuts > plan_of(model, 2, **told).partition.cuts
    timed = plan_of(model, 2, recompute="full", balance="time")
    assert all(stage.time is not None and stage.time.backward > stage.time.forward for stage in timed.stages)


def test_auto_takes_less_memory_where_units_run_again() -> None:
    def peaks(recompute: str) -> dict[str, float]:
        choice = plan_of(gpt(layers=6), 2, schedule="auto", recompute=recompute).choice
        assert choice is not None
        return {tried.schedule.name: tried.peak_bytes for tried in choice.tried}

    full, none = peaks("full"), peaks("none")
    # ZB-H2 has every microbatch between its I and W at one time.
    assert all(full[name] <= none[name] for name in full)
    assert full["1f1b"] < 0.7 * none["1f1b"]
