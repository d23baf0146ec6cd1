"""What the kernel counts of a block device (edge).

Kernels of about 6.6 and newer count a request of a mapped device only if `queue/iostats` is 1 when
it begins, and some tunings set 0.  So each reading also looks whether the kernel counts, and
`lapses` is the number of readings that found that it does not.  Two readings with the same counters
and the same lapses have nothing between them that was not counted, unless somebody has switched
counting off and on again in between.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

SYS_DEV_BLOCK = Path("/sys/dev/block")
ON = b"1"


class BlockStat:
    """Counters of a block device: /sys/block/X/stat, numbered as in Documentation/block/stat.rst:
    reads at 0, writes at 4, sectors written at 6, in flight at 8, discards at 11."""

    def __init__(self, number: str, root: Path = SYS_DEV_BLOCK) -> None:
        """`number`: "major:minor" of the device, which is no partition."""
        entry = root / number
        self._switch = entry / "queue" / "iostats"
        self._stat_fd = os.open(entry / "stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._switch_fd = os.open(self._switch, os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            os.close(self._stat_fd)
            raise
        self._last = [0] * 17
        self.lapses = 0

    def read(self) -> list[int]:
        """The latest ones for a device that was removed."""
        try:
            if not self.counts:
                self.lapses += 1
            self._last = [int(field) for field in os.pread(self._stat_fd, 512, 0).split()]
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
        return self._last

    @property
    def counts(self) -> bool:
        """Whether the kernel counts what begins now."""
        return os.pread(self._switch_fd, 16, 0).strip() != b"0"

    def switch_on(self) -> bool:
        """Have the kernel count; true if it did not.  Waits for requests that are being submitted.

        OSError if it cannot be had.  Old kernels, which count anyway, do not switch it on.
        """
        if self.counts:
            return False
        self._switch.write_bytes(ON)
        if not self.counts:
            raise OSError(errno.EPROTO, f"{self._switch} stays 0")
        return True

    def close(self) -> None:
        os.close(self._stat_fd)
        os.close(self._switch_fd)
