"""The server's side of the NBD handshake (pure: bytes in, bytes and a state out).

`ServerHandshake` speaks fixed newstyle with NO_ZEROES.  Whoever owns the socket sends
`data_to_send()`, feeds `receive(data)`, and acts on `state`:

    CLIENT_FLAGS -> OPTIONS -> ADMISSION -> DONE      EXPORT_NAME or GO for an export that exists
                    OPTIONS -> TLS -> OPTIONS         STARTTLS; `tls_started` ends the state TLS
                    OPTIONS -> CLOSED                 ABORT

1. Whatever bytes arrive, in whatever pieces, `receive` returns or raises `ProtocolError`; the
   output, the state and the error do not depend on how the bytes were cut.
2. Nothing is negotiated outside TLS when TLS is required: every option but STARTTLS and ABORT is
   refused, and EXPORT_NAME, which has no error reply, drops the connection.
3. What was negotiated before STARTTLS is forgotten, and a byte that arrives between STARTTLS and
   the start of TLS drops the connection: it may have been injected.
4. The reply that lets a client in is withheld in ADMISSION until `admit` is called; the bytes of
   the first requests may be waiting behind it (`leftover`).
5. Lengths are checked before anything is kept: at most one option header and MAX_OPTION_BYTES are
   held.  Longer data are skipped up to MAX_SKIPPED_BYTES, beyond that the connection is dropped.
"""

from __future__ import annotations

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

MAX_OPTIONS = 64
MAX_OPTION_BYTES = 8 << 10
MAX_SKIPPED_BYTES = 64 << 10
BASE_ALLOCATION = "base:allocation"
BASE_ALLOCATION_ID = 1

_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")


class HandshakeState(Enum):
    CLIENT_FLAGS = auto()
    OPTIONS = auto()
    TLS = auto()
    ADMISSION = auto()
    DONE = auto()
    CLOSED = auto()


class TlsMode(Enum):
    OFF = auto()
    REQUIRED = auto()


@dataclass(frozen=True, slots=True)
class ServerOffer:
    """The one export and its properties; sizes in bytes."""

    name: str
    description: str
    size_bytes: int
    block_bytes: int
    read_only: bool = False

    def flags(self, structured: bool) -> int:
        flags = (
            ExportFlag.HAS_FLAGS
            | ExportFlag.SEND_FLUSH
            | ExportFlag.SEND_FUA
            | ExportFlag.CAN_MULTI_CONN
            | ExportFlag.SEND_CACHE
        )
        if self.read_only:
            flags |= ExportFlag.READ_ONLY
        else:
            flags |= ExportFlag.SEND_TRIM | ExportFlag.SEND_WRITE_ZEROES | ExportFlag.SEND_FAST_ZERO
        if structured:
            flags |= ExportFlag.SEND_DF
        return int(flags)

    def is_named(self, name: str) -> bool:
        return name in ("", self.name)


@dataclass(frozen=True, slots=True)
class ServerSession:
    """What a client that was let in has negotiated."""

    structured: bool
    block_status: bool


class _Malformed(Exception):
    """Option data that do not follow the protocol; answered with ERR_INVALID."""


@dataclass(slots=True)
class _Fields:
    """Reads the fields of option data in order."""

    data: bytes
    at: int = 0

    def take(self, length: int) -> bytes:
        stop = self.at + length
        if stop > len(self.data):
            raise _Malformed(f"{len(self.data)} bytes of data are too few")
        piece = self.data[self.at : stop]
        self.at = stop
        return piece

    def u16(self) -> int:
        return int(_U16.unpack(self.take(2))[0])

    def u32(self) -> int:
        return int(_U32.unpack(self.take(4))[0])

    def string(self) -> str:
        return _text(self.take(self.u32()))

    def end(self) -> None:
        if self.at != len(self.data):
            raise _Malformed(f"{len(self.data) - self.at} bytes of data are too many")


def _text(raw: bytes) -> str:
    if len(raw) > MAX_STRING_BYTES:
        raise _Malformed(f"a string of {len(raw)} bytes is longer than {MAX_STRING_BYTES}")
    if 0 in raw:
        raise _Malformed("a string contains NUL")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _Malformed("a string is not UTF-8") from error


@dataclass(slots=True)
class _Negotiated:
    """What STARTTLS makes the server forget."""

    structured: bool = False
    contexts: bool = False


@dataclass(slots=True)
class ServerHandshake:
    """See the module docstring."""

    offer: ServerOffer
    tls: TlsMode = TlsMode.OFF
    state: HandshakeState = HandshakeState.CLIENT_FLAGS
    encrypted: bool = False
    _received: bytearray = field(default_factory=bytearray)
    _output: bytearray = field(default_factory=bytearray)
    _client_flags: int = 0
    _options: int = 0
    _skip_bytes: int = 0
    _refused: tuple[int, Rep, str] | None = None
    _negotiated: _Negotiated = field(default_factory=_Negotiated)
    _admission: bytes = b""

    def __post_init__(self) -> None:
        flags = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        self._output += GREETING.pack(NBD_MAGIC, OPTS_MAGIC, flags)

    @property
    def session(self) -> ServerSession:
        """What counts once the client has been let in."""
        return ServerSession(self._negotiated.structured, self._negotiated.contexts)

    def data_to_send(self) -> bytes:
        data = bytes(self._output)
        self._output.clear()
        return data

    def receive(self, data: bytes | memoryview) -> None:
        """Take in bytes of the client.  Raises ProtocolError when it has to be dropped."""
        self._received += data
        while _STEPS[self.state](self):
            pass

    def tls_started(self) -> None:
        """The TLS handshake has succeeded; option haggling begins anew."""
        if self.state is not HandshakeState.TLS:
            raise RuntimeError(f"TLS cannot start in {self.state.name}")
        self.encrypted = True
        self.state = HandshakeState.OPTIONS

    def admit(self) -> None:
        """Let the client in: the reply that was withheld becomes data to send."""
        if self.state is not HandshakeState.ADMISSION:
            raise RuntimeError(f"a client cannot be let in in {self.state.name}")
        self._output += self._admission
        self.state = HandshakeState.DONE

    def leftover(self) -> bytes:
        """Bytes of the client that came after the end of the handshake; they are handed over."""
        data = bytes(self._received)
        self._received.clear()
        return data

    # -- steps: each takes one message from what was received, or returns False ------------
    def _step_client_flags(self) -> bool:
        if len(self._received) < CLIENT_FLAGS.size:
            return False
        (flags,) = CLIENT_FLAGS.unpack(self._consume(CLIENT_FLAGS.size))
        if flags & ~int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES):
            raise ProtocolError(f"client flags {flags:#x} were not offered")
        self._client_flags = flags
        self.state = HandshakeState.OPTIONS
        return True

    def _step_options(self) -> bool:
        if self._skip_bytes:
            skipped = min(self._skip_bytes, len(self._received))
            del self._received[:skipped]
            self._skip_bytes -= skipped
            if self._skip_bytes:
                return False
        if self._refused is not None:
            self._reply(*self._refused)
            self._refused = None
        if len(self._received) < OPTION.size:
            return False
        magic, option, length = OPTION.unpack_from(self._received)
        if magic != OPTS_MAGIC:
            raise ProtocolError(f"option magic {magic:#x} is wrong")
        closed_room = self.tls is TlsMode.REQUIRED and not self.encrypted
        if length > MAX_OPTION_BYTES:
            self._begin_skipping(option, length, closed_room)
            return True
        if len(self._received) < OPTION.size + length:
            return False
        self._count_option(option)
        self._consume(OPTION.size)
        data = self._consume(length)
        if closed_room and option not in (Opt.STARTTLS, Opt.ABORT):
            if option == Opt.EXPORT_NAME:
                raise ProtocolError("an export was asked for without TLS")
            self._reply(option, Rep.ERR_TLS_REQD, "this server requires TLS")
            return True
        handler = _OPTIONS.get(option)
        if handler is None:
            self._reply(option, Rep.ERR_UNSUP, f"option {option} is not supported")
            return True
        try:
            handler(self, option, data)
        except _Malformed as error:
            self._reply(option, Rep.ERR_INVALID, str(error))
        return True

    def _step_tls(self) -> bool:
        if self._received:
            raise ProtocolError("bytes arrived between STARTTLS and TLS")
        return False

    def _step_none(self) -> bool:
        return False

    def _step_closed(self) -> bool:
        self._received.clear()
        return False

    def _consume(self, length: int) -> bytes:
        data = bytes(self._received[:length])
        del self._received[:length]
        return data

    def _count_option(self, option: int) -> None:
        self._options += 1
        if self._options > MAX_OPTIONS:
            raise ProtocolError(f"more than {MAX_OPTIONS} options in one handshake")
        if not self._client_flags & HandshakeFlag.FIXED_NEWSTYLE and option != Opt.EXPORT_NAME:
            raise ProtocolError(f"option {option} from a client without fixed newstyle")

    def _begin_skipping(self, option: int, length: int, closed_room: bool) -> None:
        if length > MAX_SKIPPED_BYTES or option == Opt.EXPORT_NAME:
            raise ProtocolError(f"option {option} with {length} bytes of data")
        self._count_option(option)
        self._consume(OPTION.size)
        self._skip_bytes = length
        if closed_room:
            self._refused = (option, Rep.ERR_TLS_REQD, "this server requires TLS")
        else:
            text = f"{length} bytes of data are more than {MAX_OPTION_BYTES}"
            self._refused = (option, Rep.ERR_TOO_BIG, text)

    # -- options --------------------------------------------------------------------------
    def _option_export_name(self, _option: int, data: bytes) -> None:
        try:
            name = _text(data)
        except _Malformed as error:
            raise ProtocolError(f"EXPORT_NAME: {error}") from error
        if not self.offer.is_named(name):
            raise ProtocolError(f"there is no export {name!r}")
        # Metadata contexts belong to GO: this way of entering cannot confirm the export's name.
        self._negotiated.contexts = False
        self._admission = EXPORT_NAME_REPLY.pack(
            self.offer.size_bytes, self.offer.flags(self._negotiated.structured)
        )
        if not self._client_flags & HandshakeFlag.NO_ZEROES:
            self._admission += EXPORT_NAME_ZEROES
        self.state = HandshakeState.ADMISSION

    def _option_abort(self, option: int, _data: bytes) -> None:
        self._reply(option, Rep.ACK)
        self.state = HandshakeState.CLOSED

    def _option_list(self, option: int, data: bytes) -> None:
        _Fields(data).end()
        name = self.offer.name.encode()
        self._reply(option, Rep.SERVER, _U32.pack(len(name)) + name)
        self._reply(option, Rep.ACK)

    def _option_starttls(self, option: int, data: bytes) -> None:
        _Fields(data).end()
        if self.tls is TlsMode.OFF:
            self._reply(option, Rep.ERR_POLICY, "TLS is not configured")
        elif self.encrypted:
            raise _Malformed("TLS is in use already")
        else:
            self._reply(option, Rep.ACK)
            self._negotiated = _Negotiated()
            self.state = HandshakeState.TLS

    def _option_info(self, option: int, data: bytes) -> None:
        fields = _Fields(data)
        name = fields.string()
        wanted = {fields.u16() for _ in range(fields.u16())}
        fields.end()
        if not self._known(option, name):
            return
        offer = self.offer
        replies = [
            INFO_EXPORT.pack(
                Info.EXPORT, offer.size_bytes, offer.flags(self._negotiated.structured)
            ),
            INFO_BLOCK_SIZE.pack(
                Info.BLOCK_SIZE,
                offer.block_bytes,
                max(4096, offer.block_bytes),
                MAX_REQUEST_BYTES,
            ),
        ]
        for info, text in ((Info.NAME, offer.name), (Info.DESCRIPTION, offer.description)):
            if info in wanted:
                replies.append(_U16.pack(info) + text.encode())
        if option == Opt.INFO:
            for reply in replies:
                self._reply(option, Rep.INFO, reply)
            self._reply(option, Rep.ACK)
            return
        self._admission = b"".join(_option_reply(option, Rep.INFO, reply) for reply in replies)
        self._admission += _option_reply(option, Rep.ACK)
        self.state = HandshakeState.ADMISSION

    def _option_structured_reply(self, option: int, data: bytes) -> None:
        _Fields(data).end()
        self._negotiated.structured = True
        self._reply(option, Rep.ACK)

    def _option_meta_context(self, option: int, data: bytes) -> None:
        setting = option == Opt.SET_META_CONTEXT
        if setting:
            # A failed or later request replaces what an earlier one has selected.
            self._negotiated.contexts = False
        if not self._negotiated.structured:
            raise _Malformed("structured replies have to be negotiated first")
        fields = _Fields(data)
        name = fields.string()
        # One by one, so that a count that does not fit the data costs nothing.
        queries = [fields.string() for _ in range(fields.u32())]
        fields.end()
        if not self._known(option, name):
            return
        if setting:
            chosen = BASE_ALLOCATION in queries
            self._negotiated.contexts = chosen
        else:
            chosen = not queries or "base:" in queries or BASE_ALLOCATION in queries
        if chosen:
            context = CONTEXT_ID.pack(BASE_ALLOCATION_ID) + BASE_ALLOCATION.encode()
            self._reply(option, Rep.META_CONTEXT, context)
        self._reply(option, Rep.ACK)

    def _known(self, option: int, name: str) -> bool:
        if self.offer.is_named(name):
            return True
        self._reply(option, Rep.ERR_UNKNOWN, "there is no export of that name")
        return False

    def _reply(self, option: int, reply: Rep, data: bytes | str = b"") -> None:
        self._output += _option_reply(option, reply, data)


def _option_reply(option: int, reply: Rep, data: bytes | str = b"") -> bytes:
    raw = data.encode() if isinstance(data, str) else data
    return OPTION_REPLY.pack(REP_MAGIC, option, reply, len(raw)) + raw


_STEPS: dict[HandshakeState, Callable[[ServerHandshake], bool]] = {
    HandshakeState.CLIENT_FLAGS: ServerHandshake._step_client_flags,
    HandshakeState.OPTIONS: ServerHandshake._step_options,
    HandshakeState.TLS: ServerHandshake._step_tls,
    HandshakeState.ADMISSION: ServerHandshake._step_none,
    HandshakeState.DONE: ServerHandshake._step_none,
    HandshakeState.CLOSED: ServerHandshake._step_closed,
}

_OPTIONS: dict[int, Callable[[ServerHandshake, int, bytes], None]] = {
    Opt.EXPORT_NAME: ServerHandshake._option_export_name,
    Opt.ABORT: ServerHandshake._option_abort,
    Opt.LIST: ServerHandshake._option_list,
    Opt.STARTTLS: ServerHandshake._option_starttls,
    Opt.INFO: ServerHandshake._option_info,
    Opt.GO: ServerHandshake._option_info,
    Opt.STRUCTURED_REPLY: ServerHandshake._option_structured_reply,
    Opt.LIST_META_CONTEXT: ServerHandshake._option_meta_context,
    Opt.SET_META_CONTEXT: ServerHandshake._option_meta_context,
}
