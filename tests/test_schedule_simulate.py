from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_by_hand import EVERY_KIND, looped, mine
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

import raypipe.schedule
from raypipe.schedule import Costs, Schedule, Span, build, names
from raypipe.schedule.dry_run import given_by, needed_by

sizes = st.integers(1, 10)
quarters = st.integers(0, 40).map(lambda n: n / 4)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "microbatches", "makespan"), [(4, 8, 33), (8, 32, 117), (1, 5, 15), (5, 1, 15)])
def test_known_makespans(name: str, stages: int, microbatches: int, makespan: float) -> None:
    assert build(name, stages, microbatches).simulate().makespan == makespan


@given(st.sampled_from(["gpipe", "1f1b"]), sizes, sizes, quarters, quarters)
def test_closed_form_of_makespan_and_bubble(
    name: str, stages: int, microbatches: int, forward: float, backward: float
) -> None:
    if microbatches < stages and name == "1f1b":
        microbatches += stages  # the closed form is that of a filled pipeline
    found = build(name, stages, microbatches).simulate(Costs(forward=forward, backward=backward))
    slots = microbatches + stages - 1
    assert found.makespan == slots * (forward + backward)
    if found.makespan:
        assert found.bubble == pytest.approx((stages - 1) / slots)
        assert found.stage_bubbles == pytest.approx([(stages - 1) / slots] * stages)
    else:
        assert found.bubble == 0


@pytest.mark.parametrize(
    ("name", "stages", "microbatches", "makespan"),
    [
        ("Interleaved1F1B", 4, 8, 28.5),
        ("Interleaved1F1B", 8, 32, 106.5),
        ("InterleavedZeroBubble", 4, 8, 25.5),
        ("InterleavedZeroBubble", 8, 32, 99.5),
        ("ZBVZeroBubble", 4, 8, 25.5),
        ("ZBVZeroBubble", 8, 32, 99.5),
    ],
)
def test_torchs_schedules_of_two_chunks_a_stage(name: str, stages: int, microbatches: int, makespan: float) -> None:
    rows = get_schedule_ops(name, stages, microbatches)
    text = "\n".join(",".join("" if action is None else str(action) for action in row) for row in rows)
    half = Costs(forward=0.5, backward=1.0, input=0.5, weight=0.5)  # a chunk is half a stage
    assert Schedule.from_csv(text).simulate(half).makespan == makespan


def test_latency_counts_between_stages_only() -> None:
    assert build("gpipe", 3, 1).simulate(Costs(latency=0.25)).makespan == 9 + 4 * 0.25
    alone = Schedule.from_csv("0F0,1F0,1B0,0B0")
    assert alone.simulate(Costs(latency=5)).makespan == 6


def test_costs_by_chunk() -> None:
    found = build("gpipe", 2, 2).simulate(Costs(forward=(1.0, 4.0), backward=(3.0, 2.0)))
    times = {str(span.action): (span.start, span.end) for span in found.spans}
    assert times == {
        "0F0": (0, 1),
        "0F1": (1, 2),
        "1F0": (1, 5),
        "1F1": (5, 9),
        "1B0": (9, 11),
        "1B1": (11, 13),
        "0B0": (11, 14),
        "0B1": (14, 17),
    }
    assert found.stage_bubbles == pytest.approx((1 - 8 / 17, 1 - 12 / 17))
    assert found.bubble == pytest.approx(1 - 20 / 34)


def test_the_weight_gradient_apart_is_held_until_it_is_computed() -> None:
    schedule = Schedule.from_csv("0F0,0I0,0F1,0I1,0W0,0W1")
    found = schedule.simulate(Costs(input=1.5, weight=0.5))
    assert found.peak_in_flight == (2,)
    assert found.makespan == 6


@given(st.sampled_from(names()), sizes, sizes, quarters, quarters, quarters)
def test_nothing_starts_before_its_message_or_its_turn(
    name: str, stages: int, microbatches: int, forward: float, backward: float, latency: float
) -> None:
    schedule = build(name, stages, microbatches)
    found = schedule.simulate(Costs(forward=forward, backward=backward, latency=latency))
    givers = {given_by(span.action): span for span in found.spans}
    by_stage: dict[int, list[Span]] = defaultdict(list)
    for span in found.spans:
        before = by_stage[span.stage][-1:]
        need = needed_by(span.action, schedule.chunks)
        way = latency if need is not None and givers[need].stage != span.stage else 0.0
        earliest = [other.end for other in before] + ([] if need is None else [givers[need].end + way])
        assert span.start == max(earliest, default=0.0)
        by_stage[span.stage].append(span)
    assert tuple(tuple(span.action for span in by_stage[stage]) for stage in range(stages)) == schedule.programs


def test_forward_only_keeps_nothing() -> None:
    found = build("1f1b", 4, 8).forwards(6).simulate()
    assert found.makespan == 9
    assert found.peak_in_flight == (1, 1, 1, 1)


def test_latency_of_each_channel() -> None:
    costs = Costs(latency={(0, 1): 0.25, (1, 2): 0.5, (2, 1): 1.0, (1, 0): 2.0})
    assert build("gpipe", 3, 1).simulate(costs).makespan == 9 + 0.25 + 0.5 + 1.0 + 2.0


def test_a_channel_takes_in_one_message_at_a_time() -> None:
    # Of 2 forwards, made at 1 and 2, the messages take 3 each; they are on their way for 10 beside each other.
    costs = Costs(boundary_bytes=6, gradient_bytes=0, bandwidth=2, latency=10)
    found = build("gpipe", 2, 2).simulate(costs)
    starts = {str(span.action): span.start for span in found.spans}
    assert starts == {"0F0": 0, "0F1": 1, "1F0": 14, "1F1": 17, "1B0": 18, "1B1": 20, "0B0": 30, "0B1": 32}


def test_both_kinds_of_messages_share_a_channel() -> None:
    # Stage 0 holds chunks 0 and 2: at 8 it gives the gradient of chunk 2 while activations of chunk 0 are on the way.
    schedule = mine("0F0 2F0 0F1 2B0 2F1 2B1 0B0 0B1", "1F0 1F1 1B0 1B1", microbatches=2)
    costs = Costs(boundary_bytes=(4, 0), gradient_bytes=(0, 1), bandwidth=1)
    starts = {str(span.action): span.start for span in schedule.simulate(costs).spans}
    # 1F0 waits for 0F0 until 5; 0F1 ends at 8 and takes the channel until 12; 2B0's gradient, made at 10, until 13.
    assert (starts["1F0"], starts["2F0"], starts["0F1"], starts["2B0"]) == (5, 6, 7, 8)
    assert (starts["1F1"], starts["1B0"]) == (12, 13)


def test_gradients_have_their_own_size() -> None:
    times = [
        build("gpipe", 2, 1).simulate(Costs(boundary_bytes=8, gradient_bytes=size, bandwidth=4)).makespan
        for size in (None, 0, 4)
    ]
    assert times == [6 + 2 + 2, 6 + 2, 6 + 2 + 1]


def test_peak_bytes_are_there() -> None:
    found = build("1f1b", 3, 5).simulate(Costs(activation_bytes=(10, 20, 40)))
    assert found.peak_bytes == (30, 40, 40)
    assert build("1f1b", 3, 5).simulate().peak_bytes == (0, 0, 0)


@given(st.sampled_from(EVERY_KIND), st.data())
def test_bounds_of_the_makespan(schedule: Schedule, data: st.DataObject) -> None:
    of_chunks = st.lists(quarters, min_size=schedule.chunks, max_size=schedule.chunks).map(tuple)
    forward, backward = data.draw(of_chunks), data.draw(of_chunks)
    latency, more, size = data.draw(quarters), data.draw(quarters), data.draw(quarters)

    def play(latency: float, bandwidth: float | None) -> Any:
        costs = Costs(
            forward=forward,
            backward=backward,
            input=forward,
            weight=backward,
            latency=latency,
            bandwidth=bandwidth,
            boundary_bytes=size,
        )
        return schedule.simulate(costs)

    found = play(latency, 2.0)
    busy: dict[int, float] = defaultdict(float)
    for span in found.spans:
        busy[span.stage] += span.end - span.start
    assert found.makespan >= max(busy.values())
    assert found.makespan <= play(latency + more, 2.0).makespan
    assert found.makespan <= play(latency, 1.0).makespan
    assert play(latency, None).makespan <= found.makespan
    if found.makespan:
        assert found.bubble == pytest.approx(1 - sum(busy.values()) / schedule.stages / found.makespan)


@given(st.sampled_from(EVERY_KIND), quarters, quarters, quarters)
def test_by_channel_and_by_number_are_alike(schedule: Schedule, latency: float, size: float, forward: float) -> None:
    pairs = [(s, t) for s in range(schedule.stages) for t in range(schedule.stages) if s != t]
    one = Costs(forward=forward, latency=latency, bandwidth=4.0, boundary_bytes=size)
    each = Costs(
        forward=forward,
        latency=dict.fromkeys(pairs, latency),
        bandwidth=dict.fromkeys(pairs, 4.0),
        boundary_bytes=(size,) * (schedule.chunks - 1),
    )
    assert schedule.simulate(one) == schedule.simulate(each)


def lines_run(stages: int, microbatches: int) -> int:
    """How many lines of the room run to check a schedule and to simulate it."""
    room = str(Path(raypipe.schedule.__file__).parent)
    programs = looped(stages, 2, microbatches).programs
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(room):
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        Schedule("mine", programs, microbatches).simulate(Costs(latency=0.5, boundary_bytes=1, bandwidth=4))
    finally:
        sys.settrace(before)
    return count


def test_work_is_linear_in_the_number_of_actions() -> None:
    small, more_microbatches, more_stages = lines_run(4, 16), lines_run(4, 32), lines_run(8, 16)
    assert small > 4 * 2 * 16 * 2 * 10
    assert 1.8 * small < more_microbatches < 2.1 * small
    assert 1.8 * small < more_stages < 2.1 * small


@pytest.mark.timeout(120)  # linear work takes seconds; quadratic work would take hours
def test_a_large_schedule_is_built_and_simulated() -> None:
    found = build("1f1b", 64, 1024).simulate()
    assert found.makespan == 3 * (1024 + 63)
    assert len(found.spans) == 2 * 64 * 1024
    assert sum(link.end - link.start for link in found.critical_path) == found.makespan


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"forward": -1.0}, ValueError, "the cost forward is -1.0, but costs are finite and not negative"),
        ({"weight": (1.0, float("nan"))}, ValueError, "the cost weight is"),
        ({"backward": "2"}, TypeError, "the cost backward is '2', but it must be a number, or a tuple"),
        ({"input": [1.0, 2.0]}, TypeError, "or a tuple with one for each chunk"),
        ({"latency": (1.0,)}, TypeError, "the cost latency is .* must be a number"),
    ],
)
def test_wrong_costs_are_refused(arguments: dict[str, float], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        Costs(**arguments)


def test_costs_of_another_number_of_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match="the cost forward has 3 numbers, but there are 2 chunks; give one each"):
        build("gpipe", 2, 2).simulate(Costs(forward=(1.0, 1.0, 1.0)))
