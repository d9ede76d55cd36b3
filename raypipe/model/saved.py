"""What a forward keeps for its backward: the memory that autograd saves, event by event.

It is seen by ``torch.autograd.graph.saved_tensors_hooks`` around a recording on fake tensors. A piece of memory counts
once, however often it is saved, and parameters and buffers do not count: they are there anyway. That activations are
what remains between forward and backward is the accounting of Korthikanti et al., "Reducing Activation Recomputation
in Large Transformer Models" (2022). What an action needs only while it runs is not in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from raypipe.model.event import Value
from raypipe.model.recording import Recording
from raypipe.model.twin import Twin

__all__ = ["Saved"]


class Saved:
    """Collects what is saved while a twin is recorded.

    Args:
        twin: to be recorded.

    Attributes: ``by_event``, the bytes of each piece of memory that an event saved, by the piece's number;
    ``arguments``, likewise of what a unit call was given.
    """

    def __init__(self, twin: Twin) -> None:
        self._resident = {t.untyped_storage()._cdata for t in (*twin.model.parameters(), *twin.model.buffers())}
        self._origins: dict[int, int] = {}
        self._keep: list[object] = []  # memory is told apart by address: none may be freed meanwhile
        self._recording = Recording()
        self.by_event: dict[int, dict[int, int]] = {}
        self.arguments: dict[int, dict[int, int]] = {}

    @contextmanager
    def during(self, recording: Recording) -> Iterator[None]:
        """Collects for the event that the recording is at; for its last one where it is complete."""
        self.of(recording)
        with saved_tensors_hooks(self._pack, _same):
            yield

    def of(self, recording: Recording) -> None:
        """Says whose values will be asked for."""
        self._recording = recording

    def stands_for(self, fake: Tensor, real: Tensor) -> None:
        """A fake was made for a real tensor, which several units may get: its memory is there once."""
        self._keep += (fake.untyped_storage(), real.untyped_storage())
        self._origins[fake.untyped_storage()._cdata] = real.untyped_storage()._cdata

    def given(self, event: int, tensors: Iterable[Tensor]) -> None:
        """A unit call gets these tensors."""
        own = self.arguments[event] = {}
        for tensor in tensors:
            number, storage = self._number(tensor), tensor.untyped_storage()
            if number not in self._resident:
                self._keep.append(storage)
                own[number] = storage.nbytes()

    def beside_arguments(self, event: int) -> int:
        """The bytes that a unit call saves and was not given."""
        given = self.arguments.get(event, {})
        return sum(count for piece, count in self.by_event.get(event, {}).items() if piece not in given)

    def complete(self) -> None:
        """What is saved from now on, by a loss outside of the model, belongs to the last event."""
        self._last = len(self._recording.events) - 1

    def of_value(self, value: Value) -> int:
        """The number of the memory that a value stands in."""
        return self._number(self._recording.placeholders[value.number])

    def _number(self, tensor: Tensor) -> int:
        address = int(tensor.untyped_storage()._cdata)
        return self._origins.get(address, address)

    _last: int | None = None

    def _pack(self, tensor: Tensor) -> Tensor:
        number = self._number(tensor)
        if number not in self._resident:
            storage = tensor.untyped_storage()
            self._keep.append(storage)
            event = self._last
            if event is None:
                running = self._recording.running
                event = len(self._recording.events) if running is None else running
            self.by_event.setdefault(event, {})[number] = storage.nbytes()
        # The tensor itself would hold the graph that holds it. This is no event of the model's.
        with torch._C.DisableTorchFunction(), torch.no_grad():
            return tensor.detach()


def _same(tensor: Tensor) -> Tensor:
    return tensor
