"""What glibc keeps of freed memory, given back to the system."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["give_back_freed"]


def give_back_freed() -> bool:
    """Returns the pages of freed blocks, also those between blocks in use, by glibc's ``malloc_trim``.

    Returns:
        Whether there was something to give back; never with another allocator.
    """
    if not sys.platform.startswith("linux"):
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and bool(trim(0))
