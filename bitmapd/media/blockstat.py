"""What the kernel counts of a block device (edge)."""

from __future__ import annotations

import errno
import os


class BlockStat:
    """Counters of a block device: /sys/block/X/stat, numbered as in Documentation/block/stat.rst:
    reads at 0, writes at 4, sectors written at 6, in flight at 8, discards at 11."""

    def __init__(self, number: int) -> None:
        path = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat"
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._last = [0] * 17

    def read(self) -> list[int]:
        """The latest ones for a device that was removed."""
        try:
            self._last = [int(field) for field in os.pread(self._fd, 512, 0).split()]
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
        return self._last

    def close(self) -> None:
        os.close(self._fd)
