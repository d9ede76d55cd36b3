from __future__ import annotations

import itertools
from pipes import WIDTH, Stack, batch, recorded
from typing import Any

import pytest
import torch
from torch import Tensor

from raypipe.errors import CutError
from raypipe.model.recording import Recording


def skipping(model: Any, x: Tensor) -> Tensor:
    first = model.blocks[0](x)
    second = model.blocks[1](first)
    third = model.blocks[2](second)
    return model.blocks[3](third) + first  # type: ignore[no-any-return]


def made_by(recording: Recording, cut: int) -> list[str]:
    (window,) = recording.windows((cut,))[1:]
    return [recording.events[value.event].name for value in window.inputs]


def test_the_boundary_is_what_is_made_before_and_used_after() -> None:
    recording = recorded(Stack(skipping), batch())
    assert made_by(recording, 1) == ["blocks.0"]
    assert made_by(recording, 2) == ["blocks.0", "blocks.1"]
    assert made_by(recording, 3) == ["blocks.0", "blocks.2"]


def test_windows_cover_all_events_and_fit_together() -> None:
    recording = recorded(Stack(skipping), batch())
    windows = recording.windows((1, 2, 3))
    assert [(w.start, w.end) for w in windows] == [(0, 1), (1, 2), (2, 3), (3, len(recording.events))]
    assert all(one.outputs == two.inputs for one, two in itertools.pairwise(windows))
    assert (windows[0].inputs, windows[-1].outputs) == ((), ())
    assert recording.windows((1, 2, 3)) is windows


def test_a_returned_value_is_used_at_the_end() -> None:
    class Returning(Stack):
        def forward(self, x: Tensor, y: Tensor) -> Any:
            first = self.blocks[0](x)
            return {"first": [first], "last": self.blocks[1](first)}

    recording = recorded(Returning(skipping), batch())
    assert recording.last_uses() == [2, 2]
    assert len(recording.returned) == 2


def test_values_in_words() -> None:
    recording = recorded(Stack(skipping), batch())
    text = recording.describe(0)
    assert text.startswith(f"a torch.float32 tensor (4, {WIDTH}) made by blocks.0 (test_model_recording.py:")


def test_memory_shared_across_a_cut_is_refused_only_where_it_is_changed_afterwards() -> None:
    def viewing(change: bool) -> Any:
        def run(model: Any, x: Tensor) -> Tensor:
            h = model.blocks[0](x)
            view = h.view(-1)
            x = model.blocks[1](h)
            if change:
                view.mul_(torch.ones(1))
            return x + h + view.view_as(h)

        return run

    recorded(Stack(viewing(False)), batch()).windows((1,))
    with pytest.raises(CutError, match=r"a cut before blocks.1 would part .* share memory"):
        recorded(Stack(viewing(True)), batch()).windows((1,))
