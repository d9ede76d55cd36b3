"""Every cut of a model gives what the unsplit model gives."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pipes import SEEDS, WIDTH, Pipe, Stack, assert_equal_cuts, assert_exact, batch, unsplit
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from raypipe.errors import CutError
from raypipe.model.call import Caller

# Home-made models: what stands between the units is plain code of every kind.


def residual_outside(model: Any, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = x + torch.tanh(block(x))
    return x


def added_in_place(model: Any, x: Tensor) -> Tensor:
    for block in model.blocks:
        h = block(x)
        h += x
        x = h
    return x


def unet(model: Any, x: Tensor) -> Tensor:
    a = model.blocks[0](x).relu()
    b = model.blocks[1](a).relu_()
    c = model.blocks[2](b + a)
    return model.blocks[3](c + a) * b


def buffer_of_zeros(model: Any, x: Tensor) -> Tensor:
    seen = torch.zeros(len(x), 4, WIDTH)
    for number, block in enumerate(model.blocks):
        x = block(x)
        seen[:, number] = x
    return seen.square().sum(1)


def called_twice(model: Any, x: Tensor) -> Tensor:
    for block in (*model.blocks, *model.blocks):
        x = torch.tanh(block(x))
    return x


def weight_of_another(model: Any, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = torch.tanh(block(x))
    return x @ model.blocks[0].weight.T


def without_gradient(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = model.blocks[0](x)
    side = model.blocks[1](x)
    count = side.detach() * 2
    x = torch.tanh(model.blocks[2](side.detach()))
    count.add_(1)
    return model.blocks[3](x) * count + side


def checkpointed(model: Any, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = checkpoint(block, x, use_reentrant=False)
    return x


def sliced(model: Any, x: Tensor) -> Tensor:
    for block in model.blocks:
        half = block(x)[:, ::2]
        if not half.is_contiguous():
            half = half.contiguous()
        x = torch.cat([half, half], 1)
    return x


def asks_at_the_end(model: Any, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = torch.tanh(block(x))
    model.seen = x.mean().item()
    return x[x > 0].sum() + x if x.sum() > -1e9 else x


def in_parts_of_memory(model: Any, x: Tensor) -> Tensor:
    for block in model.blocks:
        one, other = block(x).chunk(2, -1)
        x = torch.stack([other, one.transpose(0, 1).contiguous().T], 1).flatten(1)
    return x


@pytest.mark.parametrize(
    "run",
    [
        residual_outside,
        added_in_place,
        unet,
        buffer_of_zeros,
        called_twice,
        weight_of_another,
        without_gradient,
        checkpointed,
        sliced,
        asks_at_the_end,
        in_parts_of_memory,
    ],
)
def test_code_between_units(run: Any) -> None:
    assert_exact(Stack(run), batch())


def chain(model: Any, x: Any) -> Any:
    for block in model.blocks:
        x = block(x)
    return x


class Messy(nn.Linear):
    """Takes and returns dicts with tuples, None, numbers and tensors without gradients."""

    def forward(self, given: Any, *, scale: float = 1.0, flag: Any = None) -> Any:  # type: ignore[override]
        h = super().forward(given["h"]) * scale
        return {"h": h, "rest": (h.detach().argmax(-1), None, [3, 2.5, True]), "mask": given["mask"]}


def test_boundaries_of_any_shape() -> None:
    def run(model: Any, x: Tensor) -> Any:
        given: Any = {"h": x, "mask": torch.ones(len(x), 1)}
        for block in model.blocks:
            given = block(given, scale=0.5, flag=[None])
            index, nothing, (_, number, is_true) = given["rest"]
            if is_true and nothing is None:
                given["h"] = given["h"] * number + index.unsqueeze(1)
        return given["h"] * given["mask"]

    assert_exact(Stack(run, lambda: Messy(WIDTH, WIDTH)), batch())


@dataclasses.dataclass
class Result:
    h: Tensor
    number: int = 3


pytree.register_dataclass(Result)  # type: ignore[no-untyped-call]


class Wrapping(nn.Linear):
    def forward(self, given: Any) -> Any:  # type: ignore[override]
        return Result(super().forward(given.h if isinstance(given, Result) else given))


class Holder:
    def __init__(self, h: Tensor) -> None:
        self.h = h


class Unwrapping(nn.Linear):
    def forward(self, holder: Any) -> Tensor:  # type: ignore[override]
        return torch.tanh(super().forward(holder.h))


def test_registered_results_and_arguments_of_any_class() -> None:
    assert_exact(Stack(lambda model, x: chain(model, x).h, lambda: Wrapping(WIDTH, WIDTH)), batch())

    def run(model: Any, x: Tensor) -> Tensor:
        for block in model.blocks:
            x = block(Holder(x))
        return x

    assert_exact(Stack(run, lambda: Unwrapping(WIDTH, WIDTH)), batch())


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.convolution(x.to(memory_format=torch.channels_last))
        return made


def channels_last(model: Any, x: Tensor) -> Tensor:
    h = x.view(4, 1, 2, 4).expand(4, 4, 2, 4)
    for block in model.blocks:
        h = torch.relu(block(h))
        assert h.is_contiguous(memory_format=torch.channels_last)
    return h.mean(1).reshape(4, WIDTH)


def lstm_first(model: Any, x: Tensor) -> Tensor:
    return chain(model, torch.tanh(model.lstm(x.unsqueeze(1))[0][:, 0]))  # type: ignore[no-any-return]


def attention_within(model: Any, x: Tensor) -> Tensor:
    x = torch.tanh(model.blocks[0](x))[None]
    hidden, weights = model.attention(x, x, x, key_padding_mask=torch.tensor([[False, False, False, True]]))
    return chain(model, hidden[0]) + weights.sum()  # type: ignore[no-any-return]


def root_parameters(model: Any, x: Tensor) -> Tensor:
    x = x + model.position
    for block in model.blocks:
        x = torch.tanh(block(x)) + model.cls_token
    return x


def with_root_parameters(model: Any) -> None:
    model.cls_token, model.position = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(4, WIDTH))


def with_frozen(model: Any) -> None:
    model.blocks[0].requires_grad_(False)
    model.blocks[2].requires_grad_(False)


def with_lstm(model: Any) -> None:
    model.lstm = nn.LSTM(WIDTH, WIDTH, 2, batch_first=True)


def with_attention(model: Any) -> None:
    model.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)


@pytest.mark.parametrize(
    ("run", "options"),
    [
        (chain, {"make": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH))}),
        (chain, {"make": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))}),
        (chain, {"setup": with_frozen}),
        (channels_last, {"make": Convolution}),
        (lstm_first, {"setup": with_lstm}),
        (attention_within, {"setup": with_attention}),
        (root_parameters, {"setup": with_root_parameters}),
    ],
)
def test_modules_of_many_kinds(run: Any, options: dict[str, Any]) -> None:
    assert_exact(Stack(run, **options), batch())


class Calling(nn.Linear):
    """Calls another unit, and reads another unit's weight."""

    other: list[Any]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(self.other[0](x)) + F.linear(x, self.other[1].weight))


def test_units_that_call_and_read_others() -> None:
    def setup(model: Any) -> None:
        for number in (0, 1):
            model.blocks[number] = nn.Linear(WIDTH, WIDTH)
        for block in model.blocks[2:]:
            block.other = [model.blocks[0], model.blocks[1]]

    def run(model: Any, x: Tensor) -> Tensor:
        for block in model.blocks[1:]:
            x = block(x)
        return x

    assert_exact(Stack(run, lambda: Calling(WIDTH, WIDTH), setup), batch(), chunks=(1, 2, 3))


def test_a_table_that_the_first_block_makes_for_all() -> None:
    tables: dict[str, Tensor] = {}

    class Rotating(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if "cos" not in tables:
                tables["cos"] = torch.arange(float(x.shape[1]), device=x.device).cos()
            return super().forward(x * tables["cos"])

    def run(model: Any, x: Tensor) -> Tensor:
        tables.clear()
        return chain(model, x)  # type: ignore[no-any-return]

    assert_exact(Stack(run, lambda: Rotating(WIDTH, WIDTH)), batch())


def test_values_in_objects_that_the_forward_returns() -> None:
    """An early value comes to the last stage, though PyTorch cannot look into the object."""

    class Model(Stack):
        def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
            first = self.blocks[0](x)
            return {"loss": F.mse_loss(chain(self, first), y), "held": [Holder(first)]}

    pipe = Pipe(Model(chain), batch(), 3)
    model = Model(chain)
    found = pipe.predict(batch())["held"][0].h
    torch.testing.assert_close(found, model.blocks[0](batch()["x"]).detach())


def test_units_that_fakes_cannot_follow() -> None:
    class Routed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(super().forward(x))
            chosen = (h[:, 0] > -2).nonzero()[:, 0]
            return h[chosen] * len(chosen)

    assert_exact(Stack(chain, lambda: Routed(WIDTH, WIDTH)), batch())


def test_transformer_encoder_in_train_and_eval() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 4)

        def forward(self, x: Tensor, padding: Tensor) -> Any:
            h = self.encoder(x, src_key_padding_mask=padding)
            return {"h": h, "loss": (h * ~padding[..., None]).square().mean()}

    given = {"x": torch.randn(2, 5, WIDTH), "padding": torch.arange(5) > torch.tensor([[5], [2]])}
    model = Model()
    assert_exact(model, given, chunks=(1, 3))
    got = Pipe(model, given, 2).predict(given)["h"]
    assert torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            assert torch.equal(got, model.eval()(**given)["h"])
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# Randomness.


class Dropping(nn.Module):
    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.linear, self.dropout, self.reentrant = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.4), reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.work(x)
        made: Tensor = checkpoint(self.work, x, use_reentrant=self.reentrant)
        return made

    def work(self, x: Tensor) -> Tensor:
        return F.dropout(self.dropout(torch.tanh(self.linear(x))), 0.2)


def random_between(model: Any, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = F.dropout(block(x), 0.3) * (torch.rand(x.shape) > 0.2)
        x = F.dropout(x, 0.1) + torch.randn_like(x)
    return x


@pytest.mark.parametrize("run", [chain, random_between, checkpointed])
def test_dropout_is_the_same_for_every_cut(run: Any) -> None:
    assert_equal_cuts(Stack(run, Dropping), batch())


def test_dropout_differs_between_units_microbatches_and_steps() -> None:
    seen: list[Tensor] = []

    def run(model: Any, x: Tensor) -> Tensor:
        for block in model.blocks:
            seen.append(F.dropout(torch.ones(64)))
            x = block(x)
            seen.append(F.dropout(torch.ones(64)))
        return x

    pipe = Pipe(Stack(run), batch(), 1)
    seen.clear()
    for seeds in (SEEDS, dataclasses.replace(SEEDS, step=9), dataclasses.replace(SEEDS, sample=9)):
        pipe.train(batch(), seeds)
    recorded_too = 8
    drawn = [mask for mask in seen if mask is not None][-24:]
    assert len(seen) == 24 + recorded_too
    # What is drawn after a unit and before the next one goes on in one stream.
    assert len({tuple(mask.tolist()) for mask in drawn}) == 24


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_inside_a_unit_replays_dropout(reentrant: bool) -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        return chain(model, x.requires_grad_())  # type: ignore[no-any-return]

    plain, again = Stack(run, Dropping), Stack(run, lambda: Dropping(reentrant))
    loss, gradients = Pipe(plain, batch(), 2).train(batch())
    own_loss, own = Pipe(again, batch(), 3).train(batch())
    assert torch.equal(own_loss, loss)
    assert all(torch.equal(own[name], gradients[name]) for name in gradients)


def test_checkpoint_around_units_replays_dropout() -> None:
    def two_at_once(model: Any, x: Tensor) -> Tensor:
        x = checkpoint(lambda x: model.blocks[1](model.blocks[0](x)), x, use_reentrant=False)
        return model.blocks[3](model.blocks[2](x))  # type: ignore[no-any-return]

    loss, gradients = Pipe(Stack(chain, Dropping), batch(), 3).train(batch())
    for run, balance in ((two_at_once, [2, 2]), (checkpointed, [1, 3])):
        own_loss, own = Pipe(Stack(run, Dropping), batch(), 2, balance=balance).train(batch())
        assert torch.equal(own_loss, loss)
        assert all(torch.equal(own[name], gradients[name]) for name in gradients)


def test_the_callers_generator_is_left_alone() -> None:
    pipe = Pipe(Stack(chain, Dropping), batch(), 2)
    before = torch.get_rng_state()
    pipe.train(batch())
    Pipe(Stack(chain, Dropping), batch(), 1).train(batch())
    torch.manual_seed(0)
    assert pipe is not None
    torch.set_rng_state(before)
    pipe.train(batch())
    assert torch.equal(torch.get_rng_state(), before)


# A model that goes another way when it runs.


def steered(model: Any, given: dict[str, Tensor]) -> Tensor:
    x, steps, high = given["x"], [given["x"]], bool(given["y"].sum() > 1000)
    for number, block in enumerate(model.blocks):
        if high and model.way == "skips a unit" and number == 2:
            continue
        source = steps[1] if high and model.way == "takes another value" and number == 3 else x
        x = torch.tanh(block(source))
        x = x * 2 if high and model.way == "calls another function" else x + 2
        steps.append(x)
    if high and model.way == "stops early":
        return steps[1].sum()
    return x.sum() * 0 if high else F.mse_loss(x, given["y"])


@pytest.mark.parametrize("way", ["skips a unit", "takes another value", "calls another function", "stops early"])
def test_another_way_is_an_error_and_no_wrong_number(way: str) -> None:
    model = Stack(lambda model, x: x)
    model.way = way  # type: ignore[assignment]
    pipe = Pipe(model, batch(), 4, caller=Caller(steered))
    pipe.train(batch())
    with pytest.raises(CutError, match=r"another way"):
        pipe.train({**batch(), "y": batch()["y"] + 1e4})


def test_the_end_of_the_forward_may_take_another_way() -> None:
    model = Stack(lambda model, x: x)
    model.way = "changes only the loss"  # type: ignore[assignment]
    pipe = Pipe(model, batch(), 4, caller=Caller(steered))
    pipe.train(batch())
    assert pipe.train({**batch(), "y": batch()["y"] + 1e4})[0] == 0


def test_a_mask_may_come_and_go() -> None:
    class Masked(nn.Linear):
        def forward(self, x: Tensor, mask: Tensor | None = None, bias: Any = None) -> Tensor:  # type: ignore[override]
            h = super().forward(x)
            return h if mask is None else h * mask + bias

    def forward(model: Any, given: dict[str, Tensor]) -> Tensor:
        mask = None if bool((given["y"] < 90).all()) else given["y"] < 90
        x = given["x"]
        for block in model.blocks:
            x = block(x, mask, bias=x)
        return F.mse_loss(x, given["y"])

    model, caller = Stack(chain, lambda: Masked(WIDTH, WIDTH)), Caller(forward)
    pipe = Pipe(model, batch(), 3, caller=caller)
    pipe.train(batch())
    masked = batch()
    masked["y"][0, 0] = 100
    for given in (masked, batch()):
        loss, gradients = unsplit(model, given, caller)
        own_loss, own = pipe.train(given)
        torch.testing.assert_close(own_loss, loss)
        torch.testing.assert_close(own, gradients)


def test_data_asked_for_before_the_last_call_of_a_unit_is_refused_when_it_runs() -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        x = chain(model, x)
        return chain(model, x * 2) if x.sum().item() > -1e9 else x  # type: ignore[no-any-return]

    pipe = Pipe(Stack(run), batch(), 2)
    with pytest.raises(CutError, match=r"asks a torch.float32 tensor \(\) made by sum .* for its data \(item\)"):
        pipe.train(batch())


def test_nothing_of_a_run_is_kept_alive() -> None:
    hidden: list[weakref.ref[Tensor]] = []

    def run(model: Any, x: Tensor) -> Tensor:
        for block in model.blocks:
            x = torch.tanh(block(x))
            hidden.append(weakref.ref(x))
        model.last = x.detach()  # the user's own cache, which carries this run's mark
        return x

    pipe = Pipe(Stack(run), batch(), 2)
    pipe.train(batch())
    gc.collect()
    hidden.clear()
    gc.disable()
    try:
        pipe.train(batch())
        placeholders = [t for piece in pipe.slices for p in piece._planned.values() for t in p.recording.placeholders]
        alive = [tensor for ref in hidden if (tensor := ref()) is not None]
        assert all(any(tensor is kept for kept in placeholders) for tensor in alive)
        assert len(alive) < len(hidden)
    finally:
        gc.enable()
