"""The outputs of a batch from those of its microbatches, as the last stage has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raypipe.model.join import join_outputs, shapes_of
from raypipe.model.microbatch import BatchLayout, Microbatch
from raypipe.stage.slice import Slice

__all__ = ["Outputs"]

Shapes = list[tuple[int, ...] | None]


class Outputs:
    """Joins outputs.

    Which dimension of an output counts the samples cannot be told from sizes alone (a [8, 8] output of 8 samples). So
    the model is recorded once with one sample more, and what grew is the batch.

    Args:
        piece: of the stage.
    """

    def __init__(self, piece: Slice) -> None:
        self._slice = piece
        self._known: dict[tuple[int | None, ...], list[frozenset[int] | None]] = {}

    def join(self, batch: Any, layout: BatchLayout, microbatches: Sequence[Microbatch], outputs: Sequence[Any]) -> Any:
        """The outputs of the batch; see ``model.join.join_outputs``, also for what it raises."""
        samples = [microbatch.samples for microbatch in microbatches]
        if len(outputs) == 1:
            return outputs[0]
        shapes = shapes_of(outputs[0])
        kind = tuple(None if shape is None else len(shape) for shape in shapes)
        if kind not in self._known:
            self._known[kind] = self._grown(shapes, batch, layout, samples[0])
        return join_outputs(outputs, samples, self._known[kind])

    def _grown(self, shapes: Shapes, batch: Any, layout: BatchLayout, samples: int) -> list[frozenset[int] | None]:
        """The dimensions of each output that grow with the samples; None where that is not known."""
        more = self._slice.output_shapes(layout.select(batch, [*range(samples), 0]))
        if len(more) != len(shapes):
            return [None] * len(shapes)
        return [_changed(shape, other) for shape, other in zip(shapes, more, strict=True)]


def _changed(shape: tuple[int, ...] | None, other: tuple[int, ...] | None) -> frozenset[int] | None:
    if shape is None or other is None or len(shape) != len(other):
        return None
    return frozenset(dim for dim, (size, grown) in enumerate(zip(shape, other, strict=True)) if size != grown)
