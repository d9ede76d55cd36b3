"""Runs the benchmarks, prints the table, and writes it to docs/benchmarks.md where all of them ran."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import driver_cost, emulated, lengths, memory, real_work, replay_cost, split_cost
from benchmarks.machine import machine
from benchmarks.table import Subject, page, render
from raypipe.driver.cluster import start_ray

__all__ = ["main"]

SUBJECTS: Mapping[str, Callable[[int, Callable[[str], None]], Subject]] = {
    "real_work": real_work.run,
    "real_work_halves": real_work.run_halves,
    "emulated": emulated.run,
    "emulated_8": emulated.run_8,
    "zero_bubble": emulated.run_zbv,
    "split_cost": split_cost.run,
    "driver_cost": driver_cost.run,
    "replay_cost": replay_cost.run,
    "lengths": lengths.run,
    "memory": memory.run,
}
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
RANKS = 8


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="name", help=f"one of {', '.join(SUBJECTS)}; all where none is given"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each comparison, at least 1 (default 5)")
    options = parser.parse_args()
    if unknown := set(options.names) - set(SUBJECTS):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; choose from {', '.join(SUBJECTS)}")
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}, but must be at least 1")
    names = options.names or list(SUBJECTS)
    here, began = machine(), time.monotonic()
    session = start_ray(RANKS)
    try:
        subjects = [SUBJECTS[name](options.rounds, _say(name)) for name in names]
    finally:
        session.stop()
    text = render(subjects, f"{here}; {options.rounds} rounds, {(time.monotonic() - began) / 60:.0f} min.")
    print(text)
    if set(names) == set(SUBJECTS):
        page(PAGE, text)
        print(f"written to {PAGE}")
    else:
        print("only a part was run, so docs/benchmarks.md stays as it is")
    sys.exit(any(row.met is False for subject in subjects for row in subject.rows))


def _say(name: str) -> Callable[[str], None]:
    return lambda line: print(f"[{name}] {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
