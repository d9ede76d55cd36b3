from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from made_by_hand import looped, mine
from made_up_traces import MS, SLOW, any_steps, played, slow_report

from raypipe.observe.events import Trace
from raypipe.observe.report import Report
from raypipe.schedule import Schedule, build


def test_the_prediction_does_not_know_the_step() -> None:
    report = slow_report()
    assert report.costs.forward == pytest.approx((1e-3, 1e-3))
    assert report.predicted.makespan == pytest.approx(9e-3)
    assert report.makespan_ns == 10_500_000
    assert report.step_ns == 12_500_000


def test_without_earlier_steps_it_takes_the_medians_of_this_one() -> None:
    schedule = build("1f1b", 3, 5)
    report = Report.of(schedule, played(schedule, MS))
    assert report.costs.forward == pytest.approx((1e-3,) * 3)
    assert report.difference.total == pytest.approx(0, abs=10)


def test_costs_go_before_earlier_steps_and_latencies_go_on_top() -> None:
    schedule = build("gpipe", 2, 2)
    traces = played(schedule, replace(MS, latency=1e-3), at=20.0)
    earlier = [played(schedule, SLOW, at=0.0), played(schedule, SLOW, at=1.0)]
    report = Report.of(schedule, traces, costs=MS, earlier=earlier, latency={(0, 1): 1e-3, (1, 0): 1e-3})
    assert report.costs == replace(MS, latency={(0, 1): 1e-3, (1, 0): 1e-3})
    assert report.difference.communication == 0
    assert report.stages[0].driver > 10**10


def test_one_slow_microbatch_is_not_in_the_prediction() -> None:
    schedule = build("gpipe", 2, 5)
    traces = played(schedule, MS)
    times = traces[1].times.copy()
    times[0, 2] += 7e-4
    times[1:] += 7e-4
    traces[1] = replace(traces[1], times=times, ended=traces[1].ended + 7e-4)
    report = Report.of(schedule, traces)
    assert report.predicted.makespan == pytest.approx(18e-3)
    assert report.changes[1].compute == pytest.approx(7e5, abs=10)


@given(any_steps())
def test_both_sums_are_exact(case: tuple[Schedule, list[list[Trace]]]) -> None:
    schedule, (before, now) = case
    report = Report.of(schedule, now, earlier=[before])
    for times, plan, change, trace, last in zip(
        report.stages, report.predicted_stages, report.changes, now, before, strict=True
    ):
        assert sum(times) == pytest.approx((trace.ended - last.ended) * 1e9, abs=2)
        assert sum(plan) == report.predicted_ns
        assert sum(change) == sum(times) - sum(plan)
    assert report.step_ns == report.predicted_ns + report.difference.total
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert 0 <= report.bubble <= 1


def test_the_dict() -> None:
    found = slow_report().to_dict()
    assert found["schedule"] == "gpipe: 2 stages, 2 microbatches"
    assert found["unit"] == "ns"
    assert found["predicted"]["step"] == 9_000_000
    assert found["measured"]["step"] == 12_500_000
    assert [sum(times.values()) for times in found["measured"]["stages"]] == [12_500_000] * 2
    assert [sum(times.values()) for times in found["difference"]["stages"]] == [3_500_000] * 2
    assert found["measured"]["actions"][0] == [0, "0F0", 0, 1_000_000]
    assert len(found["predicted"]["actions"]) == 8
    assert found["difference"]["total"] == 3_500_000


def test_it_is_written_as_its_suffix_says(tmp_path: Path) -> None:
    report = slow_report()
    report.write(tmp_path / "report.json")
    report.write(str(tmp_path / "report.txt"))
    assert json.loads((tmp_path / "report.json").read_text()) == report.to_dict()
    assert (tmp_path / "report.txt").read_text() == f"{report}\n"
    for name in ("report.png", "report"):
        with pytest.raises(
            ValueError, match=f"a report cannot be written to '.*{name}'; give a path that ends in .json"
        ):
            report.write(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"the folder '.*missing' is missing; make it first"):
        report.write(tmp_path / "missing" / "report.txt")
    assert len(list(tmp_path.iterdir())) == 2


def test_several_chunks_and_halves() -> None:
    schedule = mine("0F0 2F0 2I0 0I0 2W0 0W0", "1F0 1I0 1W0", microbatches=1)
    report = Report.of(schedule, played(schedule, replace(MS, input=1e-3, weight=5e-4)))
    assert report.stages[0].compute == 5_000_000
    assert report.stages[1] == report.predicted_stages[1]
    assert "i input gradient   w weight gradient" in str(report)
    assert Report.of(looped(2, 2, 3), played(looped(2, 2, 3), MS)).difference.total == pytest.approx(0, abs=10)


def test_traces_of_another_schedule_are_refused() -> None:
    with pytest.raises(ValueError, match="the traces of 2 ranks are not of gpipe: 2 stages, 3 microbatches"):
        Report.of(build("gpipe", 2, 3), played(build("gpipe", 2, 2), MS))
