from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import raypipe
from raypipe import errors


def fresh(code: str) -> str:
    """What ``code`` prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("name", raypipe.__all__)
def test_every_public_name_is_importable(name: str) -> None:
    assert getattr(raypipe, name) is not None


def test_the_public_names_are_listed_once_in_order() -> None:
    assert raypipe.__all__ == sorted(set(raypipe.__all__))
    assert set(raypipe.__all__) <= set(dir(raypipe))


def test_a_star_import_gives_the_public_names() -> None:
    code = "names = {}\nexec('from raypipe import *', names)\nprint(sorted(set(names) - {'__builtins__'}))"
    assert fresh(code) == str(raypipe.__all__)


def test_every_error_is_public() -> None:
    assert set(errors.__all__) <= set(raypipe.__all__)
    assert raypipe.CutError is errors.CutError


def test_names_come_from_their_rooms() -> None:
    from raypipe.schedule import Schedule

    assert raypipe.Schedule is Schedule
    assert raypipe.schedule.build("gpipe", 2, 2).stages == 2


def test_importing_raypipe_loads_no_framework() -> None:
    heavy = ("torch", "ray", "pandas", "numpy", "pyarrow", "click", "rich")
    assert fresh(f"import sys, raypipe; print([name for name in {heavy} if name in sys.modules])") == "[]"
    assert fresh("import sys, raypipe; raypipe.schedule; print('torch' in sys.modules, 'ray' in sys.modules)") == (
        "False False"
    )


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'Trainer'; its names are .*PipelineTrainer"):
        raypipe.Trainer  # noqa: B018


def test_type_checkers_are_told_of_the_package() -> None:
    spec = importlib.util.find_spec("raypipe")
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).with_name("py.typed").exists()
