"""Messages of points, as hypothesis draws them, and the way over the wire."""

from __future__ import annotations

import itertools

from hypothesis import strategies as st

from bitmapd.peer.frames import MAX_PAYLOAD_BYTES, Reader
from bitmapd.peer.words import Bye, Error, Goodbye, Pong
from bitmapd.points.codec import MAX_ENTRIES, Decoder, encode
from bitmapd.points.messages import (
    Applied,
    ApplyUpTo,
    Begin,
    Committed,
    Compare,
    Credit,
    Data,
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
from bitmapd.points.pieces import Packer, gather, whole_mask
from bitmapd.record.geometry import Geometry
from tests.support.partnermessages import ids, runs, texts, u16, u32, u64
from tests.support.streams import stream

GEOMETRY = Geometry((4 << 20) + 4096 + 512, 1 << 18, 1 << 14)  # the last block has two pieces
VOLUME = bytes(range(16))
blocks, extents = runs(GEOMETRY.blocks), runs(GEOMETRY.extents)
numbers = st.integers(1, 2**64 - 1)
incarnations = ids.filter(any)
contents = st.one_of(st.binary(min_size=1, max_size=9), st.just(b"\0"))


@st.composite
def datas(draw: st.DrawFn) -> Data:
    """Entries as a sender makes them: raw, packed or zeros, of whole blocks or pieces."""
    count = draw(st.integers(1, 5))
    chosen = sorted(draw(st.sets(st.integers(0, GEOMETRY.blocks - 1), min_size=1, max_size=count)))
    if draw(st.booleans()):
        chosen = sorted({*chosen, GEOMETRY.blocks - 1})
    packer = Packer(GEOMETRY, VOLUME, compress=draw(st.booleans()))
    stamp, entries = 0, []
    for block in chosen[:MAX_ENTRIES]:
        stamp += draw(st.integers(1, 5))
        mask = draw(st.integers(1, whole_mask(GEOMETRY, block)))
        _, length = GEOMETRY.block_bytes_range(block, block + 1)
        pattern = draw(contents)
        whole = memoryview((pattern * (length // len(pattern) + 1))[:length])
        entries.append(packer.pack(block, stamp, mask, gather(GEOMETRY, block, mask, whole)))
    return Data(tuple(entries))


@st.composite
def stamp_runs(draw: st.DrawFn) -> tuple[tuple[int, int, int], ...]:
    return tuple((first, stop - first, draw(st.integers(1, 2**63))) for first, stop in draw(blocks))


hellos = st.builds(
    Hello2,
    volume=ids,
    incarnation=incarnations,
    generations=st.tuples(ids, ids, ids, ids),
    size_bytes=u64,
    block_bytes=st.sampled_from([4096, 1 << 16, 1 << 18]),
    extent_bytes=st.sampled_from([1 << 18, 1 << 26]),
    committed=u64,
    applied=u64,
    oldest_kept=u64,
    role=st.sampled_from(Role),
    features=u32.map(Feature),
    credit_bytes=u64,
    term=u64,
    name=texts,
    program=texts,
)

messages: st.SearchStrategy[Message] = st.one_of(
    hellos,
    datas(),
    st.builds(Begin, numbers, incarnations, st.just(0), u64, u64, numbers, texts),
    st.builds(End, numbers, incarnations, u64, ids),
    st.builds(Committed, u64, ids),
    st.builds(Applied, u64),
    st.builds(Received, u64),
    st.builds(Have, u64, ids, stamp_runs(), st.booleans()),
    st.builds(Need, blocks),
    st.builds(Map, extents),
    st.builds(Handover, u64),
    st.builds(Taken, u64),
    st.builds(ApplyUpTo, u64),
    st.builds(Verify, blocks),
    st.builds(Sums, st.just(3), st.lists(u64, max_size=8).map(tuple)),
    st.builds(Compare, u64, blocks),
    st.builds(Pieces, st.just(3), st.lists(u64, max_size=40).map(tuple)),
    st.builds(Credit, u64),
    st.builds(Ping, u64),
    st.builds(Pong, u64),
    st.builds(Bye, st.sampled_from(Goodbye)),
    st.builds(Error, u16, texts),
)


def stream_of(sent: list[Message]) -> bytes:
    return stream(part for message in sent for part in encode(message))


class Receiver:
    """Bytes in, messages out, as the other end has them."""

    def __init__(self, geometry: Geometry = GEOMETRY) -> None:
        self.reader = Reader(MAX_PAYLOAD_BYTES)
        self.decoder = Decoder(geometry)
        self.got: list[Message] = []

    def feed(self, data: bytes) -> None:
        self.reader.feed(data)
        for frame in iter(self.reader.take, None):
            message = self.decoder.feed(frame)
            if message is not None:
                self.got.append(message)


def renumbered(sent: list[Message]) -> list[Message]:
    """The same with stamps that ascend from one to the other, as on one connection."""
    stamps = itertools.count(1)
    return [
        Data(tuple(_stamped(entry, next(stamps)) for entry in message.entries))
        if isinstance(message, Data)
        else message
        for message in sent
    ]


def _stamped(entry: Entry, stamp: int) -> Entry:
    return Entry(entry.block, stamp, entry.mask, entry.encoding, entry.sum64, entry.payload)
