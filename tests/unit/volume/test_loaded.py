"""What the process of a plain volume does not load: it would lock the memory of each of these."""

from __future__ import annotations

from tests.support import loaded

NOT_LOADED = (
    *("email", "shutil", "difflib", "toml", "pyroute2"),
    *("bitmapd.attach.dm_mode", "bitmapd.attach.promoted_dm", "bitmapd.nbd.client.target"),
    *("bitmapd.partner.pair", "bitmapd.points.sender", "bitmapd.receiver.receiver"),
)


def test_a_plain_volume_loads_nothing_that_it_does_not_use() -> None:
    found = loaded.after("bitmapd.daemon", "bitmapd.volume.assemble")
    assert "bitmapd.gate.gate" in found
    assert [name for name in NOT_LOADED if name in found] == []
