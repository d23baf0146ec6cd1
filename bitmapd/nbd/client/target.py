"""`NbdTarget`: an export of any NBD server as a secondary (edge).

1. It keeps the contract of `media.base.Device`: one `done` for each operation, never from inside
   the submitting call, EINVAL for a range that is not one, ENOTCONN while there is no link.
2. It asks of the server what it offers and nothing else.  Too long requests are split; without
   WRITE_ZEROES zeros are written, without TRIM nothing is done, without FUA a flush follows.
   A read-only export, or one without flush, cannot be a secondary: `open` fails.
3. TLS, where it is wanted, is wanted of every connection; there is no way back to clear text.
4. It never connects by itself.  Whoever uses it sees ENOTCONN (or the reason of the loss), and
   calls `open` again when it sees fit.  Size and abilities are those of the newest `open`.
5. Several connections are used only if the server says that a flush on one covers all of them.
   A server that refuses, or does not answer, one more is used with those that there are.  They
   are one link: the loss of one is the loss of all.

Messages begin with the URI.  They hold nothing secret.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import ssl
from collections.abc import Callable
from pathlib import Path

from bitmapd.errors import BitmapdError, Unanswered, UsageError
from bitmapd.media.base import AllocationDone, Done
from bitmapd.nbd.client.connect import TlsSettings, connect, tls_reason
from bitmapd.nbd.client.handshake import (
    SECTOR_BYTES,
    Refused,
    ServerExport,
    check_secondary,
)
from bitmapd.nbd.client.pipeline import Pipeline
from bitmapd.nbd.client.replies import InFlight
from bitmapd.nbd.numbers import Cmd, CmdFlag, ExportFlag
from bitmapd.nbd.wire import ProtocolError
from bitmapd.net.uri import NbdUri

DEFAULT_TIMEOUT_S = 30.0
# Block status carries no data, so the largest block does not bind it; servers look at a file as far
# as they are asked to, hence not without a limit.
MAX_STATUS_BYTES = 1 << 30
MAX_CONNECTIONS = 16

# Plain integers: enum attributes would be a good part of a request's cost.
_READ, _WRITE, _FLUSH, _TRIM = int(Cmd.READ), int(Cmd.WRITE), int(Cmd.FLUSH), int(Cmd.TRIM)
_WRITE_ZEROES, _BLOCK_STATUS = int(Cmd.WRITE_ZEROES), int(Cmd.BLOCK_STATUS)
# How long a connection beyond the first may take; without it, there are fewer.
MORE_TIMEOUT_S = 3.0

_FUA = int(CmdFlag.FUA)

_ZEROS_BYTES = 1 << 20


@functools.cache
def _zeros() -> memoryview:
    """For servers that know no write zeroes; locked memory of a process that needs it."""
    return memoryview(bytes(_ZEROS_BYTES))


class NbdTarget:
    """A `Target`; see the module docstring."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        uri: NbdUri,
        *,
        tls_certificates: Path | None = None,
        connections: int = 1,
        kick: Callable[[], None] | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """`tls_certificates` demands TLS whatever the scheme; a folder that the URI names goes
        before it.  `kick` is called after each batch of replies."""
        folder = Path(uri.tls_certificates) if uri.tls_certificates else tls_certificates
        if uri.tls and folder is None:
            raise UsageError(
                f"{uri} needs TLS, but no certificates were given",
                hint="set tls-certificates to a folder with ca-cert.pem and the client's pair",
            )
        if not 1 <= connections <= MAX_CONNECTIONS:
            raise UsageError(f"{connections} connections are not between 1 and {MAX_CONNECTIONS}")
        self.name = str(uri)
        self.size_bytes = 0
        self.block_size_bytes = SECTOR_BYTES
        self._loop = loop
        self._uri = uri
        self._tls: TlsSettings | None = None
        if folder is not None:
            self._tls = TlsSettings(folder, uri.tls_hostname or uri.host)
        self._connections = connections
        self._kick = kick
        self._timeout_s = timeout_s
        self._pipelines: list[Pipeline] = []
        self._turn = 0
        self._opening: asyncio.Task[None] | None = None
        self._loss = "not connected"
        self._use(ServerExport(0, 0))

    # -- life -----------------------------------------------------------------------------
    @property
    def writes_late(self) -> bool:
        """A server goes on with what it had received when its client is gone."""
        return True

    def lands_late(self, error: OSError) -> bool:
        return isinstance(error, Unanswered)

    @property
    def takes_many(self) -> bool:
        return self._can_many

    @property
    def connected(self) -> bool:
        return bool(self._pipelines)

    @property
    def in_flight(self) -> int:
        """Requests that the server has not answered yet."""
        return sum(link.in_flight for link in self._pipelines)

    def open(self, done: Done) -> None:
        """Connect, or connect again; an older link is given up.  Resolving, connecting and the
        handshake have `timeout_s` for each address and connection."""
        if self._opening is not None:
            self._fail(done, errno.EALREADY, "is being opened already")
            return
        self._lose(OSError(errno.ENOTCONN, f"{self.name}: opened again"))
        self._opening = self._loop.create_task(self._open_all())
        self._opening.add_done_callback(lambda task: self._opened(task, done))

    def _opened(self, task: asyncio.Task[None], done: Done) -> None:
        self._opening = None
        if task.cancelled():
            done(self._error(errno.ECANCELED, "closed while it was being opened"))
            return
        problem = task.exception()
        if problem is None:
            done(None)
        elif isinstance(problem, Refused):
            done(self._error(problem.number, str(problem)))
        elif isinstance(problem, ProtocolError):
            done(self._error(errno.EPROTO, f"the server broke the protocol: {problem}"))
        elif isinstance(problem, BitmapdError):
            done(self._error(errno.EACCES, problem.message))
        elif isinstance(problem, ssl.SSLError):
            # Its numbers are those of OpenSSL.
            done(self._error(errno.EPROTO, f"TLS failed: {tls_reason(problem)}"))
        elif isinstance(problem, TimeoutError) and problem.errno is None:
            done(self._error(errno.ETIMEDOUT, f"no answer within {self._timeout_s:g} s"))
        elif isinstance(problem, OSError):
            done(self._error(problem.errno or errno.EIO, problem.strerror or str(problem)))
        else:
            done(self._error(errno.EIO, f"cannot be opened: {problem!r}"))
            raise problem

    async def _open_all(self) -> None:
        links: list[Pipeline] = []
        try:
            links.append(await self._open_one(self._timeout_s))
            export = links[0].export
            while len(links) < self._connections and export.has(ExportFlag.CAN_MULTI_CONN):
                try:
                    link = await self._open_one(min(self._timeout_s, MORE_TIMEOUT_S))
                except OSError:
                    break  # one client too many for the server, which may also let it wait
                links.append(link)
                if link.export != export:
                    raise Refused(errno.EPROTO, "the export differs between two connections")
            if any(link.lost for link in links):
                raise ConnectionResetError(errno.ECONNRESET, "the server closed the connection")
        except BaseException:
            for link in links:
                link.close()
            raise
        self._use(links[0].export)
        self._pipelines = links

    async def _open_one(self, timeout_s: float) -> Pipeline:
        connection, export = await connect(self._loop, self._uri, self._tls, timeout_s)
        link = Pipeline(
            self._loop, connection, export, self.name, self._timeout_s, self._lose, self._kick
        )
        try:
            check_secondary(export)
        except BaseException:
            link.close()
            raise
        return link

    def _use(self, export: ServerExport) -> None:
        block = max(SECTOR_BYTES, export.minimum_bytes)
        self.block_size_bytes = block
        self.size_bytes = export.size_bytes & -block
        self._maximum_bytes = export.maximum_bytes & -block
        self._fua_flag = _FUA if export.has(ExportFlag.SEND_FUA) else 0
        self._can_zero = export.has(ExportFlag.SEND_WRITE_ZEROES)
        self._can_fast_zero = export.has(ExportFlag.SEND_FAST_ZERO)
        self._can_trim = export.has(ExportFlag.SEND_TRIM)
        self._can_many = export.has(ExportFlag.CAN_MULTI_CONN)
        self._can_tell_allocation = export.allocation_id is not None

    def close(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
        links, self._pipelines = self._pipelines, []
        for link in links:
            link.close()
        self._loss = "closed"

    def _lose(self, error: OSError) -> None:
        """Called by a link that is lost, and for all when one is."""
        links, self._pipelines = self._pipelines, []
        if links:
            reason = (error.strerror or str(error)).removeprefix(f"{self.name}: ")
            self._loss = f"not connected ({reason})"
        for link in links:
            link.lose(error)

    # -- data -----------------------------------------------------------------------------
    def read(self, offset_bytes: int, buffer: memoryview, done: Done) -> None:
        length = len(buffer)
        if self._refuses(offset_bytes, length, done):
            return
        if length <= self._maximum_bytes:
            self._submit(_READ, 0, InFlight(0, _READ, offset_bytes, length, done, buffer))
            return
        step = self._maximum_bytes
        group = _Group(done, -(-length // step))
        for at in range(0, length, step):
            piece = buffer[at : at + step]
            request = InFlight(0, _READ, offset_bytes + at, len(piece), group.one_done, piece)
            self._submit(_READ, 0, request)

    def write(self, offset_bytes: int, buffer: memoryview, done: Done, fua: bool = False) -> None:
        length = len(buffer)
        if self._refuses(offset_bytes, length, done):
            return
        flags, done = self._durable(fua, done)
        if length <= self._maximum_bytes:
            self._submit(_WRITE, flags, InFlight(0, _WRITE, offset_bytes, length, done), buffer)
            return
        step = self._maximum_bytes
        group = _Group(done, -(-length // step))
        for at in range(0, length, step):
            piece = buffer[at : at + step]
            request = InFlight(0, _WRITE, offset_bytes + at, len(piece), group.one_done)
            self._submit(_WRITE, flags, request, piece)

    def zero(
        self,
        offset_bytes: int,
        length_bytes: int,
        done: Done,
        *,
        fua: bool = False,
        unmap: bool = True,
        fast: bool = False,
    ) -> None:
        if self._refuses(offset_bytes, length_bytes, done):
            return
        if fast and not self._can_fast_zero:
            self._fail(done, errno.EOPNOTSUPP, "the server cannot promise fast zeroing")
            return
        flags, done = self._durable(fua, done)
        if self._can_zero:
            flags |= 0 if unmap else int(CmdFlag.NO_HOLE)
            flags |= int(CmdFlag.FAST_ZERO) if fast else 0
            self._in_steps(_WRITE_ZEROES, flags, offset_bytes, length_bytes, done)
            return
        step = min(self._maximum_bytes, _ZEROS_BYTES)
        group = _Group(done, -(-length_bytes // step))
        for at in range(0, length_bytes, step):
            piece = _zeros()[: min(step, length_bytes - at)]
            request = InFlight(0, _WRITE, offset_bytes + at, len(piece), group.one_done)
            self._submit(_WRITE, flags, request, piece)

    def trim(self, offset_bytes: int, length_bytes: int, done: Done, *, fua: bool = False) -> None:
        if self._refuses(offset_bytes, length_bytes, done):
            return
        if not self._can_trim:
            # A hint; leaving the content as it is keeps to the contract.
            self._loop.call_soon(done, None)
            return
        flags, done = self._durable(fua, done)
        self._in_steps(_TRIM, flags, offset_bytes, length_bytes, done)

    def flush(self, done: Done) -> None:
        if not self._pipelines:
            self._fail(done, errno.ENOTCONN, self._loss)
            return
        self._submit(_FLUSH, 0, InFlight(0, _FLUSH, 0, 0, done))

    def allocation(self, offset_bytes: int, length_bytes: int, done: AllocationDone) -> None:
        if self._refuses(offset_bytes, length_bytes, lambda error: done(error, [])):
            return
        if not self._can_tell_allocation:
            self._loop.call_soon(done, None, [(length_bytes, 0)])
            return

        def told(error: OSError | None) -> None:
            done(error, request.descriptors if error is None else [])

        length = min(length_bytes, MAX_STATUS_BYTES)
        request = InFlight(0, _BLOCK_STATUS, offset_bytes, length, told)
        self._submit(_BLOCK_STATUS, 0, request)

    # -- helpers --------------------------------------------------------------------------
    def _submit(
        self, command: int, flags: int, request: InFlight, payload: memoryview | None = None
    ) -> None:
        links = self._pipelines
        if len(links) == 1:
            links[0].submit(command, flags, request, payload)
            return
        self._turn = turn = (self._turn + 1) % len(links)
        links[turn].submit(command, flags, request, payload)

    def _in_steps(
        self, command: int, flags: int, offset_bytes: int, length_bytes: int, done: Done
    ) -> None:
        """Requests without data, of any length; short ones also stay within the time-out."""
        step = self._maximum_bytes
        group = _Group(done, -(-length_bytes // step))
        for at in range(0, length_bytes, step):
            length = min(step, length_bytes - at)
            self._submit(
                command, flags, InFlight(0, command, offset_bytes + at, length, group.one_done)
            )

    def _durable(self, fua: bool, done: Done) -> tuple[int, Done]:
        """The command flag for `fua`, or a `done` that flushes first."""
        if not fua:
            return 0, done
        if self._fua_flag:
            return self._fua_flag, done

        def written(error: OSError | None) -> None:
            if error is None:
                self.flush(done)
            else:
                done(error)

        return 0, written

    def _refuses(self, offset_bytes: int, length_bytes: int, done: Done) -> bool:
        """Whether an operation cannot even begin; `done` is then on its way."""
        if not self._pipelines:
            self._fail(done, errno.ENOTCONN, self._loss)
            return True
        end = offset_bytes + length_bytes
        if (
            offset_bytes < 0
            or length_bytes <= 0
            or end > self.size_bytes
            or (offset_bytes | length_bytes) & (self.block_size_bytes - 1)
        ):
            self._fail(
                done,
                errno.EINVAL,
                f"{length_bytes} bytes at {offset_bytes} are not whole blocks of"
                f" {self.block_size_bytes} inside {self.size_bytes} bytes",
            )
            return True
        return False

    def _error(self, number: int, text: str) -> OSError:
        return OSError(number, f"{self.name}: {text or os.strerror(number)}")

    def _fail(self, done: Done, number: int, text: str) -> None:
        self._loop.call_soon(done, self._error(number, text))


class _Group:
    """Calls `done` once, after `count` parts are done, with the first error if there was any; one
    that leaves open what becomes of its part goes before the others."""

    __slots__ = ("_count", "_done", "_error")

    def __init__(self, done: Done, count: int) -> None:
        self._done = done
        self._count = count
        self._error: OSError | None = None

    def one_done(self, error: OSError | None) -> None:
        if self._error is None or isinstance(error, Unanswered):
            self._error = error
        self._count -= 1
        if self._count == 0:
            self._done(self._error)
