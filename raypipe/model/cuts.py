"""Which cuts part nothing that has to stay together, and how one that does is refused.

Some things cannot be carried over a cut: an attribute that a unit leaves for others, one call of a checkpoint around
several units, memory that two values share and one of them changes. They are no reason to refuse a model: the chunk
that holds all of it computes it as the unsplit model does.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raypipe.model.event import Value
    from raypipe.model.recording import Recording

__all__ = ["END", "Together", "can_be_cut", "forbidden_cuts", "parted", "too_few_places"]

END = sys.maxsize
"""As the last event: everything up to the end of the forward."""


@dataclass(frozen=True, slots=True)
class Together:
    """Events that must lie in one chunk.

    Attributes: ``first`` and ``last`` event; ``what`` a cut between them parts, as the rest of a sentence that begins
    with "a cut before UNIT would part"; ``advice``.
    """

    first: int
    last: int
    what: str
    advice: str


def forbidden_cuts(recording: Recording) -> dict[int, str]:
    """By unit call: why no cut may stand before it."""
    found: dict[int, str] = {}
    last_uses = recording.last_uses()
    calls = recording.calls
    for call in range(1, len(calls)):
        cut = calls[call]
        for sentence in (_held(recording, cut), _region(recording, cut), _aliases(recording, cut, last_uses)):
            if sentence is not None:
                found.setdefault(call, sentence)
    return found


def parted(names: Sequence[str], forbidden: Mapping[int, str], cut: int, chunks: int) -> str:
    """The sentence that refuses a cut before unit call ``cut``."""
    return f"a cut before {names[cut]} would part {forbidden[cut]}; {can_be_cut(names, forbidden, chunks)}"


def too_few_places(names: Sequence[str], forbidden: Mapping[int, str], chunks: int) -> str:
    """The sentence that refuses more chunks than there are places to cut at."""
    first = min(forbidden)
    return (
        f"{chunks} chunks are wanted, but {can_be_cut(names, forbidden, chunks)}; elsewhere something would be parted: "
        f"a cut before {names[first]} would part {forbidden[first]}"
    )


def can_be_cut(names: Sequence[str], forbidden: Collection[int], chunks: int) -> str:
    """Where a model can be cut, as a part of a sentence.

    Args:
        names: of the unit calls.
        forbidden: calls before which no cut may stand.
        chunks: how many are wanted; where so many are possible, a balance that gives them is shown.
    """
    places = [call for call in range(1, len(names)) if call not in forbidden]
    if not places:
        return "this model cannot be cut anywhere (use stages=1)"
    shown = [_name(names, call) for call in places]
    if len(shown) > 8:
        shown = [*shown[:4], "...", *shown[-3:]]
    most = f"this model can be cut before {', '.join(shown)} into at most {len(places) + 1} chunks"
    wanted = min(chunks, len(places) + 1)
    if wanted < 2:
        return most
    edges = [0, *(places[part * (len(places) + 1) // wanted - 1] for part in range(1, wanted)), len(names)]
    balance = [after - before for before, after in pairwise(edges)]
    return f"{most}, for example with balance={balance}"


def _name(names: Sequence[str], call: int) -> str:
    """A unit call in words: a unit that is called again is told apart."""
    times = names[: call + 1].count(names[call])
    return names[call] if times == 1 else f"{names[call]} (call {times})"


def _held(recording: Recording, cut: int) -> str | None:
    for held in recording.together:
        if held.first < cut <= held.last:
            return f"{held.what}; {held.advice}"
    return None


def _region(recording: Recording, cut: int) -> str | None:
    before, after = recording.events[cut - 1], recording.events[cut]
    if after.region is None or before.region != after.region:
        return None
    return (
        f"one call of torch.utils.checkpoint that began before {before.name} and goes on at {after.where}; checkpoint "
        "each unit by itself"
    )


def _aliases(recording: Recording, cut: int, last_uses: Sequence[int]) -> str | None:
    changed = recording.mutated_after(cut)
    if not changed:
        return None
    by_storage: dict[int, Value] = {}
    for value in recording.values:
        if value.storage in changed and value.event < cut <= last_uses[value.number]:
            other = by_storage.setdefault(value.storage, value)
            if other is not value:
                return (
                    f"{recording.describe(other)} from {recording.describe(value)}: they share memory that is changed "
                    "in place afterwards; clone one of them"
                )
    return None
