from __future__ import annotations

from pipes import Pipe, Stack, batch, unsplit
from typing import Any

import pytest
import torch
from torch import Tensor

from raypipe.model.microbatch import Microbatch, find_layout
from raypipe.model.weights import LossRule, Rule
from raypipe.stage.compute import ForwardComputer, TrainComputer
from raypipe.stage.losses import Losses
from raypipe.stage.program import Message


def chain(model: Any, x: Tensor) -> Tensor:
    side = x.argmax(-1, keepdim=True)
    for block in model.blocks:
        x = torch.tanh(block(x))
    return x + side


def stages(count: int) -> tuple[Pipe, list[Microbatch]]:
    given = batch()
    microbatches = find_layout(given).split(given, 2)
    return Pipe(Stack(chain), microbatches[0].batch, count), microbatches


def test_forwards_and_backwards_of_two_microbatches() -> None:
    pipe, microbatches = stages(2)
    losses = Losses(LossRule(Rule.SAMPLES), pipe.caller, microbatches)
    one, two = (TrainComputer(piece, microbatches, 0, 0, 0, losses) for piece in pipe.slices)
    for microbatch in (0, 1):
        message = one.forward(0, microbatch, [])
        assert [(tuple(t.shape), t.dtype) for t in message] == [
            (s.shape, s.dtype) for s in two.specs(Message(0, microbatch, False))
        ]
        assert two.forward(1, microbatch, [t.clone() for t in message]) == []
    assert (one.in_flight, two.in_flight) == (2, 2)
    for microbatch in (0, 1):
        message = two.backward(1, microbatch, [])
        assert len(message) == len(one.specs(Message(1, microbatch, True))) == 2  # with the flags
        assert one.backward(0, microbatch, message) == []
    assert (one.in_flight, two.in_flight) == (0, 0)
    loss, gradients = unsplit(Stack(chain), batch())
    assert losses.loss() == pytest.approx(loss.item(), rel=1e-6)
    for piece in pipe.slices:
        for name, parameter in piece.parameters.items():
            torch.testing.assert_close(parameter.grad, gradients[name])
    with pytest.raises(KeyError):
        one.backward(0, 0, message)


def test_a_microbatch_that_weighs_nothing_sends_zeros_back() -> None:
    pipe, microbatches = stages(2)
    weights = iter([0.0, 2.0])
    losses = Losses(LossRule(lambda given: next(weights, 1.0)), pipe.caller, microbatches)
    losses.divisor = 1.0
    two = TrainComputer(pipe.slices[1], microbatches, 0, 0, 0, losses)
    received = [torch.randn(s.shape) for s in two.specs(Message(0, 0, False))]
    weights = iter([0.0])
    two.forward(1, 0, received)
    gradient, there = two.backward(1, 0, [])
    assert not gradient.any()
    assert there.tolist() == [True]
    assert all(p.grad is not None and not p.grad.any() for p in pipe.slices[1].parameters.values())


def test_a_loss_that_reaches_nothing_before_it_sends_no_gradient_back() -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        for block in model.blocks[:3]:
            x = block(x)
        return model.blocks[3](x.detach())  # type: ignore[no-any-return]

    given = batch()
    microbatches = find_layout(given).split(given, 1)
    pipe = Pipe(Stack(run), given, 2)
    losses = Losses(LossRule(Rule.SAMPLES), pipe.caller, microbatches)
    one, two = (TrainComputer(piece, microbatches, 0, 0, 0, losses) for piece in pipe.slices)
    two.forward(1, 0, one.forward(0, 0, []))
    sent = two.backward(1, 0, [])
    assert sent[-1].tolist() == [False]
    one.backward(0, 0, sent)
    held = [p.grad is None for piece in pipe.slices for name, p in piece.parameters.items() if "blocks.3" not in name]
    assert held == [True] * 6


def test_prediction_keeps_the_last_stages_outputs_and_no_graph() -> None:
    pipe, microbatches = stages(2)
    for piece in pipe.slices:
        piece.set_training(False)
    one, two = (ForwardComputer(piece, microbatches, 0, 0, None) for piece in pipe.slices)
    assert torch.is_grad_enabled()
    for microbatch in (0, 1):
        message = one.forward(0, microbatch, [])
        assert not any(t.requires_grad for t in message)
        two.forward(1, microbatch, [t.clone() for t in message])
    with torch.no_grad():
        model = Stack(chain)
        for number, microbatch in enumerate(microbatches):
            torch.testing.assert_close(two.outputs[number], model(**microbatch.batch))
    assert one.outputs == {}
