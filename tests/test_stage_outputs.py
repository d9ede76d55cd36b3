"""Which dimension of an output is the batch, found once for outputs of a kind."""

from __future__ import annotations

from typing import Any

import torch

from raypipe.model.microbatch import find_layout
from raypipe.stage.outputs import Outputs


class Shaped:
    """A slice that knows the shapes for one sample more."""

    def __init__(self, shapes: list[tuple[int, ...] | None]) -> None:
        self.shapes, self.asked = shapes, 0

    def output_shapes(self, batch: Any) -> list[tuple[int, ...] | None]:
        assert len(batch["x"]) == 3
        self.asked += 1
        return self.shapes


def test_the_dimension_that_grows_is_found_once() -> None:
    piece = Shaped([(2, 3), None])
    outputs = Outputs(piece)  # type: ignore[arg-type]
    batch = {"x": torch.zeros(4, 5)}
    layout = find_layout(batch)
    pieces = layout.split(batch, 2)
    made = [(torch.full((2, 2), float(number)), "text") for number in range(2)]
    for _ in range(2):
        joined, text = outputs.join(batch, layout, pieces, made)
        assert torch.equal(joined, torch.cat([made[0][0], made[1][0]], 1))
        assert text == "text"
    assert piece.asked == 1
    assert outputs.join(batch, layout, pieces[:1], made[:1]) is made[0]


def test_where_fakes_cannot_follow_sizes_decide() -> None:
    batch = {"x": torch.zeros(4, 5)}
    layout = find_layout(batch)
    made = [torch.full((2, 7), float(number)) for number in range(2)]
    joined = Outputs(Shaped([])).join(batch, layout, layout.split(batch, 2), made)  # type: ignore[arg-type]
    assert torch.equal(joined, torch.cat(made))
