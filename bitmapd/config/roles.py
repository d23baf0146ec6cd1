"""The two roles of a site: its file as a volume and as a receiver, each made of the other (pure).

A site has a medium (primary or image), a journal, a record, and one address over which it meets the
other site.  Which of the two connects stays as it was made, whatever their roles are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from uuid import UUID

from bitmapd.config.receiver import ROLE, ReceiverConfig
from bitmapd.config.volume import VolumeConfig
from bitmapd.record.geometry import Geometry
from bitmapd.units import format_size

# Of a volume: what follows from its role, its media, and the other site.
OF_THE_ROLE: Final = frozenset(
    {
        "uuid", "primary", "secondary", "record", "journal", "receiver_dials",
        "extent_size", "block_size", "initial_sync", "partner_name", "partner_fingerprint",
        "partner_certificates", "group", "metrics_listen",
    }
)  # fmt: skip

# Of a receiver: what an administrator has chosen for it, whatever its media are.
OF_RECEIVERS: Final = frozenset({"retain", "point_hook", "hook_timeout", "view_limit", "catch_up"})


def volume_table(
    receiver: ReceiverConfig,
    volume: UUID,
    geometry: Geometry,
    record: str,
    before: Mapping[str, Any],
) -> dict[str, Any]:
    """The file of a receiver that was promoted.  `before`: its file when it was a volume last, of
    which the rest is taken; empty if it never was."""
    table: dict[str, Any] = {
        "uuid": str(volume),
        "primary": receiver.image,
        "secondary": receiver.listen,
        "record": record,
        "attach": "nbd",
        "receiver_dials": not receiver.dials,
        "journal": receiver.journal,
        "extent_size": format_size(geometry.extent_bytes),
        "block_size": format_size(geometry.block_bytes),
    }
    for key, value in (
        ("partner_name", receiver.sender_name),
        ("partner_fingerprint", receiver.sender_fingerprint),
        ("partner_certificates", receiver.certificates),
        ("group", receiver.group),
        ("metrics_listen", receiver.metrics_listen),
    ):
        if value is not None:
            table[key] = str(value)
    return table | {key: value for key, value in before.items() if key not in OF_THE_ROLE}


def receiver_table(volume: VolumeConfig, journal: str) -> dict[str, Any]:
    """The file of a volume that becomes the receiver of the other site."""
    table: dict[str, Any] = {
        "role": ROLE,
        "image": volume.primary,
        "journal": journal,
        "listen": volume.secondary,
        "dials": not volume.receiver_dials,
        "record": volume.record,
    }
    for key, value in (
        ("sender_name", volume.partner_name),
        ("sender_fingerprint", volume.partner_fingerprint),
        ("certificates", volume.partner_certificates or volume.tls_certificates),
        ("group", volume.group),
        ("metrics_listen", volume.metrics_listen),
    ):
        if value is not None:
            table[key] = str(value)
    return table
