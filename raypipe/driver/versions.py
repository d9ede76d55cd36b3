"""Every node runs the same software, or training does not start."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass

import ray
import torch

import raypipe
from raypipe.errors import ResourcesError

__all__ = ["NodeInfo", "check_versions"]


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """A process and the software that it sees."""

    node: str
    ip: str
    pid: int
    python: str
    torch: str
    ray: str
    raypipe: str

    @classmethod
    def here(cls) -> NodeInfo:
        """This process."""
        return cls(
            node=ray.get_runtime_context().get_node_id(),
            ip=ray.util.get_node_ip_address(),  # type: ignore[no-untyped-call]
            pid=os.getpid(),
            python=platform.python_version(),
            # Without the build ("+cpu", "+cu126"): a driver without a GPU is no reason to refuse.
            torch=torch.__version__.split("+")[0],
            ray=ray.__version__,
            raypipe=raypipe.__version__,
        )


def check_versions(driver: NodeInfo, ranks: Sequence[NodeInfo]) -> None:
    """Compares every rank's software with the driver's.

    Raises:
        ResourcesError: a sentence that names the node and both versions.
    """
    for info in ranks:
        for name in ("python", "torch", "ray", "raypipe"):
            theirs, ours = getattr(info, name), getattr(driver, name)
            if theirs != ours:
                raise ResourcesError(
                    f"node {info.ip} has {name} {theirs}, but the driver has {name} {ours}; "
                    f"install the same version of {name} on every node"
                )
