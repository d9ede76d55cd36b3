from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from raypipe import schedule


def test_public_names_exist() -> None:
    assert [name for name in schedule.__all__ if not hasattr(schedule, name)] == []


def test_public_names_are_sorted() -> None:
    assert sorted(schedule.__all__) == schedule.__all__


def test_needs_neither_torch_nor_ray() -> None:
    code = "import sys, raypipe.schedule; print(sorted({'torch', 'ray', 'numpy'} & set(sys.modules)))"
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
