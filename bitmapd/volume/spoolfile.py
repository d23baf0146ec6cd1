"""The file that takes what the spool's memory has no room for (edge).

It has no name: nothing that is there can be overwritten by it, nothing of it is left behind by
whatever ends the process, and nobody else opens what hosts have written.

It is sparse, and a file system that allocates may wait for its journal: `io_submit` does so itself,
so threads write and read it, and no host waits.
"""

from __future__ import annotations

import os

from bitmapd.errors import refused
from bitmapd.media.aio import AioEngine
from bitmapd.media.base import Done
from bitmapd.media.kdevice import KernelDevice


class SpoolFile(KernelDevice):
    """See the module docstring."""

    def read(self, offset_bytes: int, buffer: memoryview, done: Done) -> None:
        self._engine.read_aside(self._fd, offset_bytes, buffer, done)

    def write(self, offset_bytes: int, buffer: memoryview, done: Done, fua: bool = False) -> None:
        self._engine.write_aside(self._fd, offset_bytes, buffer, done, fua)


def open_spool(folder: str, limit_bytes: int, engine: AioEngine) -> SpoolFile:
    """Blocks as long as the file system likes.  A BitmapdError names the folder."""
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise refused(error, f"cannot make the spool's file in {folder}") from None
    try:
        os.ftruncate(fd, limit_bytes)
        return SpoolFile(f"/proc/self/fd/{fd}", engine, aside=True)
    except OSError as error:
        raise refused(error, f"cannot make the spool's file in {folder}") from None
    finally:
        os.close(fd)
