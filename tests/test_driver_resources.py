"""What one rank may ask for."""

from __future__ import annotations

import math
from typing import Any

import pytest

from raypipe.driver.resources import check_resources


@pytest.mark.parametrize("given", [{"CPU": 1}, {"GPU": 0.25, "CPU": 2}, {"GPU": 2.0}, {"special": 0.001}])
def test_resources_that_make_sense_are_kept(given: dict[str, float]) -> None:
    assert check_resources(given) == given


@pytest.mark.parametrize(
    ("given", "kind", "sentence"),
    [
        ({}, ValueError, "resources_per_stage is empty; name at least one resource"),
        ({"CPU": 0}, ValueError, "resources_per_stage has 'CPU': 0, but an amount is a number above 0"),
        ({"CPU": -1}, ValueError, "above 0"),
        ({"CPU": math.nan}, ValueError, "above 0"),
        ({"CPU": math.inf}, ValueError, "above 0"),
        ({"GPU": 1.5}, ValueError, "above 1 only whole GPUs"),
        ({"CPU": "two"}, TypeError, "resources_per_stage has 'CPU': 'two', but it maps names to numbers"),
        ({"CPU": True}, TypeError, "maps names to numbers"),
        ({1: 1}, TypeError, "maps names to numbers"),
        (4, TypeError, r"resources_per_stage is 4, but it is a dict such as \{'GPU': 1\}"),
    ],
)
def test_resources_that_do_not_are_refused_in_a_sentence(given: Any, kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        check_resources(given)
