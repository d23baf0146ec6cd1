"""The connection to the secondary: brings it back after it was lost.

`seek` begins a search that goes on, after waits that grow (`Backoff`), until the secondary was
opened and is the right medium, or the owner no longer wants it.  The owner hears how each attempt
ended (`ReconnectOwner`).

Invariants:
1. There is one search at a time, and no connection is made before everything that was asked of the
   old one has answered.
2. A medium that was refused is closed at once: it must not pass for a connected one after a pause.
3. What a new connection means for what was done over the old one (`replaced`) is settled when it is
   there, whether or not anybody still wants it: a pause or a stop may have come meanwhile, and what
   goes on later finds it connected.

A crash loses nothing but the time of the next attempt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from bitmapd.copier.throttle import Backoff
from bitmapd.media.base import Scheduler, Target


class ReconnectOwner(Protocol):
    """What is asked and told; never from inside a call of the methods of `Reconnect`."""

    @property
    def wants_link(self) -> bool:
        """Whether the secondary is away and should be there."""

    @property
    def idle(self) -> bool:
        """Whether nothing that was asked of the secondary is without an answer."""

    def replaced(self) -> None:
        """The right medium is there, over a new connection: what was copied over the old one and
        not flushed may be gone, and what was on its way may land late."""

    def opened(self) -> None:
        """It is there, and wanted; `replaced` was called before."""

    def not_opened(self, error: OSError) -> None:
        """An attempt failed; another follows."""


class Reconnect:
    """See the module docstring."""

    def __init__(
        self,
        secondary: Target,
        scheduler: Scheduler,
        backoff: Backoff,
        check_secondary: Callable[[], OSError | None],
        owner: ReconnectOwner,
    ) -> None:
        """`check_secondary`: is what was opened the right medium?"""
        self._secondary = secondary
        self._scheduler = scheduler
        self._backoff = backoff
        self._check_secondary = check_secondary
        self._owner = owner
        self.seeking = False  # from `seek` to the end of the attempt

    def seek(self) -> None:
        """Begin to look for the secondary, unless that goes on already."""
        if not self.seeking:
            self.seeking = True
            self._scheduler.call_later(self._backoff.next_s(), self._try_open)

    def works(self) -> None:
        """The secondary has proved itself: the next search begins with a short wait again."""
        self._backoff.reset()

    def _try_open(self) -> None:
        if not self._owner.wants_link:
            self.seeking = False
        elif not self._owner.idle:
            self._scheduler.call_later(self._backoff.first_s, self._try_open)
        else:
            if self._secondary.connected:
                self._secondary.close()
            self._secondary.open(self._was_opened)

    def _was_opened(self, error: OSError | None) -> None:
        self.seeking = False
        if error is None:
            error = self._check_secondary()
            if error is not None:
                self._secondary.close()
        if error is None:
            self._owner.replaced()
        if not self._owner.wants_link:
            return
        if error is None:
            self._owner.opened()
        else:
            self._owner.not_opened(error)
            self.seek()
