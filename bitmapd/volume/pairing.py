"""How a volume is one node of a pair: what it says of itself, and what it does when told (edge).

The pair (`partner/pair`) is made between the stored record and the gate, which takes its record.
Hosts are let in when it `serves`, and that may be long after the start, or never.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol
from uuid import UUID

from bitmapd.config import VolumeConfig, effective_fence_delay_s, is_keeper
from bitmapd.copier.engine import Copier, CopyState
from bitmapd.errors import BitmapdError, BusyError, UsageError
from bitmapd.gate.gate import Gate
from bitmapd.media.base import Target
from bitmapd.media.claims import Claim
from bitmapd.media.kdevice import KernelDevice
from bitmapd.media.waiting import Aside
from bitmapd.net.uri import parse_partner_uri
from bitmapd.partner.fence_policy import FenceSettings
from bitmapd.partner.greeting import NIL
from bitmapd.partner.node import Lasting, State
from bitmapd.partner.pair import Batches, Home, Names, Pair
from bitmapd.peer.payloads import Runs
from bitmapd.peer.transport import Settings
from bitmapd.record.pair_state import PairFlag, PairState, PartnerAck, RecordOn
from bitmapd.record.store import RecordStore
from bitmapd.record.superblock import Superblock, as_ids, from_ids
from bitmapd.volume.session import RecordSession

MOST_HANDED_OVER = 4096  # extents a second, of which each may take its dirt along block by block


class Owner(Protocol):
    """The volume."""

    def emit(self, event: str, **fields: Any) -> None: ...

    def changed(self) -> None: ...

    def outdated(self) -> None:
        """The partner has taken over from this process: it must not go on."""

    def inherited(self, extents: int) -> None:
        """So many were the partner's and are copied here."""


class VolumeHome:
    """What the pair asks of its volume (`partner.pair.Home`)."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._gate: Gate | None = None

    def attach(
        self,
        gate: Gate,
        copier: Copier,
        primary: KernelDevice,
        secondary: Target,
        block_bytes: int,
    ) -> None:
        self._gate, self._copier = gate, copier
        self._primary, self._secondary = primary, secondary
        self._block_bytes = block_bytes

    def changed(self) -> None:
        if self._gate is not None:
            self._owner.changed()

    def emit(self, event: str, **fields: Any) -> None:
        self._owner.emit(event, **fields)

    def figures(self) -> tuple[int, float, str, int]:
        if self._gate is None:
            return 0, 0.0, "down", 0
        oldest_s = self._gate.oldest_dirty_s()
        age_s = 0.0 if oldest_s is None else self._copier.now_s - oldest_s
        state = {CopyState.PAUSED: "paused", CopyState.LINK_DOWN: "down"}
        # What is copied and not flushed is no dirt, and not equal yet.
        dirty = self._gate.dirty_blocks() or int(not self._gate.in_sync)
        return (
            dirty * self._block_bytes,
            age_s,
            state.get(self._copier.state, "up"),
            self._copier.copied_bytes,
        )

    def idle_dirt(self, *, wanted: bool) -> Sequence[int]:
        # A place that hosts write directly is given after a barrier, which waits for the hosts that
        # wait for the place: with device-mapper what is dirty stays until they are let out.
        if self._gate is None or self._gate.is_written_elsewhere:
            return ()
        self._copier.rounds.hands_over = wanted
        return self._gate.idle_dirt(MOST_HANDED_OVER) if wanted else ()

    def primary_late_s(self) -> float:
        return self._copier.late.bound_s if self._primary.writes_late else 0.0

    def other_died(self, extents: Runs, *, late: bool) -> None:
        if self._gate is None or not extents:
            return
        self._owner.inherited(sum(stop - first for first, stop in extents))
        if late and self._secondary.writes_late:
            self._copier.late.other_node_died(extents)
            if self._copier.state is CopyState.RUNNING:
                self._copier.late.arrived()

    def outdated(self) -> None:
        self._owner.outdated()


def make_pair(
    config: VolumeConfig,
    session: RecordSession,
    state: PairState,
    store: RecordStore,
    loop: asyncio.AbstractEventLoop,
    batches: Batches,
    aside: Aside,
    home: Home,
    media: Sequence[KernelDevice],
) -> Pair:
    """`media`: what is claimed for the pair once it is joined."""
    superblock = session.superblock
    pair = Pair(
        state.node,
        lasting_of(superblock, state),
        superblock.geometry,
        store,
        Names(
            config.name,
            superblock.primary,
            superblock.secondary,
            superblock.session,
            relies=config.record_on == "partner",
            stored=config.partner_ack == "stored",
            goes_on=config.on_cut == "go-on",
            keeps=is_keeper(config),
            falls_back=config.record_fallback,
            partner_record=config.partner_record,
            direct=config.attach == "dm",
            on_promote=config.serve == "on-promote",
        ),
        link_settings(config, seeks=state.node == 1 and state.never_paired),
        loop,
        batches,
        home,
        partial(_write, config, session, aside, media),
    )
    pair.set(fence_settings(config), config.cut_patience_s)
    return pair


def lasting_of(superblock: Superblock, state: PairState) -> Lasting:
    return Lasting(
        never_paired=state.never_paired,
        term=state.term,
        generations=as_ids(superblock.generations),
        volume=NIL if state.volume is None else state.volume.bytes,
        volatile=PairFlag.VOLATILE in state.flags,
        gone_on=PairFlag.GONE_ON in state.flags,
        kept=PairFlag.KEPT in state.flags,
    )


async def _write(
    config: VolumeConfig,
    session: RecordSession,
    aside: Aside,
    media: Sequence[KernelDevice],
    lasting: Lasting,
) -> None:
    if lasting.volume == NIL:
        raise OSError("a node that has not joined has nothing to record")
    volume, state = UUID(bytes=lasting.volume), session.pair
    if state is not None and state.volume is None:
        try:
            for medium in media:
                await medium.joined(Claim(state.node, volume))
        except BusyError as error:
            raise OSError(errno.EBUSY, error.message) from error
    try:
        await aside(
            session.store_pair,
            volume,
            never_paired=lasting.never_paired,
            term=lasting.term,
            generations=from_ids(lasting.generations),
            volatile=lasting.volatile,
            gone_on=lasting.gone_on,
            kept=lasting.kept,
            record_on=RecordOn[config.record_on.upper()],
            partner_ack=PartnerAck[config.partner_ack.upper()],
        )
    except BitmapdError as error:  # as the record's tool says it
        raise OSError(errno.EIO, error.message) from error


def link_settings(config: VolumeConfig, *, seeks: bool) -> Settings:
    """Node 2 dials, both listen.  A node 1 that waits for its first partner `seeks` it: if that was
    made as node 1, too, nobody would dial."""
    if config.partner is None or config.partner_listen is None:
        raise UsageError("a pair needs partner and partner_listen")
    partner = parse_partner_uri(config.partner)
    return Settings(
        dial=partner if config.node == 2 else None,
        seek=partner if seeks else None,
        listen=parse_partner_uri(config.partner_listen),
        name=config.partner_name or partner.host,
        certificates=config.partner_certificates or config.tls_certificates,
        fingerprint=config.partner_fingerprint,
        timeout_s=config.partner_timeout_s,
    )


def fence_settings(config: VolumeConfig) -> FenceSettings:
    """Without a name of its own the other node is called node1 or node2."""
    host = None if config.partner is None else parse_partner_uri(config.partner).host
    return FenceSettings(
        command=config.fence_command,
        plug=config.partner_name or host or f"node{2 if config.node == 1 else 1}",
        options=config.fence_options,
        delay_s=effective_fence_delay_s(config),
        timeout_s=config.fence_timeout_s,
        aborts_io=config.fence_aborts_io,
        automatic=config.takeover == "auto",
    )


def state_of_pair(pair: Pair) -> str | None:
    """The state of the volume where the pair decides it."""
    if pair.is_paired and pair.node.stand_in.partner_fails:
        return "degraded"
    return {
        State.WAITING: "waiting",
        State.CUT: "degraded",
        State.ALONE: "degraded",
        State.OUTDATED: "failed",
        State.SPLIT_BRAIN: "split-brain",
    }.get(pair.state)
