"""An old primary becomes the receiver of what took its place: what it asks, and says (edge).

| step | a crash behind it |
| --- | --- |
| 1 the other site says of which generation it is | nothing was changed |
| 2 what never left this one is saved, if that is wanted | the same |
| 3 the journal is made, with the generation of the old record | it is made again |
| 4 the configuration says that this is a receiver | it goes on as one |
| 5 the record's extents are said, and sent again by the other site | they are said again |
| 6 the first point is whole | a receiver like any other; the record is of no use any more |

1. Only a site whose generation is in the history of the other's is old.  Anything else is refused,
   and nothing is overwritten.
2. What differs between the two is in this record or in the other's: both name more than they need.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, Generic, TypeVar
from uuid import UUID

from bitmapd import __version__
from bitmapd.config import VolumeConfig
from bitmapd.errors import (
    BitmapdError,
    ForeignRecordError,
    SplitBrainError,
    UnreachableError,
    WrongStateError,
)
from bitmapd.net.uri import parse_receiver_uri
from bitmapd.peer.payloads import Runs
from bitmapd.peer.transport import Settings
from bitmapd.points.messages import NIL, Feature, Hello2, Message, Ping, Role
from bitmapd.points.wire import MessageWire, PointTransport
from bitmapd.receiver.superblock import Line
from bitmapd.record import tool
from bitmapd.record.extents import runs_of
from bitmapd.record.geometry import Geometry
from bitmapd.record.superblock import Superblock, as_ids
from bitmapd.volume.sending import link_settings

ANSWER_S: Final = 10.0
_CHUNK_BYTES: Final = 1 << 20


# -- who the other one is ---------------------------------------------------------------------


A = TypeVar("A")


class Asking(Generic[A]):
    """Greets the other one, whoever of the two connects, and hears it; connections that end are
    made again."""

    def __init__(self, hello: Hello2, geometry: Geometry) -> None:
        self.hello = hello
        self.geometry = geometry
        self.failure = "it did not answer"
        self.refusal: str | None = None  # as the other one said it
        self._answer: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._greeted: MessageWire | None = None

    async def ask(self, settings: Settings, within_s: float) -> A | None:
        """The answer; None, and `failure`, if there is none in time."""
        self._says_first = settings.dial is not None
        transport = PointTransport(asyncio.get_running_loop(), settings, self)
        transport.start()
        try:
            async with asyncio.timeout(within_s):
                return await self._answer
        except TimeoutError:
            return None
        finally:
            transport.close()
            if self._greeted is not None:
                self._greeted.close()

    def answered(self, answer: A) -> None:
        if not self._answer.done():
            self._answer.set_result(answer)

    def _greet(self, wire: MessageWire) -> None:
        self._greeted = wire
        wire.send(self.hello)

    # -- `PointEnd` -------------------------------------------------------------------------
    def connected(self, wire: MessageWire) -> None:
        if self._says_first:
            self._greet(wire)

    def received(self, wire: MessageWire, message: Message) -> None:
        if isinstance(message, Ping) and wire is not self._greeted:
            self._greet(wire)  # a receiver that connects; a volume says who it is at once

    def drained(self, wire: MessageWire) -> None:
        """Little is said."""

    def lost(self, wire: MessageWire, reason: str) -> None:
        self.failure = reason

    def failed(self, reason: str) -> None:
        self.failure = reason


class _Who(Asking[Hello2]):
    def received(self, wire: MessageWire, message: Message) -> None:
        if isinstance(message, Hello2):
            self.answered(message)
        else:
            super().received(wire, message)


def hello_of(config: VolumeConfig, superblock: Superblock, role: Role) -> Hello2:
    """What a site says of itself while its volume does not run."""
    geometry, points = superblock.geometry, superblock.points
    return Hello2(
        volume=config.uuid.bytes,
        incarnation=os.urandom(16),
        generations=as_ids(superblock.generations),
        size_bytes=geometry.size_bytes,
        block_bytes=geometry.block_bytes,
        extent_bytes=geometry.extent_bytes,
        committed=0 if points is None else points.committed,
        applied=0,
        oldest_kept=0,
        role=role,
        features=Feature(0),
        credit_bytes=0,
        term=0 if points is None else points.term,
        name=parse_receiver_uri(config.secondary).name,
        program=f"bitmapd {__version__}",
    )


async def ask(config: VolumeConfig, superblock: Superblock, settings: Settings) -> Hello2:
    """What the other site says of itself.  UnreachableError if it does not within `ANSWER_S`."""
    asking = _Who(hello_of(config, superblock, Role.SENDER), superblock.geometry)
    answer = await asking.ask(settings, ANSWER_S)
    if answer is None:
        raise UnreachableError(
            f"the other site of volume '{config.name}', {config.secondary}, cannot be asked:"
            f" {asking.failure}",
            hint="nothing was changed; it has to run to be followed",
        )
    return answer


def refuse_unless_old(config: VolumeConfig, superblock: Superblock, theirs: Hello2) -> None:
    """An error that says why this site must not become the receiver of that one."""
    name = config.name
    if theirs.volume not in (config.uuid.bytes, NIL):
        raise ForeignRecordError(
            f"{config.secondary} is of another volume (uuid {UUID(bytes=theirs.volume)})"
        )
    ours = superblock.generations[0].bytes
    if ours in theirs.generations[1:]:
        return
    if ours == theirs.generations[0]:
        raise WrongStateError(
            f"{config.secondary} was not promoted: volume '{name}' is what it follows",
            hint=f"dmctl start {name}",
        )
    if theirs.generations[0] in {value.bytes for value in superblock.generations[1:]}:
        raise WrongStateError(
            f"{config.secondary} has the older data, and volume '{name}' the newer",
            hint="'dmctl failback' belongs to the other site",
        )
    raise SplitBrainError(
        f"volume '{name}' and {config.secondary} have both been written, each without the other",
        hint="nothing was overwritten; see 'Both were written' in docs/recovery.md",
    )


def ask_now(config: VolumeConfig, superblock: Superblock) -> Hello2:
    """As `ask`, in a loop of its own."""
    return asyncio.run(ask(config, superblock, link_settings(config)))


# -- what never left this one -----------------------------------------------------------------


def recorded_runs(record: str, volume: UUID) -> tuple[Superblock, Runs]:
    """The superblock of a volume's record, and the extents that it names."""
    loaded = tool.load(record)
    if loaded.superblock.volume_uuid != volume:
        raise ForeignRecordError(
            f"record {record} belongs to another volume (uuid {loaded.superblock.volume_uuid})"
        )
    return loaded.superblock, runs_of(loaded.bits)


def differing(record: str | None, line: Line) -> Runs | None:
    """Where an image that was a primary of this line may differ; None if it was none, or is no
    longer one: the record is of another generation then."""
    if record is None:
        return None
    try:
        superblock, runs = recorded_runs(record, line.volume)
    except BitmapdError:
        return None
    return runs if superblock.generations == line.generations else None


def save(
    superblock: Superblock, primary: str, runs: Runs, path: Path, told: Callable[[float], None]
) -> None:
    """A sparse file of the volume's size that has what the primary has in these extents."""
    geometry = superblock.geometry
    total = sum(stop - first for first, stop in runs) or 1
    done = 0
    with path.open("xb") as out, open(primary, "rb", buffering=0) as source:
        out.truncate(geometry.size_bytes)
        for first, stop in runs:
            for extent in range(first, stop):
                at = extent * geometry.extent_bytes
                end = min(at + geometry.extent_bytes, geometry.size_bytes)
                while at < end:
                    chunk = os.pread(source.fileno(), min(_CHUNK_BYTES, end - at), at)
                    if not chunk:
                        raise OSError(errno.EIO, "the primary is too short", primary)
                    os.pwrite(out.fileno(), chunk, at)
                    at += len(chunk)
                done += 1
                told(done / total)
        os.fsync(out.fileno())


def line_of(superblock: Superblock) -> Line:
    """What the journal of an old primary begins with."""
    points = superblock.points
    if points is None:
        raise WrongStateError(f"volume '{superblock.name}' has no receiver")
    return Line(superblock.volume_uuid, superblock.geometry, superblock.generations, points.term)
