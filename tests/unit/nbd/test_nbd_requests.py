"""What a client may ask for, and the bytes of the answers."""

from __future__ import annotations

import errno
import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.nbd.numbers import MAX_REQUEST_BYTES, Chunk, Cmd, CmdFlag, Errno
from bitmapd.nbd.server.requests import (
    MAX_DESCRIPTORS,
    MAX_MESSAGE_BYTES,
    Replies,
    Rules,
    descriptors,
    wire_error,
)

SIZE = 1 << 30
FULL = Rules(SIZE, 512, read_only=False, structured=True, block_status=True)
PLAIN = Rules(SIZE, 512, read_only=False, structured=False, block_status=False)
READ_ONLY = Rules(SIZE, 512, read_only=True, structured=True, block_status=True)
NATIVE = Rules(SIZE, 4096, read_only=False, structured=True, block_status=True)

SIZED = (Cmd.READ, Cmd.WRITE, Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES, Cmd.BLOCK_STATUS)
FITTING = {
    Cmd.READ: CmdFlag.FUA | CmdFlag.DF,
    Cmd.WRITE: CmdFlag.FUA,
    Cmd.TRIM: CmdFlag.FUA,
    Cmd.CACHE: CmdFlag.FUA,
    Cmd.WRITE_ZEROES: CmdFlag.FUA | CmdFlag.NO_HOLE | CmdFlag.FAST_ZERO,
    Cmd.BLOCK_STATUS: CmdFlag.FUA | CmdFlag.REQ_ONE,
}


def refusal(
    rules: Rules, command: int, offset: int = 0, length: int = 512, flags: int = 0
) -> Errno | None:
    answer = rules.refuse(command, flags, offset, length)
    if answer is None:
        return None
    assert answer.message
    return answer.error


@given(
    st.sampled_from((FULL, PLAIN, READ_ONLY, NATIVE)),
    st.sampled_from((Cmd.READ, Cmd.WRITE)),
    st.sampled_from((0, 512, 4096, SIZE - 4096, SIZE - 512, SIZE, 2**64 - 512, 1)),
    st.sampled_from((0, 1, 512, 4096, MAX_REQUEST_BYTES, MAX_REQUEST_BYTES + 4096, 2**32 - 512)),
)
def test_the_short_way_refuses_the_same(
    rules: Rules, command: Cmd, offset: int, length: int
) -> None:
    """FUA fits both commands and forbids nothing, but is looked at in detail."""
    assert rules.refuse(command, 0, offset, length) == rules.refuse(
        command, CmdFlag.FUA, offset, length
    )


@pytest.mark.parametrize("command", SIZED)
def test_what_is_allowed(command: Cmd) -> None:
    assert refusal(FULL, command) is None
    assert refusal(FULL, command, SIZE - 512) is None
    assert refusal(FULL, command, 0, MAX_REQUEST_BYTES) is None
    assert refusal(NATIVE, command, 4096, 8192) is None
    for bit in range(16):
        fits = bool(FITTING[command] & 1 << bit)
        assert refusal(FULL, command, flags=1 << bit) is (None if fits else Errno.EINVAL)


def test_flush() -> None:
    assert FULL.refuse(Cmd.FLUSH, CmdFlag.FUA, 0, 0) is None
    assert READ_ONLY.refuse(Cmd.FLUSH, 0, 0, 0) is None
    assert refusal(FULL, Cmd.FLUSH, 0, 512) is Errno.EINVAL
    assert refusal(FULL, Cmd.FLUSH, 512, 0) is Errno.EINVAL


@pytest.mark.parametrize("command", [8, 9, 77, 65535])
def test_unknown_commands(command: int) -> None:
    assert refusal(FULL, command) is Errno.EINVAL


@pytest.mark.parametrize("command", SIZED)
def test_ranges(command: Cmd) -> None:
    beyond = Errno.ENOSPC if command in (Cmd.WRITE, Cmd.WRITE_ZEROES) else Errno.EINVAL
    assert refusal(FULL, command, SIZE - 512, 1024) is beyond
    assert refusal(FULL, command, SIZE, 512) is beyond
    assert refusal(FULL, command, (1 << 64) - 512, 512) is beyond
    assert refusal(FULL, command, 0, 0) is Errno.EINVAL
    assert refusal(FULL, command, 1, 512) is Errno.EINVAL
    assert refusal(FULL, command, 512, 513) is Errno.EINVAL
    assert refusal(NATIVE, command, 512, 4096) is Errno.EINVAL


@pytest.mark.parametrize("command", SIZED)
def test_long_requests(command: Cmd) -> None:
    answer = refusal(FULL, command, 0, MAX_REQUEST_BYTES + 512)
    assert answer is (Errno.EINVAL if command in (Cmd.READ, Cmd.WRITE) else None)
    if command is Cmd.READ:
        length = MAX_REQUEST_BYTES + 512
        assert refusal(FULL, command, 0, length, CmdFlag.DF) is Errno.EOVERFLOW


@pytest.mark.parametrize("command", SIZED)
def test_read_only(command: Cmd) -> None:
    writes = command in (Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES)
    assert refusal(READ_ONLY, command) is (Errno.EPERM if writes else None)


def test_what_needs_negotiation() -> None:
    assert refusal(PLAIN, Cmd.READ, flags=CmdFlag.DF) is Errno.EINVAL
    assert refusal(PLAIN, Cmd.BLOCK_STATUS) is Errno.EINVAL
    assert refusal(PLAIN, Cmd.READ) is None


@given(
    st.integers(0, 65535) | st.sampled_from(SIZED),
    st.integers(0, 65535) | st.just(0),
    st.integers(0, (1 << 64) - 1) | st.integers(0, SIZE // 512).map(lambda n: n * 512),
    st.integers(0, (1 << 32) - 1) | st.integers(0, 1 << 16).map(lambda n: n * 512),
)
def test_whatever_is_let_through_can_be_carried_out(
    command: int, flags: int, offset: int, length: int
) -> None:
    for rules in (FULL, PLAIN, READ_ONLY, NATIVE):
        if rules.refuse(command, flags, offset, length) is None and command != Cmd.FLUSH:
            assert length > 0
            assert offset + length <= SIZE
            assert offset % rules.block_bytes == length % rules.block_bytes == 0
            assert command in SIZED
            assert not flags & ~int(FITTING[Cmd(command)])


@pytest.mark.parametrize(
    ("number", "flags", "wire"),
    [
        (errno.EROFS, 0, Errno.EPERM),
        (errno.EPERM, 0, Errno.EPERM),
        (errno.EACCES, 0, Errno.EPERM),
        (errno.ENOSPC, 0, Errno.ENOSPC),
        (errno.EDQUOT, 0, Errno.ENOSPC),
        (errno.EFBIG, 0, Errno.ENOSPC),
        (errno.ENOMEM, 0, Errno.ENOMEM),
        (errno.EINVAL, 0, Errno.EINVAL),
        (errno.ESHUTDOWN, 0, Errno.ESHUTDOWN),
        (errno.EOPNOTSUPP, CmdFlag.FAST_ZERO, Errno.ENOTSUP),
        (errno.EOPNOTSUPP, 0, Errno.EINVAL),
        (errno.EIO, 0, Errno.EIO),
        (errno.ENOTCONN, 0, Errno.EIO),
        (None, 0, Errno.EIO),
    ],
)
def test_errors_of_devices(number: int | None, flags: int, wire: Errno) -> None:
    error = OSError("no number") if number is None else OSError(number, "text")
    assert wire_error(error, flags) is wire


def test_simple_replies() -> None:
    replies = Replies(structured=False)
    assert replies.success(0x1122334455667788).hex() == "67446698000000001122334455667788"
    assert replies.read_header(5, 0, 512) == replies.success(5)
    assert replies.failure(5, Errno.ENOSPC, "text") == struct.pack(">IIQ", 0x67446698, 28, 5)


def test_structured_replies() -> None:
    replies = Replies(structured=True)
    head = ">IHHQI"
    assert replies.success(9) == struct.pack(head, 0x668E33EF, 1, Chunk.NONE, 9, 0)
    assert replies.read_header(9, 4096, 512) == struct.pack(
        head + "Q", 0x668E33EF, 1, Chunk.OFFSET_DATA, 9, 520, 4096
    )
    assert replies.failure(9, Errno.EIO, "why") == (
        struct.pack(head + "IH", 0x668E33EF, 1, Chunk.ERROR, 9, 9, 5, 3) + b"why"
    )
    assert replies.block_status(9, [(512, 0), (1024, 3)]) == struct.pack(
        head + "IIIII", 0x668E33EF, 1, Chunk.BLOCK_STATUS, 9, 20, 1, 512, 0, 1024, 3
    )


@given(st.text(max_size=600))
def test_error_texts_are_cut_at_a_character(text: str) -> None:
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        return
    reply = Replies(structured=True).failure(1, Errno.EIO, text)
    sent = reply[26:]
    assert struct.unpack_from(">IH", reply, 20) == (5, len(sent))
    assert len(sent) <= MAX_MESSAGE_BYTES
    assert raw.startswith(sent)
    assert sent.decode() == text[: len(sent.decode())]
    assert len(sent) > MAX_MESSAGE_BYTES - 4 or sent == raw


@given(
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 3)), max_size=40),
    st.integers(1, 1 << 22),
    st.booleans(),
)
def test_descriptors(pieces: list[tuple[int, int]], length: int, req_one: bool) -> None:
    found = descriptors(pieces, length, req_one)
    assert found
    assert all(size > 0 for size, _ in found)
    total = sum(size for size, _ in found)
    assert total <= length
    assert all(one[1] != two[1] for one, two in pairwise(found))
    if req_one:
        assert len(found) == 1
    # Expanded again, both say the same about every byte that was described.
    known = [piece for piece in pieces if piece[0] > 0]
    if known:
        at = 0
        for size, flags in found:
            assert _kinds(known, at, at + size) == {flags}
            at += size
        if not req_one:
            assert at == min(length, sum(size for size, _ in known))
    else:
        assert found == [(length, 0)]


def _kinds(pieces: list[tuple[int, int]], first: int, stop: int) -> set[int]:
    kinds, at = set(), 0
    for size, flags in pieces:
        if at < stop and first < at + size:
            kinds.add(flags)
        at += size
    return kinds


def test_descriptors_are_limited() -> None:
    pieces = [(512, index % 2) for index in range(5000)]
    assert len(descriptors(pieces, 1 << 30, req_one=False)) == MAX_DESCRIPTORS
