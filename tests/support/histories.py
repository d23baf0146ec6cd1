"""Histories of registers: what hosts wrote and read, and whether one disk could have shown it.

Each block of a volume is a register, and each value is written once.  That makes the check exact
and fast (Gibbons and Korach, Testing Shared Memories, 1997): the *zone* of a value runs from the
earliest end to the latest start among its write and its reads.  It is *forward* if the end comes
first: then the register held the value throughout, and nothing else may hold it there.  Otherwise
it is *backward*: the value was held at some instant of it.  A history is linearizable if and only
if

1. each read shows a value whose write began before the read ended;
2. no two forward zones overlap;
3. no backward zone lies inside a forward one.

A write without an answer never ends; if nobody read it, it may not have happened, and is left out.
A read without an answer says nothing.
"""

from __future__ import annotations

import struct
import zlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import inf

BLOCK_BYTES = 4096
Value = tuple[int, int]  # the host, and the number of its write
INITIAL: Value = (0, 0)  # a block of zeros
_VALUE = struct.Struct("<QQI")


class TornBlock(ValueError):
    """A block that holds parts of several writes."""


def block_of(value: Value) -> bytes:
    """4 KiB that show `value`: each sector says whose it is and where in the block it lies."""
    if value == INITIAL:
        return bytes(BLOCK_BYTES)
    sectors = []
    for sector in range(BLOCK_BYTES // 512):
        check = zlib.crc32(struct.pack("<QQI", *value, sector))
        sectors.append(_VALUE.pack(*value, check).ljust(512, bytes([check & 0xFF])))
    return b"".join(sectors)


def value_of(block: bytes) -> Value:
    """The value that `block` shows; TornBlock if it is not the whole of one write."""
    host, number, _ = _VALUE.unpack_from(block)
    if block != block_of((host, number)):
        raise TornBlock(f"begins as write {number} of host {host}, and does not go on as that")
    return host, number


@dataclass(frozen=True, slots=True)
class Operation:
    """One request on one register; times by one clock, `end` infinite without an answer."""

    writes: bool
    value: Value
    start: float
    end: float = inf

    @property
    def answered(self) -> bool:
        return self.end < inf


class History:
    """What was asked and answered, by register."""

    def __init__(self) -> None:
        self._operations: dict[int, list[Operation]] = defaultdict(list)

    def wrote(self, register: int, value: Value, start: float, end: float = inf) -> None:
        self._operations[register].append(Operation(True, value, start, end))

    def read(self, register: int, value: Value, start: float, end: float) -> None:
        self._operations[register].append(Operation(False, value, start, end))

    def violations(self) -> Iterator[tuple[int, str]]:
        """Each register that no single disk could have shown, with the reason."""
        for register, operations in sorted(self._operations.items()):
            reason = violation(operations)
            if reason is not None:
                yield register, reason


def violation(operations: Iterable[Operation]) -> str | None:
    """Why the history of one register is not linearizable; None if it is."""
    writes = {INITIAL: Operation(True, INITIAL, -inf, -inf)}
    reads: dict[Value, list[Operation]] = defaultdict(list)
    for operation in operations:
        if operation.writes:
            if operation.value in writes:
                raise ValueError(f"{operation.value} was written twice: values must be unique")
            writes[operation.value] = operation
        elif operation.answered:
            reads[operation.value].append(operation)
    forward: list[tuple[float, float, Value]] = []
    backward: list[tuple[float, float, Value]] = []
    for value, write in writes.items():
        of_value = [write, *reads.pop(value, [])]
        if any(operation.end < write.start for operation in of_value):
            return f"{value} was read before its write began"
        if len(of_value) == 1 and not write.answered:
            continue
        end = min(operation.end for operation in of_value)
        start = max(operation.start for operation in of_value)
        if end < start:
            forward.append((end, start, value))
        else:
            backward.append((start, end, value))
    if reads:
        return f"{min(reads)} was read, and nobody wrote it"
    forward.sort()
    for (_, stop, value), (begin, _, later) in pairwise(forward):
        if begin < stop:
            return f"{value} and {later} were each read after the other"
    begins = [begin for begin, _, _ in forward]
    for start, stop, value in backward:
        at = bisect_right(begins, start) - 1
        if at >= 0 and begins[at] < start and stop < forward[at][1]:
            return f"{value} was written or read while {forward[at][2]} stood"
    return None
