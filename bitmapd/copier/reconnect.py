"""The connection to the secondary: brings it back, and covers what the old one may still write.

`seek` begins a search that goes on, after waits that grow (`Backoff`), until the secondary was
opened and is the right medium, or the owner no longer wants it.  The owner hears how each attempt
ended (`LinkOwner`).

Invariants:
1. There is one search at a time, and no connection is made before everything that was asked of the
   old one has answered.
2. A medium that was refused is closed at once: it must not pass for a connected one after a pause.
3. What was copied over the old connection and not flushed counts as not copied.
4. A server whose connection was lost may carry out late what it had received.  Blocks whose write
   ended in an error are copied as usual after the reconnection and once more `LATE_WRITES_S` later;
   until then their extents do not count as clean.  Nothing is known of what a process that died had
   sent: after it, the first copy waits so long (`predecessor_died`, `may_copy`).

Ordering on success: what may come late is held at the gate before `opened` allows the first copy.

A crash loses the list of what may come late.  The record names all those extents, and what starts
next waits as it does after any process that died.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from bitmapd.copier.throttle import Backoff
from bitmapd.gate.blockset import BlockSet
from bitmapd.gate.gate import Gate
from bitmapd.media.base import Scheduler, Target

# How long a server whose connection was lost may take over the writes it had received.
LATE_WRITES_S = 10.0


class LinkOwner(Protocol):
    """What the link asks and tells its owner; never from inside a call of the link's methods."""

    @property
    def wants_link(self) -> bool:
        """Whether the secondary is away and should be there."""

    @property
    def idle(self) -> bool:
        """Whether nothing that was asked of the secondary is without an answer."""

    def opened(self) -> None:
        """The secondary is there, and is the right medium."""

    def not_opened(self, error: OSError) -> None:
        """An attempt failed; another follows."""

    def proceed(self) -> None:
        """Copies that had to wait may begin."""


class Link:
    """See the module docstring."""

    def __init__(
        self,
        gate: Gate,
        secondary: Target,
        scheduler: Scheduler,
        backoff: Backoff,
        check_secondary: Callable[[], OSError | None],
        owner: LinkOwner,
    ) -> None:
        """`check_secondary`: is what was opened the right medium?"""
        self._gate = gate
        self._secondary = secondary
        self._scheduler = scheduler
        self._backoff = backoff
        self._check_secondary = check_secondary
        self._owner = owner
        self._seeking = False
        self._late = BlockSet()  # blocks whose write ended in an error and may yet be carried out
        self._hold_copies_until_s = float("-inf")

    def seek(self) -> None:
        """Begin to look for the secondary, unless that goes on already."""
        if not self._seeking:
            self._seeking = True
            self._scheduler.call_later(self._backoff.next_s(), self._try_open)

    def works(self) -> None:
        """The secondary has proved itself: the next search begins with a short wait again."""
        self._backoff.reset()

    # -- writes that come late ------------------------------------------------------------
    def not_written(self, first: int, stop: int) -> None:
        """A write of these blocks ended in an error."""
        if self._secondary.writes_late:
            self._late.add(first, stop)

    def predecessor_died(self) -> None:
        """Another process copied before this one, and may have died doing so."""
        if self._secondary.writes_late:
            self._hold_copies_until_s = self._scheduler.time() + LATE_WRITES_S
            self._scheduler.call_later(LATE_WRITES_S, self._owner.proceed)

    def may_copy(self, now_s: float) -> bool:
        """Whether what a process that died had sent has landed by now."""
        return now_s >= self._hold_copies_until_s

    def _cover_late(self) -> None:
        if self._late:
            late, self._late = self._late, BlockSet()
            self._gate.hold(late)
            self._scheduler.call_later(LATE_WRITES_S, self._copy_again, late)

    def _copy_again(self, late: BlockSet) -> None:
        """Writes that the old connection may have left behind have landed by now: cover them."""
        self._gate.release(late)
        self._owner.proceed()

    # -- the search -----------------------------------------------------------------------
    def _try_open(self) -> None:
        if not self._owner.wants_link:
            self._seeking = False
        elif not self._owner.idle:
            self._scheduler.call_later(self._backoff.first_s, self._try_open)
        else:
            if self._secondary.connected:
                self._secondary.close()
            self._secondary.open(self._was_opened)

    def _was_opened(self, error: OSError | None) -> None:
        self._seeking = False
        if error is None:
            error = self._check_secondary()
            if error is not None:
                self._secondary.close()
        if not self._owner.wants_link:
            return
        if error is not None:
            self._owner.not_opened(error)
            self.seek()
            return
        # A connection that ended without an error (given up, or lost during a pause) took nothing
        # back when it ended.
        self._gate.forget_copied()
        self._cover_late()
        self._owner.opened()
