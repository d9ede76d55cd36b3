"""Contiguous splits whose slowest part is as fast as possible, found exactly by dynamic programming.

The classical linear partition problem, also where a part's cost depends on its number, and is no sum of its elements'.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

__all__ = ["best_split", "lightest_split"]


def lightest_split(costs: Sequence[float], parts: int, forbidden: Collection[int] = ()) -> tuple[int, ...]:
    """Lengths of ``parts`` contiguous, non-empty parts whose largest sum is the smallest possible.

    No part begins at an index in ``forbidden``; so many parts must be possible.
    """
    prefix = np.array([0.0, *accumulate(costs)])
    table = prefix[None, :] - prefix[:, None]
    return best_split(lambda part: table, len(costs), parts, forbidden)


def best_split(
    cost: Callable[[int], NDArray[np.float64]], length: int, parts: int, forbidden: Collection[int] = ()
) -> tuple[int, ...]:
    """Lengths of ``parts`` contiguous, non-empty parts of which the costliest costs as little as possible.

    Every split is weighed, in time parts x length^2 (in NumPy), so it is exact for costs of any kind.

    Args:
        cost: by the part's number, a table [length + 1, length + 1]: what a part ``start <= i < end`` costs at
            ``[start, end]``. Entries with ``end <= start`` are not looked at.
        length: number of elements.
        parts: how many.
        forbidden: indices at which no part begins; so many parts must be possible.
    """
    starts, ends = np.indices((length + 1, length + 1))
    barred = ends <= starts
    barred[[start for start in forbidden if start < length], :] = True
    best = np.full(length + 1, np.inf)
    best[0] = 0.0
    choices = []
    for part in range(parts):
        worst = np.maximum(best[:, None], np.where(barred, np.inf, cost(part)))
        choice = worst.argmin(axis=0)
        best = worst[choice, np.arange(length + 1)]
        choices.append(choice)
    lengths, end = [], length
    for choice in reversed(choices):
        start = int(choice[end])
        lengths.append(end - start)
        end = start
    return tuple(reversed(lengths))
