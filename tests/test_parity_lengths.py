"""Training over many lengths: predicted recordings change nothing, and what breaks a prediction is refused."""

from __future__ import annotations

import functools
import random
from pipes import Stack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import GPT, Run, piped, unsplit

from raypipe import CutError
from raypipe.model.predict_recording import Predictor

LENGTHS = 30
sgd = functools.partial(torch.optim.SGD, lr=0.1)


def model() -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = GPT(vocabulary=61, width=16, layers=2, heads=2, length=48, dropout=0.0, tied=False)
    return made


def batches() -> list[dict[str, Tensor]]:
    """Another length in each; every fifth batch is cut into ragged microbatches."""
    lengths = list(range(9, 9 + LENGTHS))
    random.Random(0).shuffle(lengths)
    noise = torch.Generator().manual_seed(1)
    made = []
    for number, length in enumerate(lengths):
        samples = 5 if number % 5 == 4 else 6
        tokens, targets = torch.randint(0, 61, (2, samples, length), generator=noise)
        made.append({"tokens": tokens, "targets": targets})
    return made


def assert_same_bits(one: Run, other: Run) -> None:
    assert one.losses == other.losses
    assert one.norms == other.norms
    assert all(torch.equal(tensor, other.state[name]) for name, tensor in one.state.items())


def test_predicted_or_recorded_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"optimizer": sgd, "microbatches": 3}
    told: list[bool] = []
    predict = Predictor.predict

    def counted(self: Predictor, *about: Any) -> Any:
        found = predict(self, *about)
        told.append(found is not None)
        return found

    monkeypatch.setattr(Predictor, "predict", counted)
    one, three = piped(model(), batches(), 1, **options), piped(model(), batches(), 3, **options)
    assert sum(told) > len(told) // 3
    monkeypatch.setattr(Predictor, "predict", lambda *_: None)
    recorded = piped(model(), batches(), 3, **options)
    assert_same_bits(three, recorded)
    assert_same_bits(one, recorded)
    wanted = unsplit(model(), batches(), sgd)
    assert recorded.losses == pytest.approx(wanted.losses, rel=1e-6)


class Capricious(nn.Module):
    """Its result has a row too many for one length."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        made = self.inner(x)
        return torch.cat([made, made[:1]]) if len(x) == 13 else made


class Returner(nn.Module):
    """Returns its argument for one length, and a tensor of its own for others."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x if len(x) == 13 else self.inner(x)


@pytest.mark.parametrize(
    ("unit", "message"),
    [
        (Capricious, r"blocks.0 .*made a torch.float32 tensor \(14, 8\), not a torch.float32 tensor \(13, 8\)"),
        (Returner, r"blocks.0 .*returned one of its arguments"),
    ],
)
@pytest.mark.parametrize("stages", [1, 3])
def test_a_length_that_breaks_the_rule_is_refused(unit: Any, message: str, stages: int) -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        kept = model.blocks[0](x)[: len(x)]
        for block in model.blocks[1:]:
            kept = block(kept)[: len(x)]
        return kept

    given = [{name: torch.ones(length, 8) for name in ("x", "y")} for length in (9, 20, 16, 12, 13)]
    options = {"optimizer": sgd, "microbatches": 1, "microbatch_weight": "samples"}
    piped(Stack(run, unit), given[:-1], stages, **options)
    with pytest.raises(CutError, match=message):
        piped(Stack(run, unit), given, stages, **options)
    if unit is Capricious:
        piped(Stack(run, unit), given[-1:], stages, **options)  # recorded, it is a length like others
