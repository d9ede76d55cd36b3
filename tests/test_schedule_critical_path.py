from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_by_hand import EVERY_KIND, mine

from raypipe.schedule import Costs, Schedule, Simulation, Span, Transfer, build

quarters = st.integers(0, 40).map(lambda n: n / 4)


@st.composite
def played(draw: st.DrawFn, any_float: bool = False) -> tuple[Schedule, Costs]:
    schedule = draw(st.sampled_from(EVERY_KIND))
    number = st.floats(0, 1e3) if any_float else quarters
    above = st.floats(1e-3, 1e3) if any_float else st.sampled_from([0.25, 0.5, 1.0, 2.0])
    chunks, pairs = schedule.chunks, [(s, t) for s in range(schedule.stages) for t in range(schedule.stages) if s != t]

    def several(count: int) -> Any:
        return st.lists(number, min_size=count, max_size=count).map(tuple)

    def by_channel(each: Any) -> Any:
        return st.one_of(
            each,
            st.lists(each, min_size=len(pairs), max_size=len(pairs)).map(lambda x: dict(zip(pairs, x, strict=True))),
        )

    return schedule, Costs(
        forward=draw(several(chunks)),
        backward=draw(several(chunks)),
        input=draw(number),
        weight=draw(number),
        latency=draw(by_channel(number)),
        bandwidth=draw(st.one_of(st.none(), by_channel(above))),
        boundary_bytes=draw(several(chunks - 1)),
        gradient_bytes=draw(st.one_of(st.none(), number)),
    )


def texts(found: Simulation) -> list[tuple[str, float, float]]:
    return [
        (str(link.action if isinstance(link, Span) else link), link.start, link.end) for link in found.critical_path
    ]


def test_the_path_of_gpipe_goes_down_and_up() -> None:
    found = build("gpipe", 2, 2).simulate(Costs(forward=(1.0, 4.0), backward=(3.0, 2.0), latency=0.5))
    assert texts(found) == [
        ("0F0", 0, 1),
        ("0SEND_F0", 1, 1.5),
        ("1F0", 1.5, 5.5),
        ("1F1", 5.5, 9.5),
        ("1B0", 9.5, 11.5),
        ("1SEND_B0", 11.5, 12),
        ("0B0", 12, 15),
        ("0B1", 15, 18),
    ]


def test_a_busy_channel_is_on_the_path() -> None:
    # Three messages of 4 bytes at 1 byte a second, made at 1, 2 and 3, taken in one after the other.
    costs = Costs(boundary_bytes=4, gradient_bytes=0, bandwidth=1, latency=0.5)
    found = build("gpipe", 2, 3).simulate(costs)
    assert texts(found)[:5] == [
        ("0F0", 0, 1),
        ("0SEND_F0", 1, 5),
        ("0SEND_F1", 5, 9),
        ("0SEND_F2", 9, 13.5),
        ("1F2", 13.5, 14.5),
    ]
    message = found.critical_path[3]
    assert isinstance(message, Transfer)
    assert (message.source, message.target) == (0, 1)


def test_between_chunks_of_one_stage_nothing_is_sent() -> None:
    found = mine("0F0 1F0 1I0 0I0 1W0 0W0", microbatches=1).simulate(Costs(latency=9, boundary_bytes=5, bandwidth=1))
    assert texts(found) == [("0F0", 0, 1), ("1F0", 1, 2), ("1I0", 2, 3), ("0I0", 3, 4), ("1W0", 4, 5), ("0W0", 5, 6)]


def test_nothing_costs_nothing() -> None:
    found = build("1f1b", 3, 2).simulate(Costs(forward=0, backward=0))
    assert len(found.critical_path) == 1
    assert found.makespan == 0


@given(played())
def test_its_lengths_add_up_to_the_makespan(case: tuple[Schedule, Costs]) -> None:
    schedule, costs = case
    found = schedule.simulate(costs)
    # Floats add quarters, and these over a power of two, exactly.
    assert sum(link.end - link.start for link in found.critical_path) == found.makespan


@given(played(any_float=True))
def test_each_link_starts_when_the_one_before_it_ends(case: tuple[Schedule, Costs]) -> None:
    schedule, costs = case
    found = schedule.simulate(costs)
    path = found.critical_path
    assert path[0].start == 0
    assert path[-1].end == found.makespan
    assert all(before.end == after.start for before, after in pairwise(path))
    assert isinstance(path[0], Span)
    assert isinstance(path[-1], Span)
    spans = set(found.spans)
    for before, after in pairwise(path):
        if isinstance(before, Span):
            assert before in spans
            if isinstance(after, Span):
                assert after.stage == before.stage
            else:
                assert (after.source, after.message.chunk) == (before.stage, before.action.chunk)
        elif isinstance(after, Span):
            assert before.target == after.stage


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_what_is_off_the_path_may_be_slower(stage: int) -> None:
    # 1F1B with one slow stage: the path stays on it but for the way there and back.
    forward = tuple(5.0 if s == stage else 1.0 for s in range(3))
    found = build("1f1b", 3, 8).simulate(Costs(forward=forward, backward=forward))
    on_path = [link for link in found.critical_path if isinstance(link, Span) and link.stage == stage]
    assert len(on_path) == 16
