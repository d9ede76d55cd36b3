"""A plan at work: its ranks are started; one ``fit`` with progress, logged rows and evaluation in between."""

from __future__ import annotations

import contextlib
import operator
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import numpy

from raypipe.data import Cursor, Draw, Feed
from raypipe.driver.controller import Controller
from raypipe.driver.gang import Gang
from raypipe.driver.local import LocalGang
from raypipe.driver.results import Results
from raypipe.errors import BatchError
from raypipe.model.build import dump
from raypipe.observe.progress import Progress
from raypipe.observe.timeline import draw_planned_and_measured
from raypipe.options import Options
from raypipe.plan import Plan

__all__ = ["Run", "start"]


class Run:
    """Runs one ``fit``.

    Args:
        controller: of the started ranks.
        plan: that they run.
        results: takes the rows.
        evaluate: called every ``evaluate_every`` steps, or None.
        steps: how many there will be, where that is known.

    Attributes:
        cursor: where the data goes on after the last step that was done, or None before the first.
    """

    def __init__(
        self,
        controller: Controller,
        plan: Plan,
        results: Results,
        evaluate: Callable[[], dict[str, Any]] | None,
        steps: int | None,
    ) -> None:
        self._controller, self._plan, self._results = controller, plan, results
        self._evaluate, self._steps = evaluate, steps
        self._cursors: dict[int, Cursor] = {}
        self.cursor: Cursor | None = None

    def fit(self, feed: Feed) -> Any:
        """Trains on the feed's batches and returns the result; after a failure what was logged is written too."""
        options = self._plan.options
        try:
            with Progress(self._steps, options.log_every, quiet=options.quiet) as progress:

                def on_step(metrics: dict[str, Any]) -> None:
                    self.cursor = self._cursors.pop(metrics["step"])
                    progress.update(metrics)
                    self._results.log(metrics)

                self._controller.train(
                    self._remembered(feed), on_step, pause_after=self._due, on_pause=self._evaluate_if_due
                )
        except BaseException as error:
            if isinstance(error, BatchError):  # a batch that a step refused is consumed
                self.cursor = self._cursors.get(self._controller.step - 1, self.cursor)
            with contextlib.suppress(OSError):
                self._results.log_last()
                self._results.write(None)
            raise
        self._results.log_last()
        self._results.write(self.drawn() if self._controller.reports else None)
        return self._results.result(options.backend)

    def drawn(self, width: int = 100) -> str:
        """The last step's schedule as it was planned and as it was measured, of the first replica."""
        reports = [self._controller.reports[rank] for rank in self._plan.topology.leaders(0)]
        schedule = self._plan.options.make_schedule(reports[0].microbatches)
        return draw_planned_and_measured(schedule, [report.trace for report in reports], width)

    def _due(self, draw: Draw) -> bool:
        every = self._plan.options.evaluate_every
        return self._evaluate is not None and every is not None and (draw.step + 1) % every == 0

    def _evaluate_if_due(self, draw: Draw) -> None:
        """A pause is also made at the end, where nothing may be due."""
        if self._evaluate is not None and self._due(draw):
            self._results.log_evaluation(self._evaluate())

    def _remembered(self, feed: Feed) -> Iterator[Draw]:
        for draw in feed:
            self._cursors[draw.step] = draw.cursor_after
            yield draw


def start(plan: Plan) -> Gang:
    """Starts the ranks of a plan.

    Raises:
        ValueError: the model or an argument cannot be pickled; the sentence names what stands in the way.
        ResourcesError: there is no room for all ranks.
        RaypipeError: a rank could not be built.
    """
    options = plan.options
    if options.backend == "local":
        return LocalGang([plan.build_of(rank) for rank in range(plan.topology.size)], plan.topology)
    dump(plan.skeleton)  # names the attribute that cannot be pickled before anything starts
    _check_picklable(options)
    from raypipe.driver.ray_gang import launch

    return launch(
        plan.topology,
        (_apart(plan.build_of(rank)) for rank in range(plan.topology.size)),
        plan.wiring(),
        resources=options.resources_per_stage,
        step_timeout_s=options.step_timeout_s,
        first_step_timeout_s=max(options.step_timeout_s, 1800.0),
    )


def _apart(build: Callable[[], Any]) -> tuple[bytes, list[Any]]:
    """A pickle, and the arrays in it as they lie in memory: the store takes them without a copy beside its own."""
    buffers: list[pickle.PickleBuffer] = []
    data = cloudpickle.dumps(build, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    return data, [numpy.frombuffer(v, numpy.uint8) if v.nbytes else numpy.empty(0, numpy.uint8) for v in views]


def _check_picklable(options: Options) -> None:
    """Names the argument that stands in the way of sending the user's functions to the ranks."""
    names = ("loss", "forward", "optimizer", "lr_scheduler", "schedule", "microbatch_weight", "metrics")
    for name, value in zip(names, operator.attrgetter(*names)(options), strict=True):
        try:
            cloudpickle.dumps(value)
        except Exception as error:
            raise ValueError(
                f"{name} cannot be pickled ({type(error).__name__}: {error}), but every rank needs a copy of it; make "
                "what it holds inside the function when it is first called"
            ) from None
