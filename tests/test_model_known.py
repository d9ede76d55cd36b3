"""What a unit may ask of the whole numbers that the batch gives it."""

from __future__ import annotations

from pipes import WIDTH, Stack, assert_exact, recorded
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Asking(nn.Linear):
    """Takes as many columns as the longest of its lengths says, which it changes on its way."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        own = lengths.clone()
        own.add_(1).clamp_(max=WIDTH)
        columns = (torch.arange(WIDTH) < own[:, None]).any(0).nonzero()[:, 0]
        count = int(own.max())
        assert len(columns) == count
        h: Tensor = super().forward(x)
        return F.pad(h[:, columns], (0, WIDTH - count)) + x


class Asked(Stack):
    def forward(self, x: Tensor, y: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        for block in self.blocks:
            x = torch.tanh(block(x, lengths))
        return F.mse_loss(x, y)


def batch() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"x": torch.randn(4, WIDTH), "y": torch.randn(4, WIDTH), "lengths": torch.tensor([2, 5, 1, 3])}


def make() -> Asked:
    return Asked(lambda model, x: x, lambda: Asking(WIDTH, WIDTH))


def test_lengths_are_answered_as_the_batch_has_them() -> None:
    given = batch()
    assert_exact(make(), given)
    assert given["lengths"].tolist() == [2, 5, 1, 3]


def test_a_value_is_not_known() -> None:
    """The recording answers with stand-ins where a unit asks what depends on another unit."""

    class Rounding(Asking):
        def forward(self, x: Tensor, lengths: Any) -> Tensor:  # type: ignore[override]
            found.append(int(x.detach().round().long().sum()))
            known.append(int(lengths.sum()))
            return nn.Linear.forward(self, x)

    found: list[int] = []
    known: list[int] = []
    recorded(Asked(lambda model, x: x, lambda: Rounding(WIDTH, WIDTH)), batch())
    assert found[1:] == [0, 0, 0]
    assert known == [11] * 4


@pytest.mark.parametrize("grad", [True, False])
def test_recurrent_layers_over_packed_sequences_keep_their_gradients(grad: bool) -> None:
    class Packing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(1, 1, batch_first=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x[..., None], lengths, batch_first=True, enforce_sorted=False)
            out = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=WIDTH)[0]
            return out[..., 0]

    with torch.set_grad_enabled(grad):
        recording = recorded(Asked(lambda model, x: x, Packing), batch())
    made = [recording.values[event.leaves[0].value] for event in recording.events if event.call is not None]  # type: ignore[union-attr]
    assert [(value.spec.shape, value.requires_grad) for value in made] == [((4, WIDTH), grad)] * 4


@pytest.mark.parametrize("own", [False, True])
def test_writing_elsewhere_leaves_what_is_known(own: bool) -> None:
    """Longformer writes rows at known indices, and asks afterwards how many they were."""

    class Writing(Asking):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            mine = lengths.clone()
            h = x.clone()
            h[:, mine] = 0.0
            if own:
                mine[0] = h.detach()[0, 0].long()
            found.append(int(mine.sum()))
            return nn.Linear.forward(self, h)

    found: list[int] = []
    recorded(Asked(lambda model, x: x, lambda: Writing(WIDTH, WIDTH)), batch())
    assert found == ([0] * 4 if own else [11] * 4)
