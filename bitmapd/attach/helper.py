"""The bitmapd end of the wiring helper: starts it, asks it, replaces it when it dies (edge).

The helper (`dmctl.kernel.helper`) is the only process that changes the kernel's tables.  bitmapd
never waits in a system call for the kernel's tables, so it can always serve the requests that a
suspend waits for.

1. One request at a time; each call ends with an answer, a HelperError, or the helper's death.
2. A helper that dies is replaced at once, whatever else goes on, and again until one has the
   volume: the new one learns what it is for (`hello`) and resumes whatever of the volume it finds
   suspended.  One that only makes connections suspends nothing, and is replaced at the next call.
3. The helper ends when its socket reaches end of file, so it never outlives this process for long.
   One that does not is killed after `GRACE_S`.
4. Nothing here waits for a process: its end is an event of the loop.
"""

from __future__ import annotations

import array
import asyncio
import os
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
GRACE_S = 0.5
AGAIN_S = 1.0  # between two attempts to replace a helper
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
        suspends: bool = True,
    ) -> None:
        """`hello`: what the helper is to know of the volume, sent to each one that is started with
        these options.  `suspends`: whether it may leave something suspended."""
        self._options = options
        self._suspends = suspends
        self._replacing: asyncio.Task[None] | None = None
        self._closed = False
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
        try:
            async with self._turn:
                if self._sock is None:
                    await self._start()
                return await self._ask(verb, fields or {}, fds, timeout_s)
        finally:
            self._notice()

    async def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            ours.setblocking(False)
            command = [sys.executable, "-P", "-m", HELPER_MODULE, *self._options]
            command += ["--fd", str(theirs.fileno())]
            process = subprocess.Popen(
                command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, cwd="/"
            )
            try:
                pidfd = os.pidfd_open(process.pid)
            except OSError:
                process.kill()
                raise
        except OSError as error:
            ours.close()
            raise HelperError("EAGAIN", f"cannot start the wiring helper: {error}") from error
        finally:
            theirs.close()
        self._loop.add_reader(pidfd, self._ended, process, pidfd)
        self._process = process
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

    def _ended(self, process: subprocess.Popen[bytes], pidfd: int) -> None:
        self._loop.remove_reader(pidfd)
        os.close(pidfd)
        process.wait()  # it has ended
        self._notice()

    def _notice(self) -> None:
        """That the helper has ended; a call under way reads the end of its stream instead."""
        process = self._process
        if process is not None and process.returncode is not None and not self._turn.locked():
            self._lost("", EOFError(f"status {process.returncode}, between two requests"))

    def _lost(self, verb: str, error: BaseException) -> None:
        self.deaths += 1
        self._emit("helper-died", verb=verb, message=f"the wiring helper ended: {error}")
        self._let_go()
        if self._suspends and not self._closed and self._replacing is None:
            self._replacing = self._loop.create_task(self._replace())

    async def _replace(self) -> None:
        while True:
            try:
                await self.call("awake")
            except HelperError:
                await asyncio.sleep(AGAIN_S)
            else:
                self._replacing = None
                return

    def _let_go(self) -> None:
        """End the helper; it resumes what it may have suspended unless it has to be killed."""
        if self._sock is not None:
            # A call may wait for it: the loop would keep its number, and refuse the next with it.
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
            self._sock.close()
            self._sock = None
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            self._loop.call_later(GRACE_S, _kill, process)

    def close(self) -> None:
        self._closed = True
        if self._replacing is not None:
            self._replacing.cancel()
        self._let_go()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Unless it has ended and was waited for."""
    if process.returncode is None:
        process.kill()
