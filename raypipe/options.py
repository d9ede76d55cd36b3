"""The arguments of a trainer, checked one by one before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle

from raypipe.data import Source, open_source
from raypipe.data.adapters import OnceSource
from raypipe.driver.resources import check_resources
from raypipe.model.partition import check_balance
from raypipe.model.precision import Precision
from raypipe.model.recomputing import check_recompute
from raypipe.model.weights import LossRule
from raypipe.parallel.tensor_plan import check_plan
from raypipe.schedule import Auto, Schedule, chunks_of, names
from raypipe.schedule.maker import ScheduleMaker
from raypipe.stage.spec import OptimizerMaker, SchedulerMaker

__all__ = [
    "NOT_YET",
    "Options",
    "default_optimizer",
    "not_yet",
    "opened_sources",
    "refuse_not_yet",
]

NOT_YET: Mapping[str, Any] = {
    "checkpoint_every": None,
    "snapshot_every": None,
    "elastic": False,
}
"""Arguments of the contract that are not built yet, with the only value that is taken."""


def default_optimizer(parameters: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """AdamW with a learning rate of 1e-3."""
    return torch.optim.AdamW(parameters, lr=1e-3)


@dataclass(frozen=True, slots=True)
class Options:
    """The checked arguments; api names and meanings are those of ``PipelineTrainer``."""

    stages: int
    loss: Callable[[Any, Any], Any] | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    optimizer: OptimizerMaker = default_optimizer
    lr_scheduler: SchedulerMaker | None = None
    max_grad_norm: float | None = None
    schedule: str | Auto | Schedule | Callable[[int, int], Schedule] = "1f1b"
    microbatches: int | None = None
    chunks: int | None = None
    microbatch_weight: str | Callable[[Any], float] | None = None
    batch_dims: Any = None
    units: Sequence[str] | None = None
    balance: str | Sequence[int] = "flops"
    recompute: str | Callable[[str], bool] = "none"
    compile: bool = False
    precision: str = "fp32"
    batch_norm: str | None = None
    threads: int | None = None
    data_parallel: int = 1
    shard: str | None = None
    resources_per_stage: Mapping[str, float] | None = None
    evaluate_every: int | None = None
    log_every: int = 10
    metrics: Mapping[str, Callable[[Any, Any], Any]] = field(default_factory=dict)
    step_timeout_s: float = 300.0
    backend: str = "ray"
    seed: int = 0
    tensor_parallel: int = 1
    tensor_parallel_plan: Mapping[str, ParallelStyle] | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.schedule == "auto":
            object.__setattr__(self, "schedule", Auto())
        _whole("stages", self.stages)
        _whole("data_parallel", self.data_parallel)
        for name in ("microbatches", "chunks", "threads", "evaluate_every"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name))
        _whole("log_every", self.log_every)
        _whole("seed", self.seed, least=0)
        _positive("step_timeout_s", self.step_timeout_s)
        if self.max_grad_norm is not None:
            _positive("max_grad_norm", self.max_grad_norm)
        if self.backend not in ("ray", "local"):
            raise ValueError(f"backend is {self.backend!r}, but must be 'ray' or 'local'")
        if self.batch_norm not in (None, "microbatch"):
            raise ValueError(f"batch_norm is {self.batch_norm!r}, but must be 'microbatch' or None")
        self._check_shard()
        Precision(self.precision)
        if self.compile is True and self.tensor_parallel > 1:
            raise ValueError(
                f"compile=True with tensor_parallel={self.tensor_parallel} is not built yet, as split layers are not "
                "compiled; leave one of the two out"
            )
        _whole("tensor_parallel", self.tensor_parallel)
        if self.tensor_parallel_plan is not None:
            check_plan(self.tensor_parallel_plan)
        if self.tensor_parallel > 1 and self.backend == "local":
            raise ValueError(
                f"tensor_parallel={self.tensor_parallel} with backend='local', but the ranks of a tensor group wait "
                "for each other inside of a layer and need a process each; use backend='ray', or tensor_parallel=1"
            )
        self._check_callables()
        self._check_schedule()
        self._check_resources()
        check_balance(self.balance)
        check_recompute(self.recompute)
        if not isinstance(self.compile, bool):
            raise TypeError(f"compile is {self.compile!r}, but must be True or False")
        if self.microbatch_weight is not None:
            LossRule.given(self.microbatch_weight)
        if self.units is not None and (isinstance(self.units, str) or not all(isinstance(u, str) for u in self.units)):
            raise TypeError(f"units is {self.units!r}, but must be a list of module names, such as ['layers.*']")

    def _check_callables(self) -> None:
        for name in ("loss", "forward", "optimizer", "lr_scheduler"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                hint = "a callable, such as lambda parameters: torch.optim.SGD(parameters, lr=0.1)"
                raise TypeError(f"{name} is {value!r}, but must be {hint if name == 'optimizer' else 'a callable'}")
        if not isinstance(self.metrics, Mapping) or not all(callable(metric) for metric in self.metrics.values()):
            raise TypeError(f"metrics is {self.metrics!r}, but must be a dict of callables metric(outputs, batch)")
        if taken := sorted({"loss", "samples"} & set(self.metrics)):
            raise ValueError(f"metrics has the name {taken[0]!r}, which evaluate gives by itself; choose another name")

    def _check_shard(self) -> None:
        if self.shard not in (None, "optimizer", "parameters"):
            raise ValueError(f"shard is {self.shard!r}, but must be 'optimizer' or None")
        if self.shard == "parameters":
            raise ValueError(
                "shard='parameters' is not built yet; shard='optimizer' shares the optimizer's state out, and more "
                "stages share out the parameters"
            )
        if self.shard is not None and self.data_parallel == 1:
            raise ValueError(
                f"shard={self.shard!r} shares the optimizer out among replicas, but data_parallel is 1; give "
                "data_parallel=2 or more, or leave shard out"
            )

    def _check_resources(self) -> None:
        asked = check_resources(self.resources_per_stage) or {}
        if "GPU" in asked:
            raise ValueError(
                f"resources_per_stage={dict(asked)} asks for GPUs, but stages on GPUs are not built yet; leave 'GPU' "
                "out to train on CPUs"
            )

    def _check_schedule(self) -> None:
        if isinstance(self.schedule, str):
            chunks_of(self.schedule, self.chunks)
        elif isinstance(self.schedule, Schedule):
            if self.microbatches not in (None, self.schedule.microbatches):
                raise ValueError(
                    f"microbatches={self.microbatches}, but the schedule {self.schedule.name!r} has "
                    f"{self.schedule.microbatches}; leave microbatches out"
                )
            self.make_schedule(self.schedule.microbatches)
        elif isinstance(self.schedule, type) or not (isinstance(self.schedule, Auto) or callable(self.schedule)):
            raise TypeError(
                f"schedule is {self.schedule!r}, but must be 'auto', an Auto(), one of {names()}, a Schedule, or a "
                "callable"
            )

    @property
    def most_microbatches(self) -> int:
        """How many microbatches a replica's share of a batch is cut into, if it has the samples."""
        if isinstance(self.schedule, Schedule):
            return self.schedule.microbatches
        return self.microbatches or 16

    @property
    def most_pieces(self) -> int:
        """How many microbatches a batch has in all replicas together, if it has the samples."""
        return self.most_microbatches * self.data_parallel

    @property
    def make_schedule(self) -> ScheduleMaker:
        """Makes the schedule of a number of microbatches; where one is to be chosen, only planning knows it."""
        if isinstance(self.schedule, Auto):
            raise ValueError("the schedule is chosen when the model is planned; ask the plan's options")
        return ScheduleMaker(self.schedule, self.stages, self.chunks)


def refuse_not_yet(given: Mapping[str, Any]) -> None:
    """Refuses arguments of the contract that are not built yet, and unknown ones.

    Raises:
        ValueError: one has another value than its default.
        TypeError: there is no such argument.
    """
    for name, value in given.items():
        if name not in NOT_YET:
            raise TypeError(f"PipelineTrainer has no argument {name!r}; help(PipelineTrainer) lists those it has")
        if value != NOT_YET[name]:
            raise ValueError(
                f"{name}={value!r} is not built yet, this version allows {name}={NOT_YET[name]!r} only; leave it out"
            )


def opened_sources(datasets: object, evaluate_every: int | None) -> Mapping[str, Source]:
    """The sources, each opened once: an iterator must not lose the batch that was looked at.

    Raises:
        TypeError: ``datasets`` is no dict of sources.
        ValueError: ``evaluate_every`` is given without ``datasets["valid"]``.
    """
    datasets = {} if datasets is None else datasets
    if not isinstance(datasets, Mapping) or not set(datasets) <= {"train", "valid"}:
        got = f"a dict with {sorted(map(str, datasets))}" if isinstance(datasets, Mapping) else type(datasets).__name__
        raise TypeError(f"datasets is {got}, but must be a dict such as {{'train': source, 'valid': source}}")
    if evaluate_every is not None and "valid" not in datasets:
        raise ValueError(f"evaluate_every={evaluate_every} needs data to evaluate; give datasets={{'valid': ...}} too")
    sources = {name: open_source(data) for name, data in datasets.items()}
    if evaluate_every is not None and isinstance(sources["valid"], OnceSource):
        raise ValueError(
            f"evaluate_every={evaluate_every}, but datasets['valid'] is an iterator that can be read once; give a list "
            "or a function that yields the batches"
        )
    return sources


def not_yet(name: str, instead: str) -> NotImplementedError:
    """The refusal of a method or function of the contract that comes later."""
    return NotImplementedError(f"{name} is not built yet; {instead}")


def _whole(name: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}, but must be a whole number of at least {least}")
    if value < least:
        raise ValueError(f"{name} is {value}, but must be at least {least}")


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}, but must be a number above 0")
    if not value > 0:
        raise ValueError(f"{name} is {value}, but must be above 0")
