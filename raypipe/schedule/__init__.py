"""WHEN each stage computes what: schedules as pure data, without torch and without Ray.

A file is a noun: ``action`` the smallest value, ``schedule`` the whole, ``check`` the rules that hold for every
schedule, ``dry_run`` who waits for whom, ``costs`` what things take, ``simulate`` the times, ``critical_path`` why they
are so, ``memory`` what is kept, ``choose`` the best of several, ``draw`` and ``csv`` the two text forms. Each named
schedule is a pure function in a file such as ``gpipe`` or ``zbv``; ``catalog`` knows them by name.
"""

from __future__ import annotations

from .action import Action, Op, Programs
from .auto import Auto
from .catalog import build, chunks_of, names
from .choose import Choice, choose
from .costs import Costs
from .draw import draw_programs, draw_spans
from .dualpipev import dualpipev
from .gpipe import gpipe
from .interleaved import interleaved_1f1b
from .interleaved_zb import interleaved_zb
from .looped_bfs import looped_bfs
from .one_f_one_b import one_f_one_b
from .schedule import Schedule
from .simulate import Simulation, simulate
from .span import Span, Transfer
from .v_blocks import v_half, v_min
from .zbv import zbv
from .zero_bubble import zb_h1, zb_h2

__all__ = [
    "Action",
    "Auto",
    "Choice",
    "Costs",
    "Op",
    "Programs",
    "Schedule",
    "Simulation",
    "Span",
    "Transfer",
    "build",
    "choose",
    "chunks_of",
    "draw_programs",
    "draw_spans",
    "dualpipev",
    "gpipe",
    "interleaved_1f1b",
    "interleaved_zb",
    "looped_bfs",
    "names",
    "one_f_one_b",
    "simulate",
    "v_half",
    "v_min",
    "zb_h1",
    "zb_h2",
    "zbv",
]
