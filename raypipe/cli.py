"""The command ``raypipe``."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import Any

import click

from .schedule import Costs, Schedule, build, draw_programs, draw_spans, names

__all__ = ["main"]

_MAX_WIDTH = 160


class _Group(click.Group):
    """A group whose errors are one sentence on stderr, without the usage around it."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        try:
            code = super().main(args, prog_name, complete_var, False, **extra)
        except click.ClickException as error:
            click.echo(f"raypipe: {error.format_message()}", err=True)
            code = error.exit_code
        except click.Abort:
            code = 130
        sys.exit(code)


@click.group(cls=_Group, invoke_without_command=True)
@click.pass_context
def main(context: click.Context) -> None:
    """Exact pipeline-parallel training of unmodified PyTorch models, on Ray.

    \b
    Example:
      raypipe schedule 1f1b --stages 4 --microbatches 8
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@main.command(
    short_help="Draw a schedule, its bubble and its peak in flight.", epilog=f"Schedules: {', '.join(names())}."
)
@click.argument("name")
@click.option("--stages", type=int, required=True, metavar="P", help="Pipeline stages.")
@click.option("--microbatches", type=int, required=True, metavar="M", help="Microbatches a step.")
@click.option(
    "--chunks", type=int, metavar="V", help="Chunks a stage, where the schedule interleaves; else leave it out."
)
@click.option("--csv", "as_csv", is_flag=True, help="Print the CSV of torch.distributed.pipelining instead.")
def schedule(name: str, stages: int, microbatches: int, chunks: int | None, as_csv: bool) -> None:
    """Draw the schedule NAME, with its bubble and each stage's peak of microbatches in flight.

    Times are simulated: a stage's forward takes 1, its backward 2 (1 for each of its halves), a message nothing. Chunks
    share their stage's time; in flight, a microbatch counts once for each chunk that holds it.

    \b
    Example:
      raypipe schedule 1f1b --stages 4 --microbatches 8
      raypipe schedule interleaved_1f1b --stages 4 --microbatches 8 --chunks 3
      raypipe schedule gpipe --stages 2 --microbatches 4 --csv > gpipe.csv
    """
    try:
        built = build(name, stages, microbatches, chunks)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    click.echo(built.to_csv() if as_csv else _describe(built), nl=not as_csv)


def _describe(schedule: Schedule) -> str:
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 40), _MAX_WIDTH)
    share = schedule.stages / schedule.chunks
    found = schedule.simulate(Costs(forward=share, backward=2 * share, input=share, weight=share))
    # click drops the colours where the output is no terminal.
    grid = draw_programs(schedule.programs, width=width, color=True)
    timeline = draw_spans(
        found.spans, schedule.stages, width=width, title="Simulated, forward 1, backward 2:", color=True
    )
    rows = [
        f"{stage:>5}{peak:>16}{idle:>9.1%}"
        for stage, (peak, idle) in enumerate(zip(found.peak_in_flight, found.stage_bubbles, strict=True))
    ]
    table = "\n".join([f"{'stage':>5}{'peak in flight':>16}{'idle':>9}", *rows])
    total = f"makespan {found.makespan:g}, bubble {found.bubble:.1%}"
    return f"{schedule.headline()}\n\n{grid}\n\n{timeline}\n\n{table}\n\n{total}"
