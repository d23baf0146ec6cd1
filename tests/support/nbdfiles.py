"""An NBD export as a file, by nbdfuse.

It is what loop devices are put upon where many requests come at once: the FUSE export of
qemu-storage-daemon (7.2) mixes those up.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from tests.support.volumes import run

READY_S = 30


class NbdFile:
    """`path` is made, and shows the export until `end`."""

    def __init__(self, path: Path, uri: str) -> None:
        self.path = path
        path.touch()
        ready = path.with_suffix(".ready")
        ready.unlink(missing_ok=True)
        self._fuse = subprocess.Popen(
            ["nbdfuse", "--pidfile", str(ready), str(path), uri], stderr=subprocess.DEVNULL
        )
        deadline_s = time.monotonic() + READY_S
        while not ready.exists():  # nbdfuse tells it in no other way
            assert self._fuse.poll() is None, f"nbdfuse does not show {uri}"
            assert time.monotonic() < deadline_s, f"nbdfuse has not shown {uri} for {READY_S} s"
            time.sleep(0.01)

    def end(self) -> None:
        """Nobody uses it; the server may be gone."""
        run(["fusermount3", "-u", "-z", str(self.path)], check=False)
        self._fuse.wait(READY_S)
