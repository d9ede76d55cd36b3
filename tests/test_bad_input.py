"""What cannot be right is refused before anything starts, in one sentence that says what to change."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import batches_of_tokens, gpt

import raypipe
from raypipe import BatchError, PipelineTrainer
from raypipe.driver import ray_gang
from raypipe.options import NOT_YET
from raypipe.schedule import Auto

DATA = {"train": batches_of_tokens(2)}


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*args: Any, **options: Any) -> None:
        raise AssertionError("ranks were started")

    monkeypatch.setattr("raypipe.run.LocalGang", start)
    monkeypatch.setattr(ray_gang, "launch", start)


def refusal(work: Callable[[], Any], kind: type[Exception] = ValueError) -> str:
    """The one sentence of a refusal."""
    with pytest.raises(kind) as caught:
        work()
    text = str(caught.value)
    assert "\n" not in text
    assert not getattr(caught.value, "__notes__", [])
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return text


def fit(model: nn.Module | None = None, stages: Any = 2, **options: Any) -> Callable[[], Any]:
    """Builds a trainer and fits."""
    given = {"datasets": DATA, "quiet": True, **options}
    return lambda: PipelineTrainer(model if model is not None else gpt(), stages, **given).fit()


def assert_words(text: str, *words: str) -> None:
    for word in words:
        assert word in text, text


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"schedule": "zigzag"}, ValueError, ("zigzag", "1f1b", "gpipe")),
        ({"schedule": 3}, TypeError, ("schedule is 3", "must be")),
        ({"schedule": Auto}, TypeError, ("schedule is <class", "an Auto()")),
        ({"stages": 0}, ValueError, ("stages is 0", "at least 1")),
        ({"stages": 2.0}, TypeError, ("stages is 2.0", "whole number")),
        ({"stages": True}, TypeError, ("stages is True", "whole number")),
        ({"stages": "2"}, TypeError, ("stages is '2'", "whole number")),
        ({"microbatches": 0}, ValueError, ("microbatches is 0", "at least 1")),
        ({"microbatches": 4.0}, TypeError, ("microbatches is 4.0", "whole number")),
        ({"threads": 0}, ValueError, ("threads is 0", "at least 1")),
        ({"log_every": 0}, ValueError, ("log_every is 0", "at least 1")),
        ({"seed": -1}, ValueError, ("seed is -1", "at least 0")),
        ({"max_grad_norm": 0}, ValueError, ("max_grad_norm is 0", "above 0")),
        ({"max_grad_norm": "1"}, TypeError, ("max_grad_norm is '1'", "number")),
        ({"step_timeout_s": 0}, ValueError, ("step_timeout_s is 0", "above 0")),
        ({"backend": "mpi"}, ValueError, ("backend is 'mpi'", "'ray' or 'local'")),
        ({"batch_norm": "sync"}, ValueError, ("batch_norm is 'sync'", "'microbatch'")),
        ({"optimizer": 0.1}, TypeError, ("optimizer is 0.1", "torch.optim.SGD")),
        ({"loss": "mse"}, TypeError, ("loss is 'mse'", "callable")),
        ({"metrics": [len]}, TypeError, ("metrics is", "dict")),
        ({"balance": "luck"}, ValueError, ("luck", "flops", "parameters")),
        ({"balance": 3}, TypeError, ("balance is a int", "list")),
        ({"microbatch_weight": "tokens"}, ValueError, ("tokens", "targets", "samples", "sum")),
        ({"units": "blocks.*"}, TypeError, ("units is 'blocks.*'", "list")),
        ({"units": ["layers.*"]}, ValueError, ("layers.*", "matches no module", "blocks.0")),
        ({"data_parallel": 0}, ValueError, ("data_parallel is 0", "at least 1")),
        ({"shard": "weights"}, ValueError, ("shard is 'weights'", "'optimizer'")),
        ({"shard": "parameters", "data_parallel": 2}, ValueError, ("shard='parameters'", "not built yet", "optimizer")),
        (
            {"compile": True, "tensor_parallel": 2, "backend": "ray"},
            ValueError,
            ("compile=True", "leave one of the two out"),
        ),
        ({"shard": "optimizer"}, ValueError, ("data_parallel is 1", "leave shard out")),
        ({"evaluate_every": 5}, ValueError, ("evaluate_every=5", "valid")),
        ({"precision": "fp8"}, ValueError, ("precision is 'fp8'", "'fp32', 'bf16', 'fp16'")),
        ({"stage": 4}, TypeError, ("no argument 'stage'",)),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_arguments(options: dict[str, Any], kind: type[Exception], words: tuple[str, ...]) -> None:
    options = dict(options)
    assert_words(refusal(fit(stages=options.pop("stages", 2), **options), kind), *words)


LATER = {
    "checkpoint_every": 100,
    "snapshot_every": 10,
    "elastic": True,
}


@pytest.mark.parametrize("name", NOT_YET)
def test_arguments_that_come_later(name: str) -> None:
    assert_words(refusal(fit(**{name: LATER[name]})), name, repr(LATER[name]), "not built yet", "leave it out")
    PipelineTrainer(gpt(), 2, **{name: NOT_YET[name]})


@pytest.mark.parametrize(
    ("call", "instead"),
    [
        (lambda trainer: trainer.save("here"), "state_dict"),
        (lambda trainer: trainer.load("here"), "load_state_dict"),
    ],
    ids=["save", "load"],
)
def test_methods_that_come_later(call: Callable[[PipelineTrainer], Any], instead: str) -> None:
    text = refusal(lambda: call(PipelineTrainer(gpt(), 2)), NotImplementedError)
    assert_words(text, "not built yet", instead)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"failure_config": {"max_failures": 2}}, ("failure_config", "max_failures=2")),
        ({"checkpoint_config": {"num_to_keep": 3}}, ("checkpoint_config", "num_to_keep=3")),
        ({"callbacks": None}, ("callbacks",)),
        ({"storage_path": "s3://bucket/runs"}, ("s3://bucket/runs", "local path")),
    ],
    ids=["failures", "checkpoints", "callbacks", "storage"],
)
def test_a_run_config_that_asks_for_more(fields: dict[str, Any], words: tuple[str, ...]) -> None:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, UserCallback

    made: dict[str, Any] = dict(fields)
    if "failure_config" in made:
        made["failure_config"] = FailureConfig(**made["failure_config"])
    if "checkpoint_config" in made:
        made["checkpoint_config"] = CheckpointConfig(**made["checkpoint_config"])
    if "callbacks" in made:
        made["callbacks"] = [UserCallback()]
    assert_words(refusal(fit(run_config=RunConfig(**made))), "run_config", *words, "yet")


def test_a_run_config_of_another_kind() -> None:
    assert_words(refusal(fit(run_config={"name": "x"}), TypeError), "run_config is a dict", "ray.train.RunConfig")


def test_a_model_that_is_none() -> None:
    assert_words(refusal(lambda: PipelineTrainer("gpt2", 2), TypeError), "model is a str", "nn.Module")
    assert_words(refusal(lambda: PipelineTrainer(nn.Linear, 2), TypeError), "the class Linear", "callable")


def test_no_data() -> None:
    trainer = PipelineTrainer(gpt(), 2)
    assert_words(refusal(trainer.fit), "fit has no data", "datasets={'train'")
    assert_words(refusal(trainer.evaluate), "evaluate has no data", "'valid'")
    assert_words(refusal(trainer.plan), "plan has no batch", "example=")


@pytest.mark.parametrize("empty", [[], lambda: iter(())], ids=["list", "generator"])
def test_an_empty_dataset(empty: Any) -> None:
    assert_words(refusal(fit(datasets={"train": empty})), "empty")


def test_datasets_of_another_kind() -> None:
    assert_words(refusal(fit(datasets=[1]), TypeError), "datasets is list", "'train'")
    assert_words(refusal(fit(datasets={"test": []}), TypeError), "test", "'train'")
    assert_words(refusal(fit(datasets={"train": DATA["train"][0]}), TypeError), "one batch", "list")


def test_a_batch_without_samples() -> None:
    batch = {name: tensor[:0] for name, tensor in DATA["train"][0].items()}
    assert_words(refusal(fit(datasets={"train": [batch]}), BatchError), "no samples", "at least one")


def test_an_uncertain_batch_dimension() -> None:
    batch = {"x": torch.rand(4, 3), "y": torch.rand(3, 4)}
    assert_words(refusal(fit(datasets={"train": [batch]}), BatchError), "uncertain", "batch_dims")


def test_a_batch_that_is_neither_dict_nor_pair() -> None:
    assert_words(refusal(fit(datasets={"train": [torch.rand(4, 3)]}), BatchError), "dict", "pair", "forward")


def pairs() -> dict[str, Any]:
    return {"train": [(torch.rand(8, 4), torch.rand(8, 4))]}


def mlp(*between: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), *between, nn.ReLU(), nn.Linear(4, 4))


def test_more_stages_than_units() -> None:
    text = refusal(fit(mlp(), 3, datasets=pairs(), loss=nn.functional.mse_loss))
    assert_words(text, "stages=3", "2 units", "at most 2")


@pytest.mark.parametrize(
    ("balance", "words"),
    [
        ([2, 2], ("sums to 4", "6 unit calls")),
        ([1, 2, 3], ("3 entries", "2 chunks")),
        ([6, 0], ("at least 1",)),
        ([2.0, 4.0], ("whole numbers",)),
    ],
    ids=str,
)
def test_a_balance_that_does_not_add_up(balance: list[Any], words: tuple[str, ...]) -> None:
    """Embedding, position, two blocks, norm, head."""
    assert_words(refusal(fit(gpt(layers=2), balance=balance)), "balance=", *words)


def test_no_loss() -> None:
    text = refusal(fit(mlp(), datasets=pairs()))
    assert_words(text, "a tensor of shape", "no loss", "loss(outputs, targets)")


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (functools.partial(nn.functional.mse_loss, reduction="none"), ("shape", "scalar", "average or sum")),
        (lambda outputs, targets: 1.0, ("a float", "scalar tensor")),
        (lambda outputs, targets: (outputs > 0).sum(), ("int64", "floating")),
    ],
    ids=["vector", "number", "integer"],
)
def test_a_loss_that_is_no_scalar(loss: Any, words: tuple[str, ...]) -> None:
    assert_words(refusal(fit(mlp(), datasets=pairs(), loss=loss)), "loss()", *words)


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    """Compares every sample with every other."""
    return nn.functional.cross_entropy(outputs @ targets.T, torch.arange(len(outputs)))


def test_a_loss_that_no_rule_of_weights_reproduces() -> None:
    text = refusal(fit(mlp(), datasets=pairs(), loss=contrastive), BatchError)
    assert_words(text, "at once", "apart", "microbatch_weight", "microbatches=1")


def test_batch_norm() -> None:
    text = refusal(fit(mlp(nn.BatchNorm1d(4)), datasets=pairs(), loss=nn.functional.mse_loss))
    assert_words(text, "1 is a BatchNorm1d", "batch_norm='microbatch'", ".eval()", "microbatches=1")


def test_batch_norm_behind_a_first_batch_of_one_sample() -> None:
    (batch,) = pairs()["train"]
    data = [(batch[0][:1], batch[1][:1]), batch]
    text = refusal(fit(mlp(nn.BatchNorm1d(4)), datasets={"train": data}, loss=nn.functional.mse_loss))
    assert_words(text, "BatchNorm1d")


def test_a_model_that_cannot_be_copied_or_pickled(tmp_path: Path) -> None:
    locked, logging = gpt(), gpt()
    locked.blocks[1].guard = threading.Lock()
    assert_words(refusal(fit(locked)), "cannot be pickled", "'blocks.1.guard'", "lock", "remove it")
    with (tmp_path / "log").open("w") as file:
        logging.norm.log = lambda text: file.write(text)
        assert_words(refusal(fit(logging)), "cannot be pickled", "'norm.log'", "remove it")


@pytest.mark.parametrize("name", ["loss", "optimizer", "metrics"])
def test_a_function_that_cannot_be_pickled(name: str) -> None:
    guard = threading.Lock()

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        with guard:
            return torch.optim.SGD(parameters, lr=0.1)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        with guard:
            return nn.functional.mse_loss(outputs, targets)

    given: dict[str, Any] = {"loss": nn.functional.mse_loss}
    given[name] = {"loss": loss, "optimizer": optimizer, "metrics": {"error": loss}}[name]
    assert_words(refusal(fit(mlp(), datasets=pairs(), **given)), f"{name} cannot be pickled", "lock", "inside")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    text = refusal(lambda: raypipe.data.parquet(tmp_path / "nowhere", ["tokens"], 4))
    assert_words(text, "nowhere")
    (tmp_path / "empty").mkdir()
    assert_words(refusal(lambda: raypipe.data.parquet(tmp_path / "empty", ["tokens"], 4)), "empty", "Parquet")


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"tokens": [1, 2], "labels": [3, 4]}), tmp_path / "a.parquet")
    text = refusal(lambda: raypipe.data.parquet(tmp_path, ["tokens", "targets"], 4))
    assert_words(text, "targets", "labels")


def plateau(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": lambda parameters: torch.optim.LBFGS([p for _, p in parameters])}, ("LBFGS", "AdamW")),
        ({"optimizer": lambda parameters: None}, ("NoneType", "torch.optim.Optimizer")),
        ({"lr_scheduler": plateau}, ("ReduceLROnPlateau", "metric")),
        ({"lr_scheduler": lambda optimizer: 3}, ("int", "LRScheduler")),
    ],
    ids=["lbfgs", "no-optimizer", "plateau", "no-scheduler"],
)
def test_optimizers_that_cannot_be_split(options: dict[str, Any], words: tuple[str, ...]) -> None:
    assert_words(refusal(fit(**options), TypeError), *words)


def test_an_optimizer_of_other_parameters_than_its_own() -> None:
    """Else each stage would train a copy of the whole model that nobody uses."""
    model = gpt()
    text = refusal(fit(model, optimizer=lambda parameters: torch.optim.SGD(model.parameters(), lr=0.1)))
    assert_words(text, "other parameters", "use its argument")


def test_what_the_optimizer_raises_comes_as_itself() -> None:
    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        raise KeyError("my own")

    with pytest.raises(KeyError, match="my own"):
        fit(optimizer=optimizer)()


def test_with_an_example_the_constructor_refuses() -> None:
    example = DATA["train"][0]
    assert_words(refusal(lambda: PipelineTrainer(gpt(), 9, example=example)), "stages=9", "at most 7")
