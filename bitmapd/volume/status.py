"""What a volume says of itself: its state, and the figures of `dmctl status --json`."""

from __future__ import annotations

from typing import Any

from bitmapd.config import VolumeConfig, device_of
from bitmapd.copier.engine import CopyState
from bitmapd.copier.transfers import Trouble
from bitmapd.gate.gate import Gate
from bitmapd.record.geometry import Geometry
from bitmapd.record.holder import Record
from bitmapd.record.store import RecordStore
from bitmapd.volume.mirror import Mirror

# How long an error of the primary is the volume's state.  Longer than hosts take between attempts,
# as ext4 with its 5 s and the kernel with its 30 s of write-back.
PRIMARY_ERROR_S = 60.0


def state_of(store: RecordStore, gate: Gate, copier: Mirror, *, in_sync: bool) -> str:
    """The most pressing of what is true of the volume; the names are those of `control.states`."""
    if store.failing or store.slow:
        return "degraded"
    troubles = copier.transfers.troubles
    if Trouble.UNREADABLE in troubles or primary_is_failing(gate, copier):
        return "primary-failing"
    if copier.state is CopyState.LINK_DOWN:
        return "link-down"
    if copier.state is CopyState.PAUSED:
        return "paused"
    if Trouble.NO_ROOM in troubles:
        return "no-space"
    if Trouble.REFUSED in troubles:
        return "secondary-failing"
    if copier.passes.under_way:
        return "resyncing"
    return "in-sync" if in_sync else "copying"


def primary_is_failing(gate: Gate, copier: Mirror) -> bool:
    """Whether it has refused something lately: hosts that go on asking keep the state."""
    return copier.now_s - max(gate.primary_failed_s, copier.primary_failed_s) < PRIMARY_ERROR_S


def recorded_bytes(store: Record, geometry: Geometry) -> int:
    return min(store.recorded_extents * geometry.extent_bytes, geometry.size_bytes)


def describe(
    config: VolumeConfig,
    geometry: Geometry,
    store: RecordStore,
    gate: Gate,
    copier: Mirror,
    *,
    in_sync: bool,
) -> dict[str, Any]:
    """All of a volume's status that follows from its configuration and its parts."""
    oldest_s, content_s = gate.oldest_dirty_s(), copier.oldest_content_s
    return {
        "name": config.name,
        "uuid": str(config.uuid),
        "attach": config.attach,
        "state": state_of(store, gate, copier, in_sync=in_sync),
        "device": device_of(config),
        "primary": config.primary,
        "secondary": config.secondary,
        "record": config.record,
        "size_bytes": geometry.size_bytes,
        "extent_size_bytes": geometry.extent_bytes,
        "block_size_bytes": geometry.block_bytes,
        "dirty_bytes": min(gate.dirty_blocks() * geometry.block_bytes, geometry.size_bytes),
        "suspect_bytes": min(gate.suspect_blocks * geometry.block_bytes, geometry.size_bytes),
        "lag_seconds": 0.0 if oldest_s is None else round(copier.now_s - oldest_s, 3),
        "content_age_seconds": 0.0 if content_s is None else round(copier.now_s - content_s, 3),
        "record_bytes": recorded_bytes(store, geometry),
        "record_extents": store.recorded_extents,
        "record_limit_bytes": gate.limit_extents * geometry.extent_bytes,
        "writes_total": gate.writes,
        "hits_total": gate.hits,
        "misses_total": gate.misses,
        "record_updates_total": store.updates,
        "record_clears_total": store.clears,
        "copied_bytes_total": copier.copied_bytes,
        "era": gate.era,
        "resync": _resync(copier),
        "written_bytes_total": gate.written_bytes,
        "sent_bytes_total": copier.transfers.sent_bytes,
        "zero_bytes_total": copier.transfers.zero_bytes,
        "record_errors_total": store.errors,
        "record_wait_seconds": round(store.write_age_s, 3),
        "read_errors_total": copier.read_errors,
        "paused": copier.state is CopyState.PAUSED,
    }


def _resync(copier: Mirror) -> dict[str, Any] | None:
    if not copier.passes.under_way:
        return None
    remaining = copier.passes.remaining_bytes
    speed = copier.meter.bytes_per_s
    eta_s = copier.meter.eta_s(remaining)
    return {
        "total_bytes": copier.passes.total_bytes,
        "remaining_bytes": remaining,
        "rate_bytes_per_second": None if speed is None else round(speed),
        "eta_seconds": None if eta_s is None else round(eta_s, 1),
    }
