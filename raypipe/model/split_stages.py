"""Contiguous splits where a stage holds several parts: the slowest stage counts, then the slowest part.

With one part a stage the dynamic programme of split.py is exact. With several, a stage's parts lie apart and no such
programme is known that would be cheap, so cuts are moved, one and two at a time, for as long as that helps.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate, combinations, pairwise

from raypipe.model.split import lightest_split

__all__ = ["staged_split"]

_TOGETHER = 12  # with more cuts than this, only neighbours move together


def staged_split(costs: Sequence[float], placement: Sequence[int], forbidden: Collection[int] = ()) -> tuple[int, ...]:
    """Lengths of contiguous, non-empty parts, so that the costliest stage costs little.

    Exact where each stage has one part; else a split that no move of one or two cuts, each by one element, makes
    better. Better is: a lower cost of the costliest stage, then of the costliest part, then evener parts.

    Args:
        costs: of each element, in order.
        placement: the stage of each part.
        forbidden: indices at which no part begins; so many parts must be possible.
    """
    lengths = lightest_split(costs, len(placement), forbidden)
    if len(set(placement)) == len(placement):
        return lengths
    prefix = [0.0, *accumulate(costs)]
    cuts = tuple(accumulate(lengths))[:-1]
    best = _worth(cuts, prefix, placement)
    better = True
    while better:
        better = False
        for moved in _moves(cuts, len(costs), forbidden):
            worth = _worth(moved, prefix, placement)
            if worth < best:
                cuts, best, better = moved, worth, True
                break
    return tuple(after - before for before, after in pairwise((0, *cuts, len(costs))))


def _worth(cuts: Sequence[int], prefix: Sequence[float], placement: Sequence[int]) -> tuple[float, float, float]:
    edges = (0, *cuts, len(prefix) - 1)
    parts = [prefix[after] - prefix[before] for before, after in pairwise(edges)]
    stages: dict[int, float] = {}
    for stage, part in zip(placement, parts, strict=True):
        stages[stage] = stages.get(stage, 0.0) + part
    # Rounded: sums of the same elements in another order must not count as better, or the search might not end.
    scale = prefix[-1] or 1.0
    worths = (max(stages.values()), max(parts), sum(part * part for part in parts) / scale)
    return tuple(round(worth / scale, 9) for worth in worths)  # type: ignore[return-value]


def _moves(cuts: tuple[int, ...], length: int, forbidden: Collection[int]) -> Iterator[tuple[int, ...]]:
    pairs = combinations(range(len(cuts)), 2) if len(cuts) <= _TOGETHER else pairwise(range(len(cuts)))
    for chosen in (*((number,) for number in range(len(cuts))), *pairs):
        for steps in _steps(len(chosen)):
            moved = list(cuts)
            for number, step in zip(chosen, steps, strict=True):
                moved[number] += step
            increasing = all(before < after for before, after in pairwise((0, *moved, length)))
            if increasing and not any(moved[number] in forbidden for number in chosen):
                yield tuple(moved)


def _steps(count: int) -> tuple[tuple[int, ...], ...]:
    return ((1,), (-1,)) if count == 1 else ((1, 1), (1, -1), (-1, 1), (-1, -1))
