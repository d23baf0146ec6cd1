"""A block trace in memory: the writes of one volume, in order of time (pure).

1. Only changes are kept (writes, zeroing, trims): a record knows nothing of reads.  How many
   requests there were in all is kept as a number.
2. 24 bytes a write, in three arrays; the units (extents, chunks, blocks) that a write touches are
   derived for one unit size after the other and kept for the sizes used last, so that many
   replays of one trace share them.
3. Times never go back: what was recorded out of order is sorted, ties keep their order.  A
   trace in which all times are equal says nothing of time; its requests are then spread evenly.
   The first write is at time 0.
4. The volume is as large as the farthest write needs, in steps of the largest extent, unless the
   trace says how large it is.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from bitmapd.errors import UsageError
from bitmapd.record.geometry import MAX_EXTENT_BYTES

UNTIMED_PER_S = 1000.0  # of a trace without times
KEPT_SPANS = 4


@dataclass(frozen=True, slots=True)
class Request:
    """One change of the volume, or (`is_write` false) a request that is only counted."""

    time_s: float
    is_write: bool
    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True, slots=True)
class Spans:
    """Write i touches the units [first[i], stop[i])."""

    first: array[int]
    stop: array[int]


@dataclass(frozen=True, slots=True)
class Trace:
    """See the module docstring.  Write i changes bytes [first_byte[i], end_byte[i])."""

    name: str
    time_s: array[float]
    first_byte: array[int]
    end_byte: array[int]
    requests: int
    size_bytes: int
    derived: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    _spans: dict[int, Spans] = field(default_factory=dict, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.time_s)

    @property
    def end_s(self) -> float:
        return self.time_s[-1]

    @property
    def written_bytes(self) -> int:
        return sum(self.end_byte) - sum(self.first_byte)

    def spans(self, unit_bytes: int) -> Spans:
        """The units of each write; `unit_bytes` is a power of two."""
        found = self._spans.pop(unit_bytes, None)
        if found is None:
            shift = unit_bytes.bit_length() - 1
            found = Spans(
                array("q", [byte >> shift for byte in self.first_byte]),
                array("q", [((byte - 1) >> shift) + 1 for byte in self.end_byte]),
            )
            if len(self._spans) >= KEPT_SPANS:
                del self._spans[next(iter(self._spans))]
        self._spans[unit_bytes] = found
        return found


def make_trace(name: str, requests: Iterable[Request], size_bytes: int | None = None) -> Trace:
    """`UsageError` if nothing is written, or something outside of a volume of `size_bytes`."""
    time_s, first, end = array("d"), array("q"), array("q")
    count = 0
    for request in requests:
        count += 1
        if request.is_write and request.length_bytes:
            time_s.append(request.time_s)
            first.append(request.offset_bytes)
            end.append(request.offset_bytes + request.length_bytes)
    if not time_s:
        raise UsageError(f"{name}: there are no writes in this trace")
    if any(later < earlier for earlier, later in _pairs(time_s)):
        order = sorted(range(len(time_s)), key=time_s.__getitem__)
        time_s = array("d", [time_s[i] for i in order])
        first = array("q", [first[i] for i in order])
        end = array("q", [end[i] for i in order])
    start_s = time_s[0]
    if start_s == time_s[-1]:
        time_s = array("d", [i / UNTIMED_PER_S for i in range(len(time_s))])
    else:
        time_s = array("d", [now_s - start_s for now_s in time_s])
    farthest = max(end)
    if size_bytes is None:
        size_bytes = -(-farthest // MAX_EXTENT_BYTES) * MAX_EXTENT_BYTES
    elif farthest > size_bytes:
        raise UsageError(f"{name}: byte {farthest} is beyond the volume's {size_bytes}")
    return Trace(name, time_s, first, end, count, size_bytes)


def _pairs(values: array[float]) -> Iterator[tuple[float, float]]:
    later = iter(values)
    next(later)
    return zip(values, later, strict=False)
