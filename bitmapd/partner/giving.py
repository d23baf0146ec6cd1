"""Extents that the other node asks for, and how they are given (pure).

What nobody uses is granted at once.  What is ours is given once no write of our hosts is in flight
there, with the blocks that are not copied yet, and under embargo while a copy of ours is under way:
a host never waits for the secondary.

Invariants:
1. An extent is given when no write is in flight there (rule 4), with all its dirt (rule 5), and not
   before every write that waited for it has been submitted (rule 6).
2. Two ADDs that cross: node 1 keeps the other's until its own has been answered (rule 8).
3. A guess takes nothing that this node owns, wants or guesses (rule 9).
4. With `stores_first` nothing is granted before this node's stored record names it.  What waits
   for that is the other's already (`other`), and what has become ours meanwhile is given as
   anything of ours is.
5. A right that was given unasked is not given again for an ADD that has crossed it (rule 15).

Against ping-pong: an extent that has changed hands more than `MOST_CHANGES` times within a second
stays with its new owner for `KEEP_S`, or two round trips if that is shorter, so that it serves more
than one write for each message; and it leaves the record as soon as it is clean.  Only what hosts
need counts: guesses and what is given unasked may be many, and do not come back by themselves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

from bitmapd.media.base import Scheduler
from bitmapd.partner.claims import Claims, Home
from bitmapd.partner.messages import Add, Grant
from bitmapd.partner.outbox import Outbox
from bitmapd.partner.wants import Wants
from bitmapd.peer.frames import ErrorCode, PeerError
from bitmapd.peer.payloads import Runs
from bitmapd.record.extents import each, joined

MOST_REQUESTS = 64  # of the other's that are taken at a time
MOST_GIVEN = 4096  # extents at once, unasked: 50 ms, and each may take its dirt along
MOST_GRANTS = 8  # that the other has not processed, while there is more to be given
MOST_CHANGES, CHANGES_S = 8, 1.0
KEEP_S = 0.010


class Giving:
    """See the module docstring."""

    def __init__(
        self, claims: Claims, wants: Wants, outbox: Outbox, scheduler: Scheduler, home: Home
    ) -> None:
        self._claims = claims
        self._wants = wants
        self._outbox = outbox
        self._scheduler = scheduler
        self._home = home
        self.unfree: set[int] = set()  # given away, and a copy of ours may still land there
        self.coveted: set[int] = set()  # the other has asked about them: dropped when clean
        self.handovers = 0
        self.round_trip_s = KEEP_S
        self.stores_first = False
        self._changes: dict[int, deque[float]] = {}  # extent -> when it has changed hands
        self.forget()

    def forget(self) -> None:
        """All requests end with their connection."""
        self._their_request = 0
        self._asked: dict[int, set[int]] = {}  # their requests -> what we have not answered
        self._request_of: dict[int, int] = {}  # extent of such a request -> its number
        self._draining: dict[int, object] = {}  # extent -> token of the drain that it waits for
        self._later: set[int] = set()  # asked for, and not to be given yet
        self._storing: set[int] = set()  # asked for, nobody's, and not in the stored record yet
        self._grants: deque[tuple[int, list[int]]] = deque()  # sequence, extents: GOT is to come

    def next_request(self, request: int) -> None:
        """The other makes a request; PeerError if it may not."""
        if request <= self._their_request:
            raise PeerError(ErrorCode.ANSWER, f"request {request} does not follow the last one")
        if len(self._asked) >= MOST_REQUESTS:
            raise PeerError(ErrorCode.BUSY, f"more than {MOST_REQUESTS} requests at a time")
        self._their_request = request
        self._asked[request] = set()

    def end_request(self, request: int) -> None:
        del self._asked[request]

    # -- what the other asks for ----------------------------------------------------------------
    def check(self, message: Add) -> None:
        for extent in each(message.needed):
            if extent in self._request_of:
                raise PeerError(ErrorCode.ANSWER, f"extent {extent} has been asked for already")
        if set(each(message.needed)) & set(each(message.predicted)):
            raise PeerError(ErrorCode.RUNS, "an extent is needed and predicted at once")

    def asked(self, message: Add) -> None:
        """Answer what can be answered now; the rest when it can."""
        claims, wants, request = self._claims, self._wants, message.request
        granted: list[int] = []
        refused: list[int] = []
        unanswered: set[int] = set()
        for extent in each(message.needed):
            if claims.owed[extent]:
                continue  # the GRANT that is on its way is the answer
            if claims.own[extent] or (extent in wants.needed and claims.node == 1):
                unanswered.add(extent)
                self._request_of[extent] = request
                self._later.add(extent)
            else:
                granted.append(extent)
        for extent in each(message.predicted):
            if claims.owed[extent]:
                continue
            if claims.own[extent] or wants.asks_for(extent):
                refused.append(extent)
            else:
                granted.append(extent)
        self._asked[request] = unanswered
        if self.stores_first and granted and self._store(message, granted):
            granted = []
        if granted or refused or not unanswered:
            self._answer(request, granted, refused)
        self.give_later(unanswered)

    def _store(self, message: Add, extents: list[int]) -> bool:
        """Have them stored first; False if they are."""
        request, connection = message.request, self._asked
        runs = joined(extents)
        needed = set(each(message.needed)).intersection(extents)

        def stored(error: OSError | None) -> None:
            if connection is not self._asked:
                return
            if error is not None:
                self._home.unstored()
            else:
                self._stored(request, needed, set(extents) - needed)

        if not self._home.store(runs, stored):
            return False
        self._know(runs)
        self._asked[request].update(extents)
        self._storing.update(extents)
        self._later.update(needed)
        self._request_of.update(dict.fromkeys(needed, request))
        return True

    def _stored(self, request: int, needed: set[int], predicted: set[int]) -> None:
        """Answer for them, as things are now."""
        wants, first = self._wants, self._claims.node == 1
        # What has become ours, or will before it goes to the other, is given later.
        ready = {e for e in needed & self._storing if not (first and e in wants.needed)}
        free = {e for e in predicted & self._storing if not wants.asks_for(e)}
        self._storing -= needed | predicted
        self._later -= ready
        for extent in ready:
            del self._request_of[extent]
        if ready or predicted:
            self._asked[request] -= ready | predicted
            self._answer(request, sorted(ready | free), sorted(predicted - free))

    def gained(self, extents: Iterable[int]) -> None:
        """They have become ours."""
        self._storing.difference_update(extents)

    def _know(self, runs: Runs) -> None:
        """They are the other's, or will be."""
        for first, stop in runs:
            self._claims.other[first:stop] = True

    def _answer(self, request: int, granted: list[int], refused: list[int]) -> None:
        """These are nobody's, or the other's already: into its record, then GRANT."""
        runs = joined(granted)
        self._know(runs)
        self._outbox.unremove(granted)
        self._home.keep(runs)
        self._send(request, runs, joined(refused), (), ())

    def _send(self, request: int, granted: Runs, refused: Runs, embargo: Runs, dirt: Runs) -> int:
        last = request != 0 and not self._asked[request]
        if last:
            self.end_request(request)
        return self._outbox.send(Grant(request, granted, refused, embargo, dirt, last))

    # -- giving ---------------------------------------------------------------------------------
    def give_later(self, extents: Iterable[int]) -> None:
        """Begin to give those of them that the other has asked for and nothing keeps here."""
        now_s = self._scheduler.time()
        ready: list[int] = []
        for extent in sorted(self._later.intersection(extents)):
            if not self._claims.held[extent] or extent in self._wants.reserved:
                continue
            keep_s = self._keep_s(extent, now_s)
            if keep_s > 0:
                self._scheduler.call_later(keep_s, partial(self.give_later, (extent,)))
            else:
                ready.append(extent)
        if ready:
            self._later.difference_update(ready)
            self.begin(ready)

    def begin(self, extents: list[int]) -> None:
        """No new writes there; given when those in flight have landed."""
        token = object()
        for extent in extents:
            self._claims.held[extent] = False
            self._draining[extent] = token
        self._home.when_left(extents, lambda: self._at_rest(extents, token))

    def _at_rest(self, extents: list[int], token: object) -> None:
        """No write is in flight there: given once it is stored here, too, if it has to be."""

        def stored(error: OSError | None) -> None:
            if error is None:
                self._landed(extents, token)
            elif any(self._draining.get(extent) is token for extent in extents):
                self._home.unstored()

        if not (self.stores_first and self._home.store(joined(extents), stored)):
            self._landed(extents, token)

    def _landed(self, extents: Iterable[int], token: object) -> None:
        ready = [extent for extent in extents if self._draining.get(extent) is token]
        by_request: dict[int, list[int]] = {}
        for extent in ready:
            del self._draining[extent]
            by_request.setdefault(self._request_of.pop(extent, 0), []).append(extent)
            self._later.discard(extent)
        for request, part in by_request.items():
            self._grant(request, part)

    def _grant(self, request: int, extents: list[int]) -> None:
        """Extents of ours, none of which has a write in flight."""
        claims = self._claims
        if request:
            self._asked[request].difference_update(extents)
            self._changed(extents)
        dirt, copying = self._home.give(extents)
        self.unfree |= copying
        embargo = joined(extent for extent in extents if extent in self.unfree)
        for extent in extents:
            claims.lose(extent)
            claims.owed[extent] = True
            self.coveted.discard(extent)
        self.handovers += len(extents)
        sequence = self._send(request, joined(extents), (), embargo, dirt)
        self._grants.append((sequence, extents))
        # Hosts that came while it was being given have to ask for it again.
        for extent in extents:
            if extent in self._wants.waiters:
                self._wants.seek(extent)

    @property
    def has_enough(self) -> bool:
        """Whether so much is being given that the rest has to wait."""
        return len(self._draining) >= MOST_GIVEN or len(self._grants) >= MOST_GRANTS

    def is_asked_for(self, extent: int) -> bool:
        """Whether the other waits for it."""
        return extent in self._request_of

    def got(self, sequence: int) -> None:
        """The other has processed our GRANTs up to this one."""
        while self._grants and self._grants[0][0] <= sequence:
            for extent in self._grants.popleft()[1]:
                if self._claims.owed[extent]:
                    self._claims.owed[extent] = False
                    self._claims.other[extent] = True

    # -- ping-pong ------------------------------------------------------------------------------
    def _changed(self, extents: Iterable[int]) -> None:
        now_s = self._scheduler.time()
        for extent in extents:
            self._changes.setdefault(extent, deque(maxlen=MOST_CHANGES + 1)).append(now_s)

    def came(self, extents: Iterable[int]) -> None:
        """They have become ours because a host of ours needs them."""
        self._changed(extents)
        now_s = self._scheduler.time()
        self.coveted.update(extent for extent in extents if self._is_hot(extent, now_s))

    def _is_hot(self, extent: int, now_s: float) -> bool:
        changes = self._changes.get(extent)
        if changes is None or len(changes) <= MOST_CHANGES:
            return False
        return now_s - changes[0] <= CHANGES_S

    def _keep_s(self, extent: int, now_s: float) -> float:
        """For how much longer it stays here; 0 if it need not."""
        if not self._is_hot(extent, now_s):
            return 0.0
        return self._changes[extent][-1] + min(KEEP_S, 2 * self.round_trip_s) - now_s

    def tick(self) -> None:
        """Once a second: what changes hands no more is forgotten."""
        past_s = self._scheduler.time() - CHANGES_S
        self._changes = {e: when for e, when in self._changes.items() if when[-1] > past_s}

    # -- what is sent back ----------------------------------------------------------------------
    def when_at_rest(self, call: Callable[[], None]) -> None:
        """Call back when what is in flight here now has landed, unless the link goes first."""
        asked = self._asked  # of this connection

        def landed() -> None:
            if asked is self._asked:
                call()

        self._home.when_landed(landed)
