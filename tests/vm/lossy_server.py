"""An NBD server for qemu that shows a `LossyStore` as a disk.

One request at a time, in the order they come: when a flush is taken up, every write sent before it
was answered.  An own server, not the product's: this is what the product is measured by.
"""

from __future__ import annotations

import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from bitmapd.nbd.numbers import (
    NBD_MAGIC,
    OPTS_MAGIC,
    REP_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    Cmd,
    CmdFlag,
    Errno,
    ExportFlag,
    HandshakeFlag,
    Info,
    Opt,
    Rep,
)
from bitmapd.nbd.wire import (
    CLIENT_FLAGS,
    GREETING,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    OPTION,
    OPTION_REPLY,
    REQUEST,
    SIMPLE_REPLY,
)

_MIB = 1 << 20


class Disconnected(Exception):
    """The client is gone."""


class Store(Protocol):
    """What the server needs; a test may put something between."""

    def read(self, offset: int, length: int) -> bytes: ...
    def write(self, offset: int, data: bytes, fua: bool = False) -> None: ...
    def zero(self, offset: int, length: int, fua: bool = False) -> None: ...
    def flush(self) -> None: ...


_FLAGS = (
    ExportFlag.HAS_FLAGS
    | ExportFlag.SEND_FLUSH
    | ExportFlag.SEND_FUA
    | ExportFlag.SEND_TRIM
    | ExportFlag.SEND_WRITE_ZEROES
)
_CHANGES = (Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES, Cmd.FLUSH)


@dataclass
class LossyServer:
    """Serves one store to one client at a time, on a thread of its own, until `close`.

    `freeze_after(n)` stops it dead after n more writes, trims or flushes: the next one is neither
    done nor answered, and `frozen` is set.  That is how a test cuts the power at an exact place.
    `idle()` waits until the client is gone and all it sent was taken in.
    """

    store: Store
    size_bytes: int
    sector_bytes: int
    path: Path
    frozen: threading.Event = field(default_factory=threading.Event)
    changes: int = 0
    """Writes, trims and flushes so far."""

    def __post_init__(self) -> None:
        self._freeze_at: int | None = None
        self._idle = threading.Event()
        self._idle.set()
        self._closing = False
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._connection: socket.socket | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"lossy {self.path}", daemon=True)
        self._thread.start()

    def freeze_after(self, changes: int) -> None:
        self._freeze_at = self.changes + changes

    def idle(self, timeout_s: float = 30) -> None:
        if not self._idle.wait(timeout_s):
            raise TimeoutError(f"the client of {self.path} is still connected")
        if self._error is not None:
            raise self._error

    def thaw(self) -> None:
        """For the next client."""
        self._freeze_at = None
        self.frozen.clear()

    def close(self) -> None:
        self._closing = True
        for end in (self._listener, self._connection):
            if end is not None:
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue
        self._thread.join()
        self._listener.close()
        self.path.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._closing:
            try:
                self._connection, _ = self._listener.accept()
            except OSError:
                return
            self._idle.clear()
            try:
                with self._connection as client:
                    session = _Session(client, self.size_bytes, self.sector_bytes)
                    if session.negotiate():
                        self._serve(session)
            except (Disconnected, ConnectionError):
                pass
            except BaseException as error:
                # Raised again in the test's thread.
                self._error = error
                raise
            finally:
                self._idle.set()

    def _serve(self, session: _Session) -> None:
        while True:
            flags, command, handle, offset, length = session.request()
            payload = session.take(length) if command == Cmd.WRITE else b""
            if command == Cmd.DISC:
                return
            if command in _CHANGES:
                if self.changes == self._freeze_at:
                    self.frozen.set()
                    session.swallow()
                    return
                self.changes += 1
            session.reply(handle, *self._do(flags, command, offset, length, payload))

    def _do(
        self, flags: int, command: int, offset: int, length: int, payload: bytes
    ) -> tuple[Errno, bytes]:
        fua = bool(flags & CmdFlag.FUA)
        if command != Cmd.FLUSH and offset + length > self.size_bytes:
            return Errno.ENOSPC if command == Cmd.WRITE else Errno.EINVAL, b""
        match command:
            case Cmd.READ:
                return Errno.OK, self.store.read(offset, length)
            case Cmd.WRITE:
                self.store.write(offset, payload, fua)
            case Cmd.TRIM | Cmd.WRITE_ZEROES:
                self.store.zero(offset, length, fua)
            case Cmd.FLUSH:
                self.store.flush()
            case _:
                return Errno.EINVAL, b""
        return Errno.OK, b""


class _Session:
    """One connection, the server's end."""

    def __init__(self, connection: socket.socket, size_bytes: int, sector_bytes: int) -> None:
        self._socket = connection
        self._size = size_bytes
        self._sector = sector_bytes

    def take(self, length: int) -> bytes:
        got = bytearray(length)
        view = memoryview(got)
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise Disconnected
            view = view[count:]
        return bytes(got)

    def swallow(self) -> None:
        """Reads until the client gives up."""
        while self._socket.recv(_MIB):
            pass

    def negotiate(self) -> bool:
        """Whether the client went on to the transmission phase."""
        flags = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        self._socket.sendall(GREETING.pack(NBD_MAGIC, OPTS_MAGIC, flags))
        self.take(CLIENT_FLAGS.size)
        while True:
            _, option, length = OPTION.unpack(self.take(OPTION.size))
            self.take(length)
            if option == Opt.ABORT:
                self._option(option, Rep.ACK)
                return False
            if option in (Opt.GO, Opt.INFO):
                blocks = (self._sector, max(4096, self._sector), 32 * _MIB)
                self._option(option, Rep.INFO, INFO_EXPORT.pack(Info.EXPORT, self._size, _FLAGS))
                self._option(option, Rep.INFO, INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *blocks))
                self._option(option, Rep.ACK)
                if option == Opt.GO:
                    return True
            else:
                self._option(option, Rep.ERR_UNSUP)

    def _option(self, option: int, kind: Rep, data: bytes = b"") -> None:
        self._socket.sendall(OPTION_REPLY.pack(REP_MAGIC, option, kind, len(data)) + data)

    def request(self) -> tuple[int, int, int, int, int]:
        """Flags, command, handle, offset and length."""
        magic, flags, command, handle, offset, length = REQUEST.unpack(self.take(REQUEST.size))
        if magic != REQUEST_MAGIC:
            raise ConnectionError(f"request with magic {magic:#x}")
        return flags, command, handle, offset, length

    def reply(self, handle: int, error: Errno, data: bytes = b"") -> None:
        self._socket.sendall(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, handle) + data)
