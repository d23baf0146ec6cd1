"""The load of the power-cut tests, writes that say what they are, and the verdict on them (pure).

What the writers of one round do follows from the round's number alone, so the host knows every
operation beforehand, and the guest only tells how far each writer has come and what is durable.

1. Each page of the volume belongs to one writer, which does one thing after the other: the latest
   durable operation on a page is the least that has to be there after a cut.
2. A sector names the operation that wrote it.  So a sector is judged by itself, and one that was
   torn, went back in time or came from elsewhere is recognised.
3. Only pages of *loose* chunks are discarded: nothing is promised for their content but that it is
   one of theirs, or zeros.
"""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

SECTOR_BYTES = 512
PAGE_BYTES = 4096
SECTORS_A_PAGE = PAGE_BYTES // SECTOR_BYTES
WRITERS = 3
# Neither a multiple of the blocks that are copied nor of extents, so that writers share both.
CHUNK_PAGES = 40
_LOOSE_EVERY = 8
_HOT_CHUNKS = 4
_MAGIC = b"powercut"
_STAMP = struct.Struct("<8s6I")
_COPIES = SECTOR_BYTES // _STAMP.size
_ZEROS = bytes(SECTOR_BYTES)
_TOLD = 5  # problems of one kind that are told in full


class Kind(Enum):
    WRITE = "write"
    DISCARD = "discard"
    FLUSH = "flush"


@dataclass(frozen=True, slots=True)
class Operation:
    """`number` counts from 1 for each writer; `durable`: a write that is flushed by itself."""

    number: int
    kind: Kind
    page: int = 0
    pages: int = 0
    durable: bool = False

    def touches(self, page: int) -> bool:
        return self.page <= page < self.page + self.pages


def owner(page: int) -> int:
    return page // CHUNK_PAGES % WRITERS


def is_loose(page: int) -> bool:
    return page // CHUNK_PAGES // WRITERS % _LOOSE_EVERY == 3


def operations(round_: int, writer: int, pages: int, *, flushing: bool) -> Iterator[Operation]:
    """Without end: single pages anywhere, rewrites of a few places, sequential runs, discards and,
    if `flushing`, flushes and durable writes.  `pages`: those of the volume."""
    chance = random.Random(f"{round_} {writer}")
    chunks = range(writer, pages // CHUNK_PAGES, WRITERS)
    loose = [chunk for chunk in chunks if is_loose(chunk * CHUNK_PAGES)]
    hot: Sequence[int] = ()
    run = page = 0
    for number in itertools.count(1):
        if number % 400 == 1:
            hot = [chance.choice(chunks) for _ in range(_HOT_CHUNKS)]
            run, page = chance.randrange(len(chunks)), 0
        draw = chance.random()
        durable = flushing and chance.random() < 0.04
        if draw < 0.06:
            if flushing:
                yield Operation(number, Kind.FLUSH)
                continue
            draw = 0.9
        if draw < 0.13:
            first, length = _within(chance, chance.choice(loose), CHUNK_PAGES)
            yield Operation(number, Kind.DISCARD, first, length)
        elif draw < 0.3:
            length = min(chance.choice((8, 16, 32)), CHUNK_PAGES - page)
            first = chunks[run] * CHUNK_PAGES + page
            page += length
            if page == CHUNK_PAGES:
                run, page = (run + 1) % len(chunks), 0
            yield Operation(number, Kind.WRITE, first, length, durable)
        elif draw < 0.6:
            first, _ = _within(chance, chance.choice(hot), 1)
            yield Operation(number, Kind.WRITE, first, 1, durable)
        else:
            first, length = _within(chance, chance.choice(chunks), chance.choice((1, 1, 1, 4)))
            yield Operation(number, Kind.WRITE, first, length, durable)


def _within(chance: random.Random, chunk: int, longest: int) -> tuple[int, int]:
    length = chance.randint(1, longest)
    return chunk * CHUNK_PAGES + chance.randrange(CHUNK_PAGES - length + 1), length


def content(round_: int, writer: int, operation: Operation) -> bytes:
    return b"".join(
        _STAMP.pack(_MAGIC, round_, writer, operation.number, page, sector, 0) * _COPIES
        for page in range(operation.page, operation.page + operation.pages)
        for sector in range(SECTORS_A_PAGE)
    )


@dataclass(frozen=True, slots=True)
class _Stamp:
    round_: int
    writer: int
    number: int
    page: int
    sector: int


def _stamp(sector: bytes) -> _Stamp | None:
    stamp = sector[: _STAMP.size]
    if not stamp.startswith(_MAGIC) or sector != stamp * _COPIES:
        return None
    return _Stamp(*_STAMP.unpack(stamp)[1:6])


@dataclass
class Ledger:
    """What the writers of a round have told: lines `all WRITER NUMBER`, every operation of that
    writer up to this one is durable, and `one WRITER NUMBER`, this one is."""

    round_: int
    pages: int
    flushing: bool
    told: int = 0
    _all: dict[int, int] = field(default_factory=lambda: dict.fromkeys(range(WRITERS), 0))
    _one: dict[int, set[int]] = field(default_factory=lambda: {n: set() for n in range(WRITERS)})
    _known: dict[int, list[Operation]] = field(
        default_factory=lambda: {n: [] for n in range(WRITERS)}
    )
    _more: dict[int, Iterator[Operation]] = field(default_factory=dict)

    def note(self, line: str) -> None:
        word, writer, number = line.split()
        self.told += 1
        if word == "all":
            self._all[int(writer)] = int(number)
        elif word == "one":
            self._one[int(writer)].add(int(number))
        else:
            raise ValueError(f"a writer said {line!r}")

    def operation(self, writer: int, number: int) -> Operation:
        known = self._known[writer]
        if writer not in self._more:
            self._more[writer] = operations(self.round_, writer, self.pages, flushing=self.flushing)
        known.extend(itertools.islice(self._more[writer], max(0, number - len(known))))
        return known[number - 1]

    def floors(self) -> dict[int, int]:
        """Page -> number of the latest durable write to it; loose pages have none."""
        floors: dict[int, int] = {}
        for writer in range(WRITERS):
            numbers = {*range(1, self._all[writer] + 1), *self._one[writer]}
            for number in sorted(numbers):
                operation = self.operation(writer, number)
                if operation.kind is Kind.WRITE:
                    last = operation.page + operation.pages
                    floors.update(dict.fromkeys(range(operation.page, last), number))
        return {page: number for page, number in floors.items() if not is_loose(page)}


def lost(before: bytes, after: bytes, ledger: Ledger) -> list[str]:
    """What is wrong with the primary: `before` is its content when the round began."""
    floors: Mapping[int, int] = ledger.floors()
    problems = []
    for page in range(ledger.pages):
        at = slice(page * PAGE_BYTES, (page + 1) * PAGE_BYTES)
        floor = floors.get(page)
        if floor is None and before[at] == after[at]:
            continue
        for sector in range(SECTORS_A_PAGE):
            first = at.start + sector * SECTOR_BYTES
            part = slice(first, first + SECTOR_BYTES)
            problem = _judge(before[part], after[part], page, sector, floor, ledger)
            if problem is not None:
                problems.append(f"page {page}, sector {sector}: {problem}")
    return _shortened(problems)


def _judge(
    before: bytes, after: bytes, page: int, sector: int, floor: int | None, ledger: Ledger
) -> str | None:
    stamp = _stamp(after)
    wanted = "anything of this round" if floor is None else f"operation {floor} or a later one"
    if stamp is None or stamp.round_ != ledger.round_:
        if floor is None and (after == before or (is_loose(page) and after == _ZEROS)):
            return None
        found = stamp or ("zeros" if after == _ZEROS else after[:32].hex(" "))
        return f"{wanted} is to be there, and {found} is"
    if (stamp.page, stamp.sector, stamp.writer) != (page, sector, owner(page)):
        return f"{stamp} is in the wrong place"
    operation = ledger.operation(stamp.writer, stamp.number)
    if operation.kind is not Kind.WRITE or not operation.touches(page):
        return f"{stamp} was never written"
    if floor is not None and stamp.number < floor:
        return f"{wanted} is to be there, and {stamp} is"
    return None


def differing(primary: bytes, secondary: bytes, extent_bytes: int) -> set[int]:
    """Extents in which two media differ."""
    return {
        at // extent_bytes
        for at in range(0, max(len(primary), len(secondary)), extent_bytes)
        if primary[at : at + extent_bytes] != secondary[at : at + extent_bytes]
    }


def unrecorded(differ: set[int], runs: Sequence[tuple[int, int]]) -> list[str]:
    """Extents that differ and are not in the record, whose runs are (first, count)."""
    recorded = {extent for first, count in runs for extent in range(first, first + count)}
    return _shortened(
        [f"extent {extent} is not in the record" for extent in sorted(differ - recorded)]
    )


def _shortened(problems: list[str]) -> list[str]:
    more = len(problems) - _TOLD
    return problems if more <= 0 else [*problems[:_TOLD], f"and {more} more"]
