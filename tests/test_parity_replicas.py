"""Replicas of a pipeline train the unsplit model: whatever the shares, the rule, the schedule, and who steps what."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn
from torch.nn import functional as F
from training import Run, batches_of_tokens, gpt, piped, relative, trainer_of, unsplit

from raypipe import PipelineTrainer
from raypipe.data.wire import unpack
from raypipe.driver.cluster import Session
from raypipe.driver.local import LocalGang
from raypipe.errors import BatchError, StageError

adamw = functools.partial(torch.optim.AdamW, lr=1e-3)
SHARDS = (None, "optimizer")


def assert_same_run(found: Run, wanted: Run, bound: float) -> None:
    assert found.losses == pytest.approx(wanted.losses, rel=bound)
    assert found.norms == pytest.approx(wanted.norms, rel=bound)
    assert list(found.state) == list(wanted.state)
    biggest = max(float(tensor.norm()) for tensor in wanted.state.values())
    for name, tensor in wanted.state.items():
        # A key's bias has a gradient of rounding errors alone, of which AdamW makes steps: its size is the others'.
        size = max(float(tensor.norm()), 1e-2 * biggest)
        assert float((found.state[name] - tensor).norm()) < bound * size, name


def workers(trainer: PipelineTrainer) -> list[Any]:
    gang = trainer._gang
    assert isinstance(gang, LocalGang)
    return list(gang._workers)


def assert_equal_copies(trainer: PipelineTrainer, replicas: int) -> None:
    states = [unpack(worker.state()) for worker in workers(trainer)]
    stages = len(states) // replicas
    for rank, state in enumerate(states):
        assert all(torch.equal(tensor, states[rank % stages][name]) for name, tensor in state.items()), rank


@pytest.mark.parametrize(
    ("stages", "dtype", "bound"),
    [(1, torch.float64, 1e-9), (2, torch.float64, 1e-9), (4, torch.float64, 1e-9), (2, torch.float32, 1e-4)],
)
@pytest.mark.parametrize("shard", SHARDS)
def test_five_clipped_steps_are_those_of_the_unsplit_model(
    stages: int, dtype: torch.dtype, bound: float, shard: str | None
) -> None:
    model, batches = gpt(layers=4).to(dtype), batches_of_tokens(5)
    wanted = unsplit(model, batches, adamw, max_grad_norm=0.5)
    assert min(wanted.norms) > 0.5
    options: dict[str, Any] = {"data_parallel": 2, "shard": shard, "microbatches": 2}
    with trainer_of(model, stages, optimizer=adamw, max_grad_norm=0.5, **options) as trainer:
        metrics = [trainer.train_step(batch) for batch in batches]
        assert_equal_copies(trainer, 2)
        found = Run([m["loss"] for m in metrics], [m["grad_norm"] for m in metrics], trainer.state_dict())
    assert_same_run(found, wanted, bound)
    assert metrics[0]["samples"] == 8
    assert metrics[0]["microbatches"] == 2
    assert len(metrics[0]["peak_in_flight"]) == stages


@pytest.mark.parametrize("shard", SHARDS)
def test_without_clipping_and_with_three_replicas_and_tied_weights(shard: str | None) -> None:
    model, batches = gpt(tied=True).double(), batches_of_tokens(3)
    found = piped(model, batches, 3, optimizer=adamw, data_parallel=3, shard=shard, microbatches=2)
    assert_same_run(found, unsplit(model, batches, adamw), 1e-9)


def test_sharded_weights_are_those_of_plain_replicas_bit_by_bit() -> None:
    runs = [piped(gpt(), batches_of_tokens(3), 2, data_parallel=2, shard=shard, microbatches=2) for shard in SHARDS]
    assert runs[0].losses == runs[1].losses
    assert all(torch.equal(tensor, runs[1].state[name]) for name, tensor in runs[0].state.items())


@pytest.mark.parametrize("name", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shard", SHARDS)
def test_hugging_face(name: str, shard: str | None) -> None:
    family = FAMILIES[name]
    model, batches = family.build(dropout=0.0), [family.batch(8, seed=seed) for seed in range(5)]
    make = functools.partial(torch.optim.AdamW, lr=1e-3, eps=1e-4)
    wanted = unsplit(model, batches, make, loss=lambda net, b: net(**b).loss, max_grad_norm=0.5)
    options: dict[str, Any] = {"data_parallel": 2, "shard": shard, "microbatches": 2, "max_grad_norm": 0.5}
    assert_same_run(piped(model, batches, 2, optimizer=make, **options), wanted, 1e-4)


def test_weights_do_not_depend_on_stages_or_schedule() -> None:
    """To the bit, as in one pipeline; four microbatches a replica in all of them."""
    model, batches = gpt(dropout=0.3, layers=4), batches_of_tokens(2)
    options: dict[str, Any] = {"data_parallel": 2, "microbatches": 4, "max_grad_norm": 0.5, "optimizer": adamw}
    one, *others = (
        piped(model, batches, stages, schedule=schedule, **options)
        for stages, schedule in ((1, "1f1b"), (4, "gpipe"), (2, "zbv"))
    )
    for other in others:
        assert (other.losses, other.norms) == (one.losses, one.norms)
        assert all(torch.equal(tensor, one.state[name]) for name, tensor in other.state.items())


def test_dropout_is_that_of_one_pipeline_with_the_same_microbatches() -> None:
    model, batches = gpt(dropout=0.3).double(), batches_of_tokens(3)
    one, two = (
        piped(model, batches, 2, optimizer=adamw, data_parallel=replicas, microbatches=8 // replicas)
        for replicas in (1, 2)
    )
    assert_same_run(two, one, 1e-9)
    other = piped(model, batches, 2, optimizer=adamw, data_parallel=2, microbatches=4, seed=1)
    assert other.losses[0] != pytest.approx(one.losses[0], rel=1e-5)


def ragged() -> list[dict[str, Tensor]]:
    """Shares of 4 and 3, of 2 and 1, one without a valid target, padding all over."""
    batches = [batches_of_tokens(1, samples, seed=samples)[0] for samples in (7, 3, 8)]
    batches[0]["targets"][0, 2:] = -100
    batches[1]["targets"][2, 5:] = -100
    batches[2]["targets"][4:] = -100
    return batches


@pytest.mark.parametrize(("shard", "max_grad_norm"), [(None, None), ("optimizer", 0.5)])
def test_ragged_batches(shard: str | None, max_grad_norm: float | None) -> None:
    model, batches = gpt().double(), ragged()
    wanted = unsplit(model, batches, adamw, max_grad_norm=max_grad_norm)
    options: dict[str, Any] = {"data_parallel": 2, "shard": shard, "microbatches": 4}
    assert_same_run(piped(model, batches, 2, optimizer=adamw, max_grad_norm=max_grad_norm, **options), wanted, 1e-9)


@pytest.mark.parametrize(("shard", "max_grad_norm"), [(None, 0.5), ("optimizer", None)])
def test_a_batch_without_a_valid_target_is_refused_and_changes_nothing(
    shard: str | None, max_grad_norm: float | None
) -> None:
    good, bad = batches_of_tokens(2)
    bad["targets"].fill_(-100)
    with trainer_of(
        gpt(), 2, data_parallel=2, shard=shard, microbatches=2, max_grad_norm=max_grad_norm, example=good
    ) as trainer:
        trainer.train_step(good)
        before = trainer.state_dict()
        with pytest.raises(BatchError, match="no microbatch of the batch has a valid target"):
            trainer.train_step(bad)
        assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.state_dict().items())
        trainer.train_step(good)
        assert_equal_copies(trainer, 2)


def two_terms(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets) + F.mse_loss(outputs, 0 * outputs)


def test_terms_that_average_over_different_things_in_two_shares_are_refused() -> None:
    """Each share's microbatches agree among themselves: only together do they show it."""
    (good,), (bad,) = pairs(1, 12), pairs(1, 12)
    bad[1][[6, 9]] = -100
    options: dict[str, Any] = {"loss": two_terms, "microbatch_weight": "targets", "microbatches": 2}
    with trainer_of(Net().double(), 2, data_parallel=2, **options) as trainer:
        trainer.train_step(good)
        before = trainer.state_dict()
        with pytest.raises(BatchError, match="average over different things"):
            trainer.train_step(bad)
        assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.state_dict().items())
        assert trainer.train_step(good)["step"] == 2


def test_a_loss_without_a_gradient_is_an_error_where_no_share_has_one() -> None:
    def detached(outputs: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs, targets)
        return loss if bool((targets != 2).all()) else loss.detach()

    some, none = pairs(2, 12)
    some[1].clamp_(max=1)
    some[1][6:] = 2
    none[1].fill_(2)
    options: dict[str, Any] = {"loss": detached, "microbatch_weight": "samples", "microbatches": 2}
    with trainer_of(Net().double(), 2, data_parallel=2, example=pairs(1, 12)[0], **options) as trainer:
        before = trainer.state_dict()
        trainer.train_step(some)
        assert not torch.equal(trainer.state_dict()["head.weight"], before["head.weight"])
        with pytest.raises(StageError, match="the loss does not require a gradient"):
            trainer.train_step(none)


def test_a_batch_of_fewer_samples_than_replicas_is_refused_on_the_driver() -> None:
    (good,), (small,) = batches_of_tokens(1), batches_of_tokens(1, 2)
    with trainer_of(gpt(), 2, data_parallel=3, microbatches=2) as trainer:
        with pytest.raises(BatchError, match=r"the batch has 2 samples, but data_parallel=3 replicas need"):
            trainer.train_step(small)
        trainer.train_step(good)
        with pytest.raises(BatchError, match=r"the batch has 2 samples, but data_parallel=3 replicas need"):
            trainer.train_step(small)
        assert trainer.train_step(good)["step"] == 1
        assert trainer.evaluate([small])["samples"] == 2


class Net(nn.Module):
    """Six equal layers and a head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(6))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


def pairs(count: int, samples: int = 9) -> list[tuple[Tensor, Tensor]]:
    noise = torch.Generator().manual_seed(4)
    return [
        (torch.randn(samples, 8, generator=noise).double(), torch.randint(0, 5, (samples,), generator=noise))
        for _ in range(count)
    ]


def summed(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="sum") / 50


def by_hand(outputs: Tensor, targets: Tensor) -> Tensor:
    """A mean over the odd targets alone."""
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return (losses * (targets % 2)).sum() / (targets % 2).sum()


@pytest.mark.parametrize(
    ("rule", "loss", "max_grad_norm"),
    [
        ("samples", F.cross_entropy, None),
        ("targets", F.cross_entropy, 0.05),
        (None, F.cross_entropy, None),
        ("sum", summed, 0.05),
        (lambda batch: float((batch[1] % 2).sum()), by_hand, None),
        (lambda batch: float((batch[1] % 2).sum()), by_hand, 0.05),
    ],
    ids=["samples", "targets", "found", "sum", "callable", "callable-clipped"],
)
def test_every_rule_of_weights(rule: Any, loss: Callable[..., Tensor], max_grad_norm: float | None) -> None:
    model, batches = Net().double(), pairs(3)
    batches[1][1][5:] = 2  # the second replica's share has no odd target
    wanted = unsplit(model, batches, adamw, loss=lambda net, b: loss(net(b[0]), b[1]), max_grad_norm=max_grad_norm)
    options: dict[str, Any] = {"loss": loss, "microbatch_weight": rule, "max_grad_norm": max_grad_norm}
    found = piped(model, batches, 2, optimizer=adamw, data_parallel=2, microbatches=3, **options)
    assert_same_run(found, wanted, 1e-9)


@pytest.mark.parametrize(("schedule", "chunks"), [("interleaved_1f1b", 2), ("zbv", 2), ("gpipe", 1)])
def test_schedules(schedule: str, chunks: int) -> None:
    model, batches = gpt(layers=4).double(), batches_of_tokens(2)
    options: dict[str, Any] = {"schedule": schedule, "data_parallel": 2, "microbatches": 4, "shard": "optimizer"}
    found = piped(model, batches, 2, optimizer=adamw, chunks=chunks, max_grad_norm=0.5, **options)
    assert_same_run(found, unsplit(model, batches, adamw, max_grad_norm=0.5), 1e-9)


@pytest.mark.parametrize("shard", SHARDS)
def test_learning_rates_are_scheduled_on_every_rank(shard: str | None) -> None:
    model, batches = gpt().double(), batches_of_tokens(3)
    rates = [1e-2 * 0.5**step for step in range(3)]
    halving = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    options: dict[str, Any] = {"optimizer": functools.partial(adamw, lr=1e-2), "lr_scheduler": halving}
    with trainer_of(model, 2, data_parallel=2, shard=shard, microbatches=2, **options) as trainer:
        assert [trainer.train_step(batch)["lr"] for batch in batches] == pytest.approx(rates)
        state = trainer.state_dict()
    made = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch, rate in zip(batches, rates, strict=True):
        made.param_groups[0]["lr"] = rate
        made.zero_grad()
        model(**batch).backward()
        made.step()
    assert all(relative(state[name], tensor) < 1e-9 for name, tensor in model.state_dict().items())


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(batch["tokens"])
    return found


def cross_entropy(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), batch["targets"].flatten())


def accuracy(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return (outputs.argmax(-1) == batch["targets"]).float().mean()


@pytest.mark.parametrize("replicas", [2, 3])
def test_evaluation_and_prediction_are_those_of_one_pipeline(replicas: int) -> None:
    """To the bit: each batch goes to one replica whole, in turns; a stateful source may have any number of them."""
    batches = [batches_of_tokens(1, samples, seed=samples)[0] for samples in (8, 3, 5, 1, 6)]
    options: dict[str, Any] = {"forward": logits, "loss": cross_entropy, "metrics": {"accuracy": accuracy}}
    found: list[tuple[dict[str, Any], list[Tensor]]] = []
    for number in (1, replicas):
        with trainer_of(gpt(dropout=0.5), 2, data_parallel=number, microbatches=2, **options) as trainer:
            found.append((trainer.evaluate(iter(batches)), list(trainer.predict(batches))))
    assert found[0][0] == found[1][0]
    assert [len(output) for output in found[1][1]] == [8, 3, 5, 1, 6]
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))


def test_a_failure_names_stage_and_replica() -> None:
    def forward(model: nn.Module, batch: dict[str, Tensor]) -> Any:
        if int(batch["tokens"][0, 0]) == 60 and batch["tokens"].device.type == "cpu":
            raise ValueError("sixty")
        return model(**batch)

    good, bad = batches_of_tokens(2)
    for batch in (good, bad):
        batch["tokens"].clamp_(max=59)
    bad["tokens"][6, 0] = 60  # the second replica's second microbatch
    with trainer_of(gpt(), 2, data_parallel=2, microbatches=2, forward=forward) as trainer:
        trainer.train_step(good)
        with pytest.raises(StageError, match=r"stage \d of replica 1, action .*(.|\n)*sixty") as caught:
            trainer.train_step(bad)
    assert caught.value.replica == 1


# The sharded optimizer


def state_bytes(trainer: PipelineTrainer) -> list[int]:
    """Of each rank's optimizer, as it is."""
    found = []
    for worker in workers(trainer):
        made = worker._optimizer.optimizer
        state = {} if made is None else made.state
        found.append(sum(t.nbytes for each in state.values() for t in each.values() if isinstance(t, Tensor)))
    return found


@pytest.mark.parametrize("replicas", [2, 3])
def test_the_optimizers_bytes_fall_by_the_number_of_replicas(replicas: int) -> None:
    """And the plan knows: to the byte for the rank that has most."""
    batch = pairs(1)[0]
    found: list[list[int]] = []
    planned: list[int] = []
    for shard in SHARDS:
        options: dict[str, Any] = {"loss": F.cross_entropy, "balance": [6, 1], "data_parallel": replicas}
        with trainer_of(Net().double(), 2, microbatches=1, shard=shard, **options) as trainer:
            trainer.train_step(batch)
            found.append(state_bytes(trainer)[::2])  # the stage of six equal layers
            stage = trainer.plan().stages[0]
            assert stage.optimizer_bytes is not None
            planned.append(stage.optimizer_bytes)
            assert ("share the optimizer's state out" in str(trainer.plan())) == (shard is not None)
    assert found[0] == [6 * (2 * 8 * 8 * 8 + 4)] * replicas
    assert found[1] == [found[0][0] // replicas] * replicas
    assert planned == [found[0][0], found[1][0]]


class ByShape(torch.optim.Optimizer):
    """Takes a step along the whole tensor's direction, so a piece of a tensor would take another one."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        super().__init__(named, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            parameter.sub_(0.1 * parameter.grad / parameter.grad.norm())


@pytest.mark.parametrize(
    "make", [ByShape, functools.partial(torch.optim.Adafactor, lr=1e-2)], ids=["norm", "adafactor"]
)
def test_an_optimizer_that_looks_at_whole_tensors_is_exact(make: Any) -> None:
    model, batches = Net().double(), pairs(3)
    options: dict[str, Any] = {"loss": F.cross_entropy, "data_parallel": 2, "shard": "optimizer", "microbatches": 2}
    found = piped(model, batches, 2, optimizer=make, **options)
    wanted = unsplit(model, batches, make, loss=lambda net, b: F.cross_entropy(net(b[0]), b[1]))
    assert_same_run(found, wanted, 1e-9)


def decaying(named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for _, p in named if p.dim() > 1], "weight_decay": 0.5},
        {"params": [p for _, p in named if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-2)


def test_the_users_groups_hold() -> None:
    model, batches = gpt().double(), batches_of_tokens(3)
    found = piped(model, batches, 2, optimizer=decaying, data_parallel=2, shard="optimizer", microbatches=2)
    assert_same_run(found, unsplit(model, batches, decaying), 1e-9)


def test_parameters_without_a_gradient_stay_as_they_are() -> None:
    """A unit that is not on the loss's way, and frozen ones, under weight decay."""

    class Idle(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.layers[5](x)
            return super().forward(x) if False else self.head(torch.tanh(self.layers[1](self.layers[0](x))))

    model, batches = Idle().double(), pairs(2)
    model.layers[0].requires_grad_(False)
    for shard in SHARDS:
        found = piped(model, batches, 2, loss=F.cross_entropy, optimizer=decaying, data_parallel=2, shard=shard)
        wanted = unsplit(model, batches, decaying, loss=lambda net, b: F.cross_entropy(net(b[0]), b[1]))
        assert_same_run(found, wanted, 1e-9)
        assert torch.equal(found.state["layers.5.weight"], model.layers[5].weight)


def test_buffers_that_a_forward_changes_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)).double()
    options: dict[str, Any] = {"loss": F.cross_entropy, "data_parallel": 2}
    with pytest.raises(ValueError, match="microbatches=1 and data_parallel=1"):
        trainer_of(model, 2, example=pairs(1)[0], microbatches=1, **options)
    with pytest.raises(ValueError, match="which each replica would change by its own share"):
        trainer_of(model, 2, example=pairs(1)[0], batch_norm="microbatch", microbatches=2, **options)


# On Ray


@pytest.mark.ray
@pytest.mark.parametrize(
    ("stages", "options"),
    [
        (2, {"max_grad_norm": 0.5}),
        pytest.param(
            2, {"schedule": "zbv", "shard": "optimizer", "max_grad_norm": 0.5}, marks=pytest.mark.slow, id="sharded-zbv"
        ),
    ],
)
def test_replicas_as_actors(ray_session: Session, stages: int, options: dict[str, Any]) -> None:
    model, batches = gpt(layers=4), [*batches_of_tokens(4), *ragged()[:1]]
    wanted = unsplit(model, batches, adamw, max_grad_norm=0.5)
    more: dict[str, Any] = {"forward": logits, "loss": cross_entropy, "microbatches": 2, "optimizer": adamw, **options}
    here = piped(model, batches, stages, data_parallel=2, **more)
    with trainer_of(model, stages, backend="ray", data_parallel=2, **more) as trainer:
        metrics = [trainer.train_step(batch) for batch in batches]
        state = trainer.state_dict()
        outputs = list(trainer.predict(batches))
        evaluated = trainer.evaluate(batches)
        assert len(str(trainer.report()).splitlines()) > 5
    found = Run([m["loss"] for m in metrics], [m["grad_norm"] for m in metrics], state)
    assert_same_run(found, wanted, 1e-4)
    assert all(torch.equal(tensor, here.state[name]) for name, tensor in state.items())
    assert [len(output) for output in outputs] == [len(batch["tokens"]) for batch in batches]
    whole = gpt(layers=4).eval()
    whole.load_state_dict(state)
    with torch.no_grad():
        for output, batch in zip(outputs, batches, strict=True):
            torch.testing.assert_close(output, whole(batch["tokens"]), rtol=1e-4, atol=1e-5)
    assert evaluated["samples"] == sum(map(len, outputs))
