"""What the superblock says about the pair, and the order in which that changes (pure).

Several things change it: a step to alone, an exchange, the flag VOLATILE.  An update takes its
time, and what another has asked for meanwhile must not be written over.

Invariants:
1. One update is under way at a time; the next is made from what that has left.
2. `lasting` is what is durable for certain, unless the last update failed: that may have landed all
   the same, so the next one is written even if it changes nothing.

A crash leaves the superblock of before or after the update that is under way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from bitmapd.media.base import Done
from bitmapd.partner.states import Lasting

Edit = Callable[[Lasting], Lasting]


class Ledger:
    """See the module docstring.  `store` writes a superblock and calls back when it is durable."""

    def __init__(self, lasting: Lasting, store: Callable[[Lasting, Done], None]) -> None:
        self.lasting = lasting
        self._store = store
        self._due: deque[tuple[Edit, Done, bool]] = deque()
        self._writing = False
        self._failed = False  # the last update did

    def change(self, edit: Edit, done: Done, *, certain: bool = True) -> None:
        """Call back when what `edit` makes of the superblock is durable: at once, if it changes
        nothing and nothing is under way.  With `certain` off nobody counts on what it does not
        change."""
        self._due.append((edit, done, certain))
        self._go_on()

    def _go_on(self) -> None:
        while self._due and not self._writing:
            edit, done, certain = self._due.popleft()
            lasting = edit(self.lasting)
            if lasting == self.lasting and not (certain and self._failed):
                done(None)
            else:
                self._writing = True
                self._store(lasting, self._written(lasting, done))

    def _written(self, lasting: Lasting, done: Done) -> Done:
        def written(error: OSError | None) -> None:
            self._writing = False
            self._failed = error is not None
            if error is None:
                self.lasting = lasting
            done(error)
            self._go_on()

        return written
