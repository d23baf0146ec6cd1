"""A blocking NBD client that does exactly what it is told, for tests that break the rules."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import Any

from bitmapd.nbd.numbers import (
    NBD_MAGIC,
    OPTS_MAGIC,
    REP_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Cmd,
    Opt,
    Rep,
)
from bitmapd.nbd.wire import (
    CLIENT_FLAGS,
    GREETING,
    OPTION,
    OPTION_REPLY,
    REQUEST,
    SIMPLE_REPLY,
    STRUCTURED_REPLY,
)


def option(number: int, data: bytes = b"", magic: int = OPTS_MAGIC) -> bytes:
    return OPTION.pack(magic, number, len(data)) + data


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack(">I", len(raw)) + raw


def info_data(name: str = "", *infos: int) -> bytes:
    return string(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def context_data(name: str = "", *queries: str) -> bytes:
    return string(name) + struct.pack(">I", len(queries)) + b"".join(map(string, queries))


def request(
    command: int,
    handle: int = 1,
    offset: int = 0,
    length: int = 0,
    flags: int = 0,
    payload: bytes = b"",
    magic: int = REQUEST_MAGIC,
) -> bytes:
    return REQUEST.pack(magic, flags, command, handle, offset, length) + payload


def write(handle: int, offset: int, payload: bytes, flags: int = 0) -> bytes:
    return request(Cmd.WRITE, handle, offset, len(payload), flags, payload)


def split_option_replies(data: bytes) -> list[tuple[int, int, bytes]]:
    """(option, reply, data) of each; the bytes must be whole replies."""
    replies = []
    at = 0
    while at < len(data):
        magic, number, reply, length = OPTION_REPLY.unpack_from(data, at)
        assert magic == REP_MAGIC
        at += OPTION_REPLY.size
        assert at + length <= len(data)
        replies.append((number, reply, data[at : at + length]))
        at += length
    return replies


@dataclass
class Answer:
    handle: int
    error: int
    data: bytes = b""
    message: str = ""


class RawClient:
    """Connected to a unix path or a TCP port of this machine; every read has a time limit."""

    def __init__(self, where: str | int, timeout_s: float = 20.0, source: str = "") -> None:
        if isinstance(where, str):
            self.sock: Any = socket.socket(socket.AF_UNIX)
            # Blocking, since a backlog that is full fails a connect with a time limit at once.
            self.sock.connect(where)
            self.sock.settimeout(timeout_s)
        else:
            self.sock = socket.create_connection(("127.0.0.1", where), timeout_s, (source, 0))
        self.structured = False
        self.size = 0
        self.flags = 0

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def receive(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            piece = self.sock.recv(length - len(data))
            if not piece:
                raise EOFError(f"the server closed after {len(data)} of {length} bytes")
            data += piece
        return bytes(data)

    def dropped(self) -> bool:
        """Wait for the server to close; False if it sends something instead."""
        try:
            return self.sock.recv(1) == b""
        except (ConnectionResetError, BrokenPipeError):
            return True

    # -- handshake
    def greet(self, flags: int = 3) -> None:
        magic, opts, _ = GREETING.unpack(self.receive(GREETING.size))
        assert (magic, opts) == (NBD_MAGIC, OPTS_MAGIC)
        self.send(CLIENT_FLAGS.pack(flags))

    def send_option(self, number: int, data: bytes = b"") -> None:
        self.send(option(number, data))

    def ask(self, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option and return its replies up to the final one."""
        self.send_option(number, data)
        replies = []
        while True:
            _, _, reply, length = OPTION_REPLY.unpack(self.receive(OPTION_REPLY.size))
            replies.append((reply, self.receive(length)))
            if reply == Rep.ACK or reply & 1 << 31:
                return replies

    def enter(self, *, structured: bool = False, block_status: bool = False) -> RawClient:
        self.greet()
        if structured or block_status:
            assert self.ask(Opt.STRUCTURED_REPLY)[-1][0] == Rep.ACK
            self.structured = True
        if block_status:
            replies = self.ask(Opt.SET_META_CONTEXT, context_data("", "base:allocation"))
            assert [reply for reply, _ in replies] == [Rep.META_CONTEXT, Rep.ACK]
        replies = self.ask(Opt.GO, info_data(""))
        assert replies[-1][0] == Rep.ACK
        _, self.size, self.flags = struct.unpack(">HQH", replies[0][1])
        return self

    # -- transmission
    def answer(self, read_bytes: int = 0) -> Answer:
        """The next answer; `read_bytes` is what a successful simple reply carries."""
        (magic,) = struct.unpack(">I", self.receive(4))
        if magic == SIMPLE_REPLY_MAGIC:
            rest = self.receive(SIMPLE_REPLY.size - 4)
            _, error, handle = SIMPLE_REPLY.unpack(struct.pack(">I", magic) + rest)
            return Answer(handle, error, b"" if error else self.receive(read_bytes))
        assert magic == STRUCTURED_REPLY_MAGIC
        rest = self.receive(STRUCTURED_REPLY.size - 4)
        _, flags, kind, handle, length = STRUCTURED_REPLY.unpack(struct.pack(">I", magic) + rest)
        assert flags == 1
        payload = self.receive(length)
        if kind == Chunk.ERROR:
            error, count = struct.unpack_from(">IH", payload)
            assert len(payload) == 6 + count
            return Answer(handle, error, b"", payload[6:].decode())
        if kind == Chunk.OFFSET_DATA:
            payload = payload[8:]
        return Answer(handle, 0, payload)

    def call(self, data: bytes, read_bytes: int = 0) -> Answer:
        self.send(data)
        return self.answer(read_bytes)

    def read(self, offset: int, length: int) -> bytes:
        answer = self.call(request(Cmd.READ, 7, offset, length), length)
        assert answer.error == 0
        return answer.data

    def write(self, offset: int, payload: bytes) -> None:
        assert self.call(write(8, offset, payload)).error == 0
