"""x"""

from __future__ import annotations
from .action import Programs, Action, Op
from .v_shape import chunk_of

__all__ = ["v_half", "v_min"]


def nominal_half(p, i):
    s = 3 if p % 2 == 0 else 0
    return [2 * i, 3 * p - 2 - i, 3 * p - 1 + s + 2 * i, 6 * p - 2 - i + s]


def nominal_min(p, i):
    s = 2 if p % 3 == 0 else 0
    return [i, 2 * p - 1 - i, 2 * p + s + i, 4 * p + s - 1 - i]


def simple(nom, p, m):
    out = []
    for r in range(p):
        acts = {}
        for o, half, op in zip(nom(p, r), (0, 1, 1, 0), (Op.FORWARD, Op.FORWARD, Op.INPUT, Op.INPUT)):
            for k in range(m):
                assert o + 6 * k not in acts
                acts[o + 6 * k] = Action(chunk_of(half, r, p), op, k)
        prog = []
        pend = []
        for t in range(max(acts) + 1):
            if t in acts:
                prog.append(acts[t])
                if acts[t].op is Op.INPUT:
                    pend.append(Action(acts[t].chunk, Op.WEIGHT, acts[t].microbatch))
            elif pend:
                prog.append(pend.pop(0))
        out.append(tuple(prog + pend))
    return tuple(out)


def v_half(stages, microbatches):
    return simple(nominal_half, stages, microbatches)


def v_min(stages, microbatches):
    return simple(nominal_min, stages, microbatches)
