from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from raypipe.model.split import best_split, lightest_split


def splits(length: int, parts: int, forbidden: set[int]) -> Iterator[tuple[tuple[int, int], ...]]:
    """Every contiguous split, as the start and end of each part."""
    for edges in itertools.combinations([n for n in range(1, length) if n not in forbidden], parts - 1):
        yield tuple(itertools.pairwise((0, *edges, length)))


def edges_of(lengths: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(itertools.pairwise((0, *itertools.accumulate(lengths))))


@given(st.integers(1, 7), st.integers(1, 5), st.sets(st.integers(1, 6)), st.integers(0, 2**32 - 1))
@settings(max_examples=80, deadline=None)
def test_no_split_is_better_whatever_a_part_costs(length: int, parts: int, forbidden: set[int], seed: int) -> None:
    """Costs that depend on the part's number and are neither sums nor monotone, as memory's are not."""
    forbidden = {n for n in forbidden if n < length}
    parts = min(parts, length - len(forbidden))
    tables = np.random.default_rng(seed).integers(0, 30, (parts, length + 1, length + 1)).astype(float)
    lengths = best_split(tables.__getitem__, length, parts, forbidden)
    assert sum(lengths) == length
    assert len(lengths) == parts
    assert min(lengths) > 0

    def worst(split: tuple[tuple[int, int], ...]) -> float:
        return max(float(tables[part, start, end]) for part, (start, end) in enumerate(split))

    assert edges_of(lengths) in set(splits(length, parts, forbidden))
    assert worst(edges_of(lengths)) == min(map(worst, splits(length, parts, forbidden)))


def test_two_hundred_units_on_64_stages_take_less_than_a_second() -> None:
    costs = np.random.default_rng(0).random(200).tolist()
    start = time.process_time()
    lengths = lightest_split(costs, 64)
    assert time.process_time() - start < 1.0
    assert sum(lengths) == 200
