"""Carries out the requests of one client and puts the answers into its outbox.

1. Each request that was handed in is answered exactly once, when the export is done with it; the
   outbox gets the pieces of one answer together, and then `answered` is called.
2. A buffer handed in comes back to the pool here, except that of a successful read, which goes
   into the outbox.
3. After `abandon` nothing is answered any more, but buffers come back and `in_flight` falls.
4. A flush or FUA request succeeds only if the client has heard of every loss of cached writes
   since it was let in, whoever met it (`media.lost`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from bitmapd.media.base import Done
from bitmapd.nbd.numbers import Cmd, CmdFlag
from bitmapd.nbd.server.hub import Hub
from bitmapd.nbd.server.outbox import Outbox
from bitmapd.nbd.server.requests import Replies, descriptors, wire_error

_READ, _WRITE, _FLUSH = int(Cmd.READ), int(Cmd.WRITE), int(Cmd.FLUSH)
_TRIM, _CACHE, _WRITE_ZEROES = int(Cmd.TRIM), int(Cmd.CACHE), int(Cmd.WRITE_ZEROES)
_BLOCK_STATUS = int(Cmd.BLOCK_STATUS)
_FUA, _NO_HOLE = int(CmdFlag.FUA), int(CmdFlag.NO_HOLE)
_REQ_ONE, _FAST_ZERO = int(CmdFlag.REQ_ONE), int(CmdFlag.FAST_ZERO)


class Service:
    """See the module docstring.  Requests have been validated by `Rules.refuse`."""

    __slots__ = (
        "_abandoned",
        "_answered",
        "_export",
        "_give",
        "_losses",
        "_out",
        "_replies",
        "_stats",
        "in_flight",
    )

    def __init__(
        self, hub: Hub[Any], replies: Replies, out: Outbox, answered: Callable[[], None]
    ) -> None:
        self.in_flight = 0
        self._give = hub.give
        self._stats = hub.stats
        self._export = hub.export
        self._losses = hub.lost_writes.listener()
        self._replies = replies
        self._out = out
        self._answered = answered
        self._abandoned = False

    def abandon(self) -> None:
        self._abandoned = True

    def read(self, handle: int, flags: int, offset: int, buffer: memoryview) -> None:
        self.in_flight += 1
        self._export.read(offset, buffer, partial(self._read_done, handle, flags, offset, buffer))

    def write(self, handle: int, flags: int, offset: int, buffer: memoryview) -> None:
        self.in_flight += 1
        done: Done = partial(self._write_done, handle, offset, buffer)
        if flags & _FUA:
            self._export.write(offset, buffer, self._durable(done), True)
        else:
            self._export.write(offset, buffer, done, False)

    def other(self, command: int, flags: int, handle: int, offset: int, length: int) -> None:
        """FLUSH, TRIM, WRITE_ZEROES, CACHE or BLOCK_STATUS."""
        self.in_flight += 1
        export, fua = self._export, (flags & _FUA) != 0
        done: Done = partial(self._finish, command, flags, handle, offset, length)
        if fua or command == _FLUSH:
            done = self._durable(done)
        if command == _FLUSH:
            export.flush(done)
        elif command == _TRIM:
            export.trim(offset, length, done, fua=fua)
        elif command == _WRITE_ZEROES:
            export.zero(
                offset,
                length,
                done,
                fua=fua,
                unmap=not flags & _NO_HOLE,
                fast=(flags & _FAST_ZERO) != 0,
            )
        elif command == _CACHE:
            # Reads bypass the page cache, so there is nothing that could be warmed.
            done(None)
        else:
            export.allocation(
                offset, length, partial(self._allocation_done, flags, handle, offset, length)
            )

    def _durable(self, done: Done) -> Done:
        """Of one that is not answered nobody would hear."""
        return lambda error: done(error if self._abandoned else self._losses.answer(error))

    def _read_done(
        self, handle: int, flags: int, offset: int, buffer: memoryview, error: OSError | None
    ) -> None:
        length = len(buffer)
        if error is None and not self._abandoned:
            self._stats.read_bytes += length
            self._out.add(self._replies.read_header(handle, offset, length))
            self._out.add(buffer)
            self.in_flight -= 1
            self._answered()
            return
        self._give(buffer)
        self._finish(_READ, flags, handle, offset, length, error)

    def _write_done(
        self, handle: int, offset: int, buffer: memoryview, error: OSError | None
    ) -> None:
        length = len(buffer)
        self._give(buffer)
        if error is None and not self._abandoned:
            self._stats.written_bytes += length
            self._out.add(self._replies.success(handle))
            self.in_flight -= 1
            self._answered()
            return
        self._finish(_WRITE, 0, handle, offset, length, error)

    def _allocation_done(
        self,
        flags: int,
        handle: int,
        offset: int,
        length: int,
        error: OSError | None,
        pieces: list[tuple[int, int]],
    ) -> None:
        if error is None and not self._abandoned:
            found = descriptors(pieces, length, bool(flags & _REQ_ONE))
            self._out.add(self._replies.block_status(handle, found))
            self.in_flight -= 1
            self._answered()
            return
        self._finish(_BLOCK_STATUS, flags, handle, offset, length, error)

    def _finish(
        self,
        command: int,
        flags: int,
        handle: int,
        offset: int,
        length: int,
        error: OSError | None,
    ) -> None:
        if error is not None:
            self._stats.errors += 1
        if not self._abandoned:
            if error is None:
                self._out.add(self._replies.success(handle))
            else:
                name = Cmd(command).name
                text = f"{name} at {offset} of {length} bytes: {error.strerror or error}"
                self._out.add(self._replies.failure(handle, wire_error(error, flags), text))
        self.in_flight -= 1
        self._answered()
