"""The examples learn, and print what the README promises."""

from __future__ import annotations

import csv
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from training import EXAMPLES

TINY = {
    "finetune_llama.py": "--stages 2 --steps 8 --batch-size 16 --microbatches 4 --width 32 --layers 2 --longest 32",
    "t5.py": "--stages 3 --steps 8 --batch-size 16 --microbatches 4 --width 16",
}
"""The short form of each example."""


def run(name: str, folder: Path, *arguments: str) -> str:
    """Runs an example as a user does, with ``folder`` as home, and gives what it printed."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    env = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=580, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(printed: str) -> tuple[float, float]:
    """The first and the last loss that an example printed."""
    found = re.search(r"loss (\d+\.\d+) -> (\d+\.\d+)", printed)
    assert found, printed
    return float(found[1]), float(found[2])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_example_learns(tmp_path: Path) -> None:
    printed = run("train_gpt.py", tmp_path, "--steps", "80", "--folder", str(tmp_path / "gpt"))
    first, last = losses(printed)
    assert 5.0 < first < 6.0
    assert last < 2.9
    (metrics,) = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(metrics.open()))
    assert [int(row["step"]) for row in rows] == [*range(0, 80, 10), 79]
    assert "blocks.0" in printed  # the plan
    assert "planned: makespan" in printed
    assert "measured: makespan" in printed
    assert (metrics.parent / "model.pt").exists()


@pytest.mark.parametrize("name", TINY)
def test_a_short_form_learns(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, *TINY[name].split(), "--backend", "local", "--evaluate-every", "4"])
    monkeypatch.setenv("HOME", str(tmp_path))
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    printed = capsys.readouterr().out
    first, last = losses(printed)
    assert last < first - 0.3
    held_out = [float(loss) for loss in re.findall(r"after \d+ steps: loss (\d+\.\d+)", printed)]
    assert len(held_out) == 2
    assert held_out[1] < held_out[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_llama_learns_over_ray(tmp_path: Path) -> None:
    first, last = losses(run("finetune_llama.py", tmp_path, "--steps", "60", "--width", "64", "--longest", "64"))
    assert 5.0 < first < 6.0
    assert last < 3.5


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_t5_learns_over_ray(tmp_path: Path) -> None:
    printed = run("t5.py", tmp_path, "--steps", "400")
    first, last = losses(printed)
    assert first > 3.0
    assert last < 0.3
    right = re.search(r"(\d+) of (\d+) are right", printed)
    assert right
    assert int(right[1]) > int(right[2]) / 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_eight_ranks_learn_together(tmp_path: Path) -> None:
    first, last = losses(run("three_d.py", tmp_path, "--steps", "40"))
    assert 5.0 < first < 6.0
    assert last < 3.8


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_model_that_fits_no_machine_here_is_planned(tmp_path: Path) -> None:
    grid = ("--stages", "4", "--tensor-parallel", "2", "--data-parallel", "4", "--precision", "bf16")
    printed = run("three_d.py", tmp_path, "--plan-only", "--size", "7b", *grid)
    assert "4 replicas of this pipeline, 32 ranks" in printed
    assert "tensor_parallel=2" in printed
