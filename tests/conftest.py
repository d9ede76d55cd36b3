"""Fixtures that several test files share."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tensor_team import TensorTeam

    from raypipe.driver.cluster import Session

RANKS = 16

# A shell that runs the tests in the background ignores Ctrl-C for them, and they and their children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Session]:
    """One Ray for the whole run, with room for 16 ranks of one (logical) CPU."""
    from raypipe.driver.cluster import start_ray

    session = start_ray(RANKS)
    yield session
    session.stop()


@pytest.fixture(scope="session")
def tensor_team() -> Iterator[Callable[[int], TensorTeam]]:
    """Tensor groups of real processes, by size."""
    from tensor_team import TensorTeam

    teams: dict[int, TensorTeam] = {}

    def team(size: int) -> TensorTeam:
        if size not in teams:
            teams[size] = TensorTeam(size)
        return teams[size]

    yield team
    for team in teams.values():
        team.close()
