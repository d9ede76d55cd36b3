from __future__ import annotations

import csv
import io
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops
from torch.distributed.pipelining.schedules import (
    _Action,
    _format_pipeline_order,
    _PipelineScheduleRuntime,
    _validate_schedule,
)

from raypipe.errors import ScheduleError
from raypipe.schedule import Schedule, build, names


def torch_csv(name: str, stages: int, microbatches: int, with_comms: bool = False) -> str:
    rows = get_schedule_ops(name, stages, microbatches, with_comms=with_comms)
    text = io.StringIO()
    csv.writer(text).writerows([["" if action is None else str(action) for action in row] for row in rows])
    return text.getvalue()


def test_the_text() -> None:
    assert build("1f1b", 2, 2).to_csv() == "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"


@given(st.sampled_from(names()), st.integers(1, 10), st.integers(1, 10))
def test_what_is_written_is_read(name: str, stages: int, microbatches: int) -> None:
    schedule = build(name, stages, microbatches)
    assert Schedule.from_csv(schedule.to_csv(), name) == schedule


@given(st.sampled_from(names()), st.integers(1, 8), st.integers(1, 8))
def test_torch_finds_what_is_written_valid(name: str, stages: int, microbatches: int) -> None:
    schedule = build(name, stages, microbatches)
    rows = csv.reader(io.StringIO(schedule.to_csv()))
    order = {rank: [_Action.from_str(cell) for cell in row] for rank, row in enumerate(rows)}
    found = _validate_schedule(order, stages, schedule.chunks, microbatches)
    assert found == dict(enumerate(schedule.placement))


def test_torch_draws_what_is_written() -> None:
    rows = csv.reader(io.StringIO(build("1f1b", 4, 8).to_csv()))
    grid = _format_pipeline_order({rank: [_Action.from_str(cell) for cell in row] for rank, row in enumerate(rows)})
    columns = zip(*(line.partition(": ")[2].split() for line in grid.splitlines()[1:]), strict=True)
    assert tuple(columns) == tuple(tuple(map(str, program)) for program in build("1f1b", 4, 8).programs)


@pytest.mark.parametrize("name", names())
def test_torchs_runtime_loads_what_is_written(name: str, tmp_path: Path) -> None:
    path = tmp_path / "schedule.csv"
    schedule = build(name, 3, 5)
    path.write_text(schedule.to_csv())
    stage = mock.create_autospec(PipelineStage, instance=True)
    stage.group_rank, stage.group_size, stage.num_stages, stage.submod = 0, 3, schedule.chunks, None
    runtime = _PipelineScheduleRuntime([stage] * (schedule.chunks // 3), 5)
    runtime._load_csv(str(path), format="compute_only")
    computed = [
        [str(a) for a in runtime.pipeline_order_with_comms[rank] if a is not None and a.is_compute_op]
        for rank in range(3)
    ]
    assert computed == [[str(action) for action in program] for program in schedule.programs]


@pytest.mark.parametrize("with_comms", [False, True])
@pytest.mark.parametrize("name", ["Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"])
def test_torchs_schedules_are_read(name: str, with_comms: bool) -> None:
    schedule = Schedule.from_csv(torch_csv(name, 4, 8, with_comms))
    assert (schedule.stages, schedule.chunks, schedule.microbatches) == (4, 8, 8)
    v = name in ("ZBVZeroBubble", "DualPipeV")
    assert schedule.placement == ((0, 1, 2, 3, 3, 2, 1, 0) if v else (0, 1, 2, 3, 0, 1, 2, 3))
    assert schedule == Schedule.from_csv(torch_csv(name, 4, 8, with_comms=not with_comms))


def test_torchs_gpipe_is_ours() -> None:
    text = torch_csv("GPipe", 4, 8)
    assert "REDUCE_GRAD" in text
    assert Schedule.from_csv(text, "gpipe") == build("gpipe", 4, 8)


def test_backwards_in_another_order_than_the_microbatches_are_refused() -> None:
    # torch's looped BFS runs the last microbatch's backward first.
    with pytest.raises(ScheduleError, match="the backwards of a chunk run in microbatch order"):
        Schedule.from_csv(torch_csv("LoopedBFS", 2, 4))


def test_idle_cells_communication_and_blank_lines_are_skipped() -> None:
    text = "\ufeff0UNSHARD, 0F0 ,0SEND_F0,,0RECV_B0,0B0,0REDUCE_GRAD,0RESHARD\r\n,1RECV_F0,1F0,1B0,1SEND_B0\r\n\r\n"
    assert Schedule.from_csv(text).to_csv() == "0F0,0B0\n1F0,1B0\n"


def test_a_cell_that_is_no_action_is_named() -> None:
    with pytest.raises(ScheduleError, match=r"line 2, cell 3 of the schedule's CSV: '1Q0' is not an action"):
        Schedule.from_csv("0F0,0B0\n1F0,,1Q0\n")


def test_a_path_is_no_text() -> None:
    with pytest.raises(ScheduleError, match=r"'schedule\.csv' is not an action"):
        Schedule.from_csv("schedule.csv")


def test_an_empty_text_has_no_stages() -> None:
    with pytest.raises(ScheduleError, match="it has no stages"):
        Schedule.from_csv("\n")
