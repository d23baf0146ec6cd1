"""A volume with a receiver gives its role away, or takes it back (edge).

`Demoting` carries out the stages of `points.switchover` up to DEMOTED, in the volume's process. The
record keeps the rest: a volume whose superblock says DEMOTED lets no host in.

1. Until DEMOTED is written any error lets the hosts in again.
2. What is given away is everything: the receiver has it in its image when DEMOTED is written.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any, Final, Protocol

from bitmapd.attach.mode import refuse_connected
from bitmapd.config import Paths, VolumeConfig
from bitmapd.copier.engine import CopyState
from bitmapd.errors import (
    BitmapdError,
    TimeOutError,
    UnreachableError,
    WrongStateError,
    explain,
)
from bitmapd.points.messages import Role
from bitmapd.points.sender import Phase
from bitmapd.points.switchover import ASKED, Stage, after
from bitmapd.record.points_state import NO_POINTS_FLAGS, PointsFlag
from bitmapd.volume.assemble import Parts
from bitmapd.volume.sending import ReceiverLink, points_of
from bitmapd.volume.session import RecordSession

_BOUNDED: Final = (Stage.CLOSING, Stage.SENDING, Stage.APPLYING)


class Around(Protocol):
    """The volume around it; `Volume`."""

    def emit(self, event: str, **fields: Any) -> None: ...

    async def until(self, condition: Callable[[], bool]) -> None: ...

    async def end_eras(self, enough: Callable[[], bool]) -> None: ...


class Demoting:
    """See the module docstring."""

    def __init__(self, name: str, parts: Parts, link: ReceiverLink, volume: Around) -> None:
        self.stage = Stage.SERVING
        self._name = name
        self._parts = parts
        self._link = link
        self._sender = link.sender
        self._volume = volume

    @property
    def is_unknown(self) -> bool:
        """Whether nobody here can say which role is durable."""
        return self.stage is Stage.UNKNOWN

    async def run(self, within_s: float, *, force: bool) -> None:
        """Return when the volume is demoted; every error before leaves it as it was.  Without
        `force` BusyError if hosts are connected."""
        if self.stage is Stage.DEMOTED:
            return
        self._check(force=force)
        work = {
            Stage.CLOSING: self._close_hosts,
            Stage.SENDING: self._send_all,
            Stage.APPLYING: self._see_it_applied,
            Stage.DEMOTING: self._demote,
            Stage.REOPENING: self._parts.mode.admit,
        }
        deadline_s = asyncio.get_running_loop().time() + within_s
        failure: BitmapdError | None = None
        self.stage = ASKED[self.stage]
        while (act := work.get(self.stage)) is not None:
            bounded = self.stage in _BOUNDED
            try:
                async with asyncio.timeout_at(deadline_s if bounded else None):
                    await act()
                well = True
            except TimeoutError:
                failure, well = self._late(), False
            except BitmapdError as error:
                failure, well = failure or error, False
            self.stage = after(self.stage, well=well) or self.stage
        self._sender.is_leaving = self.stage is not Stage.SERVING
        if failure is not None:
            raise failure

    def _late(self) -> BitmapdError:
        return TimeOutError(f"volume '{self._name}' could not give everything away in time")

    def _check(self, *, force: bool) -> None:
        self._parts.pausing.refuse("it cannot give everything away")
        theirs = self._link.receiver
        if not self._sender.uplink.is_ready or theirs is None:
            raise UnreachableError(
                f"the receiver of volume '{self._name}' is away: nobody would have its place",
                hint=f"'dmctl events {self._name} --now' says why",
            )
        if theirs.role is not Role.RECEIVER or not self._sender.uplink.known_committed:
            raise WrongStateError(
                f"the receiver of volume '{self._name}' has no point yet",
                hint=f"dmctl wait {self._name} --for point",
            )
        if not force:
            refuse_connected(self._parts.mode.server)

    # -- the stages -----------------------------------------------------------------------------
    async def _close_hosts(self) -> None:
        await self._parts.mode.close_hosts()
        await self._parts.mode.last_writes(self._volume.end_eras)

    async def _send_all(self) -> None:
        def sent() -> bool:
            if self._gone or (self._parts.gate.in_sync and self._is_closed):
                return True
            self._sender.wake()
            return False

        await self._volume.until(sent)
        self._refuse_if_gone()

    async def _see_it_applied(self) -> None:
        uplink = self._sender.uplink

        def applied() -> bool:
            if self._is_closed and uplink.applied >= uplink.known_committed:
                self._sender.is_leaving = True
                return True
            return self._gone

        await self._volume.until(applied)
        self._refuse_if_gone()

    async def _demote(self) -> None:
        points = points_of(self._parts.session)
        demoted = dataclasses.replace(points, flags=points.flags | PointsFlag.DEMOTED)
        try:
            await self._parts.aside(self._parts.session.update, points=demoted)
        except OSError as error:
            raise explain(error, f"record {self._parts.config.record}") from error
        self._volume.emit("demoted", term=points.term)

    @property
    def _is_closed(self) -> bool:
        """No point is open, not even an empty one, which the receiver would have alone."""
        return self._sender.phase is Phase.OPEN and self._sender.closing.idle

    @property
    def _gone(self) -> bool:
        return self._sender.state is not CopyState.RUNNING

    def _refuse_if_gone(self) -> None:
        if self._gone:
            raise UnreachableError(
                f"the receiver of volume '{self._name}' went away before it had everything; hosts"
                " are let in again"
            )


def mark(config: VolumeConfig, paths: Paths, *, demoted: bool) -> None:
    """Of a stopped volume: whether it has given its role away, durably."""
    session = RecordSession(config, paths, lambda event, **fields: None)
    try:
        points = points_of(session)
        flags = PointsFlag.DEMOTED if demoted else NO_POINTS_FLAGS
        if points.flags != flags:
            session.update(points=dataclasses.replace(points, flags=flags))
    finally:
        session.close()
