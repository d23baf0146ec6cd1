"""Frames between the two nodes of a volume (pure).

All that two nodes say to one another travels on one connection, as frames: a header of 32 bytes and
a payload.  A frame that was damaged, left out, repeated or moved on its way is not taken for
another one: it is refused, and the connection ends.

    offset  size  field, little-endian
    0       4     magic `42 50 4c 4b` ("BPLK")
    4       1     version: 1
    5       1     kind
    6       2     flags: 1 MORE (another part follows), 2 LAST (of several answers)
    8       4     length of the payload: at most 1,048,576; in a greeting at most 4,096
    12      4     crc32c of bytes 0 to 11, 16 to 31 and the payload
    16      8     sequence: 1, 2, 3 … in each direction of each connection
    24      8     request: the asker's number; answers repeat it; 0 where there is none

1. Nothing is held for a frame whose header is wrong or whose length is beyond the limit: it is
   refused when its header is there.
2. What `Reader` holds is at most one frame and what it was fed last.
3. The limit counts when a frame is taken, so that it may grow between two frames of one read.
4. A reader that has refused something refuses everything from then on.

Kinds from 128 on are skipped where they are unknown, those below end the connection, so that later
versions can add both.  What the payloads mean is no business of this module, but for the text that
says why a connection ends.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

from bitmapd.crc import crc32c
from bitmapd.errors import printable

MAGIC: Final = b"BPLK"
VERSION: Final = 1
HEADER: Final = struct.Struct("<4sBBHIIQQ")
HEADER_BYTES: Final = 32
MAX_PAYLOAD_BYTES: Final = 1 << 20
MAX_GREETING_BYTES: Final = 4096
MAX_TEXT_BYTES: Final = 1024
FIRST_OPTIONAL_KIND: Final = 128

_LENGTH: Final = struct.Struct("<H")
_CODE: Final = struct.Struct("<H")


class Kind(enum.IntEnum):
    """What a frame carries; payloads are in `partner/messages`."""

    HELLO = 1
    RECORD = 2
    READY = 3
    ADD = 16
    GRANT = 17
    GOT = 18
    REMOVE = 19
    FREE = 20
    ASK = 21
    STATUS = 22
    PING = 32
    PONG = 33
    TAKE = 48
    TAKEN = 49
    RESIZE = 50
    RESIZED = 51
    BYE = 62
    ERROR = 63
    LEAD = 128  # who does not know it passes it over


class Flag(enum.IntFlag):
    MORE = 1  # another part of the same message follows directly
    LAST = 2  # no other answer to the request comes


KNOWN_FLAGS: Final = int(Flag.MORE | Flag.LAST)


class ErrorCode(enum.IntEnum):
    """Why a connection ends with ERROR."""

    HEADER = 1  # wrong magic or version, unknown flag
    TOO_LONG = 2
    BROKEN = 3  # checksum; sequence not the next one; MORE followed by something else
    KIND = 4  # unknown, or not allowed in this state
    RUNS = 5  # runs out of order or outside, counts that contradict, bytes left over
    ANSWER = 6  # answer to nothing; GRANT of what was not asked for; number that does not grow
    BUSY = 7  # more requests at a time than were granted
    OTHER = 8  # another volume, geometry, medium, or the same node number
    VERSION = 9  # no common version, unknown feature
    BOTH_OWN = 10  # both nodes say that they own an extent
    DIGEST = 11  # the results of the exchange differ
    OLD_TERM = 12  # from a node that is not fresh
    SIZE = 13  # a smaller volume that does not grow
    SPLIT_BRAIN = 16  # the generations of the data diverge
    INTERNAL = 99


class PeerError(Exception):
    """What the other node sent is wrong; the connection ends with ERROR `code` and `text`."""

    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


@dataclass(frozen=True, slots=True)
class Part:
    """What is to be sent: a frame but for its sequence."""

    kind: int
    flags: int
    request: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Frame:
    """What came: whole, and the next one of its connection."""

    kind: int
    flags: int
    request: int
    payload: bytes
    sequence: int


def encode(part: Part, sequence: int) -> bytes:
    """The frame on the wire."""
    head = HEADER.pack(
        MAGIC, VERSION, part.kind, part.flags, len(part.payload), 0, sequence, part.request
    )
    crc = crc32c(part.payload, crc32c(head[16:], crc32c(head[:12])))
    return b"".join((head[:12], crc.to_bytes(4, "little"), head[16:], part.payload))


def pack_text(text: str) -> bytes:
    """Its length, u16, and UTF-8.  What is not printable is escaped; beyond 1,024 bytes it ends."""
    raw = printable(text).encode()
    if len(raw) > MAX_TEXT_BYTES:
        raw = raw[:MAX_TEXT_BYTES].decode(errors="ignore").encode()
    return _LENGTH.pack(len(raw)) + raw


def refusal(code: int, text: str) -> Part:
    """The last frame that a connection carries: why it ends."""
    return Part(Kind.ERROR, 0, 0, _CODE.pack(code) + pack_text(text))


class Reader:
    """Bytes in, in any pieces; frames out.  `limit_bytes` bounds the payloads."""

    def __init__(self, limit_bytes: int = MAX_GREETING_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self._held = bytearray()
        self._at = 0  # what is before it was taken
        self._sequence = 0

    @property
    def held_bytes(self) -> int:
        """What was fed and belongs to no frame that was taken."""
        return len(self._held) - self._at

    def feed(self, data: bytes) -> None:
        if self._at:
            del self._held[: self._at]
            self._at = 0
        self._held += data

    def take(self) -> Frame | None:
        """The next frame, None if it is not all here.  Raises PeerError: HEADER, TOO_LONG,
        BROKEN."""
        start = self._at
        if len(self._held) - start < HEADER_BYTES:
            return None
        magic, version, kind, flags, length, crc, sequence, request = HEADER.unpack_from(
            self._held, start
        )
        if magic != MAGIC:
            raise PeerError(
                ErrorCode.HEADER, f"a frame begins with {magic.hex()}, not {MAGIC.hex()}"
            )
        if version != VERSION:
            raise PeerError(ErrorCode.HEADER, f"a frame is of version {version}, not {VERSION}")
        if flags & ~KNOWN_FLAGS:
            raise PeerError(ErrorCode.HEADER, f"a frame has unknown flags: {flags:#x}")
        if length > self.limit_bytes:
            raise PeerError(
                ErrorCode.TOO_LONG,
                f"a frame of kind {kind} has {length} bytes; at most {self.limit_bytes} are"
                " allowed here",
            )
        payload_at = start + HEADER_BYTES
        stop = payload_at + length
        if len(self._held) < stop:
            return None
        with memoryview(self._held) as held:
            found = crc32c(held[start + 16 : stop], crc32c(held[start : start + 12]))
            payload = bytes(held[payload_at:stop])
        if found != crc:
            raise PeerError(ErrorCode.BROKEN, f"a frame of kind {kind} has a wrong checksum")
        if sequence != self._sequence + 1:
            raise PeerError(
                ErrorCode.BROKEN,
                f"frame {sequence} came after frame {self._sequence} of the connection",
            )
        self._sequence = sequence
        self._at = stop
        return Frame(kind, flags, request, payload, sequence)
