"""A planned takeover: one node asks for everything, the other stops its hosts and gives it (pure).

TAKE asks; the other has its hosts stop, gives each extent with its dirt as it would give any, and
says TAKEN when nothing is its own, owed, or being copied by it any more.  No proof is needed, since
both live: what is not given by then is not lost either, but shared as after any cut.

A node that serves hosts no longer gives everything in the same way, unasked (`give`).  TAKE may
come meanwhile: one giving is the answer to both.

Invariants:
1. TAKEN comes after the last GRANT has been processed (GOT) and the last copy has ended.
2. A cut before TAKEN is sent makes TAKE void: hosts go on where they were, and the command that
   asked fails.  It may be given again at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from bitmapd.errors import BusyError, UnreachableError
from bitmapd.media.base import Scheduler
from bitmapd.partner.messages import Message, Take, Taken
from bitmapd.partner.rights import Rights
from bitmapd.peer.frames import ErrorCode, PeerError

Outcome = Callable[[Exception | None], None]


class Hosts(Protocol):
    """Who takes the requests of hosts at this node."""

    def stop(self, force: bool, done: Callable[[str | None], None]) -> None:
        """Take no more, and call back, later, when those that were taken are answered: or with the
        reason why hosts go on, which there may be without `force`."""

    def go_on(self) -> None:
        """Take requests again, if it is `stop` that has ended it."""


class Handover:
    """Both roles, one at a time; see the module docstring."""

    def __init__(
        self, rights: Rights, scheduler: Scheduler, send: Callable[[Message], None]
    ) -> None:
        self._rights = rights
        self._scheduler = scheduler
        self._send = send
        self.hosts: Hosts | None = None  # None: there are none
        self._taking: Outcome | None = None
        self._giving: object | None = None  # token of the giving that is under way
        self._is_asked = False  # TAKE has not been answered
        self._given_to: Callable[[bool], None] | None = None  # who has called `give`

    @property
    def is_taking(self) -> bool:
        return self._taking is not None

    # -- taking ---------------------------------------------------------------------------------
    def take(self, force: bool, done: Outcome) -> None:
        if self._taking is not None or self._giving is not None:
            raise BusyError("a takeover is under way: try again in a moment")
        self._taking = done
        self._send(Take(force))

    def taken(self, message: Taken) -> None:
        done, self._taking = self._taking, None
        if done is None:
            raise PeerError(ErrorCode.ANSWER, "TAKEN without TAKE")
        done(BusyError(message.text) if message.code else None)

    # -- giving ---------------------------------------------------------------------------------
    def asked(self, message: Take, why_not: str | None) -> None:
        if self._is_asked:
            raise PeerError(ErrorCode.ANSWER, "TAKE again before TAKEN")
        if self._taking is not None:
            why_not = "the partner is taking over itself"
        if why_not is not None:
            self._refuse(why_not)
            return
        self._is_asked = True
        if self._giving is not None:
            return
        token = self._giving = object()

        def stopped(reason: str | None) -> None:
            if token is not self._giving:
                return
            if reason is not None:
                self.give_up(reason)
                return
            self._rights.give_all(self._given)

        if self.hosts is None:
            stopped(None)
        else:
            self.hosts.stop(message.force, stopped)

    def give(self, done: Callable[[bool], None]) -> None:
        """Give everything, for no host is served here any more; calls back with whether the other
        has all of it."""
        if self._taking is not None or self._given_to is not None:
            raise BusyError("a takeover is under way: try again in a moment")
        self._given_to = done
        if self._giving is None:
            self._giving = object()
            self._rights.give_all(self._given)

    def give_up(self, reason: str) -> None:
        """Do not go on with giving, if that is under way."""
        if self._end_giving(given=False):
            self._refuse(reason)

    def _refuse(self, reason: str) -> None:
        self._send(Taken(int(ErrorCode.BUSY), reason))

    def _given(self) -> None:
        if self._end_giving(given=True):
            self._send(Taken(0, ""))

    def _end_giving(self, *, given: bool) -> bool:
        """Whether the other waits for TAKEN."""
        self._giving = None
        call, self._given_to = self._given_to, None
        if call is not None:
            self._scheduler.call_soon(call, given)
        was_asked, self._is_asked = self._is_asked, False
        return was_asked

    # -- neither --------------------------------------------------------------------------------
    def lost(self) -> None:
        """The link is gone: TAKE is void."""
        taking, self._taking = self._taking, None
        if taking is not None:
            error = UnreachableError("the link was lost before the partner had given everything")
            self._scheduler.call_soon(taking, error)
        if self._end_giving(given=False) and self.hosts is not None:
            self.hosts.go_on()
