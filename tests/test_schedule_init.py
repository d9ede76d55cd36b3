from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from raypipe import schedule
from raypipe.schedule import build, names


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("chunks", [None, 1])
def test_builds_each_name(name: str, chunks: int | None) -> None:
    built = build(name, 3, 5, chunks)
    assert (built.name, built.stages, built.chunks, built.microbatches) == (name, 3, 3, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (("pipedream", 2, 2), ValueError, "the schedule 'pipedream' is not known; choose one of 1f1b, gpipe"),
        (("gpipe", 0, 2), ValueError, "stages is 0, but it must be at least 1"),
        (("gpipe", 2, -3), ValueError, "microbatches is -3, but it must be at least 1"),
        (("gpipe", True, 2), TypeError, "stages is True, but it must be an int of at least 1"),
        (("gpipe", 2, 2.0), TypeError, "microbatches is 2.0, but it must be an int of at least 1"),
        (("gpipe", "2", 2), TypeError, "stages is '2', but it must be an int of at least 1"),
        (
            ("1f1b", 2, 2, 2),
            ValueError,
            "chunks is 2, but the schedule '1f1b' holds one chunk a stage; leave chunks out",
        ),
        (("1f1b", 2, 2, 0), ValueError, "chunks is 0, but it must be at least 1"),
        (("1f1b", 2, 2, 1.0), TypeError, "chunks is 1.0, but it must be an int of at least 1"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    arguments: tuple[str, int, int], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error) as caught:
        build(*arguments)
    assert str(caught.value) == sentence


def test_public_names_exist() -> None:
    assert [name for name in schedule.__all__ if not hasattr(schedule, name)] == []


def test_needs_neither_torch_nor_ray() -> None:
    code = "import sys, raypipe.schedule; print(sorted({'torch', 'ray', 'numpy'} & set(sys.modules)))"
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
