"""Parquet as a source: every row once, resumable anywhere, in bounded memory, and clear about bad input."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raypipe.data import Cursor, ParquetSource, parquet

WIDTH = 2048


def write(folder: Path, sizes: list[int], row_group: int, name: str = "part") -> Path:
    """Files of rows numbered through all of them: ``row`` its number, ``tokens`` derived from it."""
    folder.mkdir(exist_ok=True)
    start = 0
    for number, size in enumerate(sizes):
        rows = numpy.arange(start, start + size, dtype=numpy.int64)
        flat = (rows[:, None] + numpy.arange(WIDTH)).astype(numpy.uint8).reshape(-1)
        tokens = pa.FixedSizeListArray.from_arrays(pa.array(flat), WIDTH)
        table = pa.table({"row": rows, "tokens": tokens, "unused": rows})
        pq.write_table(table, folder / f"{name}-{number:03}.parquet", row_group_size=row_group)
        start += size
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3,000 rows of 2 KiB in 5 files: with a buffer of 1 MiB, about 12 windows."""
    return write(tmp_path_factory.mktemp("corpus"), [1000, 700, 1, 799, 500], row_group=130)


def order_of(source: ParquetSource, cursor: Cursor | None = None) -> list[int]:
    return [row for batch, _ in source.epoch(cursor or Cursor()) for row in batch["row"].tolist()]


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "raypipe-data"]


def test_an_epoch_is_a_permutation_and_rows_stay_whole(corpus: Path) -> None:
    source = parquet(corpus, ["row", "tokens"], 64, buffer_mb=1)
    seen: list[int] = []
    for batch, cursor in source.epoch(Cursor()):
        assert batch["tokens"].dtype == torch.uint8
        expected = (batch["row"][:, None] + torch.arange(WIDTH)).to(torch.uint8)
        assert torch.equal(batch["tokens"], expected)
        seen += batch["row"].tolist()
        assert cursor == Cursor(offset=len(seen))
    assert sorted(seen) == list(range(3000))
    assert seen != sorted(seen)
    assert not reading_threads()


def test_without_shuffle_rows_are_in_the_order_of_the_files(corpus: Path) -> None:
    assert order_of(parquet(corpus, ["row"], 64, shuffle=False)) == list(range(3000))
    assert order_of(parquet(corpus, ["row"], 64, shuffle=False), Cursor(offset=1234)) == list(range(1234, 3000))


def test_the_order_is_a_function_of_the_seeds_and_the_epoch(corpus: Path) -> None:
    source = parquet(corpus, ["row"], 64)
    first = order_of(source)
    assert first == order_of(parquet(str(corpus), ["row"], 500))
    others = [
        order_of(source, Cursor(epoch=1)),
        order_of(source, Cursor(seed=1)),
        order_of(parquet(corpus, ["row"], 64, seed=1)),
    ]
    for other in others:
        assert sorted(other) == sorted(first)
        same_place = sum(one == two for one, two in zip(first, other, strict=True))
        assert same_place < 20


def test_the_shuffle_mixes_all_files_beyond_its_buffer(corpus: Path) -> None:
    order = numpy.array(order_of(parquet(corpus, ["row", "tokens"], 64, buffer_mb=1)))
    assert abs(numpy.corrcoef(order, numpy.arange(3000))[0, 1]) < 0.2
    for start in range(0, 2944, 64):
        batch = order[start : start + 64]
        assert numpy.ptp(batch) > 1000  # rows from far apart
        assert numpy.abs(numpy.diff(numpy.sort(batch))).max() < 1500


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(offset=st.integers(0, 3000), epoch=st.integers(0, 3), seed=st.integers(0, 2**31), shuffle=st.booleans())
def test_resuming_at_any_offset_gives_the_rest(corpus: Path, offset: int, epoch: int, seed: int, shuffle: bool) -> None:
    source = parquet(corpus, ["row", "tokens"], 97, shuffle=shuffle, buffer_mb=1)
    whole = order_of(source, Cursor(epoch, seed))
    assert order_of(source, Cursor(epoch, seed, offset)) == whole[offset:]


def test_resuming_after_a_batch_gives_the_same_batches(corpus: Path) -> None:
    source = parquet(corpus, ["row", "tokens"], 97, buffer_mb=1)
    batches = list(source.epoch(Cursor(2, 5)))
    for number in (0, 6, 29, len(batches) - 1):
        resumed = list(pickle.loads(pickle.dumps(source)).epoch(batches[number][1]))
        assert len(resumed) == len(batches) - number - 1
        for (one, after), (other, other_after) in zip(resumed, batches[number + 1 :], strict=True):
            assert after == other_after
            assert torch.equal(one["tokens"], other["tokens"])


def test_resuming_late_does_not_read_what_lies_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = parquet(write(tmp_path / "many", [400] * 10, row_group=40), ["row", "tokens"], 40, buffer_mb=1)
    decoded = []
    slices = type(source._files).slices

    def counted(files, group, rows):  # type: ignore[no-untyped-def]
        for piece in slices(files, group, rows):
            decoded.append(piece.num_rows)
            yield piece

    monkeypatch.setattr(type(source._files), "slices", counted)
    assert len(order_of(source, Cursor(offset=3960))) == 40
    assert sum(decoded) < 1000


def test_drop_last_and_length(corpus: Path) -> None:
    for drop_last in (False, True):
        source = parquet(corpus, ["row"], 64, drop_last=drop_last)
        sizes = [len(batch["row"]) for batch, _ in source.epoch(Cursor())]
        assert len(source) == len(sizes) == (46 if drop_last else 47)
        assert set(sizes[:-1]) == {64}
        assert sizes[-1] == (64 if drop_last else 56)


def test_closing_early_ends_the_thread(corpus: Path) -> None:
    batches = parquet(corpus, ["row", "tokens"], 8, buffer_mb=1).epoch(Cursor())
    next(batches)
    assert len(reading_threads()) == 1
    batches.close()  # type: ignore[attr-defined]
    assert not reading_threads()


def test_kinds_of_columns(tmp_path: Path) -> None:
    table = pa.table(
        {
            "byte": pa.array([1, 2, 3], pa.uint8()),
            "flag": [True, False, True],
            "half": pa.array(numpy.array([1, 2, 3], numpy.float16)),
            "text": ["a", "bc", ""],
            "blob": [b"x", b"", b"yz"],
            "lists": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int32())),
            "image": pa.array([[[1.0, 2.0]], [[3.0, 4.0]], [[5.0, 6.0]]], pa.list_(pa.list_(pa.float32(), 2), 1)),
        }
    )
    pq.write_table(table, tmp_path / "kinds.parquet")
    ((batch, _),) = parquet(tmp_path / "kinds.parquet", table.column_names, 4, shuffle=False).epoch(Cursor())
    assert list(batch) == table.column_names
    assert batch["byte"].dtype == torch.uint8
    assert batch["flag"].tolist() == [True, False, True]
    assert batch["half"].dtype == torch.float16
    assert batch["text"] == ["a", "bc", ""]
    assert batch["blob"] == [b"x", b"", b"yz"]
    assert torch.equal(batch["lists"], torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.int32))
    assert batch["image"].tolist() == [[[1.0, 2.0]], [[3.0, 4.0]], [[5.0, 6.0]]]
    batch["byte"].add_(1)  # writable, and nobody else's


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([[1, 2], [3]], "column 'x' has rows of different lengths in one batch (1 and 2).*pad"),
        ([[1, 2], None], "column 'x' has 1 missing values"),
        ([[1, None], [2, 3]], "column 'x' has 1 missing values"),
        ([1.5, None], "column 'x' has 1 missing values"),
        (["a", None], "column 'x' has 1 missing values"),
    ],
)
def test_values_that_no_tensor_holds(tmp_path: Path, values: list[object], sentence: str) -> None:
    pq.write_table(pa.table({"x": values}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(").replace(")", r"\)")):
        next(parquet(tmp_path / "x.parquet", ["x"], 2).epoch(Cursor()))
    assert not reading_threads()


def test_bad_places(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing at '.*missing'"):
        parquet(tmp_path / "missing", ["row"], 4)
    with pytest.raises(ValueError, match=f"folder '{tmp_path}' has no Parquet files"):
        parquet(tmp_path, ["row"], 4)
    with pytest.raises(ValueError, match="empty list"):
        parquet([], ["row"], 4)
    with pytest.raises(TypeError, match="path is 3"):
        parquet(3, ["row"], 4)  # type: ignore[arg-type]
    text = tmp_path / "text.parquet"
    text.write_text("no Parquet here")
    with pytest.raises(ValueError, match=r"text\.parquet is no Parquet file"):
        parquet(text, ["row"], 4)
    assert parquet([corpus / "part-000.parquet", corpus / "part-003.parquet"], ["row"], 4).rows == 1799


def test_hidden_files_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, [10], row_group=10)
    (tmp_path / "_temporary").mkdir()
    for name in ("_metadata.parquet", ".half.parquet", "_temporary/x.parquet", "README.md"):
        (tmp_path / name).write_text("something else")
    assert parquet(tmp_path, ["row"], 4).rows == 10


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "8", None])
def test_bad_batch_size(corpus: Path, size: object) -> None:
    with pytest.raises(ValueError, match=r"batch_size is .*, but it is a whole number from 1"):
        parquet(corpus, ["row"], size)  # type: ignore[arg-type]


def test_bad_columns(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"column 'labels' is not in .*part-000\.parquet, which has 'row', 'tokens'"):
        parquet(corpus, ["row", "labels"], 4)
    with pytest.raises(TypeError, match="columns is 'row', but it is a list"):
        parquet(corpus, "row", 4)
    with pytest.raises(ValueError, match="none twice"):
        parquet(corpus, ["row", "row"], 4)
    pq.write_table(pa.table({"when": pa.array([0], pa.timestamp("s"))}), tmp_path / "when.parquet")
    with pytest.raises(ValueError, match="column 'when' has type timestamp"):
        parquet(tmp_path, ["when"], 4)
    pq.write_table(pa.table({"row": pa.array([0], pa.int32())}), tmp_path / "row.parquet")
    with pytest.raises(ValueError, match=r"column 'row' is int64 in .* but int32 in"):
        parquet([corpus, tmp_path / "row.parquet"], ["row"], 4)


def test_too_few_rows(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(ValueError, match="has 3000 rows: fewer than one batch of 4000"):
        parquet(corpus, ["row"], 4000, drop_last=True)
    pq.write_table(pa.table({"row": pa.array([], pa.int64())}), tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="has 0 rows"):
        parquet(tmp_path, ["row"], 4)
    with pytest.raises(ValueError, match="goes on after row 3001 of epoch 0, but the data has 3000"):
        parquet(corpus, ["row"], 64).epoch(Cursor(offset=3001))


_READ_ALL = """
import re, sys, torch
from raypipe.data import Cursor, parquet

def peak_mb():  # of this program; getrusage would count the parent's before the exec
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

source = parquet(sys.argv[1], ["x"], 256, buffer_mb=16)
next(parquet(sys.argv[2], ["x"], 256).epoch(Cursor()))  # what a first read needs anyway
before, rows = peak_mb(), 0
for batch, _ in source.epoch(Cursor()):
    rows += len(batch["x"])
print(rows, peak_mb() - before)
"""


def test_memory_is_bounded_with_one_huge_row_group(tmp_path: Path) -> None:
    """128 MiB in one row group, which do not compress: read within a buffer of 16 MiB."""
    generator = numpy.random.default_rng(0)
    for name, rows in (("big", 128 << 10), ("small", 300)):
        flat = pa.array(generator.integers(0, 2**62, rows * 128, dtype=numpy.int64))
        table = pa.table({"x": pa.FixedSizeListArray.from_arrays(flat, 128)})
        path = tmp_path / f"{name}.parquet"
        pq.write_table(table, path, row_group_size=rows, compression="none", use_dictionary=False)
    done = subprocess.run(
        [sys.executable, "-c", _READ_ALL, str(tmp_path / "big.parquet"), str(tmp_path / "small.parquet")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    rows, grown_mb = done.stdout.split()
    assert int(rows) == 128 << 10
    assert float(grown_mb) < 64, f"{grown_mb} MiB"
