"""A pipeline against the unsplit model, and against itself however it is cut."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training import Run, batches_of_tokens, gpt, piped, relative, unsplit

from raypipe import BatchError
from raypipe.driver.cluster import Session

sgd = functools.partial(torch.optim.SGD, lr=1024.0)  # a power of two: the gradient is (before - after) / lr
momentum = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
# Attention's key bias has a gradient of rounding errors alone, which a small eps would blow up to full steps.
adamw = functools.partial(torch.optim.AdamW, lr=1e-2, eps=1e-4)


def assert_same_losses(found: Run, wanted: Run) -> None:
    assert found.losses == pytest.approx(wanted.losses, rel=1e-6, abs=0)
    assert found.norms == pytest.approx(wanted.norms, rel=1e-5, abs=0)


def assert_same_weights(found: Run, wanted: Run, tolerance: float = 1e-5) -> None:
    assert list(found.state) == list(wanted.state)
    for name, tensor in wanted.state.items():
        assert relative(found.state[name], tensor) < tolerance, name


def assert_same_gradients(model: nn.Module, batch: Any, stages: int, **options: Any) -> None:
    """One step of SGD from the unsplit model's gradient; ``unsplit_loss`` is how the unsplit model gets its loss."""
    loss = options.pop("unsplit_loss", lambda model, batch: model(**batch))
    whole = copy.deepcopy(model).train()
    value = loss(whole, batch)
    value.backward()
    found = piped(model, [batch], stages, optimizer=sgd, **options)
    assert found.losses[0] == pytest.approx(value.item(), rel=1e-6)
    biggest = max(float(p.grad.norm()) for p in whole.parameters() if p.grad is not None)
    for name, parameter in whole.named_parameters():
        if parameter.grad is not None:
            gradient = (model.state_dict()[name] - found.state[name]) / 1024.0
            # Relative to its own size, down to what is rounding error beside the others.
            bound = 1e-5 * max(float(parameter.grad.norm()), 1e-2 * biggest)
            assert float((gradient - parameter.grad).norm()) < bound, name


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_gradients_are_those_of_the_unsplit_model(tied: bool, stages: int, schedule: str) -> None:
    options = {"schedule": schedule, "microbatches": 4}
    assert_same_gradients(gpt(tied=tied), batches_of_tokens(1)[0], stages, **options)


@pytest.mark.parametrize("optimizer", [momentum, adamw], ids=["sgd", "adamw"])
@pytest.mark.parametrize("bound", [None, 0.05], ids=["free", "clipped"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_training_is_that_of_the_unsplit_model(tied: bool, bound: float | None, optimizer: Any) -> None:
    model, batches = gpt(tied=tied), batches_of_tokens(4)
    wanted = unsplit(model, batches, optimizer, max_grad_norm=bound)
    assert min(wanted.norms) > 0.05  # the bound binds in every step
    found = piped(model, batches, 3, optimizer=optimizer, max_grad_norm=bound, microbatches=4)
    assert_same_losses(found, wanted)
    assert_same_weights(found, wanted, 1e-4 if optimizer is adamw else 1e-5)


def test_clipping_changes_the_training() -> None:
    """So the test above can fail."""
    model, batches = gpt(), batches_of_tokens(2)
    free = piped(model, batches, 2, optimizer=momentum)
    clipped = piped(model, batches, 2, optimizer=momentum, max_grad_norm=0.05)
    assert free.norms[0] == clipped.norms[0]
    assert relative(clipped.state["head.weight"], free.state["head.weight"]) > 1e-3


@pytest.mark.parametrize(
    ("samples", "microbatches", "stages"),
    [(5, 4, 2), (7, 3, 4), (3, 8, 2), (2, 8, 4), (1, 4, 3), (8, 2, 4)],
    ids=["ragged", "ragged-7-in-3", "fewer-samples", "fewer-than-stages", "one-sample", "two-in-four-stages"],
)
def test_ragged_and_tiny_batches(samples: int, microbatches: int, stages: int) -> None:
    assert_same_gradients(gpt(), batches_of_tokens(1, samples)[0], stages, microbatches=microbatches)


def test_batches_of_many_sizes_in_one_run() -> None:
    batches = [
        batches_of_tokens(1, samples, length=length)[0] for samples, length in ((8, 12), (3, 12), (5, 7), (1, 9))
    ]
    wanted = unsplit(gpt(), batches, momentum)
    found = piped(gpt(), batches, 3, optimizer=momentum, microbatches=4)
    assert_same_losses(found, wanted)
    assert_same_weights(found, wanted)


def test_labels_padded_unevenly() -> None:
    """One microbatch has no valid target at all: its own loss would be NaN."""
    batch = batches_of_tokens(1)[0]
    for row, valid in enumerate((12, 1, 0, 0, 7, 12, 3, 2)):
        batch["targets"][row, valid:] = -100
    assert_same_gradients(gpt(), batch, 3, microbatches=4)
    assert_same_gradients(gpt(tied=True), batch, 2, microbatches=8, schedule="gpipe")


def pair(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return batch["tokens"], batch["targets"]


def flat(function: Callable[..., Tensor], **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, targets: function(logits.flatten(0, 1), targets.flatten(), **options)


def by_hand(logits: Tensor, targets: Tensor) -> Tensor:
    """A mean over samples without any loss function of PyTorch."""
    picked = logits.log_softmax(-1).gather(-1, targets[..., None])
    return -picked.sum((1, 2)).mean() / 12


@pytest.mark.parametrize(
    "loss",
    [
        flat(F.cross_entropy, weight=torch.linspace(0.1, 3.0, 61)),
        flat(F.cross_entropy, reduction="sum"),
        flat(F.cross_entropy, label_smoothing=0.1),
        by_hand,
        lambda logits, targets: F.mse_loss(logits, F.one_hot(targets, 61).float()),
    ],
    ids=["class-weights", "sum", "smoothed", "mean-by-hand", "mse"],
)
def test_losses_of_many_kinds(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert_same_gradients(
        gpt(),
        pair(batches_of_tokens(1, 7)[0]),
        3,
        loss=loss,
        microbatches=4,
        unsplit_loss=lambda model, batch: loss(model(batch[0]), batch[1]),
    )


def masked_mean(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    each = F.cross_entropy(logits.transpose(1, 2), batch["targets"], reduction="none")
    return (each * batch["mask"]).sum() / batch["mask"].sum()


def test_a_mean_over_a_mask_by_hand_is_refused_until_its_weights_are_given() -> None:
    batch = batches_of_tokens(1)[0]
    batch["mask"] = (torch.arange(12) < torch.tensor([12, 1, 4, 9, 7, 12, 3, 2])[:, None]).float()
    forward = {"forward": lambda model, batch: model(batch["tokens"]), "loss": masked_mean}
    with pytest.raises(BatchError, match="give microbatch_weight"):
        piped(gpt(), [batch], 2, **forward)
    assert_same_gradients(
        gpt(),
        batch,
        2,
        **forward,
        microbatch_weight=lambda microbatch: float(microbatch["mask"].sum()),
        microbatches=4,
        unsplit_loss=lambda model, batch: masked_mean(model(batch["tokens"]), batch),
    )


def a_run(stages: int, schedule: str, backend: str) -> Run:
    """Dropout on, clipping, a learning rate that changes, and a ragged last batch."""
    batches = [*batches_of_tokens(2), *batches_of_tokens(1, 5)]
    return piped(
        gpt(dropout=0.2),
        batches,
        stages,
        schedule=schedule,
        backend=backend,
        microbatches=4,
        optimizer=adamw,
        lr_scheduler=functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
        max_grad_norm=0.5,
    )


@pytest.fixture(scope="module")
def one_stage() -> Run:
    return a_run(1, "gpipe", "local")


def assert_bit_equal(found: Run, wanted: Run) -> None:
    assert found.losses == wanted.losses
    assert found.norms == wanted.norms
    for name, tensor in wanted.state.items():
        assert torch.equal(found.state[name], tensor), name


COMBINATIONS = [(stages, schedule) for stages in (1, 2, 3, 4) for schedule in ("gpipe", "1f1b")]


@pytest.mark.parametrize(("stages", "schedule"), COMBINATIONS)
def test_bit_equal_in_one_process(one_stage: Run, stages: int, schedule: str) -> None:
    assert_bit_equal(a_run(stages, schedule, "local"), one_stage)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("stages", "schedule"),
    [
        pytest.param(stages, schedule, marks=() if (stages, schedule) == (4, "1f1b") else pytest.mark.slow)
        for stages, schedule in COMBINATIONS
    ],
)
def test_bit_equal_over_ray(one_stage: Run, ray_session: Session, stages: int, schedule: str) -> None:
    assert_bit_equal(a_run(stages, schedule, "ray"), one_stage)


def test_dropout_was_on(one_stage: Run) -> None:
    without = piped(gpt(dropout=0.0), batches_of_tokens(1), 1, optimizer=adamw)
    assert without.losses[0] != one_stage.losses[0]
    again = piped(gpt(dropout=0.2), batches_of_tokens(1), 1, optimizer=adamw, microbatches=4, seed=1)
    assert again.losses[0] != one_stage.losses[0]


@pytest.mark.ray
def test_tied_weights_over_ray_stay_those_of_the_unsplit_model(ray_session: Session) -> None:
    model, batches = gpt(tied=True), batches_of_tokens(2)
    wanted = unsplit(model, batches, momentum, max_grad_norm=0.05)
    found = piped(model, batches, 3, backend="ray", optimizer=momentum, max_grad_norm=0.05, microbatches=4)
    assert_same_losses(found, wanted)
    assert_same_weights(found, wanted)
    assert torch.equal(found.state["head.weight"], found.state["embedding.weight"])
