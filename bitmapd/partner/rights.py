"""Who may write where, extent by extent, while two nodes serve one primary (pure).

A node writes only where it has the right to: the extents of its own record, which the other node
holds as well.  It asks for a right with ADD and has it with GRANT.  It gives one when the other
asks, once no write of its hosts is in flight there, and says which blocks are not copied yet.  So
every place that may differ is named by both nodes, and two writes from two sides never meet.

Here the parts come together: `claims` (the state of each extent), `wants` (what this node asks
for), `giving` (what the other asks for), `reads` (of places that are the other's), `outbox` (the
order in which things are said).  Here, too, is what becomes of rights when the link ends, when
views are exchanged, and when the other node is dead.

Invariants (A is this node, B the other; numbers of rules are those of docs/partner-protocol.md):
1. own(A) is a part of other(B) and owed(B) together, at every instant, whatever is lost.  Before
   an extent enters `own` the other has it in `other`; it leaves `own` before the message is sent
   that takes it out of there (rule 1).
2. A cut takes no right away and retries nothing: all requests end with their link, and hosts that
   wait are looked at again from the beginning on the next one (rule 10).
3. In an exchange knowledge grows first: `learn` and `owe` only add to what is known, and rights
   change in `thaw`, when the other knows as well (rule 11).
4. A message is checked as a whole before anything of it is applied.

A crash loses all of this.  The process that comes next owns nothing (`node.py`).
"""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice

from bitarray import bitarray

from bitmapd.media.base import Done, Scheduler
from bitmapd.partner.claims import Claims, Home, Stance
from bitmapd.partner.giving import MOST_GIVEN, MOST_REQUESTS, Giving
from bitmapd.partner.messages import Add, Ask, Free, Got, Grant, Remove, Status
from bitmapd.partner.outbox import Outbox
from bitmapd.partner.reads import AT_REST, NEVER_HERE, Read, Reads
from bitmapd.partner.share import Shares, View
from bitmapd.partner.wants import Waiter, Wants
from bitmapd.peer.payloads import Run, Runs
from bitmapd.record.extents import bits_of, each, joined, runs_of, unset
from bitmapd.record.geometry import Geometry

__all__ = ["AT_REST", "MOST_REQUESTS", "NEVER_HERE", "Home", "Rights", "Stance", "Waiter"]


class Rights:
    """See the module docstring.  `node` is 1 or 2.

    `cut_patience_s`: for how long a request of a host waits in a cut before it ends with EIO; None:
    for ever."""

    def __init__(self, geometry: Geometry, node: int, scheduler: Scheduler, home: Home) -> None:
        self._scheduler = scheduler
        self._home = home
        self._claims = claims = Claims(geometry, node)
        self._outbox = Outbox(scheduler, home, self.flush)
        self._wants = Wants(claims, self._outbox, home)
        self._giving = Giving(claims, self._wants, self._outbox, scheduler, home)
        self._reads = Reads(claims, self._giving, self._outbox, home)
        self.own, self.held = claims.own, claims.held
        self.other, self.owed = claims.other, claims.owed
        self.may_read = claims.may_read
        self.most_requests = 1  # of ours that the other takes at a time
        self.has_room: Callable[[], bool] = lambda: True  # the link, for what need not be said now
        self.cut_patience_s: float | None = None
        self.on_stuck: Callable[[], None] = _nothing  # a write waits for the end of a cut
        self._cut_since_s = math.inf
        self._refusal: OSError | None = None
        self._deferred: set[int] = set()  # to be dropped once rights may change again
        self._on_given: Callable[[], None] | None = None

    # -- questions ------------------------------------------------------------------------------
    def owns(self, extent: int) -> bool:
        return bool(self.own[extent])

    @property
    def stance(self) -> Stance:
        return self._claims.stance

    @property
    def owned_alone(self) -> bitarray:
        """What this node has owned without the other since it went alone; or owns."""
        found = self._claims.owned_alone
        return self.own if found is None else found

    @property
    def own_extents(self) -> int:
        return self._claims.own_extents

    @property
    def waiting(self) -> int:
        """Requests of hosts that wait for the other node."""
        return sum(map(len, self._wants.waiters.values())) + len(self._reads)

    @property
    def pending_extents(self) -> int:
        """Extents that hosts' writes wait for."""
        return len(self._wants.waiters)

    @property
    def unfree(self) -> Runs:
        """Extents that are not ours, where a copy of ours is under way."""
        return joined(extent for extent in self._giving.unfree if not self.own[extent])

    def is_pending(self, extent: int) -> bool:
        """Whether it is not ours, but asked for or waited for."""
        return self._wants.is_pending(extent)

    def view(self, stored: bitarray, *, fresh: bool, volatile: bool) -> View:
        """What to send in an exchange, a copy."""
        return View(fresh, self.own.copy(), self.owed.copy(), stored.copy(), volatile)

    # -- counters -------------------------------------------------------------------------------
    @property
    def handovers(self) -> int:
        return self._giving.handovers

    @property
    def refused_guesses(self) -> int:
        return self._wants.refused_guesses

    @property
    def asks(self) -> int:
        return self._reads.asks

    @property
    def messages(self) -> int:
        """ADD, ASK and REMOVE that were sent."""
        return self._outbox.messages

    def round_trip(self, seconds: float) -> None:
        """How long a message and its answer take just now."""
        self._giving.round_trip_s = seconds

    def store_first(self, on: bool) -> None:
        """Whether what is granted has to be in this node's stored record before."""
        self._giving.stores_first = on

    # -- what this node wants -------------------------------------------------------------------
    def obtain(self, first: int, stop: int) -> list[int]:
        """Those of extents [first, stop) that have to be waited for; alone nobody is asked."""
        missing = list(unset(self.held, first, stop))
        if missing and self.stance is Stance.ALONE:
            self._claims.gain(missing)
            return []
        waiting = list(each(missing))
        if self._claims.goes_on:
            self._claims.gain(joined(filter(self._claims.may_take, waiting)))
            waiting = [extent for extent in waiting if not self.own[extent]]
        return waiting

    def want(self, extent: int, waiter: Waiter) -> None:
        """Call `waiter` when the extent is ours; it is not, or it is being given."""
        if self._refusal is not None:
            self._scheduler.call_soon(waiter, self._refusal)
        else:
            self._wants.wait(extent, waiter, self._scheduler.time())
            if self.stance is Stance.CUT:
                self._scheduler.call_soon(self.on_stuck)

    def want_anew(self, extent: int, waiter: Waiter) -> None:
        """Call `waiter` once the nodes have come together again, or at `look_again`, if the extent
        is ours then; else as for any that is not."""
        if self._refusal is not None:
            self._scheduler.call_soon(waiter, self._refusal)
        else:
            self._wants.wait_anew(extent, waiter, self._scheduler.time())

    def look_again(self) -> None:
        """Whoever waits for an extent that is ours need not wait any longer."""
        for extent in [extent for extent in self._wants.waiters if self.held[extent]]:
            self._wants.serve(extent)

    @property
    def goes_on(self) -> bool:
        return self._claims.goes_on

    def go_on(self) -> None:
        """Hosts take what is nobody's, as far as is known here, until the link is back."""
        self._claims.goes_on = True
        for extent in list(self._wants.waiters):
            self._wants.seek(extent)

    def guess(self, runs: Iterable[Run]) -> list[Run]:
        """Ask, with the ADD of this turn, for those of these extents that may be had without taking
        them from the other.  Returns what of the runs is ours or asked for."""
        return self._wants.guess(runs)

    def release(self, extent: int) -> None:
        """A write that was granted here, and waited for our own record, has been submitted or has
        failed."""
        if self._wants.release(extent):
            self._giving.give_later((extent,))

    def drop(self, extents: Iterable[int]) -> list[int]:
        """These leave the record: they are clean.  Returns those that have left at once.  The rest
        do so once rights may change again (`thaw`), or by being given, if the other waits for them;
        and not at all where a write of a host is just about to be submitted."""
        gone: list[int] = []
        asked_for: list[int] = []
        for extent in extents:
            if not self.held[extent] or extent in self._wants.reserved:
                continue
            if self.stance is Stance.FROZEN:
                self._deferred.add(extent)
            elif self._giving.is_asked_for(extent):
                asked_for.append(extent)
            else:
                gone.append(extent)
                self._claims.lose(extent)
                self._giving.coveted.discard(extent)
                if self.stance is Stance.UP:
                    self._outbox.remove(extent)
        if asked_for:
            self._giving.begin(asked_for)
        return gone

    def ask(self, first: int, stop: int, go: Done) -> None:
        """Call `go` when extents [first, stop) may be read."""
        if self._refusal is not None:
            self._scheduler.call_soon(go, self._refusal)
        else:
            self._reads.wait(Read(first, stop, go, self._scheduler.time()))

    def give_all(self, call: Callable[[], None]) -> None:
        """Give what is ours, and whatever may yet come, `MOST_GIVEN` extents at a time, so that the
        link and hosts do not wait for the next million.  Call back once nothing is ours, owed or
        asked for, and no copy of ours is under way; never, if the link goes first."""
        self._on_given = call
        self._give_on()

    def _give_on(self) -> None:
        if self._on_given is not None:
            if not self._giving.has_enough:
                reserved = self._wants.reserved
                ready = (extent for extent in each(runs_of(self.held)) if extent not in reserved)
                self.hand_over(islice(ready, MOST_GIVEN))
            self._look_whether_given()

    def _look_whether_given(self) -> None:
        busy = self.own_extents or self._giving.unfree or self._wants.any or self.owed.any()
        if self._on_given is not None and not busy:
            call, self._on_given = self._on_given, None
            self._scheduler.call_soon(self._say_given, call, self._outbox.connection)

    def _say_given(self, call: Callable[[], None], connection: object) -> None:
        if connection is self._outbox.connection:
            call()

    def hand_over(self, extents: Iterable[int]) -> None:
        """Give these, unasked, with all their dirt."""
        ready = [e for e in extents if self.held[e] and e not in self._wants.reserved]
        if self.stance is Stance.UP and ready:
            self._giving.begin(ready)

    def freed(self, extents: Iterable[int]) -> None:
        """Copies of ours there, under way when they were given, have ended."""
        gone = list(extents)
        self._giving.unfree.difference_update(gone)
        self._home.free([extent for extent in gone if self.own[extent]])
        if self.stance in (Stance.UP, Stance.FROZEN):
            self._outbox.free(extent for extent in gone if not self.own[extent])
        self._look_whether_given()

    # -- growing --------------------------------------------------------------------------------
    @property
    def size_bytes(self) -> int:
        return self._claims.geometry.size_bytes

    @property
    def short_extent(self) -> int | None:
        """The extent in which the volume ends, if it does not end with it."""
        return self._claims.geometry.short_extent

    def reserve(self, extent: int) -> bool:
        """Keep it here until `release`; false if it is not ours, or is being given."""
        if not self.held[extent]:
            return False
        self._wants.reserved[extent] = self._wants.reserved.get(extent, 0) + 1
        return True

    def grow(self, size_bytes: int, *, mine: bool) -> None:
        """The volume is larger from now on; the gate and the stored record are already.  What has
        come belongs to this node, dirty, if it is `mine` or there is nobody else; else it counts as
        the other's.  So does the extent of the old end, unless it is ours; of a process that has
        met nobody the stored record says that (`Surroundings.stored`)."""
        claims, old, short = self._claims, self._claims.geometry, self.short_extent
        claims.grow(replace(old, size_bytes=size_bytes))
        first, stop = old.extents if short is None else short, claims.geometry.extents
        if self.stance is Stance.NOTHING:
            self._home.forget(((old.extents, stop),))
        elif mine or self.stance is Stance.ALONE:
            claims.gain([(first, stop)])
            self._home.keep(((first, stop),))
        else:
            self._home.keep(claims.know(((first, stop),), self.other))
        ours = tuple((first + start, first + end) for start, end in runs_of(self.own[first:]))
        new = old.size_bytes // old.block_bytes  # the first block that has something new
        dirt = tuple((max(start, new), end) for start, end in claims.blocks(ours))
        self._home.take_over(dirt, ())

    def tick(self) -> None:
        """Once a second: what the other has asked about is dropped once it is clean, and who has
        waited for too long waits no more."""
        self._giving.tick()
        if self._giving.coveted and self.stance is Stance.UP:
            self._home.drop_clean(sorted(self._giving.coveted))
        self._give_on()
        self.expire(self._scheduler.time())

    def expire(self, now_s: float) -> None:
        """End requests of hosts that have waited in a cut for longer than `cut_patience_s`."""
        patience_s = self.cut_patience_s
        if patience_s is None or self.stance is not Stance.CUT:
            return
        if now_s - self._cut_since_s >= patience_s:
            self._fail(now_s - patience_s, "the partner is not there")

    def _fail(self, before_s: float, why: str) -> OSError:
        error = OSError(errno.EIO, why)
        self._reads.expire(before_s, error)
        self._wants.expire(before_s, error)
        return error

    def flush(self) -> None:
        """Send what has gathered in this turn of the loop.  While the link is full it gathers on,
        in sets of extents, and `flush` is called when there is room again; answers, of which there
        are no more than the other has asked for, do not wait."""
        if not self.has_room():
            return
        if self.stance is Stance.FROZEN:
            self._outbox.send_free()
        if self.stance is not Stance.UP:
            return
        if self._may_request:
            self._wants.send()
        self._outbox.send_first()
        if self._may_request:
            self._reads.send()

    @property
    def _may_request(self) -> bool:
        return len(self._wants.open) + len(self._reads.due) < self.most_requests

    # -- what is received -----------------------------------------------------------------------
    def added(self, message: Add) -> None:
        """The other asks for extents."""
        self._giving.check(message)
        self._claims.check_removal(message.removed)
        self._giving.next_request(message.request)
        self._remove(message.removed)
        self._giving.asked(message)

    def granted(self, message: Grant, sequence: int) -> None:
        """The other has answered, or gives unasked."""
        self._wants.answered(message)
        granted = list(each(message.granted))
        # What was nobody's is not owed to us, and the other waits for no GOT.
        if any(self._claims.is_others(extent) for extent in granted):
            self._outbox.got(sequence)
        guesses = self._wants.over(granted)
        self._giving.gained(granted)
        self._claims.gain(message.granted)
        if message.request:
            self._giving.came(set(granted).difference(guesses))
        self._home.keep(message.granted)
        embargo = set(each(message.embargo)) & set(granted)
        embargo.update(extent for extent in granted if extent in self._giving.unfree)
        self._home.take_over(message.dirt, embargo)
        for extent in granted:
            self._wants.serve(extent)
        self._giving.give_later(granted)
        if guesses:
            self._home.guessed(joined(guesses))
        self._wants.refused(each(message.refused))
        self._reads.look()
        self._request_ended()
        if message.request or self._claims.node == 1:  # if both give all, node 1's goes first
            self._give_on()

    def got(self, message: Got) -> None:
        """The other has processed our GRANTs up to a sequence."""
        self._giving.got(message.sequence)
        self._give_on()

    def removed(self, message: Remove) -> None:
        self._claims.check_removal(message.runs)
        self._remove(message.runs)

    def _remove(self, runs: Runs) -> None:
        for first, stop in runs:
            self.other[first:stop] = False
        if runs:
            self._wants.forget_nobodys(each(runs))
            self._reads.look()

    def free(self, message: Free) -> None:
        """No copy of the other's is under way there any more."""
        self._home.free([e for e in each(message.runs) if e not in self._giving.unfree])

    def asked(self, message: Ask) -> None:
        """A host of the other reads there: it waits until what is in flight here has landed."""
        self._reads.asked(message)

    def status(self, message: Status) -> None:
        """What was asked about may be read."""
        self._reads.check(message)
        self._claims.check_removal(message.given_up)
        self._remove(message.given_up)
        self._reads.status(message)
        self._request_ended()

    def _request_ended(self) -> None:
        """The other may take what had to wait for that."""
        if self._wants.has_unsent or self._reads.has_unsent:
            self._outbox.soon()

    # -- what we are to one another (called by `node`) ------------------------------------------
    def cut(self) -> None:
        """The link is lost: no right changes by that (rule 10)."""
        self._cut_since_s = min(self._cut_since_s, self._scheduler.time())
        self._forget_requests(Stance.CUT)

    def _forget_requests(self, stance: Stance) -> None:
        guessed = self._wants.guessed
        for part in (self._wants, self._giving, self._reads, self._outbox):
            part.forget()
        self._on_given = None
        self.held |= self.own
        self._claims.stance = stance
        if guessed:
            self._home.refused(joined(guessed))
            self._wants.forget_nobodys(guessed)

    def stop(self, why: str) -> None:
        """Nothing may be written any more, nor copied; every request of a host ends with EIO."""
        self._write_nothing(Stance.NOTHING)
        self._refusal = self._fail(self._scheduler.time(), why)

    def split(self) -> None:
        """Both nodes may have written everywhere: writes wait, and nothing is copied.  What is on
        the primary is read, since nothing better will come."""
        self._write_nothing(Stance.SPLIT)
        self._reads.look()

    def _write_nothing(self, stance: Stance) -> None:
        self._forget_requests(stance)
        self.held.setall(False)
        self._home.take_over((), list(each(runs_of(self.own))))

    def forget_all(self) -> None:
        """Nothing is ours or known any more: everything was given, or nobody has been met yet."""
        self._forget_requests(Stance.NOTHING)

    def freeze(self) -> None:
        """Views are exchanged: `own` and `owed` stay as they are until `thaw`."""
        self._claims.stance = Stance.FROZEN

    def learn(self, runs: Runs) -> None:
        """Knowledge grows: these may be the other's (rule 11)."""
        self._home.keep(self._claims.know(runs, self.other))

    def owe(self, runs: Runs) -> None:
        """Will be ours; a second cut must not lose that."""
        self._home.keep(self._claims.know(runs, self.owed))

    def thaw(self, shares: Shares, embargo: Runs) -> None:
        """Both have learnt: rights change as both have computed, and requests begin anew."""
        gone = (self.other | self.owed) & ~(shares.own | shares.other)
        self._claims.become(shares.own, shares.other)
        self._claims.stance = Stance.UP
        self._wants.forget_nobodys(each(runs_of(gone)))
        self._home.keep(runs_of(self.own | self.other))
        self._home.free_all()
        self._home.take_over(self._claims.blocks(runs_of(shares.dirty)), self._ours(each(embargo)))
        self._begin_anew()

    def _ours(self, embargo: Iterable[int]) -> set[int]:
        """Where of what is ours a copy may still land, theirs or an old one of ours."""
        return {extent for extent in {*embargo, *self._giving.unfree} if self.own[extent]}

    def absorb(self, direct: Runs = ()) -> None:
        """The other's process is dead: what was or may have been its own is ours, and dirty; but
        for what its kernel goes on writing (`direct`)."""
        taken = runs_of((self.other | self.owed) & ~bits_of(direct, len(self.own)))
        self._claims.gain(taken)
        self._home.free_all()
        self._home.take_over(self._claims.blocks(taken), self._ours(()))
        for extent in [extent for extent in self._wants.waiters if self.own[extent]]:
            self._wants.serve(extent)

    def alone(self) -> None:
        """The other can write no more: nobody has to be asked any longer."""
        self._forget_requests(Stance.ALONE)
        self.absorb()
        self._claims.be_alone()
        self._begin_anew()

    def adopt(self, runs: Runs) -> None:
        """These are ours and dirty, as a single appliance's are: there was never anybody else."""
        self._claims.gain(runs)
        self._home.take_over(self._claims.blocks(runs), ())

    def _begin_anew(self) -> None:
        self._cut_since_s = math.inf
        deferred, self._deferred = self._deferred, set()
        for extent in list(self._wants.waiters):
            if self.held[extent]:
                self._wants.serve(extent)
            else:
                self._wants.seek(extent)
        self._reads.look()
        self._outbox.soon()
        kept = [extent for extent in sorted(deferred) if self.held[extent]]
        if kept:
            self._home.guessed(joined(kept))  # the policy believes that they are gone
            self._home.drop_clean(kept)


def _nothing() -> None:
    """Nobody is to hear of it."""
