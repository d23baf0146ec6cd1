"""How two nodes come together, once both have said HELLO (pure).

RECORD goes both ways while rights stand still.  What the other may own is added to what is known of
it, and the superblock says that there is a partner.  Then comes READY, with a digest of what both
own from now on.  Rights change (`share`) only on the other's READY: it knows by then.

Invariants:
1. Knowledge grows before READY is sent; rights change after READY has come (rule 11).
2. The superblock, with the flag VOLATILE where one of the two counts on memory, is durable before
   READY is sent, and node 2's first one is not written before node 1's READY has come: a node 1
   that was never paired serves without asking anybody, so it has to know durably that there is a
   partner before node 2 counts as one.
3. FREE may come before the other's READY, and counts (`BUG_FREE_MEANS_NOW`).

An exchange belongs to its link and ends with it.  What it has added to what is known stays.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from bitmapd.partner.greeting import NIL, adopted, has, in_memory, stores_first
from bitmapd.partner.keeping import (
    is_keeper,
    may_lack,
    nobody_knows,
    record_lacks,
    share_with_keeper,
)
from bitmapd.partner.ledger import Ledger
from bitmapd.partner.messages import Free, Hello, HelloFlag, Message, Ready, Record
from bitmapd.partner.rights import Rights
from bitmapd.partner.share import Shares, View, share
from bitmapd.partner.states import Lasting, Surroundings
from bitmapd.peer.frames import ErrorCode, PeerError
from bitmapd.peer.payloads import Runs
from bitmapd.record.extents import bits_of, each, joined, runs_of


class Ends(Protocol):
    """The node that exchanges; its link is the one on which the exchange has begun."""

    number: int
    ledger: Ledger
    rights: Rights

    def say(self, message: Message) -> None: ...

    def refuse(self, error: PeerError) -> None: ...

    def come_together(
        self, shares: Shares, copying: Runs, incarnation: int, *, inherits: bool
    ) -> None:
        """Both know what both know: rights change.  `copying`: where a copy of the other's is under
        way; `incarnation`: of the other; `inherits`: what of `shares` is dirty was not ours."""


class Exchange:
    """See the module docstring.  `is_current`: whether the link is still there."""

    def __init__(
        self,
        mine: Hello,
        theirs: Hello,
        node: Ends,
        around: Surroundings,
        is_current: Callable[[], bool],
    ) -> None:
        self._mine = mine
        self._theirs = theirs
        self._node = node
        self._around = around
        self._is_current = is_current
        self._their_ready: int | None = None
        self._agree: Callable[[int], None] | None = None  # our READY is sent
        self._first_pairing: Callable[[], None] | None = None
        self._copying: set[int]  # extents where a copy of the other's is under way
        self._keeps = is_keeper(mine)
        self._with_keeper = self._keeps or is_keeper(theirs)
        node.rights.freeze()
        knows = self._keeps and not has(mine, HelloFlag.FRESH)
        self._view = view = node.rights.view(
            node.rights.other if knows else around.stored(),
            fresh=has(mine, HelloFlag.FRESH),
            volatile=_is_unnamed(mine),
        )
        stored = runs_of(view.stored) if view.fresh or knows else ()
        node.say(Record(runs_of(view.own), runs_of(view.owed), stored, node.rights.unfree))

    @property
    def has_said_ready(self) -> bool:
        return self._agree is not None

    def heard(self, record: Record) -> None:
        """Their view: what they may own is known from now on; READY once that is durable."""
        mine, theirs, view, node = self._mine, self._theirs, self._view, self._node
        size = len(view.own)
        their_view = View(
            has(theirs, HelloFlag.FRESH),
            bits_of(record.own, size),
            bits_of(record.owed, size),
            bits_of(record.stored, size),
            _is_unnamed(theirs),
        )
        self._copying = set(each(record.copying))
        if self._with_keeper:
            shares = share_with_keeper(
                view, their_view, keeps=self._keeps, everything=nobody_knows(mine, theirs)
            )
            node.rights.learn(runs_of(shares.own | shares.other))
        else:
            shares = share(view, their_view, node.number)
            self._learn(record, view, their_view)
            if shares.everything:
                node.rights.learn(((0, size),))
        generations, term = adopted(mine, theirs)
        volume = mine.volume if any(mine.volume) else theirs.volume
        lacks = in_memory(mine, theirs) or shares.everything
        lacks = lacks or (self._with_keeper and not self._keeps and record_lacks(mine, theirs))
        # A node that cannot write its record leaves to the other what has to be certain: both flags
        # are read wherever one counts.  But a keeper may be away where its host begins anew.
        says_so = not has(mine, HelloFlag.UNSTORED) or (self._with_keeper and not self._keeps)
        volatile = lacks and says_so
        agree = partial(self._agreed, shares, not view.fresh or their_view.fresh)

        def edit(now: Lasting) -> Lasting:
            # A flag that is set stays: only `reliance` takes it back.  A keeper's record lacks
            # something for as long as the host may be alone, which it may until it says READY.
            return Lasting(
                False,
                term,
                generations,
                volume,
                volatile=volatile or now.volatile,
                gone_on=now.gone_on or (self._keeps and may_lack(mine, theirs)),
                kept=is_keeper(theirs),
            )

        def stored(error: OSError | None) -> None:
            if not self._is_current():
                return
            if error is not None:
                node.refuse(PeerError(ErrorCode.INTERNAL, f"cannot write the record: {error}"))
                return
            self._say_ready(shares, agree)

        def named(error: OSError | None) -> None:
            if not self._is_current():
                return
            if error is not None:
                stored(error)
            elif node.number == 2 and node.ledger.lasting.never_paired:
                self._first_pairing = partial(node.ledger.change, edit, stored)
                self._look_for_ready()
            else:
                node.ledger.change(edit, stored, certain=says_so)

        # READY says what GRANT says: where that has to be stored first, this has, too.
        if not (stores_first(mine, theirs) and self._around.destage(named)):
            named(None)

    def _learn(self, record: Record, mine: View, theirs: View) -> None:
        """What the other may own."""
        rights = self._node.rights
        rights.learn(record.own)
        rights.learn(record.owed)
        if mine.fresh:
            rights.learn(runs_of(mine.stored))
            if theirs.fresh:
                rights.learn(record.stored)
        elif theirs.fresh:
            rights.owe(runs_of(theirs.stored & ~theirs.own))

    def _say_ready(self, shares: Shares, agree: Callable[[int], None]) -> None:
        self._agree = agree
        self._node.say(Ready(shares.digest(self._node.number)))
        if self._their_ready is not None:
            agree(self._their_ready)

    def ready(self, message: Ready) -> None:
        self._their_ready = message.digest
        self._look_for_ready()

    def _look_for_ready(self) -> None:
        if self._their_ready is None:
            return
        first_pairing, self._first_pairing = self._first_pairing, None
        if first_pairing is not None:
            first_pairing()
        elif self._agree is not None:
            self._agree(self._their_ready)

    def freed(self, message: Free) -> None:
        self._copying.difference_update(each(message.runs))

    def _agreed(self, shares: Shares, inherits: bool, digest: int) -> None:
        if digest == shares.digest(self._node.number):
            self._node.come_together(
                shares,
                joined(self._copying),
                self._theirs.incarnation,
                inherits=inherits,
            )
        else:
            own, other = shares.own.count(), shares.other.count()
            self._node.refuse(
                PeerError(
                    ErrorCode.DIGEST,
                    f"the nodes have come to different results: {own} extents here and {other}"
                    " there",
                )
            )


def _is_unnamed(hello: Hello) -> bool:
    """Whether what its earlier processes have written may be in no stored record: it stood in
    memory only, or the record is lost and the node joins with a new one."""
    return has(hello, HelloFlag.VOLATILE) or hello.volume == NIL
