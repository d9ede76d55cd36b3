"""Parquet files: which ones there are, what their footers say, and their rows in slices.

``pyarrow.dataset`` decodes a whole row group at a time, and a row group may be larger than the memory. So files are
read through ``ParquetFile.iter_batches`` with a buffered stream, which holds one slice and one page of each column.
(With ``pre_buffer``, its default, it would hold all encoded bytes of the row group.)
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet

from raypipe.data.columns import check_type, leaf_bytes
from raypipe.data.order import RowGroup

__all__ = ["Lane", "ParquetFiles", "find_files"]

_SUFFIXES = (".parquet", ".parq", ".pq")
_STREAM_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class _File:
    filesystem: Any
    path: str
    footer: Any


class ParquetFiles:
    """Files with the same columns. Only their footers are read here.

    Attributes:
        groups: row groups that have rows, in the files' order.
        rows: rows of all files.
        row_bytes: bytes of one decoded row, the largest average of a row group.
    """

    def __init__(self, paths: Sequence[str], columns: Sequence[str]) -> None:
        found = [place for path in paths for place in find_files(path)]
        self._files = [_read_footer(filesystem, path) for filesystem, path in found]
        self._columns = list(columns)
        _check_columns(self._files, self._columns)
        self.groups = [
            RowGroup(number, index, file.footer.row_group(index).num_rows)
            for number, file in enumerate(self._files)
            for index in range(file.footer.num_row_groups)
            if file.footer.row_group(index).num_rows
        ]
        self.rows = sum(group.rows for group in self.groups)
        schema = self._files[0].footer.schema.to_arrow_schema()
        widths = {name: leaf_bytes(schema.field(name).type) for name in self._columns}
        sizes = (self._group_row_bytes(group, widths) for group in self.groups)
        self.row_bytes = max(sizes, default=1)

    def slices(self, group: RowGroup, rows: int) -> Iterator[pa.RecordBatch]:
        """The rows of a row group in its order, at most ``rows`` at a time."""
        file = self._files[group.file]
        with (
            file.filesystem.open_input_file(file.path) as stream,
            pa.parquet.ParquetFile(stream, metadata=file.footer, buffer_size=_STREAM_BYTES, pre_buffer=False) as reader,
        ):
            yield from reader.iter_batches(
                batch_size=rows, row_groups=[group.index], columns=self._columns, use_threads=False
            )

    def _group_row_bytes(self, group: RowGroup, widths: dict[str, int | None]) -> int:
        """Decoded size by the footer: number of values times their width; for text its encoded size."""
        footer = self._files[group.file].footer.row_group(group.index)
        total = 0
        for number in range(footer.num_columns):
            chunk = footer.column(number)
            name = _column_of(chunk.path_in_schema, widths)
            if name is not None:
                width = widths[name]
                total += chunk.total_uncompressed_size if width is None else chunk.num_values * width
        return max(1, -(-total // group.rows))


class Lane:
    """Row groups read one after the other as one stream of rows.

    Args:
        files: where they are.
        groups: the row groups in their order.
        skip: rows to leave out at the start. Whole row groups are skipped unread; of the one where the stream
            starts, the rows before are decoded and dropped.
        slice_rows: rows to decode at a time.
    """

    def __init__(self, files: ParquetFiles, groups: Sequence[RowGroup], skip: int, slice_rows: int) -> None:
        self._slices = _slices(files, groups, skip, slice_rows)
        self._rest: pa.RecordBatch | None = None

    def read(self, rows: int) -> Iterator[pa.RecordBatch]:
        """The next ``rows`` rows."""
        while rows > 0:
            piece = self._rest if self._rest is not None else next(self._slices)
            self._rest = piece.slice(rows) if piece.num_rows > rows else None
            piece = piece.slice(0, rows)
            rows -= piece.num_rows
            yield piece

    def close(self) -> None:
        """Closes the file that is open."""
        self._slices.close()


def find_files(path: str) -> list[tuple[Any, str]]:
    """The Parquet files at a path or URI, sorted: itself, or those of a folder and its subfolders.

    Raises:
        ValueError: there are none.
    """
    if "://" in path:
        filesystem, inner = pa.fs.FileSystem.from_uri(path)
    else:
        filesystem, inner = pa.fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))
    info = filesystem.get_file_info(inner)
    if info.type == pa.fs.FileType.NotFound:
        raise ValueError(f"there is nothing at {path!r}; give a Parquet file, a folder of them, or a list")
    if info.type == pa.fs.FileType.File:
        return [(filesystem, inner)]
    entries = filesystem.get_file_info(pa.fs.FileSelector(inner, recursive=True))
    names = sorted(entry.path for entry in entries if entry.type == pa.fs.FileType.File)
    chosen = [name for name in names if name.endswith(_SUFFIXES) and not _is_hidden(name, inner)]
    if not chosen:
        raise ValueError(f"the folder {path!r} has no Parquet files (names that end in {', '.join(_SUFFIXES)})")
    return [(filesystem, name) for name in chosen]


def _slices(
    files: ParquetFiles, groups: Sequence[RowGroup], skip: int, slice_rows: int
) -> Generator[pa.RecordBatch, None, None]:
    for group in groups:
        if skip >= group.rows:
            skip -= group.rows
            continue
        for piece in files.slices(group, slice_rows):
            kept = piece.slice(min(skip, piece.num_rows))
            skip -= piece.num_rows - kept.num_rows
            if kept.num_rows:
                yield kept


def _is_hidden(name: str, folder: str) -> bool:
    """Whether a part below the folder starts as Spark's and Hive's bookkeeping does."""
    parts = PurePosixPath(name.replace(os.sep, "/")).parts[len(PurePosixPath(folder.replace(os.sep, "/")).parts) :]
    return any(part.startswith((".", "_")) for part in parts)


def _read_footer(filesystem: Any, path: str) -> _File:
    try:
        with filesystem.open_input_file(path) as stream:
            return _File(filesystem, path, pa.parquet.read_metadata(stream))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from None


def _check_columns(files: Sequence[_File], columns: Sequence[str]) -> None:
    first = files[0].footer.schema.to_arrow_schema()
    for file in files:
        schema = file.footer.schema.to_arrow_schema()
        for name in columns:
            if name not in schema.names:
                there = ", ".join(map(repr, schema.names))
                raise ValueError(f"column {name!r} is not in {file.path}, which has {there}")
            if schema.field(name).type != first.field(name).type:
                raise ValueError(
                    f"column {name!r} is {first.field(name).type} in {files[0].path} but {schema.field(name).type} in "
                    f"{file.path}: files that are read together have the same types"
                )
    for name in columns:
        check_type(name, first.field(name).type)


def _column_of(leaf_path: str, names: dict[str, int | None]) -> str | None:
    """The column that a leaf such as ``tokens.list.element`` belongs to, where it is among ``names``."""
    return next((name for name in names if leaf_path == name or leaf_path.startswith(f"{name}.")), None)
