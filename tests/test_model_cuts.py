"""The words in which cuts are offered; the cuts themselves are tested with the partition."""

from __future__ import annotations

import pytest

from raypipe.model.cuts import can_be_cut

NAMES = ["a", "b", "a", "c", "d", "e"]


@pytest.mark.parametrize("chunks", [2, 3, 4])
@pytest.mark.parametrize("forbidden", [set(), {1}, {2, 3}, {1, 5}])
def test_an_offered_balance_is_possible(forbidden: set[int], chunks: int) -> None:
    sentence = can_be_cut(NAMES, forbidden, chunks)
    balance = [int(count) for count in sentence.split("balance=[")[1].rstrip("]").split(", ")]
    cuts = [sum(balance[:part]) for part in range(1, len(balance))]
    assert sum(balance) == len(NAMES)
    assert min(balance) > 0
    assert len(balance) == chunks
    assert not forbidden.intersection(cuts)


def test_places_in_words() -> None:
    assert can_be_cut(NAMES, {1, 3}, 1) == "this model can be cut before a (call 2), d, e into at most 4 chunks"
    assert can_be_cut(NAMES, range(1, 6), 2) == "this model cannot be cut anywhere (use stages=1)"
    assert "before u1, u2, u3, u4, ..., u97, u98, u99 into at most 100" in can_be_cut(
        [f"u{i}" for i in range(100)], (), 1
    )
