from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from raypipe.advice import short
from raypipe.options import Options
from raypipe.planning import make_plan
from raypipe.table import imbalance, plan_table


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (1000, "1.0k"), (85_600, "85.6k"), (2.5e9, "2.5G"), (7e15, "7000.0T")]
)
def test_numbers_are_short(number: float, text: str) -> None:
    assert short(number) == text


def test_a_stage_is_told_by_its_numbers() -> None:
    """Two layers of 8 x 8 and a bias, on four samples in two microbatches."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8))
    options = Options(2, loss=nn.functional.mse_loss, microbatches=2, balance=[1, 2])
    lines = plan_table(make_plan(model, options, (torch.rand(4, 8), torch.rand(4, 8)))).splitlines()
    assert lines[0].split() == ["stage", "units", "parameters", "forward", "FLOPs", "backward", "FLOPs", "sends"]
    # 2 samples x 8 x 8 x 2 FLOPs a layer; the first layer's input needs no gradient; 2 x 8 floats are sent
    assert lines[2].split() == ["0", "0", "72", "256", "256", "64B"]
    assert lines[3].split() == ["1", "2", "..", "3", "(2)", "144", "512", "1.0k", "0B"]
    assert lines[5].split() == [
        "stage",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "in",
        "flight",
        "receives",
        "sum",
    ]
    # Two moments and a step counter for each of two tensors. Kept: x, and relu's output, which is sent. Each of two
    # receives posted ahead is as large as what is sent.
    assert lines[7].split() == ["0", "288B", "288B", "584B", "2", "x", "128B", "=", "256B", "128B", "1.5kB"]
    # Kept: the received value, the middle one, the outputs; the targets of the loss.
    assert lines[8].split() == ["1", "576B", "576B", "1.2kB", "1", "x", "256B", "=", "256B", "64B", "2.6kB"]
    assert lines[9].startswith("1f1b: 2 stages, 2 microbatches of 4 samples; predicted bubble")
    assert lines[10].startswith("imbalance 1.50 ")
    assert all(len(line) <= 120 for line in lines)


def test_columns_are_in_line() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(12)))
    options = Options(3, loss=nn.functional.mse_loss, microbatches=2)
    lines = plan_table(make_plan(model, options, (torch.rand(4, 8), torch.rand(4, 8)))).splitlines()
    starts = [lines[0].index(title) for title in ("stage", "units", "parameters", "forward", "backward", "sends")]
    for line in lines[2:5]:
        assert all(line[start] != " " and (start == 0 or line[start - 1] == " ") for start in starts), line


def test_the_simulation_takes_what_was_counted_for_the_backward() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    for layer in (model[0], model[1]):
        layer.requires_grad_(False)
    options = Options(3, loss=nn.functional.mse_loss, microbatches=2)
    plan = make_plan(model, options, (torch.rand(4, 8), torch.rand(4, 8)))
    assert [stage.backward_flops for stage in plan.stages] == [0, 0, 256]
    assert imbalance(plan) == pytest.approx(512 * 3 / 1024)


def test_a_stage_of_several_chunks_and_what_its_halves_of_backwards_are() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line, self.scale = nn.Linear(8, 8), nn.Parameter(torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self.line(x) * self.scale)

    model = nn.Sequential(nn.Linear(8, 8), Scaled(), nn.Linear(8, 8), nn.Linear(8, 8))
    options = Options(2, loss=nn.functional.mse_loss, microbatches=4, schedule="zbv", balance=[1, 1, 1, 1])
    plan = make_plan(model, options, (torch.rand(4, 8), torch.rand(4, 8)))
    text = str(plan)
    assert [line[7:12] for line in text.splitlines()[2:4]] == ["0 + 3", "1 + 2"]
    assert "4 in 2 chunks" in text
    share = 4 * (8 * 8 + 8) / (4 * (8 * 8 + 8) + 8)
    assert f"backwards in halves: {share:.1%} of the trained weights' bytes have their gradients in W; " in text
    assert "the rest is computed in I, in 1 (mul)" in " ".join(text.split())
    whole = replace(options, schedule="gpipe", balance="flops")
    assert "halves" not in str(make_plan(model, whole, (torch.rand(4, 8), torch.rand(4, 8))))


def test_a_plan_says_how_many_replicas_there_are_and_what_each_has() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    options = Options(2, loss=nn.functional.mse_loss, microbatches=2, data_parallel=3)
    batch = torch.rand(7, 8), torch.rand(7, 8)
    lines = str(make_plan(model, options, batch)).splitlines()
    (at,) = (number for number, line in enumerate(lines) if "replicas" in line)
    assert lines[at] == "3 replicas of this pipeline, 6 ranks; each has up to 3 of a batch's 7 samples"
    assert lines[at + 1].startswith("1f1b: 2 stages, 2 microbatches of 3 samples; predicted bubble")
    shared = str(make_plan(model, replace(options, shard="optimizer"), batch))
    assert "6 ranks, which share the optimizer's state out; each has" in shared


def test_advice_knows_when_the_model_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    options = Options(2, loss=nn.functional.mse_loss, microbatches=2)
    plan = make_plan(model, options, (torch.rand(4, 8), torch.rand(4, 8)))
    monkeypatch.setattr("raypipe.advice.device_memory", lambda: (20_000, "machine"))
    text = " ".join(str(plan).split())
    assert "2 copies (data parallelism) would likely be faster" in text
    assert text.endswith("that is stages=1, data_parallel=2")
    monkeypatch.setattr("raypipe.advice.device_memory", lambda: (6_000, "machine"))
    assert "advice" not in str(plan)
    monkeypatch.setattr("raypipe.advice.device_memory", lambda: (1_000, "GPU"))
    assert "stage 1 needs" in str(plan)
