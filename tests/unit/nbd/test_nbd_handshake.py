"""The server's handshake: every option, every refusal, and any bytes in any pieces."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bitmapd.nbd.numbers import MAX_REQUEST_BYTES, ExportFlag, Info, Opt, Rep
from bitmapd.nbd.server.handshake import (
    BASE_ALLOCATION,
    MAX_OPTION_BYTES,
    MAX_OPTIONS,
    MAX_SKIPPED_BYTES,
    HandshakeState,
    ServerHandshake,
    ServerOffer,
    TlsMode,
)
from bitmapd.nbd.wire import GREETING, ProtocolError
from tests.support.machines import examples
from tests.support.nbdraw import (
    context_data,
    info_data,
    option,
    split_option_replies,
    string,
)

OFFER = ServerOffer("vol0", "über", 1 << 30, 512)
FLAGS = b"\0\0\0\3"


def started(offer: ServerOffer = OFFER, tls: TlsMode = TlsMode.OFF) -> ServerHandshake:
    handshake = ServerHandshake(offer, tls)
    assert handshake.data_to_send() == GREETING.pack(0x4E42444D41474943, 0x49484156454F5054, 3)
    handshake.receive(FLAGS)
    assert handshake.data_to_send() == b""
    return handshake


def ask(handshake: ServerHandshake, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
    handshake.receive(option(number, data))
    replies = split_option_replies(handshake.data_to_send())
    assert {asked for asked, _, _ in replies} <= {number}
    return [(reply, payload) for _, reply, payload in replies]


def kinds(replies: list[tuple[int, bytes]]) -> list[int]:
    return [reply for reply, _ in replies]


def test_go_is_answered_only_after_admission() -> None:
    handshake = started()
    assert ask(handshake, Opt.GO, info_data("vol0", Info.NAME, Info.DESCRIPTION)) == []
    assert handshake.state is HandshakeState.ADMISSION
    handshake.receive(b"early request")
    handshake.admit()
    replies = [payload for _, _, payload in split_option_replies(handshake.data_to_send())]
    flags = OFFER.flags(structured=False)
    assert replies == [
        struct.pack(">HQH", Info.EXPORT, 1 << 30, flags),
        struct.pack(">HIII", Info.BLOCK_SIZE, 512, 4096, MAX_REQUEST_BYTES),
        struct.pack(">H", Info.NAME) + b"vol0",
        struct.pack(">H", Info.DESCRIPTION) + "über".encode(),
        b"",
    ]
    assert handshake.state is HandshakeState.DONE
    assert handshake.leftover() == b"early request"
    assert handshake.leftover() == b""
    assert not handshake.session.structured
    assert not handshake.session.block_status


def test_info_tells_and_goes_on() -> None:
    handshake = started(ServerOffer("v", "", 1 << 20, 8192))
    replies = ask(handshake, Opt.INFO, info_data(""))
    assert kinds(replies) == [Rep.INFO, Rep.INFO, Rep.ACK]
    assert struct.unpack(">HIII", replies[1][1]) == (3, 8192, 8192, MAX_REQUEST_BYTES)
    assert handshake.state is HandshakeState.OPTIONS


@pytest.mark.parametrize("zeroes", [True, False])
def test_export_name(zeroes: bool) -> None:
    handshake = ServerHandshake(OFFER)
    handshake.data_to_send()
    handshake.receive(b"\0\0\0\1" if zeroes else FLAGS)
    handshake.receive(option(Opt.EXPORT_NAME, b"vol0"))
    assert handshake.data_to_send() == b""
    handshake.admit()
    expected = struct.pack(">QH", 1 << 30, OFFER.flags(structured=False))
    assert handshake.data_to_send() == expected + bytes(124 if zeroes else 0)


def test_nonfixed_client_may_only_name_an_export() -> None:
    handshake = ServerHandshake(OFFER)
    handshake.receive(bytes(4) + option(Opt.EXPORT_NAME))
    assert handshake.state is HandshakeState.ADMISSION
    handshake = ServerHandshake(OFFER)
    with pytest.raises(ProtocolError, match="without fixed newstyle"):
        handshake.receive(bytes(4) + option(Opt.LIST))


def test_list() -> None:
    assert ask(started(), Opt.LIST) == [(Rep.SERVER, string("vol0")), (Rep.ACK, b"")]


def test_abort_is_acknowledged_and_the_rest_ignored() -> None:
    handshake = started()
    assert kinds(ask(handshake, Opt.ABORT)) == [Rep.ACK]
    assert handshake.state is HandshakeState.CLOSED
    handshake.receive(option(Opt.LIST))
    assert handshake.data_to_send() == b""
    assert handshake.leftover() == b""


def test_structured_replies_and_context() -> None:
    handshake = started()
    assert kinds(ask(handshake, Opt.SET_META_CONTEXT, context_data("", BASE_ALLOCATION))) == [
        Rep.ERR_INVALID
    ]
    assert kinds(ask(handshake, Opt.STRUCTURED_REPLY)) == [Rep.ACK]
    chosen = struct.pack(">I", 1) + BASE_ALLOCATION.encode()
    replies = ask(handshake, Opt.SET_META_CONTEXT, context_data("vol0", BASE_ALLOCATION))
    assert replies == [(Rep.META_CONTEXT, chosen), (Rep.ACK, b"")]
    ask(handshake, Opt.GO, info_data("vol0"))
    handshake.admit()
    assert handshake.session.structured
    assert handshake.session.block_status
    flags = struct.unpack(">HQH", split_option_replies(handshake.data_to_send())[0][2])[2]
    assert flags & ExportFlag.SEND_DF


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (context_data(""), [Rep.META_CONTEXT, Rep.ACK]),
        (context_data("", "base:"), [Rep.META_CONTEXT, Rep.ACK]),
        (context_data("", "x-other:y", BASE_ALLOCATION), [Rep.META_CONTEXT, Rep.ACK]),
        (context_data("", "qemu:dirty-bitmap:b"), [Rep.ACK]),
        (context_data("other"), [Rep.ERR_UNKNOWN]),
        (context_data("", "a")[:-1], [Rep.ERR_INVALID]),
        (context_data("", "a") + b"x", [Rep.ERR_INVALID]),
        (string("") + b"\xff\xff\xff\xff", [Rep.ERR_INVALID]),
    ],
)
def test_listing_contexts(data: bytes, found: list[int]) -> None:
    handshake = started()
    ask(handshake, Opt.STRUCTURED_REPLY)
    assert kinds(ask(handshake, Opt.LIST_META_CONTEXT, data)) == found
    assert not handshake.session.block_status


@pytest.mark.parametrize(
    "second",
    [context_data(""), context_data("", "base:"), context_data("other", BASE_ALLOCATION), b"bad"],
)
def test_setting_contexts_again_replaces_them(second: bytes) -> None:
    handshake = started()
    ask(handshake, Opt.STRUCTURED_REPLY)
    ask(handshake, Opt.SET_META_CONTEXT, context_data("", BASE_ALLOCATION))
    assert handshake.session.block_status
    ask(handshake, Opt.SET_META_CONTEXT, second)
    assert not handshake.session.block_status


def test_export_name_drops_contexts() -> None:
    handshake = started()
    ask(handshake, Opt.STRUCTURED_REPLY)
    ask(handshake, Opt.SET_META_CONTEXT, context_data("", BASE_ALLOCATION))
    handshake.receive(option(Opt.EXPORT_NAME))
    assert handshake.session.structured
    assert not handshake.session.block_status


@pytest.mark.parametrize(
    ("number", "data", "reply"),
    [
        (4, b"", Rep.ERR_UNSUP),
        (99, b"anything", Rep.ERR_UNSUP),
        (Opt.LIST, b"x", Rep.ERR_INVALID),
        (Opt.STRUCTURED_REPLY, b"x", Rep.ERR_INVALID),
        (Opt.STARTTLS, b"", Rep.ERR_POLICY),
        (Opt.STARTTLS, b"x", Rep.ERR_INVALID),
        (Opt.INFO, b"", Rep.ERR_INVALID),
        (Opt.INFO, info_data("vol1"), Rep.ERR_UNKNOWN),
        (Opt.GO, info_data("vol1"), Rep.ERR_UNKNOWN),
        (Opt.GO, info_data("") + b"\0", Rep.ERR_INVALID),
        (Opt.GO, string("") + b"\xff\xff", Rep.ERR_INVALID),
        (Opt.GO, b"\xff\xff\xff\xff", Rep.ERR_INVALID),
        (Opt.GO, info_data("a\0b"), Rep.ERR_INVALID),
        (Opt.GO, string(b"\xff\xfe") + b"\0\0", Rep.ERR_INVALID),
        (Opt.GO, info_data("n" * 4097), Rep.ERR_INVALID),
        (Opt.GO, bytes(MAX_OPTION_BYTES + 1), Rep.ERR_TOO_BIG),
        (Opt.LIST, bytes(MAX_SKIPPED_BYTES), Rep.ERR_TOO_BIG),
    ],
)
def test_refused_options(number: int, data: bytes, reply: Rep) -> None:
    handshake = started()
    replies = ask(handshake, number, data)
    assert kinds(replies) == [reply]
    assert replies[0][1].decode()
    assert kinds(ask(handshake, Opt.LIST)) == [Rep.SERVER, Rep.ACK]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (option(Opt.LIST, magic=0x1234), "magic"),
        (option(Opt.EXPORT_NAME, b"vol1"), "no export"),
        (option(Opt.EXPORT_NAME, b"\xff"), "UTF-8"),
        (option(Opt.EXPORT_NAME, bytes(MAX_OPTION_BYTES + 1)), "bytes of data"),
        (option(Opt.GO, bytes(MAX_SKIPPED_BYTES + 1))[:16], "bytes of data"),
        (option(99) * (MAX_OPTIONS + 1), "more than"),
        (option(Opt.LIST, bytes(MAX_OPTION_BYTES + 1)) * (MAX_OPTIONS + 1), "more than"),
    ],
)
def test_dropped_clients(data: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        started().receive(data)


def test_unknown_client_flags_drop_the_client() -> None:
    with pytest.raises(ProtocolError, match="client flags"):
        ServerHandshake(OFFER).receive(b"\0\0\0\7")


def test_tls_is_required_before_anything() -> None:
    handshake = started(tls=TlsMode.REQUIRED)
    for number in (Opt.LIST, Opt.GO, Opt.STRUCTURED_REPLY, 77):
        assert kinds(ask(handshake, number, info_data(""))) == [Rep.ERR_TLS_REQD]
    assert kinds(ask(handshake, Opt.GO, bytes(MAX_OPTION_BYTES + 1))) == [Rep.ERR_TLS_REQD]
    with pytest.raises(ProtocolError, match="without TLS"):
        handshake.receive(option(Opt.EXPORT_NAME))
    assert kinds(ask(started(tls=TlsMode.REQUIRED), Opt.ABORT)) == [Rep.ACK]


def test_starttls_begins_anew() -> None:
    handshake = started(tls=TlsMode.REQUIRED)
    assert kinds(ask(handshake, Opt.STARTTLS)) == [Rep.ACK]
    assert handshake.state is HandshakeState.TLS
    handshake.tls_started()
    assert kinds(ask(handshake, Opt.STARTTLS)) == [Rep.ERR_INVALID]
    assert kinds(ask(handshake, Opt.STRUCTURED_REPLY)) == [Rep.ACK]
    assert ask(handshake, Opt.GO, info_data("")) == []
    assert handshake.state is HandshakeState.ADMISSION


def test_bytes_before_tls_are_an_injection() -> None:
    handshake = started(tls=TlsMode.REQUIRED)
    with pytest.raises(ProtocolError, match="between STARTTLS and TLS"):
        handshake.receive(option(Opt.STARTTLS) + option(Opt.STRUCTURED_REPLY))
    handshake = started(tls=TlsMode.REQUIRED)
    handshake.receive(option(Opt.STARTTLS))
    with pytest.raises(ProtocolError, match="between STARTTLS and TLS"):
        handshake.receive(b"\0")


def test_steps_out_of_order_are_mistakes_of_the_caller() -> None:
    with pytest.raises(RuntimeError):
        started().admit()
    with pytest.raises(RuntimeError):
        started().tls_started()


@pytest.mark.parametrize(("read_only", "structured"), [(True, False), (False, True)])
def test_flags(read_only: bool, structured: bool) -> None:
    flags = ServerOffer("v", "", 1, 512, read_only).flags(structured)
    assert bool(flags & ExportFlag.READ_ONLY) is read_only
    assert bool(flags & ExportFlag.SEND_TRIM) is not read_only
    assert bool(flags & ExportFlag.SEND_DF) is structured
    assert flags & ExportFlag.CAN_MULTI_CONN


# -- any bytes, in any pieces

_sensible = st.one_of(
    st.sampled_from(
        [
            option(Opt.LIST),
            option(Opt.ABORT),
            option(Opt.STARTTLS),
            option(Opt.STRUCTURED_REPLY),
            option(Opt.SET_META_CONTEXT, context_data("", BASE_ALLOCATION)),
            option(Opt.LIST_META_CONTEXT, context_data("")),
            option(Opt.INFO, info_data("vol0", 1, 2, 3)),
            option(Opt.GO, info_data("")),
            option(Opt.GO, info_data("nope")),
            option(Opt.EXPORT_NAME, b"vol0"),
            option(Opt.GO, bytes(MAX_OPTION_BYTES + 5)),
        ]
    ),
    st.builds(option, st.integers(0, 12), st.binary(max_size=40)),
    st.binary(max_size=60),
)


def run(
    stream: bytes, cuts: list[int], tls: TlsMode
) -> tuple[bytes, HandshakeState, str | None, bytes]:
    """What a server that acts at once makes of a stream that comes in these pieces."""
    handshake = ServerHandshake(OFFER, tls)
    output, failure = handshake.data_to_send(), None
    edges = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    try:
        for first, stop in pairwise(edges):
            handshake.receive(stream[first:stop])
            if handshake.state is HandshakeState.OPTIONS:
                assert len(handshake._received) < 16 + MAX_OPTION_BYTES
    except ProtocolError as error:
        failure = str(error)
    output += handshake.data_to_send()
    if failure is None and handshake.state is HandshakeState.ADMISSION:
        handshake.admit()
        output += handshake.data_to_send()
    return output, handshake.state, failure, handshake.leftover() if failure is None else b""


@settings(max_examples=examples(300), deadline=None)
@given(
    st.lists(_sensible, max_size=8),
    st.sampled_from([FLAGS, b"\0\0\0\1", bytes(4), b"\xff" * 4, b""]),
    st.lists(st.integers(0, 1 << 20), max_size=12),
    st.sampled_from(list(TlsMode)),
)
@example([option(Opt.GO, bytes(MAX_OPTION_BYTES + 5)), option(Opt.LIST)], FLAGS, [25], TlsMode.OFF)
def test_pieces_make_no_difference(
    parts: list[bytes], flags: bytes, cuts: list[int], tls: TlsMode
) -> None:
    stream = flags + b"".join(parts)
    assert run(stream, cuts, tls) == run(stream, [], tls)


@settings(max_examples=examples(100), deadline=None)
@given(st.binary(max_size=300), st.sampled_from(list(TlsMode)))
def test_a_byte_at_a_time(noise: bytes, tls: TlsMode) -> None:
    stream = FLAGS + option(Opt.LIST) + noise
    assert run(stream, list(range(len(stream))), tls) == run(stream, [], tls)
