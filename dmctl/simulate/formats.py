"""The formats of block traces: lines into requests (pure).

| name | a line |
| --- | --- |
| `csv` | `time_s,op,offset_bytes,length_bytes`; op is R, W, Z (zero) or T (trim) |
| `blkparse` | blkparse's default text: `8,0 3 11 0.0095 697 Q W 223490 + 56 [kworker]` |
| `vscsi` | `version,time,op,size,lbn`: seconds, SCSI code in hex, bytes, sectors |
| `msr` | `Timestamp,Hostname,DiskNumber,Type,Offset,Size,ResponseTime`: units of 100 ns; bytes |
| `fio` | an iolog of fio, version 2 or 3: `[us] FILE write OFFSET LENGTH`, `FILE wait US` |

`csv` is also what bitmapd's request log is written in.  In every format empty lines and lines that
begin with `#` are passed over, and so is a line of column names.

1. A line that is not understood is an error that names file, line and reason; nothing is guessed.
2. A trace is of one device.  Requests to a second one are an error: their places would mix.
3. Of blkparse's events one kind counts: queued (Q), or issued (D) if the first thousand lines have
   none queued, or completed (C).  Its summary at the end is passed over.
4. Flushes and what else moves no data are passed over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NoReturn

from bitmapd.errors import UsageError
from dmctl.simulate.trace import Request

SECTOR_BYTES = 512
HEAD_LINES = 1000
MAX_BYTE = 1 << 62
QUOTED_CHARACTERS = 40

_SCSI_WRITES = frozenset((0x0A, 0x2A, 0xAA, 0x8A, 0x2E, 0xAE, 0x8E, 0x41, 0x93, 0x42))
_SCSI_READS = frozenset((0x08, 0x28, 0xA8, 0x88))
_EVENT = re.compile(r"\s*\d+,\d+\s+\d+\s+\d+\s+\d+\.\d+\s+\d+\s+[A-Za-z]+\s")
_FIO = re.compile(r"fio version ([0-9]+) iolog")
_CSV_OPS = {"R": False, "W": True, "Z": True, "T": True}
_FIO_OPS = {"read": False, "write": True, "trim": True}
_FIO_QUIET = frozenset(("add", "open", "close", "sync", "datasync", "wait"))


def _beginning(text: str) -> str:
    return text if len(text) <= QUOTED_CHARACTERS else text[:QUOTED_CHARACTERS] + "…"


class _Lines:
    """Lines with their numbers, for messages."""

    def __init__(self, name: str, lines: Iterable[str]) -> None:
        self.name = name
        self.number = 0
        self._lines = lines
        self._device: str | None = None

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            self.number += 1
            text = line.strip()
            if text and not text.startswith("#"):
                yield text

    def wrong(self, reason: str, *quoted: str) -> NoReturn:
        """`reason` has a `{}` for each piece of the trace that it quotes.

        A file that is no trace may be one long line: a message quotes the beginning.
        """
        told = reason.format(*(repr(_beginning(text)) for text in quoted))
        raise UsageError(f"{self.name}, line {self.number}: {told}")

    def fields(self, text: str, names: Sequence[str]) -> list[str]:
        found = [word.strip() for word in text.split(",")]
        if len(found) != len(names):
            self.wrong(f"{len(found)} columns, not {len(names)} ({','.join(names)})")
        return found

    def integer(self, text: str, what: str) -> int:
        try:
            value = int(text)
        except ValueError:
            self.wrong(f"{what} {{}} is not a whole number", text)
        if not 0 <= value <= MAX_BYTE:
            self.wrong(f"{what} {{}} is out of range", text)
        return value

    def seconds(self, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            self.wrong("time {} is not a number", text)
        if not 0 <= value < MAX_BYTE:
            self.wrong("time {} is out of range", text)
        return value

    def only(self, device: str) -> None:
        """All requests have to be of one device."""
        if self._device is None:
            self._device = device
        elif device != self._device:
            self.wrong("a request to {}, after others to {}: keep one device", device, self._device)


def _csv(lines: _Lines) -> Iterator[Request]:
    names = ("time_s", "op", "offset_bytes", "length_bytes")
    for text in lines:
        time_s, op, offset, length = lines.fields(text, names)
        if time_s == "time_s":
            continue
        if op not in _CSV_OPS:
            lines.wrong(f"op {{}} is none of {' '.join(_CSV_OPS)}", op)
        yield Request(
            lines.seconds(time_s),
            _CSV_OPS[op],
            lines.integer(offset, "offset"),
            lines.integer(length, "length"),
        )


def _vscsi(lines: _Lines) -> Iterator[Request]:
    names = ("version", "time", "op", "size", "lbn")
    for text in lines:
        version, time_s, op, size, lbn = lines.fields(text, names)
        if version == "version":
            continue
        try:
            code = int(op, 16)
        except ValueError:
            lines.wrong("op {} is not a SCSI operation code in hex", op)
        if code in _SCSI_WRITES or code in _SCSI_READS:
            yield Request(
                lines.seconds(time_s),
                code in _SCSI_WRITES,
                lines.integer(lbn, "lbn") * SECTOR_BYTES,
                lines.integer(size, "size"),
            )


def _msr(lines: _Lines) -> Iterator[Request]:
    names = ("Timestamp", "Hostname", "DiskNumber", "Type", "Offset", "Size", "ResponseTime")
    origin: int | None = None
    for text in lines:
        ticks, host, disk, kind, offset, size, _ = lines.fields(text, names)
        if ticks == "Timestamp":
            continue
        if kind not in ("Read", "Write"):
            lines.wrong("type {} is neither Read nor Write", kind)
        lines.only(f"{host} disk {disk}")
        at = lines.integer(ticks, "timestamp")
        # As a float of seconds since 1601 it would lose the microseconds.
        origin = at if origin is None else origin
        yield Request(
            (at - origin) / 1e7,
            kind == "Write",
            lines.integer(offset, "offset"),
            lines.integer(size, "size"),
        )


def _blkparse(lines: _Lines, event: str) -> Iterator[Request]:
    for text in lines:
        words = text.split()
        if words[0].startswith(("CPU", "Total")):
            return  # the summary
        if not _EVENT.match(text + " "):
            lines.wrong("this is not a line of blkparse's default output")
        device, time_s, action, rwbs = words[0], words[3], words[5], words[6:7]
        if action != event or not rwbs or words[8:9] != ["+"] or len(words) < 10:
            continue
        if "W" not in rwbs[0] and "D" not in rwbs[0] and "R" not in rwbs[0]:
            continue
        lines.only(device)
        yield Request(
            lines.seconds(time_s),
            "W" in rwbs[0] or "D" in rwbs[0],
            lines.integer(words[7], "sector") * SECTOR_BYTES,
            lines.integer(words[9], "number of sectors") * SECTOR_BYTES,
        )


def _fio(lines: _Lines) -> Iterator[Request]:
    version, now_s = 0, 0.0
    for text in lines:
        header = _FIO.fullmatch(text)
        if header is not None:
            version = int(header[1])
        if version not in (2, 3):
            lines.wrong("this is not an iolog of fio, version 2 or 3")
        if header is not None:
            continue
        words = text.split()
        if version == 3:
            now_s = lines.integer(words[0], "time") / 1e6
            words = words[1:]
        if len(words) not in (2, 4) or words[1] not in _FIO_QUIET | _FIO_OPS.keys():
            lines.wrong("this is neither 'FILE ACTION' nor 'FILE ACTION OFFSET LENGTH'")
        if len(words) == 4 and words[1] in _FIO_OPS:
            lines.only(words[0])
            yield Request(
                now_s,
                _FIO_OPS[words[1]],
                lines.integer(words[2], "offset"),
                lines.integer(words[3], "length"),
            )
        elif words[1] == "wait" and len(words) == 4:
            now_s += lines.integer(words[2], "wait") / 1e6


_READERS: dict[str, Callable[[_Lines], Iterator[Request]]] = {
    "csv": _csv,
    "vscsi": _vscsi,
    "msr": _msr,
    "fio": _fio,
}
FORMATS = (*_READERS, "blkparse")


def detect(name: str, head: Sequence[str]) -> str:
    """The format that the first lines are in; `UsageError` if it is none that is known."""
    text = next((line.strip() for line in head if line.strip() and line[0] != "#"), "")
    columns = text.split(",")
    if _FIO.fullmatch(text):
        return "fio"
    if _EVENT.match(text + " "):
        return "blkparse"
    if len(columns) == 4 and (columns[0] == "time_s" or columns[1].strip() in _CSV_OPS):
        return "csv"
    if len(columns) == 5:
        return "vscsi"
    if len(columns) == 7:
        return "msr"
    raise UsageError(
        f"{name}: the format of this trace is not known",
        hint=f"name it with --format, if it is one of {', '.join(FORMATS)}",
    )


def parse(name: str, lines: Iterable[str], form: str | None = None) -> Iterator[Request]:
    """The requests of a trace; `form` is one of `FORMATS`, or found out from the first lines."""
    if form is not None and form not in FORMATS:
        raise UsageError(f"'{form}' is not a format", hint=f"known are: {', '.join(FORMATS)}")
    rest = iter(lines)
    head = list(islice(rest, HEAD_LINES))
    form = form or detect(name, head)

    def all_lines() -> Iterator[str]:
        yield from head
        yield from rest

    numbered = _Lines(name, all_lines())
    if form == "blkparse":
        seen = {words[5] for line in head if len(words := line.split()) > 6}
        return _blkparse(numbered, next((event for event in "QDC" if event in seen), "Q"))
    return _READERS[form](numbered)
