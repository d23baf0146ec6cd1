"""Taking up a larger size while hosts are served.

1. The pages that the larger volume needs in addition are written as ones, all of each page.
2. The last extent, if the old end lies in it, is recorded, and stays so whatever becomes of the
   rest: its new part is in the record from now on.
3. The last page names its new extents, in this write of it and in every later one.
4. The superblock says the new size.
5. In memory the record, the copier and the gate take it up, in one event: every new extent is
   recorded, and its blocks wait to be copied like any other.

The order is what makes a crash or an error at any point harmless.  Up to step 4 a load cuts off
everything beyond the old size.  If step 4 fails, either size may be in force after a crash, and the
record is right for both, and for another size that is asked for next.  Nothing of steps 1 to 4 has
to be taken back: a volume that goes on with its old size after an error may be asked to grow again,
and a clean stop leaves one extent in the record.

Hosts whose kernel has layers of the old size see the new one after that (`attach/dm_mode`).
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from bitmapd.config import VolumeConfig
from bitmapd.errors import NoSpaceError, WrongStateError
from bitmapd.media.base import Done, Target
from bitmapd.media.identity import identify
from bitmapd.media.waiting import Aside, completion
from bitmapd.record.geometry import Geometry
from bitmapd.record.layout import PageState, Verdict, page_count, record_size_bytes
from bitmapd.volume.secondary import present_size

if TYPE_CHECKING:
    from bitmapd.record.store import RecordStore
    from bitmapd.volume.assemble import Parts
    from bitmapd.volume.session import RecordSession


@dataclasses.dataclass(frozen=True, slots=True)
class Medium:
    """What a larger size has to be compared with."""

    name: str  # in messages
    size_bytes: int
    block_bytes: int = 1  # of which every size has to be a multiple


def larger_geometry(
    old: Geometry, primary: Medium, secondary: Medium, record: Medium
) -> Geometry | None:
    """The geometry to go over to, None if nothing has grown (pure)."""
    size_bytes = primary.size_bytes
    if size_bytes < old.size_bytes:
        raise WrongStateError(
            f"primary {primary.name} has {size_bytes} bytes, the volume {old.size_bytes}:"
            " a volume cannot shrink",
            hint="give the primary its size back",
        )
    if size_bytes == old.size_bytes:
        return None
    for role, medium in (("primary", primary), ("secondary", secondary)):
        if size_bytes % medium.block_bytes:
            raise WrongStateError(
                f"primary {primary.name} has {size_bytes} bytes, no multiple of the blocks of"
                f" {medium.block_bytes} bytes of {role} {medium.name}; the volume stays as it is",
                hint=f"give the primary {size_bytes + -size_bytes % medium.block_bytes} bytes",
            )
    if secondary.size_bytes < size_bytes:
        raise NoSpaceError(
            f"secondary {secondary.name} has {secondary.size_bytes} bytes, the primary"
            f" {size_bytes}",
            hint="enlarge the secondary first",
        )
    new = dataclasses.replace(old, size_bytes=size_bytes)
    needed = record_size_bytes(new.extents)
    if record.size_bytes < needed:
        raise NoSpaceError(
            f"record {record.name} has {record.size_bytes} bytes; {size_bytes} bytes of volume"
            f" need {needed}",
            hint="enlarge the record device first",
        )
    return new


async def present_geometry(
    config: VolumeConfig, old: Geometry, secondary: Target | None, loop: asyncio.AbstractEventLoop
) -> Geometry | None:
    """What a volume is to grow to by the present sizes of its media; None if it has that.  Without
    a secondary there is a receiver, which is asked for itself (`offering`)."""

    async def local(path: str) -> Medium:
        found = await loop.run_in_executor(None, identify, path)
        return Medium(path, found.size_bytes or 0, found.logical_block_bytes or 512)

    primary = await local(config.primary)
    other = Medium(config.secondary, primary.size_bytes)
    if secondary is not None and primary.size_bytes > old.size_bytes:
        other = Medium(config.secondary, *await present_size(secondary, config, loop))
    return larger_geometry(old, primary, other, await local(config.record))


def new_page_states(old: Geometry, new: Geometry) -> list[PageState]:
    """Where the pages stand that `tool.add_pages` writes: slot 0 is newest, with sequence 2."""
    added = page_count(new.extents) - page_count(old.extents)
    return [PageState(Verdict.WHOLE, 0, 2, 2, "") for _ in range(added)]


def record_short_end(
    store: RecordStore, old: Geometry, loop: asyncio.AbstractEventLoop, done: Done
) -> None:
    """Step 2 where the extent need not become dirty: it is in the record."""
    short = old.short_extent
    if short is None or not store.add([(short, short + 1)], (), done):
        loop.call_soon(done, None)


async def prepare_growth(
    session: RecordSession,
    store: RecordStore,
    aside: Aside,
    geometry: Geometry,
    record_end: Callable[[Done], None],
) -> None:
    """Steps 1 to 3 of the module docstring; `record_end` is step 2."""
    await aside(session.prepare_growth, geometry)
    await completion(record_end)
    await completion(partial(store.prepare_growth, geometry))


async def commit_growth(session: RecordSession, geometry: Geometry, aside: Aside) -> None:
    """Step 4: the new size is in force after a crash."""
    await aside(
        session.update,
        geometry=geometry,
        primary_size_bytes=geometry.size_bytes,
        secondary_size_bytes=max(geometry.size_bytes, session.superblock.secondary_size_bytes),
    )


async def enlarge(
    parts: Parts, geometry: Geometry, record_end: Callable[[Done], None] | None = None
) -> None:
    """Steps 1 to 4."""
    await parts.primary.present_size_bytes()
    record_end = record_end or parts.gate.prepare_growth
    await prepare_growth(parts.session, parts.store, parts.aside, geometry, record_end)
    await commit_growth(parts.session, geometry, parts.aside)


def take_up(parts: Parts, old: Geometry, geometry: Geometry, *, mine: bool = True) -> None:
    """Step 5; what the volume itself has of its size is its own."""
    parts.store.grow(geometry, new_page_states(old, geometry))
    parts.copier.grow(geometry)
    parts.gate.grow(geometry, mine=mine)
