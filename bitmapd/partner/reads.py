"""Reads of places that are the other node's (pure).

A read waits until what was in flight at the other node when it asked has landed.  What the other
says is no permission for later: each read asks anew, and those of one turn of the loop ask
together.  What was asked about leaves the other's record as soon as it is clean, so the next read
asks nobody.

Invariants:
1. A read goes when nobody has to be asked in that event, or when a STATUS has come that was asked
   for after it arrived.  Each goes once, and never from inside `wait`.
2. STATUS is sent after the writes have landed that were in flight when ASK came.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bitmapd.media.base import Done
from bitmapd.partner.claims import Claims, Home, Stance
from bitmapd.partner.giving import Giving
from bitmapd.partner.messages import Ask, Status
from bitmapd.partner.outbox import Outbox
from bitmapd.peer.frames import ErrorCode, PeerError
from bitmapd.peer.payloads import Runs
from bitmapd.record.extents import each, joined

AT_REST, NEVER_HERE = 0, 1  # of STATUS


@dataclass(slots=True, eq=False)
class Read:
    """Extents [first, stop) that a host wants to read."""

    first: int
    stop: int
    go: Done
    since_s: float


class Reads:
    """See the module docstring."""

    def __init__(self, claims: Claims, giving: Giving, outbox: Outbox, home: Home) -> None:
        self._claims = claims
        self._giving = giving
        self._outbox = outbox
        self._home = home
        self._waiting: dict[Read, None] = {}  # in the order in which they came
        self.asks = 0
        self.forget()

    def forget(self) -> None:
        """Nothing is retried on another connection; whoever waits asks again."""
        self.due: dict[int, list[Read]] = {}  # our ASK -> reads that wait for its answer
        self._unasked = dict(self._waiting)

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def has_unsent(self) -> bool:
        return bool(self._unasked)

    # -- ours -----------------------------------------------------------------------------------
    def wait(self, read: Read) -> None:
        self._waiting[read] = None
        self._unasked[read] = None
        if self._claims.stance is Stance.UP:
            self._outbox.soon()

    def send(self) -> None:
        """The ASK of this turn, if there is one."""
        self.look()
        if not self._unasked:
            return
        reads, self._unasked = list(self._unasked), {}
        blocks = self._claims.blocks(joined(each((read.first, read.stop) for read in reads)))
        self.asks += len(reads)
        self.due[self._outbox.ask(blocks)] = reads

    def status(self, message: Status) -> None:
        """What was asked about may be read."""
        self._let(self.due.pop(message.request))

    def check(self, message: Status) -> None:
        if message.request not in self.due:
            raise PeerError(ErrorCode.ANSWER, f"a status that nobody asked for: {message.request}")

    def look(self) -> None:
        """Some may need no answer any more; those that have asked wait for it all the same."""
        self._let([read for read in self._unasked if self._claims.may_read(read.first, read.stop)])

    def _let(self, reads: Iterable[Read]) -> None:
        for read in reads:
            self._end(read, None)

    def _end(self, read: Read, error: OSError | None) -> None:
        del self._waiting[read]
        self._unasked.pop(read, None)
        read.go(error)

    def expire(self, before_s: float, error: OSError) -> None:
        """Those that came before then wait no longer."""
        for read in [read for read in self._waiting if read.since_s <= before_s]:
            self._end(read, error)

    # -- the other's ----------------------------------------------------------------------------
    def asked(self, message: Ask) -> None:
        """A host of the other reads there: it waits until what is in flight here has landed."""
        self._giving.next_request(message.request)
        per = self._claims.geometry.blocks_per_extent
        extents = {
            e for first, stop in message.blocks for e in range(first // per, -(-stop // per))
        }
        mine = [extent for extent in sorted(extents) if self._claims.own[extent]]
        if not mine:
            self._giving.end_request(message.request)
            self._outbox.send(Status(message.request, NEVER_HERE, (), True))
            return
        self._giving.coveted.update(mine)
        self._giving.when_at_rest(lambda: self._answer(message.request, mine))

    def _answer(self, request: int, mine: list[int]) -> None:
        self._giving.end_request(request)
        self._home.drop_clean(mine)
        given_up: Runs = self._outbox.unremove(mine)
        self._outbox.send(Status(request, AT_REST, given_up, True))
