"""A volume that has grown: its receiver takes up the larger size (pure but for the `Device`s).

A sender says the size of its volume when it greets, and says the larger one first: it takes it up
itself only when the receiver has answered.  In this order:

1. The image has room: a file is extended with zeros, a device has to be large enough already.
2. Points that are here get the size that the volume had at their cut.
3. The superblock of the journal says the larger size; maps and segments move if they have to.

Invariants:
1. Whatever is refused changes nothing but the size of the image's file.
2. A sender whose volume is smaller than this is welcome, as long as no point of the larger size is
   committed: its growth was cut short.
3. Entries are those of a volume of the size that BEGIN says.  Every point keeps its own size, and
   what is promoted has the size of its point.
4. What the image has beyond the size of its point means nothing until the first point of the
   larger size brings all of it.

A crash leaves the old size or the new one; the sender asks again for what it still wants.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Final

from bitmapd.errors import BitmapdError, UsageError
from bitmapd.media.base import Device, Done
from bitmapd.peer.frames import ErrorCode, PeerError
from bitmapd.peer.payloads import Runs
from bitmapd.points.messages import Begin, Hello2
from bitmapd.receiver.journal import Journal
from bitmapd.receiver.keeping import Keeping
from bitmapd.receiver.places import Places
from bitmapd.receiver.steps import Steps
from bitmapd.record.geometry import Geometry

_SECTOR_BYTES: Final = 512

Enlarge = Callable[[int, Done], None]


def geometry_of(hello: Hello2) -> Geometry:
    """PeerError if there is no such volume."""
    try:
        return Geometry(hello.size_bytes, hello.extent_bytes, hello.block_bytes)
    except UsageError as error:
        raise PeerError(ErrorCode.OTHER, error.message) from None


def check(hello: Hello2, journal: Journal, image: Device) -> None:
    """PeerError if a volume of this size can have no points here."""
    geometry = geometry_of(hello)
    if geometry.size_bytes % image.block_size_bytes:
        raise PeerError(
            ErrorCode.SIZE,
            f"the image has blocks of {image.block_size_bytes} bytes, of which"
            f" {geometry.size_bytes} is no multiple",
        )
    try:
        places = Places(geometry, journal.superblock.journal_bytes)
    except BitmapdError as error:
        raise PeerError(ErrorCode.SIZE, f"{error.message}: {error.hint}") from None
    line, page = journal.superblock.line, journal.page
    if line is None:
        return
    here = dataclasses.replace(geometry, size_bytes=line.geometry.size_bytes)
    if (line.volume.bytes, line.geometry) != (hello.volume, here):
        raise PeerError(
            ErrorCode.OTHER,
            f"this is the receiver of volume {line.volume}, in blocks of"
            f" {line.geometry.block_bytes} bytes and extents of {line.geometry.extent_bytes}: make"
            " another one for this volume ('dmctl receive'), or give the volume the address of its"
            " own",
        )
    least = journal.geometry_at(page.committed_bytes).size_bytes if page.committed else 0
    if geometry.size_bytes < least:
        raise PeerError(
            ErrorCode.SIZE,
            f"point {page.committed} has {least} bytes, the volume {geometry.size_bytes}: it cannot"
            " shrink",
        )
    kept = len(journal.directory.kept)
    if kept > places.maps:
        raise PeerError(
            ErrorCode.SIZE,
            f"{kept} points are kept, and the journal has room for {places.maps} change maps of a"
            f" volume of {geometry.size_bytes} bytes: drop some",
        )


def _check_image(geometry: Geometry, image: Device) -> None:
    if geometry.size_bytes > image.size_bytes:
        raise PeerError(
            ErrorCode.SIZE,
            f"the image has {image.size_bytes} bytes, the volume {geometry.size_bytes}: enlarge the"
            " image",
        )


def first_image(hello: Hello2, image: Device, enlarge: Enlarge) -> Steps[PeerError | None]:
    """The present size of the image; why the volume that comes first cannot have it.  A file is not
    extended for that one: another may have been meant."""
    try:
        yield partial(enlarge, 0)
        _check_image(geometry_of(hello), image)
    except OSError as error:
        return PeerError(ErrorCode.OTHER, f"the image: {error.strerror or error}")
    except PeerError as error:
        return PeerError(error.code, f"{error.text}, and the volume comes in by itself")
    return None


def take_up(
    hello: Hello2,
    journal: Journal,
    keeping: Keeping,
    image: Device,
    enlarge: Enlarge,
    now_s: int,
) -> Steps[PeerError | None]:
    """The size of the greeting, which `check` lets pass, if it is larger; why it cannot be."""
    geometry, line = geometry_of(hello), journal.line
    if geometry.size_bytes <= line.geometry.size_bytes:
        return None
    larger = dataclasses.replace(line, geometry=geometry)
    if journal.moves(larger) and journal.page.queue:
        return PeerError(
            ErrorCode.BUSY, "points wait to be applied; the journal can be arranged anew after that"
        )
    try:
        yield partial(enlarge, geometry.size_bytes)
        _check_image(geometry, image)
    except OSError as error:
        return PeerError(ErrorCode.SIZE, f"the image cannot be enlarged: {error.strerror or error}")
    except PeerError as error:
        return error
    most = Places(geometry, journal.superblock.journal_bytes).maps
    yield from keeping.grow(journal.grow(larger, image.size_bytes, now_s), most)
    return None


def begun(begin: Begin, journal: Journal) -> Geometry:
    """Of the entries that follow.  PeerError if the volume cannot have that size."""
    size_bytes, page, line = begin.size_bytes, journal.page, journal.line
    least = journal.geometry_at(page.committed_bytes).size_bytes if page.committed else 0
    if not least <= size_bytes <= line.geometry.size_bytes or size_bytes % _SECTOR_BYTES:
        raise PeerError(ErrorCode.SIZE, f"point {begin.point} has {size_bytes} bytes")
    return journal.geometry_at(size_bytes)


def within(extents: Runs, geometry: Geometry) -> Runs:
    """What of these a volume of this size has."""
    most = geometry.extents
    return tuple((first, min(stop, most)) for first, stop in extents if first < most)
