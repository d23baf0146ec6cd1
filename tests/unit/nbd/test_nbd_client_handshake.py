"""The client's handshake: every way through it, and every way a server can spoil it."""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bitmapd.nbd.client.handshake import (
    MAX_REPLIES,
    MAX_REPLY_BYTES,
    OLDSTYLE_MAGIC,
    ClientHandshake,
    ClientState,
    Refused,
    ServerExport,
    check_secondary,
    printable,
)
from bitmapd.nbd.numbers import NBD_MAGIC, OPTS_MAGIC, REP_MAGIC, ExportFlag, Info, Opt, Rep
from bitmapd.nbd.server.handshake import HandshakeState, ServerHandshake, ServerOffer, TlsMode
from bitmapd.nbd.wire import (
    CLIENT_FLAGS,
    EXPORT_NAME_REPLY,
    GREETING,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    OPTION,
    OPTION_REPLY,
    ProtocolError,
)

FLAGS = int(ExportFlag.HAS_FLAGS | ExportFlag.SEND_FLUSH | ExportFlag.SEND_FUA)
SIZE = 1 << 30
CONTEXT = struct.pack(">I", 7) + b"base:allocation"


def greeting(flags: int = 3, magic: int = NBD_MAGIC, style: int = OPTS_MAGIC) -> bytes:
    return GREETING.pack(magic, style, flags)


def rep(option: int, kind: int, data: bytes = b"", magic: int = REP_MAGIC) -> bytes:
    return OPTION_REPLY.pack(magic, option, kind, len(data)) + data


def info_export(size: int = SIZE, flags: int = FLAGS) -> bytes:
    return rep(Opt.GO, Rep.INFO, INFO_EXPORT.pack(Info.EXPORT, size, flags))


def info_blocks(minimum: int, preferred: int, maximum: int) -> bytes:
    data = INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, minimum, preferred, maximum)
    return rep(Opt.GO, Rep.INFO, data)


STRUCTURED = rep(Opt.STRUCTURED_REPLY, Rep.ACK)
NO_STRUCTURED = rep(Opt.STRUCTURED_REPLY, Rep.ERR_UNSUP)
META = rep(Opt.SET_META_CONTEXT, Rep.META_CONTEXT, CONTEXT) + rep(Opt.SET_META_CONTEXT, Rep.ACK)
GO_ACK = rep(Opt.GO, Rep.ACK)
PLAIN = greeting() + NO_STRUCTURED + info_export() + GO_ACK


def run(data: bytes, name: str = "", tls: bool = False) -> ClientHandshake:
    handshake = ClientHandshake(name, tls)
    handshake.receive(data)
    return handshake


def options_sent(raw: bytes) -> tuple[int, list[tuple[int, bytes]]]:
    """The client flags and the options of a client's output."""
    (flags,) = CLIENT_FLAGS.unpack_from(raw)
    at, options = CLIENT_FLAGS.size, []
    while at < len(raw):
        magic, option, length = OPTION.unpack_from(raw, at)
        assert magic == OPTS_MAGIC
        at += OPTION.size
        options.append((option, raw[at : at + length]))
        at += length
    assert at == len(raw)
    return flags, options


# -- the ways through ---------------------------------------------------------------------
def test_everything_is_negotiated_where_the_server_has_it() -> None:
    handshake = run(
        greeting()
        + STRUCTURED
        + META
        + info_export()
        + info_blocks(4096, 65536, 1 << 20)
        + rep(Opt.GO, Rep.INFO, struct.pack(">H", Info.NAME) + b"whatever")
        + GO_ACK,
        name="vol é",
    )
    assert handshake.state is ClientState.DONE
    assert handshake.export == ServerExport(SIZE, FLAGS, True, 7, 4096, 1 << 20)
    flags, options = options_sent(handshake.data_to_send())
    name = "vol é".encode()
    length = struct.pack(">I", len(name))
    assert flags == 3
    assert options == [
        (Opt.STRUCTURED_REPLY, b""),
        (
            Opt.SET_META_CONTEXT,
            length + name + struct.pack(">II", 1, 15) + b"base:allocation",
        ),
        (Opt.GO, length + name + struct.pack(">HH", 1, Info.BLOCK_SIZE)),
    ]
    assert handshake.data_to_send() == b""


def test_a_server_that_has_next_to_nothing() -> None:
    handshake = run(PLAIN)
    assert handshake.export == ServerExport(SIZE, FLAGS)
    assert [option for option, _ in options_sent(handshake.data_to_send())[1]] == [
        Opt.STRUCTURED_REPLY,
        Opt.GO,
    ]


@pytest.mark.parametrize("kind", [Rep.ERR_UNSUP, Rep.ERR_POLICY, Rep.ERR_INVALID, Rep.ACK])
def test_metadata_contexts_are_not_insisted_on(kind: Rep) -> None:
    handshake = run(
        greeting() + STRUCTURED + rep(Opt.SET_META_CONTEXT, kind) + info_export() + GO_ACK
    )
    assert handshake.export == ServerExport(SIZE, FLAGS, structured=True)


@pytest.mark.parametrize(
    ("server_flags", "tail"), [(3, b""), (1, bytes(124))], ids=["no zeroes", "124 zeroes"]
)
def test_without_go_the_old_way_in_is_taken(server_flags: int, tail: bytes) -> None:
    handshake = run(
        greeting(server_flags)
        + STRUCTURED
        + META
        + rep(Opt.GO, Rep.ERR_UNSUP)
        + EXPORT_NAME_REPLY.pack(SIZE, FLAGS)
        + tail,
        name="x",
    )
    assert handshake.export == ServerExport(SIZE, FLAGS, structured=True)
    flags, options = options_sent(handshake.data_to_send())
    assert flags == server_flags
    assert options[-1] == (Opt.EXPORT_NAME, b"x")


def test_a_server_without_fixed_newstyle_gets_the_name_at_once() -> None:
    handshake = run(greeting(0) + EXPORT_NAME_REPLY.pack(SIZE, FLAGS) + bytes(124), name="x")
    assert handshake.export == ServerExport(SIZE, FLAGS)
    assert options_sent(handshake.data_to_send()) == (0, [(Opt.EXPORT_NAME, b"x")])


def test_the_largest_block_is_cut_to_the_protocols_maximum_and_to_whole_blocks() -> None:
    blocks = info_blocks(4096, 4096, 0xFFFFFFFF)
    exported = run(greeting() + NO_STRUCTURED + info_export() + blocks + GO_ACK).export
    assert exported is not None
    assert exported.maximum_bytes == 32 << 20
    blocks = info_blocks(512, 4096, 1000)
    exported = run(greeting() + NO_STRUCTURED + info_export() + blocks + GO_ACK).export
    assert exported is not None
    assert exported.maximum_bytes == 512


def test_with_tls_nothing_is_said_before_it() -> None:
    handshake = run(greeting() + rep(Opt.STARTTLS, Rep.ACK), name="secret", tls=True)
    assert handshake.state is ClientState.TLS
    assert options_sent(handshake.data_to_send()) == (3, [(Opt.STARTTLS, b"")])
    handshake.tls_started()
    handshake.receive(STRUCTURED + META + info_export() + GO_ACK)
    assert handshake.state is ClientState.DONE
    assert b"secret" in handshake.data_to_send()


def test_tls_cannot_start_unasked() -> None:
    with pytest.raises(RuntimeError, match="GREETING"):
        ClientHandshake("", tls=True).tls_started()


@pytest.mark.parametrize("tls", [False, True])
def test_our_own_server_agrees(tls: bool) -> None:
    offer = ServerOffer("vol0", "a volume", SIZE, 4096)
    server = ServerHandshake(offer, TlsMode.REQUIRED if tls else TlsMode.OFF)
    client = ClientHandshake("vol0", tls)
    for _ in range(10):
        client.receive(server.data_to_send())
        server.receive(client.data_to_send())
        if client.state is ClientState.TLS and server.state is HandshakeState.TLS:
            server_ack = server.data_to_send()
            assert server_ack == b""
            server.tls_started()
            client.tls_started()
        if server.state is HandshakeState.ADMISSION:
            server.admit()
    assert client.export == ServerExport(SIZE, offer.flags(True), True, 1, 4096, 32 << 20)
    assert server.session.structured
    assert server.session.block_status


# -- servers that cannot be used ----------------------------------------------------------
@pytest.mark.parametrize(
    ("data", "tls", "number", "match"),
    [
        (greeting(style=OLDSTYLE_MAGIC), False, errno.EPROTO, "oldstyle"),
        (greeting(0), True, errno.EPROTO, "too old"),
        (
            greeting() + rep(Opt.STARTTLS, Rep.ERR_POLICY, b"no\ncert"),
            True,
            errno.EPROTO,
            r"refused it: ERR_POLICY \(no\?cert\)",
        ),
        (greeting() + rep(Opt.STARTTLS, Rep.INFO), True, errno.EPROTO, "refused it: INFO"),
        (
            greeting() + NO_STRUCTURED + rep(Opt.GO, Rep.ERR_UNKNOWN, b"nope"),
            False,
            errno.ENOENT,
            r"no export 'vol0': ERR_UNKNOWN \(nope\)",
        ),
        (
            greeting() + rep(Opt.STRUCTURED_REPLY, Rep.ERR_TLS_REQD) + rep(3 + 4, Rep.ERR_TLS_REQD),
            False,
            errno.EACCES,
            "requires TLS, use nbds",
        ),
        (
            greeting() + NO_STRUCTURED + rep(Opt.GO, Rep.ERR_SHUTDOWN),
            False,
            errno.ESHUTDOWN,
            "shutting down",
        ),
        (
            greeting() + NO_STRUCTURED + rep(Opt.GO, 0x80001234),
            False,
            errno.EACCES,
            "refused export 'vol0': reply 0x80001234",
        ),
    ],
)
def test_refusals_say_why(data: bytes, tls: bool, number: int, match: str) -> None:
    with pytest.raises(Refused, match=match) as caught:
        run(data, "vol0", tls)
    assert caught.value.number == number


@pytest.mark.parametrize(
    ("export", "number"),
    [
        (ServerExport(SIZE, FLAGS | ExportFlag.READ_ONLY), errno.EROFS),
        (ServerExport(SIZE, int(ExportFlag.HAS_FLAGS)), errno.EOPNOTSUPP),
        (ServerExport(SIZE, FLAGS, maximum_bytes=256), errno.EOPNOTSUPP),
    ],
)
def test_what_cannot_be_a_secondary(export: ServerExport, number: int) -> None:
    with pytest.raises(Refused) as caught:
        check_secondary(export)
    assert caught.value.number == number


def test_what_can_be_a_secondary() -> None:
    check_secondary(ServerExport(SIZE, FLAGS, maximum_bytes=512))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1", "not an NBD server"),
        (greeting(style=1), "greeting magic"),
        (greeting() + rep(8, 1, magic=5), "option reply magic 0x5"),
        (greeting() + rep(Opt.GO, 1), "option 7 was answered, 8 was asked"),
        (greeting() + OPTION_REPLY.pack(REP_MAGIC, 8, 1, MAX_REPLY_BYTES + 1), "8193 bytes"),
        (greeting() + rep(8, Rep.INFO), "STRUCTURED_REPLY was answered with INFO"),
        (greeting() + STRUCTURED + rep(10, Rep.SERVER), "SET_META_CONTEXT was answered with"),
        (greeting() + STRUCTURED + rep(10, Rep.META_CONTEXT, b"ab"), "not asked for"),
        (greeting() + STRUCTURED + rep(10, Rep.META_CONTEXT, b"1234base:x"), "not asked for"),
        (greeting() + NO_STRUCTURED + rep(7, Rep.SERVER), "GO was answered with SERVER"),
        (greeting() + NO_STRUCTURED + rep(7, 99), "GO was answered with reply 0x63"),
        (greeting() + NO_STRUCTURED + rep(7, Rep.INFO, b"x"), "without a kind"),
        (greeting() + NO_STRUCTURED + rep(7, Rep.INFO, bytes(5)), "export of 5 bytes"),
        (greeting() + NO_STRUCTURED + rep(7, Rep.INFO, b"\0\3abc"), "sizes of 5 bytes"),
        (greeting() + NO_STRUCTURED + info_blocks(0, 1, 1), "minimum block size 0"),
        (greeting() + NO_STRUCTURED + info_blocks(768, 4096, 1 << 20), "minimum block size 768"),
        (greeting() + NO_STRUCTURED + info_blocks(1 << 17, 1 << 17, 1 << 20), "131072"),
        (greeting() + NO_STRUCTURED + info_blocks(4096, 4096, 512), "4096, 4096, 512"),
        (greeting() + NO_STRUCTURED + GO_ACK, "without telling the size"),
        (greeting() + NO_STRUCTURED + info_export(flags=4) + GO_ACK, "lack HAS_FLAGS"),
        (greeting() + NO_STRUCTURED + info_export(1 << 63) + GO_ACK, "is not possible"),
        (PLAIN + b"x", "before anything was requested"),
        (greeting() + NO_STRUCTURED + info_export() * MAX_REPLIES, "more than 256"),
    ],
)
def test_violations_are_named(data: bytes, match: str) -> None:
    with pytest.raises(ProtocolError, match=match) as caught:
        run(data)
    assert not isinstance(caught.value, Refused)


def test_bytes_injected_before_tls_are_an_error() -> None:
    with pytest.raises(ProtocolError, match="between STARTTLS and TLS"):
        run(greeting() + rep(Opt.STARTTLS, Rep.ACK) + STRUCTURED, tls=True)
    handshake = run(greeting() + rep(Opt.STARTTLS, Rep.ACK), tls=True)
    with pytest.raises(ProtocolError, match="between STARTTLS and TLS"):
        handshake.receive(b"x")


def test_texts_of_a_server_cannot_forge_a_log_line() -> None:
    assert printable(b"ok\n\x1b[31m\xff") == "ok??[31m\N{REPLACEMENT CHARACTER}"
    assert len(printable(b"a" * 5000)) == 256


# -- properties ---------------------------------------------------------------------------
@dataclass(frozen=True)
class Outcome:
    state: ClientState
    export: ServerExport | None
    sent: bytes
    error: str | None


def outcome(pieces: list[bytes], tls: bool) -> Outcome:
    """What becomes of a server's bytes; TLS 'starts' as soon as it can."""
    handshake = ClientHandshake("vol0", tls)
    error = None
    try:
        for piece in pieces:
            handshake.receive(piece)
    except ProtocolError as caught:
        error = f"{type(caught).__name__}: {caught}"
    return Outcome(handshake.state, handshake.export, handshake.data_to_send(), error)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


_replies = st.one_of(
    st.sampled_from([STRUCTURED, NO_STRUCTURED, META, info_export(), GO_ACK]),
    st.builds(info_blocks, *(st.sampled_from([0, 1, 3, 512, 4096, 1 << 20, 0xFFFFFFFF]),) * 3),
    st.builds(
        rep,
        st.sampled_from([*Opt, 77]),
        st.sampled_from([*Rep, 0, 77]),
        st.binary(max_size=40),
    ),
    st.binary(max_size=30),
)
_transcripts = st.builds(
    lambda flags, parts, way: greeting(flags) + way + b"".join(parts),
    st.integers(0, 3),
    st.lists(_replies, max_size=6),
    st.sampled_from(
        [b"", STRUCTURED, NO_STRUCTURED, STRUCTURED + META, rep(Opt.STARTTLS, Rep.ACK)]
    ),
)


@given(_transcripts, st.lists(st.integers(0, 2000), max_size=8), st.booleans())
@example(greeting() + STRUCTURED + META + info_export() + GO_ACK, list(range(200)), False)
@example(PLAIN + b"x", [5, len(PLAIN)], False)
def test_how_bytes_are_cut_makes_no_difference(data: bytes, places: list[int], tls: bool) -> None:
    assert outcome([data], tls) == outcome(cut(data, places), tls)


@given(_transcripts, st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=4))
def test_hostile_bytes_give_a_protocol_error_or_nothing(
    data: bytes, changes: list[tuple[int, int]]
) -> None:
    spoiled = bytearray(data)
    for place, value in changes:
        spoiled[place % len(spoiled)] = value
    for tls in (False, True):
        result = outcome([bytes(spoiled)], tls)
        # Only a finished handshake has an export, and nothing is let in that is not usable as one.
        assert (result.export is not None) == (result.state is ClientState.DONE), (
            "an export without an end, or an end without an export"
        )
        if result.export is not None:
            assert 0 < result.export.minimum_bytes <= result.export.maximum_bytes <= 32 << 20
            assert result.export.maximum_bytes % result.export.minimum_bytes == 0
            assert not tls
