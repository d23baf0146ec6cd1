"""How an `NbdTarget` loses its link: hang-ups, violations, time-outs."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Iterator

import pytest

from bitmapd.media.buffers import aligned
from bitmapd.nbd.numbers import (
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Cmd,
)
from bitmapd.nbd.wire import (
    REQUEST,
    SIMPLE_REPLY,
    STRUCTURED_REPLY,
)
from tests.support.nbdfake import SIZE, FakeServer, Seen, served
from tests.support.nbdpeers import (
    KIB,
    MIB,
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
            assert "no reply to a request for" in await stuck
            assert answered > 1

    asyncio.run(use())


@pytest.mark.parametrize("way", ["write", "read"])
def test_a_slow_line_is_not_a_dead_one(way: str) -> None:
    """A request that takes twice the time-out, while its data move."""
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
            target = await opened(uri, timeout_s=0.8)
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
            target = await opened(uri, timeout_s=0.25)
            buffer = aligned(64 * KIB)
            text = await fail(errno.ETIMEDOUT, lambda done: target.read(0, buffer, done))
            assert "no reply to a request for" in text

    asyncio.run(use())


def test_an_idle_link_lives_on() -> None:
    async def script(server: FakeServer) -> None:
        await server.enter()
        for _ in range(2):
            server.reply(await server.request())
        await server.ends()

    async def use() -> None:
        async with served(script) as uri:
            target = await opened(uri, timeout_s=0.25)
            await succeed(target.flush)
            await asyncio.sleep(0.6)
            await succeed(target.flush)
            target.close()

    asyncio.run(use())


# -- what a lost link leaves on its way -----------------------------------------------------
@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_only_what_left_as_a_whole_may_land_late(tcp: bool) -> None:
    """The server takes one request and no byte more; the second, of 32 MiB, is more than sockets
    hold, so part of it never left."""

    async def script(server: FakeServer) -> None:
        await server.enter(size=64 * MIB)
        await server.request()
        taken.set()
        await hang_up.wait()

    async def use() -> None:
        async with served(script, tcp=tcp) as uri:
            target = await opened(uri)
            small, large = aligned(4 * KIB), aligned(32 * MIB)
            first = asyncio.ensure_future(completion(lambda done: target.write(0, small, done)))
            second = asyncio.ensure_future(
                completion(lambda done: target.write(4 * KIB, large, done))
            )
            await taken.wait()
            hang_up.set()
            answered, never_left = await asyncio.gather(first, second)
            assert answered is not None
            assert never_left is not None
            assert target.lands_late(answered)
            assert not target.lands_late(never_left)
            target.close()

    taken, hang_up = asyncio.Event(), asyncio.Event()
    asyncio.run(use())


def test_an_answer_that_is_an_error_is_an_answer() -> None:
    async def script(server: FakeServer) -> None:
        await server.enter()
        server.reply(await server.request(), error=errno.EIO)
        await server.ends()

    async def use() -> None:
        async with served(script) as uri:
            target = await opened(uri)
            error = await completion(lambda done: target.write(0, aligned(4 * KIB), done))
            assert error is not None
            assert not target.lands_late(error)
            target.close()

    asyncio.run(use())
