"""The arithmetic of an epoch's order: windows tile the rows, for any row groups."""

from __future__ import annotations

import numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from raypipe.data.order import Order, RowGroup


def order(sizes: list[int], window_rows: int, seeds: tuple[int, ...] | None) -> Order:
    return Order([RowGroup(0, number, size) for number, size in enumerate(sizes)], window_rows, seeds)


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    window_rows=st.integers(1, 200),
    seeds=st.one_of(st.none(), st.tuples(st.integers(0, 9), st.integers(0, 9))),
)
def test_windows_tile_every_lane(sizes: list[int], window_rows: int, seeds: tuple[int, ...] | None) -> None:
    plan = order(sizes, window_rows, seeds)
    assert sorted(group.index for lane in plan.lanes for group in lane) == list(range(len(sizes)))
    for number, lane in enumerate(plan.lanes):
        assert plan.lane_start(number, 0) == 0
        assert plan.lane_start(number, plan.windows) == sum(group.rows for group in lane)
    row = 0
    for window in range(plan.windows):
        places = plan.places(window)
        assert sorted(places.tolist()) == list(range(len(places)))
        assert len(places) <= window_rows + len(plan.lanes)
        for here in range(row, row + len(places)):
            assert plan.window_of(here) == window
        row += len(places)
    assert row == plan.rows == sum(sizes)
    assert plan.window_of(row) == plan.windows


def test_one_window_is_a_plain_permutation() -> None:
    seen = numpy.zeros((6, 6))
    for seed in range(3000):
        plan = order([1, 2, 3], 6, (seed,))
        numbers = numpy.concatenate(
            [numpy.arange(6)[[0, 1, 3][g.index] :][: g.rows] for lane in plan.lanes for g in lane]
        )
        seen[numpy.arange(6), numbers[plan.places(0)]] += 1
    # Every row is at every place equally often: 500 times, with a standard deviation of 20.
    assert seen.min() > 400
    assert seen.max() < 600


def test_lanes_are_of_about_one_length() -> None:
    plan = order([100, 3, 50, 60, 7, 40, 100, 20, 30, 90] * 5, 64, (1,))
    rows = [sum(group.rows for group in lane) for lane in plan.lanes]
    assert len(rows) == 8
    assert max(rows) - min(rows) <= 100


def test_without_seeds_nothing_moves() -> None:
    plan = order([5, 6, 7], 4, None)
    assert [group.index for lane in plan.lanes for group in lane] == [0, 1, 2]
    assert all((plan.places(window) == numpy.arange(len(plan.places(window)))).all() for window in range(plan.windows))
