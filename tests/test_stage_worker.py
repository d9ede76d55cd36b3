"""Ranks as their host sees them; the numbers themselves are test_stage_compute's and test_parity's."""

from __future__ import annotations

import dataclasses
import gc
import pickle
import weakref
from time import monotonic
from typing import Any

import cloudpickle
import pytest
import torch
from torch.nn import functional as F
from training import batches_of_tokens, gpt

from raypipe.data.wire import pack, unpack
from raypipe.driver.local import LocalGang
from raypipe.errors import PeerLost, StageError
from raypipe.observe.events import END
from raypipe.options import Options
from raypipe.plan import Plan
from raypipe.planning import make_plan
from raypipe.stage.losses import Losses
from raypipe.stage.protocol import run_blocking
from raypipe.stage.worker import StageWorker
from raypipe.transport.memory import MemoryHub, MemoryTransport


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def planned(**options: Any) -> tuple[Plan, Any]:
    (given,) = batches_of_tokens(1, 4)
    return make_plan(gpt(tied=True), Options(2, optimizer=sgd, microbatches=2, **options), given), given


def gang(plan: Plan) -> LocalGang:
    return LocalGang([plan.build_of(rank) for rank in range(plan.topology.size)])


def test_a_step_reports_what_each_rank_alone_knows() -> None:
    plan, given = planned(max_grad_norm=1.0)
    ranks = gang(plan)
    first, last = ranks.wait(ranks.train_step(0, pack(given)))
    assert (first.loss, last.samples, last.microbatches, last.lr) == (None, 4, 2, (0.1,))
    assert last.loss == pytest.approx(4.1, abs=0.3)
    assert len(first.norms) + len(last.norms) == len(list(plan.model.parameters()))
    assert [str(action) for action in last.trace.actions] == ["1F0", "1B0", "1F1", "1B1"]
    again = ranks.wait(ranks.train_step(1, pack(given)))[1]
    assert again.loss < last.loss


def test_evaluation_and_prediction_change_nothing() -> None:
    plan, given = planned(metrics={"rows": lambda outputs, batch: len(batch["tokens"])})
    ranks = gang(plan)
    before = [unpack(state) for state in ranks.state()]
    evaluated = ranks.wait(ranks.forward_step(0, pack(given), "evaluate"))
    assert evaluated[0].loss is None
    assert evaluated[1].metrics == {"rows": 4.0}
    model = plan.model.eval()
    with torch.no_grad():
        assert evaluated[1].loss == pytest.approx(model(**given).item(), rel=1e-5)
        predicted = ranks.wait(ranks.forward_step(0, pack({"tokens": given["tokens"]}), "predict"))[1]
        torch.testing.assert_close(unpack(predicted.outputs), model(given["tokens"]))
    after = [unpack(state) for state in ranks.state()]
    assert all(torch.equal(one[n], two[n]) for one, two in zip(before, after, strict=True) for n in one)


def test_a_rank_is_built_from_a_pickle_and_holds_its_part() -> None:
    plan, _ = planned()
    build = pickle.loads(cloudpickle.dumps(plan.build_of(1)))
    worker = build()
    assert isinstance(worker, StageWorker)
    assert set(plan.held_by(1)) <= set(unpack(worker.state()))
    worker.connect(MemoryHub(2).transport(1))
    assert worker.progress().action == "idle"


def test_errors_outside_the_actions_say_so() -> None:
    plan, given = planned()
    worker = plan.build_of(0)()
    with pytest.raises(PeerLost, match="never connected"):
        run_blocking(worker.train_step(0, pack(given)), 1.0)

    def wrong(parameters: Any) -> Any:
        raise KeyError("decay")

    spec = dataclasses.replace(plan.spec(), optimizer=wrong)
    with pytest.raises(StageError, match=r"stage 0, action optimizer, step -1 failed(.|\n)*KeyError: 'decay'"):
        StageWorker(spec, 0, plan.origin.share(plan.tensors_of(0))())


def test_a_closed_rank_fails_at_once() -> None:
    plan, given = planned()
    ranks = gang(plan)
    ranks.close()
    with pytest.raises((PeerLost, StageError)):
        ranks.wait(ranks.train_step(0, pack(given)))


def test_nothing_of_a_step_waits_for_the_garbage_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its losses hold the batch: a cycle through them would keep it until the collector runs."""
    alive: list[weakref.ref[Losses]] = []
    made = Losses.__init__

    def noted(self: Losses, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        alive.append(weakref.ref(self))

    monkeypatch.setattr(Losses, "__init__", noted)
    plan, given = planned()
    ranks = gang(plan)
    gc.disable()
    try:
        ranks.wait(ranks.train_step(0, pack(given)))
        assert [losses() for losses in alive] == [None, None]
    finally:
        gc.enable()


def test_a_stage_sums_its_gradients_while_the_first_one_still_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    began: dict[int, float] = {}
    reduce = MemoryTransport.all_reduce

    def noted(self: MemoryTransport, *args: Any) -> Any:
        began.setdefault(self.rank, monotonic())
        return reduce(self, *args)

    monkeypatch.setattr(MemoryTransport, "all_reduce", noted)
    (given,) = batches_of_tokens(1, 8)
    plan = make_plan(gpt(), Options(2, optimizer=sgd, microbatches=2, data_parallel=2), given)
    ranks = LocalGang([plan.build_of(rank) for rank in range(4)], plan.topology)
    reports = ranks.wait(ranks.train_step(0, pack(given)))
    for first, last in ((0, 1), (2, 3)):
        end = float(reports[first].trace.times[-1][END])
        assert float(reports[last].trace.times[-1][END]) < began[last] < end < began[first]


def in_part(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
    """A loss that is cut off from the model where no target is valid."""
    valid = bool((batch["labels"] >= 0).any())
    return F.cross_entropy((outputs if valid else outputs.detach()).flatten(0, 1), batch["labels"].flatten())


def by_tokens(model: torch.nn.Module, batch: Any) -> Any:
    return model(batch["tokens"])


@pytest.mark.parametrize("label", [5, -100], ids=["trained", "refused"])
def test_the_last_rank_tells_the_divisor_before_it_sums_shared_weights(
    label: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every step: the others receive in that order, and gloo tells messages apart by their size alone."""
    tokens = batches_of_tokens(1, 4)[0]["tokens"]
    options = Options(2, optimizer=sgd, microbatches=2, loss=in_part, forward=by_tokens)
    ranks = gang(make_plan(gpt(tied=True), options, {"tokens": tokens, "labels": tokens}))
    called: list[str] = []
    for name in ("all_gather", "all_reduce"):
        run = getattr(MemoryTransport, name)

        def noted(self: MemoryTransport, *args: Any, name: str = name, run: Any = run) -> Any:
            called.extend([name] * (self.rank == 1))
            return run(self, *args)

        monkeypatch.setattr(MemoryTransport, name, noted)
    batch = {"tokens": tokens, "labels": torch.full_like(tokens, label)}
    (_, last) = ranks.wait(ranks.train_step(0, pack(batch)))
    assert (last.refused is not None) == (label < 0)
    assert called == ["all_gather", "all_reduce"]
