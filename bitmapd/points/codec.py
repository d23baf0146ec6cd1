"""Messages of points to the parts of frames, and frames to messages (pure).

Most are a `peer.shapes.Shape`.  HELLO2, DATA, HAVE, SUMS and PIECES have layouts of their own:

    HELLO2  16 volume, 16 incarnation, 4 x 16 generations, u64 size, u32 block, u32 extent,
            u64 committed, u64 applied, u64 oldest kept, u32 role, u32 features, u64 credit,
            u64 term, then two texts: name, program
    DATA    u16 count, entries of 40 bytes, then their payloads in the same order
    entry   u64 block, u64 stamp, u64 mask, u8 encoding, 3 zero, u32 length of payload, u64 sum
    HAVE    u64 point, 16 incarnation, u32 count, then (u64 first block, u32 count, u64 first
            stamp); LAST: no other HAVE belongs to the answer
    SUMS    u64 first block, u32 count, then u64 each; PIECES likewise

1. A message comes out whole and validated, or not at all: `Decoder.feed` raises PeerError, after
   which the connection ends, and nothing was changed.
2. Blocks ascend in a frame and lie inside the volume, stamps ascend on a connection; masks lie
   inside their blocks; the length of a payload fits mask and encoding.  So what a frame unpacks to
   is bounded by its masks, and that sum is at most 4 MiB.
3. Payloads of entries are not copied and not unpacked here (`pieces.Unpacker`).
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from bitmapd.peer.frames import (
    FIRST_OPTIONAL_KIND,
    MAX_PAYLOAD_BYTES,
    ErrorCode,
    Flag,
    Frame,
    Part,
    PeerError,
    pack_text,
)
from bitmapd.peer.payloads import BLOCK_RUN, COUNT, EXTENT_RUN, read_text, wrong
from bitmapd.peer.shapes import Shape, ShapeReader, encode_shaped, fields, plain
from bitmapd.peer.words import BYE, ERROR, Bye, Error, Pong, pong
from bitmapd.points.messages import (
    NIL,
    Applied,
    ApplyUpTo,
    Begin,
    Committed,
    Compare,
    Credit,
    Data,
    Encoding,
    End,
    Entry,
    Feature,
    Handover,
    Have,
    Hello2,
    Map,
    Message,
    Need,
    Pieces,
    Ping,
    Received,
    Role,
    Sums,
    Taken,
    Verify,
)
from bitmapd.points.pieces import MAX_BLOCK_BYTES, raw_bytes, whole_mask
from bitmapd.record.geometry import MIN_BLOCK_BYTES, Geometry

MAX_ENTRIES: Final = 62  # as many as a page of the journal describes
MAX_RAW_BYTES: Final = 4 << 20
MAX_HAVE_BLOCKS: Final = 16_384  # in one HAVE: 10 to 20 ms of the loop at either end
PAGE_BYTES: Final = 4096

_LAST: Final = int(Flag.LAST)
_HELLO: Final = struct.Struct("<16s16s64sQIIQQQIIQQ")  # in the order of the fields of `Hello2`
_GENERATIONS, _ROLE, _FEATURES, _TEXTS = 2, 9, 10, 13
_ENTRIES: Final = struct.Struct("<H")
ENTRY: Final = struct.Struct("<QQQB3sIQ")
_HAVE: Final = struct.Struct("<Q16s")
_HAVE_RUN: Final = struct.Struct("<QIQ")
_SUMS: Final = struct.Struct("<QI")
_SUM: Final = struct.Struct("<Q")
_NUMBER: Final = struct.Struct("<Q")
_POINT: Final = struct.Struct("<Q16s")
_ZERO: Final = bytes(3)
_U64: Final = (1 << 64) - 1


class PointKind(enum.IntEnum):
    """Kinds of frames; BYE and ERROR are those of `peer.frames.Kind`."""

    HELLO2 = 0x40
    BEGIN = 0x41
    DATA = 0x42
    END = 0x43
    COMMITTED = 0x44
    APPLIED = 0x45
    RECEIVED = 0x46
    HAVE = 0x47
    NEED = 0x48
    MAP = 0x49
    HANDOVER = 0x4A
    TAKEN = 0x4B
    APPLY_UP_TO = 0x4C
    VERIFY = 0x4D
    SUMS = 0x4E
    CREDIT = 0x4F
    PING = 0x50
    PONG = 0x51
    COMPARE = 0x52
    PIECES = 0x53


_SHAPES: Final[dict[type, Shape[Message]]] = {
    Begin: Shape(PointKind.BEGIN, Begin, struct.Struct("<Q16sQQQQ"), text=True),
    End: Shape(PointKind.END, End, struct.Struct("<Q16sQ16s")),
    Committed: Shape(PointKind.COMMITTED, Committed, _POINT),
    Applied: Shape(PointKind.APPLIED, Applied, _NUMBER),
    Received: Shape(PointKind.RECEIVED, Received, _NUMBER),
    Need: Shape(PointKind.NEED, Need, lists=(BLOCK_RUN,)),
    Map: Shape(PointKind.MAP, Map, lists=(EXTENT_RUN,)),
    Handover: Shape(PointKind.HANDOVER, Handover, _NUMBER),
    Taken: Shape(PointKind.TAKEN, Taken, _NUMBER),
    ApplyUpTo: Shape(PointKind.APPLY_UP_TO, ApplyUpTo, _NUMBER),
    Verify: Shape(PointKind.VERIFY, Verify, lists=(BLOCK_RUN,)),
    Compare: Shape(PointKind.COMPARE, Compare, _NUMBER, lists=(BLOCK_RUN,)),
    Credit: Shape(PointKind.CREDIT, Credit, _NUMBER),
    Ping: Shape(PointKind.PING, Ping, _NUMBER),
    Pong: pong(PointKind.PONG),
    Bye: BYE,
    Error: ERROR,
}
_BY_KIND: Final = {shape.kind: shape for shape in _SHAPES.values()}


def cost_bytes(data: Data) -> int:
    """What it takes of a journal, and of credit: a page that describes it, and its payloads in
    whole pages."""
    return cost_of(sum(len(entry.payload) for entry in data.entries))


def cost_of(payload_bytes: int) -> int:
    """`cost_bytes` of entries with so much payload together."""
    return PAGE_BYTES + -(-payload_bytes // PAGE_BYTES) * PAGE_BYTES


def haves(
    point: int,
    incarnation: bytes,
    stamps: Iterable[tuple[int, int]],
    most_blocks: int = MAX_HAVE_BLOCKS,
) -> Iterator[Have]:
    """What says that these (block, stamp), in ascending order, are here: one or more, each of at
    most so many."""
    runs: list[tuple[int, int, int]] = []
    for number, (block, stamp) in enumerate(stamps):
        if number and not number % most_blocks:
            yield Have(point, incarnation, tuple(runs), False)
            runs = []
        if runs:
            first, count, first_stamp = runs[-1]
            if (block, stamp) == (first + count, first_stamp + count):
                runs[-1] = (first, count + 1, first_stamp)
                continue
        runs.append((block, 1, stamp))
    yield Have(point, incarnation, tuple(runs), True)


def encode(message: Message) -> list[Part]:
    """The frames that carry it, but for their sequences.  ValueError if it is too large for what
    the module docstring says: who has more sends several messages."""
    if isinstance(message, Data):
        payload = _data_payload(message)
        kind, flags = PointKind.DATA, 0
    elif isinstance(message, Hello2):
        values = fields(message)
        values[_GENERATIONS] = b"".join(message.generations)
        payload = _HELLO.pack(*values[:_TEXTS]) + b"".join(map(pack_text, values[_TEXTS:]))
        kind, flags = PointKind.HELLO2, 0
    elif isinstance(message, Have):
        head = _HAVE.pack(message.point, message.incarnation) + COUNT.pack(len(message.runs))
        payload = head + b"".join(_HAVE_RUN.pack(*run) for run in message.runs)
        kind, flags = PointKind.HAVE, _LAST if message.last else 0
    elif isinstance(message, Sums | Pieces):
        payload = _SUMS.pack(message.first, len(message.sums))
        payload += b"".join(map(_SUM.pack, message.sums))
        kind = PointKind.SUMS if isinstance(message, Sums) else PointKind.PIECES
        flags = 0
    else:
        return encode_shaped(_SHAPES[type(message)], message)
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise ValueError(f"{type(message).__name__} takes {len(payload)} bytes")
    return [Part(kind, flags, 0, payload)]


def _data_payload(data: Data) -> bytes:
    if not 1 <= len(data.entries) <= MAX_ENTRIES:
        raise ValueError(f"Data with {len(data.entries)} entries; it has 1 to {MAX_ENTRIES}")
    parts: list[bytes | memoryview] = [_ENTRIES.pack(len(data.entries))]
    parts += [
        ENTRY.pack(
            entry.block,
            entry.stamp,
            entry.mask,
            entry.encoding,
            _ZERO,
            len(entry.payload),
            entry.sum64,
        )
        for entry in data.entries
    ]
    parts += [entry.payload for entry in data.entries]
    return b"".join(parts)


class Decoder(ShapeReader[Message]):
    """Frames of one direction of one connection in, messages out.  Without a geometry, as before
    the greeting, there is no block that would fit."""

    def __init__(self, geometry: Geometry | None = None) -> None:
        super().__init__()
        self._geometry: Geometry | None = None
        self._stamp = 0  # of the latest entry
        self._own: dict[int, Callable[[Frame], Message]] = {
            PointKind.DATA: self._data,
            PointKind.HELLO2: _hello,
            PointKind.SUMS: self._sums,
            PointKind.PIECES: self._pieces,
        }
        if geometry is not None:
            self.set_geometry(geometry)

    def set_geometry(self, geometry: Geometry) -> None:
        """Of the volume, from now on."""
        self._geometry = geometry
        self.extents, self.blocks = geometry.extents, geometry.blocks

    def feed(self, frame: Frame) -> Message | None:
        """The message that this frame completes; None in the midst of one, and for a kind that may
        be skipped.  Raises PeerError: HEADER, TOO_LONG, BROKEN, KIND, RUNS, ANSWER."""
        self.follows(frame)
        shape = _BY_KIND.get(frame.kind)
        if shape is not None:
            message = self.read(shape, frame)
            if isinstance(message, Begin | End):
                _check_point(message)
            return message
        if frame.kind == PointKind.HAVE:
            plain(frame, _LAST)
            return self._have(frame)
        own = self._own.get(frame.kind)
        if own is not None:
            plain(frame, 0)
            return own(frame)
        if frame.kind < FIRST_OPTIONAL_KIND:
            raise PeerError(ErrorCode.KIND, f"a frame is of the unknown kind {frame.kind}")
        return None

    def _data(self, frame: Frame) -> Data:
        payload = memoryview(frame.payload)
        head = _ENTRIES.size
        count = _ENTRIES.unpack_from(payload)[0] if len(payload) >= head else 0
        at = head + count * ENTRY.size
        if not 1 <= count <= MAX_ENTRIES or len(payload) < at:
            raise wrong(f"DATA says {count} entries in {len(payload)} bytes")
        entries: list[Entry] = []
        block_before, stamp, raw = -1, self._stamp, 0
        for place in range(head, at, ENTRY.size):
            entry, length, unpacked = read_entry(payload, place, self._geometry)
            if entry.block <= block_before or entry.stamp <= stamp:
                raise wrong(
                    f"block {entry.block} with stamp {entry.stamp} came after block {block_before}"
                    f" with stamp {stamp}"
                )
            block_before, stamp = entry.block, entry.stamp
            raw += unpacked
            if at + length > len(payload):
                raise wrong(f"DATA is cut short in block {entry.block}")
            entries.append(with_payload(entry, payload[at : at + length]))
            at += length
        if at != len(payload):
            raise wrong(f"{len(payload) - at} bytes are left over in DATA")
        if raw > MAX_RAW_BYTES:
            raise PeerError(ErrorCode.TOO_LONG, f"DATA unpacks to {raw} bytes")
        self._stamp = stamp
        return Data(tuple(entries))

    def _have(self, frame: Frame) -> Have:
        payload = memoryview(frame.payload)
        at = _HAVE.size + COUNT.size
        if len(payload) < at:
            raise wrong("HAVE is cut short")
        point, incarnation = _HAVE.unpack_from(payload)
        (count,) = COUNT.unpack_from(payload, _HAVE.size)
        if count > MAX_HAVE_BLOCKS or len(payload) != at + count * _HAVE_RUN.size:
            raise wrong(f"HAVE says {count} runs in {len(payload)} bytes")
        end = blocks = 0
        runs = tuple(_HAVE_RUN.iter_unpack(payload[at:]))
        for first, length, stamp in runs:
            blocks += length
            if first < end or not length or not 1 <= stamp <= _U64 - length:
                raise wrong(f"HAVE has a run of {length} at {first} with stamp {stamp}")
            end = first + length
        if blocks > MAX_HAVE_BLOCKS:
            raise wrong(f"HAVE names {blocks} blocks at once")
        if end > self.blocks:
            raise wrong(f"HAVE ends at block {end} of {self.blocks}")
        return Have(point, incarnation, runs, bool(frame.flags))

    def _sums(self, frame: Frame) -> Sums:
        first, sums = self._listed(frame, "SUMS")
        if first + len(sums) > self.blocks:
            raise wrong(f"SUMS says {len(sums)} from block {first} on")
        return Sums(first, sums)

    def _pieces(self, frame: Frame) -> Pieces:
        first, sums = self._listed(frame, "PIECES")
        if first >= self.blocks:
            raise wrong(f"PIECES are of block {first}")
        return Pieces(first, sums)

    def _listed(self, frame: Frame, name: str) -> tuple[int, tuple[int, ...]]:
        payload = memoryview(frame.payload)
        if len(payload) < _SUMS.size:
            raise wrong(f"{name} is cut short")
        first, count = _SUMS.unpack_from(payload)
        if len(payload) != _SUMS.size + count * _SUM.size:
            raise wrong(f"{name} says {count} sums in {len(payload)} bytes")
        return first, tuple(value for (value,) in _SUM.iter_unpack(payload[_SUMS.size :]))


def read_entry(
    raw: memoryview | bytes, at: int, geometry: Geometry | None, *, has_grown: bool = False
) -> tuple[Entry, int, int]:
    """The entry at this place, without its payload, and how many bytes that has, packed and not.
    PeerError RUNS if it contradicts itself or the volume, which, if it may have grown since, was
    no larger then."""
    block, stamp, mask, code, zero, length, sum64 = ENTRY.unpack_from(raw, at)
    if geometry is None or block >= geometry.blocks:
        raise wrong(f"block {block} is outside the volume")
    if not stamp or not mask or mask & ~whole_mask(geometry, block):
        raise wrong(f"block {block} has stamp {stamp} and mask {mask:#x}")
    if code > max(Encoding) or zero != _ZERO:
        raise wrong(f"block {block} has the unknown encoding {code}")
    encoding = Encoding(code)
    most = raw_bytes(geometry, block, mask)
    fits = {
        Encoding.RAW: length == most or (has_grown and 0 < length < most),
        Encoding.ZSTD: 0 < length < most,
        Encoding.ZEROS: length == 0,
    }
    if not fits[encoding]:
        raise wrong(f"block {block} has {length} bytes for {most} as {encoding.name}")
    return Entry(block, stamp, mask, encoding, sum64, b""), length, most


def with_payload(entry: Entry, payload: bytes | memoryview) -> Entry:
    """The entry that `read_entry` gave, with what belongs to it."""
    return Entry(entry.block, entry.stamp, entry.mask, entry.encoding, entry.sum64, payload)


def _check_point(message: Begin | End) -> None:
    if not message.point or message.incarnation == NIL:
        raise wrong(f"point {message.point} is none, or of nobody")
    if isinstance(message, Begin) and not (message.base < message.point and message.size_bytes):
        raise wrong(f"point {message.point} of {message.size_bytes} bytes follows {message.base}")


def _hello(frame: Frame) -> Hello2:
    payload = frame.payload
    if len(payload) < _HELLO.size:
        raise wrong("a HELLO2 is cut short")
    values = list(_HELLO.unpack_from(payload))
    values[_GENERATIONS] = tuple(struct.unpack("16s" * 4, values[_GENERATIONS]))
    if values[_ROLE] not in set(Role):
        raise wrong(f"a HELLO2 has the unknown role {values[_ROLE]}")
    values[_ROLE], values[_FEATURES] = Role(values[_ROLE]), Feature(values[_FEATURES])
    at = _HELLO.size
    for _ in range(2):
        text, at = read_text(payload, at)
        values.append(text)
    if at != len(payload):
        raise wrong("bytes are left over in a HELLO2")
    hello = Hello2(*values)
    block, extent = hello.block_bytes, hello.extent_bytes
    powers = not block & (block - 1) and not extent & (extent - 1)
    if (block or extent) and not (
        powers and MIN_BLOCK_BYTES <= block <= min(extent, MAX_BLOCK_BYTES)
    ):
        raise wrong(f"a HELLO2 has blocks of {block} bytes and extents of {extent}")
    if hello.incarnation == NIL:
        raise wrong("a HELLO2 has no incarnation")
    return hello
