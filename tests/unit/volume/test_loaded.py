"""What the process of a plain volume, or of a receiver, does not load: it would lock the memory of
each of these."""

from __future__ import annotations

from tests.support import loaded

METRICS = ("bitmapd.control.metrics", "prometheus_client")  # served where it is wanted
NOT_LOADED = (
    *("email", "shutil", "difflib", "toml", "pyroute2"),
    *("bitmapd.attach.dm_mode", "bitmapd.attach.promoted_dm", "bitmapd.nbd.client.target"),
    *METRICS,
    *("bitmapd.partner.pair", "bitmapd.points.sender", "bitmapd.receiver.receiver"),
)


def test_a_plain_volume_loads_nothing_that_it_does_not_use() -> None:
    found = loaded.after("bitmapd.daemon", "bitmapd.volume.assemble")
    assert "bitmapd.gate.gate" in found
    assert [name for name in NOT_LOADED if name in found] == []


def test_a_receiver_loads_no_server_of_metrics() -> None:
    found = loaded.after("bitmapd.daemon", "bitmapd.receiverd")
    assert "bitmapd.receiver.receiver" in found
    assert [name for name in METRICS if name in found] == []
