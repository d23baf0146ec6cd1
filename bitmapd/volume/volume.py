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
from datetime import UTC, datetime
from typing import Any

from bitmapd.attach.dm_mode import DmMode
from bitmapd.config import (
    Paths,
    VolumeConfig,
    effective_era_interval_s,
    taken_up,
)
from bitmapd.control.catalogue import lookup
from bitmapd.copier.engine import CopyState
from bitmapd.errors import (
    BitmapdError,
    BusyError,
    UnreachableError,
    UsageError,
    WrongStateError,
)
from bitmapd.media.kdevice import KernelDevice
from bitmapd.media.waiting import completion
from bitmapd.partner.node import Proof
from bitmapd.partner.pair import Pair
from bitmapd.predict.predictors import make_policy
from bitmapd.record.geometry import Geometry
from bitmapd.volume.assemble import assemble, limit_extents, tell_ignored
from bitmapd.volume.hosts import VolumeHosts
from bitmapd.volume.pairing import state_of_pair
from bitmapd.volume.resize import (
    commit_growth,
    new_page_states,
    prepare_growth,
    present_geometry,
)
from bitmapd.volume.secondary import leave_at_once
from bitmapd.volume.status import describe, state_of
from bitmapd.volume.verifying import Progress, Verifying, repaired, tell

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
        self._emit_event = emit
        self._last_error: dict[str, str] | None = None
        self._changed = asyncio.Event()
        self._was_in_sync: bool | None = None
        self._verifying: Verifying | None = None
        self._stopping = False
        self._hurried = False
        self.serving = False  # hosts are let in
        self.on_outdated: Callable[[], None] | None = None
        self._hosts: VolumeHosts | None = None  # of one of two appliances
        self._entering: asyncio.Task[None] | None = None
        self.left = False  # grown, and not served any more: another one takes over
        self._tick_timer: asyncio.TimerHandle | None = None

    # -- start ----------------------------------------------------------------------------
    async def start(self) -> None:
        """Recover and export; on an error everything that was opened is closed again."""
        parts = await assemble(self.config, self._paths, self._loop, self)
        self._parts, self.gate, self.copier = parts, parts.gate, parts.copier
        self.geometry = parts.session.superblock.geometry
        try:
            if parts.pair is not None:
                parts.pair.start()
            if parts.pair is None or parts.pair.serves:
                await self._begin()
            else:
                self._entering = self._loop.create_task(self._enter(parts.pair))
                self._entering.add_done_callback(self._entered)
        except BaseException:
            await parts.abandon()
            raise
        self._tick_timer = self._loop.call_later(TICK_S, self._tick)

    async def _begin(self) -> None:
        parts = self._parts
        await parts.begin()
        if parts.pair is not None:
            self._hosts = VolumeHosts(parts.mode, self._loop, parts.serve_hosts)
            parts.pair.node.serve(self._hosts)
        self.serving = True
        self.changed()

    async def _enter(self, pair: Pair) -> None:
        """Let hosts in once the pair knows what the partner may write."""
        await self.until(lambda: pair.serves or self._stopping)
        if not self._stopping:
            await self._begin()

    def _entered(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            what = {"message": "the volume cannot be served", "exception": error}
            self._loop.call_exception_handler(what)

    # -- what the parts tell (`assemble.Owner`) -------------------------------------------
    def emit(self, event: str, **fields: Any) -> None:
        if lookup(event).is_error:
            self._last_error = {
                "code": event,
                "message": str(fields.get("message", event)),
                "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            }
        self._emit_event(event, **fields)

    def outdated(self) -> None:
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
        if self._parts.pair is not None:
            self._parts.pair.tick()
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
        pair = self._parts.pair
        if pair is not None and self.serving and pair.begins_to_compare():
            self._loop.create_task(self._compare_everything())
        in_sync = self._in_sync
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
    def _in_sync(self) -> bool:
        pair = self._parts.pair
        here = self.serving and self.copier.in_sync and self._parts.recovery.kept
        return here and (pair is None or pair.in_sync)

    async def _compare_everything(self) -> None:
        """Nobody knows what the partner has written: every place may differ."""
        everything, recorded = (0, self.geometry.extents), asyncio.Event()
        error: OSError | None = None

        def added(failed: OSError | None) -> None:
            nonlocal error
            error = failed
            recorded.set()

        if self._parts.names.add([everything], (), added):
            await recorded.wait()
        if error is None:  # else the store has reported it; what is not covered is copied as dirt
            self.gate.take_recorded()
        self.copier.begin_pass(compare=True)

    async def until(self, condition: Callable[[], bool]) -> None:
        while not (condition() or self.left):
            changed = self._changed
            await changed.wait()

    # -- stop -----------------------------------------------------------------------------
    async def stop(self, now: bool) -> dict[str, Any]:
        """Stop; true `clean` in the answer if nothing is left to copy."""
        if self._stopping:
            raise WrongStateError(f"volume '{self.config.name}' is stopping already")
        self._stopping = True
        if not self.serving:
            return await self._stop_waiting()
        try:
            await self._parts.mode.close_hosts()
        except BusyError:
            self._stopping = False
            raise
        if self._verifying is not None:
            self._verifying.cancel(errno.ECANCELED, "the volume is being stopped")
        if now:
            self.hurry()
        await self._parts.mode.last_writes(self._end_eras)
        pair = self._parts.pair
        given = pair is not None and not self._hurried and await pair.leave()
        if given:
            self._parts.forget_everything()
        elif not now:
            await self._drain()
        await self._parts.pausing.close()
        stopped = asyncio.Event()
        self.copier.stop(stopped.set)
        await stopped.wait()
        await self._parts.guard.end()
        await self._parts.recovery.end()
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
        await self._parts.mode.detach(self._parts.primary.close)
        await self._parts.aside(self._parts.session.seal)
        await self._parts.close()
        if failure is not None:
            raise failure
        return {"clean": clean, "record_extents": extents, "paused": paused}

    async def _stop_waiting(self) -> dict[str, Any]:
        """Of a node of a pair that has not been served: nothing of it has changed."""
        self.changed()
        if self._entering is not None:
            await asyncio.wait([self._entering])
        stopped = asyncio.Event()
        self.copier.stop(stopped.set)
        await stopped.wait()
        await self._parts.guard.end()
        extents = self._parts.store.recorded_extents
        self.emit("stopped", clean=False, record_extents=extents, paused=self._parts.pausing.stored)
        await self._finish()
        await self._parts.close()
        return {"clean": False, "record_extents": extents, "paused": self._parts.pausing.stored}

    async def _finish(self) -> None:
        if self._tick_timer is not None:
            self._tick_timer.cancel()
        await self._parts.finish()

    def asked(self) -> tuple[int, ...] | None:
        """Figures of which some move when a medium answers; None while nothing is asked of one."""
        if not self._parts.engine.in_flight and not self._parts.aside.at_work:
            return None
        copier, store = self.copier, self._parts.store
        return (
            self._parts.engine.in_flight,
            self._parts.aside.at_work,
            copier.copied_bytes,
            self.gate.settles,
            store.updates + store.clears,
        )

    def silent_media(self) -> str:
        """Which of them may be the one that does not answer."""
        config = self.config
        if self._parts.store.write_age_s > 0 or self._parts.aside.at_work:
            return f"record {config.record}"
        if not self.copier.idle:
            return f"primary {config.primary} or secondary {config.secondary}"
        return f"primary {config.primary}"

    async def _end_eras(self, enough: Callable[[], bool]) -> None:
        self.copier.wake()
        await self.until(enough)

    def hurry(self) -> None:
        """Let a stop that is copying what is left end without it.

        Eras end only while no copy is in flight, so the last ones would wait for a secondary that
        hangs as long as that does.
        """
        self._hurried = True
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
            await self._until_in_sync()
            self._parts.pausing.refuse("it does not come into sync")
        elif state in ("paired", "alone"):
            pair = self._pair()
            await self.until(lambda: pair.state.value == state)
        elif state == "started":
            await self.until(lambda: self.serving)
        else:
            raise UsageError(f"cannot wait for {state!r} here")

    async def _until_in_sync(self) -> None:
        """What was written at either node before this call is on the secondary, or copying is
        paused."""
        pair = self._parts.pair
        if pair is None:
            await self.until(lambda: self._in_sync or self._parts.pausing.paused)
            return
        # What the other said last may be older than what was written there, and the next word of it
        # may be on its way: the one after that is new.
        new = pair.peer.words + 2
        pair.asked += 1
        try:
            await self.until(
                lambda: (
                    (self._in_sync and (pair.peer.words >= new or not pair.is_paired))
                    or self._parts.pausing.paused
                )
            )
        finally:
            pair.asked -= 1

    def _pair(self) -> Pair:
        if self._parts.pair is None:
            raise WrongStateError(f"volume '{self.config.name}' has no partner")
        return self._parts.pair

    def _refuse_unless_serving(self) -> None:
        if not self.serving:
            self._pair().refuse_waiting(self.config.name)

    def partner(self) -> dict[str, Any]:
        """`partner` of the status; WrongStateError for a single appliance."""
        return self._pair().status()

    async def take_over(self, fenced: bool, force: bool) -> dict[str, Any]:
        """Serve without the partner.  One that is there stops its hosts and gives everything, with
        `force` also hosts that are connected; one that is not is taken over from by the
        administrator's word (`fenced`) that it can write no more."""
        pair = self._pair()
        pair.refuse_ended(self.config.name)
        if pair.is_paired and not fenced:
            await pair.take(force)
        elif not pair.is_alone:
            if not fenced:
                raise UnreachableError(
                    f"nothing proves that the partner of volume '{self.config.name}' can write no"
                    " more",
                    hint="make certain that it cannot (switch it off, or cut it off from the"
                    f" storage), then 'dmctl takeover {self.config.name} --fenced'",
                )
            pair.take_over(Proof.WORD)
            await self.until(lambda: not pair.node.going_alone)
            if not pair.is_alone:
                raise BitmapdError("that this node goes on alone could not be recorded")
            await self.until(lambda: self.serving)
        if self._hosts is not None:
            self._hosts.go_on()
        return {"state": self.state, "partner": pair.status()}

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
        elif not self._in_sync:
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
        self._verifying = Verifying(
            self._loop,
            self.geometry,
            self.gate,
            self._parts.primary,
            self._parts.secondary,
            repair=repair,
        )
        try:
            result = await self._verifying.run(progress)
        finally:
            self._verifying = None
        report = tell(result, self.config, self.emit)
        if repair and result.repaired_bytes:
            await repaired(self.gate, self.copier, self._loop.time(), self.until)
        return report

    async def resize(self) -> dict[str, Any]:
        """Take up a larger size of primary and secondary.

        If this volume is `left` afterwards, another `Volume` has to be started in its place.
        """
        if self._parts.pair is not None:
            raise WrongStateError(
                f"volume '{self.config.name}' is one of a pair, which this version cannot resize"
            )
        geometry = await present_geometry(
            self.config, self.geometry, self._parts.secondary, self._loop
        )
        if geometry is None:
            return {"size_bytes": self.geometry.size_bytes, "changed": False}
        if isinstance(self._parts.mode, DmMode):
            await self._leave(self._parts.mode, geometry)
        else:
            await self._grow(geometry)
        return {"size_bytes": geometry.size_bytes, "changed": True}

    async def _grow(self, geometry: Geometry) -> None:
        parts = self._parts
        await parts.primary.present_size_bytes()
        await prepare_growth(parts.session, parts.store, self.gate, geometry, parts.aside)
        await commit_growth(parts.session, geometry, parts.aside)
        parts.store.grow(geometry, new_page_states(self.geometry, geometry))
        self.copier.grow(geometry)
        self.gate.grow(geometry)
        self.geometry = geometry
        self._exchange_policy(self.config.predictor)
        if not isinstance(parts.secondary, KernelDevice):
            # A server tells its size when a connection begins.
            self.copier.reconnect()
        self.emit("resized", size_bytes=geometry.size_bytes)

    async def _leave(self, mode: DmMode, geometry: Geometry) -> None:
        """Give the volume, grown, to the next `Volume`; hosts' writes wait in the kernel for it.

        Up to the end of the server an error leaves everything as it was.
        """
        parts = self._parts
        await prepare_growth(parts.session, parts.store, self.gate, geometry, parts.aside)
        await mode.close_direct(self._end_eras)
        if self._verifying is not None:
            self._verifying.cancel(errno.ECANCELED, "the volume is taken up with its new size")
        self.left = True
        self.changed()
        await parts.pausing.close()
        await mode.hold_hosts()
        stopped = asyncio.Event()
        self.copier.stop(stopped.set)
        leave_at_once(parts.secondary)
        await stopped.wait()
        await parts.guard.end()
        await parts.recovery.end()
        await commit_growth(parts.session, geometry, parts.aside)
        await self._finish()
        mode.hand_over()
        await parts.close()
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
        self.copier.rounds.era_interval_s = effective_era_interval_s(config)
        self.copier.late.bound_s = config.late_writes_s
        self._parts.recording.record_to(config.trace)
        self.gate.limit_extents = limit_extents(
            self.config, self.geometry, self.copier.meter.bytes_per_s
        )
        self.emit("settings-changed")

    # -- status ---------------------------------------------------------------------------
    @property
    def state(self) -> str:
        if self._parts.presence.gone:
            return "degraded"
        pair = self._parts.pair
        if pair is not None and (state := state_of_pair(pair)) is not None:
            return state
        return state_of(self._parts.store, self.gate, self.copier, in_sync=self._in_sync)

    def status(self) -> dict[str, Any]:
        """One element of `volumes` in `dmctl status --json`."""
        return (
            describe(
                self.config,
                self.geometry,
                self._parts.store,
                self.gate,
                self.copier,
                in_sync=self._in_sync,
            )
            | {
                "state": self.state,
                "last_recovery": self._parts.recovery.result,
                "last_error": self._last_error,
                "connections": self._parts.mode.server.stats.connections if self.serving else 0,
                "session": self._parts.session.superblock.session,
                "primary_errors_total": self.gate.primary_errors,
                "partner": None if self._parts.pair is None else self._parts.pair.status(),
            }
            | self._parts.mode.figures(self.gate)
        )
