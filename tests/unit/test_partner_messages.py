"""Messages of a pair as bytes."""

from __future__ import annotations

import contextlib
import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.partner.codec import Decoder, encode
from bitmapd.partner.messages import Add, Ask, Free, Grant, Message, Record, Remove, Status
from bitmapd.peer.frames import (
    MAX_PAYLOAD_BYTES,
    ErrorCode,
    Flag,
    Frame,
    Kind,
    PeerError,
    refusal,
)
from bitmapd.peer.shapes import MAX_PARTS
from bitmapd.peer.words import Error
from bitmapd.record.pages import EXTENTS_PER_PAGE, PAGE_PAYLOAD_BYTES
from tests.data import make_partner_golden
from tests.support.partnermessages import BLOCKS, EXTENTS, Receiver, messages, pieces, stream_of


def test_every_message_has_its_golden_bytes() -> None:
    kept = {path.stem: path.read_bytes() for path in make_partner_golden.FOLDER.glob("*.bin")}
    assert kept == {
        name: make_partner_golden.wire(message)
        for name, message in make_partner_golden.MESSAGES.items()
    }
    kinds = {data[5] for data in kept.values()}
    assert kinds == {int(kind) for kind in Kind}


@pytest.mark.parametrize("name", make_partner_golden.MESSAGES)
def test_golden_bytes_are_read(name: str) -> None:
    receiver = Receiver()
    receiver.feed((make_partner_golden.FOLDER / f"{name}.bin").read_bytes())
    assert receiver.got == [make_partner_golden.MESSAGES[name]]


@given(st.lists(messages, max_size=5), st.lists(st.integers(0, 1 << 20), max_size=10))
def test_any_cutting_gives_the_messages_back(sent: list[Message], cuts: list[int]) -> None:
    receiver = Receiver()
    for piece in pieces(stream_of(sent), cuts):
        receiver.feed(piece)
    assert receiver.got == sent
    assert not receiver.reader.held_bytes


@given(messages, st.data())
def test_a_flipped_bit_never_makes_another_message(message: Message, data: st.DataObject) -> None:
    stream = bytearray(stream_of([message]))
    bit = data.draw(st.integers(0, len(stream) * 8 - 1))
    stream[bit >> 3] ^= 1 << (bit & 7)
    receiver = Receiver()
    with contextlib.suppress(PeerError):
        receiver.feed(bytes(stream))
    assert receiver.got == []


@given(messages, st.data())
def test_payloads_that_are_damaged_are_refused_or_say_what_they_say(
    message: Message, data: st.DataObject
) -> None:
    """As a partner would send them that is wrong, with valid checksums: what comes out of the
    decoder is a message that is encoded as what came in, up to the form of a record's pages."""
    decoder, got = Decoder(EXTENTS, BLOCKS), None
    parts = encode(message)
    victim = data.draw(st.integers(0, len(parts) - 1))
    with contextlib.suppress(PeerError):
        for number, part in enumerate(parts):
            payload = bytearray(part.payload)
            if number == victim:
                for _ in range(data.draw(st.integers(1, 3))):
                    at = data.draw(st.integers(0, len(payload)))
                    payload[at : at + data.draw(st.integers(0, 4))] = data.draw(
                        st.binary(max_size=4)
                    )
            got = decoder.feed(Frame(part.kind, part.flags, part.request, bytes(payload), 1))
            seen = bytes(payload)
        if got is not None and not isinstance(got, Record):
            assert encode(got)[-1].payload == seen


@given(st.integers(0, 255), st.integers(0, 3), st.integers(0, 3), st.binary(max_size=80))
def test_garbage_is_refused_or_waits(kind: int, flags: int, request: int, payload: bytes) -> None:
    with contextlib.suppress(PeerError):
        Decoder(EXTENTS, BLOCKS).feed(Frame(kind, flags, request, payload, 1))


def u32s(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def hello(**changes: object) -> bytes:
    values = {name: getattr(HELLO, name) for name in HELLO.__dataclass_fields__}
    return encode(type(HELLO)(**{**values, **changes}))[0].payload  # type: ignore[arg-type]


HELLO = make_partner_golden.MESSAGES["hello"]
NOTHING = u32s(0)
BITS = bytes(PAGE_PAYLOAD_BYTES)


def page(number: int, form: int, index: int, data: bytes) -> bytes:
    return struct.pack("<BBI", number, form, index) + data


@pytest.mark.parametrize(
    ("kind", "flags", "request_number", "payload", "code", "text"),
    [
        (Kind.REMOVE, 0, 0, b"\0\0\0", ErrorCode.RUNS, "cut short"),
        (Kind.REMOVE, 0, 0, u32s(1), ErrorCode.RUNS, "1 runs and is shorter"),
        (Kind.REMOVE, 0, 0, u32s(0xFFFFFFFF), ErrorCode.RUNS, "4294967295 runs"),
        (Kind.REMOVE, 0, 0, u32s(1, 5, 0), ErrorCode.RUNS, "run of 0 at 5"),
        (Kind.REMOVE, 0, 0, u32s(2, 5, 1, 6, 1), ErrorCode.RUNS, "of 1 at 6 .* ends at 6"),
        (Kind.REMOVE, 0, 0, u32s(2, 5, 1, 4, 1), ErrorCode.RUNS, "of 1 at 4"),
        (Kind.REMOVE, 0, 0, u32s(1, EXTENTS, 1), ErrorCode.RUNS, "ends at 100001, outside"),
        (Kind.REMOVE, 0, 0, u32s(1, EXTENTS - 1, 2), ErrorCode.RUNS, "outside the volume"),
        (Kind.REMOVE, 0, 0, u32s(0, 0), ErrorCode.RUNS, "4 bytes are left over"),
        (Kind.REMOVE, Flag.MORE, 0, NOTHING, ErrorCode.RUNS, "is empty and not the last"),
        (Kind.REMOVE, Flag.LAST, 0, NOTHING, ErrorCode.HEADER, "LAST"),
        (Kind.REMOVE, 0, 1, NOTHING, ErrorCode.ANSWER, "the request 1"),
        (Kind.ADD, 0, 0, NOTHING * 3, ErrorCode.ANSWER, "the request 0"),
        (Kind.ASK, 0, 1, struct.pack("<IQI", 1, BLOCKS, 1), ErrorCode.RUNS, "outside"),
        (Kind.GRANT, 3, 1, NOTHING * 4, ErrorCode.HEADER, "LAST"),
        (Kind.GOT, Flag.MORE, 0, bytes(8), ErrorCode.HEADER, "never in parts"),
        (Kind.GOT, 0, 0, bytes(7), ErrorCode.RUNS, "cut short"),
        (Kind.STATUS, 0, 1, b"\2" + NOTHING, ErrorCode.RUNS, "2 where 1"),
        (Kind.BYE, 0, 0, b"\2", ErrorCode.RUNS, "2 where 1"),
        (Kind.TAKE, 0, 0, b"\2", ErrorCode.RUNS, "2 where 1"),
        (Kind.RESIZE, 0, 0, bytes(8) + b"\4", ErrorCode.RUNS, "4 where 3"),
        (Kind.PING, 0, 0, bytes(28) + b"\6" + bytes(8), ErrorCode.RUNS, "6 where 5"),
        (Kind.ERROR, 0, 0, b"\5\0\1", ErrorCode.RUNS, "text is cut short"),
        (Kind.ERROR, 0, 0, b"\5\0\2\0a", ErrorCode.RUNS, "2 bytes"),
        (Kind.ERROR, 0, 0, b"\5\0\1\4" + bytes(1025), ErrorCode.RUNS, "1025 bytes"),
        (Kind.ERROR, 0, 0, b"\5\0\1\0\xff", ErrorCode.RUNS, "UTF-8"),
        (Kind.ERROR, 0, 0, b"\5\0\1\0\x1b", ErrorCode.RUNS, "printable"),
        (Kind.HELLO, 0, 0, bytes(191), ErrorCode.RUNS, "cut short"),
        (Kind.HELLO, 0, 0, hello() + b"\0", ErrorCode.RUNS, "left over"),
        (Kind.HELLO, 0, 0, hello(node=0), ErrorCode.RUNS, "node 0"),
        (Kind.HELLO, 0, 0, hello(lowest=0), ErrorCode.RUNS, "versions 0 to 1"),
        (Kind.HELLO, 0, 0, hello(lowest=3, highest=2), ErrorCode.RUNS, "versions 3 to 2"),
        (Kind.HELLO, 0, 0, hello(role=2), ErrorCode.RUNS, "role 2"),
        (Kind.HELLO, 0, 0, hello(incarnation=0), ErrorCode.RUNS, "incarnation"),
        (Kind.HELLO, 0, 0, hello(most_requests=0), ErrorCode.RUNS, "0 requests"),
        (Kind.HELLO, 0, 0, hello(most_requests=1025), ErrorCode.RUNS, "1025 requests"),
        (Kind.HELLO, Flag.MORE, 0, hello(), ErrorCode.HEADER, "flags 1"),
        (Kind.HELLO, 0, 1, hello(), ErrorCode.ANSWER, "request 1"),
        (Kind.RECORD, Flag.MORE, 0, bytes(5), ErrorCode.RUNS, "cut short"),
        (Kind.RECORD, Flag.MORE, 0, page(0, 0, 0, NOTHING), ErrorCode.RUNS, "set 0"),
        (Kind.RECORD, Flag.MORE, 0, page(5, 0, 0, NOTHING), ErrorCode.RUNS, "set 5"),
        (Kind.RECORD, Flag.MORE, 0, page(1, 0, 4, NOTHING), ErrorCode.RUNS, "page 4"),
        (Kind.RECORD, Flag.MORE, 0, page(1, 2, 0, NOTHING), ErrorCode.RUNS, "form 2"),
        (Kind.RECORD, Flag.MORE, 0, page(1, 0, 0, u32s(0, 0)), ErrorCode.RUNS, "left over"),
        (Kind.RECORD, Flag.MORE, 0, page(1, 0, 1, u32s(1, 31487, 2)), ErrorCode.RUNS, "31487"),
        (Kind.RECORD, Flag.MORE, 0, page(1, 0, 0, u32s(1, 31487, 2)), ErrorCode.RUNS, "31489"),
        (Kind.RECORD, Flag.MORE, 0, page(1, 1, 0, BITS + b"\0"), ErrorCode.RUNS, "3937"),
        (Kind.RECORD, Flag.MORE, 0, page(1, 1, 3, BITS[1:] + b"\1"), ErrorCode.RUNS, "bit is set"),
        (Kind.RECORD, 0, 0, bytes(7), ErrorCode.RUNS, "7 bytes"),
        (Kind.RECORD, 0, 0, bytes(8), ErrorCode.BROKEN, "digest"),
        (Kind.RECORD, Flag.LAST, 0, bytes(8), ErrorCode.HEADER, "flags 2"),
        (4, 0, 0, b"", ErrorCode.KIND, "unknown kind 4"),
        (127, 0, 0, b"", ErrorCode.KIND, "unknown kind 127"),
    ],
)
def test_what_is_wrong_is_refused(
    kind: int, flags: int, request_number: int, payload: bytes, code: ErrorCode, text: str
) -> None:
    with pytest.raises(PeerError, match=text) as caught:
        Decoder(EXTENTS, BLOCKS).feed(Frame(kind, flags, request_number, payload, 1))
    assert caught.value.code is code


def test_unknown_kinds_from_128_on_are_skipped() -> None:
    decoder = Decoder(EXTENTS, BLOCKS)
    assert decoder.feed(Frame(200, Flag.MORE, 7, b"whatever", 1)) is None
    assert decoder.feed(Frame(Kind.REMOVE, 0, 0, NOTHING, 2)) == Remove(())


def test_before_the_greeting_no_run_fits() -> None:
    with pytest.raises(PeerError, match="outside"):
        Decoder().feed(Frame(Kind.REMOVE, 0, 0, u32s(1, 0, 1), 1))


@pytest.mark.parametrize(
    ("kind", "request_number"),
    [(Kind.REMOVE, 0), (Kind.ADD, 8), (Kind.PING, 0), (Kind.RECORD, 0), (128, 0), (9, 0)],
)
def test_parts_follow_one_another_directly(kind: int, request_number: int) -> None:
    decoder = Decoder(EXTENTS, BLOCKS)
    part = u32s(1, 0, 1) + NOTHING * 2
    assert decoder.feed(Frame(Kind.ADD, Flag.MORE, 7, part, 1)) is None
    with pytest.raises(PeerError) as caught:
        decoder.feed(Frame(kind, 0, request_number, NOTHING * 3, 2))
    assert caught.value.code is ErrorCode.BROKEN


def test_parts_repeat_their_fixed_fields() -> None:
    decoder = Decoder(EXTENTS, BLOCKS)
    decoder.feed(Frame(Kind.STATUS, Flag.MORE, 7, b"\1" + u32s(1, 0, 1), 1))
    with pytest.raises(PeerError, match="differ"):
        decoder.feed(Frame(Kind.STATUS, 0, 7, b"\0" + NOTHING, 2))


def test_runs_of_a_later_part_follow_those_before() -> None:
    decoder = Decoder(EXTENTS, BLOCKS)
    decoder.feed(Frame(Kind.REMOVE, Flag.MORE, 0, u32s(1, 7, 2), 1))
    with pytest.raises(PeerError, match="of 1 at 9"):
        decoder.feed(Frame(Kind.REMOVE, 0, 0, u32s(1, 9, 1), 2))


def test_pages_of_a_record_ascend() -> None:
    for before, after in [((1, 1), (1, 1)), ((1, 1), (1, 0)), ((2, 0), (1, 3))]:
        decoder = Decoder(EXTENTS, BLOCKS)
        decoder.feed(Frame(Kind.RECORD, Flag.MORE, 0, page(before[0], 1, before[1], BITS), 1))
        with pytest.raises(PeerError, match="out of order"):
            decoder.feed(Frame(Kind.RECORD, Flag.MORE, 0, page(after[0], 1, after[1], BITS), 2))


def over_the_wire(message: Message, extents: int, blocks: int) -> Message:
    receiver = Receiver(extents, blocks)
    receiver.feed(stream_of([message]))
    (got,) = receiver.got
    return got


EVERY_OTHER = tuple((first, first + 1) for first in range(0, 400_000, 2))


@pytest.mark.parametrize(
    "message",
    [
        Add(1, EVERY_OTHER, EVERY_OTHER[1:], EVERY_OTHER[2:]),
        Grant(3, ((0, 9),), (), (), EVERY_OTHER, True),
        Grant(3, EVERY_OTHER, (), (), EVERY_OTHER, False),
        Ask(2, EVERY_OTHER),
        Status(2, 1, EVERY_OTHER, True),
        Free(EVERY_OTHER),
    ],
)
def test_lists_that_fit_into_no_frame_are_split(message: Message) -> None:
    parts = encode(message)
    assert len(parts) > 1
    assert all(len(part.payload) <= MAX_PAYLOAD_BYTES for part in parts)
    assert sum(map(len, (part.payload for part in parts))) > MAX_PAYLOAD_BYTES * (len(parts) - 1.01)
    last = getattr(message, "last", False)
    assert [part.flags for part in parts] == [1] * (len(parts) - 1) + [2 if last else 0]
    assert over_the_wire(message, 400_000, 400_000) == message


def test_the_number_of_parts_is_bounded() -> None:
    decoder = Decoder(1 << 26, 1 << 26)
    for number in range(MAX_PARTS - 1):
        part = u32s(1, 2 * number, 1)
        assert decoder.feed(Frame(Kind.REMOVE, Flag.MORE, 0, part, number + 1)) is None
    assert decoder.feed(Frame(Kind.REMOVE, 0, 0, NOTHING, MAX_PARTS)) is not None
    for number in range(MAX_PARTS - 1):
        decoder.feed(Frame(Kind.REMOVE, Flag.MORE, 0, u32s(1, 2 * number, 1), number + 1))
    with pytest.raises(PeerError) as caught:
        decoder.feed(Frame(Kind.REMOVE, Flag.MORE, 0, u32s(1, 5000, 1), MAX_PARTS))
    assert caught.value.code is ErrorCode.TOO_LONG


def test_a_sender_does_not_exceed_the_number_of_parts() -> None:
    class Endless(tuple[tuple[int, int], ...]):
        """As many runs as take one part too many, without the memory for them."""

        def __len__(self) -> int:
            return MAX_PARTS * (MAX_PAYLOAD_BYTES // 8)

        def __getitem__(self, index: object) -> tuple[()]:  # type: ignore[override]
            return ()

    with pytest.raises(ValueError, match="65 frames"):
        encode(Remove(Endless()))


def test_a_run_of_blocks_longer_than_a_number_says_is_joined_again() -> None:
    longest = 2**32 - 1
    blocks = ((1, 5 + 3 * longest), (5 + 3 * longest + 1, 2**34))
    (part,) = encode(Ask(1, blocks))
    assert len(part.payload) == 4 + 12 * 5
    assert over_the_wire(Ask(1, blocks), 2**26, 2**34) == Ask(1, blocks)
    exact = ((0, longest),)
    assert len(encode(Ask(1, exact))[0].payload) == 4 + 12
    assert over_the_wire(Ask(1, exact), 2**26, 2**34) == Ask(1, exact)


def test_a_page_of_a_record_is_sent_in_its_shorter_form() -> None:
    for count, length in [(490, 4 + 8 * 490), (491, 4 + 8 * 491), (492, PAGE_PAYLOAD_BYTES)]:
        runs = tuple(
            (EXTENTS_PER_PAGE + at, EXTENTS_PER_PAGE + at + 1) for at in range(0, 2 * count, 2)
        )
        record = Record(runs, (), (), ())
        first, last = encode(record)
        assert len(first.payload) == 6 + length
        assert len(last.payload) == 8
        assert over_the_wire(record, EXTENTS, BLOCKS) == record


def test_a_run_over_many_pages_is_one_again() -> None:
    record = Record(
        ((1, 3 * EXTENTS_PER_PAGE),), ((EXTENTS_PER_PAGE, EXTENTS),), (), ((0, EXTENTS),)
    )
    assert len(encode(record)) == 3 + 3 + 4 + 1
    assert over_the_wire(record, EXTENTS, BLOCKS) == record


def test_a_record_of_two_runs_that_meet_at_a_border_is_one_run() -> None:
    decoder = Decoder(EXTENTS, BLOCKS)
    (*pages, last) = encode(Record(((10, EXTENTS_PER_PAGE + 5),), (), (), ()))
    assert [part.payload[6:] for part in pages] == [
        u32s(1, 10, EXTENTS_PER_PAGE - 10),
        u32s(1, EXTENTS_PER_PAGE, 5),
    ]
    for part in (*pages, last):
        got = decoder.feed(Frame(part.kind, part.flags, 0, part.payload, 1))
    assert got == Record(((10, EXTENTS_PER_PAGE + 5),), (), (), ())


def test_a_whole_fleet_of_extents_passes() -> None:
    """16 TiB in extents of 1 MiB, 100,000 runs."""
    edges = sorted(random.Random(5).sample(range(1 << 24), 200_000))
    record = Record(tuple(zip(edges[::2], edges[1::2], strict=True)), (), (), ())
    assert over_the_wire(record, 1 << 24, 1 << 28) == record


def test_a_refusal_is_an_error_message() -> None:
    part = refusal(ErrorCode.BUSY, "too many")
    frame = Frame(part.kind, part.flags, part.request, part.payload, 1)
    assert Decoder().feed(frame) == Error(7, "too many")
