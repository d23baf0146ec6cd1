"""Extents that this node asks the other for (pure).

A host's write waits for an extent; the ADD of this turn names it.  Beside it ride predictions,
which the other refuses if it has any use for them itself.

Invariants:
1. An extent enters `own` when GRANT is processed, not when ADD is sent (rule 2).
2. What an ADD under way names is not in `own`, so nothing drops it (rule 3), and is not asked for
   again.
3. Whoever waited for an extent goes first when it comes (rule 6).  What then waits for this node's
   own record has *reserved* it until it has been submitted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from bitmapd.partner.claims import Claims, Home, Stance
from bitmapd.partner.messages import Grant
from bitmapd.partner.outbox import Outbox
from bitmapd.peer.frames import ErrorCode, PeerError
from bitmapd.peer.payloads import Run
from bitmapd.record.extents import each, joined

# Called when an extent has come.  Says whether the write has been submitted; if not, it waits for
# this node's own record.  With an error: it will not come.
Waiter = Callable[[OSError | None], bool]


class Wants:
    """See the module docstring."""

    def __init__(self, claims: Claims, outbox: Outbox, home: Home) -> None:
        self._claims = claims
        self._outbox = outbox
        self._home = home
        self.waiters: dict[int, list[tuple[float, Waiter]]] = {}  # since when it waits
        self.reserved: dict[int, int] = {}  # extent -> granted, and waits for our own record
        self.refused_guesses = 0
        self.forget()

    def forget(self) -> None:
        """Nothing is retried on another connection."""
        self.needed: set[int] = set()
        self.guessed: set[int] = set()
        self.open: dict[int, set[int]] = {}  # our requests -> what they have not been told of
        self._out_need: set[int] = set()
        self._out_guess: set[int] = set()

    @property
    def any(self) -> bool:
        return bool(self.needed or self.guessed or self.open)

    def asks_for(self, extent: int) -> bool:
        return extent in self.needed or extent in self.guessed

    def is_pending(self, extent: int) -> bool:
        return self.asks_for(extent) or extent in self.waiters

    # -- what is wanted -------------------------------------------------------------------------
    def wait(self, extent: int, waiter: Waiter, now_s: float) -> None:
        self.wait_anew(extent, waiter, now_s)
        self.seek(extent)

    def wait_anew(self, extent: int, waiter: Waiter, now_s: float) -> None:
        """As `wait`, and nothing is done for it before the nodes begin anew."""
        self.waiters.setdefault(extent, []).append((now_s, waiter))

    def seek(self, extent: int) -> None:
        """Do what brings a right that is waited for."""
        claims = self._claims
        if claims.may_take(extent):
            claims.gain([(extent, extent + 1)])
            self.serve(extent)
        elif claims.stance is not Stance.UP or claims.own[extent] or extent in self.needed:
            return  # what is ours is being given: it is asked for once it has gone
        elif extent in self.guessed and extent not in self._out_guess:
            return  # it is asked for already; a refusal leads back to here
        else:
            self._out_guess.discard(extent)
            self.guessed.discard(extent)
            self.needed.add(extent)
            self._out_need.add(extent)
            self._outbox.soon()

    def guess(self, runs: Iterable[Run]) -> list[Run]:
        """Ask, with the ADD of this turn, for those that may be had without taking them from the
        other; returns what of the runs is ours or asked for."""
        claims = self._claims
        found: list[Run] = []
        for first, stop in runs:
            if claims.stance is Stance.ALONE:
                claims.gain([(first, stop)])
                found.append((first, stop))
                continue
            ours = []
            for extent in range(first, stop):
                if claims.own[extent] or self.asks_for(extent):
                    ours.append(extent)
                elif claims.stance is Stance.UP and not claims.is_others(extent):
                    self.guessed.add(extent)
                    self._out_guess.add(extent)
                    ours.append(extent)
            found.extend(joined(ours))
        return found

    @property
    def has_unsent(self) -> bool:
        return bool(self._out_need or self._out_guess)

    def send(self) -> None:
        """The ADD of this turn, if there is one."""
        if self.has_unsent:
            need, self._out_need = self._out_need, set()
            guess, self._out_guess = self._out_guess, set()
            self.open[self._outbox.add(joined(need), joined(guess))] = need | guess

    # -- what comes of it -----------------------------------------------------------------------
    def answered(self, message: Grant) -> None:
        """Check an answer as a whole, then take note of it; PeerError changes nothing."""
        request, claims = message.request, self._claims
        if request and request not in self.open:
            raise PeerError(ErrorCode.ANSWER, f"an answer to request {request}, which is not open")
        granted, refused = list(each(message.granted)), list(each(message.refused))
        for extent in granted:
            if claims.own[extent] or not (self.asks_for(extent) or request == 0):
                raise PeerError(ErrorCode.ANSWER, f"extent {extent} was granted unasked")
        for extent in refused:
            if extent not in self.open.get(request, ()):
                raise PeerError(ErrorCode.ANSWER, f"extent {extent} was refused unasked")
        if request:
            self.open[request].difference_update(granted, refused)
            if message.last:
                del self.open[request]

    def over(self, granted: Iterable[int]) -> list[int]:
        """These are ours; returns those that were only guessed."""
        guesses = [extent for extent in granted if extent in self.guessed]
        self.needed.difference_update(granted)
        self.guessed.difference_update(granted)
        return guesses

    def serve(self, extent: int) -> None:
        """It is ours: whoever waited for it goes first."""
        still = [waiter for _, waiter in self.waiters.pop(extent, ()) if not waiter(None)]
        if still:
            self.reserved[extent] = self.reserved.get(extent, 0) + len(still)

    def release(self, extent: int) -> bool:
        """One that had reserved it has been submitted, or has failed; whether it was the last."""
        self.reserved[extent] -= 1
        if self.reserved[extent]:
            return False
        del self.reserved[extent]
        return True

    def refused(self, extents: Iterable[int]) -> None:
        """They are not to be had without taking them from the other."""
        lost = [extent for extent in extents if extent in self.guessed]
        self.guessed.difference_update(lost)
        if lost:
            self.refused_guesses += len(lost)
            self._home.refused(joined(lost))
            for extent in lost:
                if extent in self.waiters:
                    self.seek(extent)
            self.forget_nobodys(lost)

    def forget_nobodys(self, extents: Iterable[int]) -> None:
        """Those of them that are in no record any more, and not asked for, leave the stored one."""
        self._home.forget(
            joined(e for e in self._claims.nobodys(extents) if not self.is_pending(e))
        )

    def expire(self, before_s: float, error: OSError) -> None:
        """Writes that came before then wait no longer."""
        late = []
        for extent, waiting in list(self.waiters.items()):
            late += [waiter for since_s, waiter in waiting if since_s <= before_s]
            kept = [one for one in waiting if one[0] > before_s]
            if kept:
                self.waiters[extent] = kept
            else:
                del self.waiters[extent]
        for waiter in late:
            waiter(error)
