"""`NbdTarget` and `Link` against servers that do what no real server can be made to do."""

from __future__ import annotations

import asyncio
import errno
import random
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from bitmapd.errors import UsageError
from bitmapd.media.buffers import aligned
from bitmapd.nbd.client import MAX_STATUS_BYTES, NbdTarget
from bitmapd.nbd.numbers import (
    NBD_MAGIC,
    OPTS_MAGIC,
    REP_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Cmd,
    CmdFlag,
    ExportFlag,
    Info,
    Opt,
    Rep,
)
from bitmapd.nbd.uri import NbdUri
from bitmapd.nbd.wire import (
    CLIENT_FLAGS,
    GREETING,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    OPTION,
    OPTION_REPLY,
    REQUEST,
    SIMPLE_REPLY,
    STRUCTURED_REPLY,
)
from tests.support.nbdpeers import (
    KIB,
    MIB,
    WAIT_S,
    allocation,
    completion,
    descriptors,
    fail,
    opened,
    read,
    short_folder,
    succeed,
    write,
)

SIZE = 64 * MIB
LEAST = int(ExportFlag.HAS_FLAGS | ExportFlag.SEND_FLUSH)
ALL = LEAST | int(
    ExportFlag.SEND_FUA
    | ExportFlag.SEND_TRIM
    | ExportFlag.SEND_WRITE_ZEROES
    | ExportFlag.SEND_FAST_ZERO
    | ExportFlag.CAN_MULTI_CONN
)


@dataclass
class Seen:
    """A request as the server got it."""

    command: int
    flags: int
    handle: int
    offset: int
    length: int
    payload: bytes = b""

    @property
    def what(self) -> tuple[int, int, int, int]:
        return self.command, self.flags, self.offset, self.length


class FakeServer:
    """One connection, from the server's side."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def option(self) -> tuple[int, bytes]:
        magic, option, length = OPTION.unpack(await self.reader.readexactly(OPTION.size))
        assert magic == OPTS_MAGIC
        return option, await self.reader.readexactly(length)

    def answer(self, option: int, kind: int, data: bytes = b"") -> None:
        self.writer.write(OPTION_REPLY.pack(REP_MAGIC, option, kind, len(data)) + data)

    async def enter(
        self,
        flags: int = ALL,
        size: int = SIZE,
        structured: bool = False,
        blocks: tuple[int, int, int] | None = None,
    ) -> None:
        self.writer.write(GREETING.pack(NBD_MAGIC, OPTS_MAGIC, 3))
        await self.reader.readexactly(CLIENT_FLAGS.size)
        while True:
            option, _ = await self.option()
            if option == Opt.STRUCTURED_REPLY and structured:
                self.answer(option, Rep.ACK)
            elif option == Opt.SET_META_CONTEXT:
                self.answer(option, Rep.META_CONTEXT, b"\0\0\0\1base:allocation")
                self.answer(option, Rep.ACK)
            elif option == Opt.GO:
                self.answer(option, Rep.INFO, INFO_EXPORT.pack(Info.EXPORT, size, flags))
                if blocks is not None:
                    self.answer(option, Rep.INFO, INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *blocks))
                self.answer(option, Rep.ACK)
                return
            else:
                self.answer(option, Rep.ERR_UNSUP)

    async def request(self) -> Seen:
        raw = await self.reader.readexactly(REQUEST.size)
        magic, flags, command, handle, offset, length = REQUEST.unpack(raw)
        assert magic == REQUEST_MAGIC
        payload = await self.reader.readexactly(length) if command == Cmd.WRITE else b""
        return Seen(command, flags, handle, offset, length, payload)

    async def requests(self, count: int) -> list[Seen]:
        return [await self.request() for _ in range(count)]

    def reply(self, seen: Seen, error: int = 0, data: bytes = b"") -> None:
        self.writer.write(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, seen.handle) + data)

    def chunk(self, seen: Seen, kind: int, payload: bytes = b"", last: bool = True) -> None:
        head = STRUCTURED_REPLY.pack(
            STRUCTURED_REPLY_MAGIC, int(last), kind, seen.handle, len(payload)
        )
        self.writer.write(head + payload)

    async def ends(self) -> bytes:
        """What the client sends until it hangs up; an abrupt end is one too."""
        try:
            return await self.reader.read()
        except ConnectionError:
            return b""


Script = Callable[[FakeServer], Awaitable[None]]


@asynccontextmanager
async def served(*scripts: Script, tcp: bool = False) -> AsyncIterator[NbdUri]:
    """The n-th connection is served by the n-th script; an error in a script is the test's."""
    left = list(scripts)
    errors: list[BaseException] = []
    tasks: list[asyncio.Task[Any] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.current_task())
        try:
            await left.pop(0)(FakeServer(reader, writer))
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            errors.append(error)
            raise
        finally:
            writer.close()

    with short_folder() as folder:
        if tcp:
            server = await asyncio.start_server(serve, "127.0.0.1", 0)
            uri = NbdUri(False, host="127.0.0.1", port=server.sockets[0].getsockname()[1])
        else:
            path = str(folder / "s")
            server = await asyncio.start_unix_server(serve, path)
            uri = NbdUri(False, socket_path=path)
        try:
            yield uri
            async with asyncio.timeout(WAIT_S):
                await asyncio.gather(*(task for task in tasks if task is not None))
        finally:
            for task in tasks:
                if task is not None:
                    task.cancel()
            server.close()
        assert not errors
        assert not left, "fewer connections were made than expected"


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    before = descriptors()
    yield
    assert descriptors() <= before


# -- before there is a link ---------------------------------------------------------------
def test_nothing_works_without_a_link() -> None:
    async def use() -> None:
        target = NbdTarget(asyncio.get_running_loop(), NbdUri(False, socket_path="/nowhere"))
        buffer = aligned(512)
        for submit in (
            lambda done: target.read(0, buffer, done),
            lambda done: target.write(0, buffer, done),
            lambda done: target.zero(0, 512, done),
            lambda done: target.trim(0, 512, done),
            target.flush,
            lambda done: target.allocation(0, 512, lambda error, pieces: done(error)),
        ):
            text = await fail(errno.ENOTCONN, submit)
            assert text == "nbd+unix:///?socket=/nowhere: not connected"
        assert not target.connected
        assert target.in_flight == 0
        target.close()
        assert "closed" in await fail(errno.ENOTCONN, target.flush)

    asyncio.run(use())


@pytest.mark.parametrize("connections", [0, 17])
def test_a_foolish_number_of_connections(connections: int) -> None:
    loop = asyncio.new_event_loop()
    with pytest.raises(UsageError, match="between 1 and 16"):
        NbdTarget(loop, NbdUri(False, socket_path="/x"), connections=connections)
    loop.close()


def test_open_fails_and_says_why() -> None:
    async def not_nbd(server: FakeServer) -> None:
        server.writer.write(b"220 mail.example ESMTP ready\r\n")
        await server.ends()

    async def closes(server: FakeServer) -> None:
        server.writer.write(GREETING.pack(NBD_MAGIC, OPTS_MAGIC, 3))

    async def silent(server: FakeServer) -> None:
        await server.ends()

    async def too_small_requests(server: FakeServer) -> None:
        await server.enter(blocks=(1, 1, 256))
        await server.ends()

    async def use() -> None:
        scripts = (not_nbd, closes, silent, too_small_requests)
        async with served(*scripts) as uri:
            target = NbdTarget(asyncio.get_running_loop(), uri, timeout_s=0.3)
            assert "not an NBD server" in await fail(errno.EPROTO, target.open)
            assert "during the handshake" in await fail(errno.ECONNRESET, target.open)
            assert "no answer within 0.3 s" in await fail(errno.ETIMEDOUT, target.open)
            assert "256 bytes at most" in await fail(errno.EOPNOTSUPP, target.open)

    asyncio.run(use())


def test_open_twice_and_closed_meanwhile() -> None:
    async def silent(server: FakeServer) -> None:
        await server.ends()

    async def use() -> None:
        async with served(silent) as uri:
            target = NbdTarget(asyncio.get_running_loop(), uri)
            first = asyncio.ensure_future(completion(target.open))
            await asyncio.sleep(0)
            assert "already" in await fail(errno.EALREADY, target.open)
            await asyncio.sleep(0.05)
            target.close()
            error = await first
            assert error is not None
            assert error.errno == errno.ECANCELED
        # Closed before the attempt even began.
        target = NbdTarget(asyncio.get_running_loop(), uri)
        second = asyncio.ensure_future(completion(target.open))
        await asyncio.sleep(0)
        target.close()
        error = await second
        assert error is not None
        assert error.errno == errno.ECANCELED

    asyncio.run(use())


def test_names_that_cannot_be_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unknown(*_: object, **__: object) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async def use() -> None:
        loop = asyncio.get_running_loop()
        target = NbdTarget(loop, NbdUri(False, host="a..b"))
        assert "a..b is not a host name" in await fail(errno.EHOSTUNREACH, target.open)
        monkeypatch.setattr(loop, "getaddrinfo", unknown)
        target = NbdTarget(loop, NbdUri(False, host="mirror"))
        text = await fail(errno.EHOSTUNREACH, target.open)
        assert "cannot resolve mirror: Name or service not known" in text

    asyncio.run(use())


def test_every_address_of_a_name_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(server: FakeServer) -> None:
        await server.enter()
        await server.ends()

    async def use() -> None:
        loop = asyncio.get_running_loop()
        async with served(script, tcp=True) as uri:
            ports = [1, uri.port]

            async def two(*_: object, **__: object) -> list[Any]:
                return [
                    (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))
                    for port in ports
                ]

            monkeypatch.setattr(loop, "getaddrinfo", two)
            target = await opened(uri)
            target.close()
            ports.clear()
            assert "has no address" in await fail(errno.EHOSTUNREACH, target.open)

    asyncio.run(use())


def test_a_bug_while_opening_is_told_and_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> None:
        raise ZeroDivisionError("bug")

    async def use() -> None:
        loop = asyncio.get_running_loop()
        problems: list[object] = []
        loop.set_exception_handler(lambda _, context: problems.append(context["exception"]))
        monkeypatch.setattr("bitmapd.nbd.client.connect", broken)
        target = NbdTarget(loop, NbdUri(False, socket_path="/x"))
        assert "ZeroDivisionError" in await fail(errno.EIO, target.open)
        assert isinstance(problems[0], ZeroDivisionError)

    asyncio.run(use())


# -- requests -----------------------------------------------------------------------------
def test_ranges_that_are_none() -> None:
    async def script(server: FakeServer) -> None:
        await server.enter(blocks=(4096, 4096, MIB), size=8192 + 100)
        await server.ends()

    async def use() -> None:
        async with served(script) as uri:
            target = await opened(uri)
            assert (target.size_bytes, target.block_size_bytes) == (8192, 4096)
            for offset, length in ((-4096, 4096), (0, 512), (512, 4096), (8192, 4096), (0, 0)):
                buffer = memoryview(bytearray(length))
                for submit in (
                    lambda done: target.read(offset, buffer, done),
                    lambda done: target.write(offset, buffer, done),
                    lambda done: target.zero(offset, length, done),
                    lambda done: target.trim(offset, length, done),
                    lambda done: target.allocation(offset, length, lambda e, _: done(e)),
                ):
                    await fail(errno.EINVAL, submit)
            target.close()

    asyncio.run(use())


def test_requests_go_together_and_are_answered_in_any_order() -> None:
    """More requests at once than one `sendmsg` takes, replied in reverse."""
    count = 3000

    async def script(server: FakeServer) -> None:
        await server.enter()
        seen = await server.requests(count)
        assert [request.offset for request in seen] == [512 * i for i in range(count)]
        for request in reversed(seen):
            assert request.payload == struct.pack(">I", request.offset // 512) * 128
            server.reply(request)
        await server.ends()

    async def use() -> None:
        async with served(script) as uri:
            target = await opened(uri)
            order: list[int] = []
            everything = asyncio.get_running_loop().create_future()

            def ended(index: int, error: OSError | None) -> None:
                assert error is None
                order.append(index)
                if len(order) == count:
                    everything.set_result(None)

            for index in range(count):
                buffer = memoryview(bytearray(struct.pack(">I", index) * 128))
                target.write(index * 512, buffer, lambda error, index=index: ended(index, error))
            assert target.in_flight == count
            await everything
            assert order == list(range(count))[::-1]
            target.close()

    asyncio.run(use())


def test_long_requests_are_split() -> None:
    data = random.Random(1).randbytes(160 * KIB)

    async def script(server: FakeServer) -> None:
        await server.enter(blocks=(1, 4096, 64 * KIB))
        cut = [(4096, 65536), (69632, 65536), (135168, 32768)]
        for command in (Cmd.WRITE, Cmd.READ, Cmd.WRITE_ZEROES, Cmd.TRIM):
            seen = await server.requests(3)
            assert [request.what for request in seen] == [(command, 0, *piece) for piece in cut]
            if command == Cmd.WRITE:
                assert b"".join(request.payload for request in seen) == data
            for request in reversed(seen):
                start = request.offset - 4096
                piece = data[start : start + request.length] if command == Cmd.READ else b""
                server.reply(request, data=piece)
        for error in await server.requests(3):
            server.reply(error, {69632: 28, 135168: 5}.get(error.offset, 0))
        await server.ends()

    async def use() -> None:
        async with served(script) as uri:
            target = await opened(uri)
            await write(target, 4096, data)
            assert await read(target, 4096, len(data)) == data
            await succeed(lambda done: target.zero(4096, len(data), done))
            await succeed(lambda done: target.trim(4096, len(data), done))
            buffer = memoryview(bytearray(data))
            await fail(errno.ENOSPC, lambda done: target.write(4096, buffer, done))
            target.close()

    asyncio.run(use())


def test_flags_of_a_server_that_has_everything() -> None:
    async def script(server: FakeServer) -> None:
        await server.enter(ALL)
        for command, flags in (
            (Cmd.WRITE, CmdFlag.FUA),
            (Cmd.WRITE, 0),
            (Cmd.WRITE_ZEROES, CmdFlag.FUA | CmdFlag.NO_HOLE),
            (Cmd.WRITE_ZEROES, CmdFlag.FAST_ZERO),
            (Cmd.TRIM, CmdFlag.FUA),
            (Cmd.FLUSH, 0),
        ):
            seen = await server.request()
            assert (seen.command, seen.flags) == (command, flags)
            server.reply(seen, 95 if flags == CmdFlag.FAST_ZERO else 0)
        await server.ends()

    async def use() -> None:
        async with served(script) as uri:
            target = await opened(uri)
            await write(target, 0, bytes(512), fua=True)
            await write(target, 0, bytes(512))
            await succeed(lambda done: target.zero(0, 512, done, fua=True, unmap=False))
            await fail(errno.EOPNOTSUPP, lambda done: target.zero(0, 512, done, fast=True))
            await succeed(lambda done: target.trim(0, 512, done, fua=True))
            await succeed(target.flush)
            target.close()

    asyncio.run(use())


def test_a_server_that_has_only_flush() -> None:
    """Zeros are written, FUA is a flush after the reply, TRIM is nothing."""

    async def script(server: FakeServer) -> None:
        await server.enter(LEAST)
        seen = await server.request()
        assert (seen.command, seen.flags) == (Cmd.WRITE, 0)
        server.reply(seen)
        flush = await server.request()
        assert flush.what == (Cmd.FLUSH, 0, 0, 0)
        server.reply(flush, 5)
        # A write that failed is not followed by a flush.
        server.reply(await server.request(), 28)
        pieces = await server.requests(3)
        assert [piece.what for piece in pieces] == [
            (Cmd.WRITE, 0, 0, MIB),
            (Cmd.WRITE, 0, MIB, MIB),
            (Cmd.WRITE, 0, 2 * MIB, 512),
        ]
        for piece in pieces:
            assert piece.payload == bytes(piece.length)
            server.reply(piece)
        flush = await server.request()
        assert flush.command == Cmd.FLUSH
        server.reply(flush)
        assert await server.ends() == REQUEST.pack(REQUEST_MAGIC, 0, Cmd.DISC, 0, 0, 0)

    async def use() -> None:
        async with served(script) as uri:
            target = await opened(uri)
            buffer = aligned(512)
            await fail(errno.EIO, lambda done: target.write(0, buffer, done, True))
            await fail(errno.ENOSPC, lambda done: target.write(0, buffer, done, True))
            await succeed(lambda done: target.zero(0, 2 * MIB + 512, done, fua=True))
            await fail(errno.EOPNOTSUPP, lambda done: target.zero(0, 512, done, fast=True))
            await succeed(lambda done: target.trim(0, 512, done, fua=True))
            assert await allocation(target, 512, 1024) == [(1024, 0)]
            target.close()

    asyncio.run(use())


def test_allocation() -> None:
    size = 4 * MAX_STATUS_BYTES

    async def script(server: FakeServer) -> None:
        await server.enter(structured=True, size=size)
        seen = await server.request()
        assert seen.what == (Cmd.BLOCK_STATUS, 0, 512, MAX_STATUS_BYTES)
        server.chunk(seen, 5, struct.pack(">IIIII", 1, 4096, 3, 512, 0))
        seen = await server.request()
        server.chunk(seen, (1 << 15) + 1, struct.pack(">IH", 22, 4) + b"what")
        await server.ends()

    async def use() -> None:
        async with served(script) as uri:
            target = await opened(uri)
            assert await allocation(target, 512, size - 512) == [(4096, 3), (512, 0)]
            ends: list[tuple[OSError | None, list[tuple[int, int]]]] = []
            answered = asyncio.Event()

            def told(error: OSError | None, pieces: list[tuple[int, int]]) -> None:
                ends.append((error, pieces))
                answered.set()

            target.allocation(0, 512, told)
            await answered.wait()
            error, pieces = ends[0]
            assert error is not None
            assert error.errno == errno.EINVAL
            assert "the server says: Invalid argument (what)" in str(error.strerror)
            assert pieces == []
            target.close()

    asyncio.run(use())


def test_kick_once_a_batch() -> None:
    async def script(server: FakeServer) -> None:
        await server.enter()
        raw = b"".join(
            SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, request.handle)
            for request in await server.requests(8)
        )
        server.writer.write(raw)
        await server.ends()

    async def use() -> None:
        log: list[str] = []
        async with served(script) as uri:
            target = await opened(uri, kick=lambda: log.append("kick"))
            ends = [asyncio.get_running_loop().create_future() for _ in range(8)]
            for end in ends:

                def done(error: OSError | None, end: asyncio.Future[None] = end) -> None:
                    log.append("done")
                    end.set_result(None)

                target.flush(done)
            await asyncio.gather(*ends)
            assert log == ["done"] * 8 + ["kick"]
            target.close()

    asyncio.run(use())


def test_a_callback_that_raises_costs_nobody_else_an_answer() -> None:
    async def script(server: FakeServer) -> None:
        await server.enter()
        replies = b"".join(
            SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, request.handle)
            for request in await server.requests(3)
        )
        server.writer.write(replies)
        await server.ends()

    async def use() -> None:
        loop = asyncio.get_running_loop()
        problems: list[object] = []
        loop.set_exception_handler(lambda _, context: problems.append(context["exception"]))
        async with served(script) as uri:
            target = await opened(uri)
            end = loop.create_future()
            calls: list[str] = []

            def bad(_: OSError | None) -> None:
                calls.append("bad")
                raise ZeroDivisionError("bug")

            target.flush(bad)
            target.flush(bad)
            target.flush(end.set_result)
            assert await end is None
            assert calls == ["bad", "bad"]
            assert [type(problem) for problem in problems] == [ZeroDivisionError] * 2
            target.close()

    asyncio.run(use())


def test_operations_from_inside_a_callback() -> None:
    """As the copier does: the next one begins when one is done; then it closes."""

    async def script(server: FakeServer) -> None:
        await server.enter()
        for _ in range(100):
            server.reply(await server.request())
        await server.ends()

    async def use() -> None:
        async with served(script) as uri:
            target = await opened(uri)
            end = asyncio.get_running_loop().create_future()
            left = 100

            def done(error: OSError | None) -> None:
                nonlocal left
                left -= 1
                if error is not None or left == 0:
                    target.close()
                    end.set_result(error)
                else:
                    target.flush(done)

            target.flush(done)
            assert await end is None
            assert not target.connected

    asyncio.run(use())


# -- several connections ------------------------------------------------------------------
def test_several_connections_share_the_work_and_the_fate() -> None:
    seen: list[int] = []

    def script(number: int) -> Script:
        async def serve(server: FakeServer) -> None:
            await server.enter(ALL)
            for request in await server.requests(2):
                seen.append(number)
                server.reply(request)
            await server.request()
            if number == 0:
                return  # hangs up
            await server.ends()

        return serve

    async def use() -> None:
        async with served(script(0), script(1), script(2)) as uri:
            target = await opened(uri, connections=3)
            await asyncio.gather(*(succeed(target.flush) for _ in range(6)))
            assert sorted(seen) == [0, 0, 1, 1, 2, 2]
            texts = await asyncio.gather(*(fail(errno.ENOTCONN, target.flush) for _ in range(3)))
            assert len(set(texts)) == 1
            assert not target.connected
            assert "not connected (connection lost" in await fail(errno.ENOTCONN, target.flush)

    asyncio.run(use())


def test_one_connection_where_the_server_wants_one() -> None:
    async def script(server: FakeServer) -> None:
        await server.enter(ALL & ~ExportFlag.CAN_MULTI_CONN)
        await server.ends()

    async def use() -> None:
        async with served(script) as uri:
            target = await opened(uri, connections=3)
            target.close()

    asyncio.run(use())


def test_connections_have_to_agree_and_to_stay() -> None:
    def script(size: int) -> Script:
        async def serve(server: FakeServer) -> None:
            await server.enter(size=size)
            await server.ends()

        return serve

    async def leaves(server: FakeServer) -> None:
        await server.enter()

    async def slow(server: FakeServer) -> None:
        await asyncio.sleep(0.2)
        await server.enter()
        await server.ends()

    async def use() -> None:
        async with served(script(MIB), script(2 * MIB), leaves, slow) as uri:
            target = NbdTarget(asyncio.get_running_loop(), uri, connections=2)
            assert "differs" in await fail(errno.EPROTO, target.open)
            assert "closed" in await fail(errno.ECONNRESET, target.open)
            assert not target.connected

    asyncio.run(use())


# -- loss ---------------------------------------------------------------------------------
@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_everything_in_flight_ends_once_when_the_server_hangs_up(tcp: bool) -> None:
    async def script(server: FakeServer) -> None:
        await server.enter()
        server.reply((await server.requests(10))[3])
        await server.writer.drain()

    async def again(server: FakeServer) -> None:
        await server.enter(size=SIZE // 2)
        server.reply(await server.request())
        await server.ends()

    async def use() -> None:
        async with served(script, again, tcp=tcp) as uri:
            target = await opened(uri)
            errors = await asyncio.gather(*(completion(target.flush) for _ in range(10)))
            assert errors[3] is None
            lost = [error for error in errors if error is not None]
            assert len(lost) == 9
            assert {error.errno for error in lost} == {errno.ENOTCONN}
            assert len({id(error) for error in lost}) == 9
            assert all(str(error.strerror).startswith(f"{uri}: ") for error in lost)
            assert not target.connected
            await succeed(target.open)
            assert target.size_bytes == SIZE // 2
            await succeed(target.flush)
            target.close()

    asyncio.run(use())


def test_open_gives_up_the_link_that_there_is() -> None:
    async def script(server: FakeServer) -> None:
        await server.enter()
        await server.ends()

    async def use() -> None:
        async with served(script, script) as uri:
            target = await opened(uri)
            flush = asyncio.ensure_future(fail(errno.ENOTCONN, target.flush))
            await asyncio.sleep(0)
            await succeed(target.open)
            assert "opened again" in await flush
            assert target.connected
            target.close()

    asyncio.run(use())


def test_close_with_requests_in_flight() -> None:
    async def script(server: FakeServer) -> None:
        await server.enter()
        await server.request()
        assert await server.ends() == b""  # no polite end that would claim all is well

    async def use() -> None:
        async with served(script) as uri:
            target = await opened(uri)
            flush = asyncio.ensure_future(fail(errno.ECANCELED, target.flush))
            await asyncio.sleep(0.05)
            target.close()
            assert "in flight" in await flush

    asyncio.run(use())


def test_close_in_the_turn_of_a_request() -> None:
    """The request was not sent yet; nothing of it may leave afterwards."""

    async def script(server: FakeServer) -> None:
        await server.enter()
        assert await server.ends() == b""

    async def use() -> None:
        async with served(script) as uri:
            target = await opened(uri)
            end = asyncio.get_running_loop().create_future()
            target.flush(end.set_result)
            target.close()
            error = await end
            assert error is not None
            assert error.errno == errno.ECANCELED

    asyncio.run(use())


@pytest.mark.parametrize(
    ("reply", "match"),
    [
        (lambda seen: b"\xde\xad\xbe\xef" * 4, "magic 0xdeadbeef"),
        (
            lambda seen: SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, seen.handle + 7),
            "not in flight",
        ),
        (
            lambda seen: STRUCTURED_REPLY.pack(STRUCTURED_REPLY_MAGIC, 1, 0, seen.handle, 1),
            "magic 0x668e33ef",
        ),
    ],
)
def test_a_violation_ends_the_link_and_is_named(reply: Callable[[Seen], bytes], match: str) -> None:
    async def script(server: FakeServer) -> None:
        await server.enter()
        good, bad = await server.requests(2)
        server.reply(good)
        server.writer.write(reply(bad) + bytes(16))
        await server.ends()

    async def use() -> None:
        async with served(script) as uri:
            target = await opened(uri)
            good, bad = await asyncio.gather(completion(target.flush), completion(target.flush))
            assert good is None
            assert bad is not None
            assert bad.errno == errno.EPROTO
            assert "the server broke the protocol" in str(bad.strerror)
            assert match in str(bad.strerror)
            assert not target.connected

    asyncio.run(use())


def test_an_answer_to_half_a_write() -> None:
    """The buffer would go back to its owner while the kernel still had to read it."""

    async def script(server: FakeServer) -> None:
        await server.enter()
        raw = await server.reader.readexactly(REQUEST.size)
        _, _, _, handle, _, _ = REQUEST.unpack(raw)
        server.writer.write(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, handle))
        await server.writer.drain()
        # Read on only when the client has hung up.
        await asyncio.sleep(0.2)
        await server.ends()

    async def use() -> None:
        async with served(script) as uri:
            target = await opened(uri)
            buffer = aligned(16 * MIB)
            text = await fail(errno.EPROTO, lambda done: target.write(0, buffer, done))
            assert "answered before it was sent" in text

    asyncio.run(use())


# -- time ---------------------------------------------------------------------------------
def test_a_request_without_a_reply_ends_the_link() -> None:
    """Replies to others do not help it."""

    async def script(server: FakeServer) -> None:
        await server.enter()
        await server.request()
        while True:
            try:
                server.reply(await server.request())
            except (asyncio.IncompleteReadError, ConnectionError):
                return

    async def use() -> None:
        async with served(script) as uri:
            target = await opened(uri, timeout_s=0.4)
            stuck = asyncio.ensure_future(fail(errno.ETIMEDOUT, target.flush))
            await asyncio.sleep(0)
            answered = 0
            while not stuck.done():
                error = await completion(target.flush)
                if error is None:
                    answered += 1
                    await asyncio.sleep(0.01)
            assert "no reply to a request for 0." in await stuck
            assert answered > 5

    asyncio.run(use())


@pytest.mark.parametrize("way", ["write", "read"])
def test_a_slow_line_is_not_a_dead_one(way: str) -> None:
    """A request that takes four times the time-out, while its data move."""
    size = 2 * MIB if way == "write" else 64 * KIB

    async def script(server: FakeServer) -> None:
        await server.enter()
        raw = await server.reader.readexactly(REQUEST.size)
        _, _, command, handle, _, _ = REQUEST.unpack(raw)
        head = SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, handle)
        if command == Cmd.WRITE:
            for _ in range(32):
                await server.reader.readexactly(size // 32)
                await asyncio.sleep(0.05)
            server.writer.write(head)
        else:
            server.writer.write(head)
            for _ in range(32):
                server.writer.write(b"r" * (size // 32))
                await asyncio.sleep(0.05)
        await server.ends()

    async def use() -> None:
        async with served(script) as uri:
            target = await opened(uri, timeout_s=0.4)
            if way == "write":
                await write(target, 0, b"w" * size)
            else:
                assert await read(target, 0, size) == b"r" * size
            target.close()

    asyncio.run(use())


def test_a_server_that_drips_is_left_in_the_end() -> None:
    async def script(server: FakeServer) -> None:
        await server.enter()
        seen = await server.request()
        server.reply(seen)
        try:
            while True:
                server.writer.write(b"x")
                await server.writer.drain()
                await asyncio.sleep(0.01)
        except ConnectionError:
            pass

    async def use() -> None:
        async with served(script) as uri:
            target = await opened(uri, timeout_s=0.1)
            buffer = aligned(64 * KIB)
            text = await fail(errno.ETIMEDOUT, lambda done: target.read(0, buffer, done))
            assert "for 1." in text

    asyncio.run(use())


def test_an_idle_link_lives_on() -> None:
    async def script(server: FakeServer) -> None:
        await server.enter()
        for _ in range(2):
            server.reply(await server.request())
        await server.ends()

    async def use() -> None:
        async with served(script) as uri:
            target = await opened(uri, timeout_s=0.1)
            await succeed(target.flush)
            await asyncio.sleep(0.4)
            await succeed(target.flush)
            target.close()

    asyncio.run(use())
