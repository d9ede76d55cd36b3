"""The control loop: draws batches, keeps one step queued ahead, takes the reports.

While a step runs, the next one's calls and batch are already with the ranks, so what the driver does is never on the
way. Evaluation comes between steps: what is queued is taken first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from raypipe.data.feed import Draw, Feed
from raypipe.data.wire import pack, unpack
from raypipe.driver.gang import Gang, Pending
from raypipe.driver.metrics import average, step_metrics, tokens_in
from raypipe.stage.report import ForwardReport, TrainReport
from raypipe.stage.spec import Gradients

__all__ = ["Controller"]

AHEAD = 1


class Controller:
    """Drives a gang.

    Args:
        gang: the ranks.
        gradients: whose gradients are whose, for the global norm.

    Attributes:
        reports: of the last step that was taken, by rank.
    """

    def __init__(self, gang: Gang, gradients: Gradients) -> None:
        self._gang, self._gradients = gang, gradients
        self.reports: list[TrainReport] = []
        self.step = 0

    def train(
        self,
        feed: Feed,
        on_step: Callable[[dict[str, Any]], None],
        *,
        pause_after: Callable[[Draw], bool] = lambda draw: False,
        on_pause: Callable[[Draw], None] = lambda draw: None,
    ) -> None:
        """Trains on every batch that the feed gives.

        Args:
            feed: the batches.
            on_step: told each step's metrics, in order.
            pause_after: whether the pipeline is to be empty after this batch's step,
            on_pause: which is then called.
        """
        queued: deque[tuple[Draw, int | None, Pending]] = deque()
        for draw in feed:
            wire = pack(draw.batch)
            queued.append((draw, tokens_in(draw.batch), self._gang.train_step(draw.step, self._gang.put(wire))))
            pause = draw.last or pause_after(draw)
            while len(queued) > (0 if pause else AHEAD):
                on_step(self._taken(*queued.popleft()))
            if pause:
                on_pause(draw)

    def train_step(self, batch: Any) -> dict[str, Any]:
        """One step on the user's own batch."""
        pending = self._gang.train_step(self.step, self._gang.put(pack(batch)))
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
        for batch in batches:
            queued.append(self._gang.forward_step(self.step, self._gang.put(pack(batch)), kind))
            if len(queued) > AHEAD:
                yield self._gang.wait(queued.popleft())[-1]
        while queued:
            yield self._gang.wait(queued.popleft())[-1]

    def _taken(self, draw: Draw, tokens: int | None, pending: Pending) -> dict[str, Any]:
        return {"epoch": draw.epoch, **self._metrics(pending, tokens)}

    def _metrics(self, pending: Pending, tokens: int | None) -> dict[str, Any]:
        self.reports = self._gang.wait(pending)
        self.step = pending.step + 1
        metrics = step_metrics(self.reports, self._gradients)
        return metrics if tokens is None else {**metrics, "tokens": tokens}
