"""raypipe's side of a comparison: a trainer over Ray, and every step's traces out of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.task import Task
from raypipe import PipelineTrainer
from raypipe.observe.events import END, FROM, START, Trace
from raypipe.schedule import Op, build
from raypipe.schedule.dry_run import given_by, needed_by

__all__ = ["Steps", "chunks_held", "last_traces", "steps_of", "trainer_of"]


def chunks_held(schedule: str) -> int:
    """How many chunks a stage holds in raypipe's schedule of this name."""
    return build(schedule, 2, 2).chunks // 2


@contextmanager
def trainer_of(task: Task, schedule: str = "1f1b", **options: Any) -> Iterator[PipelineTrainer]:
    """A trainer of the task over Ray actors, its ``fit`` drawing the task's batch again and again."""
    from ray.train import RunConfig

    batch = task.batch()
    with TemporaryDirectory() as folder:
        given: dict[str, Any] = {
            "datasets": {"train": [batch]},
            "loss": task.loss,
            "optimizer": task.optimizer,
            "microbatches": task.microbatches,
            "balance": list(task.counts),
            "schedule": schedule,
            "quiet": True,
            "run_config": RunConfig(name="benchmark", storage_path=folder),
            **({"chunks": task.chunks} if task.chunks > 1 else {}),
            **options,
        }
        with PipelineTrainer(task.model(), task.stages, **given) as trainer:
            yield trainer


class Steps:
    """The traces of consecutive steps of one ``fit``; all ranks are on this machine, so on one clock."""

    def __init__(self, traces: Sequence[Sequence[Trace]]) -> None:
        self.traces = traces

    @property
    def periods(self) -> list[float]:
        """Seconds from each step's end on all ranks to the next one's, the first one's from its start on rank 0.

        A step that starts while another rank is still at the last one so gains nothing that is not gained.
        """
        marks = [self.traces[0][0].started, *(max(trace.ended for trace in ranks) for ranks in self.traces)]
        return [after - before for before, after in pairwise(marks)]

    def action_s(self, op: Op) -> list[float]:
        """Seconds of every action of this kind."""
        return [
            float(row[END] - row[START])
            for ranks in self.traces
            for trace in ranks
            for action, row in zip(trace.actions, trace.times, strict=True)
            if action.op is op
        ]

    @property
    def handovers(self) -> list[float]:
        """Seconds from an action's end to the start of the one on the next rank that was waiting for its message."""
        found = []
        for ranks in self.traces:
            chunks = 1 + max(action.chunk for trace in ranks for action in trace.actions)
            rows = [(r, a, row) for r, t in enumerate(ranks) for a, row in zip(t.actions, t.times, strict=True)]
            made = {given_by(action): (rank, row[END]) for rank, action, row in rows}
            for rank, action, row in rows:
                need = needed_by(action, chunks)
                source, ended = made[need] if need is not None else (rank, 0.0)
                if source != rank and row[FROM] < ended:
                    found.append(float(row[START] - ended))
        return found

    @property
    def gaps(self) -> list[float]:
        """Seconds between the end of a step and the start of the next one, on each rank."""
        pairs = pairwise(self.traces)
        return [b.started - a.ended for before, after in pairs for a, b in zip(before, after, strict=True)]


def steps_of(trainer: PipelineTrainer, steps: int) -> Steps:
    """Runs ``fit`` for some steps, more than any before, and keeps what the ranks report.

    Metrics are summaries; the reports behind them pass through the gang's ``wait``, so it is listened to here.
    """
    gang: Any = trainer._gang
    taken: list[list[Trace]] = []
    wait = gang.wait

    def listening(pending: Any) -> list[Any]:
        reports: list[Any] = wait(pending)
        if pending.kind == "train":
            taken.append([report.trace for report in reports])
        return reports

    gang.wait = listening
    try:
        trainer.fit(steps=steps)
    finally:
        del gang.wait
    return Steps(taken)


def last_traces(trainer: PipelineTrainer) -> list[Trace]:
    """What the ranks reported of the last step."""
    controller: Any = trainer._controller
    return [report.trace for report in controller.reports]
