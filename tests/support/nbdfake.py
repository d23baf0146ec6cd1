"""A scripted NBD server, for what no real server can be made to do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from bitmapd.nbd.numbers import (
    NBD_MAGIC,
    OPTS_MAGIC,
    REP_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Cmd,
    ExportFlag,
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
    STRUCTURED_REPLY,
)
from bitmapd.net.uri import NbdUri
from tests.support.nbdpeers import (
    MIB,
    WAIT_S,
    short_folder,
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
