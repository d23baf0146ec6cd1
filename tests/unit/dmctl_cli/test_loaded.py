"""What commands do not load that only ask a process: a failover waits for a dozen of them."""

from __future__ import annotations

import subprocess
import sys

import pytest

ASKING = ("copying", "drill", "failover", "lifecycle", "point", "points", "status", "watch")
NOT_LOADED = (
    *("asyncio", "ssl"),
    *("bitmapd.record.layout", "bitmapd.volume", "bitmapd.attach", "bitmapd.nbd", "bitmapd.copier"),
    *("bitmapd.partner", "bitmapd.points", "bitmapd.receiver", "dmctl.kernel"),
)


@pytest.mark.parametrize("module", ASKING)
def test_what_asks_a_process_does_not_load_what_it_consists_of(module: str) -> None:
    code = f"import sys, dmctl.cli.main, dmctl.cli.{module}; print(*sys.modules, sep='\\n')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert [name for name in NOT_LOADED if name in done.stdout.split()] == []
