"""Sizes and byte order of the fixed structures, and the pieces around sending."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.nbd import wire
from bitmapd.nbd.server.outbox import Outbox
from bitmapd.nbd.server.patience import SLOWEST_BYTES_PER_S, Transfer
from bitmapd.nbd.server.spin import MAX_PASSED, SpinPolicy


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("GREETING", 18),
        ("CLIENT_FLAGS", 4),
        ("OPTION", 16),
        ("OPTION_REPLY", 20),
        ("INFO_EXPORT", 12),
        ("INFO_BLOCK_SIZE", 14),
        ("EXPORT_NAME_REPLY", 10),
        ("REQUEST", 28),
        ("SIMPLE_REPLY", 16),
        ("STRUCTURED_REPLY", 20),
        ("OFFSET_DATA", 8),
        ("OFFSET_HOLE", 12),
        ("BLOCK_DESCRIPTOR", 8),
        ("CONTEXT_ID", 4),
        ("ERROR_CHUNK", 6),
        ("ERROR_OFFSET_CHUNK_TAIL", 8),
    ],
)
def test_sizes(name: str, size: int) -> None:
    assert getattr(wire, name).size == size


def test_magics_are_the_texts_that_the_protocol_gives() -> None:
    assert wire.GREETING.pack(0x4E42444D41474943, 0x49484156454F5054, 3) == (
        b"NBDMAGICIHAVEOPT\0\3"
    )
    packed = wire.REQUEST.pack(0x25609513, 1, 2, 3, 4, 5)
    assert packed.hex() == "25609513000100020000000000000003000000000000000400000005"
    assert wire.REQUEST_BYTES == 28
    assert wire.EXPORT_NAME_ZEROES == b"\0" * 124


@given(st.data(), st.lists(st.tuples(st.booleans(), st.integers(1, 50)), max_size=30))
def test_an_outbox_loses_and_repeats_nothing(
    data: st.DataObject, sizes: list[tuple[bool, int]]
) -> None:
    """Pieces are added and sent in any interleaving, joined or as vectors."""
    out = Outbox()
    expected, sent = b"", b""
    buffers: list[memoryview] = []
    returned: list[memoryview] = []
    todo = list(sizes)
    count = 0
    while todo or out:
        if todo and (not out or data.draw(st.booleans())):
            is_buffer, size = todo.pop(0)
            content = bytes((count + i) % 251 for i in range(size))
            count += size
            expected += content
            piece: bytes | memoryview = content
            if is_buffer:
                piece = memoryview(bytearray(content))
                buffers.append(piece)
            out.add(piece)
            continue
        assert out.waiting_bytes == len(expected) - len(sent)
        limit = data.draw(st.integers(1, 60))
        chosen = (
            bytes(out.joined(limit)) if data.draw(st.booleans()) else b"".join(out.pieces(limit))
        )
        assert chosen
        part = chosen[: data.draw(st.integers(1, len(chosen)))]
        sent += part
        returned += out.sent(len(part))
        # A buffer comes back when its last byte has gone, not before.
        gone = 0
        for (is_buffer, size), end in zip(sizes, _ends(sizes), strict=True):
            gone += is_buffer and end <= len(sent)
            del size
        assert len(returned) == gone
    assert sent == expected
    assert [id(buffer) for buffer in returned] == [id(buffer) for buffer in buffers]
    assert not out.clear()


def _ends(sizes: list[tuple[bool, int]]) -> list[int]:
    ends, at = [], 0
    for _, size in sizes:
        at += size
        ends.append(at)
    return ends


def test_a_cleared_outbox_returns_its_buffers() -> None:
    out = Outbox()
    buffer = memoryview(bytearray(8))
    out.add(b"head")
    out.add(buffer)
    assert out.sent(6) == []
    assert out.clear() == [buffer]
    assert not out
    assert out.waiting_bytes == 0


def test_small_pieces_share_a_record_but_large_ones_are_not_copied() -> None:
    out = Outbox()
    out.add(b"a" * 4)
    large = memoryview(bytearray(100))
    out.add(large)
    assert out.joined(10) == b"a" * 4 + bytes(6)
    out.sent(4)
    assert out.joined(10).obj is large.obj  # type: ignore[union-attr]


def test_polling_stops_when_it_does_not_pay_and_is_tried_again() -> None:
    policy = SpinPolicy(processors=2)
    gaps = []
    for _ in range(12):
        passed = 0
        while not policy.wanted():
            passed += 1
        gaps.append(passed)
        policy.failed()
    assert gaps == [0, 1, 3, 7, 15, 31, 63, 127, 255, 255, 255, MAX_PASSED]
    while not policy.wanted():
        pass
    policy.worked()
    assert policy.wanted()
    policy.failed()
    assert [policy.wanted(), policy.wanted()] == [False, True]


def test_no_polling_on_one_processor_nor_where_it_is_not_wanted() -> None:
    assert not SpinPolicy(processors=1).wanted()
    assert not SpinPolicy(processors=2, enabled=False).wanted()


def test_patience_with_silence_and_with_a_trickle() -> None:
    transfer = Transfer()
    assert transfer.overdue(1e9, 1, 30, 10) is None
    transfer.begin(100.0)
    assert transfer.overdue(109.0, 5, 30, 10) is None
    assert "nothing moved for 10 s" in str(transfer.overdue(111.0, 5, 30, 10))
    whole_bytes = 4 * SLOWEST_BYTES_PER_S
    for second in range(1, 34):
        transfer.advance(100.0 + second, 1)
        assert transfer.overdue(100.0 + second, whole_bytes - second, 30, 10) is None
    transfer.advance(135.0, 1)
    assert "more than 34 s" in str(transfer.overdue(135.0, whole_bytes - 34, 30, 10))
    transfer.end()
    assert transfer.overdue(1e9, 0, 30, 10) is None
    transfer.begin(1000.0)
    assert transfer.overdue(1033.0, whole_bytes, 30, 100) is None
    assert transfer.overdue(1035.0, whole_bytes, 30, 100) is not None
