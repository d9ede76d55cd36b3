from __future__ import annotations

import copy
import functools
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training import batches_of_tokens, gpt, relative, trainer_of, unsplit

import raypipe
from raypipe import PipelineTrainer, StageError
from raypipe.driver.cluster import Session

adamw = functools.partial(torch.optim.AdamW, lr=1e-2)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(batch["tokens"])
    return found


def cross_entropy(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, 1), batch["targets"].flatten())


def accuracy(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return (outputs.argmax(-1) == batch["targets"]).float().mean()


# Evaluation and prediction


def test_evaluate_and_predict_are_those_of_the_unsplit_model_in_eval_mode() -> None:
    """Outputs in order, for batches of several sizes; the loss weighs each batch by its targets."""
    model = gpt(dropout=0.5)
    batches = [batches_of_tokens(1, samples, seed=samples)[0] for samples in (8, 3, 5)]
    batches[1]["targets"][0, 3:] = -100
    options: dict[str, Any] = {"forward": logits, "loss": cross_entropy, "metrics": {"accuracy": accuracy}}
    whole = copy.deepcopy(model).eval()
    with torch.no_grad():
        wanted = [whole(batch["tokens"]) for batch in batches]
        joined = torch.cat([o.flatten(0, 1) for o in wanted]), torch.cat([b["targets"].flatten() for b in batches])
        loss = nn.functional.cross_entropy(*joined)
    with trainer_of(model, 3, microbatches=4, **options) as trainer:
        outputs = list(trainer.predict(batches))
        metrics = trainer.evaluate(batches)
    assert [relative(o, w) < 1e-6 for o, w in zip(outputs, wanted, strict=True)] == [True] * 3
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert metrics["samples"] == 16
    shares = [accuracy(o, b).item() * len(o) for o, b in zip(wanted, batches, strict=True)]
    assert metrics["accuracy"] == pytest.approx(sum(shares) / 16)


def test_evaluate_and_predict_leave_training_as_it_was() -> None:
    batches = batches_of_tokens(4)
    options: dict[str, Any] = {"optimizer": adamw, "microbatches": 4}
    with trainer_of(gpt(dropout=0.3), 3, **options) as trainer:
        plain = [trainer.train_step(batch)["loss"] for batch in batches], trainer.state_dict()
    with trainer_of(gpt(dropout=0.3), 3, **options) as trainer:
        list(trainer.predict(batches[:1]))
        losses = []
        for batch in batches:
            before = trainer.state_dict()
            list(trainer.predict(batches[2:]))
            trainer.evaluate(batches)
            assert equal(trainer.state_dict(), before)
            losses.append(trainer.train_step(batch)["loss"])
        mixed = losses, trainer.state_dict()
    assert mixed[0] == plain[0]
    assert equal(mixed[1], plain[1])


class Pairs(nn.Module):
    """Outputs that are a tree."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        first = self.layers[0](x)
        second = self.layers[2](self.layers[1](first) * scale)
        return {"out": second, "parts": (first, [second.sum(1)]), "name": "tree"}


def test_predict_gives_the_models_own_trees() -> None:
    torch.manual_seed(0)
    model, batches = Pairs(), [{"x": torch.rand(n, 4), "scale": 0.5} for n in (5, 2)]
    with trainer_of(model, 3, microbatches=3) as trainer:
        found = list(trainer.predict(batches))
    for output, batch in zip(found, batches, strict=True):
        wanted = model(**batch)
        assert list(output) == list(wanted)
        assert output["name"] == "tree"
        torch.testing.assert_close(output["out"], wanted["out"].detach())
        torch.testing.assert_close(output["parts"][0], wanted["parts"][0].detach())
        torch.testing.assert_close(output["parts"][1][0], wanted["parts"][1][0].detach())


def test_training_after_a_prediction_finds_its_rule_of_weights() -> None:
    """A prediction asks for no loss; sums are summed nevertheless."""
    loss = functools.partial(nn.functional.mse_loss, reduction="sum")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    batch = torch.rand(6, 4), torch.rand(6, 4)
    with trainer_of(model, 2, loss=loss, microbatches=3) as trainer:
        list(trainer.predict([batch]))
        assert trainer.train_step(batch)["loss"] == pytest.approx(loss(model(batch[0]), batch[1]).item(), rel=1e-6)


# fit


def test_fit_trains_evaluates_and_leaves_its_results(home: Path) -> None:
    batches = batches_of_tokens(5)
    data = {"train": batches, "valid": batches[:2]}
    options: dict[str, Any] = {"optimizer": adamw, "microbatches": 4}
    with trainer_of(gpt(), 3, datasets=data, evaluate_every=4, log_every=3, **options) as trainer:
        result = trainer.fit(epochs=2)
        state = trainer.state_dict()
    wanted = unsplit(gpt(), batches * 2, adamw)
    frame = result.metrics_dataframe
    assert list(frame["step"]) == [0, 3, 6, 7, 9]
    assert list(frame["epoch"]) == [0, 0, 1, 1, 1]
    assert list(frame["loss"]) == pytest.approx([wanted.losses[step] for step in frame["step"]], rel=1e-5)
    assert list(frame["valid_loss"].notna()) == [False, True, False, True, False]
    assert result.metrics["loss"] == frame["loss"].iloc[-1]
    assert result.metrics["tokens"] == 96
    assert result.metrics["peak_in_flight"] == (3, 2, 1)
    assert relative(state["head.weight"], wanted.state["head.weight"]) < 1e-3
    folder = Path(result.path)
    assert folder.parent == home / "ray_results"
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.csv", "schedule.txt"]
    assert len((folder / "metrics.csv").read_text().splitlines()) == 1 + len(frame)
    drawing = (folder / "schedule.txt").read_text()
    assert "planned" in drawing
    assert "measured" in drawing


def test_a_second_fit_goes_on_with_steps_data_and_rows(home: Path) -> None:
    batches = batches_of_tokens(4)
    with trainer_of(gpt(dropout=0.2), 2, datasets={"train": batches}, optimizer=adamw, log_every=1) as trainer:
        trainer.fit(steps=6)
        whole = trainer.state_dict()
    with trainer_of(gpt(dropout=0.2), 2, datasets={"train": batches}, optimizer=adamw, log_every=1) as trainer:
        first = trainer.fit(steps=3)
        second = trainer.fit(steps=3)
        assert equal(trainer.state_dict(), whole)
    assert first.path == second.path
    assert list(second.metrics_dataframe["step"]) == list(range(6))
    assert list(second.metrics_dataframe["epoch"]) == [0, 0, 0, 0, 1, 1]


def test_a_run_config_says_where_the_results_lie(tmp_path: Path) -> None:
    from ray.train import RunConfig

    config = RunConfig(name="mine", storage_path=str(tmp_path / "runs"))
    with trainer_of(gpt(), 2, datasets={"train": batches_of_tokens(1)}, run_config=config) as trainer:
        assert trainer.fit().path == str(tmp_path / "runs" / "mine")


def test_two_runs_of_one_second_have_a_folder_each(home: Path) -> None:
    paths = set()
    for _ in range(3):
        with trainer_of(gpt(), 1, datasets={"train": batches_of_tokens(1)}) as trainer:
            paths.add(trainer.fit().path)
    assert len(paths) == 3


def test_what_was_logged_before_a_failure_is_kept(home: Path) -> None:
    def data() -> Iterator[Any]:
        yield from batches_of_tokens(3)
        raise OSError("the disk is gone")

    with trainer_of(gpt(), 2, datasets={"train": data}, log_every=1) as trainer, pytest.raises(StageError):
        trainer.fit()
    (rows,) = home.glob("ray_results/*/metrics.csv")
    assert [line.split(",")[1] for line in rows.read_text().splitlines()] == ["step", "0", "1", "2"]


class Samples(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"tokens": torch.arange(12) + index, "targets": torch.arange(12) + 1}


def columns(count: int) -> dict[str, list[list[int]]]:
    return {
        name: [[(row + column) % 61 for column in range(12)] for row in range(count)] for name in ("tokens", "targets")
    }


def as_list(folder: Path) -> Any:
    return batches_of_tokens(3)


def as_loader(folder: Path) -> Any:
    return DataLoader(Samples(), batch_size=4, shuffle=True)


def as_function(folder: Path) -> Any:
    def data() -> Iterator[Any]:
        yield from batches_of_tokens(3)

    return data


def as_iterator(folder: Path) -> Any:
    return iter(batches_of_tokens(3))


def as_parquet(folder: Path) -> Any:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table(columns(10)), folder / "a.parquet")
    return raypipe.data.parquet(folder, ["tokens", "targets"], 4)


@pytest.mark.parametrize("make", [as_list, as_loader, as_function, as_iterator, as_parquet])
def test_data_of_every_kind(make: Callable[[Path], Any], home: Path) -> None:
    """Three batches an epoch; the one that a plan looks at is not lost."""
    with trainer_of(gpt(), 2, datasets={"train": make(home)}, log_every=1) as trainer:
        trainer.plan()
        frame = trainer.fit().metrics_dataframe
    assert list(frame["step"]) == [0, 1, 2]
    assert frame["samples"].sum() in (10, 24)


@pytest.mark.ray
def test_data_of_ray(ray_session: Session, home: Path) -> None:
    import ray.data

    rows = [{name: column[row] for name, column in columns(10).items()} for row in range(10)]
    with trainer_of(gpt(), 2, datasets={"train": ray.data.from_items(rows)}, log_every=1, backend="ray") as trainer:
        result = trainer.fit()
    assert isinstance(result, ray.train.Result)
    assert result.metrics_dataframe["samples"].sum() == 10


# Weights


class Buffered(nn.Module):
    """Buffers of all kinds, a frozen layer, and a weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)])
        self.register_buffer("scale", torch.tensor([2.0]))
        self.register_buffer("hidden", torch.ones(1), persistent=False)
        self.layers[0].requires_grad_(False)
        self.layers[3].weight = self.layers[1].weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) * self.scale * self.hidden
        return x


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_the_state_loads_into_the_unsplit_model(stages: int) -> None:
    """The first of four stages has nothing to train, and needs no optimizer."""
    torch.manual_seed(0)
    model, batch = Buffered(), (torch.rand(6, 4), torch.rand(6, 4))
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    options: dict[str, Any] = {"loss": nn.functional.mse_loss, "optimizer": sgd, "microbatches": 1}
    with trainer_of(model, stages, **options) as trainer:
        for _ in range(2):
            trainer.train_step(batch)
        state = trainer.state_dict()
    wanted = unsplit(
        model, [batch] * 2, sgd, loss=lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1])
    )
    assert "hidden" not in state
    fresh = Buffered()
    fresh.load_state_dict(state, strict=True)
    for name, tensor in wanted.state.items():
        torch.testing.assert_close(state[name], tensor, msg=name)
    assert int(state["layers.2.num_batches_tracked"]) == 2
    assert torch.equal(state["layers.0.weight"], model.layers[0].weight)
    assert torch.equal(state["layers.1.weight"], state["layers.3.weight"])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_state_of_the_example_loads(tied: bool) -> None:
    with trainer_of(gpt(tied=tied), 3) as trainer:
        assert equal(trainer.state_dict(), gpt(tied=tied).state_dict())  # nothing has started yet
        trainer.train_step(batches_of_tokens(1)[0])
        state = trainer.state_dict()
    other = gpt(tied=tied, seed=1)
    other.load_state_dict(state, strict=True)
    assert equal(dict(other.state_dict()), state)
    assert not equal(state, gpt(tied=tied).state_dict())


def test_the_state_is_a_copy() -> None:
    batches = batches_of_tokens(2)
    with trainer_of(gpt(), 2, optimizer=adamw) as trainer:
        trainer.train_step(batches[0])
        kept = trainer.state_dict()
        before = {name: tensor.clone() for name, tensor in kept.items()}
        trainer.train_step(batches[1])
        assert equal(kept, before)
        for tensor in kept.values():
            tensor.zero_()
        assert any(tensor.any() for tensor in trainer.state_dict().values())


def test_after_shutdown_no_old_weights_pass_for_the_trained_ones() -> None:
    trainer = trainer_of(gpt(), 2)
    trainer.train_step(batches_of_tokens(1)[0])
    trainer.shutdown()
    trainer.shutdown()
    for call in (trainer.state_dict, lambda: trainer.train_step(batches_of_tokens(1)[0])):
        with pytest.raises(RuntimeError, match="was shut down"):
            call()


def snapshot(model: nn.Module) -> list[Any]:
    """Everything about a model that could change."""
    return [
        (name, module, type(module), module.training, sorted(vars(module)), list(module._forward_hooks))
        for name, module in model.named_modules()
    ] + [
        (name, id(tensor), tensor.requires_grad, tensor.grad is None, tensor.tolist())
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    ]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_users_model_and_random_numbers_are_never_changed(training: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4).eval(), nn.Dropout(0.5), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)
    )
    model.train(training)
    model[1].eval()
    model[1].requires_grad_(False)
    model[5].weight = model[3].weight
    batch = (torch.rand(6, 4), torch.rand(6, 4))
    before, random, threads = snapshot(model), torch.get_rng_state(), torch.get_num_threads()
    options: dict[str, Any] = {"loss": nn.functional.mse_loss, "batch_norm": "microbatch", "microbatches": 3}
    with trainer_of(model, 2, **options) as trainer:
        if not training:
            trainer.evaluate([batch])
        trainer.train_step(batch)
        list(trainer.predict([batch]))
        trainer.state_dict()
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads


# Failures


def fails_at(module: nn.Module, error: Exception, after: int) -> None:
    """Lets a module raise in its forward from call number ``after`` on."""
    module.forward = _Failing(module, error, after)  # type: ignore[method-assign]


class _Failing:
    def __init__(self, module: nn.Module, error: Exception, after: int) -> None:
        self.kind, self.error, self.left = type(module), error, after
        self.module = [module]

    def __call__(self, x: Tensor) -> Tensor:
        # The twin's and the probe's calls have fake tensors, or no gradients.
        if type(x) is Tensor and torch.is_grad_enabled():
            self.left -= 1
            if self.left < 0:
                raise self.error
        found: Tensor = self.kind.forward(self.module[0], x)
        return found


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_exception_of_the_model(stage: int) -> None:
    model = gpt()
    fails_at(model.blocks[stage], ZeroDivisionError("my own"), 5)  # step 1, microbatch 1 of 4
    batches = batches_of_tokens(3)
    with trainer_of(model, 3, balance=[3, 1, 3], microbatches=4) as trainer:
        trainer.train_step(batches[0])
        with pytest.raises(StageError, match="my own") as caught:
            trainer.train_step(batches[1])
    error = caught.value
    assert (error.stage, error.chunk, error.microbatch, error.step) == (stage, stage, 1, 1)
    assert error.action == f"{stage}F1"
    assert isinstance(error.cause, ZeroDivisionError)
    assert str(error).endswith("ZeroDivisionError: my own")
    assert error.__cause__ is None
    assert error.__suppress_context__


def test_an_exception_of_the_loss() -> None:
    calls: list[int] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError("my own")
        return nn.functional.mse_loss(outputs, targets)

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    batches = [(torch.rand(4, 4), torch.rand(4, 4))] * 2
    with trainer_of(model, 2, loss=loss, microbatches=4) as trainer:
        calls.extend([1] * 10)
        trainer.train_step(batches[0])
        calls.clear()  # planning and the first step are done
        with pytest.raises(StageError, match="my own") as caught:
            trainer.train_step(batches[1])
    assert (caught.value.stage, caught.value.action, caught.value.microbatch, caught.value.step) == (1, "1F1", 1, 1)


class FailingSGD(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        raise ZeroDivisionError("my own")


def test_an_exception_of_the_optimizer() -> None:
    with trainer_of(gpt(), 2, optimizer=FailingSGD) as trainer, pytest.raises(StageError, match="my own") as caught:
        trainer.train_step(batches_of_tokens(1)[0])
    assert (caught.value.action, caught.value.microbatch, caught.value.step) == ("optimizer", None, 0)


@pytest.mark.parametrize("good", [0, 2])
def test_an_exception_of_the_data(good: int, home: Path) -> None:
    def data() -> Iterator[Any]:
        yield from batches_of_tokens(good)
        raise ZeroDivisionError("my own")

    with trainer_of(gpt(), 2, datasets={"train": data}) as trainer, pytest.raises(StageError) as caught:
        trainer.fit()
    error = caught.value
    assert (error.stage, error.action, error.microbatch, error.step) == (0, "data", None, good)
    assert str(error).endswith("ZeroDivisionError: my own")
    assert isinstance(error.cause, ZeroDivisionError)


SCRIPT = """
import sys, time
sys.path[:0] = [{tests!r}, {examples!r}]
import torch
from training import batches_of_tokens, gpt
from raypipe import PipelineTrainer
def data():
    yield from batches_of_tokens(3)
    raise ZeroDivisionError("my own")
PipelineTrainer(gpt(), 2, datasets={{"train": data}}, backend="local").fit()
"""


def run_script(text: str, home: Path) -> subprocess.CompletedProcess[str]:
    tests = Path(__file__).parent
    text = text.format(tests=str(tests), examples=str(tests.parent / "examples"))
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120, check=False)


def test_the_users_traceback_is_the_last_on_the_screen(home: Path) -> None:
    done = run_script(SCRIPT, home)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1
    assert lines[-1] == "ZeroDivisionError: my own"
    assert lines[-2].strip() == 'raise ZeroDivisionError("my own")' or "in data" in lines[-2]
    assert sum("my own" in line for line in lines) <= 3


IMPORTS = """
import sys
sys.path[:0] = [{tests!r}, {examples!r}]
import raypipe.trainer
assert "ray" not in sys.modules, "import"
from training import batches_of_tokens, gpt
with raypipe.PipelineTrainer(gpt(), 2, datasets={{"train": batches_of_tokens(2)}}, backend="local") as trainer:
    result = trainer.fit()
    trainer.evaluate(batches_of_tokens(1))
assert "ray" not in sys.modules, "fit"
print(result.metrics["step"], len(result.metrics_dataframe))
"""


def test_the_local_backend_imports_no_ray(home: Path) -> None:
    done = run_script(IMPORTS, home)
    assert done.stdout.split() == ["1", "2"], done.stderr


# Over Ray


class Sleepy(nn.Module):
    """Fails in the second step, on whatever stage it is."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += torch.is_grad_enabled() and type(x) is Tensor
        if self.calls > 4:
            raise ZeroDivisionError("my own")
        found: Tensor = self.inner(x)
        return found


@pytest.mark.ray
def test_an_exception_over_ray_comes_within_five_seconds(ray_session: Session, home: Path) -> None:
    model = gpt()
    model.blocks[1] = Sleepy(model.blocks[1])
    trainer = trainer_of(
        model, 3, datasets={"train": batches_of_tokens(9)}, balance=[3, 1, 3], microbatches=4, backend="ray"
    )
    trainer.train_step(batches_of_tokens(1)[0])
    began = time.monotonic()
    with pytest.raises(StageError) as caught:
        trainer.fit()
    assert time.monotonic() - began < 5
    error = caught.value
    assert (error.stage, error.action, error.microbatch, error.step) == (1, "1F0", 0, 1)
    assert isinstance(error.cause, ZeroDivisionError)
    assert str(error).endswith("ZeroDivisionError: my own")


@pytest.mark.ray
def test_evaluation_and_prediction_over_ray(ray_session: Session, home: Path) -> None:
    """The same numbers as in one process, and a plan that is started only once."""
    batches = batches_of_tokens(3)
    found = []
    for backend in ("local", "ray"):
        options: dict[str, Any] = {"forward": logits, "loss": cross_entropy, "optimizer": adamw, "microbatches": 4}
        with trainer_of(gpt(dropout=0.2), 2, datasets={"train": batches}, backend=backend, **options) as trainer:
            trainer.fit()
            found.append((trainer.evaluate(batches)["loss"], list(trainer.predict(batches)), trainer.state_dict()))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))
    assert equal(found[0][2], found[1][2])


def test_the_help_names_every_argument() -> None:
    import inspect

    text = inspect.getdoc(PipelineTrainer) or ""
    for name in inspect.signature(PipelineTrainer).parameters:
        assert f"{name}:" in text, name


class Scaled(nn.Module):
    """Doubles a tensor that every microbatch shares, in place, before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 1)])

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        scale.mul_(2)
        for layer in self.layers:
            x = layer(x)
        return (x * scale).pow(2).mean()


def pairs(samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(samples)
    return torch.randn(samples, 4, generator=generator), torch.randint(3, (samples,), generator=generator)


def classifier(**options: Any) -> PipelineTrainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    settings = {"loss": nn.functional.cross_entropy, "microbatches": 4, "backend": "local", "quiet": True}
    return PipelineTrainer(model, 2, **{**settings, **options})


def test_what_a_microbatch_writes_into_a_shared_tensor_the_next_does_not_see() -> None:
    batch = {"x": torch.randn(8, 4), "scale": torch.tensor(0.5)}
    losses = []
    for microbatches in (1, 2, 4):
        torch.manual_seed(0)
        with PipelineTrainer(Scaled(), 2, microbatches=microbatches, backend="local", quiet=True) as trainer:
            losses.append(trainer.train_step(batch)["loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_a_bad_batch_in_predict_or_evaluate_leaves_the_trained_weights() -> None:
    with classifier() as trainer:
        trainer.train_step(pairs(8))
        with pytest.raises(ValueError, match="must be a dict"):
            list(trainer.predict([torch.randn(8, 4)]))
        x, y = pairs(8)
        padded = (x, torch.full_like(y, -100))
        assert math.isnan(trainer.evaluate([padded])["loss"])
        assert trainer.evaluate([padded, (x, y)])["loss"] == pytest.approx(trainer.evaluate([(x, y)])["loss"])
        assert trainer.train_step(pairs(8))["step"] == 1
        trainer.state_dict()


def test_an_abandoned_prediction_does_not_end_a_later_gang() -> None:
    with classifier() as trainer:
        outputs = trainer.predict([pairs(8), pairs(8), pairs(8)])
        next(outputs)
        first = trainer.train_step(pairs(8))["loss"]  # planned anew, with a loss: other ranks
        outputs.close()
        assert trainer.train_step(pairs(8))["loss"] < first


def test_a_schedule_object_serves_a_ragged_last_batch_too() -> None:
    with classifier(schedule=raypipe.schedule.build("1f1b", 2, 4), microbatches=None) as trainer:
        assert trainer.train_step(pairs(8))["microbatches"] == 4
        assert trainer.train_step(pairs(3))["microbatches"] == 3


def test_a_schedule_may_place_the_last_chunk_on_another_stage() -> None:
    straight = raypipe.schedule.build("gpipe", 2, 4)
    turned = raypipe.Schedule("turned", straight.programs[::-1], 4)
    with classifier(schedule=straight, microbatches=None) as one, classifier(schedule=turned, microbatches=None) as two:
        assert one.train_step(pairs(8))["loss"] == two.train_step(pairs(8))["loss"]
        states = one.state_dict(), two.state_dict()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert one.evaluate([pairs(8)]) == two.evaluate([pairs(8)])
        assert torch.equal(*(next(iter(trainer.predict([pairs(8)]))) for trainer in (one, two)))
