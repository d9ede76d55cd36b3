"""The ranks of one stage that each hold a slice of its layers, as PyTorch's DTensor wants them.

DTensor finds its process group through the process's default group, so a process belongs to one tensor group.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import Store

from raypipe.errors import PeerLost

__all__ = ["TensorGroup", "named", "open_group"]


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """A tensor group as one of its ranks sees it.

    Attributes: ``mesh``, one-dimensional; ``rank`` in the group, from 0; ``size``.
    """

    mesh: DeviceMesh
    rank: int
    size: int

    def sum(self, tensor: Tensor) -> None:
        """Sums a tensor in place; the result has the same bits on all ranks."""
        dist.all_reduce(tensor, group=self.mesh.get_group())

    def most(self, tensor: Tensor) -> None:
        """The largest of the ranks' values, in place."""
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.mesh.get_group())

    def close(self) -> None:
        """Leaves the group; the process may then open another."""
        if dist.is_initialized():
            dist.destroy_process_group()


def open_group(store: Store, rank: int, size: int, timeout_s: float) -> TensorGroup:
    """Connects the ranks of a tensor group; blocks until all of them are there.

    Args:
        store: of this group alone (a ``PrefixStore``).
        rank: this one's place in the group, from 0.
        size: of the group.
        timeout_s: how long a connection, and each collective, may wait, in seconds.

    Raises:
        PeerLost: a rank did not come.
        ValueError: this process is in a group already.
    """
    if dist.is_initialized():
        raise ValueError("this process is in a process group already, but DTensor wants the only one; use another one")
    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s))
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tensor",))
    except (RuntimeError, dist.DistError) as error:
        raise PeerLost(None, f"the tensor group did not come together ({_first_line(error)})") from error
    return TensorGroup(mesh, rank, size)


def named(error: Exception) -> Exception:
    """A ``PeerLost`` where a collective failed because another rank of the group did; other errors as they are."""
    signs = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "Connection closed")
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs):
        lost = PeerLost(None, f"a rank of the tensor group is gone ({_first_line(error)})")
        lost.__cause__ = error
        return lost
    return error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
