"""The control socket of one volume: `RUN_DIR/NAME.ctl`, served on bitmapd's event loop.

A connection carries requests one at a time (see `protocol`).  For each, the handler of its verb
runs; it may send events through `progress` and its value or its `BitmapdError` is the answer.

1. Only the user that runs the server and root are answered: the socket has mode 0600 from the
   moment it exists, and the peer's credentials are asked of the kernel besides.
2. `Places` bounds the number of connections and of commands that wait; one line each way is in
   memory.  A connection ends that asks for nothing for `IDLE_TIMEOUT_S`, that takes longer than
   `REQUEST_TIMEOUT_S` for a request it has begun, or that does not take all of an answer within
   `SEND_TIMEOUT_S`.
3. When the client goes away, its handler is cancelled.  What has to be finished whether or not
   somebody waits for it, a handler runs in a task of its own and shields.
4. A stale socket file is removed only if nothing answers on it.
5. An exception of a handler other than BitmapdError and OSError is a mistake of the program: it
   goes to the loop's exception handler, which ends the process (`lastresort`).
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from bitmapd.control.events import EventLog, Fields
from bitmapd.control.places import Places
from bitmapd.control.protocol import (
    MAX_LINE_BYTES,
    Json,
    decode_request,
    encode_error,
    encode_event,
    encode_result,
)
from bitmapd.errors import BitmapdError, BusyError, PermissionError_, UsageError, explain
from bitmapd.net.sockets import UnixListener, listen_unix, peer_credentials

CONNECTION_LIMIT = 64
LASTING_LIMIT = 32
STOP_LIMIT = 16
IDLE_TIMEOUT_S = 30.0
REQUEST_TIMEOUT_S = 5.0
SEND_TIMEOUT_S = 10.0
FOLLOW_EVENTS = 1000

Progress = Callable[[Mapping[str, Json]], Awaitable[None]]
Handler = Callable[[dict[str, Json], Progress], Awaitable[Json]]


class _ClientGone(Exception):
    """The client has closed the connection or does not read from it."""


class _OutOfTurn(Exception):
    """The client has sent something before its request was answered."""


def _report(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        context = {"message": "a control verb failed", "exception": error, "task": task}
        task.get_loop().call_exception_handler(context)


class ControlServer:
    """See the module docstring.  All methods are called on the loop's thread."""

    def __init__(
        self,
        path: Path,
        handlers: Mapping[str, Handler],
        *,
        connection_limit: int = CONNECTION_LIMIT,
        lasting_limit: int = LASTING_LIMIT,
        stop_limit: int = STOP_LIMIT,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
        send_timeout_s: float = SEND_TIMEOUT_S,
    ) -> None:
        self.path = path
        self._handlers = handlers
        self._idle_timeout_s = idle_timeout_s
        self._request_timeout_s = request_timeout_s
        self._send_timeout_s = send_timeout_s
        self._server: asyncio.Server | None = None
        self._listener: UnixListener | None = None
        self._connections: set[asyncio.Task[Any]] = set()
        self._places: Places[asyncio.Task[Any]] = Places(
            connection_limit, lasting_limit, stop_limit
        )
        self._closing = False

    async def start(self) -> None:
        self._listener = listen_unix(self.path)
        # The first byte of a line is read by itself.
        self._server = await asyncio.start_unix_server(
            self._connected, sock=self._listener.sock, limit=MAX_LINE_BYTES - 1
        )

    async def close(self, grace_s: float = 2.0) -> None:
        """Stop listening and end all connections; answers under way get `grace_s`.

        Not to be awaited inside a handler, which would wait for itself.
        """
        self._closing = True
        if self._server is None or self._listener is None:
            return
        self._server.close()
        for task in self._connections:
            if not self._places.running(task):
                task.cancel()
        if self._connections:
            await asyncio.wait(self._connections, timeout=grace_s)
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        self._listener.unlink()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a connection is served outside of a task")
        self._connections.add(task)
        task.add_done_callback(_report)
        # `drain` then waits for all of an answer, and `close` has nothing left to send.
        writer.transport.set_write_buffer_limits(high=0)
        try:
            try:
                self._admit(task, writer.get_extra_info("socket"))
            except BitmapdError as refusal:
                await self._send(writer, encode_error(refusal))
                return
            while not self._closing and await self._one(task, reader, writer):
                pass
        except _ClientGone:
            return
        except asyncio.CancelledError:
            if not self._closing:
                raise
        finally:
            self._connections.remove(task)
            self._places.leave(task)
            writer.close()

    def _admit(self, task: asyncio.Task[Any], sock: socket.socket) -> None:
        _pid, uid = peer_credentials(sock)
        if uid not in (0, os.geteuid()):
            raise PermissionError_(f"user {uid} may not control this volume")
        gone = self._places.enter(task)
        if gone is not None:
            gone.cancel()

    async def _one(
        self,
        task: asyncio.Task[Any],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        """Serve one request; whether another may follow on this connection."""
        try:
            async with asyncio.timeout(self._idle_timeout_s):
                line = await reader.readexactly(1)
            if line != b"\n":
                async with asyncio.timeout(self._request_timeout_s):
                    line += await reader.readuntil(b"\n")
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            return False
        except asyncio.LimitOverrunError:
            error = UsageError(f"a control message is longer than {MAX_LINE_BYTES} bytes")
            await self._send(writer, encode_error(error))
            return False
        try:
            answer, good = await self._answer(task, line, reader, writer)
            await self._send(writer, answer)
        finally:
            self._places.end(task)
        return good

    async def _answer(
        self,
        task: asyncio.Task[Any],
        line: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> tuple[bytes, bool]:
        try:
            request = decode_request(line)
        except UsageError as error:
            return encode_error(error), False
        try:
            self._places.begin(task, request.verb)
        except BusyError as error:
            return encode_error(error), True
        handler = self._handlers.get(request.verb)
        if handler is None:
            known = ", ".join(sorted(self._handlers))
            return encode_error(
                UsageError(f"unknown verb {request.verb!r}", f"one of {known}")
            ), True

        async def progress(fields: Mapping[str, Json]) -> None:
            await self._send(writer, encode_event(fields))

        try:
            return encode_result(
                await self._while_there(reader, handler(request.args, progress))
            ), True
        except _OutOfTurn:
            reason = "a request was sent before the one before it was answered"
            return encode_error(UsageError(reason)), False
        except BitmapdError as error:
            return encode_error(error), True
        except OSError as error:
            return encode_error(explain(error, f"volume '{self.path.stem}'")), True

    async def _while_there(self, reader: asyncio.StreamReader, work: Awaitable[Json]) -> Json:
        """The value of `work`, which is cancelled as soon as the client goes away."""
        working = asyncio.ensure_future(work)
        watching = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            if watching.exception() is None and watching.result():
                raise _OutOfTurn
            raise _ClientGone
        finally:
            for future in (working, watching):
                future.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)

    async def _send(self, writer: asyncio.StreamWriter, line: bytes) -> None:
        try:
            writer.write(line)
            async with asyncio.timeout(self._send_timeout_s):
                await writer.drain()
        except (TimeoutError, ConnectionError):
            writer.transport.abort()
            raise _ClientGone from None


def events_handler(log: EventLog) -> Handler:
    """The verb `events`: what the ring holds and then, unless `now`, what comes."""

    async def events(args: dict[str, Json], progress: Progress) -> Json:
        coming: asyncio.Queue[Fields] = asyncio.Queue(FOLLOW_EVENTS)
        lost = 0

        def take(entry: Fields) -> None:
            nonlocal lost
            try:
                coming.put_nowait(entry)
            except asyncio.QueueFull:
                lost += 1

        past = log.recent()
        unsubscribe = log.subscribe(take)
        try:
            for entry in past:
                await progress(entry)
            while not args.get("now", False):
                await progress(await coming.get())
                if lost and coming.empty():
                    await progress({"event": "events-lost", "count": lost})
                    lost = 0
            return {"events": len(past)}
        finally:
            unsubscribe()

    return events
