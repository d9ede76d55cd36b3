"""How long each unit call takes, forward and backward, measured on one microbatch on this machine.

The model's own forward runs; a unit call runs by itself, on detached arguments, a few times. Equal calls (same module
but for its weights, same arguments) are measured once, and answered with what the first of them returned: so only one
of a model's equal blocks needs its weights at all. What runs outside of units counts to the unit call before it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from raypipe.model.call import Caller
from raypipe.model.cost import CallTime
from raypipe.model.husk import Husk, replace_tensors
from raypipe.model.intercept import Watch, install
from raypipe.model.recompute import recomputed
from raypipe.model.recording import Recording
from raypipe.model.time_call import REPEATS, WARM_UP, fresh, median_of, timed
from raypipe.model.trees import tensors_in
from raypipe.model.units import find_units

__all__ = ["measure", "runnable_copy"]


def runnable_copy(model: nn.Module, training: bool = True) -> nn.Module:
    """A copy in the modes of the run (a root in train mode keeps its submodules' own).

    It shares the parameters' memory, and has gradients and buffers of its own.
    """
    shared: dict[int, Tensor] = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()
    }
    shared.update((id(buffer), buffer.detach().clone()) for buffer in model.buffers())
    made = replace_tensors(model, shared)
    return made if made.training and training else made.train(training)


def measure(
    model: nn.Module,
    patterns: Sequence[str] | None,
    caller: Caller,
    batch: Any,
    recording: Recording,
    threads: int,
    *,
    training: bool = True,
    halves: bool = False,
    with_weights: Callable[[nn.Module], nn.Module] = lambda unit: unit,
    again: Collection[str] = (),
) -> tuple[CallTime, ...]:
    """Seconds of each unit call, with what follows it outside of units, for one microbatch.

    Args:
        model: to run; its units' classes and its buffers are changed (see ``runnable_copy``), parameters and random
            states are not.
        patterns: the user's ``units``.
        caller: how the model is called and its loss found.
        batch: one microbatch.
        recording: of it.
        threads: of PyTorch meanwhile.
        training: whether there is a loss, and a backward from it.
        halves: whether to measure the backward's halves too.
        with_weights: gives a unit to run in the place of one that has none (see ``lent``).
        again: names of the units that run again in their backward.
    """
    stopwatch = _Stopwatch(model, recording, with_weights, halves, again)
    switch = install(find_units(model, patterns))
    between: list[list[CallTime]] = []
    with _threads(threads):
        for _ in range(WARM_UP + REPEATS):
            own = pytree.tree_map_only(Tensor, torch.clone, batch)
            stopwatch.begin()
            with switch.on(stopwatch), torch.enable_grad():
                outputs = caller.outputs(model, own)
                stopwatch.end([caller.loss_of(outputs, own)] if training else [])
            between.append(stopwatch.between)
    kept = between[WARM_UP:]
    return tuple(inside + median_of([run[call] for run in kept]) for call, inside in enumerate(stopwatch.within))


class _Stopwatch(Watch):
    """Times one forward after the other.

    Attributes: ``within``, of each unit call; ``between``, of what followed each in the latest forward.
    """

    def __init__(
        self,
        model: nn.Module,
        recording: Recording,
        with_weights: Callable[[nn.Module], nn.Module],
        halves: bool,
        again: Collection[str],
    ) -> None:
        super().__init__({id(parameter): name for name, parameter in model.named_parameters()})
        self._loose = [p for p in model.parameters() if p.requires_grad and not isinstance(p, Husk)]
        self._with_weights, self._halves, self._again = with_weights, halves, again
        self._modules = dict(model.named_modules())
        self._flops = [recording.events[event].flops for event in recording.calls]
        self._known: dict[Any, tuple[CallTime, Any]] = {}
        self.within: list[CallTime] = []
        self.between: list[CallTime] = []

    def begin(self) -> None:
        """Before a forward."""
        self.within, self.between = [], []
        self._forward, self._left, self._sources = 0.0, perf_counter(), list[Tensor]()

    def unit_call(self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.off():
            self._close([t for _, t in tensors_in((args, kwargs))])
            key = self._key(name, args, kwargs)
            if key not in self._known:
                unit = self._with_weights(self._modules[name])
                trained = [p for p in unit.parameters() if p.requires_grad]
                own = call if unit is self._modules[name] else unit.__call__
                own = functools.partial(_again, own) if name in self._again else own
                self._known[key] = timed(own, args, kwargs, trained, self._halves)
            time, result = self._known[key]
            self.within.append(time)
            result = pytree.tree_map_only(Tensor, fresh, result)
            self._sources = [t for _, t in tensors_in(result) if t.requires_grad]
            for _, tensor in tensors_in(result):
                self.mark(tensor)
            self._forward, self._left = 0.0, perf_counter()
            return result

    def function(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        start = perf_counter()
        result = func(*args, **kwargs)
        self._forward += perf_counter() - start
        for _, tensor in tensors_in(result):
            self.mark(tensor)
        return result

    def end(self, losses: Sequence[Tensor]) -> None:
        """After a forward: all that came after the last unit call counts to it, also where no function was seen."""
        self._forward = perf_counter() - self._left
        with self.off():
            self._close(losses, self._loose)

    def _close(self, ends: Sequence[Tensor], parameters: Sequence[Tensor] = ()) -> None:
        """Ends what followed a unit call: its backward goes from ``ends`` to what the call returned."""
        if not self.within:
            return  # what comes before the first unit call is masks and positions
        roots = [t for t in ends if t.requires_grad and t.grad_fn is not None]
        sources = [*self._sources, *parameters]
        backward = 0.0
        if roots and sources:
            ones = [torch.ones_like(root) for root in roots]
            start = perf_counter()
            torch.autograd.grad(roots, sources, ones, allow_unused=True, retain_graph=True)
            backward = perf_counter() - start
        self.between.append(CallTime(self._forward, backward, backward))

    def _key(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Equal for calls that take equally long."""
        module = self._modules[name]
        held = tuple((tuple(t.shape), t.dtype, t.requires_grad) for t in (*module.parameters(), *module.buffers()))
        modes = tuple(inner.training for inner in module.modules())
        leaves, tree = pytree.tree_flatten((args, kwargs))
        given = tuple(
            (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.requires_grad)
            if isinstance(leaf, Tensor)
            else type(leaf)
            for leaf in leaves
        )
        return repr(module), held, modes, given, tree, self._flops[len(self.within)], name in self._again


def _again(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return recomputed(call, args, kwargs)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
