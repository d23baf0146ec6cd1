"""The partner's copy of this node's record, in the place of one that cannot be written (pure).

Each node holds what the other may write, so a record device that fails costs no write of a host as
long as the two are paired: the nodes begin anew, HELLO says what is so, and from then on this node
relies on the other as with `record_on = partner` (`reliance`).  With `record_fallback` off, writes
to new places fail instead, as at a single appliance.

Invariants:
1. Nothing counts before the nodes have begun anew: by then the flag VOLATILE is in the other's
   superblock, or the other stores what it grants.
2. Whoever waits for a page that could not be written looks again then.  Without a link it waits, as
   for any new place in a cut: nothing is stored anywhere.  `cut_patience` bounds that.
3. What can have no help fails at once: alone, or beside a partner that has been told and cannot
   store anything either.

A crash of this node leaves a record that names too little; the other has lived, or its flag says
that everything has to be compared, or its stored record names it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from bitmapd.media.base import Scheduler
from bitmapd.partner.greeting import has, relies
from bitmapd.partner.messages import Hello, HelloFlag
from bitmapd.partner.rights import Rights, Stance


class Link(Protocol):
    """The node."""

    def begin_anew(self) -> None:
        """End the connection that is up, if one is; another one comes."""


class StandIn:
    """See the module docstring."""

    def __init__(
        self, rights: Rights, scheduler: Scheduler, link: Link, emit: Callable[..., None]
    ) -> None:
        self._rights = rights
        self._scheduler = scheduler
        self._link = link
        self._emit = emit
        self.on = True  # record_fallback
        self.counts = False  # the partner's copy does, now
        self.partner_fails = False  # its record cannot be written; as it said last
        self._said = False  # that ours cannot, on this connection

    def unwritten(self) -> bool:
        """A page that hosts wait for could not be written.  True if they may wait for the partner
        (`Rights.want_anew`)."""
        stance = self._rights.stance
        if not self.on or (stance is Stance.UP and self._said):
            return False
        if stance is Stance.UP:
            self._scheduler.call_soon(self._link.begin_anew)
        return stance in (Stance.UP, Stance.CUT, Stance.FROZEN)

    def record_is(self, *, failing: bool) -> None:
        """Whether the stored record cannot be written now.  HELLO says so, and both nodes count on
        that."""
        if self._rights.stance is Stance.UP:
            if failing is not self._said:
                self._link.begin_anew()
        elif not failing:
            self._rights.look_again()

    def met(self, mine: Hello, theirs: Hello) -> None:
        """The nodes come together, and rely on one another as these say."""
        self._said = has(mine, HelloFlag.UNSTORED)
        self.counts = self._said and relies(mine, theirs)
        if self.counts:
            self._emit(
                "record-fallback",
                message="this node's record cannot be written: the partner's copy of it counts",
            )
        did_fail, self.partner_fails = self.partner_fails, has(theirs, HelloFlag.UNSTORED)
        if self.partner_fails is not did_fail:
            self._emit("partner-record-failing" if self.partner_fails else "partner-record-ok")

    def lost(self) -> None:
        """The link is lost, and what was said on it is over."""
        self._said = self.counts = False
