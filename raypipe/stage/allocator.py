"""How a rank's process treats memory that PyTorch gives back on the CPU.

glibc returns large blocks to the kernel when they are freed, and the next microbatch's tensors fault every page in
again. A rank allocates the same sizes over and over, so its process keeps them: about 5 % of a step of a GPT of width
512.
"""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
_MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Makes this process reuse freed blocks instead of returning them; for processes that run a rank and nothing else.

    Returns:
        Whether it took effect; not with an allocator other than glibc's.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 2**30)) and bool(mallopt(_TRIM_THRESHOLD, _MOST))
