"""Makes a corpus of bytes from Python's own standard library, so that training needs no download.

    python examples/make_corpus.py OUT_FOLDER [--block 128] [--limit-mb 16]

OUT_FOLDER/train and OUT_FOLDER/valid hold Parquet files with two columns of ``--block`` bytes a row: ``tokens``, and
``targets``, which are the tokens one byte further. Whole source files are held out for ``valid``.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy
import pyarrow as pa
import pyarrow.parquet as pq

HELD_OUT = 20  # every 20th source file is for validation
ROWS_PER_FILE = 16_384
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def source_files() -> list[Path]:
    """The standard library's modules, sorted; its tests and what was installed into it left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts))


def read_parts(limit_bytes: int) -> dict[str, bytes]:
    """The text of both parts, together about ``limit_bytes`` at most."""
    parts = {"train": bytearray(), "valid": bytearray()}
    for number, path in enumerate(source_files()):
        part = parts["valid" if number % HELD_OUT == HELD_OUT - 1 else "train"]
        part += path.read_bytes()[: limit_bytes - sum(map(len, parts.values()))]
    return {name: bytes(text) for name, text in parts.items()}


def tables(text: bytes, block: int) -> Iterator[pa.Table]:
    """One table a file. Row i's tokens are bytes [i * block, (i + 1) * block), its targets the same plus one."""
    stream = numpy.frombuffer(text, numpy.uint8)
    rows = (len(stream) - 1) // block
    for start in range(0, rows, ROWS_PER_FILE):
        first, end = start * block, min(start + ROWS_PER_FILE, rows) * block
        columns = {"tokens": stream[first:end], "targets": stream[first + 1 : end + 1]}
        yield pa.table({name: pa.FixedSizeListArray.from_arrays(flat, block) for name, flat in columns.items()})


def make_corpus(folder: str | Path, block: int = 128, limit_mb: float = 16) -> Path:
    """Writes the corpus, unless it is there already with the same settings, and prints one line.

    Args:
        folder: where ``train/`` and ``valid/`` go. A corpus with other settings is replaced.
        block: bytes in a row.
        limit_mb: MiB of source text to use at most.

    Returns:
        The folder.

    Raises:
        ValueError: a number is not above zero, the folder holds something else, or the text is too short for one row.
    """
    folder = Path(folder).absolute()
    if block < 1 or limit_mb <= 0:
        raise ValueError(f"block is {block} and limit_mb {limit_mb}, but both are above zero")
    settings = {"block": block, "limit_mb": limit_mb, "python": platform.python_version()}
    marker = folder / "corpus.json"
    if marker.exists() and json.loads(marker.read_text()) == settings:
        print(f"{folder} is there already: {json.dumps(settings)}")
        return folder
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        raise ValueError(f"{folder} holds something that is no corpus of this script; give a new or an empty folder")

    parts = read_parts(int(limit_mb * 2**20))
    if min(map(len, parts.values())) <= block:
        raise ValueError(f"limit_mb={limit_mb} gives less than one row of {block} bytes to a part; raise it")
    # Written beside and moved last, so that a folder is never half a corpus.
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    counts = {}
    for name, text in parts.items():
        (unfinished / name).mkdir(parents=True)
        counts[name] = 0
        for number, table in enumerate(tables(text, block)):
            pq.write_table(table, unfinished / name / f"{number:03}.parquet", row_group_size=1024)
            counts[name] += table.num_rows
    (unfinished / marker.name).write_text(json.dumps(settings))
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    print(f"wrote {counts['train']:,} training and {counts['valid']:,} validation rows of {block} bytes to {folder}")
    return folder


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=make_corpus.__doc__.splitlines()[0] if make_corpus.__doc__ else None)
    parser.add_argument("folder", metavar="OUT_FOLDER", type=Path)
    parser.add_argument("--block", type=int, default=128, help="bytes in a row (default: 128)")
    parser.add_argument("--limit-mb", type=float, default=16, help="MiB of source text at most (default: 16)")
    arguments = parser.parse_args()
    make_corpus(arguments.folder, arguments.block, arguments.limit_mb)


if __name__ == "__main__":
    main()
