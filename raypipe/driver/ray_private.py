"""What of Ray has no public name. Everything private of Ray that raypipe uses is in this file."""

from __future__ import annotations

from typing import cast

import ray._private.state
import ray._private.utils

__all__ = ["TOKEN_NOTICE", "current_cluster", "free_by_node"]

TOKEN_NOTICE = "ray._private.authentication.authentication_token_setup"
"""The logger that warns of a token where nobody asked for one, before the level given to ``ray.init`` counts."""


def current_cluster() -> str | None:
    """The address that ``ray start`` left on this machine, or None.

    ``ray.init(address="auto")`` would do, but it also joins a Ray that some other program started for itself.
    """
    return cast("str | None", ray._private.utils.read_ray_address())


def free_by_node() -> dict[str, dict[str, float]]:
    """What each node has free, by node id; the public call only gives the sum over all nodes."""
    free = ray._private.state.available_resources_per_node()  # type: ignore[no-untyped-call]
    return cast("dict[str, dict[str, float]]", free)
