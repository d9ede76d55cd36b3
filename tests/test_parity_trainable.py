"""Models that train in part, against the unsplit model: what is frozen, what is unused, and what then travels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training import Run, piped, relative, trainer_of, unsplit

from raypipe import StageError
from raypipe.driver.cluster import Session
from raypipe.model.weight_queue import run_backward
from raypipe.stage import compute, losses
from raypipe.transport.memory import MemoryTransport

WIDTH, WORDS = 8, 13
sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)
adamw = functools.partial(torch.optim.AdamW, lr=1e-2, eps=1e-4, weight_decay=0.1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Tower(nn.Module):
    """Four blocks; ``side`` is called and its result used only if ``aided``, ``spare`` is never called."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.side = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.register_buffer("shift", torch.linspace(0, 1, WIDTH))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.spare = nn.Linear(WIDTH, WIDTH)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, labels: Tensor, aided: bool = False) -> dict[str, Tensor]:
        x = self.embed(ids)
        side = self.side(x)
        for block in self.blocks:
            x = block(x * self.scale)
        logits = self.head(x + self.shift)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        if aided:
            loss = loss + F.cross_entropy(side.flatten(0, 1), torch.where(labels < WIDTH, labels, 0).flatten())
        return {"loss": loss, "side": side}


class LoRA(nn.Module):
    """A linear layer that is frozen, and a small product beside it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / 2)
        self.b = nn.Parameter(torch.randn(base.out_features, rank) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T  # type: ignore[no-any-return]


def adapted(*blocks: int) -> Tower:
    model = Tower().requires_grad_(False)
    for number in blocks:
        block: Any = model.blocks[number]
        block.up, block.down = LoRA(block.up), LoRA(block.down)
    return model


def frozen(*names: str, tied: bool = False) -> Tower:
    model = Tower(tied)
    for name in names:
        found = model.get_parameter(name) if name == "scale" else model.get_submodule(name)
        found.requires_grad_(False)
    return model


def without_scale(*names: str) -> Tower:
    """What stands before these too."""
    return frozen("scale", "side", *names)


FIRST = ("embed", "blocks.0")
MODELS: dict[str, Callable[[], Tower]] = {
    "nothing-frozen": Tower,
    "first-frozen": lambda: without_scale(*FIRST),
    "all-but-head": lambda: without_scale("embed", "blocks"),
    "last-frozen": lambda: frozen("blocks.1", "blocks.2", "blocks.3", "head", "scale"),
    "middle-frozen": lambda: frozen("blocks.1", "blocks.2"),
    "one-tensor": lambda: adapted().requires_grad_(False),
    "lora-last": lambda: adapted(3),
    "lora-all": lambda: adapted(0, 1, 2, 3),
    "tied": lambda: Tower(tied=True),
    "tied-and-frozen": lambda: frozen("embed", tied=True),
}


def model_of(name: str) -> Tower:
    model = MODELS[name]()
    if name == "one-tensor":
        block: Any = model.blocks[2]
        block.norm.weight.requires_grad_(True)
    return model


def batches(count: int, samples: int = 6, length: int = 5) -> list[dict[str, Tensor]]:
    noise = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        ids, labels = (torch.randint(0, WORDS - 1, (samples, length), generator=noise) for _ in range(2))
        made.append(
            {"ids": ids, "labels": labels.masked_fill(torch.rand(samples, length, generator=noise) < 0.3, -100)}
        )
    return made


def assert_same(found: Run, wanted: Run, model: nn.Module) -> None:
    """Losses, norms and weights of the unsplit model; what it left alone is left alone, bit for bit."""
    assert found.losses == pytest.approx(wanted.losses, rel=1e-6, abs=0)
    assert found.norms == pytest.approx(wanted.norms, rel=1e-5, abs=0)
    for name, before in model.state_dict().items():
        if torch.equal(wanted.state[name], before):
            assert torch.equal(found.state[name], before), name
        else:
            moved = wanted.state[name] - before
            assert relative((found.state[name] - before).float(), moved.float()) < 1e-4, name


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    found: Tensor = model(**batch)["loss"]
    return found


def assert_trains_alike(model: nn.Module, given: list[Any], stages: int, **options: Any) -> None:
    bound = {"max_grad_norm": options.pop("max_grad_norm", None)}
    optimizer = options.pop("optimizer", sgd)
    wanted = unsplit(model, given, optimizer, loss=own_loss, **bound)
    found = piped(model, given, stages, optimizer=optimizer, **{"microbatches": 3, **bound, **options})
    assert_same(found, wanted, model)


@pytest.mark.parametrize(
    "stages", [1, pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", MODELS)
def test_training_in_part_is_that_of_the_unsplit_model(name: str, stages: int) -> None:
    for optimizer, schedule in ((sgd, "gpipe"), (adamw, "1f1b")):
        options: dict[str, Any] = {"optimizer": optimizer, "schedule": schedule, "max_grad_norm": 0.5}
        assert_trains_alike(model_of(name), batches(3), stages, **options)


@pytest.mark.parametrize("stages", [1, 3, 4])
def test_a_branch_that_some_batches_use(stages: int) -> None:
    """Before its first use it has no gradient and keeps its value; later its momentum goes on only where it is used."""
    given = [{**batch, "aided": number in (1, 3)} for number, batch in enumerate(batches(5))]
    for optimizer in (sgd, adamw):
        assert_trains_alike(Tower(), given, stages, optimizer=optimizer)


class Choosing(Block):
    """A second way for samples with the last word, in code that fakes cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.rare = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[..., 0] > 50
        x = super().forward(x)
        if chosen.any():
            x = torch.where(chosen[..., None], x + torch.tanh(self.rare(x)), x)
        return x


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_a_weight_that_only_samples_without_targets_use(stages: int) -> None:
    """Their microbatch weighs nothing: the unsplit model has a gradient of zeros there, and none in other batches."""
    model = Tower()
    model.blocks = nn.ModuleList(Choosing() for _ in range(4))
    with torch.no_grad():
        model.embed.weight[WORDS - 1, 0] = 100.0
    given = batches(4)
    given[1]["ids"][2:4, 1] = WORDS - 1
    given[1]["labels"][2:4] = -100
    given[2]["ids"][5, 1] = WORDS - 1
    assert_trains_alike(model, given[:2], stages)
    moved = unsplit(model, given[:2], sgd, loss=own_loss).state["blocks.3.rare.weight"]
    assert not torch.equal(moved, model.state_dict()["blocks.3.rare.weight"])
    assert_trains_alike(model, given, stages)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, list[Tensor]]]:
    """Every message between stages: from, to, tensors."""
    messages: list[tuple[int, int, list[Tensor]]] = []
    plain = MemoryTransport.send

    def send(self: MemoryTransport, to: int, tensors: Any) -> None:
        messages.append((self.rank, to, list(tensors)))
        plain(self, to, tensors)

    monkeypatch.setattr(MemoryTransport, "send", send)
    return messages


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every run of autograd, by its number of roots."""
    runs: list[int] = []

    def backward(roots: Any, *args: Any, **kwargs: Any) -> Any:
        runs.append(len(roots))
        return run_backward(roots, *args, **kwargs)

    for module in (compute, losses):
        monkeypatch.setattr(module, "run_backward", backward)
    return runs


def requires_inputs(model: Tower) -> Tower:
    """What ``enable_input_require_grads`` of Hugging Face does."""
    model.embed.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    return model


@pytest.mark.parametrize(
    ("make", "links"),
    [
        (Tower, {(1, 0), (2, 1), (3, 2)}),
        (lambda: adapted(3), set()),
        (lambda: requires_inputs(adapted(3)), set()),
        (lambda: requires_inputs(adapted(2)), {(3, 2)}),
        (lambda: without_scale(*FIRST, "blocks.1", "blocks.2"), set()),
        (lambda: without_scale(*FIRST), {(3, 2), (2, 1)}),
    ],
    ids=["all", "adapter-on-the-last", "inputs-require-grad", "adapter-before-the-last", "two-trained", "first-frozen"],
)
def test_no_gradient_goes_to_stages_that_need_none(
    make: Callable[[], Tower], links: set[tuple[int, int]], sent: list[Any], backwards: list[int]
) -> None:
    model, given = make(), batches(1)
    balance = [3, 1, 1, 2]  # the embedding, the branch and a block; a block; a block; a block and the head
    found = piped(model, given, 4, optimizer=sgd, microbatches=2, balance=balance)
    back = [(source, to) for source, to, _ in sent if to < source]
    assert set(back) == links
    assert len(back) == 2 * len(links)
    assert len(backwards) == 2 * (1 + len(links))  # the last stage's own, and one where a gradient comes
    assert len([1 for source, to, _ in sent if to > source]) == 2 * 3
    assert_same(found, unsplit(model, given, sgd, loss=own_loss), model)


def test_stages_without_an_optimizer_report_the_others_rate() -> None:
    """Nothing is built for them, the global norm counts what is trained, and the scheduler goes on."""
    made: list[list[str]] = []

    def optimizer(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        made.append([name for name, _ in named])
        return sgd(named)

    halving = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    with trainer_of(
        adapted(3), 4, optimizer=optimizer, lr_scheduler=halving, max_grad_norm=0.1, microbatches=2
    ) as trainer:
        metrics = [trainer.train_step(batch) for batch in batches(3)]
    assert [m["lr"] for m in metrics] == pytest.approx([0.1, 0.05, 0.025])
    assert all(m["grad_norm"] > 0.1 for m in metrics)
    adapters = [f"blocks.3.{layer}.{part}" for layer in ("up", "down") for part in "ab"]
    assert made == [adapters] * 3  # for the size of its state, on stand-ins, on the last stage


@pytest.mark.ray
@pytest.mark.parametrize("name", ["lora-last", "tied-and-frozen"])
def test_training_in_part_over_ray(name: str, ray_session: Session) -> None:
    given = [{**batch, "aided": number == 1} for number, batch in enumerate(batches(3))]
    assert_trains_alike(model_of(name), given, 3, max_grad_norm=0.5, backend="ray")


def test_what_cannot_be_trained_is_refused_before_anything_starts() -> None:
    (batch,) = batches(1)
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient, so there is nothing to train"):
        trainer_of(Tower().requires_grad_(False), 2, example=batch)
    for hooked in ("register_hook", "register_post_accumulate_grad_hook"):
        model = Tower()
        getattr(model.head.weight, hooked)(lambda given: None)
        with pytest.raises(ValueError, match=r"head\.weight has a hook on its gradient"):
            trainer_of(model, 2, example=batch)
    model = Tower().requires_grad_(False)
    model.spare.requires_grad_(True)
    with trainer_of(model, 2) as trainer, pytest.raises(StageError, match="the loss does not require a gradient"):
        trainer.train_step(batch)
    with trainer_of(Tower().requires_grad_(False), 2) as trainer:
        assert len(list(trainer.predict([batch]))) == 1


class Normed(Tower):
    """With a BatchNorm, whose buffers a training forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks.insert(1, nn.Sequential(nn.Linear(WIDTH, WIDTH), Swapped(WIDTH)))


class Swapped(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def test_batch_norm_is_refused_frozen_or_of_the_microbatch() -> None:
    given = batches(2)
    with pytest.raises(ValueError, match=r"blocks\.1\.1 is a Swapped, whose statistics over a microbatch"):
        piped(Normed(), given, 2, microbatches=2)
    model = Normed().train()
    model.blocks[1].eval()
    with trainer_of(model, 3, microbatches=3, optimizer=sgd) as trainer:
        losses, state = [trainer.train_step(batch)["loss"] for batch in given], trainer.state_dict()
    whole = Normed().train()
    whole.blocks[1].eval()
    made = sgd(whole.named_parameters())
    for batch, found in zip(given, losses, strict=True):
        loss = own_loss(whole, batch)
        loss.backward()
        made.step()
        made.zero_grad()
        assert found == pytest.approx(loss.item(), rel=1e-6)
    wanted = whole.state_dict().items()
    assert all(relative(state[name].float(), tensor.float()) < 1e-5 for name, tensor in wanted)
    assert_trains_alike(Normed(), given, 3, microbatches=1)
    accepted = piped(Normed(), given, 3, microbatches=2, batch_norm="microbatch", optimizer=sgd)
    assert accepted.state["blocks.1.1.num_batches_tracked"] == 4
