"""Taking up a larger size while hosts are served.

The order is what makes a crash at any point harmless: pages that the larger volume needs in
addition are written as ones; the last page that exists gets the bits of its new extents; only then
does the superblock say the new size.  Until it does, a load cuts off everything beyond the old one;
from then on every new extent is in the record, and is copied like any other.

A volume in the kernel needs a new era device too, which nothing may use when it is exchanged.  So
everything is moved to the gate, this `Volume` is left, and another one takes over from the record
as after a crash (`daemon`): hosts' writes wait in the kernel meanwhile, and what the record names
is copied again.
"""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING

from bitmapd.errors import NoSpaceError, WrongStateError
from bitmapd.media.base import Done
from bitmapd.media.identity import identify
from bitmapd.media.waiting import completion
from bitmapd.record.geometry import Geometry
from bitmapd.record.layout import PageState, Verdict, page_count, record_size_bytes
from bitmapd.record.store import RecordStore

if TYPE_CHECKING:
    from bitmapd.volume.session import RecordSession
    from bitmapd.volume.volume import Volume


def larger_geometry(
    old: Geometry, primary_bytes: int, secondary_bytes: int, record_bytes: int, names: Names
) -> Geometry | None:
    """The geometry to go over to, None if nothing has grown (pure)."""
    if primary_bytes < old.size_bytes:
        raise WrongStateError(
            f"primary {names.primary} has {primary_bytes} bytes, the volume {old.size_bytes}:"
            " a volume cannot shrink",
            hint="give the primary its size back",
        )
    if primary_bytes == old.size_bytes:
        return None
    if secondary_bytes < primary_bytes:
        raise NoSpaceError(
            f"secondary {names.secondary} has {secondary_bytes} bytes, the primary {primary_bytes}",
            hint="enlarge the secondary first",
        )
    new = dataclasses.replace(old, size_bytes=primary_bytes)
    needed = record_size_bytes(new.extents)
    if record_bytes < needed:
        raise NoSpaceError(
            f"record {names.record} has {record_bytes} bytes; {primary_bytes} bytes of volume need"
            f" {needed}",
            hint="enlarge the record device first",
        )
    return new


@dataclasses.dataclass(frozen=True, slots=True)
class Names:
    """How the three media are called in messages."""

    primary: str
    secondary: str
    record: str


def new_page_states(old: Geometry, new: Geometry) -> list[PageState]:
    """Where the pages stand that `tool.write_pages` adds: slot 0 is newest, with sequence 2."""
    added = page_count(new.extents) - page_count(old.extents)
    return [PageState(Verdict.WHOLE, 0, 2, 2, "") for _ in range(added)]


async def wanted_geometry(volume: Volume) -> Geometry | None:
    """What the volume is to grow to, by the present sizes of its media; None if it is as it is."""
    config, old = volume.config, volume.geometry
    primary_bytes = identify(config.primary).size_bytes or 0
    return larger_geometry(
        old,
        primary_bytes,
        await volume.secondary_size_bytes() if primary_bytes > old.size_bytes else 0,
        identify(config.record).size_bytes or 0,
        Names(config.primary, config.secondary, config.record),
    )


async def grow_record(
    session: RecordSession,
    store: RecordStore,
    geometry: Geometry,
    loop: asyncio.AbstractEventLoop,
) -> None:
    """The three steps of the module docstring; the new size is in force on return."""
    old = session.superblock.geometry
    await loop.run_in_executor(None, session.prepare_growth, geometry)
    store.grow(geometry, new_page_states(old, geometry))
    first = old.size_bytes // geometry.extent_bytes

    def record_new_extents(done: Done) -> None:
        if not store.add([(first, geometry.extents)], (), done):
            loop.call_soon(done, None)

    await completion(record_new_extents)
    session.update(
        geometry=geometry,
        primary_size_bytes=geometry.size_bytes,
        secondary_size_bytes=max(geometry.size_bytes, session.superblock.secondary_size_bytes),
    )
