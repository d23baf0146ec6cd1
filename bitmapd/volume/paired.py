"""A volume as one of two appliances: when its hosts are let in, and the commands of a pair (edge).

`Volume` holds one of these, or none: a single appliance has no line of it on its way.  `pairing`
joins the volume's parts and the pair; this stands above both.

1. The volume begins once, as soon as the pair says that hosts may be served; they are let in then,
   or with `serve = on-promote` by a takeover at this node, and not again after `demote` but by one.
   Hosts whose kernel has outlived an earlier process are not let in: they never were out.
2. What nobody knows is compared: the pass begins when the pair says so, or with the hosts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from bitmapd.attach.mode import Door
from bitmapd.config import VolumeConfig
from bitmapd.errors import BitmapdError, UnreachableError, WrongStateError
from bitmapd.media.waiting import completion
from bitmapd.partner.node import Proof, State
from bitmapd.partner.pair import Pair
from bitmapd.record.geometry import Geometry
from bitmapd.volume.assemble import Parts
from bitmapd.volume.growing import PairGrowth
from bitmapd.volume.hosts import VolumeHosts
from bitmapd.volume.pairing import fence_settings, state_of_pair


class Served(Protocol):
    """The volume around it; `Volume`."""

    @property
    def serving(self) -> bool:
        """Whether it works; hosts are let in, unless that needs a takeover."""

    @property
    def stopping(self) -> bool: ...

    @property
    def in_sync(self) -> bool: ...

    @property
    def state(self) -> str: ...

    def grown(self, geometry: Geometry) -> None:
        """The parts have taken up a larger size."""

    @property
    def geometry(self) -> Geometry: ...

    def emit(self, event: str, **fields: Any) -> None: ...

    async def begin(self) -> None:
        """Copy, and let hosts in, unless that needs a takeover."""

    async def until(self, condition: Callable[[], bool]) -> None: ...

    async def end_eras(self, enough: Callable[[], bool]) -> None: ...


class Paired:
    """See the module docstring."""

    def __init__(self, name: str, parts: Parts, pair: Pair, door: Door, volume: Served) -> None:
        self.pair = pair
        self._door = door
        self._name = name
        self._parts = parts
        self._volume = volume
        self._hosts: VolumeHosts | None = None
        self._entering: asyncio.Task[None] | None = None
        self._growing = PairGrowth(parts, pair, volume, self._has_grown)
        pair.node.growth.media = self._growing

    # -- start and stop -----------------------------------------------------------------------
    async def start(self) -> None:
        """Look for the partner; hosts are let in now, or when it has come."""
        self.pair.start(tuple(self._door.direct))
        if self.pair.serves:
            await self._volume.begin()
        else:
            self._entering = self._parts.loop.create_task(self._enter())
            self._entering.add_done_callback(self._has_entered)

    async def _enter(self) -> None:
        await self._volume.until(lambda: self.pair.serves or self._volume.stopping)
        if not self._volume.stopping:
            await self._volume.begin()

    def _has_entered(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            what = {"message": "the volume cannot be served", "exception": error}
            self._parts.loop.call_exception_handler(what)

    async def entered(self) -> None:
        """Return when hosts have been let in, or never will be: the volume is stopping."""
        if self._entering is not None:
            await asyncio.wait([self._entering])

    async def end(self) -> None:
        """Return when nothing of it writes the record any more."""
        await self._growing.end()

    def begun(self, *, are_served: bool) -> None:
        """The volume works, and hosts have been let in or not."""
        parts = self._parts
        self._hosts = VolumeHosts(
            self._door,
            parts.loop,
            self.pair.let_hosts_in,
            self._volume.end_eras,
            lambda: self._volume.stopping,
            are_served=are_served,
        )
        self.pair.node.serve(self._hosts)
        self._has_grown()  # perhaps before an earlier process died, and hosts go on with the old

    # -- what has changed ---------------------------------------------------------------------
    def look(self) -> None:
        """Something has changed."""
        is_split = self.pair.state is State.SPLIT_BRAIN
        if is_split and self._parts.mode.elsewhere and self._hosts is not None:
            self._hosts.cut_off()
        if self._volume.serving and self.pair.begins_to_compare():
            self._parts.loop.create_task(self._compare_everything())

    async def _compare_everything(self) -> None:
        """Nobody knows what the partner has written: every place may differ."""
        parts = self._parts
        everything = (0, self._volume.geometry.extents)
        recorded, error = asyncio.Event(), None

        def added(failed: OSError | None) -> None:
            nonlocal error
            error = failed
            recorded.set()

        if parts.names.add([everything], (), added):
            await recorded.wait()
        if error is None:  # else the store has reported it; what is not covered is copied as dirt
            parts.gate.take_recorded()
        parts.copier.begin_pass(compare=True)

    def reconfigure(self, config: VolumeConfig) -> None:
        self.pair.set(fence_settings(config), config.cut_patience_s)

    @property
    def state(self) -> str | None:
        """The state of the volume where the pair decides it."""
        return state_of_pair(self.pair)

    # -- commands -----------------------------------------------------------------------------
    async def until_in_sync(self) -> None:
        """What was written at either node before this call is on the secondary, or copying is
        paused."""
        pair, pausing = self.pair, self._parts.pausing
        # What the other said last may be older than what was written there, and the next word of it
        # may be on its way: the one after that is new.
        new = pair.peer.words + 2
        pair.asked += 1
        try:
            await self._volume.until(
                lambda: (
                    (self._volume.in_sync and (pair.peer.words >= new or not pair.is_paired))
                    or pausing.paused
                )
            )
        finally:
            pair.asked -= 1

    async def reached(self, state: str) -> None:
        await self._volume.until(lambda: self.pair.state.value == state)

    def refuse_unless_complete(self) -> None:
        """WrongStateError unless the record of this node names all that the partner may have
        written, and the partner can write no more."""
        pair, name = self.pair, self._name
        pair.refuse_ended(name)
        if not pair.is_alone:
            raise WrongStateError(
                f"volume '{name}' cannot do without its partner in the state '{pair.state.value}':"
                " what the partner has written would be lost sight of",
                hint="stop the partner cleanly; if it is dead for certain:"
                f" 'dmctl takeover {name} --fenced'",
            )
        store = self._parts.store
        recorded = all(store.covers(*run) for run in self._parts.names.recorded_runs())
        if not recorded or pair.node.lasting.volatile:
            raise WrongStateError(
                f"the record of volume '{name}' does not name everything yet",
                hint=f"try again in a moment; 'dmctl events {name} --now' says if it cannot be"
                " written",
            )

    async def ping(self, count: int) -> list[float]:
        """So many round trips one after the other, in seconds."""
        return [await self.pair.ping() for _ in range(count)]

    async def resize(self, size_bytes: int) -> None:
        """Have both nodes take up that size."""
        await completion(partial(self.pair.node.growth.begin, size_bytes))

    def give_up_resize(self) -> None:
        """A stop does not wait for a partner that does not answer."""
        self.pair.node.growth.give_up(
            WrongStateError(f"volume '{self._name}' is being stopped", hint="resize it again")
        )

    async def follow_size(self) -> None:
        """Have hosts see the volume's size.  UnreachableError if they go on with the old one."""
        if self._hosts is not None:
            await self._hosts.follow_size()

    def _has_grown(self) -> None:
        if self._hosts is not None:
            self._hosts.begin_to_follow_size(self._go_on_with_the_old_size)

    def _go_on_with_the_old_size(self, error: BitmapdError) -> None:
        self._volume.emit("size-not-shown", message=error.message)

    async def take_over(self, fenced: bool, force: bool, *, beside: bool = False) -> dict[str, Any]:
        """Let hosts in here.  A partner that is there stops its hosts and gives everything, with
        `force` also hosts that are connected; or with `beside` goes on as it was.  One that is not
        is taken over from by the administrator's word (`fenced`) that it can write no more, or by
        that of `fence_command`."""
        pair, name = self.pair, self._name
        pair.refuse_ended(name)
        if pair.is_paired and not fenced:
            if not beside:
                await pair.take(force)
            elif pair.one_serves:
                raise WrongStateError(
                    f"volume '{name}' is attached with device-mapper: one node serves hosts at a"
                    " time",
                    hint=f"'dmctl takeover {name}' sends those of the partner away",
                )
        elif not pair.is_alone:
            if fenced:
                pair.take_over(Proof.WORD)
            elif pair.has_keeper:
                raise UnreachableError(
                    f"the keeper of volume '{name}' is not there, and its record would lack what"
                    " hosts write from now on",
                    hint="bring it back; or see to it that it is never asked for that record (it"
                    f" may come back as this node's keeper), then 'dmctl takeover {name} --fenced'",
                )
            elif pair.fence.is_configured:
                await pair.fence.run()
            else:
                goes_on = "; its kernel goes on without bitmapd" if pair.peer_is_direct else ""
                raise UnreachableError(
                    f"nothing proves that the partner of volume '{name}' can write no more"
                    f"{goes_on}",
                    hint="make certain that it cannot (switch it off, or cut it off from the"
                    f" storage), then 'dmctl takeover {name} --fenced'",
                )
            await self._volume.until(lambda: not pair.node.going_alone)
            if not pair.is_alone:
                raise BitmapdError("that this node goes on alone could not be recorded")
            await self._volume.until(lambda: self._volume.serving)
        if self._hosts is not None:
            await self._hosts.admit()
        return {"state": self._volume.state, "partner": pair.status()}

    async def demote(self, force: bool) -> dict[str, Any]:
        """Let no host in any more, and give everything to the partner, if it is there: `given`.
        BusyError if hosts are connected, without `force`."""
        if self._hosts is not None:
            await self._hosts.dismiss(force=force)
        given = await self.pair.give()
        return {"state": self._volume.state, "given": given, "partner": self.pair.status()}
