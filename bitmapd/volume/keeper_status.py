"""What a keeper says of itself: its status, as far as it is that of a volume."""

from __future__ import annotations

from typing import Any

from bitmapd.config import VolumeConfig
from bitmapd.record.geometry import Geometry
from bitmapd.record.store import RecordStore
from bitmapd.volume.status import recorded_bytes

# What only a node that serves hosts has.
_NUMBERS = (
    "dirty_bytes", "lag_seconds", "content_age_seconds", "record_limit_bytes", "writes_total",
    "hits_total", "misses_total", "copied_bytes_total", "era", "resync", "last_recovery", "points",
    "receiver",
)  # fmt: skip


def described(
    config: VolumeConfig,
    geometry: Geometry,
    state: str,
    store: RecordStore,
    partner: dict[str, Any],
    session: int,
    last_error: dict[str, str] | None,
) -> dict[str, Any]:
    """The keys of a volume's status; those of hosts, primary and secondary are null or empty."""
    return {
        "name": config.name,
        "uuid": str(config.uuid),
        "attach": "none",
        "state": state,
        "device": "",
        "primary": "",
        "secondary": "",
        "record": config.record,
        "size_bytes": geometry.size_bytes,
        "extent_size_bytes": geometry.extent_bytes,
        "block_size_bytes": geometry.block_bytes,
        **dict.fromkeys(_NUMBERS),
        "record_bytes": recorded_bytes(store, geometry),
        "record_extents": store.recorded_extents,
        "record_updates_total": store.updates,
        "record_clears_total": store.clears,
        "record_errors_total": store.errors,
        "record_wait_seconds": round(store.write_age_s, 3),
        "paused": False,
        "connections": 0,
        "session": session,
        "last_error": last_error,
        "partner": partner,
    }
