"""The client's side of the NBD handshake (pure: bytes in, bytes and a state out).

Whoever owns the socket sends `data_to_send()`, feeds `receive(data)`, and acts on `state`:

    GREETING -> OPTION -> DONE               STRUCTURED_REPLY, SET_META_CONTEXT, GO
                OPTION -> TLS -> OPTION      STARTTLS comes first where TLS is wanted;
                                             `tls_started` ends the state TLS
    GREETING | OPTION -> EXPORT_NAME -> DONE a server that knows no GO

1. Whatever bytes arrive, in whatever pieces, `receive` returns or raises `ProtocolError`; output,
   state and error do not depend on how the bytes were cut.
2. Where TLS is wanted nothing but STARTTLS is said in clear text, and a server that refuses it is
   not used.  A byte that arrives between its answer and TLS is an error: it may be injected.
3. Structured replies and base:allocation are taken where the server has them; their lack is no
   error.  Oldstyle servers are refused: they ignore the name of the export, so the wrong one could
   be overwritten.
4. At most one option reply of MAX_REPLY_BYTES is held, and a server gets MAX_REPLIES of them for
   the whole handshake.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

from bitmapd.nbd.numbers import (
    MAX_REQUEST_BYTES,
    NBD_MAGIC,
    OPTS_MAGIC,
    REP_MAGIC,
    ExportFlag,
    HandshakeFlag,
    Info,
    Opt,
    Rep,
)
from bitmapd.nbd.wire import (
    CLIENT_FLAGS,
    CONTEXT_ID,
    EXPORT_NAME_REPLY,
    EXPORT_NAME_ZEROES,
    GREETING,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    OPTION,
    OPTION_REPLY,
    ProtocolError,
)
from bitmapd.net.uri import MAX_STRING_BYTES

MAX_REPLY_BYTES = 2 * MAX_STRING_BYTES
MAX_REPLIES = 256
MAX_MINIMUM_BLOCK_BYTES = 64 << 10
SECTOR_BYTES = 512
OLDSTYLE_MAGIC = 0x00420281861253

_BASE_ALLOCATION = b"base:allocation"
_ERROR_BIT = 1 << 31
_INFO_KIND = struct.Struct(">H")
_GO_TAIL = struct.Struct(">HH")  # number of informations asked for, the one: Info.BLOCK_SIZE
_QUERY_COUNT = struct.Struct(">I")
_LENGTH = struct.Struct(">I")


class Refused(ProtocolError):
    """The server keeps to the protocol but cannot be used; `number` is the errno to report."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


class ClientState(Enum):
    GREETING = auto()
    OPTION = auto()
    TLS = auto()
    EXPORT_NAME = auto()
    DONE = auto()


@dataclass(frozen=True, slots=True)
class ServerExport:
    """What the server said of the export; `allocation_id` is the id of base:allocation, if any.

    Without NBD_INFO_BLOCK_SIZE the protocol's defaults hold: any alignment, 32 MiB at most.
    """

    size_bytes: int
    flags: int
    structured: bool = False
    allocation_id: int | None = None
    minimum_bytes: int = 1
    maximum_bytes: int = MAX_REQUEST_BYTES

    def has(self, flag: ExportFlag) -> bool:
        return bool(self.flags & flag)


def check_secondary(export: ServerExport) -> None:
    """Raise `Refused` for an export that cannot hold a durable copy."""
    if export.has(ExportFlag.READ_ONLY):
        raise Refused(errno.EROFS, "the export is read-only")
    if not export.has(ExportFlag.SEND_FLUSH):
        raise Refused(
            errno.EOPNOTSUPP,
            "the export offers no flush, so nothing written to it would be known to be durable",
        )
    if export.maximum_bytes < SECTOR_BYTES:
        raise Refused(
            errno.EOPNOTSUPP, f"the server takes requests of {export.maximum_bytes} bytes at most"
        )


@dataclass(slots=True)
class ClientHandshake:
    """See the module docstring."""

    export_name: str
    tls: bool = False
    state: ClientState = ClientState.GREETING
    export: ServerExport | None = None
    _received: bytearray = field(default_factory=bytearray)
    _output: bytearray = field(default_factory=bytearray)
    _option: Opt = Opt.GO
    _replies: int = 0
    _no_zeroes: bool = False
    _structured: bool = False
    _allocation_id: int | None = None
    _size_and_flags: tuple[int, int] | None = None
    _minimum_bytes: int = 1
    _maximum_bytes: int = MAX_REQUEST_BYTES

    def data_to_send(self) -> bytes:
        data = bytes(self._output)
        self._output.clear()
        return data

    def receive(self, data: bytes | memoryview) -> None:
        """Take in bytes of the server.  Raises ProtocolError when it has to be left."""
        self._received += data
        while _STEPS[self.state](self):
            pass

    def tls_started(self) -> None:
        """The TLS handshake has succeeded; option haggling begins."""
        if self.state is not ClientState.TLS:
            raise RuntimeError(f"TLS cannot start in {self.state.name}")
        self.state = ClientState.OPTION
        self._send_option(Opt.STRUCTURED_REPLY)

    # -- steps: each takes one message from what was received, or returns False ------------
    def _step_greeting(self) -> bool:
        if len(self._received) < GREETING.size:
            return False
        magic, style, flags = GREETING.unpack(self._consume(GREETING.size))
        if magic != NBD_MAGIC:
            raise ProtocolError(f"it is not an NBD server: it began with {magic:#x}")
        if style == OLDSTYLE_MAGIC:
            raise Refused(errno.EPROTO, "the server speaks oldstyle NBD, which has no export names")
        if style != OPTS_MAGIC:
            raise ProtocolError(f"greeting magic {style:#x} is wrong")
        self._no_zeroes = bool(flags & HandshakeFlag.NO_ZEROES)
        known = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        self._output += CLIENT_FLAGS.pack(flags & known)
        if flags & HandshakeFlag.FIXED_NEWSTYLE:
            self.state = ClientState.OPTION
            self._send_option(Opt.STARTTLS if self.tls else Opt.STRUCTURED_REPLY)
        elif self.tls:
            raise Refused(errno.EPROTO, "TLS is required, and the server is too old to have it")
        else:
            self._send_export_name()
        return True

    def _step_option(self) -> bool:
        if len(self._received) < OPTION_REPLY.size:
            return False
        magic, option, reply, length = OPTION_REPLY.unpack_from(self._received)
        if magic != REP_MAGIC:
            raise ProtocolError(f"option reply magic {magic:#x} is wrong")
        if option != self._option:
            raise ProtocolError(f"option {option} was answered, {self._option} was asked")
        if length > MAX_REPLY_BYTES:
            raise ProtocolError(f"option reply of {length} bytes")
        if len(self._received) < OPTION_REPLY.size + length:
            return False
        self._replies += 1
        if self._replies > MAX_REPLIES:
            raise ProtocolError(f"more than {MAX_REPLIES} option replies")
        self._consume(OPTION_REPLY.size)
        _OPTIONS[self._option](self, reply, self._consume(length))
        return True

    def _step_tls(self) -> bool:
        if self._received:
            raise ProtocolError("bytes arrived between STARTTLS and TLS")
        return False

    def _step_export_name(self) -> bool:
        size = EXPORT_NAME_REPLY.size + (0 if self._no_zeroes else len(EXPORT_NAME_ZEROES))
        if len(self._received) < size:
            return False
        self._size_and_flags = EXPORT_NAME_REPLY.unpack_from(self._consume(size))
        # This way in does not confirm the export that the context was asked for.
        self._allocation_id = None
        self._enter()
        return True

    def _step_done(self) -> bool:
        if self._received:
            raise ProtocolError("bytes arrived before anything was requested")
        return False

    # -- answers to the option that was sent ----------------------------------------------
    def _on_starttls(self, reply: int, data: bytes) -> None:
        if reply != Rep.ACK:
            raise Refused(
                errno.EPROTO, f"TLS is required, but the server refused it: {_reason(reply, data)}"
            )
        self.state = ClientState.TLS

    def _on_structured_reply(self, reply: int, data: bytes) -> None:
        if reply == Rep.ACK:
            self._structured = True
            query = _LENGTH.pack(len(_BASE_ALLOCATION)) + _BASE_ALLOCATION
            self._send_option(Opt.SET_META_CONTEXT, self._name() + _QUERY_COUNT.pack(1) + query)
        elif reply & _ERROR_BIT:
            self._send_go()
        else:
            raise ProtocolError(_unexpected(reply, "STRUCTURED_REPLY"))

    def _on_meta_context(self, reply: int, data: bytes) -> None:
        if reply == Rep.META_CONTEXT:
            if data[CONTEXT_ID.size :] != _BASE_ALLOCATION:
                raise ProtocolError("a metadata context was selected that was not asked for")
            (self._allocation_id,) = CONTEXT_ID.unpack_from(data)
        elif reply == Rep.ACK or reply & _ERROR_BIT:
            self._send_go()
        else:
            raise ProtocolError(_unexpected(reply, "SET_META_CONTEXT"))

    def _on_go(self, reply: int, data: bytes) -> None:
        if reply == Rep.INFO:
            self._take_info(data)
        elif reply == Rep.ACK:
            self._enter()
        elif reply == Rep.ERR_UNSUP:
            self._send_export_name()
        elif reply & _ERROR_BIT:
            raise Refused(*_go_refusal(reply, data, self.export_name))
        else:
            raise ProtocolError(_unexpected(reply, "GO"))

    def _take_info(self, data: bytes) -> None:
        if len(data) < _INFO_KIND.size:
            raise ProtocolError("information without a kind")
        (kind,) = _INFO_KIND.unpack_from(data)
        if kind == Info.EXPORT:
            if len(data) != INFO_EXPORT.size:
                raise ProtocolError(f"information about the export of {len(data)} bytes")
            _, size, flags = INFO_EXPORT.unpack(data)
            self._size_and_flags = (size, flags)
        elif kind == Info.BLOCK_SIZE:
            if len(data) != INFO_BLOCK_SIZE.size:
                raise ProtocolError(f"information about block sizes of {len(data)} bytes")
            _, minimum, preferred, maximum = INFO_BLOCK_SIZE.unpack(data)
            # The preferred size is not used, so whatever it says does no harm.
            if not 0 < minimum <= MAX_MINIMUM_BLOCK_BYTES or minimum & (minimum - 1):
                raise ProtocolError(f"minimum block size {minimum} is not a power of two")
            if maximum < minimum:
                raise ProtocolError(f"block sizes {minimum}, {preferred}, {maximum} do not fit")
            self._minimum_bytes = minimum
            self._maximum_bytes = min(maximum, MAX_REQUEST_BYTES) & -minimum

    def _enter(self) -> None:
        if self._size_and_flags is None:
            raise ProtocolError("the server let us in without telling the size of the export")
        size, flags = self._size_and_flags
        if not flags & ExportFlag.HAS_FLAGS:
            raise ProtocolError(f"export flags {flags:#x} lack HAS_FLAGS")
        if size >= 1 << 63:
            raise ProtocolError(f"the export's size {size} is not possible")
        self.export = ServerExport(
            size,
            flags,
            self._structured,
            self._allocation_id,
            self._minimum_bytes,
            self._maximum_bytes,
        )
        self.state = ClientState.DONE

    # -- what is sent ---------------------------------------------------------------------
    def _name(self) -> bytes:
        raw = self.export_name.encode()
        return _LENGTH.pack(len(raw)) + raw

    def _send_option(self, option: Opt, data: bytes = b"") -> None:
        self._option = option
        self._output += OPTION.pack(OPTS_MAGIC, option, len(data)) + data

    def _send_go(self) -> None:
        self._send_option(Opt.GO, self._name() + _GO_TAIL.pack(1, Info.BLOCK_SIZE))

    def _send_export_name(self) -> None:
        self._send_option(Opt.EXPORT_NAME, self.export_name.encode())
        self.state = ClientState.EXPORT_NAME

    def _consume(self, length: int) -> bytes:
        data = bytes(self._received[:length])
        del self._received[:length]
        return data


def printable(raw: bytes) -> str:
    """A text of the server, made safe for a log line."""
    text = raw[:256].decode(errors="replace")
    return "".join(c if c.isprintable() else "?" for c in text)


def _reason(reply: int, data: bytes) -> str:
    try:
        name = Rep(reply).name
    except ValueError:
        name = f"reply {reply:#x}"
    return f"{name} ({printable(data)})" if data else name


def _unexpected(reply: int, option: str) -> str:
    return f"{option} was answered with {_reason(reply, b'')}"


def _go_refusal(reply: int, data: bytes, name: str) -> tuple[int, str]:
    reason = _reason(reply, data)
    if reply == Rep.ERR_UNKNOWN:
        return errno.ENOENT, f"the server has no export {name!r}: {reason}"
    if reply == Rep.ERR_TLS_REQD:
        return errno.EACCES, f"the server requires TLS, use nbds: {reason}"
    if reply == Rep.ERR_SHUTDOWN:
        return errno.ESHUTDOWN, f"the server is shutting down: {reason}"
    return errno.EACCES, f"the server refused export {name!r}: {reason}"


_STEPS: dict[ClientState, Callable[[ClientHandshake], bool]] = {
    ClientState.GREETING: ClientHandshake._step_greeting,
    ClientState.OPTION: ClientHandshake._step_option,
    ClientState.TLS: ClientHandshake._step_tls,
    ClientState.EXPORT_NAME: ClientHandshake._step_export_name,
    ClientState.DONE: ClientHandshake._step_done,
}

_OPTIONS: dict[int, Callable[[ClientHandshake, int, bytes], None]] = {
    Opt.STARTTLS: ClientHandshake._on_starttls,
    Opt.STRUCTURED_REPLY: ClientHandshake._on_structured_reply,
    Opt.SET_META_CONTEXT: ClientHandshake._on_meta_context,
    Opt.GO: ClientHandshake._on_go,
}
