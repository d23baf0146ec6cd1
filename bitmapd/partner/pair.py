"""The pair that a volume belongs to: its link, its node, and what both need of this machine (edge).

`PairRecord` goes to the gate in the place of the stored record, `Pair.rights` answers its questions
before reads.  Everything else is here: a connection is made, its frames become messages for `Node`,
what `Node` has to know durably is written, and what the other node tells of itself is kept.

1. The volume is served while `serves`; the owner hears of every change (`changed`).
2. A message is complete before `Node` sees it, and one that is wrong ends the connection.
3. The newer of two connections counts: the other node would not dial while it has one.
4. Five wrong connections in a minute slow dialling down (`peer/backoff`).

A crash leaves what `node` says.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol
from uuid import uuid4

from bitarray import bitarray

from bitmapd import __version__
from bitmapd.errors import BitmapdError, SplitBrainError, UnreachableError, WrongStateError
from bitmapd.media.base import Done, Scheduler
from bitmapd.media.waiting import Aside, completion
from bitmapd.partner.codec import Decoder, encode
from bitmapd.partner.fence import Fence
from bitmapd.partner.fence_policy import FenceSettings
from bitmapd.partner.greeting import (
    KNOWS_DIRECT,
    KNOWS_GO_ON,
    KNOWS_KEEPERS,
    NIL,
    OFFERED,
    REQUIRED,
    SAYS_VOLATILE,
    STORES_FIRST,
    VERSION,
)
from bitmapd.partner.holder import Copies, Hands, Mirror, PairRecord
from bitmapd.partner.messages import IDLE, Hello, HelloFlag, Message, Ping, Role
from bitmapd.partner.node import Lasting, Node, Phase, Proof, State
from bitmapd.partner.otherrecord import why_not
from bitmapd.partner.rights import MOST_REQUESTS, Rights
from bitmapd.peer.connection import Connection
from bitmapd.peer.frames import Frame, PeerError
from bitmapd.peer.payloads import Runs
from bitmapd.peer.transport import PeerTransport, Settings
from bitmapd.peer.words import Pong
from bitmapd.record import tool
from bitmapd.record.geometry import Geometry
from bitmapd.record.store import RecordStore

READ_TIMEOUT_S: Final = 30.0  # for the other's record, in a takeover
SLOW_S: Final = 5.0  # a host's request waits so long for the partner: reported once

_SECONDARY: Final = ("up", "down", "paused")  # the number that PING gives is the place here


@dataclass(frozen=True, slots=True)
class Names:
    """What HELLO says of the volume and its media."""

    volume: str
    primary: str
    secondary: str
    session: int
    relies: bool = False  # record_on = partner
    stored: bool = False  # partner_ack = stored
    goes_on: bool = False  # on_cut = go-on
    keeps: bool = False  # partner_role = keeper
    falls_back: bool = True  # record_fallback
    partner_record: str | None = None  # the other's record device as seen from here
    direct: bool = False  # attach = dm
    on_promote: bool = False  # serve = on-promote


@dataclass(slots=True)
class Peer:
    """What the other node said last of itself."""

    dirty_bytes: int = 0
    age_s: float = 0.0
    secondary: int = 0
    copied_bytes: int = 0
    lets_hosts_in: bool = False
    words: int = 0  # how often it has said so


class Home(Protocol):
    """The volume around a pair.  Calls come from the loop."""

    def changed(self) -> None:
        """Something that somebody may wait for has changed."""

    def emit(self, event: str, **fields: Any) -> None: ...

    def figures(self) -> tuple[int, float, str, int]:
        """Dirty bytes, the age of the oldest in seconds, the secondary ("up", "down", "paused"),
        and bytes copied since the start: for the other node."""

    def idle_dirt(self, *, wanted: bool) -> Sequence[int]:
        """Extents with something to copy that nobody has written since the last barrier; none
        unless they are `wanted`, and then barriers go on though nothing is copied."""

    def other_died(self, extents: Runs, *, late: bool) -> None:
        """These were the other's and are ours; `late`: what it had sent there may yet land."""

    def primary_late_s(self) -> float:
        """For how long what the other had sent to the primary may go on to land there."""

    def outdated(self) -> None:
        """The partner has taken over from this process: it must not go on."""


class Batches(Scheduler, Protocol):
    """Where `call_soon` is the end of this batch of requests, which comes before the next turn of
    the loop."""

    def cork(self) -> None:
        """A batch begins; `kick` ends it."""

    def kick(self) -> None: ...


@dataclass(slots=True)
class _Wire:
    """One connection, as `Node` sees it."""

    connection: Connection
    decoder: Decoder = field(default_factory=Decoder)

    @property
    def frames(self) -> int:
        """That were sent."""
        return self.connection.link.frames_sent

    def send(self, message: Message) -> int:
        return self.connection.send(encode(message))

    def close(self, error: PeerError | None) -> None:
        self.connection.close(error)


class Pair:
    """See the module docstring."""

    def __init__(
        self,
        number: int,
        lasting: Lasting,
        geometry: Geometry,
        store: RecordStore,
        names: Names,
        settings: Settings,
        loop: asyncio.AbstractEventLoop,
        batches: Batches,
        home: Home,
        write: Callable[[Lasting], Awaitable[None]],
    ) -> None:
        """`write` makes what `Node` has to know durable."""
        self._geometry = geometry
        self._names = names
        self._loop = loop
        self._batches = batches
        self._home = home
        self._write = write
        self._stored_record = store
        self._hands = Hands(store, self._send, self._push)
        self._hands.on_unstored = lambda: loop.call_soon(self.node.begin_anew)
        self.rights = Rights(geometry, number, batches, self._hands)
        self.rights.has_room = self._has_room
        self.record = PairRecord(store, self.rights)
        self.node = Node(number, lasting, self.rights, loop, self, keeps=names.keeps)
        self.node.stand_in.on = names.falls_back
        self.record.on_unwritten = self.node.stand_in.unwritten
        self.fence = Fence(self.node, loop, home)
        self.peer = Peer()
        self.since_s = loop.time()  # of the state
        self.rtt_s: float | None = None
        self.incarnation = secrets.randbits(63) | 1
        self._timeout_s = settings.timeout_s
        self._transport = PeerTransport(loop, settings, self, batches.call_soon)
        self._wire: _Wire | None = None
        self._pings: dict[int, asyncio.Future[float]] = {}  # by number: `ping` waits for PONG
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_failure = ""
        self._frames_before = 0
        self._told_slow = False
        self._comparisons = 0  # that were asked for
        self.hands_over = False  # what is to be copied, since there is no way to the secondary here
        self.asked = 0  # who waits for a word of the other node
        self.lets_hosts_in = False
        self._waiting_since_s: float | None = None
        self._state = self.node.state
        self._machine = _machine_id()
        self._boot = _boot_id()

    def attach(self, gate: Mirror, copier: Copies) -> None:
        """They are made with `record` and `rights`, so this comes after them."""
        self._hands.attach(gate, copier, self.record)

    def start(self, direct: Runs = ()) -> None:
        """Look for the partner.  Raises a BitmapdError if it cannot be listened for.  `direct`: as
        in `Node.start`."""
        self._transport.start()
        self.node.start(direct)

    def set(self, fence: FenceSettings, cut_patience_s: float | None) -> None:
        """What may change while it runs."""
        self.fence.settings, self.rights.cut_patience_s = fence, cut_patience_s

    def grow(self, geometry: Geometry) -> None:
        """The volume is larger from now on."""
        self._geometry = geometry
        if self._wire is not None and self._wire.decoder.extents:
            self._bound(self._wire.decoder)

    def _bound(self, decoder: Decoder) -> None:
        decoder.extents, decoder.blocks = self._geometry.extents, self._geometry.blocks

    def close(self) -> None:
        self.fence.close()
        self._transport.close()
        if self._wire is not None:
            wire, self._wire = self._wire, None
            wire.connection.close()

    def shut_out(self) -> None:
        """A medium has answered with a reservation conflict: a fence agent has shut this node out.
        One that never met a partner has nobody who would fence it, and another error."""
        if not self.node.lasting.never_paired:
            self.node.shut_out("the storage refuses this node: a reservation shuts it out")

    # -- what the volume asks -----------------------------------------------------------------
    @property
    def serves(self) -> bool:
        return self.node.serves

    @property
    def state(self) -> State:
        return self.node.state

    @property
    def is_paired(self) -> bool:
        return self.node.state is State.PAIRED

    @property
    def has_keeper(self) -> bool:
        """Whether the partner keeps the record and is nothing else."""
        return self.node.lasting.kept

    @property
    def is_alone(self) -> bool:
        return self.node.state is State.ALONE

    @property
    def one_serves(self) -> bool:
        """Whether one of both nodes is attached with device-mapper, so that only one may serve."""
        return self._names.direct or self.peer_is_direct

    @property
    def peer_is_direct(self) -> bool:
        """Whether the other node's kernel writes for hosts, as far as is known."""
        peer = self.node.peer
        return peer is not None and HelloFlag.DIRECT in peer.flags

    def holds_up_hosts(self) -> bool:
        """Whether requests of hosts wait for a partner that is not there."""
        return self.node.state is not State.PAIRED and bool(self.rights.waiting)

    @property
    def in_sync(self) -> bool:
        """Whether nothing of the other node's is known to differ."""
        if self.node.state is State.PAIRED:
            return bool(self.peer.words) and not self.peer.dirty_bytes
        if self.node.state is State.SPLIT_BRAIN:
            return False
        return not (self.rights.other.any() or self.rights.owed.any())

    def take_over(self, proof: Proof) -> None:
        """Serve alone.  WrongStateError, BusyError."""
        if self.node.state is State.PAIRED:
            raise WrongStateError(
                "the partner is there and serves: nothing has to be taken over from it",
                hint="stop the partner cleanly, or cut it off first",
            )
        self.node.fenced(proof)

    async def take(self, force: bool) -> None:
        """A planned takeover: the partner stops its hosts and gives everything.  BusyError if hosts
        are connected there, without `force`; UnreachableError if the link is lost meanwhile."""
        await completion(partial(self.node.take, force))

    async def give(self) -> bool:
        """No host is served here, until the next `take`: give everything to the partner.  False if
        it is not there."""
        given: asyncio.Future[bool] = self._loop.create_future()
        self.node.give(given.set_result)
        return await given

    def let_hosts_in(self, let_in: bool) -> None:
        """From now on this node lets hosts in, or does no longer."""
        self.lets_hosts_in = let_in
        self.send_ping()

    async def leave(self) -> bool:
        """No host is served any more: give everything to the partner.  False if it is not there, or
        a keeper."""
        if self.has_keeper:
            return False
        given: asyncio.Future[bool] = self._loop.create_future()
        self.node.leave(given.set_result)
        return await given

    async def part(self) -> None:
        """No host is served and nothing copied any more: a keeper hears so.  What the stored record
        has to name is in there on return, as far as that can be."""
        if self.has_keeper:
            over = asyncio.Event()
            self.node.part(over.set)
            await over.wait()

    def look_at_record(self) -> None:
        """Whether it can be written; the partner counts on what was said of that."""
        self.node.stand_in.record_is(failing=self._stored_record.failing)

    async def end(self) -> None:
        """The volume stops: what is stored has to stand for itself, as far as that can be."""
        over = asyncio.Event()
        self.node.finish(over.set)
        await over.wait()

    def refuse_waiting(self, name: str) -> NoReturn:
        """UnreachableError: this node may not serve yet."""
        raise UnreachableError(
            f"volume '{name}' waits for its partner: {self._last_failure or 'it has not come yet'}",
            hint=f"start the partner; if it is dead for certain: 'dmctl takeover {name} --fenced'",
        )

    def refuse_ended(self, name: str) -> None:
        """SplitBrainError or WrongStateError if this process serves nobody any more."""
        if self.node.state is State.SPLIT_BRAIN:
            raise SplitBrainError(
                f"both nodes of volume '{name}' were taken for dead, and both went on",
                hint=f"'dmctl partner {name} --rejoin' at one of them; see 'Split brain' in"
                " docs/recovery.md",
            )
        if self.node.state is State.OUTDATED:
            raise WrongStateError(f"this node of volume '{name}' was taken for dead, and ends")

    def begins_to_compare(self) -> bool:
        """Whether from now on everything has to be compared; true once for each time."""
        before, self._comparisons = self._comparisons, self.node.comparisons
        return self._comparisons > before

    def tick(self) -> None:
        """Once a second."""
        self.rights.tick()
        self.node.tick()
        self.look_at_record()
        self._hand_over()
        waiting = self.rights.waiting
        if not waiting:
            self._waiting_since_s = None
        elif self._waiting_since_s is None:
            self._waiting_since_s = self._loop.time()
        slow = self.oldest_wait_s >= SLOW_S
        if slow and not self._told_slow:
            self._home.emit(
                "requests-waiting",
                requests=waiting,
                message=f"{waiting} requests of hosts wait for the partner"
                f" (state '{self.node.state.value}')",
            )
        self._told_slow = slow
        is_cut = self.node.state is State.CUT and not self.has_keeper  # which nobody need fence
        self.fence.tick(self._loop.time() - self.since_s if is_cut else None, waiting)

    def _hand_over(self) -> None:
        """A node without a way to the secondary gives what is to be copied to one that has it."""
        if self.node.keeps or self.has_keeper:
            return
        there = self.is_paired and self.peer.words and _SECONDARY[self.peer.secondary]
        self.hands_over = there == "up" and self._home.figures()[2] == "down"
        self.rights.hand_over(self._home.idle_dirt(wanted=self.hands_over))

    @property
    def oldest_wait_s(self) -> float:
        """How long some request of a host has waited without a break, to the tick."""
        since_s = self._waiting_since_s
        return 0.0 if since_s is None else self._loop.time() - since_s

    def status(self) -> dict[str, Any]:
        """`partner` of `dmctl status --json`."""
        node, rights, peer = self.node, self.rights, self.node.peer
        link = {Phase.CLOSED: "down", Phase.UP: "up"}.get(node.phase, "exchanging")
        return {
            "node": node.number,
            "role": role_of(node.keeps),
            "kept": node.lasting.kept,
            "state": node.state.value,
            "link": link,
            "copier": node.lead.is_here,
            "hands_over": self.hands_over,
            "term": node.lasting.term,
            "generation": node.lasting.generations[0].hex(),
            "since": round(self._loop.time() - self.since_s, 3),
            "peer": None
            if peer is None
            else {
                "name": peer.name,
                "role": role_of(peer.role is Role.KEEPER),
                "version": peer.program,
                "incarnation": f"{peer.incarnation:016x}",
                "dirty_bytes": self.peer.dirty_bytes,
                "lag_seconds": round(self.peer.age_s, 3),
                "secondary": None if peer.role is Role.KEEPER else _SECONDARY[self.peer.secondary],
                "serves": self.peer.lets_hosts_in,
                "record_failing": node.stand_in.partner_fails,
                "attach": "dm" if self.peer_is_direct else "nbd",
            },
            "serving": self.lets_hosts_in,
            "volatile": node.lasting.volatile,
            "gone_on": node.lasting.gone_on,
            "record_fallback": node.stand_in.counts,
            "partner_record": self._names.partner_record,
            "own_extents": rights.own_extents,
            "partner_extents": rights.other.count(),
            "owed_extents": rights.owed.count(),
            "embargoed_extents": self._hands.embargoed_extents,
            "waiting_requests": rights.waiting,
            "oldest_wait_seconds": round(self.oldest_wait_s, 3),
            "rtt_seconds": None if self.rtt_s is None else round(self.rtt_s, 6),
            "messages_total": rights.messages,
            "frames_total": self._frames_before + (self._wire.frames if self._wire else 0),
            "asks_total": rights.asks,
            "handovers_total": rights.handovers,
            "refused_guesses_total": rights.refused_guesses,
            "exchanges_total": node.exchanges,
            "absorbed_extents_total": node.absorbed_extents,
            "compared_extents_total": self._geometry.extents * node.comparisons,
            "conflicts": None if node.conflicts is None else node.conflicts.to_json(),
            "proof": None if node.proof in (None, Proof.NEVER) else node.proof.value,
            "fencing": self.fence.step,
            "last_error": self._last_failure or None,
        }

    # -- Owner of the transport ---------------------------------------------------------------
    def connected(self, connection: Connection) -> None:
        old, self._wire = self._wire, _Wire(connection)
        if old is not None:
            self._frames_before += old.frames
        self._last_failure = ""
        self.node.connected(self._wire)

    def frames(self, connection: Connection, frames: list[Frame]) -> None:
        # What they lead to is answered and submitted before the next turn of the loop.
        self._batches.cork()
        try:
            self._frames(connection, frames)
        finally:
            self._batches.kick()

    def _frames(self, connection: Connection, frames: list[Frame]) -> None:
        wire = self._wire
        if wire is None or wire.connection is not connection:
            return
        for frame in frames:
            try:
                message = wire.decoder.feed(frame)
            except PeerError as error:
                self.node.refuse(error)
                return
            if isinstance(message, Ping):
                self._heard(message)
                wire.send(Pong(message.time_us))
            elif isinstance(message, Pong):
                self.rtt_s = max(0.0, self._loop.time() - message.time_us / 1e6)
                self.rights.round_trip(self.rtt_s)
                answered = self._pings.pop(message.time_us, None)
                if answered is not None and not answered.done():
                    answered.set_result(self.rtt_s)
            elif message is not None:
                self.node.received(message, frame.sequence)
            if isinstance(message, Hello) and self.node.phase in (Phase.RECORDS, Phase.SPLIT):
                self._bound(wire.decoder)
                connection.link.greeted(message.timeout_ms / 1000)
                self.send_ping()
            if self._wire is not wire:
                return

    def ping_due(self, connection: Connection) -> None:
        if self._wire is not None and self._wire.connection is connection:
            self.send_ping()

    def drained(self, connection: Connection) -> None:
        self.rights.flush()

    def lost(self, connection: Connection, reason: str) -> None:
        if self._wire is None or self._wire.connection is not connection:
            return
        self._frames_before += self._wire.frames
        self._wire = None
        self.failed(reason)
        self.node.lost()

    def failed(self, reason: str) -> None:
        if reason != self._last_failure:
            self._last_failure = reason
            self._home.emit("partner-down", message=reason)

    def _send(self, message: Message) -> int:
        return 0 if self._wire is None else self._wire.send(message)

    def _has_room(self) -> bool:
        return self._wire is None or self._wire.connection.link.has_room

    def _push(self) -> None:
        if self._wire is not None:
            self._wire.connection.flush()

    async def ping(self) -> float:
        """Seconds that a message and its answer take now.  UnreachableError if the link is not
        there, or goes first."""
        if self.node.phase is not Phase.UP:
            raise UnreachableError(f"the partner cannot be reached: {self._last_failure}")
        answered: asyncio.Future[float] = self._loop.create_future()
        self._pings[self.send_ping()] = answered
        return await answered

    def send_ping(self) -> int:
        """Tell the other node how this one is, if there is a link; returns the number of the PING,
        its time in microseconds."""
        if self._wire is None or not self._wire.connection.link.is_greeted:
            return 0
        dirty_bytes, age_s, secondary, copied_bytes = self._home.figures()
        now_us = int(self._loop.time() * 1e6)
        state = _SECONDARY.index(secondary) + (0 if self.lets_hosts_in else IDLE)
        self._wire.send(Ping(now_us, 0, dirty_bytes, int(age_s * 1000), state, copied_bytes))
        return now_us

    def _heard(self, ping: Ping) -> None:
        was = self.peer.dirty_bytes
        idle, secondary = divmod(ping.secondary, IDLE)
        self.peer = Peer(
            ping.dirty_bytes, ping.age_ms / 1000, secondary, ping.copied_bytes,
            not idle, self.peer.words + 1,
        )  # fmt: skip
        if self.asked or bool(was) != bool(ping.dirty_bytes):
            self._home.changed()

    # -- Surroundings of the node -------------------------------------------------------------
    def store(self, lasting: Lasting, done: Done) -> None:
        task = self._loop.create_task(self._store(lasting, done))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _store(self, lasting: Lasting, done: Done) -> None:
        try:
            await self._write(lasting)
        except OSError as error:
            done(error)
        else:
            done(None)

    def rely(self, on: bool) -> None:
        self.record.rely(on)

    def destage(self, done: Done) -> bool:
        return self.record.destage(done)

    def new_generation(self) -> bytes:
        return uuid4().bytes

    def hello(self) -> Hello:
        geometry, names = self._geometry, self._names
        flags, required = HelloFlag(0), REQUIRED
        if names.relies:
            flags, required = flags | HelloFlag.RELIES, required | SAYS_VOLATILE
        if names.stored:
            flags, required = flags | HelloFlag.STORED, required | STORES_FIRST
        if names.goes_on:
            flags, required = flags | HelloFlag.GO_ON, required | KNOWS_GO_ON
        if names.keeps:
            required |= KNOWS_KEEPERS
        if names.direct:
            flags, required = flags | HelloFlag.DIRECT, required | KNOWS_DIRECT
        if names.on_promote:
            flags |= HelloFlag.ON_PROMOTE
        if self._stored_record.failing:
            flags |= HelloFlag.UNSTORED
            if names.falls_back and not names.keeps:
                flags, required = flags | HelloFlag.RELIES, required | SAYS_VOLATILE
        return Hello(
            volume=NIL,
            node=self.node.number,
            lowest=VERSION,
            highest=VERSION,
            role=Role.KEEPER if names.keeps else Role.PAIR,
            flags=flags,
            required=required,
            offered=OFFERED,
            term=0,
            incarnation=self.incarnation,
            session=names.session,
            boot=self._boot,
            generations=(NIL,) * 4,
            size_bytes=geometry.size_bytes,
            extent_bytes=geometry.extent_bytes,
            block_bytes=geometry.block_bytes,
            last_paired=0,
            machine=self._machine,
            timeout_ms=round(self._timeout_s * 1000),
            most_requests=MOST_REQUESTS,
            name=names.volume,
            primary=names.primary,
            secondary=names.secondary,
            program=f"bitmapd {__version__}",
        )

    def stored(self) -> bitarray:
        return self._stored_record.recorded

    def partner_record(self, done: Callable[[bitarray | None], None]) -> None:
        path = self._names.partner_record
        if path is None:
            self._loop.call_soon(done, None)
            return
        task = self._loop.create_task(self._read_other(path, done))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read_other(self, path: str, done: Callable[[bitarray | None], None]) -> None:
        aside, problem = Aside("partner-record"), None
        try:
            loaded = await asyncio.wait_for(aside(tool.load, path), READ_TIMEOUT_S)
        except TimeoutError:
            problem = f"it has not been read within {READ_TIMEOUT_S:.0f} s"
        except BitmapdError as error:
            problem = error.message
        else:
            node, geometry = self.node, self._geometry
            problem = why_not(loaded.superblock, node.lasting, node.number, geometry)
            if problem is None:
                self.emit("partner-record-read", device=path, extents=loaded.bits.count())
                done(loaded.bits)
                return
        finally:
            aside.close()
        self.emit("partner-record-unusable", device=path, message=problem)
        done(None)

    def other_died(self, extents: Runs) -> None:
        aborted = self.node.proof is Proof.FENCE and self.fence.settings.aborts_io
        self._home.other_died(extents, late=not aborted)

    def changed(self) -> None:
        state = self.node.state
        if self.node.phase is Phase.CLOSED and self._pings:
            pings, self._pings = self._pings, {}
            for answered in pings.values():
                if not answered.done():
                    answered.set_exception(UnreachableError("the link to the partner was lost"))
        if state is not self._state:
            before, self._state, self.since_s = self._state, state, self._loop.time()
            if state is State.PAIRED:
                self.fence.paired()
                self._home.emit("partner-up", was=before.value)
            elif state is State.OUTDATED:
                self._home.outdated()
        self._home.changed()

    def emit(self, event: str, **fields: object) -> None:
        if event in ("partner-refused", "partner-protocol-error"):
            self._last_failure = str(fields["message"])
        self._home.emit(event, **fields)


def role_of(keeps: bool) -> str:
    """As the status names it, and the configuration."""
    return "keeper" if keeps else "pair"


def _machine_id() -> bytes:
    """The machine's id, hashed or not, is 16 bytes; without one, one of this process."""
    try:
        return bytes.fromhex(Path("/etc/machine-id").read_text().strip())[:16].ljust(16, b"\0")
    except (OSError, ValueError):
        return os.urandom(16)


def _boot_id() -> bytes:
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text()
        return bytes.fromhex(text.strip().replace("-", ""))
    except (OSError, ValueError):
        return NIL
