"""A volume with a receiver: its sender, the link, what the record keeps, when hosts come in (edge).

The sender stands where the copier of a plain secondary does.  Here are the connections that it is
given, the superblock that names its committed points, and the question that a start asks first.

1. The superblock names a point before anything is cleared for it, and the receiver's generation is
   never taken from what came over the link: only `promote` makes a new one.
2. A start asks the receiver before it lets hosts in: one that was promoted has the right data, and
   hosts that wrote here would have a second history.  A receiver that cannot be reached at once is
   not waited for, unless `start_alone` says so and the volume was not stopped cleanly.  Who has
   forced this one start lets hosts in all the same, but where the role was given away.
3. A receiver that turns out to be promoted while hosts are served is a split brain: that is said,
   nothing is sent, and nothing is overwritten.

A crash loses the link, and what the sender knew beyond the superblock.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import time
from typing import Any, Final, Protocol

from bitmapd import __version__
from bitmapd.config import VolumeConfig
from bitmapd.copier.throttle import Throttle
from bitmapd.errors import (
    BitmapdError,
    SplitBrainError,
    UnreachableError,
    WrongStateError,
)
from bitmapd.gate.cycle import CutGate
from bitmapd.gate.gate import Gate
from bitmapd.media.base import Done
from bitmapd.media.buffers import BufferPool
from bitmapd.media.kdevice import KernelDevice
from bitmapd.media.waiting import Aside
from bitmapd.net.uri import parse_receiver_uri
from bitmapd.peer.transport import Settings as LinkSettings
from bitmapd.peer.words import Error
from bitmapd.points.lineage import Verdict, judge
from bitmapd.points.messages import Hello2, Message, Role
from bitmapd.points.sender import Sender, Settings
from bitmapd.points.uplink import Identity
from bitmapd.points.wire import TIMEOUT_S, MessageWire, PointTransport
from bitmapd.record.points_state import PointsState
from bitmapd.record.superblock import as_ids
from bitmapd.volume.session import RecordSession

FIRST_WORD_S: Final = 5.0  # for a receiver that can be reached, while hosts wait to be served


class Owner(Protocol):
    """The volume."""

    def emit(self, event: str, **fields: Any) -> None: ...

    def changed(self) -> None: ...


class SuperblockLedger:
    """`sender.Ledger` over the session's superblock."""

    def __init__(
        self, session: RecordSession, loop: asyncio.AbstractEventLoop, aside: Aside
    ) -> None:
        self._session = session
        self._loop = loop
        self._aside = aside
        self._tasks: set[asyncio.Task[None]] = set()

    def commit(self, point: int, cut_ns: int, done: Done) -> None:
        task = self._loop.create_task(self._commit(point, cut_ns, done))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _commit(self, point: int, cut_ns: int, done: Done) -> None:
        points = dataclasses.replace(
            points_of(self._session), committed=point, cut_s=cut_ns // 10**9
        )
        try:
            await self._aside(self._session.update, points=points)
        except OSError as error:
            done(error)
        except BitmapdError as error:
            done(OSError(errno.EIO, error.message))
        else:
            done(None)


class ReceiverLink:
    """Connections to the receiver, one at a time, as the sender wants them (`wire.PointEnd`)."""

    def __init__(
        self,
        config: VolumeConfig,
        loop: asyncio.AbstractEventLoop,
        sender: Sender,
        session: RecordSession,
        owner: Owner,
    ) -> None:
        self._config = config
        self.sender = sender
        self._session = session
        self._owner = owner
        self._transport = PointTransport(loop, link_settings(config), self)
        self._heard = asyncio.Event()  # of the receiver, or that it cannot be reached
        self._failure = ""
        self._silent: MessageWire | None = None  # connected, and has said nothing yet
        self.is_forced = False
        self.verdict: Verdict | None = None  # of a receiver that is not followed
        self.receiver: Hello2 | None = None  # as it said last
        self.refusal: Error | None = None  # likewise
        sender.on_not_followed = self._not_followed

    def start(self) -> None:
        """Look for it.  A BitmapdError says what is wrong with the settings."""
        self._transport.start()

    def close(self) -> None:
        self._transport.close()
        self.sender.uplink.close()

    # -- the first word ---------------------------------------------------------------------
    async def first_word(self) -> None:
        """Return when hosts may be let in; see the module docstring."""
        points = points_of(self._session)
        name = self._config.name
        must_wait = self._config.start_alone == "no" and not self._session.both_left_equal
        if not self._config.receiver_dials or points.committed:
            try:
                async with asyncio.timeout(FIRST_WORD_S):
                    await self._heard.wait()
            except TimeoutError:
                self._failure = f"it did not answer within {FIRST_WORD_S:g} s"
        if self.verdict is not None and not (self.is_forced and self.is_split):
            self.refuse()
        if points.demoted:
            raise WrongStateError(
                f"volume '{name}' has given its role away, and lets no host in",
                hint=f"'dmctl switchover {name}' hands it over to {self._config.secondary}, 'dmctl"
                f" promote {name}' takes it back",
            )
        unheard = must_wait and self.receiver is None
        if self.is_forced and (self.is_split or unheard):
            reason = self._failure or "it was not heard"
            message = reason if self.verdict is None else self.verdict.value
            self._owner.emit("start-forced", secondary=self._config.secondary, message=message)
        elif unheard:
            raise UnreachableError(
                f"volume '{name}' was not stopped cleanly, and its receiver, which may have been"
                f" promoted meanwhile, was not heard: {self._failure or 'it has not come yet'}",
                hint="start it when the receiver can be reached, or set start_alone = yes;"
                f" 'dmctl start {name} --force' does not wait",
            )

    def refuse(self) -> None:
        """SplitBrainError or WrongStateError if the receiver is none that can be followed."""
        name, secondary = self._config.name, self._config.secondary
        if self.verdict is Verdict.SENDER_IS_OLD:
            raise WrongStateError(
                f"the receiver of volume '{name}' was promoted: what {secondary} has is newer",
                hint=f"'dmctl failback {name}' makes this the receiver of it, and copies only what"
                f" differs; 'dmctl start {name} --force' lets hosts in all the same: a split brain",
            )
        if self.verdict in (Verdict.BOTH_SERVE, Verdict.SPLIT_BRAIN):
            raise SplitBrainError(
                f"volume '{name}' and its receiver {secondary} have both been written, each without"
                " the other",
                hint="nothing was overwritten; see 'Both were written' in docs/recovery.md;"
                f" 'dmctl start {name} --force' serves what is here",
            )
        if self.verdict is not None:
            self._owner.emit("link-error", secondary=secondary, message=self.verdict.value)

    def _not_followed(self, verdict: Verdict, receiver: Hello2) -> None:
        self.verdict, self.receiver = verdict, receiver
        self._heard.set()
        self._owner.changed()

    @property
    def is_split(self) -> bool:
        return self.verdict in (Verdict.SENDER_IS_OLD, Verdict.BOTH_SERVE, Verdict.SPLIT_BRAIN)

    # -- `PointEnd` -------------------------------------------------------------------------
    def connected(self, wire: MessageWire) -> None:
        if self._config.receiver_dials:
            self._silent = wire
        else:
            self.sender.connected(wire)

    def received(self, wire: MessageWire, message: Message) -> None:
        if wire is self._silent:
            if isinstance(message, Hello2):
                self._another_sender(wire, message)
                return
            self._silent = None
            self.sender.connected(wire)
        self.sender.received(wire, message)
        if isinstance(message, Error):
            secondary, self.refusal = self._config.secondary, message
            self._owner.emit("link-error", secondary=secondary, message=message.text)
            self._owner.changed()
        if isinstance(message, Hello2) and wire.is_open:
            self.receiver, self.verdict = message, None
            self._heard.set()
            self._owner.changed()

    def drained(self, wire: MessageWire) -> None:
        self.sender.drained(wire)

    def lost(self, wire: MessageWire, reason: str) -> None:
        if wire is self._silent:
            self._silent = None
            return
        self.sender.lost(wire, reason)
        self._failure = reason
        self._heard.set()

    def failed(self, reason: str) -> None:
        self.sender.failed(reason)
        self._failure = reason
        self._heard.set()

    def _another_sender(self, wire: MessageWire, theirs: Hello2) -> None:
        """The other site is a volume as well.  It hears what became of its receiver, and either of
        the two has to follow."""
        ours = self.sender.uplink.hello(Role.PROMOTED)
        wire.send(ours)
        verdict = judge(theirs, ours)
        self._owner.emit("sender-refused", message=f"a volume, {theirs.program}: {verdict.value}")
        if verdict is Verdict.RECEIVER_IS_OLD:
            self._not_followed(Verdict.SENDER_IS_OLD, theirs)
        elif verdict is not Verdict.SENDER_IS_OLD:
            self._not_followed(Verdict.SPLIT_BRAIN, theirs)

    def figures(self) -> dict[str, Any]:
        """`receiver` of the status: as it said last."""
        theirs, uplink = self.receiver, self.sender.uplink
        return {
            "connected": uplink.is_ready,
            "role": None if theirs is None else theirs.role.name.lower(),
            "committed": uplink.known_committed,
            "applied": uplink.applied,
            "in_place": uplink.is_ready and uplink.is_in_place,
            "name": None if theirs is None else theirs.name,
            "version": None if theirs is None else theirs.program,
        }


def points_of(session: RecordSession) -> PointsState:
    """What the record says of points.  `RecordSession` has refused one that says nothing."""
    points = session.superblock.points
    if points is None:
        raise TypeError("a sender needs a record with points")
    return points


def link_settings(config: VolumeConfig) -> LinkSettings:
    """The site that was made as the receiver listens, whichever of the two is it now."""
    uri = parse_receiver_uri(config.secondary).peer
    return LinkSettings(
        dial=None if config.receiver_dials else uri,
        listen=uri if config.receiver_dials else None,
        name=config.partner_name or uri.host,
        certificates=config.partner_certificates or config.tls_certificates,
        fingerprint=config.partner_fingerprint,
        timeout_s=TIMEOUT_S,
    )


def make_sender(
    config: VolumeConfig,
    session: RecordSession,
    gate: Gate,
    primary: KernelDevice,
    loop: asyncio.AbstractEventLoop,
    aside: Aside,
    pool: BufferPool,
    owner: Owner,
    spool_file: KernelDevice | None,
) -> Sender:
    if not isinstance(gate, CutGate):
        raise TypeError("a sender needs the gate that can be cut")
    superblock, points = session.superblock, points_of(session)
    return Sender(
        superblock.geometry,
        gate,
        primary,
        loop,
        pool,
        Throttle(config.copy_rate_bytes_per_s),
        Identity(
            volume=config.uuid.bytes,
            incarnation=os.urandom(16),
            generations=as_ids(superblock.generations),
            term=points.term,
            committed=points.committed,
            name=parse_receiver_uri(config.secondary).name,
            program=f"bitmapd {__version__}",
            promoted=points.term > 0,
        ),
        SuperblockLedger(session, loop, aside),
        settings_of(config),
        owner.emit,
        time.time_ns,
        secondary=config.secondary,
        read_primary=primary.read_aside,
        spool_file=spool_file,
        committed_cut_s=points.cut_s,
    )


def settings_of(config: VolumeConfig) -> Settings:
    return Settings(config.point_interval_s, config.spool_limit_bytes, config.compress == "auto")
