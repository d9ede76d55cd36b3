"""The adapter for Ray Data: by a class of that module, and (slow) by Ray itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch

from raypipe.data import Cursor, RaySource, open_source


class FakeDataset:
    """What the adapter uses of ``ray.data.Dataset``."""

    __module__ = "ray.data.dataset"

    def __init__(self, columns: dict[str, Any]) -> None:
        self.columns = columns

    def iter_batches(self, *, batch_size: int, batch_format: str, drop_last: bool) -> Iterator[dict[str, Any]]:
        assert batch_format == "numpy"
        rows = len(next(iter(self.columns.values())))
        for start in range(0, rows - batch_size + 1 if drop_last else rows, batch_size):
            yield {name: column[start : start + batch_size] for name, column in self.columns.items()}


def objects(*rows: Any) -> numpy.ndarray[Any, Any]:
    array = numpy.empty(len(rows), dtype=object)
    array[:] = rows
    return array


def test_columns_become_tensors_and_lists() -> None:
    frozen = numpy.arange(6, dtype=numpy.int32).reshape(3, 2)
    frozen.flags.writeable = False
    lists = objects(numpy.array([1, 2]), numpy.array([3, 4]), numpy.array([5, 6]))
    data = FakeDataset({"ids": frozen, "text": objects("a", "b", "c"), "lists": lists, "word": numpy.array(["x"] * 3)})
    ((batch, cursor),) = open_source(data).epoch(Cursor())
    assert cursor == Cursor(offset=1)
    assert torch.equal(batch["ids"], torch.arange(6, dtype=torch.int32).reshape(3, 2))
    assert torch.equal(batch["lists"], torch.arange(1, 7).reshape(3, 2))
    assert batch["text"] == ["a", "b", "c"]
    assert batch["word"] == ["x", "x", "x"]
    batch["ids"].zero_()
    assert frozen[2, 1] == 5


def test_batch_size_drop_last_and_resume() -> None:
    data = FakeDataset({"x": numpy.arange(10)})
    source = RaySource(data, batch_size=3, drop_last=True)
    assert [batch["x"].tolist() for batch, _ in source.epoch(Cursor(offset=1))] == [[3, 4, 5], [6, 7, 8]]
    assert len(list(RaySource(data, batch_size=3).epoch(Cursor()))) == 4


def test_rows_of_different_lengths() -> None:
    data = FakeDataset({"x": objects(numpy.zeros(2), numpy.zeros(3))})
    with pytest.raises(ValueError, match=r"column 'x' has rows of different lengths.*pad"):
        list(open_source(data).epoch(Cursor()))


_WITH_RAY = """
import ray, torch
from raypipe.data import Cursor, RaySource, open_source
import numpy
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
data = ray.data.from_items([{"x": i, "tokens": [i, i + 1], "text": str(i)} for i in range(10)])
source = open_source(data)
assert isinstance(source, RaySource), source
((batch, after),) = source.epoch(Cursor())
assert after == Cursor(offset=1)
assert sorted(batch["x"].tolist()) == list(range(10)), batch
assert batch["tokens"].shape == (10, 2) and torch.equal(batch["tokens"][:, 0], batch["x"]), batch
assert batch["text"] == [str(x) for x in batch["x"].tolist()], batch
assert len(list(RaySource(data, batch_size=4).epoch(Cursor(offset=1)))) == 2
ray.shutdown()
print("done")
"""


@pytest.mark.slow
def test_a_dataset_of_ray_itself() -> None:
    done = subprocess.run([sys.executable, "-c", _WITH_RAY], capture_output=True, text=True, check=False, timeout=200)
    assert done.stdout.endswith("done\n"), done.stderr
