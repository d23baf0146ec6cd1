"""A receiver as its process has it: media, journal, machine and connection, wired (edge).

1. Image and journal are claimed while they are open (`media.claims`): by nobody else, mounts and
   other receivers included.
2. A journal belongs to one image and one receiver; another one is refused before anything is
   written.
3. A stop that is not hurried ends when all that is committed is in the image.  One that is leaves
   the rest in the journal: any moment is as good as another.
4. An error of the journal ends the process, as a crash would: the next one finds out what is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from bitmapd import __version__
from bitmapd.config import ReceiverConfig
from bitmapd.control.told import Told
from bitmapd.errors import (
    BitmapdError,
    BusyError,
    ForeignRecordError,
    NotFoundError,
    WrongStateError,
    explain,
)
from bitmapd.media.aio import AioEngine
from bitmapd.media.claims import Claim
from bitmapd.media.identity import Identity as Medium
from bitmapd.media.identity import identify
from bitmapd.media.kdevice import KernelDevice
from bitmapd.net.uri import parse_receiver_uri
from bitmapd.peer.transport import Settings
from bitmapd.points.messages import Message, Ping
from bitmapd.points.wire import TIMEOUT_S, MessageWire, PointTransport
from bitmapd.receiver.catchup import CatchUp
from bitmapd.receiver.commit import PageFlag
from bitmapd.receiver.journal import Journal
from bitmapd.receiver.promotion import has_new_generation, undo
from bitmapd.receiver.receiver import Identity, Receiver, State
from bitmapd.receiver.scan import Scanned, scan
from bitmapd.receiver.steps import Steps, run
from bitmapd.receiver.superblock import JournalSuperblock
from bitmapd.volume.copies import keeper_of
from bitmapd.volume.receiver_status import described, points
from bitmapd.volume.rejoining import differing
from bitmapd.volume.sides import is_other

if TYPE_CHECKING:
    from bitmapd.volume.drill import Drill, Wanted

T = TypeVar("T")

PARTING_S = 5.0  # for whoever has handed over to hear that it was taken


async def carried_out(steps: Steps[T]) -> T:
    """Await steps; what they raise is raised."""
    future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

    def wrapped() -> Steps[None]:
        # Steps go on in the completions of devices, where nobody would take what they raise.
        try:
            future.set_result((yield from steps))
        except (BitmapdError, OSError) as error:
            future.set_exception(error)

    run(wrapped(), lambda error, result: None)
    return await future


def check_owner(config: ReceiverConfig, image: Medium, superblock: JournalSuperblock) -> None:
    """ForeignRecordError unless the journal is that of this receiver and of this image."""
    if superblock.name != config.name:
        raise ForeignRecordError(
            f"the journal {config.journal} belongs to receiver '{superblock.name}'",
            hint="'dmctl receive' makes another one",
        )
    if is_other(image, superblock.image):
        raise ForeignRecordError(
            f"the journal {config.journal} belongs to the image {superblock.image}, and"
            f" {config.image} is {image.text}",
            hint="bring the image back, or make the receiver anew",
        )


class Receiving:
    """See the module docstring.  `on_failed` hears of an error that ends the process."""

    def __init__(
        self,
        config: ReceiverConfig,
        loop: asyncio.AbstractEventLoop,
        emit: Callable[..., None],
    ) -> None:
        self.config = config
        self.on_failed: Callable[[BaseException], None] = lambda error: None
        self.on_handover: Callable[[int], None] = lambda term: None
        self._parted = asyncio.Event()  # from whoever has handed over
        self._loop = loop
        self._told = Told(emit)
        self._committed = asyncio.Event()  # a point; the next one has another
        self._hurried = asyncio.Event()
        self._stopping = False
        self._drill: Drill | None = None

    def emit(self, event: str, **fields: Any) -> None:
        self._told.emit(event, **fields)
        if event == "point-committed":
            committed, self._committed = self._committed, asyncio.Event()
            committed.set()

    # -- life -----------------------------------------------------------------------------------
    async def start(self) -> None:
        config = self.config
        self._engine = AioEngine(self._loop)
        try:
            self._journal_device = KernelDevice(config.journal, self._engine, claim=Claim())
            self._image = KernelDevice(config.image, self._engine, claim=Claim())
            scanned = await carried_out(scan(self._journal_device))
            check_owner(config, identify(config.image), scanned.choice.superblock)
            uri = parse_receiver_uri(config.listen)
            await self._begin(scanned, uri.name)
            settings = Settings(
                dial=uri.peer if config.dials else None,
                listen=None if config.dials else uri.peer,
                name=config.sender_name or uri.peer.host,
                certificates=config.certificates,
                fingerprint=config.sender_fingerprint,
                timeout_s=TIMEOUT_S,
            )
            self._transport = PointTransport(self._loop, settings, self)
            self._transport.start()
        except BaseException:
            self._engine.close()
            raise
        self.receiver.start()

    async def _begin(self, scanned: Scanned, name: str) -> None:
        for note in scanned.notes:
            self.emit("journal-note", message=note)
        self.journal = Journal(self._journal_device, scanned, self._failed)
        differs = None
        line = self.journal.superblock.line
        if line is not None:
            if has_new_generation(self.journal):
                raise WrongStateError(
                    f"receiver '{self.config.name}' was promoted, and that was cut short",
                    hint=f"'dmctl promote {self.config.name}' goes on with it",
                )
            if self.journal.page.flags & PageFlag.PROMOTING:
                await carried_out(undo(self.journal, line))
            record = self.config.promoted_record
            differs = await asyncio.to_thread(differing, record, line)
        identity = Identity(name, os.urandom(16), f"bitmapd {__version__}")
        self.receiver = Receiver(
            self.journal,
            self._image,
            self._loop,
            identity,
            lambda: int(time.time()),
            self.emit,
            differs,
            keeper_of(self.config, self._engine),
            self.config.retain or (),
            self.on_handover,
            self._image.enlarge,
            CatchUp(self.config.catch_up),
        )

    def _failed(self, error: OSError) -> None:
        self.receiver.fail()
        self.on_failed(explain(error, f"journal {self.config.journal}"))

    async def stop(self, now: bool) -> dict[str, Any]:
        """True `clean` in the answer if the image is what the journal has committed."""
        if self._stopping:
            raise WrongStateError(f"receiver '{self.config.name}' is stopping already")
        self._stopping = True
        if now:
            self.hurry()
        await self.end_drill()
        self._transport.close()
        self.receiver.leave()
        while not (self._hurried.is_set() or self.receiver.is_idle):
            idle = asyncio.Event()
            self._engine.when_idle(idle.set)
            waits = [asyncio.ensure_future(event.wait()) for event in (idle, self._hurried)]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
        page = self.journal.page
        clean = page.applied == page.committed
        self._engine.close()
        self._journal_device.close()
        self._image.close()
        self.emit("stopped", clean=clean, record_extents=0, paused=False)
        return {"clean": clean, "record_extents": 0, "paused": False}

    def hurry(self) -> None:
        """What is committed may stay in the journal."""
        self._hurried.set()

    def reconfigure(self, config: ReceiverConfig) -> None:
        """Nothing of a receiver changes while it runs."""
        if config != self.config:
            self.emit("settings-refused", message="a receiver takes up its settings at its start")

    async def hand_back(self, reason: str) -> None:
        """It is the receiver that it was: what is handed over to it cannot be taken."""
        journal, line = self.journal, self.journal.superblock.line
        if line is not None and journal.page.flags & PageFlag.PROMOTING:
            await carried_out(undo(journal, line))
        self.emit("handover-error", message=reason)
        self.receiver.kept(reason)

    async def part(self, term: int) -> None:
        """Say that this is the volume now, and return when that was heard, or after a while."""
        self._parted.clear()
        self.receiver.taken(term)
        with contextlib.suppress(TimeoutError):  # it asks again
            async with asyncio.timeout(PARTING_S):
                await self._parted.wait()

    # -- PointEnd -------------------------------------------------------------------------------
    def connected(self, wire: MessageWire) -> None:
        self.receiver.connected(wire)
        if self.config.dials:
            # Who listens waits for a word that tells a receiver from another volume.
            wire.send(Ping(int(self._loop.time() * 1e6)))

    def received(self, wire: MessageWire, message: Message) -> None:
        self.receiver.received(wire, message)

    def drained(self, wire: MessageWire) -> None:
        self.receiver.drained(wire)

    def lost(self, wire: MessageWire, reason: str) -> None:
        self.receiver.lost(wire)
        self._parted.set()
        self.emit("sender-lost", message=f"{wire.peer}: {reason}")

    def failed(self, reason: str) -> None:
        self.emit("sender-refused", message=reason)

    # -- what is asked of it
    # ------------------------------------------------------------------------
    @property
    def state(self) -> str:
        return "failed" if self.receiver.state is State.FAILED else "receiving"

    async def wait(self, state: str) -> None:
        if state not in ("started", "receiving"):
            raise WrongStateError(
                f"'{self.config.name}' is a receiver and is never '{state}'",
                hint="it can be waited for until it is started or stopped, or has a point",
            )

    async def reached(self, newer_than: int) -> None:
        """Return when a point of a larger number is committed."""
        while self.journal.page.committed <= newer_than:
            await self._committed.wait()

    def asked(self) -> tuple[int, ...] | None:
        """Figures of which some move when a medium answers; None while nothing is asked of one."""
        if not self._engine.in_flight:
            return None
        page = self.journal.page
        return (self._engine.in_flight, page.committed, page.applied)

    def silent_media(self) -> str:
        return f"the image {self.config.image} or the journal {self.config.journal}"

    async def begin_drill(self, wanted: Wanted) -> dict[str, Any]:
        """Export the point that the image has; the `view` of the status."""
        from bitmapd.volume.drill import Drill  # noqa: PLC0415  (a server that is rarely needed)

        name = self.config.name
        if self._drill is not None:
            raise BusyError(
                f"a point of '{name}' is being looked at already",
                hint=f"'dmctl test-failover {name} --end' ends that",
            )
        drill = Drill(name, self.receiver, self._image, self._engine, self.emit, self._drill_ended)
        self._drill = drill
        try:
            await drill.begin(wanted)
        except BaseException:
            self._drill = None
            raise
        return drill.figures() or {}

    async def end_drill(self) -> bool:
        """Whether there was one."""
        drill, self._drill = self._drill, None
        if drill is not None:
            await drill.end()
        return drill is not None

    def _drill_ended(self) -> None:
        self._drill = None

    def status(self) -> dict[str, Any]:
        superblock, figures = self.journal.superblock, self.receiver.figures()
        if self._drill is not None:
            figures["view"] = self._drill.figures()
        return described(self.config, self.state, superblock, figures, self._told.last_error)

    def points(self) -> list[dict[str, Any]]:
        journal = self.journal
        sizes = {number: entries.payload_bytes for number, entries in journal.points.items()}
        return points(journal.page, journal.directory, sizes)

    async def drop_point(self, point: int) -> None:
        """NotFoundError if it is not kept."""
        keeping = self.receiver.keeping
        if keeping is None:
            raise NotFoundError(f"receiver '{self.config.name}' has no point yet")
        await carried_out(keeping.drop(point))
