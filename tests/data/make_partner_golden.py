"""Make the golden frames of a pair: `python -m tests.data.make_partner_golden`.

One file a message, as it stands on the wire.  The files are the protocol: a program that writes or
reads other bytes has changed it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bitmapd.partner.codec import encode
from bitmapd.partner.messages import (
    Add,
    Ask,
    Free,
    Got,
    Grant,
    Hello,
    HelloFlag,
    Lead,
    Message,
    Ping,
    Ready,
    Record,
    Remove,
    Resize,
    Resized,
    Role,
    Status,
    Take,
    Taken,
)
from bitmapd.peer.words import Bye, Error, Goodbye, Pong
from tests.support.streams import stream, write_streams

FOLDER = Path(__file__).parent / "partner"
EXTENTS = 100_000
BLOCKS = EXTENTS * 16

HELLO = Hello(
    volume=bytes(range(16)),
    node=2,
    lowest=1,
    highest=1,
    role=Role.PAIR,
    flags=HelloFlag.FRESH | HelloFlag.SERVES,
    required=3,
    offered=7,
    term=5,
    incarnation=0x1122334455667788,
    session=9,
    boot=bytes(range(16, 32)),
    generations=tuple(bytes([number]) * 16 for number in (4, 3, 2, 0)),
    size_bytes=EXTENTS << 20,
    extent_bytes=1 << 20,
    block_bytes=65536,
    last_paired=0x99AABBCCDDEEFF00,
    machine=bytes(range(32, 48)),
    timeout_ms=2000,
    most_requests=64,
    name="vol0",
    primary="wwn:naa.5000c500a1b2c3d4",
    secondary="nbd://backup/vol0",
    program="0.1.0",
)

MESSAGES: dict[str, Message] = {
    "hello": HELLO,
    "hello-direct": replace(
        HELLO,
        node=1,
        flags=HelloFlag.FRESH | HelloFlag.DIRECT | HelloFlag.ON_PROMOTE,
        required=67,
        offered=127,
        incarnation=1,
        last_paired=0,
        program="0.2.0",
    ),
    "record": Record(
        own=((0, 10), (31_480, 31_500), (99_999, 100_000)),
        owed=((12, 13),),
        stored=tuple((first, first + 1) for first in range(0, 1200, 2)),  # a page of bits
        copying=(),
    ),
    "record-empty": Record((), (), (), ()),
    "ready": Ready(0x0123456789ABCDEF),
    "add": Add(7, ((3, 5),), ((5_000, 5_008), (6_000, 6_001)), ((1, 2),)),
    "grant": Grant(7, ((3, 5),), ((6_000, 6_001),), ((4, 5),), ((50, 52), (70, 80)), True),
    "grant-unasked": Grant(0, ((3, 5),), (), (), (), False),
    "got": Got(12),
    "remove": Remove(((3, 5),)),
    "free": Free(((4, 5),)),
    "ask": Ask(8, ((48, 64), (1_599_999, 1_600_000))),
    "status": Status(8, 1, ((3, 4),), True),
    "ping": Ping(123_456_789, 250, 1 << 30, 1500, 1, 1 << 40),
    "pong": Pong(123_456_789),
    "take": Take(True),
    "taken": Taken(0, ""),
    "resize": Resize(1 << 44, 2),
    "resized": Resized(13, "the record is too small for 16 TiB"),
    "lead": Lead(2),
    "bye": Bye(Goodbye.STOPPED),
    "error": Error(5, "a run ends at 7, outside the volume, which ends at 4"),
}


def wire(message: Message) -> bytes:
    return stream(encode(message))


def main() -> None:
    write_streams(FOLDER, {name: wire(message) for name, message in MESSAGES.items()})


if __name__ == "__main__":
    main()
