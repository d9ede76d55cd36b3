"""Batches in, with a cursor that resumes."""

from raypipe.data.adapters import RaySource
from raypipe.data.cursor import Cursor, Source
from raypipe.data.feed import Draw, Feed
from raypipe.data.parquet import ParquetSource, parquet
from raypipe.data.source import open_source
from raypipe.data.wire import Wire, pack, unpack

__all__ = [
    "Cursor",
    "Draw",
    "Feed",
    "ParquetSource",
    "RaySource",
    "Source",
    "Wire",
    "open_source",
    "pack",
    "parquet",
    "unpack",
]
