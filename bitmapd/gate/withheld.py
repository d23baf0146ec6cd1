"""Answers to writes that are kept back while the volumes of a group are cut (pure).

A member of a group is cut at its own moment, a little before or after the others.  What makes it
one instant is that no host hears of a write of after its volume's cut before all have been cut: so
no write that waited for such an answer is in the point of another member (models/group.pml).  The
writes themselves go on.

1. While answers are withheld none is given to a write that was submitted since; one of before may
   be answered, since it is in the point.
2. `release` gives them in the order in which they came.

A crash gives no answer, as it does to all that is in flight.
"""

from __future__ import annotations

from bitmapd.media.base import Done


class Withheld:
    """See the module docstring."""

    def __init__(self) -> None:
        self.is_on = False
        self._kept: list[tuple[Done, OSError | None]] = []

    def begin(self) -> None:
        """From this instant on."""
        self.is_on = True

    def of(self, done: Done) -> Done:
        """What a write that is submitted now has to call instead."""
        if not self.is_on:
            return done

        def ended(error: OSError | None) -> None:
            if self.is_on:
                self._kept.append((done, error))
            else:
                done(error)

        return ended

    def release(self) -> None:
        """All have been cut, or this cut is given up."""
        self.is_on = False
        kept, self._kept = self._kept, []
        for done, error in kept:
            done(error)
