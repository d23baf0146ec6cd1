"""What a receiver says of itself: its status, as far as it is that of a volume, and its points."""

from __future__ import annotations

from typing import Any

from bitmapd.config import ReceiverConfig
from bitmapd.control.events import iso_time
from bitmapd.receiver.commit import CommitPage
from bitmapd.receiver.directory import Directory
from bitmapd.receiver.superblock import JournalSuperblock

_NUMBERS = (
    "dirty_bytes", "lag_seconds", "content_age_seconds", "record_bytes", "record_extents",
    "record_limit_bytes", "writes_total", "hits_total", "misses_total", "record_updates_total",
    "record_clears_total", "copied_bytes_total", "era", "resync", "last_recovery", "paused",
    "partner", "points",
)  # fmt: skip


def described(
    config: ReceiverConfig,
    state: str,
    superblock: JournalSuperblock | None,
    figures: dict[str, Any] | None,
    last_error: dict[str, str] | None,
) -> dict[str, Any]:
    """The keys of a volume's status, those that only a volume has being null, and `receiver`."""
    line = superblock.line if superblock is not None else None
    return {
        "name": config.name,
        "uuid": "" if line is None else str(line.volume),
        "attach": "none",
        "state": state,
        "device": config.listen,
        "primary": "",
        "secondary": config.image,
        "record": config.journal,
        "size_bytes": None if line is None else line.geometry.size_bytes,
        "extent_size_bytes": 0 if line is None else line.geometry.extent_bytes,
        "block_size_bytes": 0 if line is None else line.geometry.block_bytes,
        **dict.fromkeys(_NUMBERS),
        "last_error": last_error,
        "receiver": figures,
    }


def points(
    page: CommitPage, directory: Directory, payload_bytes: dict[int, int]
) -> list[dict[str, Any]]:
    """Those that can be had, oldest first: number, time of the cut, label, whether it stays when
    newer ones come, and bytes by state.  `kept`: the volume's size at that point, of which there is
    a copy; `applied`: it is in the image; `committed`: what the journal has of it."""
    kept = {one.point: one for one in directory.kept}
    labels = {one.point: one.label for one in directory.points}
    found: dict[int, dict[str, Any]] = {}

    def add(point: int, wall_ns: int | None, size_bytes: int | None, state: str) -> None:
        found[point] = {
            "point": point,
            "at": iso_time(wall_ns / 1e9) if wall_ns else None,
            "bytes": size_bytes,
            "state": state,
            "label": labels.get(point, ""),
            "kept": point in kept,
        }

    for point, one in kept.items():
        add(point, one.wall_ns, one.size_bytes, "kept")
    if page.applied and not page.inconsistent_until:
        wall_ns = page.committed_ns if page.applied == page.committed else None
        if page.applied in kept:
            wall_ns = kept[page.applied].wall_ns
        add(page.applied, wall_ns, None, "applied")
    for queued in page.queue:
        add(queued.point, queued.wall_ns, payload_bytes.get(queued.point), "committed")
    return [found[point] for point in sorted(found)]
