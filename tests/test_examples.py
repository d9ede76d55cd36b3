"""The example learns, and prints what the README promises."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_gpt.py"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_example_learns(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), "--steps", "80", "--folder", str(tmp_path / "gpt")]
    env = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=580, check=False)
    assert done.returncode == 0, done.stderr
    found = re.search(r"loss (\d+\.\d+) -> (\d+\.\d+)", done.stdout)
    assert found, done.stdout
    assert 5.0 < float(found[1]) < 6.0
    assert float(found[2]) < 2.9
    (metrics,) = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(metrics.open()))
    assert [int(row["step"]) for row in rows] == [*range(0, 80, 10), 79]
    assert "blocks.0" in done.stdout  # the plan
    assert "planned: makespan" in done.stdout
    assert "measured: makespan" in done.stdout
    assert (metrics.parent / "model.pt").exists()
