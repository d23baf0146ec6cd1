"""Updates of a superblock that is in use, one after another.

A superblock stands in two copies.  An update writes one of them durably, then the other; until both
are written, nothing relies on what it says.

Invariants:
1. A sequence is used once.  An update that failed may be on the medium all the same, whole or in
   part, so the next one gets a higher sequence and says everything anew.
2. The copy that does not hold the newest superblock is written first.  So whatever a power cut or
   an error leaves of one copy, the other one is whole.
3. After an error `superblock` is what it was.  What a crash brings back then is that one, or the
   one of an update that failed: whoever asked for that has to live with either.

One call at a time.  A crash in an update leaves the old superblock or the new one.
"""

from __future__ import annotations

from typing import Any

from bitmapd.record import tool
from bitmapd.record.layout import Loaded, Superblock


class SuperblockUpdates:
    """See the module docstring.  Blocks."""

    def __init__(self, medium: tool.RecordMedium, loaded: Loaded) -> None:
        self._medium = medium
        self._highest = loaded.superblock.sequence  # that was ever tried
        self._first = loaded.stale_copy
        self.superblock = loaded.superblock

    def update(self, now_s: int, **changes: Any) -> Superblock:
        """Write a superblock with these changes; durable in both copies on return."""
        superblock = self.superblock.updated(now_s, above=self._highest, **changes)
        self._highest = superblock.sequence
        for copy in (self._first, 1 - self._first):
            self._first = copy  # in doubt until it is written
            tool.write_superblock_copy(self._medium, superblock, copy)
        self.superblock = superblock
        return superblock
