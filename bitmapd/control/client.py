"""The client of a volume's control socket: synchronous, for the command line.

`ControlClient.call` sends one request and returns its result or raises the error that the server
sent, with its class.  A volume that does not run is `WrongStateError`: no socket, or a socket that
nobody listens on.

1. `timeout_s` is the time without any sign of life, which every event begins anew: a verb that
   lasts sends some twice a second.  `SilentError` says that the process does not answer.
2. `within_s` bounds the whole call, with a `TimeOutError` that is no `SilentError` if a sign of
   life came within the last `SIGN_S`: the process is at work.
3. A connection that ends before the answer is `BitmapdError`: nobody knows what became of the
   request.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bitmapd.control.protocol import (
    Answer,
    Failure,
    Json,
    LineBuffer,
    Result,
    decode_answer,
    encode_request,
)
from bitmapd.errors import BitmapdError, PermissionError_, TimeOutError, WrongStateError

CONNECT_TIMEOUT_S = 5.0
POLL_S = 0.02
SIGN_S = 2.0  # a verb that lasts sends four signs of life meanwhile
SILENCE_S = 15.0  # more than a loaded machine keeps a living process from saying a word


class SilentError(TimeOutError):
    """A process is there, and does not answer."""


class EndedError(BitmapdError):
    """The process closed the connection before it answered: most often it ended just then."""


class ControlClient:
    """One connection; a context manager."""

    def __init__(self, path: Path, volume: str, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        self._volume = volume
        self._buffer = LineBuffer()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        try:
            self._connect(path, time.monotonic() + timeout_s)
        except OSError as error:
            self._socket.close()
            raise self._cannot_connect(error, path) from None

    def _connect(self, path: Path, deadline_s: float) -> None:
        while True:
            try:
                self._socket.connect(str(path))
                return
            except BlockingIOError:
                # unix(7): the queue of the listener is full, and nobody tells when it has room.
                if time.monotonic() >= deadline_s:
                    raise
                select.select([], [], [], POLL_S)

    def _cannot_connect(self, error: OSError, path: Path) -> BitmapdError:
        if isinstance(error, FileNotFoundError | ConnectionRefusedError):
            return WrongStateError(
                f"volume '{self._volume}' is not running",
                hint=f"start it with 'dmctl start {self._volume}'",
            )
        if isinstance(error, PermissionError):
            return PermissionError_(
                f"this user may not control volume '{self._volume}' ({path})",
                hint="be root, or the user that runs bitmapd",
            )
        if isinstance(error, TimeoutError | BlockingIOError):
            return self._timed_out("accept a connection")
        return BitmapdError(f"cannot connect to {path}: {error.strerror or error}")

    def _timed_out(self, what: str) -> SilentError:
        return SilentError(
            f"bitmapd of volume '{self._volume}' did not {what} in time",
            hint=f"'dmctl stop {self._volume} --kill' ends it as a crash would, and loses nothing",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def socket(self) -> socket.socket:
        return self._socket

    def call(
        self,
        verb: str,
        args: dict[str, Json] | None = None,
        *,
        timeout_s: float = SILENCE_S,
        within_s: float | None = None,
        on_event: Callable[[dict[str, Json]], object] | None = None,
    ) -> Any:
        """The verb's result; `on_event` is called with every event before it."""
        heard_s = time.monotonic()
        deadline_s = float("inf") if within_s is None else heard_s + within_s
        self.send(verb, args)
        while (answers := self._receive_by(timeout_s, deadline_s, heard_s)) is not None:
            heard_s = time.monotonic()
            for answer in answers:
                if isinstance(answer, Result):
                    return answer.value
                if isinstance(answer, Failure):
                    raise answer.error
                if on_event is not None:
                    on_event(answer.fields)
        raise EndedError(
            f"bitmapd of volume '{self._volume}' ended the connection without an answer",
            hint="its log says why",
        )

    def send(self, verb: str, args: dict[str, Json] | None = None) -> None:
        try:
            self._socket.sendall(encode_request(verb, args or {}))
        except TimeoutError:
            raise self._timed_out("take a request") from None
        except ConnectionError:
            # A server that refuses a client says why before it closes; `receive` finds that.
            return

    def _receive_by(
        self, timeout_s: float, deadline_s: float, heard_s: float
    ) -> list[Answer] | None:
        left_s = deadline_s - time.monotonic()
        if left_s > 0:
            self._socket.settimeout(max(0.001, min(timeout_s, left_s)))
            try:
                return self.receive()
            except SilentError:
                if timeout_s <= left_s or time.monotonic() - heard_s >= SIGN_S:
                    raise
        raise TimeOutError(f"volume '{self._volume}' is still at work, and the time is over")

    def receive(self) -> list[Answer] | None:
        """What the next bytes bring, which may be no whole answer yet; None at the end."""
        try:
            data = self._socket.recv(1 << 16)
        except TimeoutError:
            raise self._timed_out("answer") from None
        except ConnectionError:
            data = b""
        return [decode_answer(line) for line in self._buffer.feed(data)] if data else None


def ask(path: Path, volume: str, question: str, *, timeout_s: float = SILENCE_S) -> Any:
    """The answer to a verb that changes nothing.

    A process that ends between the connection and its answer is no fault of the question: asked
    once more, it says what is there now, which is `WrongStateError` if that is nothing.
    """
    try:
        return _asked(path, volume, question, timeout_s)
    except EndedError:
        return _asked(path, volume, question, timeout_s)


def _asked(path: Path, volume: str, question: str, timeout_s: float) -> Any:
    with ControlClient(path, volume) as client:
        return client.call(question, timeout_s=timeout_s)
