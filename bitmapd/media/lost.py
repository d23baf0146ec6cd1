"""Loss of cached writes, which a medium reports once and we to everybody whom it concerns (pure).

A write that was answered may sit in a cache; a flush that succeeds says that it does no more.  When
a cache is lost the kernel says so to whoever flushes next, once for each open descriptor, and then
forgets it (errseq_t in lib/errseq.c).  Hosts and copier share one descriptor of the primary, so
what one of them hears the others never would: the next flush of a host would succeed
although what it wrote is gone, and what was copied from the cache would count as durable.

1. After `report` every listener hears of it once: with its next flush or durable write, if that
   does not fail by itself.
2. A listener that is made later hears of a loss that nobody has heard of yet, like one who opens a
   file.
3. An error that several share, because they waited for the same flush, is one loss.

A crash forgets; what it may leave different the record names.
"""

from __future__ import annotations


class LostWrites:
    """See the module docstring."""

    def __init__(self) -> None:
        self._count = 0
        self._latest: OSError | None = None
        self._told = True  # somebody, of the latest

    def report(self, error: OSError) -> bool:
        """A flush or a durable write failed; false if it is the loss that was reported last."""
        if error is self._latest:
            return False
        self._latest = error
        self._count += 1
        self._told = False
        return True

    def listener(self) -> Listener:
        return Listener(self, self._count if self._told else self._count - 1)

    def since(self, count: int) -> tuple[int, OSError | None]:
        """The latest loss after the first `count` of them, for one who hears of it now."""
        if count == self._count:
            return count, None
        self._told = True
        return self._count, self._latest


class Listener:
    """One who relies on flushes: a host's connection."""

    __slots__ = ("_count", "_lost")

    def __init__(self, lost: LostWrites, count: int) -> None:
        self._lost = lost
        self._count = count

    def answer(self, error: OSError | None) -> OSError | None:
        """What to answer for a flush or a durable write that ended so."""
        self._count, lost = self._lost.since(self._count)
        return error or lost
