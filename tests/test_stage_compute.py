from __future__ import annotations

from collections.abc import Sequence
from pipes import Pipe, Stack, batch, unsplit
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn

from raypipe.model.microbatch import Microbatch, find_layout
from raypipe.model.split_backward import splittable
from raypipe.model.weights import LossRule, Rule
from raypipe.stage.compute import ForwardComputer, TrainComputer
from raypipe.stage.losses import Losses
from raypipe.stage.program import Message

Gradients = list[dict[str, Tensor | None]]


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


def in_halves(pipe: Pipe, microbatches: list[Microbatch], rule: LossRule, halves: bool) -> tuple[float, Gradients]:
    """A step of all stages, all weight halves at its end; and every parameter's gradient."""
    losses = Losses(rule, pipe.caller, microbatches)
    chunks, numbers = range(len(pipe.slices)), range(len(microbatches))
    split = [(chunk, number) for chunk in chunks for number in numbers] if halves else []
    computers = [TrainComputer(piece, microbatches, 0, 0, 0, losses, split) for piece in pipe.slices]
    for number in numbers:
        message: Sequence[Tensor] = []
        for chunk, computer in enumerate(computers):
            message = [t.clone() for t in computer.forward(chunk, number, message)]
    for number in numbers:
        message = []
        for chunk, computer in reversed(list(enumerate(computers))):
            back = computer.input_gradient if halves else computer.backward
            message = [t.clone() for t in back(chunk, number, message)]
    if halves:
        assert [computer.in_flight for computer in computers] == [len(microbatches)] * len(computers)
        for number in numbers:
            for chunk, computer in enumerate(computers):
                computer.weight_gradient(chunk, number)
    assert [computer.in_flight for computer in computers] == [0] * len(computers)
    found = [{name: p.grad for name, p in piece.parameters.items()} for piece in pipe.slices]
    for piece in pipe.slices:
        for parameter in piece.parameters.values():
            parameter.grad = None
    return losses.loss(), found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bert_masked", "albert"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_halves_of_a_replayed_model_give_the_bits_of_whole_backwards(name: str, checkpointing: bool) -> None:
    if checkpointing and name == "albert":
        pytest.skip("ALBERT has no checkpointing of its own")
    model = FAMILIES[name].build(dropout=0.1)
    if checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    given = FAMILIES[name].batch(4)
    microbatches = find_layout(given).split(given, 2)
    pipe = Pipe(model, microbatches[0].batch, 3)
    rule = LossRule(Rule.TARGETS)
    (loss, wanted), (own_loss, found) = (in_halves(pipe, microbatches, rule, halves) for halves in (False, True))
    assert own_loss == loss
    for theirs, own in zip(wanted, found, strict=True):
        assert any(gradient is not None for gradient in theirs.values())
        assert_same_bits(own, theirs)


def test_a_microbatch_that_weighs_nothing_gives_zeros_to_weights_that_wait() -> None:
    """As its whole backward does: AdamW moves what has a gradient of zeros, and not what has none."""
    pipe, microbatches = stages(2)
    for halves in (False, True):
        losses = Losses(LossRule(lambda given: 0.0), pipe.caller, microbatches)
        losses.divisor = 1.0
        two = TrainComputer(pipe.slices[1], microbatches, 0, 0, 0, losses, [(1, 0)] if halves else [])
        two.forward(1, 0, [torch.randn(s.shape) for s in two.specs(Message(0, 0, False))])
        gradient, there = (two.input_gradient if halves else two.backward)(1, 0, [])
        assert not gradient.any()
        assert there.tolist() == [True]
        if halves:
            two.weight_gradient(1, 0)
        for parameter in pipe.slices[1].parameters.values():
            assert parameter.grad is not None
            assert not parameter.grad.any()
            parameter.grad = None


def assert_same_bits(found: dict[str, Tensor | None], wanted: dict[str, Tensor | None]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        own = found[name]
        assert (own is None) == (gradient is None), name
        assert own is None or gradient is None or torch.equal(own, gradient), name


def test_an_emulated_accelerator_sleeps_once_in_each_half() -> None:
    """What a benchmark's layer does: its function runs where its schedule says, and never for a gradient in vain."""
    slept: list[str] = []

    def sleep(letter: str, result: Tensor) -> Tensor:
        slept.append(letter)
        return result

    class Emulated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8) / 3)
            self.compute = splittable(
                lambda x, w: sleep("F", x @ w),
                lambda g, x, w: sleep("I", g @ w.T),
                lambda g, x, w: sleep("W", x.T @ g),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.compute(x, self.weight)  # type: ignore[no-any-return]

    given = batch()
    microbatches = find_layout(given).split(given, 2)
    pipe = Pipe(Stack(chain, Emulated), microbatches[0].batch, 2)
    in_halves(pipe, microbatches, LossRule(Rule.SAMPLES), False)  # the first records, which runs functions on fakes
    slept.clear()
    _, wanted = in_halves(pipe, microbatches, LossRule(Rule.SAMPLES), False)
    first = "".join(slept)
    slept.clear()
    _, found = in_halves(pipe, microbatches, LossRule(Rule.SAMPLES), True)
    # Four layers, two microbatches; the model's input needs no gradient, so its first layer has no input half.
    assert "".join(slept) == "FFFF" * 2 + "III" * 2 + "WWWW" * 2
    assert sorted(first) == sorted(slept)
    for theirs, own in zip(wanted, found, strict=True):
        assert_same_bits(own, theirs)
