"""The file that takes what the spool's memory has no room for (edge).

It has no name: nothing that is there can be overwritten by it, nothing of it is left behind by
whatever ends the process, and nobody else opens what hosts have written.
"""

from __future__ import annotations

import os

from bitmapd.errors import refused
from bitmapd.media.aio import AioEngine
from bitmapd.media.kdevice import KernelDevice


def open_spool(folder: str, limit_bytes: int, engine: AioEngine) -> KernelDevice:
    """Blocks as long as the file system likes.  A BitmapdError names the folder."""
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise refused(error, f"cannot make the spool's file in {folder}") from None
    try:
        os.ftruncate(fd, limit_bytes)
        return KernelDevice(f"/proc/self/fd/{fd}", engine)
    except OSError as error:
        raise refused(error, f"cannot make the spool's file in {folder}") from None
    finally:
        os.close(fd)
