"""What `create` checks for a volume whose secondary is a receiver.

The receiver itself is not asked: it may be made later, and it says at the first contact whether it
is the right one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitmapd.config import VolumeConfig, effective_block_size_bytes, has_receiver
from bitmapd.errors import UsageError
from bitmapd.net.tls import node_context
from bitmapd.net.uri import parse_receiver_uri
from bitmapd.points.pieces import MAX_BLOCK_BYTES
from bitmapd.units import format_duration, format_size

# A cut with attach = dm costs two barriers, and all hosts go through the gate till the table grows.
SHORT_DM_INTERVAL_S = 10.0

OPTIONS = (
    "point_interval", "spool_limit", "spool", "spool_file_limit", "compress", "start_alone",
    "group",
)  # fmt: skip


def check_points(table: Mapping[str, Any], config: VolumeConfig | None) -> None:
    """UsageError for what `create` was told of points and cannot come true."""
    if config is None:
        return
    given = [key for key in OPTIONS if key in table]
    if not has_receiver(config):
        if given:
            raise UsageError(
                f"--{given[0].replace('_', '-')} is for volumes whose secondary is a receiver",
                hint="give --secondary receiver+tls://HOST/NAME, too",
            )
        return
    if effective_block_size_bytes(config) > MAX_BLOCK_BYTES:
        raise UsageError(
            f"--block-size is larger than {format_size(MAX_BLOCK_BYTES)}, the largest block that"
            " goes to a receiver"
        )
    peer = parse_receiver_uri(config.secondary).peer
    folder: Path | None = config.partner_certificates or config.tls_certificates
    if peer.host is not None and folder is not None:
        node_context(folder, accepts=False)


def notes_on_points(config: VolumeConfig) -> list[str]:
    """What whoever makes such a volume should know."""
    interval_s = config.point_interval_s
    if not has_receiver(config) or config.attach != "dm" or interval_s >= SHORT_DM_INTERVAL_S:
        return []
    return [
        f"with --attach dm each point costs two barriers, in which hosts wait, and for a while all"
        f" they write goes through bitmapd: --point-interval {format_duration(interval_s)} has them"
        f" slower; {format_duration(SHORT_DM_INTERVAL_S)} or more costs little, or --attach nbd"
    ]
