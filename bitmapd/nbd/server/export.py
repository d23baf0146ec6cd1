"""The NBD export of one volume: admission, batches, limits.

One thread, one loop, raw non-blocking sockets.  When a socket is readable, everything that one
receive brings is parsed and handed to the export, `kick` submits it to the disk in one batch and
completes what is finished, and the answers of the batch leave in one `sendmsg` for each
connection.  Then the same socket is polled for a moment while that pays (`nbd.spin`).  Answers to
completions outside of a batch leave together: at `flush_replies`, which belongs into the disk
engine's `after_reap`, or at the loop's next turn.

1. A client is let in only when no request of a connection that has died is still at the disk, and
   no connection whose client has hung up has unread requests.  So a client that comes back finds
   all its earlier writes either done or never to be done.  A connection that the network has cut
   without the server's knowledge cannot be told from a live one.
2. At most `max_connections` are open.  When they are used up, `places` says who makes room; if
   nobody does, the new one is closed at once.
3. What newcomers cost cannot hold up those who were let in: accepting has its share of the thread
   (`listeners`), each turn reads at most 4 KiB of a handshake, and the arithmetic of TLS is done by
   a thread that works without the interpreter's lock (`tls_worker`).  All else stays on this
   thread on purpose: two threads of Python make each other wait for that lock, 5 ms at a time.
4. Buffers come from the pool only, in the order of asking (`memory`); a client that holds some
   without making progress is dropped when somebody waits for them.
5. Shutdown waits for the disk up to a time-out and never for a client.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import ssl
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitmapd.errors import UsageError
from bitmapd.media.base import Export
from bitmapd.media.buffers import BufferPool
from bitmapd.media.lost import LostWrites
from bitmapd.nbd.server.connection import Connection, Phase
from bitmapd.nbd.server.handshake import ServerHandshake, ServerOffer, TlsMode
from bitmapd.nbd.server.hub import ConnectionLimits, ServerStats
from bitmapd.nbd.server.listeners import Listeners
from bitmapd.nbd.server.memory import Memory
from bitmapd.nbd.server.places import Peer, Standing, gives_way
from bitmapd.nbd.server.spin import DEVICE_SPIN_S, RUN_S, SPIN_S, SpinPolicy
from bitmapd.nbd.server.tls_worker import TlsWorker

MAX_CONNECTIONS = 64
_SWEEP_S = 1.0
_REPORT_S = 60.0
_REPORTED_PEERS = 256
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)


class NbdServer:
    """See the module docstring.  All methods are called on the loop's thread."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        export: Export,
        pool: BufferPool,
        kick: Callable[[], None],
        *,
        export_name: str,
        description: str,
        tls: ssl.SSLContext | None,
        emit: Callable[..., Any],
        read_only: bool = False,
        cork: Callable[[], None] = lambda: None,
        may_spin: Callable[[], bool] = lambda: True,
        busy_poll: bool = True,
        limits: ConnectionLimits | None = None,
        max_connections: int = MAX_CONNECTIONS,
        lost_writes: LostWrites | None = None,
    ) -> None:
        """`kick` submits what the export has queued and runs the completions that are there;
        `cork` promises a `kick` to come.  `may_spin` says whether the loop has nothing else to do
        that a moment of polling would delay."""
        self.loop = loop
        self.export = export
        self.limits = limits or ConnectionLimits()
        self.stats = ServerStats()
        self.lost_writes = lost_writes or LostWrites()
        self.give = pool.give
        self._memory = Memory(pool, self._run_batch)
        self._kick = kick
        self._cork = cork
        self._name = export_name
        self._description = description
        self._read_only = read_only
        self._tls = tls
        self._emit = emit
        self._may_spin = may_spin
        self._max_connections = max_connections
        self._spin = SpinPolicy(len(os.sched_getaffinity(0)), enabled=busy_poll)
        self._listeners = Listeners(loop, self._accepted, self._report)
        self._tls_worker: TlsWorker | None = None
        self._connections: dict[Connection, None] = {}  # oldest first
        self._adopted: dict[Connection, Callable[[], None]] = {}
        self._orphans: set[Connection] = set()
        self._at_the_door: list[Connection] = []
        self._last_active: Connection | None = None
        self._marked: list[Connection] = []
        self._in_batch = False
        self._flush_scheduled = False
        self._sweeper: asyncio.TimerHandle | None = None
        self._reported: OrderedDict[str, tuple[float, int]] = OrderedDict()
        self._quiet: asyncio.Future[None] | None = None

    # -- listening ----------------------------------------------------------------------
    def listen_unix(self, path: str | Path, mode: int = 0o600, *, tls: bool = False) -> None:
        """Raises a BitmapdError if the path cannot be used."""
        if tls and self._tls is None:
            raise UsageError("TLS was asked for without certificates", hint="set tls-certificates")
        self._prepare(tls)
        self._listeners.unix(Path(path), mode, tls=tls)

    def listen_tcp(self, host: str, port: int) -> list[tuple[str, int]]:
        """Listen on all addresses of the host, with TLS if there is a context.  Returns addresses
        and ports.  Raises a BitmapdError, also if an address would be open to the network without
        TLS.  Blocks for name resolution: to be called before anything is served."""
        self._prepare(self._tls is not None)
        return self._listeners.tcp(host, port, tls=self._tls is not None)

    def _prepare(self, tls: bool) -> None:
        if tls and (self._tls_worker is None or self._tls_worker.closed):
            self._tls_worker = TlsWorker(self.loop)

    def tls_worker(self) -> TlsWorker:
        if self._tls_worker is None:
            raise RuntimeError("TLS without a listener that asks for it")
        return self._tls_worker

    def close_listeners(self) -> None:
        """Nobody is accepted any more, and no TLS handshake goes on."""
        self._listeners.close()
        if self._tls_worker is not None:
            self._tls_worker.close()

    @property
    def export_name(self) -> str:
        return self._name

    def adopt(self, sock: socket.socket, peer: str, on_closed: Callable[[], None]) -> None:
        """Serve a local client whose connected socket is handed in; it begins with a handshake.

        `on_closed`: called when this connection has ended, unless `drain` ends it.
        """
        connection = self._welcome(sock, Peer(peer, peer, is_trusted=True), tls=False)
        if connection is None:
            self.loop.call_soon(on_closed)
        else:
            self._adopted[connection] = on_closed

    def _accepted(self, sock: socket.socket, peer: Peer, tls: bool) -> None:
        self._welcome(sock, peer, tls=tls)

    def _welcome(self, sock: socket.socket, peer: Peer, *, tls: bool) -> Connection | None:
        self.stats.connections_total += 1
        if len(self._connections) >= self._max_connections and not self._make_room(peer):
            sock.close()
            return None
        try:
            sock.setblocking(False)
            if peer.is_remote:
                for level, option, value in _KEEPALIVE:
                    sock.setsockopt(level, option, value)
        except OSError:
            sock.close()
            return None
        handshake = ServerHandshake(self._offer(), TlsMode.REQUIRED if tls else TlsMode.OFF)
        connection = Connection(self, sock, peer, handshake, self._tls)
        self._connections[connection] = None
        self.stats.connections = len(self._connections)
        if self._sweeper is None:
            self._sweeper = self.loop.call_later(_SWEEP_S, self._sweep)
        return connection

    def _make_room(self, peer: Peer) -> bool:
        gone = self._gone_from_the_door()
        guests = (
            (one, one.peer.origin, Standing.GONE if one.fileno() in gone else one.standing)
            for one in self._connections
        )
        leaving = gives_way(guests, peer.origin)
        if leaving is not None:
            leaving.refuse("a newer client needed the place")
            return True
        self.stats.refused_total += 1
        self._report(peer, f"{self._max_connections} clients are connected already")
        return False

    def _gone_from_the_door(self) -> set[int]:
        """Descriptors of those that have hung up while they waited to be let in."""
        poll = select.poll()
        for connection in self._at_the_door:
            poll.register(connection.fileno(), select.POLLRDHUP)
        return {fd for fd, _ in poll.poll(0)} if self._at_the_door else set()

    def _offer(self) -> ServerOffer:
        block = self.export.block_size_bytes
        return ServerOffer(
            self._name,
            self._description,
            self.export.size_bytes // block * block,
            block,
            self._read_only,
        )

    # -- letting in ---------------------------------------------------------------------
    def wants_in(self, connection: Connection) -> None:
        self._at_the_door.append(connection)
        self._let_in()

    def _let_in(self) -> None:
        if not self._at_the_door or self._old_requests_left():
            return
        entering, self._at_the_door = self._at_the_door, []
        for connection in entering:
            if connection.phase is not Phase.ADMISSION:
                continue
            self._emit(
                "client-connected",
                peer=connection.peer.name,
                certificate=connection.certificate_name,
            )
            connection.enter()

    def _old_requests_left(self) -> bool:
        if self._orphans:
            return True
        poll, serving = select.poll(), False
        for connection in self._connections:
            if connection.phase is Phase.LEAVING and connection.in_flight:
                return True
            if connection.phase is Phase.SERVING:
                # Whoever has hung up is read to the end first; its closing asks again.
                poll.register(connection.fileno(), select.POLLRDHUP)
                serving = True
        return serving and bool(poll.poll(0))

    def orphan_finished(self, connection: Connection) -> None:
        self._orphans.discard(connection)
        self._let_in()
        self._check_quiet()

    # -- batches ------------------------------------------------------------------------
    def readable(self, connection: Connection) -> None:
        alone = connection is self._last_active
        self._last_active = connection
        self._in_batch = True
        self._cork()
        try:
            received = connection.receive()
        finally:
            self._settle()
        if alone and received and connection.spins and self._spin.wanted() and self._may_spin():
            self._poll(connection)

    def writable(self, connection: Connection) -> None:
        self._run_batch(connection.writable)

    def mark(self, connection: Connection) -> None:
        self._marked.append(connection)
        if not self._in_batch and not self._flush_scheduled:
            self._flush_scheduled = True
            self.loop.call_soon(self._flush_later)

    def flush_replies(self) -> None:
        """Send the answers of a round of completions; for the disk engine's `after_reap`."""
        if self._in_batch:
            return
        self._in_batch = True
        try:
            self._flush_marked()
        finally:
            self._in_batch = False

    def _flush_later(self) -> None:
        self._flush_scheduled = False
        self.flush_replies()

    def _settle(self) -> None:
        """Submit and complete, then answer, until there is nothing left to do; ends the batch."""
        try:
            self._kick()
            while self._marked:
                self._flush_marked()
                self._kick()
        finally:
            self._in_batch = False

    def _flush_marked(self) -> None:
        while self._marked:
            marked, self._marked = self._marked, []
            for connection in marked:
                connection.flush()

    def _poll(self, connection: Connection) -> None:
        """Ask the socket again instead of going through the loop, as long as that pays."""
        time = self.loop.time
        end = time() + RUN_S
        while connection.spins:
            now = time()
            give_up, patience = now + SPIN_S, now + DEVICE_SPIN_S
            self._in_batch = True
            self._cork()
            try:
                while not connection.receive():
                    self._kick()
                    if self._marked:
                        self._flush_marked()
                        give_up = time() + SPIN_S
                    limit = patience if connection.in_flight else give_up
                    if time() > limit or not connection.spins:
                        self._spin.failed()
                        return
            finally:
                self._settle()
            self._spin.worked()
            if time() > end or (connection.in_flight and not self._may_spin()):
                return

    # -- memory -------------------------------------------------------------------------
    def take(self, connection: Connection, length_bytes: int) -> memoryview | None:
        return self._memory.take(connection, length_bytes)

    def others_wait(self, connection: Connection) -> bool:
        return bool(self._at_the_door) or self._memory.others_wait(connection)

    def _run_batch(self, work: Callable[[], None]) -> None:
        self._in_batch = True
        self._cork()
        try:
            work()
        finally:
            self._settle()

    # -- leaving ------------------------------------------------------------------------
    def refused(self, connection: Connection, reason: str) -> None:
        self.stats.refused_total += 1
        self._report(connection.peer, reason)

    def closed(self, connection: Connection, reason: str | None) -> None:
        self._connections.pop(connection, None)
        self.stats.connections = len(self._connections)
        if connection is self._last_active:
            self._last_active = None
        if connection.in_flight:
            self._orphans.add(connection)
        if connection in self._at_the_door:
            self._at_the_door.remove(connection)
        if self._memory.leave(connection):
            self.loop.call_soon(self._memory.serve)
        if connection.was_let_in:
            self._emit("client-disconnected", peer=connection.peer.name)
        if reason is not None:
            self._report(connection.peer, reason)
        on_closed = self._adopted.pop(connection, None)
        if on_closed is not None and self._quiet is None:
            on_closed()
        self._let_in()
        self._check_quiet()

    def _sweep(self) -> None:
        """Once a second while there are connections: drop those that are overdue."""
        self._sweeper = None
        now = self.loop.time()
        for connection in list(self._connections):
            reason = connection.overdue(now)
            if reason is None:
                continue
            if connection.phase in (Phase.HANDSHAKE, Phase.TLS):
                connection.refuse(reason)
            else:
                connection.close(reason)
        if self._connections:
            self._sweeper = self.loop.call_later(_SWEEP_S, self._sweep)

    def _report(self, peer: Peer, reason: str) -> None:
        """Emit an event, for one origin at most once a minute: a client must not fill the log."""
        who = peer.origin
        now = self.loop.time()
        last, held_back = self._reported.pop(who, (-_REPORT_S, 0))
        if now - last < _REPORT_S:
            self._reported[who] = (last, held_back + 1)
            return
        self._reported[who] = (now, 0)
        if len(self._reported) > _REPORTED_PEERS:
            self._reported.popitem(last=False)
        self._emit("client-dropped", peer=peer.name, reason=reason, held_back=held_back)

    async def drain(self, timeout_s: float) -> bool:
        """Accept nobody, finish the requests that were received, answer them, close.  False if
        requests were still at the disk, or answers not taken, when the time was up.  Afterwards it
        may listen and adopt again."""
        self.close_listeners()
        self._quiet = quiet = self.loop.create_future()
        for connection in list(self._connections):
            connection.drain()
        self.flush_replies()
        self._check_quiet()
        try:
            async with asyncio.timeout(timeout_s):
                await quiet
            finished = True
        except TimeoutError:
            finished = False
        for connection in list(self._connections):
            connection.close()
        self._quiet = None
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        return finished

    def _check_quiet(self) -> None:
        quiet = self._quiet
        if quiet is not None and not quiet.done() and not self._connections and not self._orphans:
            quiet.set_result(None)
