"""`NbdTarget` and `Pipeline` against servers that do what no real server can be made to do."""

from __future__ import annotations

import asyncio
import errno
import random
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from bitmapd.errors import UsageError
from bitmapd.media.buffers import aligned
from bitmapd.nbd.client.target import MAX_STATUS_BYTES, NbdTarget
from bitmapd.nbd.numbers import (
    NBD_MAGIC,
    OPTS_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    Cmd,
    CmdFlag,
    ExportFlag,
)
from bitmapd.nbd.wire import (
    GREETING,
    REQUEST,
    SIMPLE_REPLY,
)
from bitmapd.net.uri import NbdUri
from tests.support.nbdfake import ALL, LEAST, FakeServer, Script, served
from tests.support.nbdpeers import (
    KIB,
    MIB,
    allocation,
    completion,
    descriptors,
    fail,
    opened,
    read,
    succeed,
    write,
)


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
        monkeypatch.setattr("bitmapd.nbd.client.target.connect", broken)
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


@pytest.mark.parametrize("refusal", ["hangs up", "never answers"])
def test_a_server_without_room_for_more_is_used_with_what_there_is(
    refusal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitmapd.nbd.client.target.MORE_TIMEOUT_S", 0.1)
    asked = asyncio.Event()

    async def first(server: FakeServer) -> None:
        await server.enter(ALL)
        for _ in range(3):
            server.reply(await server.request())
        await server.ends()

    async def second(server: FakeServer) -> None:
        asked.set()
        if refusal == "never answers":
            await server.ends()

    async def use() -> None:
        async with served(first, second) as uri:
            target = await opened(uri, connections=3)
            assert asked.is_set()
            for _ in range(3):
                await succeed(target.flush)
            target.close()

    asyncio.run(use())
