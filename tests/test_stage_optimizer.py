from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from raypipe.stage.non_finite import NonFinite
from raypipe.stage.optimizer import StageOptimizer, Update, global_norm
from raypipe.stage.protocol import RankWork, run_blocking
from raypipe.stage.spec import Gradients
from raypipe.transport.memory import MemoryHub

SHARED = Gradients(owned=(("a", "b"), ("c",)), order=("a", "b", "c"), shared={(0, 1): ("a",)})


def sgd(parameters: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)


def parameter(gradient: Sequence[float] | None) -> nn.Parameter:
    made = nn.Parameter(torch.zeros(2))
    made.grad = None if gradient is None else torch.tensor(gradient)
    return made


def finish(
    ranks: Sequence[dict[str, nn.Parameter]], gradients: Gradients, divisor: float = 1.0, **options: Any
) -> list[Update]:
    """The ends of a step on all ranks, in turns; the last rank knows the divisor."""
    hub, updates = MemoryHub(len(ranks)), {}
    works: dict[int, RankWork[Update]] = {}
    for rank, parameters in enumerate(ranks):
        known = options.get("known", False)
        made = StageOptimizer(
            rank,
            parameters,
            gradients,
            sgd,
            None,
            options.get("max_norm"),
            None if known else len(ranks) - 1,
            agree=options.get("agree", False),
        )
        told = divisor if known or rank == len(ranks) - 1 else 1.0
        works[rank] = made.finish(hub.transport(rank), told, options.get("loss_scale", 1.0))
    waiting: dict[int, Any] = {}
    while works:
        for rank, work in list(works.items()):
            if rank in waiting and not waiting[rank].ready():
                continue
            try:
                waiting[rank] = next(work)
            except StopIteration as stop:
                updates[rank] = stop.value
                del works[rank]
    return [updates[rank] for rank in range(len(ranks))]


def test_shared_gradients_are_summed_divided_and_clipped_as_one_model() -> None:
    ranks = [
        {"a": parameter([3.0, 0.0]), "b": parameter([0.0, 6.0])},
        {"a": parameter([3.0, 6.0]), "c": parameter([2.0, 0.0])},
    ]
    updates = finish(ranks, SHARED, divisor=2.0, max_norm=0.5)
    a, b, c = (torch.tensor(t) / 2 for t in ([6.0, 6.0], [0.0, 6.0], [2.0, 0.0]))
    whole = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    for p, gradient in zip(whole, (a, b, c), strict=True):
        p.grad = gradient.clone()
    norm = nn.utils.clip_grad_norm_(whole, 0.5)
    torch.testing.assert_close(ranks[0]["a"].detach(), -whole[0].grad)  # type: ignore[operator]
    torch.testing.assert_close(ranks[1]["c"].detach(), -whole[2].grad)  # type: ignore[operator]
    assert torch.equal(ranks[0]["a"], ranks[1]["a"])
    assert global_norm(SHARED, [u.norms for u in updates]) / 2 == pytest.approx(norm.item())
    assert updates[0].lr == (1.0,)
    assert ranks[0]["a"].grad is None


def test_a_parameter_without_gradient_stays_without() -> None:
    ranks = [{"a": parameter(None), "b": parameter([1.0, 1.0])}, {"a": parameter(None), "c": parameter(None)}]
    updates = finish(ranks, SHARED, known=True)
    assert updates[0].norms.tolist() == [0.0, pytest.approx(2**0.5)]
    assert not ranks[0]["a"].any()
    assert ranks[0]["b"].tolist() == [-1.0, -1.0]


def test_a_stage_without_trainable_parameters_takes_part() -> None:
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    gradients = Gradients(owned=((), ("c",)), order=("c",))
    updates = finish([{"a": frozen}, {"c": parameter([2.0, 0.0])}], gradients, divisor=4.0, max_norm=1.0)
    assert (updates[0].lr, updates[0].norms.tolist(), updates[1].norms.tolist()) == ((), [], [2.0])


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("known", [True, False], ids=["known-to-all", "told"])
def test_a_refused_batch_changes_nothing(known: bool, max_norm: float | None) -> None:
    ranks = [{"a": parameter([3.0, 0.0]), "b": parameter(None)}, {"a": parameter(None), "c": parameter([2.0, 0.0])}]
    updates = finish(ranks, SHARED, divisor=0.0, known=known, max_norm=max_norm)
    assert [update.lr for update in updates] == [(), ()]
    for held in ranks:
        assert all(p.grad is None and not p.any() for p in held.values())


def test_without_clipping_nobody_waits_for_anothers_last_backward() -> None:
    """The divisor is told once all losses are known; rank 0 then updates while rank 1 still has backwards to do."""
    hub, gradients = MemoryHub(2), Gradients(owned=(("a",), ("c",)), order=("a", "c"))
    held = parameter([2.0, 4.0]), parameter([1.0, 1.0])
    first, last = (StageOptimizer(r, {"ac"[r]: held[r]}, gradients, sgd, None, None, 1) for r in range(2))
    first.begin(hub.transport(0))
    last.begin(hub.transport(1))
    work = first.finish(hub.transport(0), 1.0)
    assert not next(work).ready()
    last.tell(hub.transport(1), 2.0)
    with pytest.raises(StopIteration):
        next(work)
    assert held[0].tolist() == [-1.0, -2.0]
    assert held[1].tolist() == [0.0, 0.0]
    run_blocking(last.finish(hub.transport(1), 2.0), 1.0)
    assert held[1].tolist() == [-0.5, -0.5]


def made_with(make: Any, scheduler: Any = None) -> StageOptimizer:
    gradients = Gradients(owned=(("a",),), order=("a",))
    return StageOptimizer(0, {"a": parameter([1.0, 1.0])}, gradients, make, scheduler, None, None)


@pytest.mark.parametrize(
    ("make", "scheduler", "sentence"),
    [
        (lambda named: torch.optim.LBFGS([p for _, p in named]), None, "LBFGS, which needs the whole model"),
        (lambda named: None, None, "optimizer gave a NoneType"),
        (sgd, torch.optim.lr_scheduler.ReduceLROnPlateau, "ReduceLROnPlateau, which needs a metric"),
        (sgd, lambda optimizer: 3, "lr_scheduler gave a int"),
    ],
)
def test_what_cannot_work_is_said(make: Any, scheduler: Any, sentence: str) -> None:
    with pytest.raises(TypeError, match=sentence):
        made_with(make, scheduler)


def test_the_scheduler_steps_with_the_optimizer() -> None:
    optimizer = made_with(sgd, lambda made: torch.optim.lr_scheduler.StepLR(made, 1, 0.5))
    hub = MemoryHub(1)
    rates = [run_blocking(optimizer.finish(hub.transport(0), 1.0), 1.0).lr for _ in range(3)]
    assert rates == [(1.0,), (0.5,), (0.25,)]


NAN = float("nan")


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_a_gradient_that_is_not_finite_never_reaches_a_weight(max_norm: float | None, bad: float) -> None:
    """Where ranks wait for each other's norms none of them steps; else the others may have."""
    ranks = [
        {"a": parameter([3.0, 0.0]), "b": parameter([bad, 1.0])},
        {"a": parameter([0.0, 0.0]), "c": parameter([2.0, 0.0])},
    ]
    updates = finish(ranks, SHARED, divisor=2.0, max_norm=max_norm)
    assert updates[0].non_finite == NonFinite(0, "b", pytest.approx(bad, nan_ok=True), 1)
    assert updates[0].lr == (1.0,)
    assert not any(p.any() or p.grad is not None for p in ranks[0].values())
    assert (updates[1].non_finite is None) == (max_norm is None)
    assert bool(ranks[1]["c"].any()) == (max_norm is None)


def test_where_ranks_agree_gradients_are_unscaled_before_they_are_clipped() -> None:
    gradients = Gradients(owned=(("a",), ("c",)), order=("a", "c"))
    for max_norm, wanted in ((None, [-2.0, -1.0]), (1.0, [-2 / 5**0.5, -1 / 5**0.5])):
        ranks = [{"a": parameter([2048.0, 0.0])}, {"c": parameter([1024.0, 0.0])}]
        finish(ranks, gradients, divisor=2.0, max_norm=max_norm, agree=True, loss_scale=512.0)
        assert [ranks[0]["a"][0].item(), ranks[1]["c"][0].item()] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("divisor", "refused"), [(NAN, False), (0.0, True)])
def test_a_loss_that_is_not_finite_is_told_like_a_divisor(divisor: float, refused: bool) -> None:
    ranks = [{"a": parameter([1.0, 1.0]), "b": parameter(None)}, {"a": parameter(None), "c": parameter([1.0, 1.0])}]
    for update in finish(ranks, SHARED, divisor=divisor, agree=True, loss_scale=4.0):
        assert update.refused == refused
        assert (update.non_finite is None) == refused
        assert refused or str(update.non_finite) == "the loss"
    assert not any(p.any() or p.grad is not None for held in ranks for p in held.values())


def test_norms_of_slices_are_asked_for_by_all_and_told_by_the_first() -> None:
    """Two ranks with a slice each of one parameter, whose norm over both is 5."""
    gradients = Gradients(owned=(("a",), ()), order=("a",))
    hub, asked = MemoryHub(2), []

    def norms(names: Sequence[str]) -> torch.Tensor:
        asked.append(tuple(names))
        return torch.tensor([5.0], dtype=torch.float64)

    held = parameter([3.0, 0.0]), parameter([0.0, 4.0])
    works = [
        StageOptimizer(rank, {"a": p}, gradients, sgd, None, 1.0, None, norms=norms, leader=0).finish(
            hub.transport(rank), 1.0
        )
        for rank, p in enumerate(held)
    ]
    for work in works:
        next(work)
    updates = []
    for work in works:
        with pytest.raises(StopIteration) as stop:
            next(work)
        updates.append(stop.value.value)
    assert asked == [("a",), ("a",)]
    assert [update.norms.tolist() for update in updates] == [[5.0], []]
    assert held[0].tolist() == [pytest.approx(-0.6), 0.0]
    assert held[1].tolist() == [0.0, pytest.approx(-0.8)]
