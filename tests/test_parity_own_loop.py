"""The user's own loop, the user's own call of the model, and predictions of any tree."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from home_made import WIDTH, Stack, chain
from parity import Case, assert_same_step, batch_step, cuts_of, split_step
from torch import Tensor, nn
from torch.nn import functional as F
from training import trainer_of

from raypipe import BatchError
from raypipe.driver.cluster import Session

sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Judge(nn.Module):
    """An encoder for two inputs and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.drop = nn.Dropout(0.3)
        self.head, self.side = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 1)

    def encode(self, x: Tensor) -> Tensor:
        for layer in self.encoder:
            x = x + layer(x).tanh()
        return x

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.encode(x)
        return {"logits": self.head(self.drop(h)), "side": self.side(h)[:, 0]}


def judge() -> nn.Module:
    torch.manual_seed(2)
    model = Judge()
    model.drop.p = 0.0
    return model


def judged(samples: int = 4, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    pair = {"one": torch.randn(samples, WIDTH), "two": torch.randn(samples, WIDTH)}
    return {**pair, "label": torch.randint(0, 3, (samples,)), "score": torch.randn(samples)}


def cross_entropy(outputs: Any, batch: Any) -> Tensor:
    return F.cross_entropy(outputs["logits"], batch["label"])


# Ways to call a model.


def one_input(model: Any, batch: Any) -> Any:
    return model(batch["one"])


def with_an_auxiliary_loss(model: Any, batch: Any) -> Any:
    out = model(batch["one"] + batch["two"])
    return {"loss": F.cross_entropy(out["logits"], batch["label"]) + 0.3 * F.mse_loss(out["side"], batch["score"])}


def submodules_called_twice(model: Any, batch: Any) -> Any:
    one, two = model.encode(batch["one"]), model.encode(batch["two"])
    return (1 - F.cosine_similarity(one, two)).mean() + F.l1_loss(model.side(one * two)[:, 0], batch["score"])


def the_whole_model_twice(model: Any, batch: Any) -> Any:
    one, two = model(batch["one"]), model(batch["two"])
    return F.margin_ranking_loss(one["side"], two["side"], batch["score"].sign(), margin=0.5)


class Wrapped:
    """A callable object, with numbers of its own."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, model: Any, batch: Any) -> Any:
        return model.head(model.encode(batch["one"])).square().mean() * self.factor


FORWARDS: dict[Any, dict[str, Any]] = {
    one_input: {"loss": cross_entropy},
    with_an_auxiliary_loss: {},
    submodules_called_twice: {},
    the_whole_model_twice: {},
    Wrapped(0.5): {},
}


@pytest.mark.parametrize("forward", FORWARDS)
def test_a_forward_of_the_users_own(forward: Any) -> None:
    case = Case(judge(), judged(), {"forward": forward, **FORWARDS[forward]})
    wanted = batch_step(case)
    for stages, schedule, microbatches in cuts_of(list(FORWARDS).index(forward)):
        assert_same_step(split_step(case, stages, schedule, microbatches), wanted)


def accuracy(outputs: Any, batch: Any) -> Tensor:
    return (outputs["logits"].argmax(-1) == batch["label"]).float().mean()


def test_a_loop_by_hand_with_evaluation_between() -> None:
    """Steps on ragged batches, evaluation and predictions between them, and the weights at the end."""
    train, valid = [judged(n, seed=n) for n in (4, 3, 6, 1)], [judged(5, seed=9), judged(2, seed=8)]
    whole = judge()
    optimizer = sgd(whole.parameters())
    options: dict[str, Any] = {"forward": one_input, "loss": cross_entropy, "metrics": {"accuracy": accuracy}}
    with trainer_of(judge(), 3, microbatches=2, optimizer=sgd, **options) as trainer:
        for batch in train:
            value = cross_entropy(one_input(whole, batch), batch)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert trainer.train_step(batch)["loss"] == pytest.approx(value.item(), rel=1e-5)
            found = trainer.evaluate(valid)
            with torch.no_grad():
                outputs = [one_input(whole, batch) for batch in valid]
                losses = [cross_entropy(o, b).item() * len(b["label"]) for o, b in zip(outputs, valid, strict=True)]
                hits = [accuracy(o, b).item() * len(b["label"]) for o, b in zip(outputs, valid, strict=True)]
            assert found["loss"] == pytest.approx(sum(losses) / 7, rel=1e-5)
            assert found["accuracy"] == pytest.approx(sum(hits) / 7)
            for output, wanted in zip(trainer.predict(valid), outputs, strict=True):
                torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
        fresh = Judge()
        fresh.load_state_dict(trainer.state_dict())
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


# Predictions of any tree.


@dataclasses.dataclass
class Seen:
    """Not known to PyTorch as a tree."""

    first: Tensor
    deep: dict[str, Any]


class Both(NamedTuple):
    h: Tensor
    seen: Any


SHARED = torch.arange(4.0)


def trees(model: Any, x: Tensor) -> Any:
    first = model.blocks[0](x)
    last = model.blocks[3](model.blocks[2](model.blocks[1](first)))
    deep = {"list": [last.sum(1), (None, 3, "word")], "shared": SHARED, "numbers": first.argmax(-1), "rows": x > 0}
    return Both(last, Seen(first, deep))


def batch_last(model: Any, x: Tensor) -> Any:
    first = model.blocks[0](x)
    h = chain(model, x)
    return {"turned": h.T, "middle": torch.stack([first, h], 1).transpose(0, 1), "square": h[:, :2]}


def without_samples(model: Any, x: Tensor) -> Any:
    h = chain(model, x)
    return h, {"bias": model.blocks[0].bias * 2, "scale": torch.ones(2, 2), "width": h.shape[1]}


def assert_same_tree(found: Any, wanted: Any) -> None:
    if dataclasses.is_dataclass(wanted):
        assert type(found) is type(wanted)
        found, wanted = vars(found), vars(wanted)
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        found, wanted = list(found.values()), list(wanted.values())
    if isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same_tree(one, other)
    elif isinstance(wanted, Tensor):
        assert type(found) is Tensor
        assert not found.requires_grad
        torch.testing.assert_close(found, wanted.detach())
    else:
        assert found == wanted


@pytest.mark.parametrize("run", [trees, batch_last, without_samples])
@pytest.mark.parametrize(("stages", "microbatches"), [(1, 2), (3, 4), (4, 1)])
def test_predictions_of_any_tree_in_order(run: Callable[..., Any], stages: int, microbatches: int) -> None:
    """Ragged batches; some have as many samples as an output has columns."""
    torch.manual_seed(0)
    model = Stack(run)
    batches = [{"x": torch.randn(n, WIDTH)} for n in (4, 7, WIDTH, 1, 2, 4)]
    whole = copy.deepcopy(model).eval()
    with trainer_of(model, stages, microbatches=microbatches) as trainer:
        found = list(trainer.predict(batches))
    assert len(found) == len(batches)
    for output, batch in zip(found, batches, strict=True):
        assert_same_tree(output, whole(**batch))


@pytest.mark.ray
@pytest.mark.slow
def test_predictions_over_ray(ray_session: Session) -> None:
    torch.manual_seed(0)
    model, batches = Stack(trees), [{"x": torch.randn(n, WIDTH)} for n in (4, 7)]
    with trainer_of(model, 3, microbatches=2, backend="ray") as trainer:
        found = list(trainer.predict(batches))
    for output, batch in zip(found, batches, strict=True):
        assert_same_tree(output, model(**batch))


@pytest.mark.parametrize(
    "run",
    [
        lambda model, x: chain(model, x) @ chain(model, x).T,
        lambda model, x: chain(model, x).mean(0),
        lambda model, x: chain(model, x).flatten(),
    ],
    ids=["samples-by-samples", "a-mean", "flat"],
)
def test_outputs_that_compare_samples_are_refused(run: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(2 * WIDTH, WIDTH)}
    with trainer_of(Stack(run), 2, microbatches=2, loss=lambda out, y: out.sum() * 0 + y.sum()) as trainer:
        trainer.train_step((batch["x"], batch["x"]))
        with pytest.raises(BatchError, match="cannot be joined"):
            list(trainer.predict([batch]))
        trainer.train_step((batch["x"], batch["x"]))  # and no rank is lost
    with trainer_of(Stack(run), 2, microbatches=1) as trainer:
        (found,) = trainer.predict([batch])
    assert found.shape == run(Stack(run), batch["x"]).shape


def test_a_loss_over_a_value_that_an_object_returns() -> None:
    """The first block's output comes to the last stage inside of a dataclass."""

    def forward(model: Any, batch: Any) -> Any:
        return trees(model, batch["x"])

    def loss(outputs: Both, batch: Any) -> Tensor:
        return F.mse_loss(outputs.h, batch["y"]) + outputs.seen.first.square().mean()

    torch.manual_seed(0)
    batch = {"x": torch.randn(4, WIDTH), "y": torch.randn(4, WIDTH)}
    case = Case(Stack(trees), batch, {"forward": forward, "loss": loss})
    assert_same_step(split_step(case, 4, "1f1b", 2), batch_step(case))
