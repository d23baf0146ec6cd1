"""A disk of this machine whose power can be cut: what was not flushed may be gone.

    loop device - FUSE file of nbdfuse - NBD - `LossyServer` - `LossyStore`

No virtual machine is needed, but root.  The device stays the same one over a cut.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.loops import loop_device
from tests.support.nbdfiles import NbdFile
from tests.support.volumes import run
from tests.vm.lossy import Loss, LossyStore
from tests.vm.lossy_server import LossyServer

SECTOR_BYTES = 512


class PowerCutDisk:
    """`device` is its path, `content` a file of what the device reads as."""

    def __init__(self, store: LossyStore, folder: Path, shown: Path, device: Path) -> None:
        self._store = store
        self._shown = shown
        self.device = device
        self.content = folder / "view"

    def cut(self) -> Loss:
        """Nobody uses it: what was not flushed is there, or is not, or is there in parts."""
        loss = self._store.cut()
        run(["blockdev", "--flushbufs", str(self.device)])
        fd = os.open(self._shown, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
        return loss


@contextmanager
def power_cut_disk(folder: Path, size_bytes: int, rng: random.Random) -> Iterator[PowerCutDisk]:
    """`folder` is made, and must have a short path."""
    folder.mkdir()
    store = LossyStore(folder, size_bytes, rng)
    server = LossyServer(store, size_bytes, SECTOR_BYTES, folder / "nbd")
    shown = NbdFile(folder / "shown", f"nbd+unix:///?socket={server.path}")
    try:
        with loop_device(shown.path, SECTOR_BYTES, "--direct-io=on") as device:
            yield PowerCutDisk(store, folder, shown.path, Path(device))
    finally:
        shown.end()
        server.close()
        store.close()
