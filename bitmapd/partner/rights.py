"""Who may write where, extent by extent, while two nodes serve one primary (pure).

A node writes only where it has the right to: the extents of its own record, which the other node
holds as well.  It asks for a right with ADD and has it with GRANT.  It gives one when the other
asks, once no write of its hosts is in flight there, and says which blocks are not copied yet.  So
every place that may differ is named by both nodes, and two writes from two sides never meet.

Each extent is at each node in one of these states:

| state | bits | meaning |
| --- | --- | --- |
| none | - | neither this node's nor, as far as it knows, the other's |
| own | `own`, `held` | this node may write here |
| giving | `own` | the other waits: no new writes here, those in flight have to land |
| other | `other` | in the record of the other node |
| owed | `owed` | given, and the other has not said that it has it |

Beside the state: `want` and `guess` (an ADD of ours is under way, for a host's write or for a
prediction), `later` (the other asked, and has to wait until we have used what we asked for).

Invariants (A is this node, B the other; numbers of rules are those of docs/partner-protocol.md):
1. own(A) is a part of other(B) and owed(B) together, at every instant, whatever is lost.  Before
   an extent enters `own` the other has it in `other`; it leaves `own` before the message is sent
   that takes it out of there (rule 1).
2. An extent enters `own` when GRANT is processed, not when ADD is sent (rule 2).
3. What an ADD under way names is not in `own`, so nothing drops it (rule 3).
4. An extent is given when no write is in flight there (rule 4), with all its dirt (rule 5), and
   not before every write that waited for it has been submitted (rule 6).
5. Two ADDs that cross: node 1 keeps the other's until its own has been answered (rule 8).
6. A guess takes nothing that the other owns, wants or guesses (rule 9).
7. A right that was given unasked is not given again for an ADD that has crossed it (rule 15).
8. A message is checked as a whole before anything of it is applied.

Order on the wire: GOT, FREE and REMOVE go before whatever is sent behind them, so none of them
ever speaks of an older ownership than the message in front of it.

A crash loses all of this.  The process that comes next owns nothing (`node.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from typing import Protocol

from bitarray import bitarray

from bitmapd.media.base import Done, Scheduler
from bitmapd.partner.messages import (
    Add,
    Ask,
    Free,
    Got,
    Grant,
    Message,
    Remove,
    Runs,
    Status,
)
from bitmapd.partner.share import Shares, View, runs_of, zeros
from bitmapd.peer.frames import ErrorCode, PeerError
from bitmapd.record.geometry import Geometry

# Says whether the write has been submitted; if not, it waits for this node's own record.
Waiter = Callable[[], bool]

AT_REST, NEVER_HERE = 0, 1  # of STATUS
MOST_REQUESTS = 64  # of the other's that are taken at a time


class Stance(Enum):
    """What a place may be used for that this node does not own."""

    NOTHING = "nothing"  # not even what is owned counts: the process has met nobody yet
    CUT = "cut"  # no link: a right is waited for
    FROZEN = "frozen"  # views are being exchanged: rights do not change
    UP = "up"  # a right is asked for
    ALONE = "alone"  # everything is ours


class Home(Protocol):
    """The appliance around these rights; nothing here calls back from inside a call."""

    def send(self, message: Message) -> int:
        """Returns the sequence of its (last) frame."""

    def when_landed(self, call: Callable[[], None]) -> None:
        """Call back when every write of hosts that was submitted until now has ended."""

    def keep(self, runs: Runs) -> None:
        """They have become ours or the other's: they belong into the stored record."""

    def forget(self, runs: Runs) -> None:
        """They are in nobody's record any more."""

    def give(self, extents: Sequence[int]) -> tuple[Runs, set[int]]:
        """What of them is dirty, as runs of blocks, leaves this node; and of which extents a copy
        is still under way (`Rights.freed` tells when it has ended)."""

    def take_over(self, dirt: Runs, embargoed: Iterable[int]) -> None:
        """These blocks are dirty, and these extents must not be copied until `free`."""

    def free(self, extents: Iterable[int]) -> None: ...

    def free_all(self) -> None: ...

    def guessed(self, runs: Runs) -> None:
        """They have come into the record as the policy had predicted."""

    def refused(self, runs: Runs) -> None:
        """They have not."""

    def drop_clean(self, extents: Iterable[int]) -> None:
        """Those of them that are clean leave the record now (by `Rights.drop`)."""


class _Giving:
    """Extents that the other has asked for in one message, while their writes land."""

    __slots__ = ("extents",)

    def __init__(self, extents: list[int]) -> None:
        self.extents = extents


class Rights:
    """See the module docstring.  `node` is 1 or 2."""

    def __init__(self, geometry: Geometry, node: int, scheduler: Scheduler, home: Home) -> None:
        self._geometry = geometry
        self._node = node
        self._scheduler = scheduler
        self._home = home
        size = geometry.extents
        self.own, self.held = zeros(size), zeros(size)
        self.other, self.owed = zeros(size), zeros(size)
        self.own_extents = 0
        self.stance = Stance.NOTHING
        self.most_requests = 1  # of ours that the other takes at a time
        self._flush_due = False
        self._waiters: dict[int, list[Waiter]] = {}
        self._reserved: dict[int, int] = {}  # extent -> granted, and waits for our own record
        self._reads: list[tuple[int, int, Done]] = []
        self._forget_requests()
        self._unfree: set[int] = set()  # given away, and a copy of ours may still land there
        self._deferred: set[int] = set()  # to be dropped once rights may change again
        self._on_given: Callable[[], None] | None = None
        self._coveted: set[int] = set()  # the other has asked about them: dropped when clean
        self.handovers = 0
        self.refused_guesses = 0
        self.asks = 0
        self.messages = 0  # ADD, ASK and REMOVE that were sent

    def _forget_requests(self) -> None:
        """Nothing is retried on another connection."""
        self._request = 0
        self._their_request = 0
        self._want: set[int] = set()
        self._guess: set[int] = set()
        self._open: dict[int, set[int]] = {}  # our requests -> what they have not been told of
        self._asked: dict[int, set[int]] = {}  # the other's requests -> what we have not answered
        self._giving: dict[int, _Giving] = {}
        self._later: set[int] = set()
        self._request_of: dict[int, int] = {}  # extent of the other's request -> its number
        self._grants: deque[tuple[int, list[int]]] = deque()  # sequence, extents: GOT is to come
        self._got: int | None = None  # to be said
        self._out_need: set[int] = set()
        self._out_guess: set[int] = set()
        self._out_remove: set[int] = set()
        self._out_free: set[int] = set()
        self._status_due: dict[int, list[tuple[int, int, Done]]] = {}  # ASK -> reads that wait
        self._unasked_reads = list(self._reads)

    # -- questions ------------------------------------------------------------------------
    def may_write(self, first: int, stop: int) -> bool:
        """Whether extents [first, stop) are ours and nobody waits for them."""
        if stop - first == 1:
            return bool(self.held[first])
        return self.held.find(False, first, stop) < 0

    def owns(self, extent: int) -> bool:
        return bool(self.own[extent])

    def may_read(self, first: int, stop: int) -> bool:
        """Whether nobody has to be asked before extents [first, stop) are read."""
        if self.stance is Stance.NOTHING or self.stance is Stance.FROZEN:
            return False
        if stop - first == 1:
            return not (self.other[first] or self.owed[first])
        return not (
            self.other.find(True, first, stop) >= 0 or self.owed.find(True, first, stop) >= 0
        )

    @property
    def waiting(self) -> int:
        """Requests of hosts that wait for the other node."""
        return sum(map(len, self._waiters.values())) + len(self._reads)

    @property
    def pending_extents(self) -> int:
        """Extents that hosts' writes wait for."""
        return len(self._waiters)

    @property
    def unfree(self) -> Runs:
        """Extents that are not ours, where a copy of ours is under way."""
        return _runs(extent for extent in self._unfree if not self.own[extent])

    def is_pending(self, extent: int) -> bool:
        """Whether it is not ours, but asked for or waited for."""
        return extent in self._want or extent in self._guess or extent in self._waiters

    def view(self, stored: bitarray, *, fresh: bool, volatile: bool) -> View:
        """What to send in an exchange, a copy."""
        return View(fresh, self.own.copy(), self.owed.copy(), stored.copy(), volatile)

    # -- what this node wants -----------------------------------------------------------------
    def obtain(self, first: int, stop: int) -> list[int]:
        """Those of extents [first, stop) that have to be waited for; alone nobody is asked."""
        missing = list(_unset(self.held, first, stop))
        if missing and self.stance is Stance.ALONE:
            self._gain(missing)
            return []
        return list(_each(missing))

    def want(self, extent: int, waiter: Waiter) -> None:
        """Call `waiter` when the extent is ours; it is not, or it is being given."""
        self._waiters.setdefault(extent, []).append(waiter)
        self._seek(extent)

    def _seek(self, extent: int) -> None:
        """Do what brings a right that is waited for."""
        if self.stance is Stance.ALONE:
            self._gain([(extent, extent + 1)])
            self._serve(extent)
        elif self.stance is Stance.UP and not (extent in self._giving or extent in self._want):
            if extent in self._guess:
                if extent not in self._out_guess:
                    return  # it is asked for already; a refusal leads back to here
                self._out_guess.discard(extent)
                self._guess.discard(extent)
            self._want.add(extent)
            self._out_need.add(extent)
            self._flush_soon()

    def _gain(self, runs: Iterable[tuple[int, int]]) -> None:
        """These are ours from now on."""
        for first, stop in runs:
            self.own_extents += stop - first - self.own.count(True, first, stop)
            self.own[first:stop] = self.held[first:stop] = True

    def _lose(self, extent: int) -> None:
        self.own_extents -= 1
        self.own[extent] = self.held[extent] = False

    def guess(self, runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Ask, with the ADD of this turn, for those of these extents that may be had without taking
        them from the other.  Returns what of the runs is ours or asked for."""
        found: list[tuple[int, int]] = []
        for first, stop in runs:
            if self.stance is Stance.ALONE:
                self._gain([(first, stop)])
                found.append((first, stop))
                continue
            ours = []
            for extent in range(first, stop):
                if self.own[extent] or extent in self._want or extent in self._guess:
                    ours.append(extent)
                elif self.stance is Stance.UP and not (self.other[extent] or self.owed[extent]):
                    self._guess.add(extent)
                    self._out_guess.add(extent)
                    ours.append(extent)
            found.extend(_runs(ours))
        return found

    def release(self, extent: int) -> None:
        """A write that was granted here, and waited for our own record, has been submitted or has
        failed."""
        self._reserved[extent] -= 1
        if not self._reserved[extent]:
            del self._reserved[extent]
            if extent in self._later:
                self._later.discard(extent)
                self._begin_giving([extent])

    def drop(self, extents: Iterable[int]) -> list[int]:
        """These leave the record: they are clean.  Returns those that have left; the others do
        once rights may change again (`thaw`)."""
        gone = []
        for extent in extents:
            if not self.held[extent]:
                continue
            if self.stance is Stance.FROZEN:
                self._deferred.add(extent)
                continue
            gone.append(extent)
            self._lose(extent)
            self._coveted.discard(extent)
            if self.stance is Stance.UP:
                self._out_remove.add(extent)
                self._flush_soon()
        return gone

    def ask(self, first: int, stop: int, go: Done) -> None:
        """Call `go` when extents [first, stop) may be read."""
        read = (first, stop, go)
        self._reads.append(read)
        if self.stance is Stance.UP:
            self._unasked_reads.append(read)
            self._flush_soon()

    def when_given(self, call: Callable[[], None]) -> None:
        """Call back once nothing is ours, owed or asked for, and no copy of ours is under way: for
        as long as the link holds."""
        self._on_given = call
        self._look_whether_given()

    def _look_whether_given(self) -> None:
        busy = self.own_extents or self._unfree or self._want or self._guess or self._open
        if self._on_given is not None and not busy and not self.owed.any():
            call, self._on_given = self._on_given, None
            self._scheduler.call_soon(call)

    def hand_over(self, extents: Iterable[int]) -> None:
        """Give these, unasked, with all their dirt."""
        ready = [e for e in extents if self.held[e] and e not in self._reserved]
        if self.stance is Stance.UP and ready:
            self._begin_giving(ready)

    def freed(self, extents: Iterable[int]) -> None:
        """Copies of ours there, under way when they were given, have ended."""
        gone = list(extents)
        self._unfree.difference_update(gone)
        self._home.free([extent for extent in gone if self.own[extent]])
        if self.stance in (Stance.UP, Stance.FROZEN):
            self._out_free.update(extent for extent in gone if not self.own[extent])
            self._flush_soon()
        self._look_whether_given()

    def tick(self) -> None:
        """Once a second: what the other has asked about is dropped once it is clean."""
        if self._coveted and self.stance is Stance.UP:
            self._home.drop_clean(sorted(self._coveted))

    # -- what is sent -------------------------------------------------------------------------
    def _flush_soon(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self._scheduler.call_soon(self.flush)

    def flush(self) -> None:
        """Send what has gathered in this turn of the loop."""
        self._flush_due = False
        if self.stance is Stance.FROZEN:
            self._send_free()
        if self.stance is not Stance.UP:
            return
        if (self._out_need or self._out_guess) and self._may_request:
            self._send_add()
        self._send_first()
        if self._unasked_reads and self._may_request:
            self._send_ask()

    @property
    def _may_request(self) -> bool:
        return len(self._open) + len(self._status_due) < self.most_requests

    def _send_first(self) -> None:
        """What must not be overtaken by anything that is sent later."""
        if self._got is not None:
            sequence, self._got = self._got, None
            self._home.send(Got(sequence))
        self._send_free()
        if self._out_remove:
            removed, self._out_remove = self._out_remove, set()
            self.messages += 1
            self._home.send(Remove(_runs(removed)))

    def _send_free(self) -> None:
        if self._out_free:
            free, self._out_free = self._out_free, set()
            self._home.send(Free(_runs(free)))

    def _send_add(self) -> None:
        if self._got is not None:
            sequence, self._got = self._got, None
            self._home.send(Got(sequence))
        self._send_free()
        need, self._out_need = self._out_need, set()
        guess, self._out_guess = self._out_guess - need, set()
        removed, self._out_remove = self._out_remove, set()
        self._request += 1
        self._open[self._request] = need | guess
        self.messages += 1
        self._home.send(Add(self._request, _runs(need), _runs(guess), _runs(removed)))

    def _send_ask(self) -> None:
        reads, self._unasked_reads = self._unasked_reads, []
        still = [read for read in reads if not self.may_read(read[0], read[1])]
        self._let_read(read for read in reads if read not in still)
        if not still:
            return
        self._request += 1
        self._status_due[self._request] = still
        extents: set[int] = set()
        for first, stop, _ in still:
            extents.update(range(first, stop))
        blocks = tuple(self._geometry.extent_blocks(*run) for run in _runs(extents))
        self.asks += len(still)
        self.messages += 1
        self._home.send(Ask(self._request, blocks))

    # -- what is received ---------------------------------------------------------------------
    def added(self, message: Add) -> None:
        """The other asks for extents."""
        self._check_request(message.request)
        needed, predicted = list(_each(message.needed)), list(_each(message.predicted))
        for extent in needed:
            if extent in self._request_of:
                raise PeerError(ErrorCode.ANSWER, f"extent {extent} has been asked for already")
        if set(needed) & set(predicted):
            raise PeerError(ErrorCode.RUNS, "an extent is needed and predicted at once")
        self._check_removal(message.removed)
        self._remove(message.removed)
        granted: list[int] = []
        to_give: list[int] = []
        unanswered: set[int] = set()
        refused: list[int] = []
        for extent in needed:
            if self.owed[extent]:
                continue  # the GRANT that is on its way is the answer
            if self.own[extent] or (extent in self._want and self._node == 1):
                unanswered.add(extent)
                self._request_of[extent] = message.request
                if self.own[extent] and extent not in self._reserved and self.held[extent]:
                    to_give.append(extent)
                else:
                    self._later.add(extent)
            else:
                granted.append(extent)
        for extent in predicted:
            if self.owed[extent]:
                continue
            if self.own[extent] or extent in self._want or extent in self._guess:
                refused.append(extent)
            else:
                granted.append(extent)
        self._asked[message.request] = unanswered
        if granted or refused or not unanswered:
            self._answer(message.request, granted, refused)
        if to_give:
            self._begin_giving(to_give)

    def _check_request(self, request: int) -> None:
        if request <= self._their_request:
            raise PeerError(ErrorCode.ANSWER, f"request {request} does not follow the last one")
        if len(self._asked) >= MOST_REQUESTS:
            raise PeerError(ErrorCode.BUSY, f"more than {MOST_REQUESTS} requests at a time")
        self._their_request = request

    def _answer(self, request: int, granted: list[int], refused: list[int]) -> None:
        """These are nobody's, or the other's already: into its record, then GRANT."""
        runs = _runs(granted)
        for first, stop in runs:
            self.other[first:stop] = True
        self._out_remove.difference_update(granted)
        self._home.keep(runs)
        self._send_grant(request, runs, _runs(refused), (), ())

    def _send_grant(
        self, request: int, granted: Runs, refused: Runs, embargo: Runs, dirt: Runs
    ) -> int:
        last = request != 0 and not self._asked[request]
        if last:
            del self._asked[request]
        self._send_first()
        return self._home.send(Grant(request, granted, refused, embargo, dirt, last))

    def _begin_giving(self, extents: list[int]) -> None:
        giving = _Giving(extents)
        for extent in extents:
            self.held[extent] = False
            self._giving[extent] = giving
        self._home.when_landed(lambda: self._landed(giving))

    def _landed(self, giving: _Giving) -> None:
        extents = [extent for extent in giving.extents if self._giving.get(extent) is giving]
        if extents:
            for extent in extents:
                del self._giving[extent]
            self._grant(extents)

    def _grant(self, extents: Iterable[int]) -> None:
        """Give extents of ours, none of which has a write in flight."""
        by_request: dict[int, list[int]] = {}
        for extent in sorted(extents):
            by_request.setdefault(self._request_of.pop(extent, 0), []).append(extent)
        for request, part in by_request.items():
            if request:
                self._asked[request].difference_update(part)
            dirt, copying = self._home.give(part)
            self._unfree |= copying
            embargo = _runs(extent for extent in part if extent in self._unfree)
            for extent in part:
                self._lose(extent)
                self.owed[extent] = True
                self._coveted.discard(extent)
            self.handovers += len(part)
            sequence = self._send_grant(request, _runs(part), (), embargo, dirt)
            self._grants.append((sequence, part))
            # Hosts that came while it was being given have to ask for it again.
            for extent in part:
                if extent in self._waiters:
                    self._seek(extent)

    def granted(self, message: Grant, sequence: int) -> None:
        """The other has answered, or gives unasked."""
        request = message.request
        if request and request not in self._open:
            raise PeerError(ErrorCode.ANSWER, f"an answer to request {request}, which is not open")
        granted, refused = list(_each(message.granted)), list(_each(message.refused))
        for extent in granted:
            asked = extent in self._want or extent in self._guess
            if self.own[extent] or not (asked or request == 0):
                raise PeerError(ErrorCode.ANSWER, f"extent {extent} was granted unasked")
        for extent in refused:
            if extent not in self._open.get(request, ()):
                raise PeerError(ErrorCode.ANSWER, f"extent {extent} was refused unasked")
        self._got = sequence
        self._flush_soon()
        if request:
            self._open[request].difference_update(granted, refused)
            if message.last:
                del self._open[request]
        guesses = _runs(extent for extent in granted if extent in self._guess)
        for extent in granted:
            self._want.discard(extent)
            self._guess.discard(extent)
            self.other[extent] = self.owed[extent] = False
        self._gain(message.granted)
        self._home.keep(message.granted)
        embargo = set(_each(message.embargo)) & set(granted)
        embargo.update(extent for extent in granted if extent in self._unfree)
        self._home.take_over(message.dirt, embargo)
        for extent in granted:
            self._serve(extent)
        asked_for = [e for e in granted if e in self._later and e not in self._reserved]
        if asked_for:
            self._later.difference_update(asked_for)
            self._begin_giving(asked_for)
        if guesses:
            self._home.guessed(guesses)
        self._not_guessed(refused)

    def _not_guessed(self, refused: Iterable[int]) -> None:
        lost = [extent for extent in refused if extent in self._guess]
        self._guess.difference_update(lost)
        if lost:
            self.refused_guesses += len(lost)
            self._home.refused(_runs(lost))
            for extent in lost:
                if extent in self._waiters:
                    self._seek(extent)
            self._home.forget(self._nobodys(lost))

    def _nobodys(self, extents: Iterable[int]) -> Runs:
        return _runs(
            extent
            for extent in extents
            if not (self.own[extent] or self.other[extent] or self.owed[extent])
            and not self.is_pending(extent)
        )

    def _serve(self, extent: int) -> None:
        """It is ours: whoever waited for it goes first (rule 6)."""
        still = [waiter for waiter in self._waiters.pop(extent, ()) if not waiter()]
        if still:
            self._reserved[extent] = self._reserved.get(extent, 0) + len(still)

    def got(self, message: Got) -> None:
        """The other has processed our GRANTs up to a sequence."""
        while self._grants and self._grants[0][0] <= message.sequence:
            for extent in self._grants.popleft()[1]:
                if self.owed[extent]:
                    self.owed[extent] = False
                    self.other[extent] = True
        self._look_whether_given()

    def removed(self, message: Remove) -> None:
        self._check_removal(message.runs)
        self._remove(message.runs)

    def _check_removal(self, runs: Runs) -> None:
        for first, stop in runs:
            for bits in (self.own, self.owed):
                at = bits.find(True, first, stop)
                if at >= 0:
                    raise PeerError(ErrorCode.ANSWER, f"extent {at} was removed by the other node")

    def _remove(self, runs: Runs) -> None:
        for first, stop in runs:
            self.other[first:stop] = False
        self._home.forget(self._nobodys(_each(runs)))
        if runs:
            self._look_at_reads()

    def free(self, message: Free) -> None:
        """No copy of the other's is under way there any more."""
        self._home.free([e for e in _each(message.runs) if e not in self._unfree])

    def asked(self, message: Ask) -> None:
        """A host of the other reads there: it waits until what is in flight here has landed."""
        self._check_request(message.request)
        per = self._geometry.blocks_per_extent
        extents: set[int] = set()
        for first, stop in message.blocks:
            extents.update(range(first // per, (stop - 1) // per + 1))
        mine = [extent for extent in sorted(extents) if self.own[extent]]
        if not mine:
            self._send_first()
            self._home.send(Status(message.request, NEVER_HERE, (), True))
            return
        self._coveted.update(mine)
        token = self._status_due  # of this connection

        def landed() -> None:
            if token is not self._status_due:
                return
            self._home.drop_clean(mine)
            given_up = _runs(extent for extent in mine if extent in self._out_remove)
            self._out_remove.difference_update(_each(given_up))
            self._send_first()
            self._home.send(Status(message.request, AT_REST, given_up, True))

        self._home.when_landed(landed)

    def status(self, message: Status) -> None:
        """What was asked about may be read."""
        reads = self._status_due.get(message.request)
        if reads is None:
            raise PeerError(ErrorCode.ANSWER, f"a status that nobody asked for: {message.request}")
        self._check_removal(message.given_up)
        del self._status_due[message.request]
        self._remove(message.given_up)
        self._let_read(reads)
        if self._unasked_reads:
            self._flush_soon()

    def _let_read(self, reads: Iterable[tuple[int, int, Done]]) -> None:
        for read in list(reads):
            if read in self._reads:
                self._reads.remove(read)
                read[2](None)

    def _look_at_reads(self) -> None:
        """Some may need no answer any more; those that have asked wait for it all the same."""
        free = [read for read in self._unasked_reads if self.may_read(read[0], read[1])]
        self._unasked_reads = [read for read in self._unasked_reads if read not in free]
        self._let_read(free)

    # -- what we are to one another (called by `node`) -------------------------------------------
    def cut(self) -> None:
        """The link is lost: no right changes by that (rule 10)."""
        guessed = self._guess
        self._forget_requests()
        self.held |= self.own
        self.stance = Stance.CUT
        if guessed:
            self._home.refused(_runs(guessed))
            self._home.forget(self._nobodys(guessed))

    def freeze(self) -> None:
        """Views are exchanged: `own` and `owed` stay as they are until `thaw`."""
        self.stance = Stance.FROZEN

    def learn(self, runs: Runs) -> None:
        """Knowledge grows: these may be the other's (rule 11)."""
        for first, stop in runs:
            for begin, end in _unset(self.own, first, stop):
                self.other[begin:end] = True
                self._home.keep(((begin, end),))

    def owe(self, runs: Runs) -> None:
        """Will be ours; a second cut must not lose that."""
        for first, stop in runs:
            for begin, end in _unset(self.own, first, stop):
                self.other[begin:end] = False
                self.owed[begin:end] = True
                self._home.keep(((begin, end),))

    def thaw(self, shares: Shares, embargo: Runs) -> None:
        """Both have learnt: rights change as both have computed, and requests begin anew."""
        gone = (self.other | self.owed) & ~(shares.own | shares.other)
        self.own = shares.own.copy()
        self.held = shares.own.copy()
        self.own_extents = self.own.count()
        self.other = shares.other.copy()
        self.owed = zeros(len(self.own))
        self.stance = Stance.UP
        self._home.forget(self._nobodys(_each(runs_of(gone))))
        self._home.keep(runs_of(self.own | self.other))
        ours = {e for e in _each(embargo) if self.own[e]}
        ours.update(e for e in self._unfree if self.own[e])
        self._home.free_all()
        self._home.take_over(self._blocks(runs_of(shares.dirty)), ours)
        self._begin_anew()

    def absorb(self) -> None:
        """The other's process is dead: what was or may have been its own is ours, and dirty."""
        taken = self.other | self.owed
        self._gain(runs_of(taken))
        self.other, self.owed = zeros(len(taken)), zeros(len(taken))
        self._home.free_all()
        ours = [extent for extent in self._unfree if self.own[extent]]
        self._home.take_over(self._blocks(runs_of(taken)), ours)
        for extent in [extent for extent in self._waiters if self.own[extent]]:
            self._serve(extent)

    def alone(self) -> None:
        """The other can write no more: nobody has to be asked any longer."""
        self._forget_requests()
        self.absorb()
        self.held |= self.own
        self.stance = Stance.ALONE
        self._begin_anew()

    def adopt(self, runs: Runs) -> None:
        """These are ours and dirty, as a single appliance's are: there was never anybody else."""
        self._gain(runs)
        self._home.take_over(self._blocks(runs), ())

    def _begin_anew(self) -> None:
        deferred, self._deferred = self._deferred, set()
        for extent in list(self._waiters):
            if self.held[extent]:
                self._serve(extent)
            else:
                self._seek(extent)
        self._unasked_reads = list(self._reads)
        self._look_at_reads()
        if self._unasked_reads:
            self._flush_soon()
        kept = [extent for extent in sorted(deferred) if self.held[extent]]
        if kept:
            self._home.guessed(_runs(kept))  # the policy believes that they are gone
            self._home.drop_clean(kept)

    def _blocks(self, extents: Runs) -> Runs:
        return tuple(self._geometry.extent_blocks(*run) for run in extents)


def _each(runs: Iterable[tuple[int, int]]) -> Iterator[int]:
    for first, stop in runs:
        yield from range(first, stop)


def _runs(extents: Iterable[int]) -> Runs:
    """Maximal runs of a set of extents, in order."""
    found: list[tuple[int, int]] = []
    for extent in sorted(set(extents)):
        if found and found[-1][1] == extent:
            found[-1] = (found[-1][0], extent + 1)
        else:
            found.append((extent, extent + 1))
    return tuple(found)


def _unset(bits: bitarray, first: int, stop: int) -> Iterator[tuple[int, int]]:
    """Maximal runs of zeros in [first, stop)."""
    while (first := bits.find(False, first, stop)) >= 0:
        end = bits.find(True, first, stop)
        end = stop if end < 0 else end
        yield first, end
        first = end
