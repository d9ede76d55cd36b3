"""Records a forward on a model's fake twin.

Units run on fake tensors; the code between them runs for real as long as it touches no value, so that masks may be
asked for what they hold.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from raypipe.errors import CutError
from raypipe.model.attributes import Snapshot
from raypipe.model.hooks import has_hooks_since, next_hook
from raypipe.model.recorder import AsksForData, Recorder, StaysInside
from raypipe.model.recording import Recording
from raypipe.model.saved import Saved
from raypipe.model.twin import Twin

__all__ = ["record"]


def record(twin: Twin, forward: Callable[[Any], Any], saved: Saved | None = None) -> Recording:
    """Runs ``forward(twin.model)`` and returns its events.

    Where the forward asks a value for its data after every unit was called (``loss.item()``, a loss over a mask), the
    recording stops: the last stage runs that part for real, whatever it does.

    The body of a hook inside of a unit counts as code between units. One that does what such code cannot (it asks for
    data to print it, it draws random numbers) belongs to its unit: then the forward is recorded again.

    Args:
        twin: the fake model, in the modes (train, eval) that the run will have.
        forward: calls the model on one microbatch, afresh each time.
        saved: collects what the backward will need, where somebody asks.

    Raises:
        CutError: the model does something that no split reproduces: control flow on a value, a buffer that changes
            outside of units.
    """
    inside: set[str] = set()
    while True:
        kept = Snapshot(twin.model)
        recorder = Recorder(twin, frozenset(inside), saved)
        outputs, first_hook = None, next_hook()
        collecting = nullcontext() if saved is None else saved.during(recorder.recording)
        with twin.switch.on(recorder), _silent_fakes(), collecting:
            try:
                outputs = forward(twin.model)
            except StaysInside as stop:
                kept.restore_contents()
                inside.add(stop.hook)
                if saved is not None:
                    saved.by_event.clear()
                    saved.arguments.clear()
                continue
            except AsksForData as stop:
                kept.restore_contents()
                recorder.recording.stopped = stop.sentence
        recorder.look_at_outputs(outputs)
        recorder.recording.removes_hooks = next_hook() != first_hook and not has_hooks_since(twin.model, first_hook)
        if recorder.recording.stopped is not None and not recorder.called.issuperset(twin.units):
            raise CutError(recorder.recording.stopped)
        return recorder.recording


@contextmanager
def _silent_fakes() -> Iterator[None]:
    """FakeTensor logs what it cannot do as an error; here it is none."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
