"""What commands do not load that only ask a process: a failover waits for a dozen of them."""

from __future__ import annotations

import pytest

from tests.support import loaded

ASKING = ("copying", "drill", "failover", "lifecycle", "point", "points", "status", "watch")
NOT_LOADED = (
    *("asyncio", "ssl"),
    *("bitmapd.record.layout", "bitmapd.volume", "bitmapd.attach", "bitmapd.nbd", "bitmapd.copier"),
    *("bitmapd.partner", "bitmapd.points", "bitmapd.receiver", "dmctl.kernel"),
)


@pytest.mark.parametrize("module", ASKING)
def test_what_asks_a_process_does_not_load_what_it_consists_of(module: str) -> None:
    found = loaded.after("dmctl.cli.main", f"dmctl.cli.{module}")
    assert [name for name in NOT_LOADED if name in found] == []
