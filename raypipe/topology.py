"""Where each rank stands: the only arithmetic on ranks.

Ranks are numbered with the tensor index fastest, then the stage, then the replica: the ranks of a tensor group are
neighbours, then the stages of a pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Place", "Topology"]


@dataclass(frozen=True, slots=True)
class Place:
    """A rank's coordinates."""

    replica: int
    stage: int
    tensor: int


@dataclass(frozen=True, slots=True)
class Topology:
    """The grid of ranks: ``replicas`` pipelines of ``stages`` stages of ``tensor`` ranks each."""

    stages: int
    replicas: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name in ("stages", "replicas", "tensor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but a topology has at least one of each")

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.replicas * self.stages * self.tensor

    def rank(self, stage: int, replica: int = 0, tensor: int = 0) -> int:
        """The rank at these coordinates."""
        return (replica * self.stages + stage) * self.tensor + tensor

    def place(self, rank: int) -> Place:
        """The coordinates of ``rank``."""
        above, tensor = divmod(rank, self.tensor)
        replica, stage = divmod(above, self.stages)
        return Place(replica, stage, tensor)

    def ranks_of(self, replica: int) -> tuple[int, ...]:
        """All ranks of one pipeline, in order."""
        return tuple(rank for rank in range(self.size) if self.place(rank).replica == replica)

    def leaders(self, replica: int) -> tuple[int, ...]:
        """The first rank of each stage's tensor group in one pipeline, in order."""
        return tuple(self.rank(stage, replica) for stage in range(self.stages))

    def leader(self, rank: int) -> int:
        """The first rank of the tensor group of ``rank``."""
        place = self.place(rank)
        return self.rank(place.stage, place.replica)

    def copies(self, rank: int) -> tuple[int, ...]:
        """The ranks that stand where ``rank`` does, one in each replica, in order."""
        place = self.place(rank)
        return tuple(self.rank(place.stage, replica, place.tensor) for replica in range(self.replicas))

    def replica_named(self, rank: int) -> int | None:
        """The rank's replica for a message to a person: None where there is but one, and no need to name it."""
        return self.place(rank).replica if self.replicas > 1 else None

    def label(self, rank: int) -> str:
        """What a person reads: ``stage 2/4 · replica 0 · rank 5`` (counted from 0, of their number)."""
        place = self.place(rank)
        return f"stage {place.stage}/{self.stages} · replica {place.replica} · rank {rank}"
