"""Imports go down only: this file reads every import of raypipe and holds the floors and the rules of rooms."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import raypipe

ROOT = Path(raypipe.__file__).parent
FLOORS = (  # from the top; a room imports from itself and from below, never beside itself
    {"raypipe"},  # raypipe/__init__.py: the public names
    {"cli"},
    {"trainer"},
    {"run"},
    {"planning"},
    {"plan"},
    {"checks"},
    {"options"},
    {"driver"},
    {"stage"},
    {"model", "transport", "parallel", "data", "checkpoint", "observe"},
    {"schedule", "tensors", "topology"},
    {"errors"},
    {"__version__"},
)
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}
ROOM_OF = {
    **dict.fromkeys(("table", "accounting", "advice"), "plan"),  # one room: a plan, its numbers and its text
    **dict.fromkeys(("choosing", "cutting", "splitting"), "planning"),  # one room: how a plan is made
}


def imports(node: ast.AST, package: str, lazy: bool = False) -> Iterator[tuple[int, str, bool]]:
    """(line, dotted name, whether importing the file runs it not) of every import below ``node``."""
    if isinstance(node, ast.Import):
        yield from ((node.lineno, alias.name, lazy) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        yield from ((node.lineno, f"{base}.{alias.name}", lazy) for alias in node.names)
    elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for inner in node.body:
            yield from imports(inner, package, True)
        for other in node.orelse:
            yield from imports(other, package, lazy)
    else:
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            yield from imports(child, package, lazy)


def room_of(path: str) -> str:
    """The room of a file such as ``stage/worker.py``, or of a module or name such as ``stage/worker/Worker``."""
    first = path.removesuffix("__init__.py").removesuffix(".py").partition("/")[0]
    return ROOM_OF.get(first, first) or "raypipe"


def broken_rules(path: str, source: str) -> list[str]:
    """A sentence for each import of raypipe/``path`` that goes another way than down."""
    room, package = room_of(path), ".".join(["raypipe", *path.split("/")[:-1]])
    if room not in FLOOR_OF:
        return [f"{path}: the room {room} is on no floor"]
    found = []
    for line, name, lazy in imports(ast.parse(source), package):
        top, _, rest = name.partition(".")
        here = f"{path}:{line}: {room} imports {name}"
        if top == "raypipe":
            target = room_of(rest.replace(".", "/") or "__version__")  # `import raypipe` is for its version
            # A name of the package itself, such as raypipe.PipelineTrainer, is on the top floor.
            down = FLOOR_OF[room] < FLOOR_OF.get(target, 0)
            found += [] if room in (target, "raypipe") or down else [f"{here}, which is not below it"]
        elif top == "ray" and room != "driver" and not (room == "trainer" and lazy):
            found.append(f"{here}, but Ray is for driver/ alone, and lazily for trainer.py")
        elif room == "schedule" and top in ("torch", "numpy"):
            found.append(f"{here}, but schedules are pure data")
    return found


@pytest.mark.parametrize("path", sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py")))
def test_imports_go_down_only(path: str) -> None:
    assert not broken_rules(path, (ROOT / path).read_text())


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("model/a.py", "from raypipe.stage.worker import Worker"),
        ("model/a.py", "from raypipe.stage import worker"),
        ("model/a.py", "from raypipe import stage"),
        ("model/a.py", "from raypipe import PipelineTrainer"),
        ("model/a.py", "from ..transport import base"),
        ("data/a.py", "def read():\n    from raypipe.observe import events"),
        ("data/a.py", "if TYPE_CHECKING:\n    from raypipe.model.units import Unit"),
        ("data/a.py", "try:\n    import x\nexcept ImportError:\n    import raypipe.driver.actors"),
        ("schedule/a.py", "from ..topology import Topology"),
        ("schedule/a.py", "import torch.nn"),
        ("schedule/a.py", "def f():\n    from numpy import array"),
        ("schedule/a.py", "import ray"),
        ("stage/a.py", "def f():\n    from ray.util import queue"),
        ("trainer.py", "import ray.train"),
        ("plan.py", "def f():\n    import ray"),
        ("topology.py", "from raypipe.tensors import TensorSpec"),
        ("kitchen/a.py", ""),
    ],
)
def test_a_broken_rule_is_found(path: str, source: str) -> None:
    assert len(broken_rules(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("__init__.py", "from raypipe.trainer import PipelineTrainer"),
        ("cli.py", "from .trainer import PipelineTrainer"),
        ("trainer.py", "if TYPE_CHECKING:\n    import ray.train\nfrom raypipe.plan import Plan"),
        ("trainer.py", "def fit():\n    from ray.train import Result"),
        ("driver/a.py", "import ray, raypipe\nfrom raypipe.driver import reaper\nfrom raypipe.stage import worker"),
        ("schedule/a.py", "from ..errors import ScheduleError\nfrom . import csv\nfrom .action import Action"),
        ("model/a.py", "import torch, numpy\nfrom raypipe import __version__, errors\nimport rayon"),
    ],
)
def test_a_kept_rule_is_let_be(path: str, source: str) -> None:
    assert not broken_rules(path, source)
