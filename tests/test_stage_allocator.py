"""Freed memory stays with the process."""

from __future__ import annotations

import subprocess
import sys

FAULTS = """
import resource, torch
from raypipe.stage.allocator import keep_freed_memory
{call}
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(16, 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(3)
print(faults(20))
"""


def faults(call: str) -> int:
    """Page faults of twenty tensors of 64 MiB, one after the other."""
    out = subprocess.run([sys.executable, "-c", FAULTS.format(call=call)], capture_output=True, text=True, check=True)
    return int(out.stdout)


def test_tensors_of_the_same_size_reuse_their_memory() -> None:
    assert faults("assert keep_freed_memory()") * 2 < faults("")
