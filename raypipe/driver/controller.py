"""The control loop: draws batches, keeps one step queued ahead, takes the reports.

While a step runs, the next one's calls and batch are already with the ranks, so what the driver does is never on the
way. Evaluation comes between steps: what is queued is taken first.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

from raypipe.data import Draw
from raypipe.data.wire import pack, unpack
from raypipe.driver.gang import Gang, Pending
from raypipe.driver.metrics import average, step_metrics, tokens_in
from raypipe.errors import BatchError, StageError
from raypipe.observe.history import History
from raypipe.stage.report import ForwardReport, TrainReport
from raypipe.stage.spec import Gradients

__all__ = ["Controller", "data_error"]

T = TypeVar("T")

AHEAD = 1
"""Steps that are queued while one runs."""


class Controller:
    """Drives a gang.

    Args:
        gang: the ranks.
        gradients: whose gradients are whose, for the global norm.
        admit: raises where a batch cannot be run; asked before a batch goes to the ranks, which a bad one would end.
        leaders: the rank of each stage whose times are shown; None: every rank is a stage.

    Attributes:
        reports: of the last step that was taken, by stage.
        history: the traces of the last steps.
        step: number of the next step.
    """

    def __init__(
        self,
        gang: Gang,
        gradients: Gradients,
        admit: Callable[[Any], None],
        leaders: Sequence[int] | None = None,
    ) -> None:
        self._gang, self._gradients, self._admit, self._leaders = gang, gradients, admit, leaders
        self.reports: list[TrainReport] = []
        self.history = History()
        self.step = 0

    def train(
        self,
        draws: Iterable[Draw],
        on_step: Callable[[dict[str, Any]], None],
        *,
        pause_after: Callable[[Draw], bool] = lambda draw: False,
        on_pause: Callable[[Draw], None] = lambda draw: None,
    ) -> None:
        """Trains on every batch that is drawn.

        Args:
            draws: the batches; their steps go on from ``step``.
            on_step: told each step's metrics, in order.
            pause_after: whether the pipeline is to be empty after this batch's step; it always is after the last.
            on_pause: called when it is empty.

        Raises:
            StageError: a step failed, or the data's own code did; steps before that were taken first.
            BatchError: a batch was refused. It changed nothing, and what was queued behind it is trained on.
            RaypipeError: see ``Gang.wait``.
        """
        queued: deque[tuple[Draw, int | None, Pending]] = deque()

        def take(left: int) -> None:
            refused: BatchError | None = None
            while len(queued) > (0 if refused else left):  # the ranks have what is queued, and will train on it
                draw, tokens, pending = queued.popleft()
                try:
                    metrics = self._metrics(pending, tokens)
                except BatchError as error:
                    refused = refused or error
                else:
                    on_step({"epoch": draw.epoch, **metrics})
            if refused is not None:
                raise refused

        reader = iter(draws)
        for number in itertools.count(self.step):
            try:
                draw = next(reader, None)
            except Exception as error:
                take(0)
                raise data_error(error, number) from None
            if draw is None:
                break
            try:
                pending = self._gang.train_step(draw.step, self._put(draw.batch))
            except Exception:  # of this batch, or of the user's schedule for its number of microbatches
                take(0)
                raise
            queued.append((draw, tokens_in(draw.batch), pending))
            pause = draw.last or pause_after(draw)
            take(0 if pause else AHEAD)
            if pause:
                on_pause(draw)
        take(0)

    def train_step(self, batch: Any) -> dict[str, Any]:
        """One step on the user's own batch."""
        pending = self._gang.train_step(self.step, self._put(batch))
        return self._metrics(pending, tokens_in(batch))

    def evaluate(self, batches: Iterable[Any]) -> dict[str, Any]:
        """Metrics over batches; nothing of the training state changes.

        Raises:
            ValueError: there is no batch.
        """
        reports = list(self._forwards(batches, "evaluate"))
        if not reports:
            raise ValueError("the data to evaluate is empty: it gave no batch")
        return average(reports)

    def predict(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The model's outputs for each batch, in order."""
        for report in self._forwards(batches, "predict"):
            yield unpack(report.outputs)

    def _forwards(self, batches: Iterable[Any], kind: str) -> Iterator[ForwardReport]:
        queued: deque[Pending] = deque()
        self.history.interrupt()
        try:
            for batch in _read(batches, self.step):
                queued.append(self._gang.forward_step(self.step, self._put(batch), kind))
                if len(queued) > AHEAD:
                    yield self._last(queued.popleft())
            while queued:
                yield self._last(queued.popleft())
        finally:  # the caller may have enough
            for pending in queued:
                self._gang.drop(pending)

    def _last(self, pending: Pending) -> ForwardReport:
        """The last stage's report."""
        report: ForwardReport = next(report for report in self._gang.wait(pending) if report.is_last)
        if report.refused is not None:
            raise BatchError(report.refused)
        return report

    def _put(self, batch: Any) -> Any:
        self._admit(batch)
        return self._gang.put(pack(batch))

    def _metrics(self, pending: Pending, tokens: int | None) -> dict[str, Any]:
        reports = self._gang.wait(pending)
        self.reports = reports if self._leaders is None else [reports[rank] for rank in self._leaders]
        self.history.add([report.trace for report in self.reports])
        self.step = pending.step + 1
        refused = next((report.refused for report in reports if report.refused), None)
        if refused is not None:
            raise BatchError(refused)
        metrics = step_metrics(reports, self._gradients, self.reports)
        return metrics if tokens is None else {**metrics, "tokens": tokens}


def data_error(error: Exception, step: int) -> Exception:
    """What to raise where reading a batch failed.

    Data is read in the driver, for the first stage: an exception of the user's code is a ``StageError`` of stage 0 with
    action ``data``. What raypipe's own readers refuse is a sentence already and stays as it is.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return error if _is_own(trace) else StageError(0, "data", step, error)


def _is_own(trace: TracebackType | None) -> bool:
    name = str(trace.tb_frame.f_globals.get("__name__", "")) if trace is not None else ""
    return name.startswith("raypipe.")


def _read(batches: Iterable[T], step: int) -> Iterator[T]:
    """The batches, with ``data_error`` for what goes wrong in reading them."""
    reader = iter(batches)
    while True:
        try:
            batch = next(reader)
        except StopIteration:
            return
        except Exception as error:
            raise data_error(error, step) from None
        yield batch
