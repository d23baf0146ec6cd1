"""One volume, put together: record, gate, copier, hosts, and what an administrator may ask of it.

Start: the parts are made (`assemble`), then hosts are let in; `attach/mode` has the two ways in
which they reach it.  They are served as soon as the record has been read; the copying of what it
names goes on meanwhile.

Clean stop: hosts first (requests that were received are carried out and answered), then
copy what is left, flush both sides, empty the record, mark it clean.  A stop with `now`, of a
volume that is paused, or while the secondary is away, leaves in the record what is not copied.

A crash at any point of either leaves a record that names whatever differs.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bitmapd.config import (
    Paths,
    VolumeConfig,
    effective_era_intervals_s,
    taken_up,
)
from bitmapd.control.told import Told
from bitmapd.copier.comparing import BothRead, Comparison
from bitmapd.copier.engine import Copier, CopyState
from bitmapd.errors import (
    BitmapdError,
    BusyError,
    UnreachableError,
    UsageError,
    WrongStateError,
)
from bitmapd.media.buffers import BufferPool
from bitmapd.media.kdevice import KernelDevice
from bitmapd.media.waiting import completion
from bitmapd.predict.predictors import make_policy
from bitmapd.record.geometry import Geometry
from bitmapd.volume.assemble import assemble, limit_extents, tell_ignored
from bitmapd.volume.resize import (
    enlarge,
    present_geometry,
    take_up,
)
from bitmapd.volume.secondary import leave_at_once
from bitmapd.volume.status import describe, state_of
from bitmapd.volume.verifying import VERIFY_POOL_BYTES, Progress, Verifying, repaired, tell

if TYPE_CHECKING:
    from bitmapd.volume.paired import Paired
    from bitmapd.volume.withreceiver import WithReceiver

TICK_S = 1.0

Emit = Callable[..., None]


class Volume:
    """See the module docstring.  All methods are called on the loop's thread."""

    def __init__(
        self,
        config: VolumeConfig,
        paths: Paths,
        loop: asyncio.AbstractEventLoop,
        emit: Emit,
    ) -> None:
        self.config = config
        self._paths = paths
        self._loop = loop
        self._told = Told(emit)
        self.emit = self._told.emit  # also for the parts (`assemble.Owner`)
        self._changed = asyncio.Event()
        self._was_in_sync: bool | None = None
        self._verifying: Verifying | None = None
        self._stopping = False
        self._hurried = False
        self._hosts_gone = False  # a stop can no longer be refused
        self.serving = False  # it works; hosts are let in, unless that needs a takeover
        self._ending: asyncio.Task[None] | None = None  # of a process that is outdated
        self.on_outdated: Callable[[], None] | None = None
        self._paired: Paired | None = None  # of a single appliance: None
        self._receiver: WithReceiver | None = None  # with a plain secondary: None
        self._tick_timer: asyncio.TimerHandle | None = None

    # -- start ----------------------------------------------------------------------------
    async def start(self) -> None:
        """Recover and export; on an error everything that was opened is closed again."""
        parts = await assemble(self.config, self._paths, self._loop, self)
        self._parts, self.gate, self.copier = parts, parts.gate, parts.copier
        self.geometry = parts.session.superblock.geometry
        try:
            if parts.receiver is not None:
                from bitmapd.volume.withreceiver import WithReceiver  # noqa: PLC0415  (`mirror`)

                receiver = WithReceiver(self.config.name, parts, parts.receiver, self)
                await receiver.start(self._paths)
                self._receiver = receiver
            if parts.pair is None or parts.door is None:
                await self.begin()
            else:
                from bitmapd.volume.paired import Paired  # noqa: PLC0415  (`mirror`)

                self._paired = Paired(self.config.name, parts, parts.pair, parts.door, self)
                await self._paired.start()
        except BaseException:
            await parts.abandon()
            raise
        self._tick_timer = self._loop.call_later(TICK_S, self._tick)

    async def begin(self) -> None:
        """Copy, and let hosts in, unless that needs a takeover."""
        admit = self.config.serve == "always" or self._parts.mode.adopted
        await self._parts.begin(admit=admit)
        if self._paired is not None:
            self._paired.begun(are_served=admit)
        self.serving = True
        self.changed()
        if self._paired is None:
            try:  # an earlier process may have died before hosts saw the size
                await self._parts.mode.follow_size(self.end_eras)
            except UnreachableError as error:
                self.emit("size-not-shown", message=error.message)

    # -- what the parts tell (`assemble.Owner`) -------------------------------------------
    def outdated(self) -> None:
        self._ending = self._loop.create_task(self._end_outdated())

    async def _end_outdated(self) -> None:
        """Hosts that wait have been refused; the process begins anew once they know."""
        mode, door = self._parts.mode, self._parts.door
        if door is not None and (self.serving or mode.adopted):
            try:
                await door.cut_off()
            except BitmapdError as error:  # the next process finds them, and tries again
                self.emit("detach-error", message=error.message)
        if self.on_outdated is not None:
            self.on_outdated()

    def inherited(self, extents: int) -> None:
        self._parts.recovery.inherited(extents)

    def primary_failed(
        self, verb: str, offset_bytes: int, length_bytes: int, error: OSError
    ) -> None:
        self.emit(
            "primary-error",
            device=self.config.primary,
            offset_bytes=offset_bytes,
            length_bytes=length_bytes,
            message=f"cannot {verb} the primary for a host: {error.strerror or error}",
        )

    def _tick(self) -> None:
        self._tick_timer = self._loop.call_later(TICK_S, self._tick)
        if self._paired is not None:
            self._paired.pair.tick()
        self.gate.limit_extents = limit_extents(
            self.config, self.geometry, self.copier.meter.bytes_per_s
        )
        self.gate.tick()
        self._parts.recording.flush()
        self._parts.hints.tick()
        self._parts.recovery.tick()
        self._parts.presence.tick()
        self.changed()

    def changed(self) -> None:
        if self._paired is not None:
            self._paired.look()
        in_sync = self.in_sync
        if in_sync != self._was_in_sync:
            if in_sync:
                self.emit("in-sync")
            self._was_in_sync = in_sync
        self._parts.recovery.look_at_inherited()
        if in_sync:
            self._parts.note.in_sync()
        if self._verifying is not None and self.copier.state is CopyState.LINK_DOWN:
            self._verifying.cancel(errno.ENOTCONN, "the secondary went away")
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def in_sync(self) -> bool:
        here = self.serving and self.copier.in_sync and self._parts.recovery.kept
        return here and (self._paired is None or self._paired.pair.in_sync)

    @property
    def stopping(self) -> bool:
        return self._stopping

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            changed = self._changed
            await changed.wait()

    # -- stop -----------------------------------------------------------------------------
    async def stop(self, now: bool) -> dict[str, Any]:
        """Stop; true `clean` in the answer if nothing is left to copy."""
        if self._stopping:
            raise WrongStateError(f"volume '{self.config.name}' is stopping already")
        self._stopping, self._hurried = True, self._hurried or now
        await self._close_hosts()
        if not self.serving:
            return await self._stop_waiting()
        if self._verifying is not None:
            self._verifying.cancel(errno.ECANCELED, "the volume is being stopped")
        if self._hurried:
            self.hurry()
        await self._parts.mode.last_writes(self.end_eras)
        if self._paired is not None and not self._hurried and await self._paired.pair.leave():
            self._parts.forget_everything()
        else:
            await self._drain()
        await self._parts.pausing.close()
        await self._end_copying()
        failure: BitmapdError | None = None
        try:
            clean = await self._empty_record()
        except BitmapdError as error:  # empty, and not marked: all else is ended all the same
            clean, failure = False, error
        extents = self._parts.store.recorded_extents
        paused = self._parts.pausing.stored
        self.emit("stopped", clean=clean, record_extents=extents, paused=paused)
        await self._finish()
        await self._parts.engine.call(self._parts.primary.close)
        await self._parts.mode.detach()
        await self._parts.aside(self._parts.session.seal)
        await self._parts.close()
        if failure is not None:
            raise failure
        return {"clean": clean, "record_extents": extents, "paused": paused}

    def make_way(self) -> None:
        """For a stop, which waits for its turn: end what waits for somebody else."""
        if self._paired is not None:
            self._paired.give_up_resize()

    async def _close_hosts(self) -> None:
        """BusyError if they have the device open: they are served as if nobody had asked."""
        try:
            await self._parts.mode.close_hosts()
        except BusyError:
            self._stopping = self._hurried = False
            raise
        self._hosts_gone = True

    async def _stop_waiting(self) -> dict[str, Any]:
        """Of a node of a pair that has not been served: nothing of it has changed, unless its
        kernel has served hosts all the time."""
        if self._hurried:
            self.hurry()
        self.changed()
        if self._paired is not None:
            await self._paired.entered()
        await self._end_copying()
        extents = self._parts.store.recorded_extents
        paused = self._parts.pausing.stored
        self.emit("stopped", clean=False, record_extents=extents, paused=paused)
        await self._finish()
        await self._parts.mode.detach()
        await self._parts.close()
        return {"clean": False, "record_extents": extents, "paused": paused}

    async def _end_copying(self) -> None:
        if self._paired is not None:
            await self._paired.end()
        stopped = asyncio.Event()
        self.copier.stop(stopped.set)
        await stopped.wait()
        if self._parts.guard is not None:
            await self._parts.guard.end()
        await self._parts.recovery.end()

    async def _finish(self) -> None:
        if self._tick_timer is not None:
            self._tick_timer.cancel()
        await self._parts.finish()

    def asked(self) -> tuple[int, ...] | None:
        return self._parts.asked()

    def silent_media(self) -> str:
        return self._parts.silent_media()

    async def end_eras(self, enough: Callable[[], bool]) -> None:
        self.copier.wake()
        await self.until(enough)

    def hurry(self) -> None:
        """Let a stop that is copying what is left end without it.  One that may be refused yet, by
        hosts, goes on copying until it may not.

        Eras end only while no copy is in flight, so the last ones would wait for a secondary that
        hangs as long as that does.
        """
        self._hurried = True
        if self._hosts_gone:
            self.copier.pause()
            leave_at_once(self._parts.secondary)
            self.changed()

    async def _drain(self) -> None:
        """Copy what is left, as long as there is a secondary and something that can be copied."""

        def drained() -> bool:
            if self._hurried or self.copier.state is not CopyState.RUNNING:
                return True
            if self.gate.in_sync or self.copier.stuck:
                return True
            self.copier.wake()
            return False

        await self.until(drained)

    async def _empty_record(self) -> bool:
        """Drop what is clean and write the record; true if nothing is left and all is durable."""
        try:
            await completion(self._parts.primary.flush)
            self.gate.drop_all_clean()
            if self._paired is not None:
                await self._paired.pair.part()
            self._parts.store.flush_clears()
            await completion(self._parts.store.when_idle)
        except OSError as error:
            self.emit("record-error", message=f"cannot end the session cleanly: {error}")
            return False
        clean = self.gate.in_sync and not self._parts.store.recorded_extents
        if clean:
            await self._parts.aside(self._parts.session.finish)
            await self._parts.note.save()
        return clean

    # -- commands -------------------------------------------------------------------------
    async def pause(self) -> None:
        """Copy nothing more until `resume`, whatever becomes of this process."""
        await self._parts.pausing.pause()

    async def resume(self) -> None:
        await self._parts.pausing.resume()

    async def wait(self, state: str) -> None:
        """Return when the volume is `in-sync` (or `started`, which it is).  One that is paused does
        not become so: WrongStateError."""
        if state == "in-sync":
            if self._paired is not None:
                await self._paired.until_in_sync()
            else:
                await self.until(lambda: self.in_sync or self._parts.pausing.paused)
            self._parts.pausing.refuse("it does not come into sync")
        elif state in ("paired", "alone"):
            await self.paired.reached(state)
        elif state == "started":
            await self.until(lambda: self.serving)
        else:
            raise UsageError(f"cannot wait for {state!r} here")

    @property
    def paired(self) -> Paired:
        """The commands that only a pair has; WrongStateError for a single appliance."""
        if self._paired is None:
            raise WrongStateError(f"volume '{self.config.name}' has no partner")
        return self._paired

    @property
    def receiver(self) -> WithReceiver:
        """The commands that need a receiver; WrongStateError with a plain secondary."""
        if self._receiver is None:
            raise WrongStateError(
                f"the secondary of volume '{self.config.name}' is not a receiver: it has no points"
            )
        return self._receiver

    async def give_away(self, within_s: float, *, force: bool) -> None:
        """Have the receiver get everything, and let no host in any more, also after a start."""
        if self._verifying is not None:
            raise BusyError(f"volume '{self.config.name}' is being verified")
        await self.receiver.demoting.run(within_s, force=force)

    def _refuse_unless_serving(self) -> None:
        if not self.serving:
            self.paired.pair.refuse_waiting(self.config.name)

    async def resync(self, checksum: bool) -> dict[str, Any]:
        """Have everything in the record copied; with `checksum`, compared and copied if different.

        Without `checksum` a volume in sync is left alone.
        """
        self._refuse_unless_serving()
        self._parts.pausing.refuse("nothing is copied")
        extents = 0
        if checksum and not self.copier.passes.under_way:
            extents = self._parts.store.recorded_extents
            if extents:
                self._parts.recovery.give_way()
                self.gate.take_recorded()
                self.copier.begin_pass(compare=True)
        elif not self.in_sync:
            self.copier.wake()
        return {"extents": extents, "state": self.state}

    async def verify(self, repair: bool, progress: Progress) -> dict[str, Any]:
        """Compare both sides while in use; differences that should not be there are reported."""
        self._refuse_unless_serving()
        if self._verifying is not None:
            raise BusyError(f"volume '{self.config.name}' is being verified already")
        if self.copier.state is CopyState.LINK_DOWN:
            raise UnreachableError(f"secondary {self.config.secondary} cannot be reached")
        if repair:
            self._parts.pausing.refuse("nothing is repaired")
        self._verifying = self._make_verifying(repair=repair)
        try:
            result = await self._verifying.run(progress)
        finally:
            self._verifying = None
        report = tell(result, self.config, self.emit)
        if repair and result.repaired_bytes:
            await repaired(self.gate, self.copier, self._loop.time(), self.until)
        return report

    def _make_verifying(self, *, repair: bool) -> Verifying:
        parts, pool = self._parts, BufferPool(self._loop, VERIFY_POOL_BYTES)
        comparison: Comparison
        if self._receiver is not None:
            comparison = self._receiver.comparison(self.geometry, pool)
            give_up = self._receiver.sender.sums.give_up
        else:
            secondary = parts.plain_secondary("compare it while it is in use")
            comparison = BothRead(self.geometry, parts.primary, secondary, pool)
            give_up = None
        return Verifying(
            self._loop, self.geometry, self.gate, comparison, self.config, give_up, repair=repair
        )

    async def resize(self) -> dict[str, Any]:
        """Take up a larger size of primary and secondary, or receiver, and have hosts see it."""
        secondary = self._parts.secondary
        geometry = await present_geometry(self.config, self.geometry, secondary, self._loop)
        if geometry is None:
            await self._follow_size()
            return {"size_bytes": self.geometry.size_bytes, "changed": False}
        if self._receiver is not None:
            await self._receiver.offer(geometry.size_bytes)
        if self._paired is not None:
            await self._paired.resize(geometry.size_bytes)
        else:
            await self._grow(geometry)
        await self._follow_size()
        return {"size_bytes": geometry.size_bytes, "changed": True}

    async def _grow(self, geometry: Geometry) -> None:
        await enlarge(self._parts, geometry)
        take_up(self._parts, self.geometry, geometry)
        self.grown(geometry)

    async def _follow_size(self) -> None:
        """UnreachableError if hosts go on with a size that they had before."""
        if self._paired is not None:
            await self._paired.follow_size()
        else:
            await self._parts.mode.follow_size(self.end_eras)

    def grown(self, geometry: Geometry) -> None:
        """The parts have taken up a larger size."""
        self.geometry = geometry
        self._exchange_policy(self.config.predictor)
        if self._verifying is not None and self._receiver is not None:
            self._verifying.cancel(errno.ECANCELED, "the volume has grown")
        if not isinstance(self._parts.secondary, KernelDevice | None):
            # A server tells its size when a connection begins.
            self.copier.reconnect()
        self.emit("resized", size_bytes=geometry.size_bytes)

    def _exchange_policy(self, name: str) -> None:
        policy = make_policy(name, self.geometry)
        self._parts.hints.hand_over(policy)
        for first, stop in self._parts.store.recorded_runs():
            policy.added(first, stop, self._loop.time())
        self.gate.set_policy(policy)

    def reconfigure(self, config: VolumeConfig) -> None:
        """Take up the settings that may change while running, and report the others."""
        config, ignored = taken_up(self.config, config)
        if ignored:
            tell_ignored(self.emit, ignored, "cannot change while the volume runs")
        if config.predictor != self.config.predictor:
            self._exchange_policy(config.predictor)
        self.config = config
        self.copier.throttle.set_rate(config.copy_rate_bytes_per_s)
        if isinstance(self.copier, Copier):
            rounds = self.copier.rounds
            rounds.era_interval_s, rounds.longest_era_s = effective_era_intervals_s(config)
            self.copier.late.bound_s = config.late_writes_s
        if self._receiver is not None:
            self._receiver.reconfigure(config)
        self._parts.recording.record_to(config.trace)
        if self._paired is not None:
            self._paired.reconfigure(config)
        self.gate.limit_extents = limit_extents(
            self.config, self.geometry, self.copier.meter.bytes_per_s
        )
        self.emit("settings-changed")

    # -- status ---------------------------------------------------------------------------
    @property
    def state(self) -> str:
        if self._parts.presence.gone:
            return "degraded"
        if self._paired is not None and (state := self._paired.state) is not None:
            return state
        found = state_of(self._parts.store, self.gate, self.copier, in_sync=self.in_sync)
        return found if self._receiver is None else self._receiver.state_of(found)

    def status(self) -> dict[str, Any]:
        """One element of `volumes` in `dmctl status --json`."""
        return (
            describe(
                self.config,
                self.geometry,
                self._parts.store,
                self.gate,
                self.copier,
                in_sync=self.in_sync,
            )
            | {
                "state": self.state,
                "last_recovery": self._parts.recovery.result,
                "last_error": self._told.last_error,
                "connections": self._parts.mode.server.stats.connections if self.serving else 0,
                "session": self._parts.session.superblock.session,
                "primary_errors_total": self.gate.primary_errors,
                "partner": None if self._paired is None else self._paired.pair.status(),
                "points": None,
                "receiver": None,
            }
            | (self._receiver.figures() if self._receiver is not None else {})
            | self._parts.mode.figures(self.gate)
        )
