"""Who owns what after two nodes have met, and what of it is dirty (pure).

Two nodes that lost sight of one another have each a view of who may write where, and messages
may have been lost between the two.  When they meet again both send their views; from the same two
views both compute the same division, so nothing has to be negotiated.

What a node sends of itself is its `View`.  An extent belongs afterwards to:

| | owner | dirty |
| --- | --- | --- |
| in `own` of both | nobody: `SplitRights` | |
| in `own` of one | that node | as it was |
| in `owed` of one only | the giver: the grant was lost | whole |
| in `owed` of both | node 1: it went there and back, and neither heard so | whole |
| one is fresh: in its `own`, where its kernel goes on writing | that node | whole |
| one is fresh: in `own` of the other | the other | as it was |
| one is fresh: in its `stored`, or in `owed` of the other | the other | whole |
| both are fresh: in `own` of one, where its kernel goes on writing | that node | whole |
| both are fresh: in `stored` of one | that node | whole |
| both are fresh: in `stored` of both | node 1 | whole |
| both are fresh, and what one of them relied on was in memory only | node 1: all | whole |
| nowhere | nobody | |

Invariants:
1. With the arguments exchanged and the other node's number the result is the mirror image; so
   `digest` is the same on both sides unless they have not seen the same views.
2. No extent has two owners, and none that is named by any of the views has none.
3. What a node comes to own without having owned it is dirty, whole.  So is what a fresh one owns.

The last row is what makes a fresh pair compare everything.  Source: docs/models/coherence.pml,
label `rights`.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitarray import bitarray
from xxhash import xxh3_64_intdigest

from bitmapd.peer.payloads import Runs
from bitmapd.record.extents import runs_of, zeros


class SplitRights(Exception):
    """Both nodes say that they own the same extents: `runs`."""

    def __init__(self, runs: Runs) -> None:
        super().__init__(f"both nodes own extents {runs[:4]}")
        self.runs = runs


@dataclass(frozen=True, slots=True)
class View:
    """What one node says; bitmaps over the extents of the volume.

    `stored` counts of a fresh node only: what its record names.  It grows while the nodes meet, and
    does not count less because the link was lost: the other may have come up.  What such a node
    owns its kernel has gone on writing.  `volatile`: what it relied on may not be in any stored
    record.
    """

    fresh: bool
    own: bitarray
    owed: bitarray
    stored: bitarray
    volatile: bool = False


@dataclass(frozen=True, slots=True)
class Shares:
    """The division as one node sees it; `dirty` is a part of `own`."""

    own: bitarray
    other: bitarray
    dirty: bitarray
    everything: bool = False  # nobody knows what differs: compare all

    def digest(self, node: int) -> int:
        """The same number on both nodes, if they agree."""
        first, second = (self.own, self.other) if node == 1 else (self.other, self.own)
        size = len(first).to_bytes(8, "little")
        return xxh3_64_intdigest(size + first.tobytes() + second.tobytes())


def share(mine: View, theirs: View, node: int) -> Shares:
    """The division for the node with this number (1 or 2) that has sent `mine`."""
    size = len(mine.own)
    if (mine.own & theirs.own).any():
        raise SplitRights(runs_of(mine.own & theirs.own))
    if mine.fresh and theirs.fresh:
        return _both_fresh(mine, theirs, node, size)
    if mine.fresh:
        other = (theirs.own | theirs.owed | mine.stored) & ~mine.own
        return Shares(mine.own.copy(), other, mine.own.copy())
    if theirs.fresh:
        own = (mine.own | mine.owed | theirs.stored) & ~theirs.own
        return Shares(own, theirs.own.copy(), own & ~mine.own)
    owned = mine.own | theirs.own
    lost = mine.owed & ~owned  # grants that did not arrive
    lost_by_them = theirs.owed & ~owned
    if node == 1:
        lost_by_them &= ~lost
    else:
        lost &= ~lost_by_them
    return Shares(mine.own | lost, theirs.own | lost_by_them, lost)


def _both_fresh(mine: View, theirs: View, node: int, size: int) -> Shares:
    everything = mine.volatile or theirs.volatile
    if everything:
        all_of_it, nothing = ~zeros(size), zeros(size)
        own, other = (all_of_it, nothing) if node == 1 else (nothing, all_of_it)
    else:
        own, other = mine.stored.copy(), theirs.stored.copy()
        if node == 1:
            other &= ~own
        else:
            own &= ~other
    own = (own & ~theirs.own) | mine.own
    other = (other & ~mine.own) | theirs.own
    return Shares(own, other, own.copy(), everything=everything)
