"""A volume with a receiver: when it begins, and what only such a volume can be asked (edge).

`Volume` holds one of these, or none: one with a plain secondary has no line of it on its way.

1. `cut` answers when the point can no longer be given up for the sake of a host: whoever has
   frozen a file system may thaw it.
2. A label belongs to the cut that was asked for, not to one that was under way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bitmapd.config import Paths, VolumeConfig, effective_cut_patience_s
from bitmapd.copier.engine import CopyState
from bitmapd.errors import BitmapdError, BusyError, UnreachableError, UsageError, WrongStateError
from bitmapd.gate.cycle import CutGate
from bitmapd.media.buffers import BufferPool
from bitmapd.points.group import Member
from bitmapd.points.sender import Phase
from bitmapd.points.sums import BySums
from bitmapd.points.switchover import Stage
from bitmapd.record.geometry import Geometry
from bitmapd.volume.assemble import Parts
from bitmapd.volume.demoting import Demoting
from bitmapd.volume.offering import offer
from bitmapd.volume.sending import ReceiverLink

if TYPE_CHECKING:
    from bitmapd.volume.grouping import Grouping

MAX_LABEL_BYTES = 255  # on the wire

_READ = (Phase.SENDING, Phase.ENDED)


class Around(Protocol):
    """The volume around it; `Volume`."""

    def emit(self, event: str, **fields: Any) -> None: ...

    def changed(self) -> None: ...

    async def until(self, condition: Callable[[], bool]) -> None: ...

    async def end_eras(self, enough: Callable[[], bool]) -> None: ...


def _taken(path: Path) -> bool:
    """Whether it was there; it is for one start."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


class WithReceiver:
    """See the module docstring."""

    def __init__(self, name: str, parts: Parts, link: ReceiverLink, volume: Around) -> None:
        self.sender = link.sender
        self.link = link
        self._name = name
        self._parts = parts
        self._volume = volume
        self.demoting = Demoting(name, parts, link, volume)
        self._grouping: Grouping | None = None
        self._led: asyncio.Task[None] | None = None
        self._asked = False  # a cut, by somebody who waits for it

    async def start(self, paths: Paths) -> None:
        """Return when hosts may be let in."""
        config, gate, sender = self._parts.config, self._parts.gate, self.sender
        if config.group is not None and isinstance(gate, CutGate):
            from bitmapd.volume.grouping import Grouping  # noqa: PLC0415  (few volumes have one)

            sender.uplink.in_group = True
            sender.member = Member(self._name, sender, gate, self._parts.loop)
            volume = self._volume
            self._grouping = Grouping(config, paths, sender.member, volume.emit, volume.changed)
            self._led = self._parts.loop.create_task(self._grouping.run())
        self.link.is_forced = _taken(paths.force_file(self._name))
        self.link.start()
        await self.link.first_word()

    @property
    def grouping(self) -> Grouping:
        """WrongStateError if the volume is of no group."""
        if self._grouping is None:
            raise WrongStateError(f"volume '{self._name}' is of no group")
        return self._grouping

    def state_of(self, found: str) -> str:
        """The state of the volume, which would be `found` without regard to the receiver."""
        if self.demoting.stage is Stage.DEMOTED:
            return "demoted"
        if self.link.is_split:
            return "split-brain"
        if found == "link-down" and self._parts.config.receiver_dials:
            return "alone"
        if found in ("resyncing", "copying") and self.sender.room.is_full:
            return "journal-full"
        return found

    # -- commands ---------------------------------------------------------------------------
    async def cut(self, label: str, *, wait: bool) -> dict[str, Any]:
        """Cut now; with `wait` return when the receiver has the point."""
        sender = self.sender
        if len(label.encode()) > MAX_LABEL_BYTES or not label.isprintable():
            raise UsageError(
                f"a label has at most {MAX_LABEL_BYTES} bytes and no control characters"
            )
        if self._asked:
            raise BusyError(f"another point of volume '{self._name}' is being cut on demand")
        self._parts.pausing.refuse("no point is cut")
        if self.demoting.stage is not Stage.SERVING:
            raise WrongStateError(f"volume '{self._name}' gives its role away: no point is cut")
        self._refuse_if_alone()
        self._asked = True
        try:
            await self._volume.until(lambda: self._gone or sender.phase is Phase.OPEN)
            self._refuse_if_gone()
            number, voids = sender.uplink.point, self._voids
            sender.cut(label)
            await self._volume.until(
                lambda: (
                    self._gone
                    or bool(self._waits_for)
                    or sender.uplink.point > number
                    or sender.phase in _READ
                    or self._voids > voids
                )
            )
        finally:
            self._asked = False
            sender.withdraw()
        if sender.uplink.point == number and sender.phase not in _READ:
            self._refuse_if_gone()
            self._refuse_if_alone()
            raise self._was_given_up()
        if wait:
            await self._volume.until(
                lambda: self._gone or sender.uplink.point > number or self._voids > voids
            )
            if sender.uplink.point == number:
                self._refuse_if_gone()
                raise self._was_given_up()
        return {"point": number, "label": label, "committed": sender.uplink.point > number}

    @property
    def _voids(self) -> int:
        """How many cuts were given up so far."""
        return sum(self.sender.voids.values())

    def _was_given_up(self) -> BitmapdError:
        return BitmapdError(
            f"the point of volume '{self._name}' was given up; the last one stays",
            hint=f"'dmctl events {self._name} --now' says why; try again",
        )

    @property
    def _waits_for(self) -> str:
        return "" if self.sender.member is None else self.sender.member.waits_for

    def _refuse_if_alone(self) -> None:
        if self._waits_for:
            raise UnreachableError(
                f"the group of volume '{self._name}' cannot be cut: {self._waits_for}",
                hint="all of its volumes have to run, with their receivers",
            )

    @property
    def _gone(self) -> bool:
        return self.sender.state is not CopyState.RUNNING

    def _refuse_if_gone(self) -> None:
        if self.sender.state is CopyState.LINK_DOWN:
            raise UnreachableError(
                f"the receiver of volume '{self._name}' is away, and no point is cut without it",
                hint=f"'dmctl events {self._name} --now' says why",
            )
        if self._gone:
            raise WrongStateError(f"volume '{self._name}' sends nothing now")

    def comparison(self, geometry: Geometry, pool: BufferPool) -> BySums:
        """The volume against the receiver's image."""
        sender, parts = self.sender, self._parts
        if not sender.uplink.known_committed:
            raise WrongStateError(
                f"volume '{self._name}' has no point yet: there is nothing to compare it with",
                hint=f"'dmctl wait {self._name} --for point' returns when there is one",
            )
        if sender.sums.is_due:
            raise BusyError(
                f"the receiver of volume '{self._name}' has still to answer an earlier verify",
                hint="it answers when its points are in its image: 'dmctl status' there",
            )
        return BySums(geometry, parts.primary.read_aside, sender, parts.loop, pool)

    async def offer(self, size_bytes: int) -> None:
        """Return when the receiver has room for so large a volume."""
        await offer(self.link, self._name, size_bytes, self._volume.until)

    async def reached(self, newer_than: int) -> None:
        """Return when the receiver has a point of a larger number."""
        await self._volume.until(lambda: self.sender.uplink.known_committed > newer_than)

    def reconfigure(self, config: VolumeConfig) -> None:
        sender, gate = self.sender, self._parts.gate
        sender.schedule.interval_s = config.point_interval_s
        sender.limit_spool(config.spool_limit_bytes)
        sender.uplink.compress = config.compress == "auto"
        if isinstance(gate, CutGate):
            gate.patience_s = effective_cut_patience_s(config)
        sender.proceed()

    # -- status -----------------------------------------------------------------------------
    def figures(self) -> dict[str, Any]:
        """`points` and `receiver` of the status."""
        group = None if self._grouping is None else self._grouping.figures()
        return {"points": self.sender.figures() | {"group": group}, "receiver": self.link.figures()}
