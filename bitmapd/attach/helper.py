"""The bitmapd end of the wiring helper: starts it, asks it, replaces it when it dies (edge).

The helper (`dmctl.kernel.helper`) is the only process that changes the kernel's tables.  bitmapd
never waits in a system call for the kernel's tables, so it can always serve the requests that a
suspend waits for.

1. One request at a time; each call ends with an answer, a HelperError, or the helper's death.
2. A helper that died is replaced at the next call.  The new one is told at once what it is for
   (`hello`) and resumes whatever of the volume it finds suspended.
3. The helper ends when its socket reaches end of file, so it never outlives this process for long.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from bitmapd.attach.helper_frames import (
    Frame,
    FrameError,
    FrameReader,
    HelperError,
    check_answer,
    encode,
)

HELPER_MODULE = "dmctl.kernel.helper"
CALL_TIMEOUT_S = 60.0
_CHUNK_BYTES = 1 << 20

Emit = Callable[..., None]


class Wiring:
    """See the module docstring.  All methods are called on the loop's thread."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        hello: dict[str, Any],
        emit: Emit,
        *options: str,
    ) -> None:
        """`hello`: what the helper is to know of the volume, sent to each one that is started with
        these options."""
        self._options = options
        self._loop = loop
        self._hello = hello
        self._emit = emit
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._reader = FrameReader()
        self._next_id = 0
        self._turn = asyncio.Lock()
        self.observed: dict[str, Any] = {}
        self.deaths = 0

    async def call(
        self,
        verb: str,
        fields: dict[str, Any] | None = None,
        *,
        fds: Sequence[int] = (),
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Frame:
        """The answer to one request; HelperError if it was refused or the helper died."""
        async with self._turn:
            if self._sock is None:
                await self._start()
            return await self._ask(verb, fields or {}, fds, timeout_s)

    async def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            ours.setblocking(False)
            command = [sys.executable, "-P", "-m", HELPER_MODULE, *self._options]
            command += ["--fd", str(theirs.fileno())]
            self._process = subprocess.Popen(
                command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, cwd="/"
            )
        except OSError as error:
            ours.close()
            raise HelperError("EAGAIN", f"cannot start the wiring helper: {error}") from error
        finally:
            theirs.close()
        self._sock, self._reader = ours, FrameReader()
        answer = await self._ask("hello", self._hello, (), CALL_TIMEOUT_S)
        self.observed = answer.header

    async def _ask(
        self, verb: str, fields: dict[str, Any], fds: Sequence[int], timeout_s: float
    ) -> Frame:
        self._next_id += 1
        number = self._next_id
        try:
            async with asyncio.timeout(timeout_s):
                await self._send(encode({"id": number, "verb": verb, **fields}), fds)
                frame = await self._receive()
            return check_answer(frame, number)
        except HelperError:
            raise
        except (OSError, FrameError, EOFError, TimeoutError) as error:
            self._lost(verb, error)
            reason = "took too long" if isinstance(error, TimeoutError) else str(error) or "ended"
            raise HelperError("EPIPE", f"the wiring helper failed at '{verb}': {reason}") from error

    async def _send(self, data: bytes, fds: Sequence[int]) -> None:
        sock = self._sock
        if sock is None:
            raise EOFError
        view = memoryview(data)
        if fds:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            view = view[sock.sendmsg([view[:1]], rights) :]
        await self._loop.sock_sendall(sock, view)

    async def _receive(self) -> Frame:
        sock = self._sock
        if sock is None:
            raise EOFError
        while True:
            data = await self._loop.sock_recv(sock, _CHUNK_BYTES)
            if not data:
                raise EOFError("the helper has ended")
            frames = self._reader.feed(data)
            if frames:
                return frames[0]

    def _lost(self, verb: str, error: BaseException) -> None:
        self.deaths += 1
        self._emit("helper-died", verb=verb, message=f"the wiring helper ended: {error}")
        self.kill()

    def kill(self) -> None:
        """End the helper; it resumes what it may have suspended unless it is killed in the act."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if self._process is not None:
            process, self._process = self._process, None
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
                return
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5.0)

    def close(self) -> None:
        self.kill()
