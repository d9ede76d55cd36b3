"""A stage's slice of the model: its weights in the model's own objects, and the recordings that tell it what crosses.

Every rank records for itself: a recording is a pure function of the model and of a microbatch's shapes, so all ranks
arrive at the same boundary without a word.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from raypipe.errors import CutError
from raypipe.model.build import Skeleton, materialise
from raypipe.model.call import Caller
from raypipe.model.compiled import compile_units
from raypipe.model.husk import Husk
from raypipe.model.intercept import install
from raypipe.model.join import shapes_of
from raypipe.model.predict_recording import Predictor, family_of, sizes_of
from raypipe.model.record import record
from raypipe.model.recording import Recording, Window
from raypipe.model.replay import Seeds, replay
from raypipe.model.twin import Twin
from raypipe.model.units import find_units
from raypipe.stage.boundary import Boundary, boundaries

__all__ = ["Planned", "Slice", "signature"]


KEPT = 256
"""How many signatures a rank remembers: more lengths than a run has, and a bound for batches that never look alike."""


@dataclass(frozen=True, slots=True)
class Planned:
    """What is known of all microbatches of one signature: events, chunks, and what crosses between them."""

    recording: Recording
    windows: tuple[Window, ...]
    boundaries: tuple[Boundary, ...]


class Slice:
    """The model as one stage has it.

    Args:
        skeleton: of the whole model.
        tensors: the parameters and buffers that this stage holds, by name.
        patterns: the user's ``units``.
        cuts: the unit call that each chunk but the first starts with.
        calls: how many unit calls the model makes.
        caller: how the model is called.
        recompute: names of the units that run again in their backward.
        compiled: whether to compile the units.

    Attributes:
        units: of the model, by name.
        parameters: the parameters held, by name, in model order.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        tensors: Mapping[str, Tensor],
        patterns: Sequence[str] | None,
        cuts: tuple[int, ...],
        calls: int,
        caller: Caller,
        recompute: Collection[str] = (),
        compiled: bool = False,
    ) -> None:
        self._twin = Twin(skeleton.model, patterns)
        self.model = materialise(skeleton, tensors)
        self._cuts, self._calls, self._caller = cuts, calls, caller
        self._recompute = frozenset(recompute)
        self.units = find_units(self.model, patterns)
        self._switch = install(self.units)
        if compiled:
            compile_units(self.units, self._recompute)
        self._trainable = {name for name, parameter in self._twin.model.named_parameters() if parameter.requires_grad}
        self.name_tensors()
        self._train_modes = [(module, module.training) for module in (*self._modules(),)]
        self._training = True
        self._planned: dict[Any, Planned] = {}
        self._predictor = Predictor(self._twin.empty)

    def name_tensors(self) -> None:
        """Finds the parameters and the units' buffers; again after parameters were put in the place of others."""
        named = dict(self.model.named_parameters())
        self._names = {id(parameter): name for name, parameter in named.items()}
        buffers = {id(buffer): name for name, buffer in self.model.named_buffers()}
        self._names.update((id(b), buffers[id(b)]) for unit in self.units.values() for b in unit.buffers())
        self.parameters = {name: p for name, p in named.items() if not isinstance(p, Husk)}

    def set_training(self, training: bool) -> None:
        """Training runs in the modes that the model came in, evaluation in eval mode."""
        if training != self._training:
            self._training = training
            for module, mode in self._train_modes:
                module.training = mode and training

    def planned(self, batch: Any) -> Planned:
        """What is known of a microbatch of this signature, in the present mode and grad mode."""
        key = (signature(batch), self._training, torch.is_grad_enabled())
        known = self._planned.pop(key, None)
        if known is not None:
            self._planned[key] = known  # the most recently used stand last
        else:
            recording = self._recorded(batch)
            if len(recording.calls) != self._calls:
                raise CutError(
                    f"the model makes {len(recording.calls)} unit calls for this batch and made {self._calls} for the "
                    "one it was planned with; put what varies into one unit with units=[...]"
                )
            crossing = boundaries(recording, self._cuts, self._first_trained(recording))
            self._planned[key] = Planned(recording, recording.windows(self._cuts), crossing)
            if len(self._planned) > KEPT:
                del self._planned[next(iter(self._planned))]
        return self._planned[key]

    def _recorded(self, batch: Any) -> Recording:
        others = tuple(_hashable(leaf) for leaf in pytree.tree_leaves(batch) if not isinstance(leaf, Tensor))
        family, sizes = (family_of(batch), others, self._training, torch.is_grad_enabled()), sizes_of(batch)
        recording = self._predictor.predict(family, sizes)
        if recording is None:
            recording = record(self._twin, lambda model: self._caller.outputs(model, _copied(batch)))
            recording.low = self._caller.precision.boundary
            self._predictor.learn(family, sizes, recording)
        return recording

    def run(
        self, batch: Any, planned: Planned, chunk: int, received: Sequence[Tensor], seeds: Seeds
    ) -> tuple[list[Tensor], Any]:
        """Runs one chunk on a microbatch; see ``model.replay.replay``."""
        return replay(
            self.model,
            self._switch,
            self._names,
            lambda model: self._caller.outputs(model, batch),
            planned.recording,
            planned.windows[chunk],
            received,
            seeds,
            self._recompute,
        )

    def _first_trained(self, recording: Recording) -> int:
        """The first event that reads a trainable parameter, or the number of events."""
        for number, event in enumerate(recording.events):
            inside = self._twin.unit_parameters[event.name] if event.call is not None else ()
            if not self._trainable.isdisjoint((*event.parameters, *inside)):
                return number
        return len(recording.events)

    def output_shapes(self, batch: Any) -> list[tuple[int, ...] | None]:
        """The shape of each tensor that the model returns for this microbatch; see ``model.join.shapes_of``.

        Empty where fakes cannot follow the forward to its end.
        """
        shapes: list[tuple[int, ...] | None] = []

        def forward(model: nn.Module) -> Any:
            outputs = self._caller.outputs(model, _copied(batch))
            shapes[:] = shapes_of(outputs)
            return outputs

        record(self._twin, forward)
        return shapes

    def _modules(self) -> list[nn.Module]:
        return [*self.model.modules(), *self._twin.model.modules()]


def _copied(batch: Any) -> Any:
    """The twin's forward may change its microbatch in place."""
    return pytree.tree_map_only(Tensor, torch.clone, batch)


def signature(batch: Any) -> tuple[Any, ...]:
    """What a recording depends on: the tree, the shapes and dtypes of tensors, and every other leaf itself.

    Of a string only that it is one: the strings of a batch (names, prompts) differ from sample to sample. A model that
    branches on them takes another way than in its recording, and the replay says so.
    """
    leaves, tree = pytree.tree_flatten(batch)
    described = tuple(
        (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else _hashable(leaf) for leaf in leaves
    )
    return described, tree


def _hashable(leaf: Any) -> Any:
    if isinstance(leaf, str):
        return str
    try:
        hash(leaf)
    except TypeError:
        return type(leaf), repr(leaf)
    return type(leaf), leaf
