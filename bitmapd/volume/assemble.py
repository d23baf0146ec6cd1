"""The parts of a volume: made, wired and given back, each in the order that they need.

A volume is a record, a gate, a copier and a way for hosts, with some that look after them.  They
are made in two steps.  `assemble` opens the media and makes everything; nothing is written to
primary or secondary, and nobody is served.  `Parts.begin` marks what has to be copied and lets
hosts in, if it is told to.  Whoever has to ask first whether hosts may be served does so between
the two, and whoever has another `Record` than the stored one hands it to the gate in `_make`.

1. Order of `assemble`: the record's lock and every check that needs no medium opened; primary,
   record, secondary (which may be away); then the new session (`RecordSession.begin`), for from
   there on another process cannot tell the old one from a crash; then what works on them.
2. Order of `begin`: what is recorded is marked, before a host can write; hosts; the copier.
3. After an error in either nothing stays open, locked or served (`Parts.abandon`).  If the session
   had begun the record says so, and the next start copies what it names.

A crash anywhere here leaves what a crash of a running volume leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

from bitmapd.attach.mode import Door, Mode
from bitmapd.attach.nbd_mode import NbdMode
from bitmapd.config import (
    Paths,
    VolumeConfig,
    effective_cut_patience_s,
    effective_era_intervals_s,
    effective_record_limit_bytes,
    has_receiver,
)
from bitmapd.copier.engine import Copier
from bitmapd.copier.throttle import Backoff, Throttle
from bitmapd.errors import BitmapdError, WrongStateError
from bitmapd.gate.cycle import CutGate
from bitmapd.gate.gate import Gate
from bitmapd.media.aio import AioEngine
from bitmapd.media.base import Target
from bitmapd.media.buffers import BufferPool
from bitmapd.media.claims import Claim
from bitmapd.media.kdevice import KernelDevice
from bitmapd.media.waiting import Aside
from bitmapd.predict.predictors import make_policy
from bitmapd.record.geometry import Geometry
from bitmapd.record.holder import Record
from bitmapd.record.store import RecordStore
from bitmapd.units import format_size
from bitmapd.volume.guard import Guard
from bitmapd.volume.hints import HintKeeper
from bitmapd.volume.mirror import Mirror
from bitmapd.volume.pausing import Pausing
from bitmapd.volume.presence import Presence
from bitmapd.volume.recovery import Recovery
from bitmapd.volume.requestlog import Recording
from bitmapd.volume.secondary import make_secondary, open_secondary, wrong_secondary
from bitmapd.volume.session import RecordSession
from bitmapd.volume.sides import NoteKeeper
from bitmapd.volume.spoolfile import open_spool

if TYPE_CHECKING:
    from bitmapd.attach.promoted_dm import PromotedDm
    from bitmapd.gate.direct import DirectPath
    from bitmapd.partner.pair import Pair
    from bitmapd.volume.pairing import VolumeHome
    from bitmapd.volume.sending import ReceiverLink


COPY_POOL_BYTES = 16 << 20
MIN_LIMIT_EXTENTS = 64
FIRST_GUESS_BYTES_PER_S = 110e6  # of the speed of copying: a gigabit link

Undo = list[Callable[[], None]]


class Owner(Protocol):
    """Whom the parts tell what happens; `Volume`.  On the loop's thread."""

    def emit(self, event: str, **fields: Any) -> None: ...

    def changed(self) -> None:
        """Something that somebody may wait for has changed; from `Parts.begin` on."""

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return when the condition holds, which is looked at with each `changed`."""

    def outdated(self) -> None:
        """The partner has taken over from this process."""

    def inherited(self, extents: int) -> None:
        """So many were the partner's and are copied here."""

    def primary_failed(
        self, verb: str, offset_bytes: int, length_bytes: int, error: OSError
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class _Base:
    """What there is before any medium is opened."""

    config: VolumeConfig
    loop: asyncio.AbstractEventLoop
    aside: Aside
    session: RecordSession
    mode: Mode
    door: Door | None  # of a pair: the same
    opened: Undo  # what ends it, last first, after an error

    async def abandon(self) -> None:
        """Close whatever is open, for the start has failed."""
        for close in reversed(self.opened):
            close()
        try:
            await self.mode.undo()
            if not self.mode.adopted:
                await self.aside(self.session.seal)
        finally:
            self.session.close()
            self.aside.close()


@dataclass(frozen=True, slots=True)
class Parts(_Base):
    """All of a volume; see the module docstring."""

    engine: AioEngine
    primary: KernelDevice
    record: KernelDevice
    spool_file: KernelDevice | None
    secondary: Target | None  # None: a receiver
    store: RecordStore  # what is stored
    names: Record  # what the gate asks; the same, or over it
    pair: Pair | None
    gate: Gate
    copier: Mirror
    receiver: ReceiverLink | None
    hints: HintKeeper
    note: NoteKeeper
    presence: Presence
    recording: Recording
    recovery: Recovery
    pausing: Pausing
    guard: Guard | None  # of a secondary that somebody may write at rest

    async def begin(self, *, admit: bool) -> None:
        """Copy, and `admit` hosts."""
        self.recording.record_to(self.config.trace)
        self.recovery.begin()
        await self.mode.begin(
            self.engine, self.gate, self.names, self._may_spin, self.opened, self.primary
        )
        if admit:
            await self.mode.admit()
        if not isinstance(self.copier, Copier):
            self.copier.start(paused=self.pausing.paused)
            return
        if self.guard is not None and self.session.secondary_was_written:
            self.guard.found(())
        self.copier.start(
            paused=self.pausing.paused,
            guarded=self.session.both_left_equal and not self.session.secondary_was_written,
        )

    def _may_spin(self) -> bool:
        """Neither copies nor the partner's answers, which come by the loop, have to wait for it."""
        return self.copier.idle and (self.pair is None or not self.pair.rights.waiting)

    def forget_everything(self) -> None:
        """The partner has all of it: the stored record need not name it any longer."""
        runs = list(self.store.recorded_runs())
        self.store.drop(extent for first, stop in runs for extent in range(first, stop))

    def asked(self) -> tuple[int, ...] | None:
        """Figures of which some move when a medium answers; None while nothing is asked of one."""
        if not self.engine.in_flight and not self.aside.at_work:
            return None
        return (
            self.engine.in_flight,
            self.aside.at_work,
            self.copier.copied_bytes,
            self.gate.settles,
            self.store.updates + self.store.clears,
        )

    def plain_secondary(self, doing: str) -> Target:
        """WrongStateError if it is a receiver."""
        if self.secondary is None:
            raise WrongStateError(
                f"volume '{self.config.name}' has a receiver, and this version cannot {doing}"
            )
        return self.secondary

    def silent_media(self) -> str:
        """Which of them may be the one that does not answer."""
        config = self.config
        if self.store.write_age_s > 0 or self.aside.at_work:
            return f"record {config.record}"
        if not self.copier.idle:
            return f"primary {config.primary} or secondary {config.secondary}"
        return f"primary {config.primary}"

    async def finish(self) -> None:
        """What is done last while everything is still open; the copier has been stopped."""
        self.recording.close()
        await self.hints.save()
        await self.note.end()
        self.presence.end()
        if self.pair is not None:
            await self.pair.end()
        await self._until_idle()

    async def close(self) -> None:
        if self.pair is not None:
            self.pair.close()
        if self.receiver is not None:
            self.receiver.close()
        if self.secondary is not None:
            self.secondary.close()
        for device in (self.primary, self.record, self.spool_file):
            if device is not None:
                await self.engine.call(device.close)
        await self._until_idle()
        await self.aside(self.session.close)
        self.aside.close()
        self.engine.close()

    async def _until_idle(self) -> None:
        idle = asyncio.Event()
        self.engine.when_idle(idle.set)
        await idle.wait()


async def assemble(
    config: VolumeConfig, paths: Paths, loop: asyncio.AbstractEventLoop, owner: Owner
) -> Parts:
    """Everything of a volume, ready to `begin`; on an error nothing of it is left."""
    aside = Aside(f"record-{config.name}")

    def emit_from_aside(event: str, **fields: Any) -> None:
        loop.call_soon_threadsafe(partial(owner.emit, event, **fields))

    try:
        session = await aside(
            partial(RecordSession, config, paths, emit_from_aside, node=config.node)
        )
    except BaseException:
        aside.close()
        raise
    mode, door = _make_mode(config, loop, owner)
    base = _Base(config, loop, aside, session, mode, door, [])
    try:
        return await _make(base, paths, owner)
    except BaseException:
        await base.abandon()
        raise


def _make_mode(
    config: VolumeConfig, loop: asyncio.AbstractEventLoop, owner: Owner
) -> tuple[Mode, Door | None]:
    """What is loaded for device-mapper alone takes 0.6 MiB of every process that has it."""
    if config.attach != "dm":
        over_nbd = NbdMode(config, loop, owner.emit)
        return over_nbd, over_nbd
    if config.node is None:
        from bitmapd.attach.dm_mode import DmMode  # noqa: PLC0415

        return DmMode(config, loop, owner.emit, on_barrier=owner.changed), None
    from bitmapd.attach.promoted_dm import PromotedDm  # noqa: PLC0415

    promoted = PromotedDm(config, loop, owner.emit, on_barrier=owner.changed)
    return promoted, promoted


async def _make(base: _Base, paths: Paths, owner: Owner) -> Parts:
    config, loop, aside, session, mode = base.config, base.loop, base.aside, base.session, base.mode
    opened, emit = base.opened, owner.emit
    geometry = session.superblock.geometry

    engine = AioEngine(loop)
    opened.append(engine.close)
    await mode.prepare(geometry, opened)
    shared = session.pair is not None
    claim = Claim(session.pair.node, session.pair.volume) if session.pair is not None else Claim()
    primary = await engine.call(
        partial(
            KernelDevice,
            config.primary,
            engine,
            claim=claim if mode.exclusive or shared else None,
            guarded=mode.exclusive,
        )
    )
    opened.append(primary.close)
    record = await engine.call(partial(KernelDevice, config.record, engine))
    opened.append(record.close)
    _warn_if_buffered((primary, record), emit)
    secondary: Target | None = None
    if not has_receiver(config):
        secondary = make_secondary(config, loop, engine, session.secondary_mismatch, claim)
        opened.append(secondary.close)
        await open_secondary(secondary, loop, session.secondary_mismatch, emit, shared=shared)

    await aside(session.begin)
    _warn_of_other_sizes(config, geometry, emit)
    # Misses of one batch share a record write; it leaves with the batch, not a turn later.
    store = RecordStore(geometry, session.loaded, record, engine, emit)
    media = [medium for medium in (primary, record, secondary) if isinstance(medium, KernelDevice)]
    home: VolumeHome | None = None
    pair: Pair | None = None
    names: Record = store
    if session.pair is not None:
        from bitmapd.volume.pairing import VolumeHome, make_pair  # noqa: PLC0415  (`mirror`)

        home = VolumeHome(owner)
        pair = make_pair(config, session, session.pair, store, loop, engine, aside, home, media)
        names = pair.record
        opened.append(pair.close)
    policy, limit = make_policy(config.predictor, geometry), limit_extents(config, geometry, None)
    gate: Gate
    if secondary is None:
        patience_s = effective_cut_patience_s(config)
        gate = CutGate(
            geometry,
            primary,
            names,
            policy,
            loop,
            limit_extents=limit,
            patience_s=patience_s,
            direct=cast("DirectPath", mode.elsewhere[0]) if base.door is None else None,
        )
    else:
        gate = Gate(
            geometry,
            primary,
            names,
            policy,
            loop,
            limit_extents=limit,
            elsewhere=mode.elsewhere,
            asks=None if pair is None else pair.rights,
            piecewise=pair is not None,
            owns=None if pair is None else pair.rights.owns,
        )
    gate.on_primary_error = owner.primary_failed
    hints = HintKeeper(session, gate, loop, aside, emit)
    await hints.begin()
    copier: Mirror
    receiver: ReceiverLink | None = None
    spool_file: KernelDevice | None = None
    pool = BufferPool(loop, COPY_POOL_BYTES)
    if secondary is None:
        from bitmapd.volume.sending import ReceiverLink, make_sender  # noqa: PLC0415  (`mirror`)

        if config.spool is not None:
            try:
                spool_file = await engine.call(
                    partial(open_spool, config.spool, config.spool_file_limit_bytes, engine)
                )
                opened.append(spool_file.close)
            except BitmapdError as error:  # no host waits for what only spares the link
                emit("spool-error", blocks=0, message=error.message)
        copier = make_sender(config, session, gate, primary, loop, aside, pool, owner, spool_file)
        receiver = ReceiverLink(config, loop, copier, session, owner)
        opened.append(receiver.close)
    else:
        copier = _make_copier(config, session, gate, primary, secondary, loop, pool, emit)
        if pair is not None and home is not None:
            home.attach(gate, copier, primary, secondary, geometry.block_bytes)
            pair.attach(gate, copier)
            if config.attach == "dm":
                cast("PromotedDm", mode).path.is_held_up = pair.holds_up_hosts
            engine.on_shut_out = pair.shut_out
    copier.on_change = owner.changed
    samples = copier.samples if isinstance(copier, Copier) else None
    note = NoteKeeper(
        config,
        paths,
        lambda: session.superblock,
        lambda: () if samples is None else samples.lately,
        loop,
        emit,
    )
    if samples is not None and session.primary_is_as_left:
        samples.remember(note.lately_before)
    recording = Recording(gate, loop, emit)
    opened.append(recording.close)
    pausing = Pausing(config.name, session, copier, owner.until, aside, emit)
    return Parts(
        config,
        loop,
        aside,
        session,
        mode,
        base.door,
        opened,
        engine=engine,
        primary=primary,
        record=record,
        spool_file=spool_file,
        secondary=secondary,
        store=store,
        names=names,
        pair=pair,
        gate=gate,
        copier=copier,
        receiver=receiver,
        hints=hints,
        note=note,
        presence=Presence(media, engine, loop, emit),
        recording=recording,
        recovery=Recovery(session, names, gate, copier, loop, aside, emit, on_kept=owner.changed),
        pausing=pausing,
        guard=Guard(config.name, config.secondary, gate, copier, pausing, loop, emit)
        if isinstance(copier, Copier)
        else None,
    )


def _make_copier(
    config: VolumeConfig,
    session: RecordSession,
    gate: Gate,
    primary: KernelDevice,
    secondary: Target,
    loop: asyncio.AbstractEventLoop,
    pool: BufferPool,
    emit: Callable[..., None],
) -> Copier:
    shortest_s, longest_s = effective_era_intervals_s(config)
    return Copier(
        session.superblock.geometry,
        gate,
        primary,
        secondary,
        loop,
        pool,
        Throttle(config.copy_rate_bytes_per_s),
        Backoff(),
        emit,
        check_secondary=partial(
            wrong_secondary, secondary, session.secondary_mismatch, shared=session.pair is not None
        ),
        era_interval_s=shortest_s,
        longest_era_s=longest_s,
        late_writes_s=config.late_writes_s,
        read_primary=primary.read_aside,
    )


def limit_extents(config: VolumeConfig, geometry: Geometry, speed_bytes_per_s: float | None) -> int:
    """How many extents the record should name at most, at this speed of copying."""
    if config.resync_target_s is None:
        limit = effective_record_limit_bytes(config, geometry.size_bytes)
    else:
        limit = int(config.resync_target_s * (speed_bytes_per_s or FIRST_GUESS_BYTES_PER_S))
    whole = geometry.extents if limit >= geometry.size_bytes else 0  # the last one may be short
    return max(MIN_LIMIT_EXTENTS, limit // geometry.extent_bytes, whole)


# -- what the configuration says and is not so ------------------------------------------------


def tell_ignored(emit: Callable[..., None], keys: list[str], reason: str) -> None:
    emit(
        "settings-ignored",
        keys=keys,
        message=f"{', '.join(keys)} of the configuration: no effect, {reason}",
    )


def _warn_of_other_sizes(
    config: VolumeConfig, geometry: Geometry, emit: Callable[..., None]
) -> None:
    """The record has the sizes that the volume was created with; those of the file are none."""
    sizes = {
        "extent_size": (config.extent_size_bytes, geometry.extent_bytes),
        "block_size": (config.block_size_bytes, geometry.block_bytes),
    }
    other = {key: made for key, (written, made) in sizes.items() if written not in (None, made)}
    if other:
        made = ", ".join(f"{key} = {format_size(size)}" for key, size in other.items())
        tell_ignored(emit, list(other), f"the volume was created with {made}")


def _warn_if_buffered(devices: tuple[KernelDevice, ...], emit: Callable[..., None]) -> None:
    for device in devices:
        if not device.direct:
            emit(
                "not-direct",
                device=device.name,
                message="the file system has no direct I/O: a power cut may lose what the"
                " page cache holds until it is flushed",
            )
