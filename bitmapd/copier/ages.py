"""How old the content is that the secondary lacks (pure).

The lag says how long ago both sides were last equal; while hosts never pause, it grows without end.
This says how old a write can be of which the secondary has not even a later version: what somebody
finds who has to use the secondary now, block by block.

A time for each block would be too much memory for a large volume.  So there are two ages only: the
*older* blocks are a snapshot of the set to copy, and everything that joined the set after it is
newer.  When all of the snapshot has been copied, the next one is made.

Invariants:
1. `oldest_s` is never later than the oldest write that is not durable on the secondary in this or a
   later version, as far as it has `joined`.
2. It is earlier by no more than the time that two snapshots take to be copied.

Memory: one set of blocks.  A crash loses it, and with it when the recorded places were written:
after it they count as written at the start.
"""

from __future__ import annotations

from bitmapd.gate.blockset import BlockSet


def earliest(*times_s: float | None) -> float | None:
    """The first of those times that there are."""
    return min((time_s for time_s in times_s if time_s is not None), default=None)


class Ages:
    """See the module docstring.  Times are seconds of the loop's clock; `taken` is what is to be
    copied, after what the call tells of."""

    def __init__(self) -> None:
        self._older = BlockSet()
        self._older_since_s: float | None = None
        self._newer_since_s: float | None = None  # of what is in `taken` and not in `_older`
        self._copied_since_s: float | None = None  # copied and not flushed
        self._settling_since_s: float | None = None  # being flushed

    @property
    def oldest_s(self) -> float | None:
        """When the oldest content was written that the secondary lacks, or earlier."""
        return earliest(
            self._older_since_s, self._newer_since_s, self._copied_since_s, self._settling_since_s
        )

    def joined(self, taken: BlockSet, since_s: float) -> None:
        """Blocks that were written at `since_s` or later have joined `taken`."""
        self._newer_since_s = earliest(self._newer_since_s, since_s)
        self._look(taken)

    def copied(self, first: int, stop: int, taken: BlockSet) -> None:
        """The secondary has these, perhaps in its volatile cache."""
        self._copied_since_s = earliest(self._copied_since_s, self._older_since_s)
        self._older.discard(first, stop)
        self._look(taken)

    def settle_began(self) -> None:
        """Both sides are to be flushed now."""
        self._settling_since_s, self._copied_since_s = self._copied_since_s, None

    def settled(self) -> None:
        """Both sides have been flushed since `settle_began`."""
        self._settling_since_s = None

    def settle_failed(self, taken: BlockSet) -> None:
        """What was to be flushed is in `taken` again."""
        since_s, self._settling_since_s = self._settling_since_s, None
        self._again(taken, since_s)

    def forgotten(self, taken: BlockSet) -> None:
        """What was copied and not flushed is in `taken` again."""
        since_s, self._copied_since_s = self._copied_since_s, None
        self._again(taken, since_s)

    def given(self, gone: BlockSet, taken: BlockSet, *, nothing_copied: bool) -> None:
        """Somebody else copies these from now on; `nothing_copied`: nothing waits for a settle."""
        for first, stop in gone.runs():
            self._older.discard(first, stop)
        if nothing_copied:
            self._copied_since_s = None
        self._look(taken)

    def _again(self, taken: BlockSet, since_s: float | None) -> None:
        """Some of `taken` are older than their snapshot, and which is not known: one for all."""
        self._newer_since_s = earliest(self._older_since_s, self._newer_since_s, since_s)
        self._older = BlockSet()
        self._look(taken)

    def _look(self, taken: BlockSet) -> None:
        """Make the next snapshot when the present one has been copied."""
        if not self._older:
            self._older.update(taken)
            self._older_since_s = self._newer_since_s if taken else None
            self._newer_since_s = None
