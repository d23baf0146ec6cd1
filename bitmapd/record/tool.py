"""Work on a record device outside the running volume: format, load, heal, check, repair.

Everything is synchronous and goes past the page cache where the medium allows it.

1. `load` reads, then flushes the medium: what it returned survives a power cut, even if the write
   that brought it was cut off by the death of the process that made it.
2. `format_record` takes the old superblocks and hints away first, then writes the pages, then the
   new superblocks, each durably before the next.  A crash in between leaves no record, or one
   without valid superblock: nothing that lies.
3. A superblock counts when both of its copies are durable; only then may anything rely on it.
   The one of a record that is in use changes through `updates.py` alone.
4. `heal` makes damaged pages whole again, as ones.  It comes before anything relies on the record.
5. `repair` writes to another medium, never to the one it reads.
6. Who changes a record holds its lock (record/medium).
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final
from uuid import UUID

from bitarray import bitarray

from bitmapd.errors import (
    BitmapdError,
    BusyError,
    ExistsError,
    ForeignRecordError,
    FormatTooNewError,
    NoSpaceError,
    NotFoundError,
    RecordDamagedError,
    UsageError,
)
from bitmapd.media.identity import in_use, same_medium, signature
from bitmapd.record.geometry import Geometry
from bitmapd.record.hints import HINTS_BYTES
from bitmapd.record.layout import (
    EXTENTS_PER_PAGE,
    PAGE_BYTES,
    PAGES_OFFSET,
    SUPERBLOCK_BYTES,
    SUPERBLOCK_OFFSETS,
    Loaded,
    RecordFlag,
    Superblock,
    assemble,
    encode_page_into,
    encode_superblock,
    healed,
    page_bits,
    page_count,
    page_offset,
    record_size_bytes,
    require_writable,
    with_superblock,
)
from bitmapd.record.medium import (
    CHUNK_BYTES,
    Read,
    Reader,
    RecordMedium,
    Source,
    explained,
    find_superblock,
    opened,
    probe,
)
from bitmapd.record.report import CheckReport, Finding, Severity, dump, examine, unusable

__all__ = [
    "CheckReport",
    "Finding",
    "RecordMedium",
    "Severity",
    "check",
    "dump",
    "format_record",
    "heal",
    "load",
    "probe",
    "read_hints",
    "repair",
    "with_superblock",
    "write_hints",
    "write_pages",
    "write_superblock",
    "write_superblock_copy",
]

HINTS_OFFSET: Final = SUPERBLOCK_OFFSETS[1] + SUPERBLOCK_BYTES  # up to the pages
_PAGES_PER_CHUNK: Final = CHUNK_BYTES // (2 * PAGE_BYTES)
_NO_CACHE: Final = frozenset({errno.EINVAL, errno.EROFS, errno.EOPNOTSUPP})


# -- reading ------------------------------------------------------------------------------------


def load(source: Source, read: Read = os.preadv) -> Loaded:
    """The whole record.  NotFoundError if there is none, RecordDamagedError if no superblock can be
    trusted; damaged pages count as ones and are named in `messages`."""
    with opened(source) as medium:
        reader = Reader(medium, read)
        choice = find_superblock(reader, medium)
        if choice is None:
            raise NotFoundError(
                f"{medium.name}: there is no record here",
                hint="if there was one, it is lost: create it anew, with a full or checksum sync",
            )
        units = reader.units(PAGES_OFFSET, 2 * choice.superblock.page_count)
        loaded = assemble(choice, zip(units, units, strict=True))
        try:
            os.fdatasync(medium.fd)
        except OSError as error:
            if error.errno not in _NO_CACHE:
                raise RecordDamagedError(
                    f"{medium.name}: cannot be flushed: {error.strerror}"
                ) from error
        have = medium.size_bytes
    warnings = [*loaded.warnings, *reader.notes]
    need = record_size_bytes(choice.superblock.geometry.extents)
    if have < need:
        warnings.append(f"the medium ends at byte {have}, the record at byte {need}")
    return replace(loaded, warnings=tuple(warnings))


def read_hints(medium: RecordMedium) -> bytes:
    """The area of hints as it is; less than `HINTS_BYTES` if it cannot be read."""
    buffer = mmap.mmap(-1, HINTS_BYTES)
    try:
        return buffer[: os.preadv(medium.fd, [buffer], HINTS_OFFSET)]
    except OSError:
        return b""


# -- writing ------------------------------------------------------------------------------------


def write_hints(medium: RecordMedium, area: bytes) -> None:
    """A crash leaves old ones, new ones, or some that are ignored."""
    view = memoryview(mmap.mmap(-1, HINTS_BYTES))
    view[:] = area
    medium.write(HINTS_OFFSET, view)


def write_superblock_copy(medium: RecordMedium, superblock: Superblock, copy: int) -> None:
    """Copy 0 (A) or 1 (B), durably."""
    require_writable(superblock)
    view = memoryview(mmap.mmap(-1, SUPERBLOCK_BYTES))
    view[:] = encode_superblock(superblock)
    medium.write(SUPERBLOCK_OFFSETS[copy], view, os.RWF_DSYNC)


def write_superblock(medium: RecordMedium, superblock: Superblock) -> None:
    """Both copies, of a record that has none that counts."""
    for copy in range(len(SUPERBLOCK_OFFSETS)):
        write_superblock_copy(medium, superblock, copy)


def write_pages(
    medium: RecordMedium,
    superblock: Superblock,
    bits: bitarray,
    first: int,
    stop: int,
    sequence: int = 1,
) -> None:
    """Write both slots of pages [first, stop) durably: `sequence` to slot 1, the next to slot 0.

    For places that hold nothing of this record, or all of it anew.
    """
    volume = superblock.volume_uuid.bytes
    buffer = memoryview(mmap.mmap(-1, CHUNK_BYTES))
    for start in range(first, stop, _PAGES_PER_CHUNK):
        count = min(_PAGES_PER_CHUNK, stop - start)
        for position in range(count):
            index = start + position
            content = page_bits(bits, index)
            at = 2 * position * PAGE_BYTES
            slot0 = buffer[at : at + PAGE_BYTES]
            slot1 = buffer[at + PAGE_BYTES : at + 2 * PAGE_BYTES]
            encode_page_into(slot1, volume, index, sequence, 0, content)
            encode_page_into(slot0, volume, index, sequence + 1, sequence, content)
        medium.write(page_offset(start, 0), buffer[: count * 2 * PAGE_BYTES])
    medium.sync()


def add_pages(medium: RecordMedium, superblock: Superblock, geometry: Geometry) -> None:
    """Write the pages that a larger volume needs in addition, before the superblock says so.

    They hold ones beyond the last extent, too: a size that was tried before may be in force after a
    crash, and it may be larger.  So the content is always the same, and a cut while it is written
    once more changes nothing.
    """
    first, stop = superblock.page_count, page_count(geometry.extents)
    ones = bitarray(stop * EXTENTS_PER_PAGE, endian="little")
    ones.setall(True)
    write_pages(medium, superblock, ones, first, stop)


def heal(medium: RecordMedium, loaded: Loaded) -> Loaded:
    """Rewrite both slots of every damaged page as ones, durably; what to go on with.

    Nothing may rely on `loaded` before this has returned: a sector that could not be read may be
    readable next time, and holds less than ones.
    """
    require_writable(loaded.superblock)
    if not loaded.damaged:
        return loaded
    volume = loaded.superblock.volume_uuid.bytes
    sequence = loaded.heal_sequence
    view = memoryview(mmap.mmap(-1, PAGE_BYTES))
    for index in loaded.damaged:
        content = page_bits(loaded.bits, index)
        for slot, previous in ((0, 0), (1, sequence)):
            encode_page_into(view, volume, index, sequence + slot, previous, content)
            medium.write(page_offset(index, slot), view, os.RWF_DSYNC)
    return healed(loaded, sequence)


def check_free(path: str | Path, volume: UUID, geometry: Geometry) -> None:
    """Whether a record of this volume may be made there, in the place of an older one of it."""
    _refuse_in_use(path)
    with RecordMedium.open(path) as medium:
        medium.lock()
        _refuse_small(medium, geometry)
        _refuse_overwrite(medium, volume, "use another device, or erase this one", any_state=True)


def format_record(
    path: str | Path,
    superblock: Superblock,
    ones: bool,
    force: bool = False,
    named: Iterable[tuple[int, int]] = (),
) -> None:
    """Make a new record: all extents in it (`ones`), or those of these runs.

    Refused, whatever `force` says, where the device is in use or too small.  Without `force`
    also where there is a record of another volume (ForeignRecordError), one of this volume that
    was not stopped cleanly, or anything else that is recognised (ExistsError).
    """
    _refuse_in_use(path)
    with RecordMedium.open(path) as medium:
        medium.lock()
        _refuse_small(medium, superblock.geometry)
        if not force:
            _refuse_overwrite(medium, superblock.volume_uuid, "--force overwrites it")
        bits = _filled(superblock, ones)
        for first, stop in named:
            bits[first:stop] = True
        _write_record(medium, superblock, bits, 1)


def _refuse_small(medium: RecordMedium, geometry: Geometry) -> None:
    have, need = medium.size_bytes, record_size_bytes(geometry.extents)
    if have < need:
        raise NoSpaceError(
            f"{medium.name} has {have} bytes; the record of a volume of {geometry.size_bytes} bytes"
            f" with extents of {geometry.extent_bytes} bytes needs {need}",
            hint="use a larger device, or larger extents",
        )


def _filled(superblock: Superblock, ones: bool) -> bitarray:
    bits = bitarray(superblock.geometry.extents, endian="little")
    bits.setall(ones)
    return bits


def _refuse_in_use(path: str | Path) -> None:
    user = in_use(path)
    if user is None:
        return
    try:
        found = probe(path)
    except BitmapdError:
        found = None
    owner = f", which holds the record of volume {found.name!r}," if found else ""
    raise BusyError(f"{path}{owner} is in use: {user}")


def _refuse_overwrite(
    medium: RecordMedium, volume: UUID | None, hint: str, *, any_state: bool = False
) -> None:
    """`any_state`: what a record of this volume names is not needed any more."""
    try:
        found = probe(medium)
    except (RecordDamagedError, FormatTooNewError) as error:
        raise type(error)(error.message, hint) from error
    if found is None:
        content = signature(medium.name)
        if content:
            raise ExistsError(f"{medium.name} holds something: {content}", hint)
        return
    holds = f"{medium.name} holds the record of volume {found.name!r} (uuid {found.volume_uuid})"
    if found.volume_uuid != volume:
        raise ForeignRecordError(holds, hint)
    if not found.clean and not any_state:
        raise ExistsError(
            f"{holds}, which was not stopped cleanly: it names what the secondary may lack", hint
        )


def _write_record(
    medium: RecordMedium, superblock: Superblock, bits: bitarray, sequence: int
) -> None:
    nothing = memoryview(mmap.mmap(-1, SUPERBLOCK_BYTES))
    for offset_bytes in SUPERBLOCK_OFFSETS:
        medium.write(offset_bytes, nothing, os.RWF_DSYNC)
    write_hints(medium, bytes(HINTS_BYTES))
    write_pages(medium, superblock, bits, 0, superblock.page_count, sequence)
    write_superblock(medium, superblock)
    medium.sync()


# -- check and repair ---------------------------------------------------------------------------


def check(source: Source, volume_uuid: UUID | None = None, read: Read = os.preadv) -> CheckReport:
    """What is wrong with a record; with `volume_uuid`, also whether it is that volume's.

    Raises only what keeps it from looking: no such device, no permission, no record there.
    """
    try:
        return examine(load(source, read), volume_uuid)
    except (RecordDamagedError, FormatTooNewError) as error:
        return unusable(error)


def repair(source: str | Path, output: str | Path, now_s: int) -> Loaded:
    """Write a healed copy of a record to another device, or to a file that does not exist yet.

    Damaged pages become ones; both superblocks are written anew.  Returns what was found.
    """
    target = Path(output)
    if target.exists():
        if same_medium(source, target):
            raise UsageError(
                f"{output} is the record that is to be repaired",
                hint="a record is never repaired in place: name another device or a new file",
            )
        if target.is_file():
            raise ExistsError(f"{output} exists", hint="name a new file")
        _refuse_in_use(target)
    loaded = load(source)
    require_writable(loaded.superblock)
    flags = loaded.superblock.flags
    if loaded.bits.any():
        flags &= ~RecordFlag.CLEAN
    superblock = loaded.superblock.updated(now_s, flags=flags)
    need = record_size_bytes(superblock.geometry.extents)
    created = not target.exists()
    if created:
        _create(target, need)
    try:
        with RecordMedium.open(target) as medium:
            medium.lock()
            have = medium.size_bytes
            if have < need:
                raise NoSpaceError(f"{output} has {have} bytes; the record needs {need}")
            if not created:
                _refuse_overwrite(medium, None, "name an empty device or a new file")
            _write_record(medium, superblock, loaded.bits, loaded.heal_sequence)
    except BaseException:
        if created:
            target.unlink(missing_ok=True)
        raise
    return loaded


def _create(path: Path, size_bytes: int) -> None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, size_bytes)
        except OSError:
            os.unlink(path)
            raise
        finally:
            os.close(fd)
    except FileExistsError as error:
        raise ExistsError(f"{path} exists", hint="name a new file") from error
    except OSError as error:
        raise explained(error, f"cannot make {path}") from error
