"""PipelineTrainer: the front door."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle

from raypipe.data import Cursor, Feed, Source, open_source
from raypipe.data.wire import unpack
from raypipe.driver.controller import Controller, data_error
from raypipe.driver.gang import Gang
from raypipe.driver.results import Results
from raypipe.model.build import whole_state
from raypipe.observe.history import History
from raypipe.observe.report import Report
from raypipe.options import Options, default_optimizer, not_yet, opened_sources, refuse_not_yet
from raypipe.plan import Plan
from raypipe.planning import make_plan, planned_origin
from raypipe.run import Run, start
from raypipe.schedule import Auto, Schedule

if TYPE_CHECKING:
    import ray.train

__all__ = ["PipelineTrainer"]

T = TypeVar("T")


class PipelineTrainer:
    """Trains a model cut into stages, exactly as if it were whole.

    ::

        with PipelineTrainer(model, stages=4, datasets={"train": data}) as trainer:
            result = trainer.fit(epochs=1)

    Args:
        model: an ``nn.Module``, which is not changed; or a callable without arguments that builds one. It is run once,
            on tensors without memory, and each rank then makes only its own weights.
        stages: how many stages the model is cut into.
        datasets: ``{"train": source, "valid": source}``. A source is an iterable of batches (list, ``DataLoader``,
            generator function), a ``ray.data.Dataset``, or ``raypipe.data.parquet(...)``. A batch is a dict (the model
            is called as ``model(**batch)``), a pair ``(inputs, targets)``, or anything where ``forward`` is given.
        loss: ``loss(outputs, targets) -> scalar``, or ``loss(outputs, batch)`` for a dict; None: the model returns it.
        forward: ``forward(model, batch) -> outputs``, for a model that is called in its own way.
        optimizer: ``optimizer(named_parameters) -> torch.optim.Optimizer``; called on each rank with its own, and
            beforehand once a stage with stand-ins, so that one that cannot be used is refused before anything starts.
        lr_scheduler: ``lr_scheduler(optimizer) -> LRScheduler``, stepped once a step.
        max_grad_norm: clip by the norm over all stages, shared weights counted once.
        schedule: a name (``"1f1b"``, ``"interleaved_1f1b"``, ``"zbv"``, ...; docs/schedules.md), a ``Schedule``,
            ``(stages, microbatches) -> Schedule``, or ``"auto"``: the fastest by measured times that fits the memory
            (``schedule.Auto`` sets limits).
        microbatches: pieces that a batch (a replica's share of it) is cut into; 16, at most its samples.
        chunks: chunks a stage, for schedules that interleave; None: 2 for those, else the schedule's own number.
        microbatch_weight: ``"targets"``, ``"samples"``, ``"sum"`` or ``weight(microbatch) -> float``; None: the rule
            that a probe finds to reproduce the joined loss.
        batch_dims: which dimension of which tensor is the batch, as a pytree or a dict of names; None: dimension 0.
        units: patterns of module names that are never cut.
        example: a batch to plan with in the constructor; None: the first training batch, when it is first needed.
        balance: unit calls for each stage, or ``"flops"``, ``"parameters"``.
        recompute: ``"full"``: every unit keeps its arguments alone and runs again in its backward, for less memory and
            a forward more; ``recompute(unit_name) -> bool`` chooses units (docs/memory.md).
        compile: ``torch.compile`` every unit, each kind once a rank; on CPUs every node needs a C++ compiler.
        precision: ``"fp32"``: the model's own types; ``"bf16"`` or ``"fp16"``: forwards and losses under autocast, with
            weights, gradients and optimizer states in float32; fp16 with loss scaling.
        batch_norm: ``"microbatch"`` accepts BatchNorm with a microbatch's own statistics.
        data_parallel: copies of the whole pipeline; each batch is split among them by sample.
        shard: what the copies share out: ``"optimizer"`` (ZeRO-1: each keeps and steps the state of a part), or None.
        threads: of PyTorch in each rank.
        resources_per_stage: Ray resources of one rank, such as ``{"GPU": 1}``.
        run_config: a ``ray.train.RunConfig``; its ``name`` and ``storage_path`` say where the results lie, and other
            fields are refused.
        evaluate_every: steps between evaluations of ``datasets["valid"]``; None: never.
        log_every: steps between the rows of ``Result.metrics_dataframe``.
        metrics: ``{name: metric(outputs, batch) -> scalar}``, for ``evaluate``.
        step_timeout_s: a rank without progress for so many seconds is stuck; the first step has at least 1800.
        backend: ``"ray"``, or ``"local"``: every stage in this process, without Ray.
        seed: of data order, dropout, and the weights of a model that a callable builds.
        tensor_parallel: ranks of each stage, which hold a slice of each split layer. Their activations between units
            are whole and equal.
        tensor_parallel_plan: ``{module pattern: ParallelStyle}`` with the styles of
            ``torch.distributed.tensor.parallel``; None: the model's own plan, as Hugging Face's models have one.
        quiet: no progress line.
        later: the arguments of the contract that come later; each is refused unless it is its default.

    Raises:
        ValueError, TypeError: an argument is wrong; with ``example``, also what only a batch can show.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        stages: int,
        *,
        datasets: Mapping[str, Any] | None = None,
        loss: Callable[[Any, Any], Any] | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        optimizer: Callable[..., Any] = default_optimizer,
        lr_scheduler: Callable[[Any], Any] | None = None,
        max_grad_norm: float | None = None,
        schedule: str | Auto | Schedule | Callable[[int, int], Schedule] = "1f1b",
        microbatches: int | None = None,
        chunks: int | None = None,
        microbatch_weight: str | Callable[[Any], float] | None = None,
        batch_dims: Any = None,
        units: Sequence[str] | None = None,
        example: Any = None,
        balance: str | Sequence[int] = "flops",
        recompute: str | Callable[[str], bool] = "none",
        compile: bool = False,
        precision: str = "fp32",
        batch_norm: str | None = None,
        data_parallel: int = 1,
        shard: str | None = None,
        threads: int | None = None,
        resources_per_stage: Mapping[str, float] | None = None,
        run_config: ray.train.RunConfig | None = None,
        evaluate_every: int | None = None,
        log_every: int = 10,
        metrics: Mapping[str, Callable[[Any, Any], Any]] | None = None,
        step_timeout_s: float = 300.0,
        backend: str = "ray",
        seed: int = 0,
        tensor_parallel: int = 1,
        tensor_parallel_plan: Mapping[str, ParallelStyle] | None = None,
        quiet: bool = False,
        **later: Any,
    ) -> None:
        refuse_not_yet(later)
        self._options = Options(
            stages=stages,
            loss=loss,
            forward=forward,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            max_grad_norm=max_grad_norm,
            schedule=schedule,
            microbatches=microbatches,
            chunks=chunks,
            microbatch_weight=microbatch_weight,
            batch_dims=batch_dims,
            units=units,
            balance=balance,
            recompute=recompute,
            compile=compile,
            precision=precision,
            batch_norm=batch_norm,
            data_parallel=data_parallel,
            shard=shard,
            threads=threads,
            resources_per_stage=resources_per_stage,
            evaluate_every=evaluate_every,
            log_every=log_every,
            metrics=metrics if metrics is not None else {},
            step_timeout_s=step_timeout_s,
            backend=backend,
            seed=seed,
            tensor_parallel=tensor_parallel,
            tensor_parallel_plan=tensor_parallel_plan,
            quiet=quiet,
        )
        self._origin = planned_origin(model, seed)
        self._sources = opened_sources(datasets, evaluate_every)
        self._results = Results(run_config, log_every)
        self._plan: Plan | None = None
        self._gang: Gang | None = None
        self._controller: Controller | None = None
        self._history = History()
        self._closed = False
        self._cursor = Cursor(seed=seed)
        if example is not None:
            self._plan = make_plan(self._origin, self._options, example)

    def fit(self, *, steps: int | None = None, epochs: int | None = None) -> Any:
        """Trains on ``datasets["train"]``, going on where an earlier ``fit`` of this trainer stopped.

        Args:
            steps: how many, over as many epochs as that takes.
            epochs: how many; neither given: one.

        Returns:
            A ``ray.train.Result`` with the last step's ``metrics``, a ``metrics_dataframe`` of the steps that this
            trainer logged and the ``path`` where they lie as files: ``metrics.csv``, and ``schedule.txt`` with the last
            step as planned and as measured. (With ``backend="local"`` an object with the same attributes: no Ray.)

        Raises:
            StepError: a step failed; the first cause, with the user's own traceback last. What your code raises while
                the first batch is planned with, before there are stages, comes as itself.
            ValueError: there is no data, or the model or batch cannot be split exactly.
        """
        if "train" not in self._sources:
            raise ValueError(
                "fit has no data; give datasets={'train': ...} to PipelineTrainer, or use train_step(batch)"
            )
        self._refuse_closed()
        epochs = 1 if steps is None and epochs is None else epochs
        source = self._sources["train"]
        with Feed(source, start=self._cursor, epochs=epochs, steps=steps, first_step=self._step) as feed:
            controller = self._started(_peek(feed, self._step))
            self._results.open()
            run = Run(controller, self.plan(), self._results, self._evaluation(), steps)
            try:
                return self._guarded(lambda: run.fit(feed))
            finally:
                self._cursor = run.cursor or self._cursor

    def train_step(self, batch: Any) -> dict[str, Any]:
        """One step on a batch of your own.

        Returns:
            ``loss``, ``grad_norm`` (before clipping), ``lr``, ``samples``, ``seconds``, ``bubble`` (share of the ranks'
            time in which no action was computed), ``step``, ``microbatches`` (of a replica), ``peak_in_flight`` by
            stage. With ``precision="fp16"`` also ``loss_scale``, ``skipped`` (a gradient overflowed: no weight has
            changed), and ``non_finite``, where that was.

        Raises:
            NonFiniteError: the loss or a gradient is NaN or infinite; under fp16 only where no loss scale helps.
            StepError: the step failed; the trainer is then shut down.
        """
        controller = self._started(batch)
        return self._guarded(lambda: controller.train_step(batch))

    def evaluate(self, source: Any = None) -> dict[str, Any]:
        """The loss and the ``metrics`` over ``datasets["valid"]`` or ``source``; no training state changes.

        Raises:
            ValueError: there is no data.
            StepError: it failed; the trainer is then shut down.
        """
        if source is None and "valid" not in self._sources:
            raise ValueError("evaluate has no data; give it a source, or datasets={'valid': ...} to PipelineTrainer")
        with self._feed(self._sources["valid"] if source is None else open_source(source)) as feed:
            controller = self._started(_peek(feed, self._step))
            return self._guarded(lambda: controller.evaluate(draw.batch for draw in feed))

    def predict(self, source: Any) -> Iterator[Any]:
        """The model's outputs in eval mode, one for each batch of ``source``, in order.

        Raises:
            StepError: it failed; the trainer is then shut down.
        """
        with self._feed(open_source(source)) as feed:
            controller = self._started(_peek(feed, self._step), training=False)
            outputs = controller.predict(draw.batch for draw in feed)
            while (output := self._guarded(lambda: next(outputs, _END))) is not _END:
                yield output

    def state_dict(self) -> dict[str, Any]:
        """The whole model's weights under the unsplit model's own names, as ``model.load_state_dict`` takes them.

        Raises:
            RuntimeError: the trainer was shut down, and the ranks that held them are gone.
        """
        self._refuse_closed()
        if self._gang is None:
            return whole_state(self._origin.model, [], self._origin.tensor)
        states: list[Mapping[str, Tensor]] = [unpack(state) for state in self._guarded(self._gang.state)]
        return whole_state(self._origin.model, states, self._origin.tensor)

    def plan(self) -> Plan:
        """How the model is cut and what that costs; ``print`` shows a table. Nothing is started.

        Raises:
            ValueError: there is no batch to plan with, or the model or batch cannot be split exactly.
        """
        if self._plan is None:
            if "train" not in self._sources:
                raise ValueError("plan has no batch to look at; give example=batch or datasets={'train': ...}")
            with self._feed(self._sources["train"], self._cursor) as feed:
                self._plan = make_plan(self._origin, self._options, _peek(feed, self._step))
        return self._plan

    def save(self, path: object) -> None:
        """Refused: checkpoints come later.

        Raises:
            NotImplementedError: always.
        """
        raise not_yet("save", "torch.save(trainer.state_dict(), path) writes the weights")

    def load(self, path: object) -> None:
        """Refused: checkpoints come later.

        Raises:
            NotImplementedError: always.
        """
        raise not_yet(
            "load", "load weights into the model, by its load_state_dict, before you give it to PipelineTrainer"
        )

    def report(self, path: str | Path | None = None) -> Report:
        """The last step as it was predicted and as it was measured, and where the difference went.

        The prediction is the schedule played against the times of the steps before it. ``print`` shows both timelines,
        each stage's time by cause (compute, dependency, exposed communication, stragglers, data, optimizer, driver),
        and the largest cause in a sentence. Of several replicas it shows the first.

        Args:
            path: where to write it too: a file that ends in ``.txt`` or ``.json``.

        Raises:
            ValueError: no step was taken, or ``path`` ends otherwise.
            FileNotFoundError: the folder of ``path`` is missing.
        """
        made = self._history.report(lambda microbatches: self.plan().options.make_schedule(microbatches))
        if path is not None:
            made.write(path)
        return made

    def shutdown(self) -> None:
        """Ends every actor and gives back what they held, and Ray where the trainer started it. May be called twice."""
        self._closed = True
        self._close_gang()

    def __enter__(self) -> PipelineTrainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    @property
    def _step(self) -> int:
        return self._controller.step if self._controller is not None else 0

    def _started(self, batch: Any, *, training: bool = True) -> Controller:
        """The controller; planned with ``batch`` and started where that has not been done."""
        self._refuse_closed()
        if self._plan is None or (training and self._plan.rule is None):
            self._plan = make_plan(self._origin, self._options, batch, training=training)
            self._close_gang()  # one that only predicted: it has trained nothing, and was told no rule of weights
        if self._controller is None:
            self._gang = start(self._plan)
            self._controller = Controller(
                self._gang,
                self._plan.gradients(),
                self._plan.admission(),
                topology=self._plan.topology,
                admit_whole=self._plan.admission(whole=True),
            )
            self._history = self._controller.history
        return self._controller

    def _close_gang(self) -> None:
        if self._gang is not None:
            gang, self._gang, self._controller = self._gang, None, None
            gang.close()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise RuntimeError(
                "this trainer was shut down and its ranks are gone; make a new PipelineTrainer, and take state_dict() "
                "before shutdown() or the end of the with block"
            )

    def _feed(self, source: Source, start: Cursor | None = None) -> Feed:
        """One epoch of a source."""
        return Feed(source, start=start or Cursor(seed=self._options.seed), epochs=1, steps=None)

    def _evaluation(self) -> Callable[[], dict[str, Any]] | None:
        return self.evaluate if self._options.evaluate_every else None

    def _guarded(self, work: Callable[[], T]) -> T:
        """A failure of the ranks, or Ctrl-C, ends them, so that nothing is left behind.

        What was refused before it went to them leaves the trainer as it was, trained weights and all.
        """
        gang = self._gang
        try:
            return work()
        except BaseException as error:
            if gang is not None and gang is self._gang:
                stopped = not isinstance(error, (Exception, GeneratorExit))
                if stopped or gang.failure is not None:
                    self.shutdown()
            raise


_END = object()


def _peek(feed: Feed, step: int) -> Any:
    """The batch that comes next, which stays where it is."""
    try:
        return feed.peek()
    except Exception as error:
        raise data_error(error, step) from None
