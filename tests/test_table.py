from __future__ import annotations

import pytest
import torch
from torch import nn

from raypipe.options import Options
from raypipe.plan import make_plan
from raypipe.table import _short, plan_table


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (1000, "1.0k"), (85_600, "85.6k"), (2.5e9, "2.5G"), (7e15, "7000.0T")]
)
def test_numbers_are_short(number: float, text: str) -> None:
    assert _short(number) == text


def test_a_stage_is_told_by_its_numbers() -> None:
    """Two layers of 8 x 8 and a bias, on four samples in two microbatches."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8))
    options = Options(2, loss=nn.functional.mse_loss, microbatches=2, balance=[1, 2])
    lines = plan_table(make_plan(model, options, (torch.rand(4, 8), torch.rand(4, 8)))).splitlines()
    assert lines[0].split() == ["stage", "units", "parameters", "weights", "forward", "FLOPs", "sends", "in", "flight"]
    # 2 samples x 8 x 8 x 2 FLOPs a layer; 2 x 8 floats are sent
    assert lines[2].split() == ["0", "0", "72", "288B", "256", "64B", "2"]
    assert lines[3].split() == ["1", "2", "..", "3", "(2)", "144", "576B", "512", "0B", "1"]
    assert lines[4].startswith("1f1b: 2 stages, 2 microbatches of 4 samples; predicted bubble")


def test_columns_are_in_line() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(12)))
    options = Options(3, loss=nn.functional.mse_loss, microbatches=2)
    lines = plan_table(make_plan(model, options, (torch.rand(4, 8), torch.rand(4, 8)))).splitlines()
    starts = [lines[0].index(title) for title in ("stage", "units", "parameters", "weights", "forward", "sends", "in ")]
    for line in lines[2:5]:
        assert all(line[start] != " " and (start == 0 or line[start - 1] == " ") for start in starts), line
