"""The file of a site as a volume and as a receiver: each is made of the other."""

from __future__ import annotations

from uuid import UUID

from bitmapd.config import build_receiver, build_volume
from bitmapd.config.roles import receiver_table, volume_table
from bitmapd.record.geometry import Geometry

LISTEN = "nbd+unix:///v?socket=/s"
UUID_A = UUID("6f0d2a54-9b7c-4f43-8b50-0d2f6a4f6c01")
GEOMETRY = Geometry(8 << 20, 1 << 20, 1 << 16)
RECEIVER = {
    "role": "receiver",
    "image": "/dev/image",
    "journal": "/dev/journal",
    "listen": "receiver+tls://0.0.0.0/v",
    "sender_name": "near",
    "sender_fingerprint": "ab" * 32,
    "certificates": "/etc/keys",
    "metrics_listen": "127.0.0.1:9501",
}


def test_a_receiver_that_is_promoted_and_fails_back_is_what_it_was() -> None:
    receiver, problems = build_receiver("v", RECEIVER, "f")
    assert receiver is not None, problems
    table = volume_table(receiver, UUID_A, GEOMETRY, "/dev/record", {})
    volume, problems = build_volume("v", table, {}, "f", LISTEN)
    assert volume is not None, problems
    assert (volume.primary, volume.record) == ("/dev/image", "/dev/record")
    assert volume.receiver_dials  # who listened goes on to listen
    assert (volume.partner_name, volume.uuid) == ("near", UUID_A)
    assert volume.metrics_listen == "127.0.0.1:9501"
    again, problems = build_receiver("v", receiver_table(volume, "/dev/journal"), "f")
    assert again is not None, problems
    assert (again.image, again.journal, again.listen) == (
        receiver.image, receiver.journal, receiver.listen,
    )  # fmt: skip
    assert (again.sender_name, again.certificates) == ("near", receiver.certificates)
    assert again.metrics_listen == "127.0.0.1:9501"
    assert not again.dials
    assert again.promoted_record == "/dev/record"


def test_what_has_to_do_with_no_role_comes_back_with_the_volume() -> None:
    receiver, _ = build_receiver(
        "v",
        {
            "role": "receiver",
            "image": "/dev/image",
            "journal": "/dev/journal",
            "listen": "receiver+unix:///far?socket=/run/x",
            "dials": True,
        },
        "f",
    )
    assert receiver is not None
    before = {
        "point_interval": "1s", "primary": "/dev/other", "record": "/dev/old",
        "metrics_listen": "127.0.0.1:9501",
    }  # fmt: skip
    table = volume_table(receiver, UUID_A, GEOMETRY, "/dev/record", before)
    assert (table["point_interval"], table["primary"]) == ("1s", "/dev/image")
    in_kernel = volume_table(receiver, UUID_A, GEOMETRY, "/dev/record", before | {"attach": "dm"})
    assert in_kernel["attach"] == "dm", "hosts find their device again"
    volume, problems = build_volume("v", table, {}, "f", LISTEN)
    assert volume is not None, problems
    assert not volume.receiver_dials
    assert (volume.point_interval_s, volume.record) == (1.0, "/dev/record")
    assert volume.metrics_listen is None, "as the receiver's file says"
    back = receiver_table(volume, "/dev/journal")
    assert "sender_name" not in back
    assert back["dials"]
