"""The lock by which one helper of a volume changes its devices (invariant 1 of `helper`)."""

from __future__ import annotations

import fcntl
import os
import struct
from typing import Final

from bitmapd.errors import BusyError
from dmctl.kernel.barrier import alarm
from dmctl.kernel.dm_ioctl import CONTROL

# Longer than any barrier's deadline, so that a helper that is about to end is outlived.
LOCK_TIMEOUT_S: Final = 30.0
# For a helper whose bitmapd has died: the time that it takes to see that, and to end.
LOCK_PATIENCE_S: Final = 2.0


def lock(uuid: str, timeout_s: float = LOCK_TIMEOUT_S) -> int:
    """Lock the volume against other helpers; the descriptor that holds the lock.

    The lock is a byte of the control device, chosen by the UUID: it needs no file of ours.
    """
    fd = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    start = int(uuid, 16) & 0x3FFFFFFFFFFFFFFF
    wanted = struct.pack("@hhqqi", fcntl.F_WRLCK, os.SEEK_SET, start, 1, 0)
    try:
        with alarm(timeout_s, _give_up):
            fcntl.fcntl(fd, fcntl.F_OFD_SETLKW, wanted)
    except TimeoutError:
        os.close(fd)
        raise BusyError(
            "another wiring helper of the volume is alive",
            hint="is there another bitmapd of the same volume? 'ps' shows dmctl.kernel.helper",
        ) from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def _give_up(number: int, frame: object) -> None:
    """fcntl(2) is repeated after a signal whose handler does not raise."""
    raise TimeoutError
