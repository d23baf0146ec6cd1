"""Messages of points as bytes."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.peer.frames import (
    FIRST_OPTIONAL_KIND,
    MAX_PAYLOAD_BYTES,
    ErrorCode,
    Flag,
    Frame,
    Kind,
    PeerError,
    refusal,
)
from bitmapd.peer.words import Error
from bitmapd.points.codec import (
    ENTRY,
    MAX_ENTRIES,
    MAX_HAVE_BLOCKS,
    Decoder,
    PointKind,
    cost_bytes,
    encode,
    haves,
)
from bitmapd.points.messages import NIL, Data, Encoding, Entry, Have, Message, Need, Sums
from bitmapd.record.geometry import Geometry
from tests.data import make_points_golden
from tests.data.make_points_golden import INCARNATION
from tests.support.partnermessages import pieces
from tests.support.pointmessages import GEOMETRY, Receiver, messages, renumbered, stream_of

BLOCKS = GEOMETRY.blocks
LAST = BLOCKS - 1


def test_every_message_has_its_golden_bytes() -> None:
    kept = {path.stem: path.read_bytes() for path in make_points_golden.FOLDER.glob("*.bin")}
    assert kept == {
        name: make_points_golden.wire(message)
        for name, message in make_points_golden.MESSAGES.items()
    }
    kinds = {data[5] for data in kept.values()}
    assert kinds == {*map(int, PointKind), int(Kind.BYE), int(Kind.ERROR)}


@pytest.mark.parametrize("name", make_points_golden.MESSAGES)
def test_golden_bytes_are_read(name: str) -> None:
    receiver = Receiver(make_points_golden.GEOMETRY)
    receiver.feed((make_points_golden.FOLDER / f"{name}.bin").read_bytes())
    assert receiver.got == [make_points_golden.MESSAGES[name]]


@given(st.lists(messages, max_size=5), st.lists(st.integers(0, 1 << 20), max_size=10))
def test_any_cutting_gives_the_messages_back(drawn: list[Message], cuts: list[int]) -> None:
    sent = renumbered(drawn)
    receiver = Receiver()
    for piece in pieces(stream_of(sent), cuts):
        receiver.feed(piece)
    assert receiver.got == sent
    assert not receiver.reader.held_bytes


@given(messages, st.data())
def test_payloads_that_are_damaged_are_refused_or_say_what_they_say(
    message: Message, data: st.DataObject
) -> None:
    """As another program would send them that is wrong, with valid checksums: what comes out of the
    decoder is a message that is encoded as what came in."""
    (part,) = encode(message)
    payload = bytearray(part.payload)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(payload)))
        payload[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    got = None
    with contextlib.suppress(PeerError):
        got = Decoder(GEOMETRY).feed(Frame(part.kind, part.flags, 0, bytes(payload), 1))
    if got is not None:
        assert encode(got)[0].payload == bytes(payload)


@given(
    st.one_of(st.sampled_from(PointKind), st.integers(0, 255)),
    st.integers(0, 3),
    st.integers(0, 3),
    st.binary(max_size=200),
)
def test_garbage_is_refused_or_waits(kind: int, flags: int, request: int, payload: bytes) -> None:
    with contextlib.suppress(PeerError):
        Decoder(GEOMETRY).feed(Frame(kind, flags, request, payload, 1))


def entry(
    block: int = 1,
    stamp: int = 1,
    mask: int = 1,
    encoding: int = Encoding.ZEROS,
    length: int = 0,
    zero: bytes = bytes(3),
) -> bytes:
    return ENTRY.pack(block, stamp, mask, encoding, zero, length, 7)


def data(*entries: bytes, payload: bytes = b"") -> bytes:
    return struct.pack("<H", len(entries)) + b"".join(entries) + payload


def have(*runs: tuple[int, int, int], count: int | None = None) -> bytes:
    head = struct.pack("<Q16sI", 18, INCARNATION, len(runs) if count is None else count)
    return head + b"".join(struct.pack("<QIQ", *run) for run in runs)


def hello(**changes: object) -> bytes:
    known = make_points_golden.MESSAGES["hello2"]
    values = {name: getattr(known, name) for name in known.__dataclass_fields__}
    return encode(type(known)(**{**values, **changes}))[0].payload  # type: ignore[arg-type]


def begin(point: int = 2, incarnation: bytes = INCARNATION, base: int = 1, size: int = 1) -> bytes:
    return struct.pack("<Q16sQQQQH", point, incarnation, base, 0, 0, size, 0)


DATA, HAVE, HELLO2 = PointKind.DATA, PointKind.HAVE, PointKind.HELLO2
RUNS, HEADER, TOO_LONG = ErrorCode.RUNS, ErrorCode.HEADER, ErrorCode.TOO_LONG


@pytest.mark.parametrize(
    ("kind", "flags", "payload", "code", "text"),
    [
        (DATA, 0, b"", RUNS, "0 entries in 0 bytes"),
        (DATA, 0, b"\1", RUNS, "0 entries in 1 bytes"),
        (DATA, 0, data(), RUNS, "0 entries"),
        (DATA, 0, data(entry())[:-1], RUNS, "1 entries in 41 bytes"),
        (DATA, 0, struct.pack("<H", 65535), RUNS, "65535 entries"),
        (DATA, 0, data(*(entry(n, n + 1) for n in range(63))), RUNS, "63 entries"),
        (DATA, 0, data(entry(BLOCKS)), RUNS, "outside the volume"),
        (DATA, 0, data(entry(stamp=0)), RUNS, "stamp 0"),
        (DATA, 0, data(entry(mask=0)), RUNS, "mask 0x0"),
        (DATA, 0, data(entry(mask=0x10)), RUNS, "mask 0x10"),
        (DATA, 0, data(entry(LAST, mask=4)), RUNS, "mask 0x4"),
        (DATA, 0, data(entry(encoding=3)), RUNS, "encoding 3"),
        (DATA, 0, data(entry(zero=b"\0\0\1")), RUNS, "encoding 2"),
        (DATA, 0, data(entry(length=1), payload=b"x"), RUNS, "1 bytes for 4096 as ZEROS"),
        (DATA, 0, data(entry(encoding=0, length=4095)), RUNS, "4095 bytes for 4096 as RAW"),
        (DATA, 0, data(entry(LAST, 1, 3, 0, 8192)), RUNS, "8192 bytes for 4608 as RAW"),
        (DATA, 0, data(entry(encoding=1, length=4096)), RUNS, "4096 bytes for 4096 as ZSTD"),
        (DATA, 0, data(entry(encoding=1)), RUNS, "0 bytes for 4096 as ZSTD"),
        (DATA, 0, data(entry(encoding=0, length=4096), payload=b"x"), RUNS, "cut short in block 1"),
        (DATA, 0, data(entry(), payload=b"x"), RUNS, "1 bytes are left over"),
        (DATA, 0, data(entry(2, 1), entry(2, 2)), RUNS, "block 2 with stamp 2 came after block 2"),
        (DATA, 0, data(entry(2, 1), entry(1, 2)), RUNS, "block 1 with stamp 2"),
        (DATA, 0, data(entry(2, 2), entry(3, 2)), RUNS, "block 3 with stamp 2"),
        (DATA, Flag.MORE, data(entry()), HEADER, "flags 1"),
        (HAVE, 0, have()[:-1], RUNS, "HAVE is cut short"),
        (HAVE, 0, have((1, 1, 1), count=2), RUNS, "2 runs"),
        (HAVE, 0, have((1, 1, 1), count=0), RUNS, "0 runs"),
        (HAVE, 0, have(count=MAX_HAVE_BLOCKS + 1), RUNS, "16385 runs"),
        (HAVE, 0, have((0, 1, 1), (1, MAX_HAVE_BLOCKS, 9)), RUNS, "16385 blocks at once"),
        (HAVE, 0, have((1, 0, 1)), RUNS, "run of 0 at 1"),
        (HAVE, 0, have((1, 2, 1), (2, 1, 9)), RUNS, "run of 1 at 2"),
        (HAVE, 0, have((1, 2, 0)), RUNS, "with stamp 0"),
        (HAVE, 0, have((1, 2, 2**64 - 2)), RUNS, "with stamp 18446744073709551614"),
        (HAVE, 0, have((LAST, 2, 1)), RUNS, f"ends at block {BLOCKS + 1}"),
        (HAVE, Flag.MORE, have(), HEADER, "flags 1"),
        (PointKind.SUMS, 0, bytes(11), RUNS, "SUMS is cut short"),
        (PointKind.SUMS, 0, struct.pack("<QI", 0, 1), RUNS, "SUMS says 1"),
        (PointKind.SUMS, 0, struct.pack("<QIQ", BLOCKS, 1, 5), RUNS, f"from block {BLOCKS}"),
        (PointKind.PIECES, 0, bytes(11), RUNS, "PIECES is cut short"),
        (PointKind.PIECES, 0, struct.pack("<QIQ", BLOCKS, 1, 5), RUNS, f"of block {BLOCKS}"),
        (PointKind.BEGIN, 0, begin(point=0), RUNS, "point 0 is none"),
        (PointKind.BEGIN, 0, begin(incarnation=NIL), RUNS, "of nobody"),
        (PointKind.BEGIN, 0, begin(base=2), RUNS, "follows 2"),
        (PointKind.BEGIN, 0, begin(size=0), RUNS, "of 0 bytes"),
        (PointKind.END, 0, struct.pack("<Q16sQ16s", 1, NIL, 0, NIL), RUNS, "of nobody"),
        (PointKind.NEED, 0, struct.pack("<IQI", 1, BLOCKS, 1), RUNS, "outside"),
        (PointKind.MAP, 0, struct.pack("<III", 1, GEOMETRY.extents, 1), RUNS, "outside"),
        (PointKind.APPLIED, 0, bytes(7), RUNS, "cut short"),
        (Kind.BYE, 0, b"\2", RUNS, "2 where 1"),
        (HELLO2, 0, hello()[:150], RUNS, "cut short"),
        (HELLO2, 0, hello() + b"\0", RUNS, "left over"),
        (HELLO2, 0, hello(role=5), RUNS, "role 5"),
        (HELLO2, 0, hello(incarnation=NIL), RUNS, "no incarnation"),
        (HELLO2, 0, hello(block_bytes=3 << 14), RUNS, "blocks of 49152"),
        (HELLO2, 0, hello(extent_bytes=3 << 20), RUNS, "extents of 3145728"),
        (HELLO2, 0, hello(block_bytes=2048), RUNS, "blocks of 2048"),
        (HELLO2, 0, hello(block_bytes=1 << 19), RUNS, "blocks of 524288"),
        (HELLO2, 0, hello(extent_bytes=1 << 15), RUNS, "extents of 32768"),
        (HELLO2, 0, hello(block_bytes=0), RUNS, "blocks of 0"),
        (1, 0, b"", ErrorCode.KIND, "unknown kind 1"),
        (0x5F, 0, b"", ErrorCode.KIND, "unknown kind 95"),
    ],
)
def test_what_is_wrong_is_refused(
    kind: int, flags: int, payload: bytes, code: ErrorCode, text: str
) -> None:
    with pytest.raises(PeerError, match=text) as caught:
        Decoder(GEOMETRY).feed(Frame(kind, flags, 0, payload, 1))
    assert caught.value.code is code


def test_what_a_frame_unpacks_to_is_bounded() -> None:
    """62 blocks of 256 KiB of zeros would be 15 MiB for 2.5 KiB."""
    wide = Geometry(64 << 20, 1 << 20, 1 << 18)
    mask = (1 << 64) - 1
    fits = data(*(entry(n, n + 1, mask) for n in range(16)))
    assert Decoder(wide).feed(Frame(DATA, 0, 0, fits, 1)) is not None
    beyond = data(*(entry(n, n + 1, mask) for n in range(17)))
    with pytest.raises(PeerError, match="unpacks to 4456448") as caught:
        Decoder(wide).feed(Frame(DATA, 0, 0, beyond, 1))
    assert caught.value.code is TOO_LONG


def test_stamps_grow_from_frame_to_frame() -> None:
    decoder = Decoder(GEOMETRY)
    decoder.feed(Frame(DATA, 0, 0, data(entry(5, 9)), 1))
    with pytest.raises(PeerError, match="stamp 9"):
        decoder.feed(Frame(DATA, 0, 0, data(entry(6, 9)), 2))


def test_a_frame_that_is_refused_leaves_the_stamps_as_they_were() -> None:
    decoder = Decoder(GEOMETRY)
    with pytest.raises(PeerError):
        decoder.feed(Frame(DATA, 0, 0, data(entry(5, 9), payload=b"x"), 1))
    assert decoder.feed(Frame(DATA, 0, 0, data(entry(5, 9)), 2)) is not None


def test_before_the_greeting_no_block_fits() -> None:
    for kind, payload in [
        (DATA, data(entry(0))),
        (HAVE, have((0, 1, 1))),
        (PointKind.SUMS, struct.pack("<QIQ", 0, 1, 5)),
        (PointKind.PIECES, struct.pack("<QIQ", 0, 1, 5)),
        (PointKind.NEED, struct.pack("<IQI", 1, 0, 1)),
    ]:
        with pytest.raises(PeerError):
            Decoder().feed(Frame(kind, 0, 0, payload, 1))


def test_a_greeting_may_come_from_who_has_no_volume_yet() -> None:
    payload = hello(size_bytes=0, block_bytes=0, extent_bytes=0)
    assert Decoder().feed(Frame(HELLO2, 0, 0, payload, 1)) is not None


def test_unknown_kinds_from_128_on_are_skipped() -> None:
    assert Decoder(GEOMETRY).feed(Frame(FIRST_OPTIONAL_KIND, 0, 0, b"whatever", 1)) is None


def test_a_refusal_is_an_error_message() -> None:
    part = refusal(ErrorCode.OTHER, "another volume")
    got = Decoder().feed(Frame(part.kind, part.flags, part.request, part.payload, 1))
    assert got == Error(8, "another volume")


def test_what_is_too_large_is_not_sent() -> None:
    block = Entry(1, 1, 1, Encoding.RAW, 0, bytes(4096))
    assert len(encode(Data((block,) * MAX_ENTRIES))) == 1
    for count in (0, MAX_ENTRIES + 1):
        with pytest.raises(ValueError, match=f"{count} entries"):
            encode(Data((block,) * count))
    with pytest.raises(ValueError, match="Sums takes"):
        encode(Sums(0, (1,) * (MAX_PAYLOAD_BYTES // 8)))


def test_a_list_that_fits_into_no_frame_is_split_and_joined() -> None:
    runs = tuple((first, first + 1) for first in range(0, 400_000, 2))
    receiver = Receiver(Geometry(400_000 * 4096, 4096, 4096))
    receiver.feed(stream_of([Need(runs)]))
    assert receiver.got == [Need(runs)]


@given(st.lists(st.tuples(st.integers(1, 2), st.integers(1, 2)), max_size=40))
def test_what_one_has_is_said_in_runs(steps: list[tuple[int, int]]) -> None:
    stamps = [
        (sum(b for b, _ in steps[:at]), sum(s for _, s in steps[:at]))
        for at in range(1, len(steps) + 1)
    ]
    (said,) = haves(18, INCARNATION, stamps)
    assert said.last
    assert [
        (first + at, stamp + at) for first, count, stamp in said.runs for at in range(count)
    ] == stamps
    firsts = [(first, stamp) for first, _, stamp in said.runs]
    ends = [(first + count, stamp + count) for first, count, stamp in said.runs]
    assert not set(firsts) & set(ends)


def test_what_one_has_is_said_in_several_messages_if_it_is_much() -> None:
    stamps = [(2 * number, 1 + number) for number in range(MAX_HAVE_BLOCKS + 3)]
    said = list(haves(18, INCARNATION, stamps))
    found = [(len(message.runs), message.last) for message in said]
    assert found == [(MAX_HAVE_BLOCKS, False), (3, True)]
    receiver = Receiver(Geometry(400_000 * 4096, 4096, 4096))
    receiver.feed(stream_of(list[Message](said)))
    assert receiver.got == said
    assert list(haves(0, NIL, [])) == [Have(0, NIL, (), True)]


def test_credit_is_what_a_journal_needs() -> None:
    zeros = Entry(1, 1, 1, Encoding.ZEROS, 0, b"")
    packed = Entry(2, 2, 1, Encoding.ZSTD, 0, b"x")
    assert cost_bytes(Data((zeros,))) == 4096
    assert cost_bytes(Data((zeros, packed))) == 8192
    raw = Entry(3, 3, 3, Encoding.RAW, 0, bytes(8192))
    assert cost_bytes(Data((raw,))) == 3 * 4096
    assert cost_bytes(Data((packed, raw))) == 4 * 4096
