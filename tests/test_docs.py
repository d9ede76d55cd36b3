"""The Python of docs/models.md, docs/memory.md and README.md runs, and prints what stands below it."""

from __future__ import annotations

import contextlib
import io
import linecache
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import training  # noqa: F401  (one thread)

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(document: str) -> list[tuple[str, str]]:
    """The blocks of a document in order: (language, text)."""
    return BLOCK.findall((ROOT / document).read_text())


def run(code: str, names: dict[str, Any], file: str, shown: str) -> str:
    """What a block prints. Frames of ``file`` have lines to show, as those of a user's script have."""
    linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, file, "exec"), names)
    return re.sub(rf"{re.escape(shown)}:\d+", f"{shown}:1", printed.getvalue())


def test_models_md_is_true() -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "models"}
    found = blocks("docs/models.md")
    assert len(found) > 20
    compared = 0
    for number, (language, text) in enumerate(found):
        if language == "python":
            # A file of its own each: a block's functions keep their lines when later blocks run.
            printed = run(text, names, f"/{number}/models.md", "models.md")
        else:  # what the block above printed, its lines broken
            assert printed.split() == text.split()
            compared += 1
    assert compared > 10


def test_memory_md_is_true() -> None:
    torch.manual_seed(0)
    (_, code), (_, text) = blocks("docs/memory.md")
    assert run(code, {"__name__": "memory"}, "/0/memory.md", "memory.md").split() == text.split()


def test_a_wrong_line_would_be_seen() -> None:
    """So the test above can fail."""
    assert run("print(1 + 1)", {}, "/0/models.md", "models.md").split() != ["3"]


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    names: dict[str, Any] = {"__name__": "readme"}
    found = [text for language, text in blocks("README.md") if language == "python"]
    assert len(found) == 2
    for number, text in enumerate(found):
        assert "stages=4" in text
        local = text.replace("stages=4", 'stages=4, backend="local", quiet=True')
        assert float(run(local, names, f"/{number}/README.md", "README.md")) > 0
