"""A plain NBD client over a unix socket, written without any code of the product.

It does what a careless host does: many requests in flight, no waiting for order.  Newstyle
handshake with EXPORT_NAME, simple replies only.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

READ, WRITE, DISC, FLUSH, TRIM, WRITE_ZEROES = 0, 1, 2, 3, 4, 6
FUA = 1 << 0

_GREETING = struct.Struct(">8s8sH")
_OPTION = struct.Struct(">8sII")
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_EXPORT = struct.Struct(">QH")
_FIXED_NO_ZEROES = 3


@dataclass(frozen=True, slots=True)
class Reply:
    handle: int
    error: int
    data: bytes


class RawNbd:
    """`submit` sends a request, `reply` waits for whichever answer comes next."""

    def __init__(self, path: Path, export: str = "", timeout_s: float = 60) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(timeout_s)
        self._sock.connect(str(path))
        self._lengths: dict[int, int] = {}
        self.next_handle = 1  # what the next `submit` will return
        magic, option_magic, flags = _GREETING.unpack(self._receive(_GREETING.size))
        if magic != b"NBDMAGIC" or option_magic != b"IHAVEOPT" or not flags & 1:
            raise ConnectionError(f"not a newstyle NBD server: {magic!r} {option_magic!r} {flags}")
        name = export.encode()
        self._sock.sendall(
            struct.pack(">I", _FIXED_NO_ZEROES) + _OPTION.pack(b"IHAVEOPT", 1, len(name)) + name
        )
        self.size_bytes, self.flags = _EXPORT.unpack(self._receive(_EXPORT.size))

    def __enter__(self) -> RawNbd:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._sock.close()

    @property
    def in_flight(self) -> int:
        return len(self._lengths)

    def submit(
        self, command: int, offset: int = 0, length: int = 0, payload: bytes = b"", flags: int = 0
    ) -> int:
        handle = self.next_handle
        self.next_handle += 1
        self._lengths[handle] = length if command == READ else 0
        self._sock.sendall(
            _REQUEST.pack(0x25609513, flags, command, handle, offset, length) + payload
        )
        return handle

    def reply(self) -> Reply:
        """The next answer; ConnectionError when the server is gone."""
        magic, error, handle = _REPLY.unpack(self._receive(_REPLY.size))
        if magic != 0x67446698 or handle not in self._lengths:
            raise ConnectionError(f"bad reply: magic {magic:#x}, handle {handle}")
        length = self._lengths.pop(handle)
        return Reply(handle, error, self._receive(length) if not error else b"")

    def call(
        self, command: int, offset: int = 0, length: int = 0, payload: bytes = b"", flags: int = 0
    ) -> bytes:
        """One request with nothing else in flight; OSError when the server refuses it."""
        self.submit(command, offset, length, payload, flags)
        answer = self.reply()
        if answer.error:
            raise OSError(answer.error, f"command {command} at {offset} length {length} failed")
        return answer.data

    def disconnect(self) -> None:
        """Tell the server that nothing more comes; needs nothing in flight."""
        self._sock.sendall(_REQUEST.pack(0x25609513, 0, DISC, 0, 0, 0))

    def _receive(self, length: int) -> bytes:
        parts = bytearray(length)
        view = memoryview(parts)
        while view:
            got = self._sock.recv_into(view)
            if not got:
                raise ConnectionError("the server closed the connection")
            view = view[got:]
        return bytes(parts)
