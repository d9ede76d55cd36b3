"""No process holds the whole model: peaks of a driver and of its ranks, against a run of the same form without weights.

What a peak counts is said in ``memory_of_a_run.py``. A rank needs its slice once; for an instance it reads the slice in
the object store's shared memory, whose pages count for it too. A step adds the gradients, those of one microbatch on
their way to them, and what the allocator keeps of both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from memory_of_a_run import BLOCKS, STAGES, save_llama

WIDTH = 2800
MODEL = BLOCKS * WIDTH * WIDTH * 4
SLICE = MODEL / STAGES
MARGIN = 32 * 2**20
"""What differs between two runs of the same process."""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")]


def observed(kind: str, width: int, folder: Path) -> dict[str, Any]:
    (folder / "notes").mkdir(parents=True)
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(here / "memory_of_a_run.py"), kind, str(width), str(folder)],
        env={**os.environ, "HOME": str(folder), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return told


@pytest.mark.parametrize(
    ("kind", "driver", "building"), [("callable", 0.35 * MODEL, 1.25 * SLICE), ("instance", 1.75 * MODEL, 2 * SLICE)]
)
def test_peaks(kind: str, driver: float, building: float, tmp_path: Path) -> None:
    bare, full = observed(kind, 16, tmp_path / "bare"), observed(kind, WIDTH, tmp_path / "full")
    assert full["driver"] - bare["driver"] < driver
    for poor, rich in zip(bare["ranks"], full["ranks"], strict=True):
        assert SLICE / 2 < rich["built"] - poor["built"] < building + MARGIN  # the lower bound: it measures weights
        assert rich["stepped"] - poor["stepped"] < building + 2 * SLICE + 2 * MARGIN


def test_peaks_of_a_folders_model(tmp_path: Path) -> None:
    """Files are mapped: what a rank has read of them counts for it until it lets go of the mapping."""
    small, large = tmp_path / "bare", tmp_path / "full"
    save_llama(16, small / "weights")
    model = save_llama(1024, large / "weights")
    bare, full = observed("pretrained", 16, small), observed("pretrained", 1024, large)
    part = model / STAGES
    assert full["driver"] - bare["driver"] < 0.35 * model
    for poor, rich in zip(bare["ranks"], full["ranks"], strict=True):
        assert part / 2 < rich["built"] - poor["built"] < 2 * part + MARGIN
        assert rich["stepped"] - poor["stepped"] < 4 * part + 2 * MARGIN
