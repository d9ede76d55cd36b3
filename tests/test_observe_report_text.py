from __future__ import annotations

from dataclasses import replace

import pytest
from made_up_traces import MS, played, slow_report

from raypipe.observe.report import Report
from raypipe.observe.report_text import largest_cause, report_text
from raypipe.schedule import Costs, build


def test_the_whole_text() -> None:
    headline, planned, measured, *tables, sentence = str(slow_report()).split("\n\n")
    assert headline == (
        "gpipe: 2 stages, 2 microbatches: a step of 12.500 ms, predicted 9.000 ms (+38.9%); "
        "bubble 38.1%, predicted 33.3%"
    )
    assert planned.startswith("predicted: makespan 9 ms, bubble 33.3%\nstage 0 |0>>>")
    assert measured.startswith("measured: makespan 10.5 ms, bubble 38.1%\nstage 0 |0>>>")
    assert planned.splitlines()[3:5] == measured.splitlines()[3:5]  # one axis
    stages, both, lost = ([line.split() for line in table.splitlines()] for table in tables)
    assert " ".join(stages[1]) == "compute dependency exposed communication straggler data driver optimizer step"
    assert " ".join(stages[2]) == (
        "stage 0 6.000 (48.0%) 3.000 (24.0%) 0.250 ( 2.0%) 1.250 (10.0%) 0.500 ( 4.0%) 0.500 ( 4.0%) 1.000 ( 8.0%) "
        "12.500"
    )
    assert stages[-1][0] == "all"
    assert stages[-1][-1] == "25.000"
    assert both[1:] == [
        ["predicted", "measured", "change"],
        ["makespan", "9.000", "10.500", "+1.500"],
        ["stage", "0", "computing", "6.000", "6.000", "+0.000"],
        ["stage", "0", "idle", "3.000", "4.500", "+1.500"],
        ["stage", "1", "computing", "6.000", "7.000", "+1.000"],
        ["stage", "1", "idle", "3.000", "3.500", "+0.500"],
    ]
    assert lost[1:] == [
        ["compute", "on", "stage", "1", "+1.000"],
        ["exposed", "communication", "+0.500"],
        ["data", "+0.500"],
        ["driver", "+0.500"],
        ["optimizer", "+1.000"],
        ["sum", "+3.500"],
    ]
    assert sentence == (
        "the step took 3.500 ms more than predicted (+38.9%); the largest cause is compute on stage 1: +1.000 ms."
    )


@pytest.mark.parametrize(
    ("real", "data", "sentence"),
    [
        (
            MS,
            0.0,
            "the step went as predicted; the largest part of the time in which stages do not compute is dependency: "
            "6.000 ms, 33.3% of all stages' time",
        ),
        (MS, 5e-3, "the step took 5.000 ms more than predicted (+55.6%); the largest cause is data: +5.000 ms"),
        (
            replace(MS, latency=1e-3),
            0.0,
            "the step took 2.000 ms more than predicted (+22.2%); the largest cause is exposed communication: "
            "+2.000 ms",
        ),
        (
            replace(MS, backward=(2e-3, 1e-3)),
            0.0,
            "the step took 1.000 ms less than predicted (-11.1%); the largest cause is compute on stage 1: -1.000 ms",
        ),
    ],
)
def test_the_largest_cause(real: Costs, data: float, sentence: str) -> None:
    schedule = build("gpipe", 2, 2)
    assert largest_cause(Report.of(schedule, played(schedule, real, data=data), costs=MS)) == sentence


def test_one_stage_that_never_idles() -> None:
    schedule = build("1f1b", 1, 4)
    report = Report.of(schedule, played(schedule, MS, at=0.0), costs=MS)
    assert largest_cause(report) == "the step went as predicted, and every stage computed all the time"
    assert "\nall " not in report_text(report)


def test_nothing_that_takes_no_time_divides_by_zero() -> None:
    schedule = build("1f1b", 2, 2)
    nothing = Costs(forward=0, backward=0)
    report = Report.of(schedule, played(schedule, nothing), costs=nothing)
    assert "a step of 0.000 ms, predicted 0.000 ms; bubble 0.0%" in str(report)
