"""What the process of a plain volume does not load: it would lock the memory of each of these."""

from __future__ import annotations

import subprocess
import sys

NOT_LOADED = (
    *("email", "shutil", "difflib", "toml", "pyroute2"),
    *("bitmapd.attach.dm_mode", "bitmapd.attach.promoted_dm", "bitmapd.nbd.client.target"),
    *("bitmapd.partner.pair", "bitmapd.points.sender", "bitmapd.receiver.receiver"),
)


def test_a_plain_volume_loads_nothing_that_it_does_not_use() -> None:
    code = "import sys, bitmapd.daemon, bitmapd.volume.assemble; print(*sys.modules, sep='\\n')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    loaded = done.stdout.split()
    assert "bitmapd.gate.gate" in loaded
    assert [name for name in NOT_LOADED if name in loaded] == []
