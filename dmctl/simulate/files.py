"""Trace files, plain or compressed with gzip, as their first bytes say.

What is read may be no trace: no more of it is held in memory than one line, and a line is short.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitmapd.errors import UsageError
from dmctl.simulate.formats import parse
from dmctl.simulate.trace import Trace, make_trace

GZIP_MAGIC = b"\x1f\x8b"
# The longest line is one of fio's, with the path of a file in it.
MAX_LINE_BYTES = 16 << 10
SUFFIXES = frozenset((".gz", ".csv", ".txt", ".log", ".iolog"))


def load_trace(path: str | Path, form: str | None = None) -> Trace:
    """Read a trace; it is named like the file, without its suffixes.

    `OSError` if it cannot be read, `UsageError` if it is not understood.
    """
    file = Path(path)
    name = file.name
    while Path(name).suffix in SUFFIXES:
        name = Path(name).stem
    if file.is_dir():
        raise UsageError(
            f"{path}: this is a directory, not a trace", hint="name the files in it that are traces"
        )
    with open(file, "rb") as raw:
        packed = raw.read(2) == GZIP_MAGIC
        raw.seek(0)
        stream: Any = gzip.GzipFile(fileobj=raw) if packed else raw
        with stream:
            return make_trace(name, parse(str(file), _lines(str(file), stream), form))


def _lines(name: str, stream: Any) -> Iterator[str]:
    number = 0
    try:
        while line := stream.readline(MAX_LINE_BYTES):
            number += 1
            if len(line) == MAX_LINE_BYTES:
                raise UsageError(
                    f"{name}, line {number}: this is no trace: the line is longer than"
                    f" {MAX_LINE_BYTES} bytes"
                )
            yield line.decode()
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise UsageError(f"{name}: this is neither text nor a whole gzip file: {error}") from None
