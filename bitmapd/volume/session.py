"""One session of a record: from the lock on its device to the superblock that ends it.

A session is the time in which one process serves the volume.  Its number stands in the superblock
and, one step later, in `CONFIG_DIR/state/UUID.json` on the host.  A record whose session is older
than the host's file is one that was restored from a copy: what was written since is not in it.

Order: lock; load; every check; heal damaged pages; superblock with the new session and without
the clean flag; state file.  A crash before the superblock leaves the old session; between the two
the superblock is ahead of the state file, which is right.  The state file is never ahead.

At an orderly end, when hosts can write no more, the state file also gets a fingerprint of the
primary (`seal`).  The next session compares it: a primary that was written meanwhile, past the
record, is refused.  `distrust` is the way on: everything is recorded, and will be compared.  After
a crash there is no fingerprint, and nothing to compare: nobody can know what was written then.

At a clean end a secondary of this machine gets one, too.  One that was written meanwhile is no
reason to refuse the hosts; it is not written before somebody has said so (`guard`).

Each superblock has a number, and the file has that of the last one that this host wrote.  So a
copy of the record is also told from the newest by an update within one session, as the one that
marks it clean.

One node's record of a pair has no fingerprints: the partner goes on to write both media.

A record that fails cannot say so itself, and may be well again at the next start.  Where a
keeper's copy counts in its place the file says so first (`record_lacks`), until a superblock is
durable.  The next session sets the flag VOLATILE, also where the file is gone that might have said
it.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar
from uuid import UUID

from bitmapd.config import Paths, VolumeConfig, atomic_write, is_keeper
from bitmapd.errors import (
    BitmapdError,
    BusyError,
    ForeignRecordError,
    FormatTooNewError,
    PermissionError_,
    UsageError,
)
from bitmapd.media.fingerprint import fingerprint
from bitmapd.net.uri import is_receiver, is_remote
from bitmapd.record import tool
from bitmapd.record.geometry import Geometry
from bitmapd.record.hints import Hints, decode_hints, encode_hints
from bitmapd.record.layout import (
    InitialSync,
    PairFlag,
    PairState,
    RecordFlag,
    Superblock,
    all_ones,
    page_count,
)
from bitmapd.record.updates import SuperblockUpdates
from bitmapd.volume.sides import CHAPTER, check_primary, secondary_holds, secondary_mismatch

Emit = Callable[..., None]
T = TypeVar("T")
LACKS = "record_lacks"


class RecordSession:
    """Blocking I/O throughout: a few milliseconds for each superblock, less than a second to load
    the record of 16 TiB, and as long as it likes where a device answers late.  So a volume has one
    thread do all of it (`Aside`), which also keeps updates in order; `emit` is called on it."""

    def __init__(
        self, config: VolumeConfig, paths: Paths, emit: Emit, *, node: int | None = None
    ) -> None:
        """`node`: the one of a pair that the configuration says this is; None: of none."""
        self._config = config
        self._node = node
        self._emit = emit
        self._paths = paths
        self._state_file = paths.state_file(config.uuid)
        self._begun = False
        self._lacks = False  # something, as far as the record is concerned, which cannot say so
        self.primary_is_as_left = False  # since a stop; nobody knows after a crash
        self.both_left_equal = False  # by a clean stop, as far as this host knows
        self.secondary_was_written = False  # since then
        self._medium = self._usable(lambda: tool.RecordMedium.open(config.record))
        try:
            self._medium.lock()
            self.loaded = self._usable(lambda: tool.load(self._medium))
            self._updates = SuperblockUpdates(self._medium, self.loaded)
            self._check(self.superblock)
        except BaseException:
            self._medium.close()
            raise

    def _usable(self, result: Callable[[], T]) -> T:
        """Whatever the record's device does not give is lost to a single appliance.  The partner of
        a pair has it, but this node does not start without a record of its own: the record's lock
        is the proof that the process before it writes no more, and its superblock says what this
        node knows of the pair's history."""
        try:
            return result()
        except (BusyError, FormatTooNewError, PermissionError_, UsageError):
            raise
        except BitmapdError as error:
            raise type(error)(error.message, self._way_on or error.hint) from error

    @property
    def _way_on(self) -> str | None:
        """What to do where the record of a node of a pair cannot be used; None for a single one."""
        config = self._config
        if self._node is None:
            return None
        if is_keeper(config):
            return f"give the keeper a new one: 'dmctl remove {config.name}', then create it again"
        return (
            f"let the partner run, and give this node a new one: 'dmctl record replace"
            f" {config.name} DEVICE'; the partner says what differs"
        )

    @property
    def superblock(self) -> Superblock:
        return self._updates.superblock

    @property
    def pair(self) -> PairState | None:
        """What the record durably says about the pair; None for a volume of one node."""
        return self.superblock.pair

    def _check(self, superblock: Superblock) -> None:
        config = self._config
        if superblock.volume_uuid != config.uuid:
            raise ForeignRecordError(
                f"record {config.record} belongs to volume '{superblock.name}'"
                f" (uuid {superblock.volume_uuid})",
                hint=f"check 'record' in the configuration of '{config.name}'",
            )
        self._check_pair(superblock)
        self._check_points(superblock)
        if not is_keeper(config):
            check_primary(config, self._paths, superblock, self.loaded.bits.count())
        state = self._known_state()
        self._may_lack = state.get(LACKS, not state)
        known = int(state.get("session", 0))
        hint = self._way_on or (
            f"put the newest record back; if primary {config.primary} has the newest data:"
            f" 'dmctl remove {config.name}', then 'dmctl create {config.name} … --force"
            " --initial-sync checksum' copies what differs over the secondary"
        )
        if superblock.session < known:
            raise ForeignRecordError(
                f"record {config.record} is of session {superblock.session}, but this host has"
                f" seen session {known}: it was restored from an older copy and does not name"
                " what was written since",
                hint=hint,
            )
        if superblock.session == known and superblock.sequence < int(state.get("superblock", 0)):
            raise ForeignRecordError(
                f"record {config.record} has superblock {superblock.sequence} of session {known},"
                f" but this host has written superblock {state['superblock']} of it: it was"
                " restored from an older copy and does not name what was written since",
                hint=hint,
            )
        if superblock.pair is None:  # else the partner may have written the media meanwhile
            self._check_at_rest(superblock, state)

    def _check_pair(self, superblock: Superblock) -> None:
        """Whether record and configuration agree on what this node is."""
        pair, node = superblock.pair, self._node
        if node == (pair.node if pair else None):
            return
        config = self._config
        of = f"is node {pair.node}'s of a pair" if pair else "is of a volume without a partner"
        says = f"says that this is node {node}" if node else "names no partner"
        raise ForeignRecordError(
            f"record {config.record} {of}, but the configuration of '{config.name}' {says}",
            hint=f"make 'node' and 'partner' in {self._paths.volume_file(config.name)} what they"
            " were when the record was made; a record of the other node is not this one's",
        )

    def _check_points(self, superblock: Superblock) -> None:
        """Whether record and configuration agree on what the secondary is."""
        config = self._config
        if (superblock.points is not None) is is_receiver(config.secondary):
            return
        of, says = ("", "a plain secondary") if superblock.points else ("out", "a receiver")
        raise ForeignRecordError(
            f"record {config.record} is of a volume with{of} a receiver, but the configuration of"
            f" '{config.name}' names {says}",
            hint="a plain secondary and a receiver cannot take one another's place: create the"
            " volume anew",
        )

    def _check_at_rest(self, superblock: Superblock, state: dict[str, Any]) -> None:
        """Whether the primary is as the last session left it."""
        config, sealed = self._config, state.get("fingerprint")
        if sealed is None or state.get("session") != superblock.session:
            if superblock.clean and superblock.session > 0:
                self._unsealed(
                    "was not remembered by this host when the volume stopped: nobody can tell"
                    " whether it was written since"
                )
            return
        try:
            found = self._fingerprint(superblock)
        except OSError as error:
            self._unsealed(f"cannot be compared with what it was when the volume stopped: {error}")
            return
        if found != sealed:
            holds = secondary_holds(config, self._paths, superblock, self.loaded.bits.count())
            raise ForeignRecordError(
                f"primary {config.primary} was written while volume '{config.name}' was stopped:"
                " the secondary lacks what was written, and the record does not name it; as it was"
                f" before, {holds}",
                hint=f"if what was written is to stay, 'dmctl start {config.name} --resync-all'"
                " compares everything and copies what differs over the secondary; if it was a"
                f" mistake, see {CHAPTER}",
            )
        self.primary_is_as_left = True
        self.both_left_equal = superblock.clean
        sealed = state.get("secondary_fingerprint")
        if superblock.clean and sealed is not None:
            with suppress(OSError):  # away: some of its blocks are compared when it comes
                found = self._fingerprint(superblock, config.secondary)
                self.secondary_was_written = found != sealed

    def _fingerprint(self, superblock: Superblock, path: str | None = None) -> str:
        """Of the primary, unless another path is given."""
        size_bytes = superblock.geometry.size_bytes
        return fingerprint(path or self._config.primary, size_bytes, self._config.uuid.bytes)

    def _unsealed(self, why: str) -> None:
        self._emit("not-sealed", device=self._config.primary, message=f"the primary {why}")

    def secondary_mismatch(self, size_bytes: int) -> str | None:
        """Why the medium that now answers as secondary is not the volume's, if so."""
        return secondary_mismatch(self._config, self.superblock, size_bytes)

    def begin(self) -> None:
        """Heal, and enter the new session."""
        loaded = self.loaded
        damaged = [loaded.pages[index].message for index in loaded.damaged]
        for message in (*loaded.warnings, *damaged):
            self._emit("record-damaged", device=self._config.record, message=message)
        self.loaded = tool.heal(self._medium, self.loaded)
        pair = self.pair
        if pair is not None and PairFlag.KEPT in pair.flags and self._may_lack:
            pair = dataclasses.replace(pair, flags=pair.flags | PairFlag.VOLATILE)
        self.update(
            session=self.superblock.session + 1,
            flags=self.superblock.flags & ~RecordFlag.CLEAN,
            pair=pair,
        )
        self._begun = True
        self._write_state()

    def update(self, **changes: Any) -> None:
        """Write a superblock with these changes; durable on return."""
        self._updates.update(int(time.time()), **changes)
        if self._begun:
            self._remember()

    def _remember(self) -> None:
        try:
            self._write_state()
        except OSError as error:
            # It names an older superblock then: an old copy may pass for the newest.
            self._state_unusable(f"cannot be written: {error.strerror or error}")

    def store_pair(
        self,
        volume: UUID,
        *,
        never_paired: bool,
        term: int,
        generations: tuple[UUID, ...],
        volatile: bool = False,
        alone: bool = False,
        gone_on: bool = False,
        kept: bool = False,
        **changes: Any,
    ) -> None:
        """What pairing has come to, in one update, durable on return.  `volume` is the pair's;
        `changes` are of the other fields of `PairState`, such as the partner's `machine`.

        That the record of a keeper's host lacks something is durable elsewhere if the superblock
        cannot be written."""
        pair = self.pair
        if pair is None:
            raise UsageError(f"the record of '{self._config.name}' is of no pair")
        flags = PairFlag(0)
        for flag, is_set in (
            (PairFlag.VOLATILE, volatile),
            (PairFlag.ALONE, alone),
            (PairFlag.GONE_ON, gone_on),
            (PairFlag.NEVER_PAIRED, never_paired),
            (PairFlag.KEPT, kept),
        ):
            if is_set:
                flags |= flag
        new = dataclasses.replace(pair, volume=volume, flags=flags, term=term, **changes)
        try:
            self.update(pair=new, generations=generations)
        except BitmapdError:
            lacks = dataclasses.replace(pair, flags=pair.flags | PairFlag.VOLATILE)
            same = new == lacks and generations == self.superblock.generations
            if not (same and PairFlag.KEPT in new.flags):
                raise
            self._lacks = True
            self._write_state()
        else:
            if self._lacks:
                self._lacks = False
                self._remember()

    def convert(self, pair: PairState | None) -> None:
        """Of a volume that is not served: one of a pair's from now on, or of a single appliance."""
        found = self.superblock.with_pair(pair)
        self.update(pair=found.pair, incompatible=found.incompatible)
        self._begun = True
        self._write_state()
        self.seal()

    def prepare_growth(self, geometry: Geometry) -> None:
        """Write the pages that a larger volume needs in addition, as ones; not in force yet."""
        tool.add_pages(self._medium, self.superblock, geometry)

    def read_hints(self) -> Hints | None:
        """Inflating the map of a large volume takes longer than a host's write should wait."""
        return decode_hints(tool.read_hints(self._medium), self.superblock.geometry.extents)

    def write_hints(self, hints: Hints) -> None:
        """Deflating it takes longer still."""
        tool.write_hints(self._medium, encode_hints(hints))

    def finish(self) -> None:
        """The record is empty and both media are flushed: mark it clean."""
        self.update(flags=self.superblock.flags | RecordFlag.CLEAN)

    def close(self) -> None:
        self._medium.close()

    def seal(self) -> None:
        """Remember what the primary looks like; no host can write any more.  Nothing is done for a
        session that has not begun, nor for a pair, whose other node may go on to write."""
        if not self._begun or self.pair is not None:
            return
        try:
            seals: dict[str, object] = {"fingerprint": self._fingerprint(self.superblock)}
            if self.superblock.clean and not is_remote(self._config.secondary):
                seals["secondary_fingerprint"] = self._fingerprint(
                    self.superblock, self._config.secondary
                )
            self._write_state(**seals)
        except OSError as error:
            self._unsealed(f"cannot be remembered: writes past the volume go unnoticed: {error}")

    def _known_state(self) -> dict[str, Any]:
        try:
            state = json.loads(self._state_file.read_text(encoding="utf-8"))
            return {**state, "session": int(state["session"])}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
            # Without the file an old record cannot be told from the newest; say so and go on, as
            # on a host that serves the volume for the first time.
            self._state_unusable(f"cannot be used: {error}")
            return {}

    def _state_unusable(self, message: str) -> None:
        self._emit("state-unreadable", file=str(self._state_file), message=message)

    def _write_state(self, **more: object) -> None:
        superblock = self.superblock
        state = {
            "name": self._config.name,
            "session": superblock.session,
            "superblock": superblock.sequence,
            **({LACKS: True} if self._lacks else {}),
            **more,
        }
        atomic_write(self._state_file, json.dumps(state).encode() + b"\n")


def distrust(config: VolumeConfig, paths: Paths) -> None:
    """Of a stopped volume: have the next session compare everything, and copy what differs.

    First the pages, then the superblock, last the fingerprint goes: after a crash in between the
    next start is refused as it was before.
    """
    with tool.RecordMedium.open(config.record) as medium:
        medium.lock()
        loaded = tool.load(medium)
        superblock = loaded.superblock
        if superblock.volume_uuid != config.uuid:
            raise ForeignRecordError(
                f"record {config.record} belongs to volume '{superblock.name}'"
                f" (uuid {superblock.volume_uuid})"
            )
        check_primary(config, paths, superblock, loaded.bits.count())
        extents = superblock.geometry.extents
        ones = all_ones(superblock.geometry)
        tool.write_pages(
            medium, superblock, ones, 0, page_count(extents), sequence=loaded.heal_sequence
        )
        full = superblock.initial_sync is InitialSync.FULL  # which copies more than is compared
        SuperblockUpdates(medium, loaded).update(
            int(time.time()),
            initial_sync=InitialSync.FULL if full else InitialSync.CHECKSUM,
            flags=superblock.flags & ~RecordFlag.CLEAN,
        )
        state_file = paths.state_file(config.uuid)
        if state_file.exists():
            state = {"name": config.name, "session": superblock.session}
            atomic_write(state_file, json.dumps(state).encode() + b"\n")
