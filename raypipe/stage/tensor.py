"""A rank of a tensor group at work: its slices, their gradients, and whole weights again for whoever asks."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store

from raypipe.model.build import held_state
from raypipe.model.husk import Husk
from raypipe.parallel.apply import split_layers, summed_parameters
from raypipe.parallel.group import open_group
from raypipe.parallel.shards import Shards
from raypipe.parallel.stage_split import TensorSplit
from raypipe.parallel.verify import Trial
from raypipe.topology import Place

__all__ = ["TensorRank"]


class TensorRank:
    """Splits a stage's model in place, and keeps what its rank needs for that.

    Args:
        model: the stage's, with whole weights in its units and husks elsewhere.
        units: of the model, by name.
        split: of the whole model.
        store: where all ranks meet.
        place: of this rank.
        timeout_s: how long a collective of the group may wait, in seconds.

    Attributes: ``shards``, the parameters.

    Raises:
        PeerLost: a rank of the group did not come.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Mapping[str, nn.Module],
        split: TensorSplit,
        store: Store,
        place: Place,
        timeout_s: float,
    ) -> None:
        self._model, self._leads = model, place.tensor == 0
        room = PrefixStore(f"tensor/{place.replica}-{place.stage}", store)
        group = open_group(room, place.tensor, split.size, timeout_s)
        styles = {name: style for name, style in split.styles.items() if _is_here(model.get_submodule(name))}
        here = {
            name: unit for name, unit in units.items() if any(s == name or s.startswith(f"{name}.") for s in styles)
        }
        self._trial: Trial | None = Trial(here)
        summed = summed_parameters(model, styles)
        split_layers(model, group, styles, [each for each in split.local if _is_here(model.get_submodule(each.module))])
        self._trial.watch(here, group, summed)
        held = {name: p for name, p in model.named_parameters() if not isinstance(p, Husk)}
        self.shards = Shards(group, held, summed)

    def collect(self) -> None:
        """After a step's last backward: hands the gradients to the optimizer's parameters.

        Raises:
            CutError: in the first step, where the ranks' copies of a whole parameter would drift apart.
        """
        self.shards.collect()
        if self._trial is not None:
            self.shards.check_replicas()
            self._trial.stop()
            self._trial = None

    def state(self) -> dict[str, Tensor]:
        """Every parameter and buffer, whole, on the group's first rank; nothing on the others, which must ask too."""
        state = held_state(self._model)
        for name in self.shards.parameters:
            state[name] = self.shards.full(name)
        return state if self._leads else {}


def _is_here(module: nn.Module) -> bool:
    """Whether a module's weights are on this stage. A module is in one unit, so that one of its weights tells."""
    return not any(isinstance(parameter, Husk) for parameter in module.parameters())
