"""The machine that a table was measured on."""

from __future__ import annotations

import os
import platform
from datetime import date
from pathlib import Path

import ray
import torch

import raypipe

__all__ = ["machine"]


def machine() -> str:
    """Processor, cores, load, versions and date in one line."""
    load = os.getloadavg()[0]
    return (
        f"{date.today().isoformat()}: {_processor()}, {len(os.sched_getaffinity(0))} cores, load {load:.1f} at the "
        f"start; "
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"Ray {ray.__version__}, raypipe {raypipe.__version__}"
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or "unknown processor"
