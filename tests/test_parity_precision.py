"""Mixed precision from end to end: against a plain autocast loop, between cuts, and what is not finite."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn
from training import Run, batches_of_tokens, gpt, piped, relative, trainer_of, unsplit

from raypipe import BatchError, NonFiniteError, PipelineTrainer
from raypipe.transport.memory import MemoryTransport

if TYPE_CHECKING:
    from raypipe.driver.cluster import Session

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def autocast_loss(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(**batch)  # type: ignore[no-any-return]


def plain_loop(
    model: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    make: Callable[..., torch.optim.Optimizer],
    *,
    precision: str,
    microbatches: int,
) -> Run:
    """What one would write by hand, with PyTorch's own scaler for fp16."""
    model = copy.deepcopy(model).train()
    optimizer, scaler = make(list(model.named_parameters())), torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    losses = []
    for batch in batches:
        parts = []
        for tokens, targets in zip(*(batch[n].chunk(microbatches) for n in ("tokens", "targets")), strict=True):
            with torch.autocast("cpu", LOW[precision]):
                loss = model(tokens=tokens, targets=targets)
            scaler.scale(loss / microbatches).backward()
            parts.append(loss.item())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(sum(parts) / microbatches)
    return Run(losses, [], model.state_dict())


def assert_same_bits(found: Run, wanted: Run) -> None:
    assert found.losses == wanted.losses
    assert all(torch.equal(found.state[name], tensor) for name, tensor in wanted.state.items())


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_one_stage_is_the_plain_loop_to_the_last_bit(precision: str, microbatches: int) -> None:
    batches = batches_of_tokens(3)
    found = piped(gpt(), batches, 1, optimizer=sgd, microbatches=microbatches, precision=precision)
    wanted = plain_loop(gpt(), batches, sgd, precision=precision, microbatches=microbatches)
    assert found.losses == pytest.approx(wanted.losses, rel=1e-6)  # means of float32 losses, summed in another order
    assert all(torch.equal(found.state[name], tensor) for name, tensor in wanted.state.items())
    assert all(tensor.dtype is torch.float32 for tensor in found.state.values())


@pytest.mark.parametrize("tied", [False, True])
def test_four_stages_learn_as_one_process_does_in_bf16(tied: bool) -> None:
    batches = batches_of_tokens(4) * 5
    options: dict[str, Any] = {"optimizer": adamw, "max_grad_norm": 1.0, "precision": "bf16"}
    found = piped(gpt(tied=tied), batches, 4, microbatches=4, **options)
    wanted = unsplit(gpt(tied=tied), batches, adamw, loss=autocast_loss, max_grad_norm=1.0)
    assert found.losses == pytest.approx(wanted.losses, rel=2e-2)
    assert found.losses[-1] < 0.95 * found.losses[0]
    assert found.losses[0] - found.losses[-1] == pytest.approx(wanted.losses[0] - wanted.losses[-1], rel=5e-2)


@pytest.mark.parametrize("schedule", ["gpipe", "zb_h1", "zbv", "interleaved_1f1b"])
def test_schedules_give_equal_bits(schedule: str) -> None:
    """Of the same chunks: what crosses between chunks is rounded, also inside of a stage."""
    batches = batches_of_tokens(2)
    options: dict[str, Any] = {
        "optimizer": adamw,
        "max_grad_norm": 0.5,
        "microbatches": 4,
        "precision": "bf16",
        "balance": [2, 3, 2, 3],
    }
    chunks = 2 if schedule in ("zbv", "interleaved_1f1b") else 1
    found = piped(gpt(layers=6), batches, 4 // chunks, schedule=schedule, **options)
    assert_same_bits(found, piped(gpt(layers=6), batches, 4, **options))


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_in_fp16_no_cut_changes_a_bit(schedule: str) -> None:
    batches = batches_of_tokens(3)
    options: dict[str, Any] = {"optimizer": adamw, "max_grad_norm": 0.5, "microbatches": 4, "precision": "fp16"}
    found = piped(gpt(dropout=0.1), batches, 2, schedule=schedule, **options)
    assert_same_bits(found, piped(gpt(dropout=0.1), batches, 1, **options))


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_hugging_faces_models_and_their_checkpoints(name: str) -> None:
    """A checkpoint's second forward runs under autocast too."""
    family = FAMILIES[name]
    plain, saving = family.build(), family.build()
    saving.gradient_checkpointing_enable()  # type: ignore[operator]
    batch = family.batch(4)
    options: dict[str, Any] = {"optimizer": sgd, "microbatches": 2, "precision": "bf16"}
    runs = [piped(model, [batch] * 2, 3, **options) for model in (plain, saving)]
    if name == "llama":  # the unsplit T5 has other bits with checkpoints: its mask then requires a gradient
        assert_same_bits(*runs)
    for model, found in zip((plain, saving), runs, strict=True):
        wanted = unsplit(model, [batch] * 2, sgd, loss=lambda model, batch: autocast_output(model, batch).loss)
        assert found.losses == pytest.approx(wanted.losses, rel=2e-2)
        for weight, tensor in wanted.state.items():
            assert relative(found.state[weight], tensor) < 2e-2, weight


def autocast_output(model: nn.Module, batch: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return model(**batch)


def test_evaluation_and_prediction_run_in_the_same_precision() -> None:
    """Nothing has a gradient there, so nothing is rounded on the way: four stages are one."""
    model, (batch,) = gpt().eval(), batches_of_tokens(1)
    with trainer_of(model, 4, example=batch, precision="bf16", microbatches=2) as trainer:
        loss = trainer.evaluate([batch])["loss"]
        (outputs,) = trainer.predict([{"tokens": batch["tokens"]}])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert loss == pytest.approx(sum(model(*parts).item() for parts in _halves(batch)) / 2, rel=1e-6)
        wanted = torch.cat([model(tokens) for tokens, _ in _halves(batch)])
    assert outputs.dtype is wanted.dtype is torch.bfloat16
    assert torch.equal(outputs, wanted)


def _halves(batch: dict[str, Tensor]) -> list[tuple[Tensor, ...]]:
    return list(zip(batch["tokens"].chunk(2), batch["targets"].chunk(2), strict=True))


def test_what_crosses_stages_has_half_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    send = MemoryTransport.send

    def noted(self: MemoryTransport, to: int, tensors: Sequence[Tensor]) -> None:
        sent.append(sum(t.nbytes for t in tensors if t.dtype is not torch.bool))
        send(self, to, tensors)

    monkeypatch.setattr(MemoryTransport, "send", noted)
    (batch,) = batches_of_tokens(1)
    bytes_of: dict[str, tuple[int, int, int]] = {}
    for precision in ("fp32", "bf16", "fp16"):
        sent.clear()
        with trainer_of(gpt(), 2, example=batch, precision=precision, microbatches=2) as trainer:
            first, last = trainer.plan().stages
            assert (f"{precision}: forwards under autocast" in str(trainer.plan())) == (precision != "fp32")
            trainer.train_step(batch)
        bytes_of[precision] = (first.sends_bytes, first.received_bytes + last.received_bytes, sum(sent))
    stream = 4 * 12 * 16 * 4  # a microbatch of 4 samples, 12 tokens, width 16, in float32
    assert bytes_of["fp32"] == bytes_of["fp16"] == (stream, 3 * stream, 4 * stream)
    assert bytes_of["bf16"] == (stream // 2, 3 * stream // 2, 2 * stream)


class Block(nn.Module):
    """The gradient of a sample whose flag is 0 is NaN, its output is not."""

    def __init__(self, fragile: bool) -> None:
        super().__init__()
        self.linear, self.fragile = nn.Linear(6, 6), fragile

    def forward(self, h: Tensor, flag: Tensor) -> Tensor:
        h = torch.tanh(self.linear(h)).float()  # small squares would vanish in float16
        return h + (flag[:, None] * h.square()).sqrt() if self.fragile else h


class Fragile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(number == 2) for number in range(4))

    def forward(self, x: Tensor, y: Tensor, flag: Tensor, shift: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, flag)
        return nn.functional.mse_loss(x.float(), y) + shift.mean()  # which has no part in any gradient


def fragile_batch(*, flag: float = 1.0, shift: float = 0.0) -> dict[str, Tensor]:
    """Eight samples; what is said is said of the sixth."""
    noise = torch.Generator().manual_seed(3)
    batch = {"x": torch.randn(8, 6, generator=noise), "y": torch.full((8, 6), 0.5)}
    batch |= {"flag": torch.ones(8), "shift": torch.zeros(8)}
    batch["flag"][5], batch["shift"][5] = flag, shift
    return batch


def fragile(precision: str, **options: Any) -> PipelineTrainer:
    more = {"optimizer": sgd, "microbatches": 4, "precision": precision, **options}
    return trainer_of(Fragile(), 4, example=fragile_batch(), **more)


class Counting(torch.optim.SGD):
    """Notes each step by the first of its parameters."""

    def __init__(self, named: Any, steps: list[str]) -> None:
        self.first, self.steps = next(iter(named))[0], steps
        super().__init__(named, lr=0.1)

    def step(self, closure: Any = None) -> Any:
        self.steps.append(self.first)
        return super().step(closure)


@pytest.mark.parametrize("max_norm", [None, 1.0], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_nan_gradient_is_one_error_that_names_its_parameter(precision: str, max_norm: float | None) -> None:
    steps: list[str] = []
    with fragile(precision, max_grad_norm=max_norm, optimizer=lambda named: Counting(named, steps)) as trainer:
        trainer.train_step(fragile_batch())
        steps.clear()
        with pytest.raises(
            NonFiniteError, match=r"stage 2, step 1: the gradient of blocks\.2\.linear\.bias has .* nan;"
        ):
            trainer.train_step(fragile_batch(flag=0.0))
        with pytest.raises(RuntimeError, match="shut down"):
            trainer.train_step(fragile_batch())
    assert steps == ([] if max_norm else ["blocks.3.linear.weight"])  # the last stage has no NaN and waits for nobody


@pytest.mark.parametrize("weight", ["samples", "targets"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_one_error_that_names_its_microbatch(value: float, weight: str) -> None:
    steps: list[str] = []
    options = {"microbatch_weight": weight, "optimizer": lambda named: Counting(named, steps)}
    with fragile("fp32", **options) as trainer:
        steps.clear()
        with pytest.raises(NonFiniteError) as caught:
            trainer.train_step(fragile_batch(shift=value))
    assert not steps
    error = caught.value
    assert (error.step, error.stage, error.microbatch, error.parameter) == (0, 3, 2, None)
    assert f"the loss of microbatch 2 is {value}; no stage has updated its weights" in str(error)


def test_in_fp16_a_step_is_skipped_on_all_ranks_together() -> None:
    def halving(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    with fragile("fp16", optimizer=adamw, lr_scheduler=halving) as trainer:
        taken = trainer.train_step(fragile_batch())
        assert (taken["skipped"], taken["loss_scale"], taken["non_finite"]) == (False, 65536.0, None)
        before = trainer.state_dict()
        gradient = trainer.train_step(fragile_batch(flag=0.0))
        loss = trainer.train_step(fragile_batch(shift=math.nan))
        assert all(torch.equal(before[name], tensor) for name, tensor in trainer.state_dict().items())
        after = trainer.train_step(fragile_batch())
        changed = trainer.state_dict()
    assert (gradient["skipped"], gradient["loss_scale"]) == (True, 65536.0)
    assert gradient["non_finite"] == "stage 2, the gradient of blocks.2.linear.bias"
    assert math.isfinite(gradient["loss"])
    assert (loss["skipped"], loss["loss_scale"]) == (True, 32768.0)
    assert loss["non_finite"] == "stage 3, the loss of microbatch 2"
    assert (after["skipped"], after["loss_scale"]) == (False, 16384.0)
    assert [m["lr"] for m in (taken, gradient, loss, after)] == [1e-2, 5e-3, 5e-3, 5e-3]
    assert not any(torch.equal(before[name], tensor) for name, tensor in changed.items())


def test_where_no_scale_helps_there_is_an_error() -> None:
    with fragile("fp16") as trainer:
        for _ in range(29):
            assert trainer.train_step(fragile_batch(flag=0.0))["skipped"]
        with pytest.raises(NonFiniteError, match=r"30 steps in a row.* take precision='bf16'"):
            trainer.train_step(fragile_batch(flag=0.0))


@pytest.mark.parametrize("options", [{"balance": "time"}, {"schedule": "auto"}], ids=["time", "auto"])
def test_a_callable_is_built_timed_and_trained_in_bf16(options: dict[str, Any]) -> None:
    batches = batches_of_tokens(2)
    more: dict[str, Any] = {"optimizer": sgd, "microbatches": 4, "precision": "bf16", "datasets": {"train": batches}}
    with trainer_of(gpt, 2, **more, **options) as trainer:  # type: ignore[arg-type]
        wanted = unsplit_callable(trainer, batches)
        found = [trainer.train_step(batch)["loss"] for batch in batches]
    assert found == pytest.approx(wanted, rel=2e-2)


def unsplit_callable(trainer: PipelineTrainer, batches: Sequence[Any]) -> list[float]:
    model = gpt()
    model.load_state_dict(trainer.state_dict())
    return unsplit(model, batches, sgd, loss=autocast_loss).losses


class Mixed(nn.Module):
    """Runs under autocast alone: a frozen bfloat16 layer feeds trained float32 ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(6, 6, dtype=torch.bfloat16).requires_grad_(False)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.base(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return nn.functional.mse_loss(x.float(), y)


def test_a_model_that_runs_under_autocast_alone() -> None:
    batch = {name: fragile_batch()[name] for name in "xy"}
    found = piped(Mixed(), [batch] * 2, 2, optimizer=sgd, microbatches=2, precision="bf16")
    wanted = unsplit(Mixed(), [batch] * 2, sgd, loss=autocast_loss)
    assert found.losses == pytest.approx(wanted.losses, rel=2e-2)
    with pytest.raises(RuntimeError, match="dtype"):
        trainer_of(Mixed(), 2, example=batch)


def test_a_small_term_that_no_rule_splits_is_refused_as_in_float32() -> None:
    """Rounding of bfloat16 would hide it; so the rule is probed in float32."""

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        outputs = outputs.float()
        return outputs.square().mean() + 1e-4 * outputs.mean(0).square().sum()

    batch = {"tokens": batches_of_tokens(1)[0]["tokens"]}
    with pytest.raises(BatchError, match="compares samples with each other"):
        trainer_of(gpt(), 2, example=batch, loss=loss, precision="bf16")


def test_in_fp16_a_refused_batch_leaves_the_scale_as_it_is() -> None:
    (batch,) = batches_of_tokens(1)
    empty = {**batch, "targets": torch.full_like(batch["targets"], -100)}
    with trainer_of(gpt(), 2, example=batch, optimizer=sgd, microbatches=2, precision="fp16") as trainer:
        with pytest.raises(BatchError, match="no microbatch of the batch has a valid target"):
            trainer.train_step(empty)
        metrics = trainer.train_step(batch)
    assert (metrics["loss_scale"], metrics["skipped"]) == (65536.0, False)


def test_weights_to_train_in_bfloat16_are_refused() -> None:
    (batch,) = batches_of_tokens(1)
    with pytest.raises(ValueError, match=r"precision='bf16' trains weights in float32, but .* is torch\.bfloat16"):
        trainer_of(gpt().bfloat16(), 2, example=batch, precision="bf16")


@pytest.mark.slow
def test_on_ray_the_bits_are_the_same(ray_session: Session) -> None:
    batches = batches_of_tokens(2)
    for precision in ("bf16", "fp16"):
        options: dict[str, Any] = {"optimizer": adamw, "microbatches": 4, "precision": precision}
        found = piped(gpt(), batches, 2, backend="ray", **options)
        assert_same_bits(found, piped(gpt(), batches, 2, **options))


@pytest.mark.slow
@pytest.mark.parametrize("max_norm", [None, 1.0], ids=["unclipped", "clipped"])
def test_on_ray_a_nan_is_one_error_too(ray_session: Session, max_norm: float | None) -> None:
    with fragile("bf16", max_grad_norm=max_norm, backend="ray") as trainer:
        trainer.train_step(fragile_batch())
        with pytest.raises(NonFiniteError, match=r"stage 2, step 1: the gradient of blocks\.2\.linear\.bias has"):
            trainer.train_step(fragile_batch(flag=0.0))


@pytest.mark.slow
def test_on_ray_a_step_is_skipped_together_too(ray_session: Session) -> None:
    with fragile("fp16", backend="ray") as trainer:
        before = trainer.state_dict() if trainer.train_step(fragile_batch())["skipped"] is False else {}
        skipped = trainer.train_step(fragile_batch(flag=0.0))
        after = trainer.state_dict()
        assert (skipped["skipped"], trainer.train_step(fragile_batch())["loss_scale"]) == (True, 32768.0)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
