"""Random sessions against the running server.

`FUZZ_EXAMPLES=10000 pytest tests/fuzz/test_fuzz_nbd.py` runs longer.  Two properties:

- A client that keeps to the framing gets, for each request, exactly the answer that a model gives,
  however the bytes were cut.
- Bytes that were damaged in any way end in answers and a closed connection: no exception reaches
  the loop (`ServerThread` raises it), no buffer is lost, and the next client is served.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.nbd.numbers import Cmd, CmdFlag, Opt
from bitmapd.nbd.server.requests import Rules, descriptors
from tests.support.nbdraw import RawClient, context_data, info_data, option, request
from tests.support.nbdserve import HeldDevice, ServerThread

SIZE = 64 << 10
PIECES = [(4096, 3), (8192, 0), (SIZE, 2)]


class Server(NamedTuple):
    thread: ServerThread
    path: str


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with (
        tempfile.TemporaryDirectory(prefix="nbd") as folder,
        ServerThread(lambda loop, _: HeldDevice(loop, SIZE)) as thread,
    ):
        path = str(Path(folder) / "s")
        thread.call(lambda: thread.server.listen_unix(path))
        thread.device.pieces = PIECES
        yield Server(thread, path)
        assert thread.pool.out_bytes == 0


class Op(NamedTuple):
    command: int
    flags: int
    offset: int
    length: int
    fill: int

    def encoded(self, handle: int) -> bytes:
        payload = bytes([self.fill]) * self.length if self.command == Cmd.WRITE else b""
        return request(self.command, handle, self.offset, self.length, self.flags, payload)


_ops = st.builds(
    Op,
    st.sampled_from([Cmd.READ, Cmd.WRITE] * 4 + [3, 4, 5, 6, 7, 8, 9, 0xFFFF]),
    st.just(0) | st.integers(0, 63),
    st.integers(0, 130).map(lambda n: n * 512) | st.integers(0, 1 << 17),
    st.integers(0, 17).map(lambda n: n * 512) | st.integers(0, 9000),
    st.integers(0, 255),
)


class Model:
    """What the answers have to be; the device completes in the order of submission."""

    def __init__(self, content: bytes, rules: Rules) -> None:
        self.content = bytearray(content)
        self.rules = rules

    def answer(self, op: Op) -> tuple[int, bytes]:
        refusal = self.rules.refuse(op.command, op.flags, op.offset, op.length)
        if refusal is not None:
            return int(refusal.error), b""
        end = op.offset + op.length
        if op.command == Cmd.READ:
            return 0, bytes(self.content[op.offset : end])
        if op.command == Cmd.WRITE:
            self.content[op.offset : end] = bytes([op.fill]) * op.length
        elif op.command == Cmd.WRITE_ZEROES:
            self.content[op.offset : end] = bytes(op.length)
        elif op.command == Cmd.BLOCK_STATUS:
            found = descriptors(PIECES, op.length, bool(op.flags & CmdFlag.REQ_ONE))
            return 0, struct.pack(">I", 1) + b"".join(struct.pack(">II", *one) for one in found)
        return 0, b""


def send_in_pieces(client: RawClient, stream: bytes, cuts: list[int]) -> None:
    edges = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    for first, stop in itertools.pairwise(edges):
        client.send(stream[first:stop])


@given(
    st.lists(_ops, min_size=1, max_size=40),
    st.lists(st.integers(0, 1 << 20), max_size=8),
    st.booleans(),
)
def test_every_request_gets_its_answer(
    server: Server, ops: list[Op], cuts: list[int], structured: bool
) -> None:
    with RawClient(server.path) as client:
        client.enter(structured=structured, block_status=structured)
        rules = Rules(SIZE, 512, False, structured, structured)
        model = Model(bytes(server.thread.device.content), rules)
        expected = {handle: model.answer(op) for handle, op in enumerate(ops, 1000)}
        stream = b"".join(op.encoded(handle) for handle, op in enumerate(ops, 1000))
        send_in_pieces(client, stream + request(Cmd.DISC), cuts)
        got = {}
        for _ in ops:
            answer = _answer(client, ops)
            assert answer[0] not in got
            got[answer[0]] = answer[1:]
        assert got == expected
        assert client.dropped()
    assert server.thread.call(lambda: bytes(server.thread.device.content)) == model.content


def _answer(client: RawClient, ops: list[Op]) -> tuple[int, int, bytes]:
    answer = client.answer()
    if not client.structured and not answer.error:
        op = ops[answer.handle - 1000]
        if op.command == Cmd.READ:
            answer.data = client.receive(op.length)
    return answer.handle, answer.error, answer.data


_SESSION = (
    b"\0\0\0\3"
    + option(Opt.LIST)
    + option(Opt.STRUCTURED_REPLY)
    + option(Opt.SET_META_CONTEXT, context_data("", "base:allocation"))
    + option(Opt.GO, info_data("vol0", 1, 2, 3))
)
_REQUESTS = b"".join(
    op.encoded(number)
    for number, op in enumerate(
        [
            Op(Cmd.WRITE, 0, 512, 1024, 7),
            Op(Cmd.READ, 0, 0, 8192, 0),
            Op(Cmd.BLOCK_STATUS, 0, 0, SIZE, 0),
            Op(Cmd.WRITE, 1, 0, 4096, 9),
            Op(Cmd.FLUSH, 0, 0, 0, 0),
            Op(Cmd.WRITE_ZEROES, 0, 0, 512, 0),
        ]
    )
)

_edits = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.integers(0, 1 << 14), st.integers(1, 255)),
        st.tuples(st.just("cut"), st.integers(0, 1 << 14), st.integers(1, 64)),
        st.tuples(st.just("insert"), st.integers(0, 1 << 14), st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("repeat"), st.integers(0, 1 << 14), st.integers(1, 200)),
        st.tuples(st.just("end"), st.integers(0, 1 << 14), st.just(0)),
    ),
    max_size=6,
)


def damaged(stream: bytes, edits: list[tuple[str, int, int | bytes]]) -> bytes:
    data = bytearray(stream)
    for what, where, how in edits:
        at = where % (len(data) + 1)
        if isinstance(how, bytes):
            data[at:at] = how
        elif what == "flip" and at < len(data):
            data[at] ^= how
        elif what == "cut":
            del data[at : at + how]
        elif what == "repeat":
            data[at:at] = data[at : at + how]
        elif what == "end":
            del data[at:]
    return bytes(data)


@given(_edits, st.lists(st.integers(0, 1 << 20), max_size=6), st.booleans())
def test_damaged_sessions(
    server: Server,
    edits: list[tuple[str, int, int | bytes]],
    cuts: list[int],
    spare_the_handshake: bool,
) -> None:
    if spare_the_handshake:
        stream = _SESSION + damaged(_REQUESTS, edits)
    else:
        stream = damaged(_SESSION + _REQUESTS, edits)
    with RawClient(server.path) as client:
        with contextlib.suppress(OSError):
            send_in_pieces(client, stream, cuts)
            client.sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while client.sock.recv(1 << 16):
                pass
    with RawClient(server.path) as client:
        client.enter()
        assert len(client.read(0, 512)) == 512
        client.send(request(Cmd.DISC))
        assert client.dropped()
    assert server.thread.call(lambda: server.thread.pool.out_bytes) == 0
    assert not server.thread.failures
