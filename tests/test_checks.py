"""Each thing that would train something else in silence is refused, and its harmless neighbour is not."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from parity import Case, assert_exact
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from training import trainer_of

from raypipe import PipelineTrainer
from raypipe.errors import CutError
from raypipe.schedule import Schedule, build


class Toy(nn.Module):
    """Two linear units, and something extra between them."""

    def __init__(self, extra: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.one, self.two, self.extra = nn.Linear(4, 4), nn.Linear(4, 3), extra

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.extra(self.one(x)))


class Averaging(nn.Module):
    """Keeps a running mean that only evaluation uses."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return x


def trainer(model: nn.Module, **options: Any) -> PipelineTrainer:
    batch = torch.randn(6, 4), torch.randint(3, (6,))
    settings = {"loss": F.cross_entropy, "microbatches": 3, "backend": "local", "quiet": True, "example": batch}
    if isinstance(model, Toy):
        settings["units"] = ["one", "two"]
    return PipelineTrainer(model, 2, **{**settings, **options})


def test_a_loss_that_trains_the_model_behind_the_stages_back_is_refused() -> None:
    model = Toy()

    def penalised(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) + sum((p**2).sum() for p in model.parameters())

    with pytest.raises(ValueError, match="loss refers to a parameter that requires a gradient"):
        trainer(model, loss=penalised)


def test_a_loss_with_weights_of_its_own_is_refused_and_a_frozen_teacher_is_not() -> None:
    teacher = nn.Linear(4, 3)

    def distilled(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, teacher(torch.ones(len(outputs), 4)))

    with pytest.raises(ValueError, match=r"freeze it by requires_grad_\(False\)"):
        trainer(Toy(), loss=distilled)
    teacher.requires_grad_(False)
    trainer(Toy(), loss=distilled)


def test_a_metric_over_the_model_is_refused() -> None:
    model = Toy()
    with pytest.raises(ValueError, match=r"metrics\['norm'\] refers to a parameter"):
        trainer(model, metrics={"norm": lambda outputs, batch: model.one.weight.norm()})


@pytest.mark.parametrize(
    ("draw", "name"), [(random.random, "random"), (lambda: float(numpy.random.rand()), r"numpy\.random")]
)
def test_a_forward_that_draws_elsewhere_than_from_torch_is_refused(draw: Callable[[], float], name: str) -> None:
    with pytest.raises(CutError, match=f"draws from {name}"):
        trainer(Toy(lambda x: x * draw()))
    trainer(Toy(lambda x: x * torch.rand(1)))


def test_a_buffer_that_each_microbatch_would_change_is_refused_unless_that_is_accepted() -> None:
    model = nn.Sequential(Averaging(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"the forward changes the buffer 0.mean"):
        trainer(model)
    trainer(model, batch_norm="microbatch")
    trainer(model, microbatches=1)
    model[0].eval()  # the root stays in train mode
    trainer(model)


def test_forwards_out_of_order_are_refused_where_they_change_a_buffer() -> None:
    model = nn.Sequential(Averaging(), nn.Linear(4, 3))
    turned = Schedule.from_csv("0F1,0F0,0B0,0B1\n1F1,1F0,1B0,1B1", "turned")
    given: dict[str, Any] = {"microbatches": None, "batch_norm": "microbatch"}
    with pytest.raises(ValueError, match="'turned' runs 0F1 before the forward of an earlier microbatch"):
        trainer(model, **given, schedule=turned)
    trainer(model, **given, schedule=build("1f1b", 2, 2))
    model[0].eval()
    trainer(model, **given, schedule=turned)


def test_so_is_a_schedule_of_another_number_of_microbatches() -> None:
    model = nn.Sequential(Averaging(), nn.Linear(4, 3))
    turned = Schedule.from_csv("0F1,0F0,0B0,0B1\n1F1,1F0,1B0,1B1", "turned")

    def make(stages: int, microbatches: int) -> Schedule:
        return turned if microbatches == 2 else build("1f1b", stages, microbatches)

    with trainer(model, microbatches=4, batch_norm="microbatch", schedule=make, backend="local") as made:
        with pytest.raises(ValueError, match="runs 0F1 before the forward of an earlier microbatch"):
            made.train_step((torch.randn(2, 4), torch.randint(3, (2,))))
        made.train_step((torch.randn(4, 4), torch.randint(3, (4,))))


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    model = Toy()
    with pytest.raises(ValueError, match="made an optimizer of other parameters"):
        trainer(model, optimizer=lambda parameters: torch.optim.SGD(model.parameters(), lr=0.1))


class Lending(nn.Module):
    """A function outside of units reads a buffer of the first unit."""

    def __init__(self, *, changing: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Averaged(changing), nn.Linear(4, 4), nn.Linear(4, 3)])

    def forward(self, x: Tensor) -> Tensor:
        one, two, three = self.blocks
        return three(two(one(x)).relu() * one.factor[:4])


class Averaged(nn.Linear):
    """May change its buffer."""

    def __init__(self, changing: bool) -> None:
        super().__init__(4, 4)
        self.changing = changing
        self.register_buffer("factor", torch.linspace(0.5, 2.0, 6))

    def forward(self, x: Tensor) -> Tensor:
        if self.changing:
            self.factor[0] += x.detach().mean()
        return super().forward(x) * self.factor[0]


def test_a_units_buffer_may_be_read_by_another_stage() -> None:
    torch.manual_seed(0)
    batch = torch.randn(6, 4), torch.randint(0, 3, (6,))
    case = Case(Lending(changing=False), batch, {"loss": F.cross_entropy, "balance": [1, 1, 1]})
    assert_exact(lambda: case, [(3, "1f1b", 2)])
    with trainer_of(case.model, 3, **case.options) as trainer:
        trainer.train_step(batch)
        assert list(trainer.state_dict()) == list(case.model.state_dict())


def test_a_units_buffer_that_changes_may_not() -> None:
    batch = torch.randn(6, 4), torch.randint(0, 3, (6,))
    options = {"loss": F.cross_entropy, "microbatches": 1, "balance": [1, 2], "example": batch}
    with pytest.raises(CutError, match=r"reads the buffer blocks.0.factor outside of blocks.0, which changes it"):
        trainer_of(Lending(changing=True), 2, **options)


def test_optimizers_are_tried_without_memory_for_their_state() -> None:
    kept: list[Tensor] = []

    def adagrad(parameters: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adagrad([p for _, p in parameters], lr=0.1)
        kept.extend(state["sum"] for state in optimizer.state.values())
        return optimizer

    batch = torch.rand(2, 4), torch.rand(2, 3)
    trainer_of(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)),
        2,
        loss=F.mse_loss,
        optimizer=adagrad,
        datasets={"train": [batch]},
    ).plan()
    assert kept
    assert all(isinstance(state, FakeTensor) for state in kept)
