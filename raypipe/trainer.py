"""PipelineTrainer: the front door."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import cloudpickle
from torch import Tensor, nn

from raypipe.data import Cursor, Feed, open_source
from raypipe.data.wire import unpack
from raypipe.driver.controller import Controller
from raypipe.driver.gang import Gang
from raypipe.driver.local import LocalGang
from raypipe.model.build import dump, whole_state
from raypipe.options import Options, default_optimizer, refuse_not_yet
from raypipe.plan import Plan, make_plan
from raypipe.run import Run
from raypipe.schedule import Schedule

if TYPE_CHECKING:
    import ray.train

__all__ = ["PipelineTrainer"]


class PipelineTrainer:
    """Trains a model cut into stages, exactly as if it were whole.

    ::

        with PipelineTrainer(model, stages=4, datasets={"train": data}) as trainer:
            result = trainer.fit(epochs=1)

    Args:
        model: an ``nn.Module``, which is not changed.
        stages: how many stages the model is cut into.
        datasets: ``{"train": source, "valid": source}``. A source is an iterable of batches (list, ``DataLoader``,
            generator function), a ``ray.data.Dataset``, or ``raypipe.data.parquet(...)``. A batch is a dict (the model is
            called as ``model(**batch)``), a pair ``(inputs, targets)``, or anything where ``forward`` is given.
        loss: ``loss(outputs, targets) -> scalar``, or ``loss(outputs, batch)`` for a dict; None: the model returns it.
        forward: ``forward(model, batch) -> outputs``, for a model that is called in its own way.
        optimizer: ``optimizer(named_parameters) -> torch.optim.Optimizer``; called on each rank with its own.
        lr_scheduler: ``lr_scheduler(optimizer) -> LRScheduler``, stepped once a step.
        max_grad_norm: clip by the norm over all stages, shared weights counted once.
        schedule: a name (``"gpipe"``, ``"1f1b"``), a ``Schedule``, or ``(stages, microbatches) -> Schedule``.
        microbatches: pieces that a batch is cut into; 16, at most the batch's samples.
        microbatch_weight: ``"targets"``, ``"samples"``, ``"sum"`` or ``weight(microbatch) -> float``; None: the rule that
            a probe finds to reproduce the joined loss.
        batch_dims: which dimension of which tensor is the batch, as a pytree or a dict of names; None: dimension 0.
        units: patterns of module names that are never cut.
        example: a batch to plan with in the constructor; None: the first training batch, when it is first needed.
        balance: unit calls for each stage, or ``"flops"``, ``"parameters"``.
        batch_norm: ``"microbatch"`` accepts BatchNorm with a microbatch's own statistics.
        threads: of PyTorch in each rank.
        resources_per_stage: Ray resources of one rank, such as ``{"GPU": 1}``.
        run_config: a ``ray.train.RunConfig``; its ``name`` and ``storage_path`` say where the results lie.
        evaluate_every: steps between evaluations of ``datasets["valid"]``; None: never.
        log_every: steps between the rows of ``Result.metrics_dataframe``.
        metrics: ``{name: metric(outputs, batch) -> scalar}``, for ``evaluate``.
        step_timeout_s: a rank without progress for so many seconds is stuck; the first step has at least 1800.
        backend: ``"ray"``, or ``"local"``: every stage in this process, without Ray.
        seed: of data order and dropout.
        quiet: no progress line.
        not_yet: the arguments of the contract that come later; each is refused unless it is its default.

    Raises:
        ValueError, TypeError: an argument is wrong; with ``example``, also what only a batch can show.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: int,
        *,
        datasets: Mapping[str, Any] | None = None,
        loss: Callable[[Any, Any], Any] | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        optimizer: Callable[..., Any] = default_optimizer,
        lr_scheduler: Callable[[Any], Any] | None = None,
        max_grad_norm: float | None = None,
        schedule: str | Schedule | Callable[[int, int], Schedule] = "1f1b",
        microbatches: int | None = None,
        microbatch_weight: str | Callable[[Any], float] | None = None,
        batch_dims: Any = None,
        units: Sequence[str] | None = None,
        example: Any = None,
        balance: str | Sequence[int] = "flops",
        batch_norm: str | None = None,
        threads: int | None = None,
        resources_per_stage: Mapping[str, float] | None = None,
        run_config: ray.train.RunConfig | None = None,
        evaluate_every: int | None = None,
        log_every: int = 10,
        metrics: Mapping[str, Callable[[Any, Any], Any]] | None = None,
        step_timeout_s: float = 300.0,
        backend: str = "ray",
        seed: int = 0,
        quiet: bool = False,
        **not_yet: Any,
    ) -> None:
        refuse_not_yet(not_yet)
        self._model = _checked_model(model)
        self._options = Options(
            stages=stages,
            loss=loss,
            forward=forward,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            max_grad_norm=max_grad_norm,
            schedule=schedule,
            microbatches=microbatches,
            microbatch_weight=microbatch_weight,
            batch_dims=batch_dims,
            units=units,
            balance=balance,
            batch_norm=batch_norm,
            threads=threads,
            resources_per_stage=resources_per_stage,
            evaluate_every=evaluate_every,
            log_every=log_every,
            metrics=dict(metrics or {}),
            step_timeout_s=step_timeout_s,
            backend=backend,
            seed=seed,
            quiet=quiet,
        )
        self._datasets = _checked_datasets(datasets, evaluate_every)
        self._run_config = run_config
        self._example = example
        self._plan: Plan | None = None
        self._gang: Gang | None = None
        self._controller: Controller | None = None
        self._closed = False
        self._cursor = Cursor(seed=seed)
        if example is not None:
            self._plan = make_plan(self._model, self._options, example)

    def fit(self, *, steps: int | None = None, epochs: int | None = None) -> Any:
        """Trains on ``datasets["train"]``, going on where an earlier ``fit`` of this trainer stopped.

        Args:
            steps: how many, over as many epochs as that takes.
            epochs: how many; neither given: one.

        Returns:
            A ``ray.train.Result`` with the last step's ``metrics``, a ``metrics_dataframe`` of the logged steps and the
            ``path`` where they lie as files. (With ``backend="local"`` an object with the same attributes: no Ray.)

        Raises:
            StepError: a step failed; the first cause, with the user's own traceback last.
            ValueError: there is no data, or the model or batch cannot be split exactly.
        """
        if "train" not in self._datasets:
            raise ValueError("fit needs data: give datasets={'train': ...} to PipelineTrainer, or use train_step(batch)")
        epochs = 1 if steps is None and epochs is None else epochs
        source = open_source(self._datasets["train"])
        first_step = self._controller.step if self._controller is not None else 0
        with Feed(source, start=self._cursor, epochs=epochs, steps=steps, first_step=first_step) as feed:
            controller = self._started(feed.peek())
            run = Run(controller, self._planned(), self._run_config, self._evaluation(), steps)
            try:
                return run.fit(feed)
            except BaseException:
                self.shutdown()
                raise
            finally:
                self._cursor = run.cursor or self._cursor

    def train_step(self, batch: Any) -> dict[str, Any]:
        """One step on a batch of your own.

        Returns:
            ``loss``, ``grad_norm`` (before clipping), ``lr``, ``samples``, ``seconds``, ``bubble`` (share of the stages'
            time in which no action was computed), ``step``, ``microbatches``, ``peak_in_flight`` by stage.

        Raises:
            StepError: the step failed; the trainer is then shut down.
        """
        return self._guarded(lambda: self._started(batch).train_step(batch))

    def evaluate(self, source: Any = None) -> dict[str, Any]:
        """The loss and the ``metrics`` over ``datasets["valid"]`` or ``source``; no training state changes."""
        source = self._datasets.get("valid") if source is None else source
        if source is None:
            raise ValueError("evaluate needs data: give it a source, or datasets={'valid': ...} to PipelineTrainer")
        with Feed(open_source(source), start=Cursor(seed=self._options.seed), epochs=1, steps=None) as feed:
            first = feed.peek()
            return self._guarded(lambda: self._started(first).evaluate(draw.batch for draw in feed))

    def predict(self, source: Any) -> Iterator[Any]:
        """The model's outputs in eval mode, one for each batch of ``source``, in order."""
        with Feed(open_source(source), start=Cursor(seed=self._options.seed), epochs=1, steps=None) as feed:
            first = feed.peek()
            controller = self._guarded(lambda: self._started(first, training=False))
            outputs = controller.predict(draw.batch for draw in feed)
            while True:
                try:
                    output = self._guarded(lambda: next(outputs, _END))
                finally:
                    pass
                if output is _END:
                    return
                yield output

    def state_dict(self) -> dict[str, Any]:
        """The whole model's weights under the unsplit model's own names, as ``model.load_state_dict`` takes them."""
        if self._gang is None:
            return whole_state(self._model, [])
        states: list[Mapping[str, Tensor]] = [unpack(state) for state in self._guarded(self._gang.state)]
        return whole_state(self._model, states)

    def plan(self) -> Plan:
        """How the model is cut and what that costs; ``print`` shows a table. Nothing is started.

        Raises:
            ValueError: there is no batch to plan with.
        """
        if self._plan is None:
            self._plan = make_plan(self._model, self._options, self._example_batch())
        return self._plan

    def shutdown(self) -> None:
        """Ends every actor and gives back what they held, and Ray where the trainer started it. May be called twice."""
        self._closed = True
        if self._gang is not None:
            gang, self._gang, self._controller = self._gang, None, None
            gang.close()

    def __enter__(self) -> PipelineTrainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _started(self, batch: Any, *, training: bool = True) -> Controller:
        """The controller; planned with ``batch`` and started where that has not been done."""
        if self._closed:
            raise RuntimeError("this trainer was shut down; make a new one")
        if self._controller is None:
            if self._plan is None or (training and self._plan.rule is None):
                self._plan = make_plan(self._model, self._options, batch, training=training)
            self._gang = _start(self._plan)
            self._controller = Controller(self._gang, self._plan.gradients())
        return self._controller

    def _planned(self) -> Plan:
        assert self._plan is not None
        return self._plan

    def _evaluation(self) -> Callable[[], dict[str, Any]] | None:
        return self.evaluate if self._options.evaluate_every else None

    def _example_batch(self) -> Any:
        if "train" not in self._datasets:
            raise ValueError("plan needs a batch to look at: give example=batch or datasets={'train': ...}")
        with Feed(open_source(self._datasets["train"]), start=self._cursor, epochs=1, steps=None) as feed:
            return feed.peek()

    def _guarded(self, work: Callable[[], Any]) -> Any:
        """Whatever fails ends the ranks, so that nothing is left behind."""
        try:
            return work()
        except BaseException:
            self.shutdown()
            raise


_END = object()


def _start(plan: Plan) -> Gang:
    options = plan.options
    if options.backend == "local":
        return LocalGang([plan.build_of(rank) for rank in range(plan.topology.size)])
    dump(plan.skeleton)  # names the attribute that cannot be pickled before anything starts
    from raypipe.driver.ray_gang import launch

    return launch(
        plan.topology,
        [cloudpickle.dumps(plan.build_of(rank)) for rank in range(plan.topology.size)],
        plan.wiring(),
        resources=options.resources_per_stage,
        step_timeout_s=options.step_timeout_s,
        first_step_timeout_s=max(options.step_timeout_s, 1800.0),
    )


def _checked_model(model: object) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    if callable(model):
        raise TypeError(
            "model is a callable, but building it on the ranks is not built yet; call it and give the module that it returns"
        )
    raise TypeError(f"model is a {type(model).__name__}, but must be an nn.Module")


def _checked_datasets(datasets: object, evaluate_every: int | None) -> Mapping[str, Any]:
    if datasets is None:
        datasets = {}
    if not isinstance(datasets, Mapping) or not set(datasets) <= {"train", "valid"}:
        got = f"a dict with {sorted(map(str, datasets))}" if isinstance(datasets, Mapping) else type(datasets).__name__
        raise TypeError(f"datasets is {got}, but must be a dict such as {{'train': source, 'valid': source}}")
    if evaluate_every is not None and "valid" not in datasets:
        raise ValueError(f"evaluate_every={evaluate_every} needs data: give datasets={{'valid': ...}} too")
    for source in datasets.values():
        open_source(source)
    return datasets


