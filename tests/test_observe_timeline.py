from __future__ import annotations

import re
import time

import numpy as np
import pytest

from raypipe.observe.events import Recorder, Trace
from raypipe.observe.timeline import bubble, draw_planned_and_measured, mean_costs, measured_spans
from raypipe.schedule import Costs, Schedule, build


def traces_of(schedule: Schedule, costs: Costs | None = None, clocks: tuple[float, ...] = ()) -> list[Trace]:
    """What ranks would measure if all went as simulated; ``clocks`` is what each rank's clock shows at the start."""
    found = schedule.simulate(costs)
    traces = []
    for stage, program in enumerate(schedule.programs):
        clock = clocks[stage] if clocks else 1000.0
        rows = [(s.start - 0.5, s.start, s.end) for s in found.spans if s.stage == stage]
        times = np.array(rows).reshape(-1, 3) + clock
        traces.append(Trace(program, times, clock - 1, clock + found.makespan + 1, 1))
    return traces


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_spans_and_bubble_are_those_of_the_simulation(name: str) -> None:
    schedule = build(name, 3, 5)
    found = schedule.simulate()
    traces = traces_of(schedule)
    assert sorted(measured_spans(traces), key=str) == sorted(found.spans, key=str)
    assert bubble(traces) == pytest.approx(found.bubble)


def test_the_makespan_is_over_all_stages_and_waiting_is_bubble() -> None:
    actions = build("gpipe", 1, 1).programs[0]
    early = Trace(actions, np.array([[0.0, 1.0, 2.0], [2.0, 3.0, 4.0]]), 0.0, 9.0, 1)
    late = Trace(actions, np.array([[0.0, 5.0, 6.0], [6.0, 6.0, 7.0]]), 0.0, 9.0, 1)
    assert bubble([early]) == pytest.approx(1 / 3)
    assert bubble([early, late]) == pytest.approx(1 - 4 / 12)


def test_clocks_of_several_hosts_are_aligned_by_the_step() -> None:
    schedule = build("1f1b", 3, 4)
    apart = traces_of(schedule, clocks=(5.0, 1e6, 20_000.0))
    assert bubble(apart) == pytest.approx(bubble(traces_of(schedule)))
    assert min(span.start for span in measured_spans(apart)) == 0


def test_costs_are_the_medians_of_each_chunk() -> None:
    schedule = build("gpipe", 2, 3)
    traces = traces_of(schedule, Costs(forward=(1.0, 4.0), backward=(3.0, 2.0)))
    traces[0].times[0, 2] += 100  # the first microbatch was slow
    assert mean_costs(traces) == Costs(forward=(1.0, 4.0), backward=(3.0, 2.0), input=(0.0, 0.0), weight=(0.0, 0.0))


def test_costs_of_split_backwards_and_of_evaluation() -> None:
    split = Schedule.from_csv("0F0,0I0,0W0")
    assert mean_costs(traces_of(split, Costs(input=1.5, weight=0.5))) == Costs((1.0,), (0.0,), (1.5,), (0.5,))
    assert mean_costs(traces_of(split.forwards(2))) == Costs((1.0,), (0.0,), (0.0,), (0.0,))


def test_planned_and_measured_share_one_scale() -> None:
    schedule = build("gpipe", 2, 1)
    traces = traces_of(schedule, Costs(forward=0.001, backward=0.002, latency=0.003))
    axis = (
        "        +---------+---------+---------+---------+---------+---------+\n"
        "        0         2         4         6         8         10       12\n"
        "         > forward   < backward   . idle   time in ms"
    )
    assert draw_planned_and_measured(schedule, traces, 69) == (
        "planned: makespan 6 ms, bubble 50.0%\n"
        "stage 0 |0>>>>...............0<<<<<<<<<\n"
        "stage 1 |.....0>>>>0<<<<<<<<<..........\n"
        f"{axis}\n"
        "\n"
        "measured: makespan 12 ms, bubble 75.0%\n"
        "stage 0 |0>>>>.............................................0<<<<<<<<<\n"
        "stage 1 |....................0>>>>0<<<<<<<<<.........................\n"
        f"{axis}"
    )


def test_a_real_recorder_is_drawn() -> None:
    schedule = build("1f1b", 1, 3)
    recorder = Recorder(schedule.programs[0])
    for index in range(len(schedule.programs[0])):
        start = time.monotonic()
        time.sleep(0.002)
        recorder.write(index, start, start, time.monotonic(), 1)
    text = draw_planned_and_measured(schedule, [recorder.trace()])
    found = re.findall(r"(planned|measured): makespan ([0-9.]+) ms, bubble ([0-9.]+)%", text)
    assert [title for title, _, _ in found] == ["planned", "measured"]
    assert all(12 <= float(makespan) < 1000 for _, makespan, _ in found)
    assert text.count("time in ms") == 2


def test_traces_of_another_schedule_are_refused() -> None:
    with pytest.raises(ValueError, match="the traces of 2 ranks are not of gpipe: 2 stages, 3 microbatches; "):
        draw_planned_and_measured(build("gpipe", 2, 3), traces_of(build("gpipe", 2, 4)))
    with pytest.raises(ValueError, match="the traces of 1 ranks are not of"):
        draw_planned_and_measured(build("gpipe", 2, 3), traces_of(build("gpipe", 2, 3))[:1])


def test_nothing_measured_is_refused() -> None:
    for traces in ([], [Trace((), np.zeros((0, 3)), 0.0, 1.0, 0)]):
        with pytest.raises(ValueError, match="hold no action; give those of a step that was run"):
            bubble(traces)
