"""What a receiver says of itself: its status, as far as it is that of a volume, and its points."""

from __future__ import annotations

from typing import Any

from bitmapd.config import ReceiverConfig
from bitmapd.control.events import iso_time
from bitmapd.receiver.commit import CommitPage
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


def points(page: CommitPage, payload_bytes: dict[int, int]) -> list[dict[str, Any]]:
    """Those that can be produced, oldest first: number, time of the cut, what the journal has of
    it, and whether it is in the image (`applied`) or waits for that (`committed`)."""
    found: list[dict[str, Any]] = []
    if page.applied and not page.inconsistent_until:
        newest = page.applied == page.committed and page.committed_ns
        at = iso_time(page.committed_ns / 1e9) if newest else None
        found.append({"point": page.applied, "at": at, "bytes": None, "state": "applied"})
    found += [
        {
            "point": queued.point,
            "at": iso_time(queued.wall_ns / 1e9),
            "bytes": payload_bytes.get(queued.point),
            "state": "committed",
        }
        for queued in page.queue
    ]
    return found
