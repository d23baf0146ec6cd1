"""The two sides of a volume: are these the right media, and which of them is known to be good?

A start refuses media that are not the recorded ones.  What an administrator then does may overwrite
the last good copy, so the refusal says what the secondary holds and since when, and `dmctl create`
asks before it overwrites a side that this host has seen in sync.

1. Nothing here writes to a side, and nothing is guessed: "in sync" comes from a superblock that was
   stopped cleanly or from the note of a volume that was in sync.
2. The note, `CONFIG_DIR/state/UUID.sides`, outlives `dmctl remove`: what it protects is the medium,
   not the volume.  It goes when a new volume takes its secondary.
3. A note is never ahead of the truth: it is written after the volume was in sync.  It may lag by
   `NOTE_EVERY_S`; a crash costs that much of it.  Losing it costs a question, nothing else.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from bitmapd.config import Paths, VolumeConfig, atomic_write
from bitmapd.errors import BitmapdError, ForeignRecordError
from bitmapd.media.file_identity import same_identity
from bitmapd.media.identity import Identity, identify
from bitmapd.record.layout import InitialSync, Superblock

NOTE_EVERY_S = 600.0
CHAPTER = "'The primary was replaced' in docs/recovery.md"

Emit = Callable[..., None]


def is_other(found: Identity, recorded: str) -> bool:
    """Whether a medium is not the recorded one; one without a lasting identity may be any."""
    return found.stable and not same_identity(found.text, recorded)


def _at(unix_time_s: float) -> str:
    return datetime.fromtimestamp(unix_time_s, UTC).isoformat(timespec="seconds")


# -- what a start checks ------------------------------------------------------------------------


def check_primary(
    config: VolumeConfig, paths: Paths, superblock: Superblock, recorded_extents: int
) -> None:
    """ForeignRecordError unless the primary is the recorded one; BitmapdError if it has shrunk."""
    found = identify(config.primary)
    if same_identity(found.text, superblock.secondary) and not same_identity(
        found.text, superblock.primary
    ):
        raise _changed_places(config, paths, superblock)
    if is_other(found, superblock.primary):
        holds = secondary_holds(config, paths, superblock, recorded_extents)
        raise ForeignRecordError(
            f"primary {config.primary} is {found.text}, the record was made for"
            f" {superblock.primary}; {holds}",
            hint="give the volume its own primary back; if it was replaced, what the secondary"
            f" holds has to be copied onto it before anything else, see {CHAPTER}",
        )
    if (found.size_bytes or 0) < superblock.geometry.size_bytes:
        raise BitmapdError(
            f"primary {config.primary} has {found.size_bytes} bytes, the volume has"
            f" {superblock.geometry.size_bytes}: it has shrunk",
            hint="a volume cannot shrink; give the primary its size back",
        )


def _changed_places(
    config: VolumeConfig, paths: Paths, superblock: Superblock
) -> ForeignRecordError:
    try:
        swapped = same_identity(identify(config.secondary).text, superblock.primary)
    except BitmapdError:  # away
        swapped = False
    if swapped:
        message = (
            f"primary {config.primary} and secondary {config.secondary} have changed places:"
            " the record knows each as the other"
        )
        hint = f"exchange 'primary' and 'secondary' in {paths.volume_file(config.name)}"
    else:
        message = (
            f"primary {config.primary} is {superblock.secondary}, which the record knows as the"
            " volume's secondary"
        )
        hint = f"name the right devices in {paths.volume_file(config.name)}"
    return ForeignRecordError(
        message, hint=f"{hint}; names in /dev/disk/by-id do not change; nothing was written"
    )


def secondary_mismatch(config: VolumeConfig, superblock: Superblock, size_bytes: int) -> str | None:
    """Why the medium that now answers as secondary is not the volume's, if so."""
    if size_bytes < superblock.geometry.size_bytes:
        return (
            f"secondary {config.secondary} has {size_bytes} bytes, the volume has"
            f" {superblock.geometry.size_bytes}"
        )
    try:
        found = identify(config.secondary)
    except BitmapdError as error:  # it went away between being opened and being looked at
        return error.message
    if same_identity(found.text, superblock.primary) and not same_identity(
        found.text, superblock.secondary
    ):
        return (
            f"secondary {config.secondary} is {found.text}, which the record knows as the volume's"
            " primary"
        )
    if is_other(found, superblock.secondary):
        return (
            f"secondary {config.secondary} is {found.text}, the record was made for"
            f" {superblock.secondary}"
        )
    return None


def secondary_holds(
    config: VolumeConfig, paths: Paths, superblock: Superblock, recorded_extents: int
) -> str:
    """What the secondary is worth without the primary that belongs to it."""
    known = read_note(paths.sides_file(config.uuid))
    if superblock.clean and superblock.session > 0:
        return f"secondary {config.secondary} was in sync with it at {_at(superblock.updated_s)}"
    lacks = f"may lack what {recorded_extents} extents were given since"
    if known is not None and known.in_sync_s is not None:
        at = _at(known.in_sync_s)
        return f"secondary {config.secondary} was in sync with it at {at} and {lacks}"
    if superblock.initial_sync is not InitialSync.NONE:
        return f"this host never saw secondary {config.secondary} in sync with it"
    return f"secondary {config.secondary} is a copy of it that {lacks}"


# -- what this host knows -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Note:
    """Two media that held the same; identities as `identify` gives them, names for people."""

    volume: str
    primary: str
    primary_name: str
    secondary: str
    secondary_name: str
    in_sync_s: int | None  # None: but for what the record names
    lately: tuple[int, ...] = ()  # blocks that were copied last, to be compared at the next start

    def sentence(self) -> str:
        since = (
            "is, but for what the record names, a copy of"
            if self.in_sync_s is None
            else f"was, at {_at(self.in_sync_s)}, in sync with"
        )
        return f"{self.secondary_name} {since} {self.primary_name}, volume '{self.volume}'"


_TEXTS = ("volume", "primary", "primary_name", "secondary", "secondary_name")


def read_note(file: Path) -> Note | None:
    """None if there is none, or what is there says nothing."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        texts = {key: str(table[key]) for key in _TEXTS}
        lately = tuple(int(block) for block in table.get("lately", ()))
        return Note(**texts, in_sync_s=int(table["in_sync_s"]), lately=lately)
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None


def _of_record(superblock: Superblock) -> Note | None:
    """What a record says of its two sides, on a host that has no note; None before a first copy."""
    if superblock.session == 0 or superblock.initial_sync is not InitialSync.NONE:
        return None
    return Note(
        superblock.name,
        superblock.primary,
        superblock.primary,
        superblock.secondary,
        superblock.secondary,
        superblock.updated_s if superblock.clean else None,
    )


def _notes(paths: Paths) -> dict[Path, Note]:
    """Of all volumes that were ever in sync on this host, the removed ones included."""
    files = sorted(paths.state_dir.glob("*.sides"))
    return {file: note for file in files if (note := read_note(file)) is not None}


def good_copies(paths: Paths, record: Superblock | None, primary: str, secondary: str) -> list[str]:
    """Sentences about the copies that a new volume of these two sides (identities) overwrites.

    A side that was in sync with the other one is none: it is a copy of what it is to become.
    `record` is what the new record overwrites.
    """
    known = _notes(paths)
    if record is not None and (note := _of_record(record)) is not None:
        known.setdefault(paths.sides_file(record.volume_uuid), note)
    return [
        note.sentence()
        for note in known.values()
        for side, other in ((note.secondary, note.primary), (note.primary, note.secondary))
        if same_identity(secondary, side) and not same_identity(primary, other)
    ]


def forget_copies(paths: Paths, secondary: str) -> None:
    """A new volume overwrites this medium: what is known of it is not true any more."""
    for file, note in _notes(paths).items():
        if same_identity(secondary, note.secondary):
            file.unlink(missing_ok=True)


class NoteKeeper:
    """Writes the note of one volume, off the loop."""

    def __init__(
        self,
        config: VolumeConfig,
        paths: Paths,
        superblock: Callable[[], Superblock],
        lately: Callable[[], Sequence[int]],
        loop: asyncio.AbstractEventLoop,
        emit: Emit,
    ) -> None:
        self._config = config
        self._file = paths.sides_file(config.uuid)
        self._superblock = superblock
        self._lately = lately
        before = read_note(self._file)
        self.lately_before = before.lately if before is not None else ()
        self._loop = loop
        self._emit = emit
        self._due_s = float("-inf")
        self._turn = asyncio.Lock()
        self._saving: asyncio.Task[None] | None = None

    def in_sync(self) -> None:
        """The volume is in sync at this moment; called as often as one likes."""
        if self._loop.time() >= self._due_s:
            self._due_s = self._loop.time() + NOTE_EVERY_S
            self._saving = self._loop.create_task(self.save())

    async def end(self) -> None:
        """Returns when nothing is being written any more."""
        if self._saving is not None:
            await self._saving

    async def save(self) -> None:
        """Returns when it is durable; a failure is told, no more."""
        config, superblock = self._config, self._superblock()
        note = Note(
            config.name,
            superblock.primary,
            config.primary,
            superblock.secondary,
            config.secondary,
            int(time.time()),
            tuple(self._lately()),
        )
        data = json.dumps(asdict(note)).encode() + b"\n"
        async with self._turn:
            try:
                await self._loop.run_in_executor(None, atomic_write, self._file, data)
            except OSError as error:
                self._emit(
                    "sides-not-noted",
                    file=str(self._file),
                    message=f"cannot be written: {error.strerror or error}",
                )
