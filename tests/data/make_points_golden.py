"""Make the golden frames of points: `python -m tests.data.make_points_golden`.

One file a message, as it stands on the wire.  The files are the protocol: a program that writes or
reads other bytes has changed it.  An entry that is packed is packed here once and for all: another
version of zstd may pack it otherwise, and has to unpack it.
"""

from __future__ import annotations

from pathlib import Path

from bitmapd.peer.words import Bye, Error, Goodbye, Pong
from bitmapd.points.codec import encode
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
from bitmapd.points.pieces import digest, piece_sum
from bitmapd.record.geometry import Geometry
from tests.support.streams import stream, write_streams

FOLDER = Path(__file__).parent / "points"
VOLUME = bytes(range(16))
INCARNATION = bytes(range(16, 32))
GEOMETRY = Geometry((1 << 30) + 4096 + 512, 1 << 20, 1 << 16)  # the last block has two pieces
LAST = GEOMETRY.blocks - 1

RAW = bytes(range(256)) * 32  # two pieces
TEXT = b"0123456789abcdef" * 4096
# zstd 1.5.7 at level 1.
PACKED = bytes.fromhex("28b52ffd6000ffc5000080303132333435363738396162636465660100daffa3cf25")


def _entry(block: int, stamp: int, mask: int, encoding: Encoding, raw: bytes, sent: bytes) -> Entry:
    return Entry(block, stamp, mask, encoding, piece_sum(VOLUME, block, stamp, mask, raw), sent)


ENTRIES = (
    _entry(3, 41, 0b1001, Encoding.RAW, RAW, RAW),
    _entry(4, 42, 0xFFFF, Encoding.ZSTD, TEXT, PACKED),
    _entry(LAST, 43, 0b11, Encoding.ZEROS, bytes(4096 + 512), b""),
)

MESSAGES: dict[str, Message] = {
    "hello2": Hello2(
        volume=VOLUME,
        incarnation=INCARNATION,
        generations=tuple(bytes([number]) * 16 for number in (4, 3, 0, 0)),
        size_bytes=GEOMETRY.size_bytes,
        block_bytes=GEOMETRY.block_bytes,
        extent_bytes=GEOMETRY.extent_bytes,
        committed=17,
        applied=16,
        oldest_kept=3,
        role=Role.RECEIVER,
        features=Feature.ZSTD | Feature.PIECES,
        credit_bytes=1 << 30,
        term=5,
        name="vol0",
        program="0.1.0",
    ),
    "begin": Begin(18, INCARNATION, 17, 1_700_000_000_123_456_789, 0, GEOMETRY.size_bytes, "eve"),
    "data": Data(ENTRIES),
    "end": End(18, INCARNATION, 3, digest((e.block, e.stamp, e.mask, e.sum64) for e in ENTRIES)),
    "committed": Committed(18, INCARNATION),
    "applied": Applied(18),
    "received": Received(43),
    "have": Have(18, INCARNATION, ((3, 2, 41), (LAST, 1, 43)), True),
    "have-part": Have(18, INCARNATION, ((3, 2, 41),), False),
    "have-nothing": Have(0, NIL, (), True),
    "need": Need(((3, 5), (9, 10))),
    "map": Map(((0, 2), (1024, 1025))),
    "handover": Handover(6),
    "taken": Taken(6),
    "apply-up-to": ApplyUpTo(12),
    "verify": Verify(((0, 16),)),
    "sums": Sums(5, (0x0123456789ABCDEF, 1)),
    "compare": Compare(0x0123456789ABCDEF, ((3, 5), (LAST, LAST + 1))),
    "pieces": Pieces(3, (0x0123456789ABCDEF, 1)),
    "credit": Credit(4 << 20),
    "ping": Ping(123_456_789),
    "pong": Pong(123_456_789),
    "bye": Bye(Goodbye.STOPPED),
    "error": Error(8, "another volume"),
}


def wire(message: Message) -> bytes:
    return stream(encode(message))


def main() -> None:
    write_streams(FOLDER, {name: wire(message) for name, message in MESSAGES.items()})


if __name__ == "__main__":
    main()
