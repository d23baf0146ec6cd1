"""A receiver becomes a volume: media and record, in the order of `receiver.promotion` (edge).

The receiver's process has ended, or never ran: image and journal are opened here, and claimed.
Behind this the configuration is exchanged, and the volume started.

1. Nothing of the record's medium is overwritten but a record of the same volume.
2. A call that was cut short anywhere is repeated: the second one goes on where the first one ended.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final
from uuid import uuid4

from bitmapd.config import Paths, ReceiverConfig
from bitmapd.config.files import exchange_role, former_volume
from bitmapd.config.roles import volume_table
from bitmapd.errors import BitmapdError, UsageError, WrongStateError, explain
from bitmapd.media.aio import AioEngine
from bitmapd.media.claims import Claim
from bitmapd.media.identity import identify
from bitmapd.media.kdevice import KernelDevice
from bitmapd.peer.payloads import Runs
from bitmapd.receiver.applier import Applier
from bitmapd.receiver.directory import Keep
from bitmapd.receiver.journal import Journal
from bitmapd.receiver.keeping import Keeper, Keeping
from bitmapd.receiver.promotion import (
    Obstacle,
    finish,
    has_new_generation,
    prepare,
    successor,
)
from bitmapd.receiver.scan import scan
from bitmapd.receiver.superblock import Line
from bitmapd.record import tool
from bitmapd.record.layout import InitialSync, RecordFlag, Superblock, record_size_bytes
from bitmapd.record.points_state import PointsState
from bitmapd.volume.copies import keeper_of
from bitmapd.volume.receiving import Receiving, carried_out, check_owner


@dataclass(frozen=True, slots=True)
class Media:
    """Of the receiver that is promoted; `secondary` is where its own receiver will be reached."""

    name: str
    image: str
    journal: str
    record: str
    secondary: str


@dataclass(frozen=True, slots=True)
class Promoted:
    line: Line
    point: int
    wall_ns: int  # of the point's cut
    named_extents: int
    obstacle: Obstacle | None


class _Quiet:
    """Whom the applier would tell; the result says it all."""

    def applied(self, point: int) -> None:
        """Looked at in the journal."""

    def damaged(self, missing: Runs) -> None:
        """The queue is not empty then."""

    def image_failed(self, error: OSError) -> None:
        """Raised by the step that it ended."""


def default_record(paths: Paths, name: str) -> str:
    """Where a record is made for whom nobody has thought of one."""
    return str(paths.state_dir / f"{name}.record")


def exchange(paths: Paths, config: ReceiverConfig, promoted: Promoted, record: str) -> None:
    """The configuration says that this is a volume; what this host knew of the record of an earlier
    time as one is forgotten."""
    line, before = promoted.line, former_volume(paths, config.name)
    table = volume_table(config, line.volume, line.geometry, record, before)
    paths.state_file(line.volume).unlink(missing_ok=True)
    exchange_role(paths, config.name, table)


@dataclass(frozen=True, slots=True)
class Which:
    """Of the points that there are; the newest if none is given.  `group`: the number of one in its
    group, which is the newest that all members have."""

    point: int | None = None
    label: str | None = None
    group: int | None = None


NEWEST: Final = Which()


async def promote(
    media: Media, config: ReceiverConfig, *, force: bool, which: Which = NEWEST
) -> Promoted:
    """WrongStateError if there is nothing to promote, or it is worth less than it should be and
    that was not forced, UsageError if a label is that of several points: then everything is as
    before."""
    loop = asyncio.get_running_loop()
    engine = AioEngine(loop)
    opened: list[KernelDevice] = []
    try:
        for path in (media.image, media.journal):
            device = await engine.call(partial(KernelDevice, path, engine, claim=Claim()))
            opened.append(device)
        keeper = await engine.call(partial(keeper_of, config, engine))
        image, journal = opened
        return await _promote(media, config, image, journal, keeper, force=force, which=which)
    except OSError as error:
        raise explain(error, f"receiver '{media.name}'") from error
    finally:
        for device in opened:
            await engine.call(device.close)
        idle = asyncio.Event()
        engine.when_idle(idle.set)
        await idle.wait()
        engine.close()


async def _promote(
    media: Media,
    config: ReceiverConfig,
    image: KernelDevice,
    device: KernelDevice,
    keeper: Keeper,
    *,
    force: bool,
    which: Which,
) -> Promoted:
    scanned = await carried_out(scan(device))
    # What is queued would be written into whatever disk has the image's name now.
    there = await asyncio.to_thread(identify, media.image)
    check_owner(config, there, scanned.choice.superblock)
    journal = Journal(device, scanned, lambda error: None)
    line = journal.superblock.line
    if line is None:
        raise WrongStateError(
            f"receiver '{media.name}' has never had a sender: there is nothing to promote"
        )
    point = _find(media.name, journal, which)
    keeping = Keeping(journal, keeper, None, lambda event, **fields: None)
    applier = Applier(journal, image, line, asyncio.get_running_loop(), _Quiet(), keeping)
    up_to = None if which.group is None else journal.page.point_of(which.group)
    return await become_volume(media, journal, applier, line, force=force, point=point, up_to=up_to)


async def become_volume(
    media: Media,
    journal: Journal,
    applier: Applier,
    line: Line,
    *,
    force: bool,
    point: int | None = None,
    up_to: int | None = None,
) -> Promoted:
    """Of a receiver that takes nothing any more, and whose applier rests.  As `promote`; `point`:
    an older one that is kept; `up_to`: the newest one that all of its group have."""
    goes_on = has_new_generation(journal)
    await asyncio.to_thread(_check_record, media, line)
    ready = await carried_out(
        prepare(journal, applier, line, force=force, point=point, up_to=up_to)
    )
    if ready.obstacle is not None and not force and not goes_on:
        raise WrongStateError(
            f"the image of receiver '{media.name}' cannot be relied upon: {ready.obstacle.value}",
            hint=_way_out(media.name, journal, ready.obstacle),
        )
    after = line if goes_on else successor(line, uuid4())
    geometry = replace(after.geometry, size_bytes=ready.size_bytes)
    volume = replace(after, geometry=geometry)
    await asyncio.to_thread(_make_record, media, volume, ready.since)
    await carried_out(finish(journal, applier.keeping, after, int(time.time())))
    extents = sum(stop - first for first, stop in ready.since)
    return Promoted(volume, ready.point, ready.wall_ns, extents, ready.obstacle)


def _way_out(name: str, journal: Journal, obstacle: Obstacle) -> str:
    forced = "--force promotes it as it is; a file system on it may be damaged"
    page, older = journal.page, journal.directory.newest
    if obstacle is not Obstacle.INCONSISTENT or not page.in_place:
        return forced
    kept = "" if older is None else f"'dmctl promote {name} --point {older.point}' takes a copy; "
    return (
        f"the sender's point {page.inconsistent_until} ends that: start the receiver and wait;"
        f" {kept}{forced}"
    )


def _find(name: str, journal: Journal, which: Which) -> int | None:
    """The number of an older point that is wanted; None: the newest."""
    newest, points = journal.page.committed, journal.directory.points
    there = {newest} | {kept.point for kept in points if kept.state is not Keep.GOING}
    if which.label is None:
        found = [which.point] if which.point in there else []
        wanted = f"point {which.point}"
    else:
        found = [kept.point for kept in points if kept.label == which.label]
        found = [point for point in found if point in there and point <= newest]
        wanted = f"a point with the label {which.label!r}"
    if which.point is None and which.label is None:
        return None
    if not found:
        raise WrongStateError(
            f"receiver '{name}' does not have {wanted}",
            hint=f"'dmctl points {name}' lists what it has",
        )
    if len(found) > 1:
        numbers = ", ".join(map(str, found))
        raise UsageError(
            f"receiver '{name}' has several points with the label {which.label!r}: {numbers}",
            hint=f"'dmctl promote {name} --point P' takes one of them",
        )
    return None if found[0] == newest else found[0]


async def take_over(receiving: Receiving, term: int, paths: Paths) -> bool:
    """By the word of the site that was the volume until now.  False, and a receiver as before, if
    that cannot be; else the configuration says that this is the volume, and the process has to
    begin anew."""
    config, journal = receiving.config, receiving.journal
    applier, line = receiving.receiver.applier, journal.superblock.line
    if applier is None or line is None:
        raise TypeError("a receiver that follows nobody takes nothing over")
    await receiving.end_drill()
    record = config.promoted_record or default_record(paths, config.name)
    media = Media(config.name, config.image, config.journal, record, config.listen)
    try:
        done = await become_volume(media, journal, applier, line, force=False)
    except (BitmapdError, OSError) as error:
        if has_new_generation(journal) or journal.failure is not None:
            raise
        await receiving.hand_back(str(error))
        return False
    await asyncio.to_thread(exchange, paths, config, done, record)
    receiving.emit("taken-over", point=done.point, term=term)
    await receiving.part(term)
    return True


def _check_record(media: Media, line: Line) -> None:
    """Before anything is changed; makes the file if there is none."""
    need = record_size_bytes(line.geometry.extents)
    path = Path(media.record)
    if not path.exists() and not media.record.startswith("/dev/"):
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.truncate(need)
    tool.check_free(media.record, line.volume, line.geometry)


def _make_record(media: Media, line: Line, named: Runs) -> None:
    found = tool.probe(media.record)
    if found is not None and found.generations == line.generations and found.session == 0:
        return  # by a call that was cut short
    image = identify(media.image)
    now_s = int(time.time())
    superblock = Superblock(
        volume_uuid=line.volume,
        name=media.name,
        geometry=line.geometry,
        generations=line.generations,
        primary=image.text,
        primary_size_bytes=image.size_bytes or 0,
        secondary=identify(media.secondary).text,
        secondary_size_bytes=0,
        created_s=now_s,
        updated_s=now_s,
        flags=RecordFlag(0),
        initial_sync=InitialSync.NONE,
    ).with_points(PointsState(term=line.term))
    tool.format_record(media.record, superblock, ones=False, force=True, named=named)


def promote_now(
    media: Media, config: ReceiverConfig, *, force: bool, which: Which = NEWEST
) -> Promoted:
    """As `promote`, in a loop of its own."""
    return asyncio.run(promote(media, config, force=force, which=which))
