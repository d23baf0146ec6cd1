"""Requests of the transmission phase: what is allowed, and how it is answered (pure).

`Rules.refuse` decides about a request header before anything is done for it, as nbdkit does:

| request                                        | answer                              |
| ---------------------------------------------- | ----------------------------------- |
| unknown command, flag that does not fit it     | EINVAL                              |
| READ_ONLY export and WRITE, TRIM, WRITE_ZEROES | EPERM                               |
| FLUSH with an offset or a length               | EINVAL                              |
| length 0                                       | EINVAL                              |
| offset or length not a multiple of the block   | EINVAL                              |
| beyond the end                                 | ENOSPC for WRITE, WRITE_ZEROES; else EINVAL |
| READ, WRITE of more than 32 MiB                | EINVAL; READ with DF: EOVERFLOW     |
| BLOCK_STATUS without base:allocation           | EINVAL                              |

FUA is accepted on every command, as the protocol demands of a server that offers it.  Python's
integers do not overflow, so `offset + length` needs no care.

`Replies` builds the answers: structured ones for everything once they were negotiated (errors then
carry a text), simple ones otherwise.  A read's payload is not part of what it returns.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass

from bitmapd.nbd.numbers import (
    MAX_REQUEST_BYTES,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Cmd,
    CmdFlag,
    Errno,
    ReplyFlag,
)
from bitmapd.nbd.server.handshake import BASE_ALLOCATION_ID
from bitmapd.nbd.wire import (
    BLOCK_DESCRIPTOR,
    CONTEXT_ID,
    ERROR_CHUNK,
    OFFSET_DATA,
    SIMPLE_REPLY,
    STRUCTURED_REPLY,
)

# A payload that is refused is read and thrown away up to this length; beyond it the connection is
# dropped, since nothing tells such a client from garbage.
MAX_SKIPPED_PAYLOAD_BYTES = 2 * MAX_REQUEST_BYTES
MAX_DESCRIPTORS = 512
MAX_MESSAGE_BYTES = 256

# Plain integers: enum attributes and flag arithmetic would be a good part of a request's cost.
_READ, _WRITE, _FLUSH = int(Cmd.READ), int(Cmd.WRITE), int(Cmd.FLUSH)
_BLOCK_STATUS = int(Cmd.BLOCK_STATUS)
_WRITING = (_WRITE, int(Cmd.TRIM), int(Cmd.WRITE_ZEROES))
_FUA, _DF = int(CmdFlag.FUA), int(CmdFlag.DF)
_DONE, _NONE, _DATA = int(ReplyFlag.DONE), int(Chunk.NONE), int(Chunk.OFFSET_DATA)

_ALLOWED_FLAGS: dict[int, int] = {
    _READ: _FUA | _DF,
    _WRITE: _FUA,
    _FLUSH: _FUA,
    int(Cmd.TRIM): _FUA,
    int(Cmd.CACHE): _FUA,
    int(Cmd.WRITE_ZEROES): _FUA | int(CmdFlag.NO_HOLE) | int(CmdFlag.FAST_ZERO),
    _BLOCK_STATUS: _FUA | int(CmdFlag.REQ_ONE),
}

_WIRE_ERRORS: dict[int | None, Errno] = {
    errno.EPERM: Errno.EPERM,
    errno.EACCES: Errno.EPERM,
    errno.EROFS: Errno.EPERM,
    errno.ENOMEM: Errno.ENOMEM,
    errno.EINVAL: Errno.EINVAL,
    errno.ENOSPC: Errno.ENOSPC,
    errno.EDQUOT: Errno.ENOSPC,
    errno.EFBIG: Errno.ENOSPC,
    errno.ESHUTDOWN: Errno.ESHUTDOWN,
}


@dataclass(frozen=True, slots=True)
class Refusal:
    error: Errno
    message: str


@dataclass(frozen=True, slots=True)
class Rules:
    """What one client may ask for; fixed when it is let in."""

    size_bytes: int
    block_bytes: int
    read_only: bool
    structured: bool
    block_status: bool

    def refuse(self, command: int, flags: int, offset: int, length: int) -> Refusal | None:
        """None if the request may be carried out; offset and length in bytes."""
        # Nearly all requests, at the price of one expression; the rest says the same in detail.
        if (
            command <= _WRITE
            and not flags
            and 0 < length <= MAX_REQUEST_BYTES
            and offset + length <= self.size_bytes
            and not (offset | length) % self.block_bytes
            and not (self.read_only and command)
        ):
            return None
        allowed = _ALLOWED_FLAGS.get(command)
        if allowed is None:
            return Refusal(Errno.EINVAL, f"command {command} is unknown")
        if flags & ~allowed:
            return Refusal(Errno.EINVAL, f"flags {flags:#x} do not fit {_name(command)}")
        if command == _FLUSH:
            if offset or length:
                return Refusal(Errno.EINVAL, "FLUSH with an offset or a length")
            return None
        if self.read_only and command in _WRITING:
            return Refusal(Errno.EPERM, f"{_name(command)} on a read-only export")
        if flags & _DF and not self.structured:
            return Refusal(Errno.EINVAL, "DF without structured replies")
        if command == _BLOCK_STATUS and not self.block_status:
            return Refusal(Errno.EINVAL, "BLOCK_STATUS without base:allocation")
        if length == 0:
            return Refusal(Errno.EINVAL, f"{_name(command)} of length 0")
        if (offset | length) % self.block_bytes:
            return Refusal(
                Errno.EINVAL,
                f"{_name(command)} at {offset} of {length} bytes is not aligned to"
                f" {self.block_bytes}",
            )
        if offset + length > self.size_bytes:
            return Refusal(
                Errno.ENOSPC if command in (_WRITE, Cmd.WRITE_ZEROES) else Errno.EINVAL,
                f"{_name(command)} at {offset} of {length} bytes is beyond the end,"
                f" {self.size_bytes}",
            )
        if length > MAX_REQUEST_BYTES and command in (_READ, _WRITE):
            return Refusal(
                Errno.EOVERFLOW if flags & _DF else Errno.EINVAL,
                f"{_name(command)} of {length} bytes is larger than {MAX_REQUEST_BYTES}",
            )
        return None


def _name(command: int) -> str:
    return Cmd(command).name


def wire_error(error: OSError, flags: int) -> Errno:
    """The number that stands for a device's error; ENOTSUP is defined for FAST_ZERO only."""
    if error.errno == errno.EOPNOTSUPP:
        return Errno.ENOTSUP if flags & CmdFlag.FAST_ZERO else Errno.EINVAL
    return _WIRE_ERRORS.get(error.errno, Errno.EIO)


def descriptors(
    pieces: Iterable[tuple[int, int]], length_bytes: int, req_one: bool
) -> list[tuple[int, int]]:
    """Allocation as it may be reported: neighbours of one kind merged, cut to the request's length,
    at most MAX_DESCRIPTORS.  A device that knows nothing has data everywhere."""
    limit = 1 if req_one else MAX_DESCRIPTORS
    merged: list[tuple[int, int]] = []
    left = length_bytes
    for piece_bytes, flags in pieces:
        taken = min(piece_bytes, left)
        if taken <= 0:
            continue
        if merged and merged[-1][1] == flags:
            merged[-1] = (merged[-1][0] + taken, flags)
        elif len(merged) == limit:
            break
        else:
            merged.append((taken, flags))
        left -= taken
    return merged or [(length_bytes, 0)]


class Replies:
    """Builds replies of the kind that was negotiated."""

    __slots__ = ("_structured",)

    def __init__(self, structured: bool) -> None:
        self._structured = structured

    def success(self, handle: int) -> bytes:
        """The whole answer to anything that returns no data."""
        if self._structured:
            return STRUCTURED_REPLY.pack(STRUCTURED_REPLY_MAGIC, _DONE, _NONE, handle, 0)
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, handle)

    def read_header(self, handle: int, offset_bytes: int, length_bytes: int) -> bytes:
        """What precedes the data of a READ."""
        if self._structured:
            return STRUCTURED_REPLY.pack(
                STRUCTURED_REPLY_MAGIC,
                _DONE,
                _DATA,
                handle,
                OFFSET_DATA.size + length_bytes,
            ) + OFFSET_DATA.pack(offset_bytes)
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, handle)

    def failure(self, handle: int, error: Errno, message: str) -> bytes:
        if not self._structured:
            return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, handle)
        text = message.encode()[:MAX_MESSAGE_BYTES].decode(errors="ignore").encode()
        return b"".join(
            (
                STRUCTURED_REPLY.pack(
                    STRUCTURED_REPLY_MAGIC,
                    _DONE,
                    Chunk.ERROR,
                    handle,
                    ERROR_CHUNK.size + len(text),
                ),
                ERROR_CHUNK.pack(error, len(text)),
                text,
            )
        )

    def block_status(self, handle: int, found: list[tuple[int, int]]) -> bytes:
        """Only for clients that negotiated base:allocation, and so structured replies."""
        payload = CONTEXT_ID.pack(BASE_ALLOCATION_ID) + b"".join(
            BLOCK_DESCRIPTOR.pack(*piece) for piece in found
        )
        head = STRUCTURED_REPLY.pack(
            STRUCTURED_REPLY_MAGIC, _DONE, Chunk.BLOCK_STATUS, handle, len(payload)
        )
        return head + payload
