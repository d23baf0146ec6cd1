"""One volume, put together: record, gate, copier, hosts, and what an administrator may ask of it.

Start: record session (lock, load, checks), primary, secondary (may be absent), gate with every
recorded extent to be copied, copier, hosts (`attach/modes.py` has the two ways in which they reach
it).  They are served as soon as the record has been read; the copying of what it names goes on
meanwhile.

Clean stop: hosts first (requests that were received are carried out and answered), then
copy what is left, flush both sides, empty the record, mark it clean.  A stop with `now`, of a
volume that is paused, or while the secondary is away, leaves in the record what is not copied.

A crash at any point of either leaves a record that names whatever differs.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

from bitmapd.attach.dm_mode import DmMode
from bitmapd.attach.mode import Mode
from bitmapd.attach.nbd_mode import NbdMode
from bitmapd.config import (
    Paths,
    VolumeConfig,
    effective_era_interval_s,
    effective_record_limit_bytes,
    taken_up,
)
from bitmapd.control.catalogue import lookup
from bitmapd.copier.engine import Copier, CopyState
from bitmapd.copier.throttle import Backoff, Throttle
from bitmapd.errors import (
    BitmapdError,
    BusyError,
    UnreachableError,
    UsageError,
    WrongStateError,
)
from bitmapd.gate.gate import Gate
from bitmapd.media.aio import AioEngine
from bitmapd.media.buffers import BufferPool
from bitmapd.media.identity import identify
from bitmapd.media.kdevice import KernelDevice
from bitmapd.media.waiting import Aside, completion
from bitmapd.predict.predictors import make_policy
from bitmapd.record.geometry import Geometry
from bitmapd.record.store import RecordStore
from bitmapd.units import format_size
from bitmapd.volume.hints import HintKeeper
from bitmapd.volume.pausing import Pausing
from bitmapd.volume.presence import Presence
from bitmapd.volume.recovery import Recovery
from bitmapd.volume.requestlog import Recording
from bitmapd.volume.resize import (
    Medium,
    commit_growth,
    larger_geometry,
    new_page_states,
    prepare_growth,
)
from bitmapd.volume.secondary import (
    leave_at_once,
    make_secondary,
    open_secondary,
    present_size,
    wrong_secondary,
)
from bitmapd.volume.session import RecordSession
from bitmapd.volume.sides import NoteKeeper
from bitmapd.volume.status import describe, state_of
from bitmapd.volume.verifying import Progress, Verifying, repaired, unreadable

COPY_POOL_BYTES = 16 << 20
TICK_S = 1.0
MIN_LIMIT_EXTENTS = 64

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
        self._emit_event = emit
        self._last_error: dict[str, str] | None = None
        self._changed = asyncio.Event()
        self._was_in_sync: bool | None = None
        self._aside = Aside(f"record-{config.name}")
        self._verifying: Verifying | None = None
        self._stopping = False
        self._hurried = False
        self.left = False  # grown, and not served any more: another one takes over
        self._tick_timer: asyncio.TimerHandle | None = None

    # -- start ----------------------------------------------------------------------------
    async def start(self) -> None:
        """Recover and export; on an error everything that was opened is closed again."""
        try:
            self._session = await self._aside(
                RecordSession, self.config, self._paths, self._emit_from_aside
            )
        except BaseException:
            self._aside.close()
            raise
        self._mode = self._make_mode()
        opened: list[Callable[[], None]] = []
        try:
            await self._assemble(opened)
        except BaseException:
            for close in reversed(opened):
                close()
            try:
                await self._mode.undo()
                if not self._mode.adopted:
                    await self._aside(self._session.seal)
            finally:
                self._session.close()
                self._aside.close()
            raise

    def _make_mode(self) -> Mode:
        config, loop = self.config, self._loop
        if config.attach == "dm":
            return DmMode(config, loop, self._emit, on_barrier=self._on_change)
        return NbdMode(config, loop, self._emit)

    async def _assemble(self, opened: list[Callable[[], None]]) -> None:
        config, loop = self.config, self._loop
        self._engine = AioEngine(loop)
        opened.append(self._engine.close)
        geometry = self._session.superblock.geometry
        primary = await self._mode.prepare(geometry, opened)
        self._primary = await self._engine.call(
            partial(KernelDevice, primary, self._engine, exclusive=self._mode.exclusive)
        )
        opened.append(self._primary.close)
        self._record = await self._engine.call(partial(KernelDevice, config.record, self._engine))
        opened.append(self._record.close)
        self._warn_if_buffered()
        self._secondary = make_secondary(
            config, loop, self._engine, self._session.secondary_mismatch
        )
        opened.append(self._secondary.close)
        await open_secondary(self._secondary, loop, self._session.secondary_mismatch, self._emit)

        await self._aside(self._session.begin)
        self.geometry = geometry
        self._warn_of_other_sizes()
        self._store = RecordStore(geometry, self._session.loaded, self._record, loop, self._emit)
        # Misses of one batch share a record write; it leaves with the batch, not a turn later.
        self._engine.before_submit.append(self._store.commit)
        self.gate = Gate(
            geometry,
            self._primary,
            self._store,
            make_policy(config.predictor, geometry),
            loop,
            limit_extents=self._limit_extents(None),
            elsewhere=self._mode.elsewhere,
        )
        self.gate.on_primary_error = self._primary_failed
        self._hints = HintKeeper(self._session, self.gate, loop, self._aside, self._emit)
        await self._hints.begin()
        self._note = NoteKeeper(
            config,
            self._paths,
            lambda: self._session.superblock,
            lambda: self.copier.samples.lately,
            loop,
            self._emit,
        )
        self._copy_pool = BufferPool(loop, COPY_POOL_BYTES)
        self.copier = Copier(
            geometry,
            self.gate,
            self._primary,
            self._secondary,
            loop,
            self._copy_pool,
            Throttle(config.copy_rate_bytes_per_s),
            Backoff(),
            self._emit,
            check_secondary=partial(
                wrong_secondary, self._secondary, self._session.secondary_mismatch
            ),
            era_interval_s=effective_era_interval_s(config),
            late_writes_s=config.late_writes_s,
            read_primary=self._primary.read_aside,
        )
        media = (self._primary, self._record, self._secondary)
        self._presence = Presence(
            [medium for medium in media if isinstance(medium, KernelDevice)],
            self._engine,
            loop,
            self._emit,
        )
        self.copier.on_change = self._on_change
        if self._session.primary_is_as_left:
            self.copier.samples.remember(self._note.lately_before)
        self._recording = Recording(self.gate, loop, self._emit)
        opened.append(self._recording.close)
        self._recording.record_to(config.trace)
        self._recovery = Recovery(
            self._session,
            self._store,
            self.gate,
            self.copier,
            loop,
            self._aside,
            self._emit,
            on_kept=self._on_change,
        )
        self._recovery.begin()
        await self._mode.begin(
            self._engine, self.gate, self._store, lambda: self.copier.idle, opened
        )
        self._pausing = Pausing(
            config.name, self._session, self.copier, self._until, self._aside, self._emit
        )
        self.copier.start(paused=self._pausing.stored)
        self._tick_timer = loop.call_later(TICK_S, self._tick)

    def _warn_of_other_sizes(self) -> None:
        """The record has the sizes that the volume was created with; those of the file are none."""
        config, geometry = self.config, self.geometry
        sizes = {
            "extent_size": (config.extent_size_bytes, geometry.extent_bytes),
            "block_size": (config.block_size_bytes, geometry.block_bytes),
        }
        other = {key: made for key, (written, made) in sizes.items() if written != made}
        if other:
            made = ", ".join(f"{key} = {format_size(size)}" for key, size in other.items())
            self._ignored(list(other), f"the volume was created with {made}")

    def _ignored(self, keys: list[str], reason: str) -> None:
        self._emit(
            "settings-ignored",
            keys=keys,
            message=f"{', '.join(keys)} of the configuration: no effect, {reason}",
        )

    def _warn_if_buffered(self) -> None:
        for device in (self._primary, self._record):
            if not device.direct:
                self._emit(
                    "not-direct",
                    device=device.name,
                    message="the file system has no direct I/O: a power cut may lose what the"
                    " page cache holds until it is flushed",
                )

    # -- running --------------------------------------------------------------------------
    def _emit(self, event: str, **fields: Any) -> None:
        if lookup(event).is_error:
            self._last_error = {
                "code": event,
                "message": str(fields.get("message", event)),
                "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            }
        self._emit_event(event, **fields)

    def _emit_from_aside(self, event: str, **fields: Any) -> None:
        self._loop.call_soon_threadsafe(partial(self._emit, event, **fields))

    def _primary_failed(
        self, verb: str, offset_bytes: int, length_bytes: int, error: OSError
    ) -> None:
        self._emit(
            "primary-error",
            device=self.config.primary,
            offset_bytes=offset_bytes,
            length_bytes=length_bytes,
            message=f"cannot {verb} the primary for a host: {error.strerror or error}",
        )

    def _tick(self) -> None:
        self._tick_timer = self._loop.call_later(TICK_S, self._tick)
        self.gate.limit_extents = self._limit_extents(self.copier.meter.bytes_per_s)
        self.gate.tick()
        self._recording.flush()
        self._hints.tick()
        self._recovery.tick()
        self._presence.tick()
        self._on_change()

    def _limit_extents(self, speed: float | None) -> int:
        config, geometry = self.config, self.geometry
        if config.resync_target_s is None:
            limit = effective_record_limit_bytes(config, geometry.size_bytes)
        else:
            # Until a speed has been measured, that of a gigabit link.
            limit = int(config.resync_target_s * (speed or 110e6))
        return max(MIN_LIMIT_EXTENTS, limit // geometry.extent_bytes)

    def _on_change(self) -> None:
        in_sync = self._in_sync
        if in_sync != self._was_in_sync:
            if in_sync:
                self._emit("in-sync")
            self._was_in_sync = in_sync
        if in_sync:
            self._note.in_sync()
        if self._verifying is not None and self.copier.state is CopyState.LINK_DOWN:
            self._verifying.cancel(errno.ENOTCONN, "the secondary went away")
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def _in_sync(self) -> bool:
        return self.copier.in_sync and self._recovery.kept

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not (condition() or self.left):
            changed = self._changed
            await changed.wait()

    # -- stop -----------------------------------------------------------------------------
    async def stop(self, now: bool) -> dict[str, Any]:
        """Stop; true `clean` in the answer if nothing is left to copy."""
        if self._stopping:
            raise WrongStateError(f"volume '{self.config.name}' is stopping already")
        self._stopping = True
        try:
            await self._mode.close_hosts()
        except BusyError:
            self._stopping = False
            raise
        if self._verifying is not None:
            self._verifying.cancel(errno.ECANCELED, "the volume is being stopped")
        if now:
            self.hurry()
        await self._mode.last_writes(self._end_eras)
        if not now:
            await self._drain()
        await self._pausing.close()
        stopped = asyncio.Event()
        self.copier.stop(stopped.set)
        await stopped.wait()
        await self._recovery.end()
        failure: BitmapdError | None = None
        try:
            clean = await self._empty_record()
        except BitmapdError as error:  # empty, and not marked: all else is ended all the same
            clean, failure = False, error
        extents = self._store.recorded_extents
        paused = self._pausing.stored
        self._emit("stopped", clean=clean, record_extents=extents, paused=paused)
        await self._finish()
        await self._engine.call(self._primary.close)
        await self._mode.detach(self._primary.close)
        await self._aside(self._session.seal)
        await self._close()
        if failure is not None:
            raise failure
        return {"clean": clean, "record_extents": extents, "paused": paused}

    async def _finish(self) -> None:
        """What is done last while everything is still open."""
        if self._tick_timer is not None:
            self._tick_timer.cancel()
        self._recording.close()
        await self._hints.save()
        await self._note.end()
        self._presence.end()
        await self._until_idle()

    async def _until_idle(self) -> None:
        idle = asyncio.Event()
        self._engine.when_idle(idle.set)
        await idle.wait()

    async def _close(self) -> None:
        self._secondary.close()
        for device in (self._primary, self._record):
            await self._engine.call(device.close)
        await self._until_idle()
        await self._aside(self._session.close)
        self._aside.close()
        self._engine.close()

    def asked(self) -> tuple[int, ...] | None:
        """Figures of which some move when a medium answers; None while nothing is asked of one."""
        if not self._engine.in_flight and not self._aside.at_work:
            return None
        copier, store = self.copier, self._store
        return (
            self._engine.in_flight,
            self._aside.at_work,
            copier.copied_bytes,
            self.gate.settles,
            store.updates + store.clears,
        )

    def silent_media(self) -> str:
        """Which of them may be the one that does not answer."""
        config = self.config
        if self._store.write_age_s > 0 or self._aside.at_work:
            return f"record {config.record}"
        if not self.copier.idle:
            return f"primary {config.primary} or secondary {config.secondary}"
        return f"primary {config.primary}"

    async def _end_eras(self, enough: Callable[[], bool]) -> None:
        self.copier.wake()
        await self._until(enough)

    def hurry(self) -> None:
        """Let a stop that is copying what is left end without it.

        Eras end only while no copy is in flight, so the last ones would wait for a secondary that
        hangs as long as that does.
        """
        self._hurried = True
        self.copier.pause()
        leave_at_once(self._secondary)
        self._on_change()

    async def _drain(self) -> None:
        """Copy what is left, as long as there is a secondary and something that can be copied."""

        def drained() -> bool:
            if self._hurried or self.copier.state is not CopyState.RUNNING:
                return True
            if self.gate.in_sync or self.copier.stuck:
                return True
            self.copier.wake()
            return False

        await self._until(drained)

    async def _empty_record(self) -> bool:
        """Drop what is clean and write the record; true if nothing is left and all is durable."""
        try:
            await completion(self._primary.flush)
            self.gate.drop_all_clean()
            self._store.flush_clears()
            await completion(self._store.when_idle)
        except OSError as error:
            self._emit("record-error", message=f"cannot end the session cleanly: {error}")
            return False
        clean = self.gate.in_sync and not self._store.recorded_extents
        if clean:
            await self._aside(self._session.finish)
            await self._note.save()
        return clean

    # -- commands -------------------------------------------------------------------------
    async def pause(self) -> None:
        """Copy nothing more until `resume`, whatever becomes of this process."""
        await self._pausing.pause()

    async def resume(self) -> None:
        await self._pausing.resume()

    async def wait(self, state: str) -> None:
        """Return when the volume is `in-sync` (or `started`, which it is).  One that is paused does
        not become so: WrongStateError."""
        if state == "in-sync":
            await self._until(lambda: self._in_sync or self._pausing.paused)
            self._pausing.refuse("it does not come into sync")
        elif state != "started":
            raise UsageError(f"cannot wait for {state!r} here")

    async def resync(self, checksum: bool) -> dict[str, Any]:
        """Have everything in the record copied; with `checksum`, compared and copied if different.

        Without `checksum` a volume in sync is left alone.
        """
        self._pausing.refuse("nothing is copied")
        extents = 0
        if checksum and not self.copier.passes.under_way:
            extents = self._store.recorded_extents
            if extents:
                self._recovery.give_way()
                self.gate.take_recorded()
                self.copier.begin_pass(compare=True)
        elif not self._in_sync:
            self.copier.wake()
        return {"extents": extents, "state": self.state}

    async def verify(self, repair: bool, progress: Progress) -> dict[str, Any]:
        """Compare both sides while in use; differences that should not be there are reported."""
        if self._verifying is not None:
            raise BusyError(f"volume '{self.config.name}' is being verified already")
        if self.copier.state is CopyState.LINK_DOWN:
            raise UnreachableError(f"secondary {self.config.secondary} cannot be reached")
        if repair:
            self._pausing.refuse("nothing is repaired")
        self._verifying = Verifying(
            self._loop, self.geometry, self.gate, self._primary, self._secondary, repair=repair
        )
        try:
            result = await self._verifying.run(progress)
        finally:
            self._verifying = None
        for side, name, offset, length in unreadable(result, self.config):
            self._emit(
                "verify-error",
                device=name,
                offset_bytes=offset,
                length_bytes=length,
                message=f"cannot read the {side} at byte {offset}: it was not compared there",
            )
        for offset, length in result.unexpected:
            self._emit(
                "unexpected-difference",
                offset_bytes=offset,
                length_bytes=length,
                message=f"primary and secondary differ at byte {offset}, outside the record",
            )
        if repair and result.repaired_bytes:
            await repaired(self.gate, self.copier, self._loop.time(), self._until)
        return {
            "compared_bytes": result.compared_bytes,
            "unexpected_bytes": result.unexpected_bytes,
            "repaired_bytes": result.repaired_bytes,
            "undecided_blocks": result.undecided_blocks,
            "unexpected": [list(run) for run in result.unexpected],
            "unreadable_bytes": result.unreadable_bytes,
            "unreadable": [
                {"side": side, "offset_bytes": offset, "length_bytes": length}
                for side, _, offset, length in unreadable(result, self.config)
            ],
        }

    async def resize(self) -> dict[str, Any]:
        """Take up a larger size of primary and secondary.

        If this volume is `left` afterwards, another `Volume` has to be started in its place.
        """
        geometry = await self._larger_geometry()
        if geometry is None:
            return {"size_bytes": self.geometry.size_bytes, "changed": False}
        if isinstance(self._mode, DmMode):
            await self._leave(self._mode, geometry)
        else:
            await self._grow(geometry)
        return {"size_bytes": geometry.size_bytes, "changed": True}

    async def _larger_geometry(self) -> Geometry | None:
        """What the volume is to grow to, by the present sizes of its media; None if it has that."""

        async def local(path: str) -> Medium:
            found = await self._loop.run_in_executor(None, identify, path)
            return Medium(path, found.size_bytes or 0, found.logical_block_bytes or 512)

        primary = await local(self.config.primary)
        secondary = Medium(self.config.secondary, 0)
        if primary.size_bytes > self.geometry.size_bytes:
            present = await present_size(self._secondary, self.config, self._loop)
            secondary = Medium(self.config.secondary, *present)
        return larger_geometry(self.geometry, primary, secondary, await local(self.config.record))

    async def _grow(self, geometry: Geometry) -> None:
        await self._primary.present_size_bytes()
        await prepare_growth(self._session, self._store, self.gate, geometry, self._aside)
        await commit_growth(self._session, geometry, self._aside)
        self._store.grow(geometry, new_page_states(self.geometry, geometry))
        self.copier.grow(geometry)
        self.gate.grow(geometry)
        self.geometry = geometry
        self._exchange_policy(self.config.predictor)
        if not isinstance(self._secondary, KernelDevice):
            # A server tells its size when a connection begins.
            self.copier.reconnect()
        self._emit("resized", size_bytes=geometry.size_bytes)

    async def _leave(self, mode: DmMode, geometry: Geometry) -> None:
        """Give the volume, grown, to the next `Volume`; hosts' writes wait in the kernel for it.

        Up to the end of the server an error leaves everything as it was.
        """
        await prepare_growth(self._session, self._store, self.gate, geometry, self._aside)
        await mode.close_direct(self._end_eras)
        if self._verifying is not None:
            self._verifying.cancel(errno.ECANCELED, "the volume is taken up with its new size")
        self.left = True
        self._on_change()
        await self._pausing.close()
        await mode.hold_hosts()
        stopped = asyncio.Event()
        self.copier.stop(stopped.set)
        leave_at_once(self._secondary)
        await stopped.wait()
        await self._recovery.end()
        await commit_growth(self._session, geometry, self._aside)
        await self._finish()
        mode.hand_over()
        await self._close()
        self._emit("resized", size_bytes=geometry.size_bytes)

    def _exchange_policy(self, name: str) -> None:
        policy = make_policy(name, self.geometry)
        self._hints.hand_over(policy)
        for first, stop in self._store.recorded_runs():
            policy.added(first, stop, self._loop.time())
        self.gate.set_policy(policy)

    def reconfigure(self, config: VolumeConfig) -> None:
        """Take up the settings that may change while running, and report the others."""
        config, ignored = taken_up(self.config, config)
        if ignored:
            self._ignored(ignored, "cannot change while the volume runs")
        if config.predictor != self.config.predictor:
            self._exchange_policy(config.predictor)
        self.config = config
        self.copier.throttle.set_rate(config.copy_rate_bytes_per_s)
        self.copier.rounds.era_interval_s = effective_era_interval_s(config)
        self.copier.late.bound_s = config.late_writes_s
        self._recording.record_to(config.trace)
        self.gate.limit_extents = self._limit_extents(self.copier.meter.bytes_per_s)
        self._emit("settings-changed")

    # -- status ---------------------------------------------------------------------------
    @property
    def state(self) -> str:
        if self._presence.gone:
            return "degraded"
        return state_of(self._store, self.gate, self.copier, in_sync=self._in_sync)

    def status(self) -> dict[str, Any]:
        """One element of `volumes` in `dmctl status --json`."""
        return (
            describe(
                self.config,
                self.geometry,
                self._store,
                self.gate,
                self.copier,
                in_sync=self._in_sync,
            )
            | {
                "state": self.state,
                "last_recovery": self._recovery.result,
                "last_error": self._last_error,
                "connections": self._mode.server.stats.connections,
                "session": self._session.superblock.session,
                "primary_errors_total": self.gate.primary_errors,
            }
            | self._mode.figures(self.gate)
        )
