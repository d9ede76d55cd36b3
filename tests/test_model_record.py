"""What a recording says, and what it refuses: in one sentence, with both ends."""

from __future__ import annotations

from pipes import WIDTH, Pipe, Stack, batch, recorded
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from raypipe.errors import CutError
from raypipe.model.event import New, Same


def chain(model: Any, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = torch.tanh(block(x))
    return x


def test_events_values_and_who_uses_them() -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        first = model.blocks[0](x)
        for block in model.blocks[1:]:
            x = block(first) + x
        x += first
        return x

    recording = recorded(Stack(run), batch())
    names = [event.name for event in recording.events]
    assert names == ["blocks.0", "blocks.1", "add", "blocks.2", "add", "blocks.3", "add", "add_", "mse_loss"]
    iadd = recording.events[-2]
    assert isinstance(recording.events[0].leaves[0], New)
    assert isinstance(iadd.leaves[0], Same)
    (mutation,) = iadd.mutations
    assert recording.values[mutation.value].thing == iadd.uses[0]
    assert recording.returned == (len(recording.values) - 1,)
    assert recording.events[0].flops == 2 * 4 * WIDTH * WIDTH
    assert all(event.where.startswith("test_model_record.py:") for event in recording.events[:-1])


def test_random_functions_are_known() -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        return F.dropout(F.dropout(chain(model, x), 0.1), 0.1, training=False)

    random = [event.name for event in recorded(Stack(run), batch()).events if event.random]
    assert random == ["dropout"]


def asks_item(model: Any, x: Tensor) -> Tensor:
    x = model.blocks[0](x)
    return chain(model, x * 2 if x.mean().item() > 0 else x)


def asks_bool(model: Any, x: Tensor) -> Tensor:
    x = model.blocks[0](x)
    return model.blocks[1](x) if x.sum() > 0 else chain(model, x)  # type: ignore[no-any-return]


def asks_list(model: Any, x: Tensor) -> Tensor:
    return chain(model, x + sum(model.blocks[0].bias.tolist()))


def asks_shape(model: Any, x: Tensor) -> Tensor:
    h = model.blocks[0](x)
    return chain(model, x + h[h > 0].sum())


def writes_a_view(model: Any, x: Tensor) -> Tensor:
    seen = torch.zeros(4, 4, WIDTH)
    for number, block in enumerate(model.blocks):
        x = block(x)
        seen[:, number].copy_(x)
    return seen.sum(1)


def reads_a_stale_view(model: Any, x: Tensor) -> Tensor:
    seen = torch.zeros(4, 4, WIDTH)
    first = seen[:, 0]
    for number, block in enumerate(model.blocks):
        x = block(x)
        seen[:, number] = x
    return seen.sum(1) + first


def clamps_a_parameter(model: Any, x: Tensor) -> Tensor:
    model.blocks[0].bias.data.clamp_(-1, 1)
    return chain(model, x)


def keeps_statistics(model: Any, x: Tensor) -> Tensor:
    x = chain(model, x)
    model.mean.mul_(0.9).add_(x.detach().mean(0))
    return x


def changes_a_units_buffer(model: Any, x: Tensor) -> Tensor:
    model.blocks[0].factor[:2].mul_(2.0)
    return chain(model, x)


def hooks_a_gradient(model: Any, x: Tensor) -> Tensor:
    x = chain(model, x)
    x.register_hook(lambda gradient: gradient * 2)
    return x


def takes_a_gradient(model: Any, x: Tensor) -> Tensor:
    h = chain(model, x)
    (gradient,) = torch.autograd.grad(h.sum(), model.blocks[0].weight, create_graph=True)
    return h + gradient.square().sum()


def draws_in_a_checkpoint(model: Any, x: Tensor) -> Tensor:
    return checkpoint(lambda x: F.dropout(chain(model, x)), x, use_reentrant=False)  # type: ignore[no-any-return]


class Block(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.register_buffer("factor", torch.ones(WIDTH))


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        (asks_item, r"py:\d+ asks a torch.float32 tensor \(\) made by mean \(.*\) for its data \(item\)"),
        (asks_bool, r"made by (gt|__gt__) \(.*\) for its data \(__bool__\)"),
        (asks_list, r"py:\d+ asks a torch.float32 tensor \(\) made by unbind .* for its data"),
        (asks_shape, r"for its data \(__getitem__\)"),
        (writes_a_view, r"copy_ at .*py:\d+ writes a value into a view"),
        (reads_a_stale_view, r"reads one whose memory a value was written into through another"),
        (clamps_a_parameter, r"clamp_ at .*py:\d+ changes a parameter or a buffer in place outside of its unit"),
        (keeps_statistics, r"changes the buffer mean outside of every unit"),
        (changes_a_units_buffer, r"mul_ at .*py:\d+ changes a parameter or a buffer in place outside of its unit"),
        (hooks_a_gradient, r"calls register_hook on a torch.float32 tensor \(4, 8\) made by tanh"),
        (takes_a_gradient, r"calls grad on"),
        (draws_in_a_checkpoint, r"dropout at .*py:\d+ draws random numbers inside torch.utils.checkpoint"),
    ],
)
def test_what_no_split_reproduces_is_refused(run: Any, sentence: str) -> None:
    def setup(model: Any) -> None:
        model.register_buffer("mean", torch.zeros(WIDTH))

    with pytest.raises(CutError, match=sentence):
        recorded(Stack(run, Block, setup), batch())


def test_a_mistake_of_the_user_stays_the_users() -> None:
    def in_a_unit(model: Any, x: Tensor) -> Tensor:
        return chain(model, torch.cat([x, x], 1))

    def between_units(model: Any, x: Tensor) -> Tensor:
        return chain(model, model.blocks[0](x) @ torch.ones(3, 3))

    for run in (in_a_unit, between_units):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            recorded(Stack(run), batch())


def test_a_cut_may_not_part_one_checkpointed_call_or_shared_memory() -> None:
    def checkpointed(model: Any, x: Tensor) -> Tensor:
        return checkpoint(lambda x: chain(model, x), x, use_reentrant=False)  # type: ignore[no-any-return]

    def shared(model: Any, x: Tensor) -> Tensor:
        a = model.blocks[0](x)
        view = a.view(8, 4)
        x = chain(model, x)
        view.mul_(2.0)
        return x + a + view.view(4, 8)

    with pytest.raises(CutError, match=r"would part one call of torch.utils.checkpoint that began before"):
        Pipe(Stack(checkpointed), batch(), 2)
    with pytest.raises(CutError, match=r"made by blocks.0 .*made by view .*share memory that is changed in place"):
        Pipe(Stack(shared), batch(), 2)


def test_the_end_of_a_forward_may_ask_for_data() -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        x = chain(model, x)
        return x * 2 if x.sum().item() > 0 else x

    recording = recorded(Stack(run), batch())
    assert recording.stopped is not None
    assert "for its data (item)" in recording.stopped
    assert recording.calls[-1] < len(recording.events)
