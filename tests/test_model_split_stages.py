"""Splits where a stage holds several parts."""

from __future__ import annotations

from itertools import accumulate, combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypipe.model.split import lightest_split
from raypipe.model.split_stages import staged_split

V = (0, 1, 1, 0)
LOOP = (0, 1, 0, 1)


def slowest(costs: list[float], lengths: tuple[int, ...], placement: tuple[int, ...]) -> float:
    """Of the stages."""
    edges = (0, *accumulate(lengths))
    sums = dict.fromkeys(placement, 0.0)
    for stage, (before, after) in zip(placement, pairwise(edges), strict=True):
        sums[stage] += sum(costs[before:after])
    return max(sums.values())


def brute_force(costs: list[float], placement: tuple[int, ...], forbidden: frozenset[int] = frozenset()) -> float:
    allowed = [index for index in range(1, len(costs)) if index not in forbidden]
    splits = combinations(allowed, len(placement) - 1)
    return min(slowest(costs, tuple(b - a for a, b in pairwise((0, *cuts, len(costs)))), placement) for cuts in splits)


def test_a_v_puts_a_heavy_end_beside_a_light_begin() -> None:
    """An embedding that is free and a head of three blocks: by parts alone the first stage would get one block less."""
    costs = [0.0, *[1.0] * 7, 3.0]
    lengths = staged_split(costs, V)
    assert slowest(costs, lengths, V) == brute_force(costs, V) == 5.0
    assert sum(lengths) == 9


@pytest.mark.parametrize(
    ("placement", "costs", "by_parts", "best"),
    [(V, [4.0, 1.0, 1.0, 3.0, 4.0, 1.0], 9.0, 7.0), (LOOP, [3.0, 2.0, 3.0, 4.0, 4.0, 1.0, 1.0], 11.0, 9.0)],
)
def test_the_best_parts_are_not_the_best_stages(
    placement: tuple[int, ...], costs: list[float], by_parts: float, best: float
) -> None:
    assert slowest(costs, lightest_split(costs, 4), placement) == by_parts
    assert slowest(costs, staged_split(costs, placement), placement) == best == brute_force(costs, placement)


def test_one_part_a_stage_is_the_exact_split() -> None:
    costs = [5.0, 1.0, 1.0, 2.0, 4.0, 1.0]
    assert staged_split(costs, (0, 1, 2)) == lightest_split(costs, 3)


@pytest.mark.parametrize("placement", [V, LOOP, (0, 1, 2, 2, 1, 0), (0, 1, 2, 0, 1, 2)], ids=str)
@given(costs=st.lists(st.integers(1, 9).map(float), min_size=6, max_size=10))
def test_it_is_a_split_near_the_best(placement: tuple[int, ...], costs: list[float]) -> None:
    lengths = staged_split(costs, placement)
    assert len(lengths) == len(placement)
    assert min(lengths) >= 1
    assert sum(lengths) == len(costs)
    even = slowest(costs, lightest_split(costs, len(placement)), placement)
    best = brute_force(costs, placement)
    assert best <= slowest(costs, lengths, placement) <= min(even, best + max(costs))


@given(costs=st.lists(st.integers(0, 9).map(float), min_size=8, max_size=12))
def test_forbidden_cuts_stay_out(costs: list[float]) -> None:
    forbidden = {2, 5}
    lengths = staged_split(costs, V, forbidden)
    assert forbidden.isdisjoint(tuple(accumulate(lengths))[:-1])


def test_many_elements_and_parts_come_to_an_end() -> None:
    costs = [0.1, *[1.0] * 94, 4.0]
    placement = (*range(16), *reversed(range(16)))
    lengths = staged_split(costs, placement)
    assert slowest(costs, lengths, placement) <= 7.1
