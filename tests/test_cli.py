from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from raypipe.cli import main
from raypipe.schedule import Schedule, build, names


def run(*arguments: str, columns: int = 100) -> Result:
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(main, arguments)


def test_schedule_draws_grid_timeline_and_numbers() -> None:
    result = run("schedule", "1f1b", "--stages", "4", "--microbatches", "8")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{build('1f1b', 4, 8)}\n".replace("microbatches\n", "microbatches\n\n", 1))
    assert "stage 3 |........0>>0<<<<" in result.stdout
    peaks = [line.split() for line in result.stdout.splitlines() if line.endswith("27.3%") and "," not in line]
    assert peaks == [["0", "4", "27.3%"], ["1", "3", "27.3%"], ["2", "2", "27.3%"], ["3", "1", "27.3%"]]
    assert result.stdout.endswith("makespan 33, bubble 27.3%\n")
    assert "\x1b" not in result.stdout


def test_schedule_takes_chunks_which_share_their_stages_time() -> None:
    result = run("schedule", "interleaved_1f1b", "--stages", "4", "--microbatches", "8")
    assert result.stdout.startswith("interleaved_1f1b: 4 stages, 8 chunks, 8 microbatches\n")
    assert result.stdout.endswith("makespan 28.5, bubble 15.8%\n")
    result = run("schedule", "interleaved_1f1b", "--stages", "4", "--microbatches", "8", "--chunks", "3")
    assert result.stdout.startswith("interleaved_1f1b: 4 stages, 12 chunks, 8 microbatches\n")
    assert result.stdout.endswith("makespan 27, bubble 11.1%\n")


def test_schedule_fits_the_terminal() -> None:
    result = run("schedule", "gpipe", "--stages", "3", "--microbatches", "40", columns=72)
    assert max(map(len, result.stdout.splitlines())) <= 72


def test_schedule_prints_torchs_csv_and_nothing_else() -> None:
    result = run("schedule", "gpipe", "--stages", "3", "--microbatches", "4", "--csv")
    assert Schedule.from_csv(result.stdout, "gpipe") == build("gpipe", 3, 4)
    assert result.stdout == build("gpipe", 3, 4).to_csv()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("schedule", "pipedream", "--stages", "2", "--microbatches", "2"),
            "'pipedream' is not known; choose one of 1f1b",
        ),
        (("schedule", "gpipe", "--stages", "0", "--microbatches", "2"), "stages is 0, but it must be at least 1"),
        (("schedule", "gpipe", "--stages", "two", "--microbatches", "2"), "'two' is not a valid integer"),
        (("schedule", "gpipe", "--stages", "2"), "Missing option '--microbatches'"),
        (("schedule", "gpipe", "--stages", "2", "--microbatches", "2", "--chunky"), "No such option"),
        (
            ("schedule", "zbv", "--stages", "2", "--microbatches", "2", "--chunks", "3"),
            "chunks is 3, but the schedule 'zbv' holds two chunks a stage; leave chunks out",
        ),
        (("schedules",), "No such command 'schedules'"),
    ],
)
def test_bad_input_is_one_sentence_on_stderr(arguments: tuple[str, ...], sentence: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert sentence in result.stderr
    assert result.stderr.startswith("raypipe: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [("--help",), ("schedule", "--help"), ()])
def test_help_shows_an_example(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 0
    assert "raypipe schedule 1f1b --stages 4 --microbatches 8" in result.stdout


def test_help_lists_every_schedule() -> None:
    text = " ".join(run("schedule", "--help").stdout.split())
    assert f"Schedules: {', '.join(names())}." in text


def test_schedule_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from raypipe.cli import main\n"
        "main(['schedule', 'gpipe', '--stages', '2', '--microbatches', '2'], standalone_mode=False)\n"
        "print(sorted({'torch', 'ray', 'numpy'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
