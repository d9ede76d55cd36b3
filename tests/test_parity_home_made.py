"""Models as people write them, cut anywhere: the loss and gradients of the unsplit model."""

from __future__ import annotations

import home_made_modules  # noqa: F401  (its cases)
import home_made_networks  # noqa: F401
import pytest
from home_made import CASES
from parity import EVERY, assert_exact, cuts_of


@pytest.mark.parametrize("name", CASES)
def test_home_made_models(name: str) -> None:
    assert_exact(CASES[name], cuts_of(list(CASES).index(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_home_made_models_in_every_cut(name: str) -> None:
    assert_exact(CASES[name], EVERY)
