"""What a record says, for people and programs (pure).

`dump` leaves nothing out; `examine` says what is wrong.  A trace that a crash leaves behind (a torn
page, superblock copies one update apart) is a note: the record is sound.  Damage means that more
than necessary is copied, or that the next damage would go unmended; `dmctl record repair` ends it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from bitmapd.errors import ForeignRecordError, FormatTooNewError, RecordDamagedError
from bitmapd.record.extents import runs_of
from bitmapd.record.layout import Loaded, RecordFlag, Superblock


def dump(loaded: Loaded) -> dict[str, Any]:
    """Everything in a record, ready for JSON; `runs` are pairs of first extent and count."""
    superblock = loaded.superblock
    geometry = superblock.geometry
    runs = [(first, stop - first) for first, stop in runs_of(loaded.bits)]
    return {
        "superblock": {
            "format_version": superblock.version,
            "volume_uuid": str(superblock.volume_uuid),
            "name": superblock.name,
            "sequence": superblock.sequence,
            "session": superblock.session,
            "clean": superblock.clean,
            "sync_skipped": bool(superblock.flags & RecordFlag.SYNC_SKIPPED),
            "initial_sync": superblock.initial_sync.name.lower(),
            "generations": [str(value) for value in superblock.generations],
            "size_bytes": geometry.size_bytes,
            "extent_size_bytes": geometry.extent_bytes,
            "block_size_bytes": geometry.block_bytes,
            "primary": superblock.primary,
            "primary_size_bytes": superblock.primary_size_bytes,
            "secondary": superblock.secondary,
            "secondary_size_bytes": superblock.secondary_size_bytes,
            "created": _iso(superblock.created_s),
            "updated": _iso(superblock.updated_s),
            "features": {
                "incompatible": superblock.incompatible,
                "compatible_read_only": superblock.compatible_read_only,
                "compatible": superblock.compatible,
            },
            "pair": None if superblock.pair is None else superblock.pair.to_json(),
            "points": None if superblock.points is None else superblock.points.to_json(),
        },
        "extents": {
            "total": geometry.extents,
            "recorded": loaded.bits.count(),
            "recorded_bytes": sum(
                geometry.extents_bytes(first, first + count) for first, count in runs
            ),
            "runs": [list(run) for run in runs],
        },
        "pages": [
            {
                "index": index,
                "verdict": page.verdict.value,
                "newest_slot": None if page.damaged else page.newest_slot,
                "sequence": None if page.damaged else page.sequence,
                "highest_sequence": page.highest,
                "message": page.message or None,
            }
            for index, page in enumerate(loaded.pages)
        ],
        "warnings": list(loaded.warnings),
        "notes": list(loaded.notes),
    }


def _iso(unix_s: int) -> str | None:
    try:
        return datetime.fromtimestamp(unix_s, UTC).isoformat().replace("+00:00", "Z")
    except (OverflowError, ValueError, OSError):  # beyond what a calendar date can say
        return None


class Severity(enum.Enum):
    NOTE = "note"  # what a crash leaves behind; nothing to do
    DAMAGE = "damage"  # the record is usable, but more is copied or nothing more may go wrong
    FATAL = "fatal"  # the record cannot be used


@dataclass(frozen=True, slots=True)
class Finding:
    severity: Severity
    message: str


@dataclass(frozen=True, slots=True)
class CheckReport:
    """`exit_status` as in bitmapd.errors: 0, 20 damaged, 21 too new, 22 of another volume."""

    superblock: Superblock | None
    findings: tuple[Finding, ...]
    exit_status: int

    def to_json(self) -> dict[str, Any]:
        return {
            "volume": self.superblock.name if self.superblock else None,
            "volume_uuid": str(self.superblock.volume_uuid) if self.superblock else None,
            "exit_status": self.exit_status,
            "findings": [
                {"severity": finding.severity.value, "message": finding.message}
                for finding in self.findings
            ],
        }


def unusable(error: RecordDamagedError | FormatTooNewError) -> CheckReport:
    """The report on a record that could not be loaded."""
    return CheckReport(None, (Finding(Severity.FATAL, error.message),), error.exit_status)


def examine(loaded: Loaded, volume_uuid: UUID | None = None) -> CheckReport:
    """What is wrong; with `volume_uuid`, also whether the record is that volume's."""
    superblock = loaded.superblock
    findings = [Finding(Severity.DAMAGE, warning) for warning in loaded.warnings]
    findings += [Finding(Severity.NOTE, note) for note in loaded.notes]
    findings += [
        Finding(Severity.DAMAGE if page.damaged else Severity.NOTE, page.message)
        for page in loaded.pages
        if page.message
    ]
    if superblock.clean and loaded.bits.any() and not loaded.damaged:
        findings.append(
            Finding(Severity.NOTE, "the record is marked clean, yet it names extents to copy")
        )
    status = 0
    if any(finding.severity is Severity.DAMAGE for finding in findings):
        status = RecordDamagedError.exit_status
    if volume_uuid is not None and superblock.volume_uuid != volume_uuid:
        findings.append(
            Finding(
                Severity.FATAL,
                f"the record belongs to volume {superblock.name!r} (uuid"
                f" {superblock.volume_uuid}), not to the volume with uuid {volume_uuid}",
            )
        )
        status = ForeignRecordError.exit_status
    return CheckReport(superblock, tuple(findings), status)
