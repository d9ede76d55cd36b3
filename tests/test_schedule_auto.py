"""What ``schedule="auto"`` may choose from."""

from __future__ import annotations

from typing import Any

import pytest

from raypipe.schedule import Auto, names


def test_every_schedule_is_tried_and_those_that_interleave_with_several_numbers_of_chunks() -> None:
    tried = Auto().tried(None)
    assert {name for name, _ in tried} == set(names())
    assert [chunks for name, chunks in tried if name == "interleaved_1f1b"] == [2, 3, 4]
    assert [chunks for name, chunks in tried if name == "zbv"] == [2]


def test_chunks_and_candidates_bound_it() -> None:
    assert {chunks for _, chunks in Auto().tried(1)} == {1}
    assert "zbv" not in dict(Auto().tried(1))
    assert Auto(candidates=("1f1b", "zbv")).tried(None) == [("1f1b", 1), ("zbv", 2)]
    assert Auto(candidates=["zbv"]) == Auto(candidates=("zbv",))


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"memory_bytes": "8G"}, TypeError, "memory_bytes is '8G', but it must be a number"),
        ({"memory_bytes": 0}, ValueError, "memory_bytes is 0, but it must be positive"),
        ({"latency": -1.0}, ValueError, "latency is -1.0, but it must be positive"),
        ({"bandwidth": None}, TypeError, "bandwidth is None, but it must be a number"),
        ({"candidates": "zbv"}, TypeError, r"candidates is 'zbv', but it must be names such as \('1f1b', 'zbv'\)"),
        ({"candidates": 5}, TypeError, "candidates is 5, but it must be names"),
        ({"candidates": (name for name in ("zbv",))}, TypeError, "candidates is <generator .* but it must be names"),
        ({"candidates": ("zbx",)}, ValueError, "the schedule 'zbx' is not known"),
    ],
)
def test_what_is_wrong_is_said(given: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        Auto(**given)
