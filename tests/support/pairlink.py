"""The link between two nodes with somebody in the middle: it can be cut, held, or pass one way."""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

LOOK_S = 0.02


class Link:
    """Passes what comes to the socket `outer` on to the socket `inner`, until told otherwise.

    All sockets are the thread's own: one that another thread closes while select waits for it ends
    the wait with EBADF.
    """

    def __init__(self, outer: Path, inner: Path) -> None:
        self._inner = inner
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(outer))
        self._listener.listen()
        self._listener.setblocking(False)
        self._selector = selectors.SelectSelector()  # epoll waits whole milliseconds
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._ways: dict[socket.socket, tuple[socket.socket, bool]] = {}  # other end; from outer?
        self._late: list[tuple[float, socket.socket, bytes]] = []
        self._cuts: deque[Future[None]] = deque()
        self._ended = False
        self.held: set[bool] = set()  # what is not passed on: True from outer, False from inner
        self.delay_s = 0.0
        self.accepts = True
        self._thread = ThreadPoolExecutor(1)
        self._life = self._thread.submit(self._run)

    def cut(self) -> None:
        """End every connection."""
        done: Future[None] = Future()
        self._cuts.append(done)
        wait((done, self._life), return_when=FIRST_COMPLETED)
        if not done.done():
            self._life.result()
            raise AssertionError("the link has been closed")

    def close(self) -> None:
        self._ended = True
        self._thread.shutdown()
        self._drop_all()
        self._listener.close()
        self._selector.close()
        self._life.result()

    def _run(self) -> None:
        while not self._ended:
            while self._cuts:
                self._drop_all()
                self._cuts.popleft().set_result(None)
            self._send_late()
            late_s = self._late[0][0] - time.monotonic() if self._late else LOOK_S
            for key, _ in self._selector.select(max(0.0, min(late_s, LOOK_S))):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._pass(key.fileobj)  # type: ignore[arg-type]
            if self.held:
                time.sleep(LOOK_S)  # what is held stays readable

    def _accept(self) -> None:
        outer, _ = self._listener.accept()
        inner = socket.socket(socket.AF_UNIX)
        try:
            if not self.accepts:
                raise ConnectionRefusedError
            inner.connect(str(self._inner))
        except OSError:
            inner.close()
            outer.close()
            return
        for sock, other, from_outer in ((outer, inner, True), (inner, outer, False)):
            self._ways[sock] = (other, from_outer)
            self._selector.register(sock, selectors.EVENT_READ, None)

    def _pass(self, sock: socket.socket) -> None:
        if sock not in self._ways:
            return
        other, from_outer = self._ways[sock]
        if from_outer in self.held:
            return
        try:
            data = sock.recv(1 << 16)
            if not data:
                raise ConnectionResetError
            if self.delay_s or self._late:
                self._late.append((time.monotonic() + self.delay_s, other, data))
            else:
                other.sendall(data)
        except OSError:
            self._drop(sock)

    def _send_late(self) -> None:
        while self._late and self._late[0][0] <= time.monotonic():
            _, sock, data = self._late.pop(0)
            if sock in self._ways:
                try:
                    sock.sendall(data)
                except OSError:
                    self._drop(sock)

    def _drop_all(self) -> None:
        for sock in list(self._ways):
            self._drop(sock)

    def _drop(self, sock: socket.socket) -> None:
        if sock not in self._ways:
            return  # it went with the other end
        other, _ = self._ways.pop(sock)
        self._ways.pop(other, None)
        for one in (sock, other):
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(one)
            one.close()
