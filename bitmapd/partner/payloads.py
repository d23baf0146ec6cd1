"""The pages of a record as payloads (pure).

    page         u8 set, u8 form, u32 number, then runs (form 0) or 3,936 bytes of bits (form 1)

The pages of a record are those of `record/pages`: number n holds the bits of 31,488 extents.  A
page is sent in its shorter form, and not at all if it is empty.  A run that crosses a border is cut
there and joined again.  After the pages comes the u64 xxh3 of all four sets, each as runs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Final

from bitarray import bitarray
from bitarray.util import intervals, zeros
from xxhash import xxh3_64

from bitmapd.partner.messages import Record
from bitmapd.peer.frames import ErrorCode, PeerError
from bitmapd.peer.payloads import COUNT, EXTENT_RUN, Run, Runs, pack_runs, read_runs, wrong
from bitmapd.record.pages import EXTENTS_PER_PAGE, PAGE_PAYLOAD_BYTES

_PAGE: Final = struct.Struct("<BBI")
_DIGEST: Final = struct.Struct("<Q")
_AS_RUNS: Final = 0
_AS_BITS: Final = 1
_SETS: Final = 4


def record_payloads(record: Record) -> list[bytes]:
    """One a page, then the digest."""
    sets = (record.own, record.owed, record.stored, record.copying)
    payloads = [
        _page_payload(number, page, flat)
        for number, runs in enumerate(sets, 1)
        for page, flat in _by_page(runs)
    ]
    payloads.append(_DIGEST.pack(_digest(sets)))
    return payloads


def _digest(sets: Iterable[Runs]) -> int:
    hashed = xxh3_64()
    for runs in sets:
        hashed.update(pack_runs(runs))
    return hashed.intdigest()


def _by_page(runs: Runs) -> Iterator[tuple[int, list[int]]]:
    """Page number and its runs as first, length, first, length …"""
    page, end = -1, 0
    flat: list[int] = []
    for first, stop in runs:
        at = first
        while stop > end:
            if at < end:
                flat += (at, end - at)
                at = end
            if flat:
                yield page, flat
            page = at // EXTENTS_PER_PAGE
            end = (page + 1) * EXTENTS_PER_PAGE
            flat = []
        flat += (at, stop - at)
    if flat:
        yield page, flat


def _page_payload(number: int, page: int, flat: list[int]) -> bytes:
    if COUNT.size + 4 * len(flat) < PAGE_PAYLOAD_BYTES:
        data = struct.pack(f"<{1 + len(flat)}I", len(flat) // 2, *flat)
        return _PAGE.pack(number, _AS_RUNS, page) + data
    bits = zeros(EXTENTS_PER_PAGE, endian="little")
    base = page * EXTENTS_PER_PAGE
    for at in range(0, len(flat), 2):
        first = flat[at] - base
        bits[first : first + flat[at + 1]] = True
    return _PAGE.pack(number, _AS_BITS, page) + bits.tobytes()


class RecordReader:
    """Joins the pages of one record.  Pages ascend within a set, and sets among themselves; so what
    is held is bounded by the volume."""

    def __init__(self, extents: int) -> None:
        self._extents = extents
        self._sets: list[list[Run]] = [[] for _ in range(_SETS)]
        self._last = (0, 0)  # set and number of the page before

    def page(self, payload: bytes) -> None:
        """Raises PeerError."""
        if len(payload) < _PAGE.size:
            raise wrong("a page of a record is cut short")
        number, form, page = _PAGE.unpack_from(payload)
        base = page * EXTENTS_PER_PAGE
        if not 1 <= number <= _SETS or base >= self._extents:
            raise wrong(f"page {page} of set {number} does not exist")
        if self._last >= (number, page + 1):
            raise wrong(f"page {page} of set {number} is out of order")
        self._last = (number, page + 1)
        bound = min(base + EXTENTS_PER_PAGE, self._extents)
        pieces: list[Run] = []
        if form == _AS_RUNS:
            end = read_runs(payload, _PAGE.size, EXTENT_RUN, bound, pieces)
            if end != len(payload):
                raise wrong("bytes are left over in a page of runs")
            if pieces and pieces[0][0] < base:
                raise wrong(f"a run at {pieces[0][0]} is not of page {page}")
        elif form == _AS_BITS:
            if len(payload) != _PAGE.size + PAGE_PAYLOAD_BYTES:
                raise wrong(f"a page of bits has {len(payload) - _PAGE.size} bytes")
            bits = bitarray(payload[_PAGE.size :], endian="little")
            if bits.find(True, bound - base) >= 0:
                raise wrong("a bit is set outside the volume")
            pieces = [(base + first, base + stop) for one, first, stop in intervals(bits) if one]
        else:
            raise wrong(f"a page has the unknown form {form}")
        joined = self._sets[number - 1]
        if joined and pieces and joined[-1][1] == pieces[0][0]:
            joined[-1] = (joined[-1][0], pieces[0][1])
            del pieces[0]
        joined += pieces

    def end(self, payload: bytes) -> Record:
        """The whole record, if its digest is right.  Raises PeerError."""
        if len(payload) != _DIGEST.size:
            raise wrong(f"the end of a record has {len(payload)} bytes")
        record = Record(*(tuple(runs) for runs in self._sets))
        if _DIGEST.unpack(payload)[0] != _digest(
            (record.own, record.owed, record.stored, record.copying)
        ):
            raise PeerError(ErrorCode.BROKEN, "the digest of a record is wrong")
        return record
