"""Messages of a pair, as hypothesis draws them, and the way over the wire."""

from __future__ import annotations

import itertools

from hypothesis import strategies as st

from bitmapd.partner.codec import Decoder, encode
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
from bitmapd.peer.frames import MAX_PAYLOAD_BYTES, Reader
from bitmapd.peer.payloads import Run
from bitmapd.peer.words import Bye, Error, Goodbye, Pong
from tests.support.streams import stream

EXTENTS = 100_000  # four pages, the last in part
BLOCKS = EXTENTS * 16

u8, u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64))
ids = st.binary(min_size=16, max_size=16)
texts = st.text(st.characters(codec="utf-8"), max_size=60).filter(str.isprintable)


def runs(bound: int, most: int = 12) -> st.SearchStrategy[tuple[Run, ...]]:
    return st.lists(st.integers(0, bound), max_size=2 * most, unique=True).map(
        lambda edges: tuple(itertools.pairwise(sorted(edges)))[::2]
    )


extents, blocks = runs(EXTENTS), runs(BLOCKS)

hellos = st.builds(
    Hello,
    volume=ids,
    node=st.integers(1, 2),
    lowest=st.just(1),
    highest=st.integers(1, 255),
    role=st.sampled_from(Role),
    flags=u32.map(HelloFlag),
    required=u64,
    offered=u64,
    term=u64,
    incarnation=st.integers(1, 2**64 - 1),
    session=u64,
    boot=ids,
    generations=st.tuples(ids, ids, ids, ids),
    size_bytes=u64,
    extent_bytes=u32,
    block_bytes=u32,
    last_paired=u64,
    machine=ids,
    timeout_ms=u32,
    most_requests=st.integers(1, 1024),
    name=texts,
    primary=texts,
    secondary=texts,
    program=texts,
)
records = st.builds(Record, extents, extents, extents, extents)
asked = st.integers(1, 2**64 - 1)

messages: st.SearchStrategy[Message] = st.one_of(
    hellos,
    records,
    st.builds(Ready, u64),
    st.builds(Add, asked, extents, extents, extents),
    st.builds(Grant, u64, extents, extents, extents, blocks, st.booleans()),
    st.builds(Got, u64),
    st.builds(Remove, extents),
    st.builds(Free, extents),
    st.builds(Ask, asked, blocks),
    st.builds(Status, asked, st.integers(0, 1), extents, st.booleans()),
    st.builds(Ping, u64, u32, u64, u64, st.integers(0, 5), u64),
    st.builds(Pong, u64),
    st.builds(Take, st.booleans()),
    st.builds(Taken, u8, texts),
    st.builds(Resize, u64, st.integers(0, 3)),
    st.builds(Resized, u8, texts),
    st.builds(Lead, u64),
    st.builds(Bye, st.sampled_from(Goodbye)),
    st.builds(Error, u16, texts),
)


def stream_of(sent: list[Message]) -> bytes:
    return stream(part for message in sent for part in encode(message))


class Receiver:
    """Bytes in, messages out, as the other node has them."""

    def __init__(self, extents: int = EXTENTS, blocks: int = BLOCKS) -> None:
        self.reader = Reader(MAX_PAYLOAD_BYTES)
        self.decoder = Decoder(extents, blocks)
        self.got: list[Message] = []

    def feed(self, data: bytes) -> None:
        self.reader.feed(data)
        for frame in iter(self.reader.take, None):
            message = self.decoder.feed(frame)
            if message is not None:
                self.got.append(message)


def pieces(stream: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    return [stream[first:stop] for first, stop in itertools.pairwise(edges)]
