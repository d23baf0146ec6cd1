"""A partner that keeps the record and nothing else: what two nodes know when they meet (pure).

A *keeper* has no way to the primary.  It serves no host, copies nothing and never owns an extent;
it grants whatever the other node, the *host*, asks for, and so holds a record that outlives the
host's machine.  Proof of its death is never needed: there is nothing that it could write.

What differs after both have met is named by the record of one of them, or of both together:

| the host | what differs is in |
| --- | --- |
| has lived | what it owns: the keeper takes note of that |
| is fresh | its own stored record and the keeper's: of one that lives in its memory, else stored |
| joins, its record being new | the keeper's record; unless that *lacks* something: nobody knows |
| is fresh, and its record volatile, for which a new one passes | the same |

A host's record is volatile, in its superblock the flag VOLATILE, while it names less than the
keeper's: the host relies on what it is granted, or has joined and not stored yet what it fetched.
Without its keeper it may go alone with its own record if that is not volatile.  A record that
cannot be written cannot take the flag either, and may be well again when the next process reads it:
what stores the superblock has another place for the flag then, on the host's own disk.

A keeper's record lacks something, in its superblock the flag GONE_ON, while what it has granted
stands in its memory only, and where the host may take places without it: in a cut, if that has
`on_cut = go-on`, and after the keeper has said BYE.

Invariants:
1. What may be lacking is durable at the keeper before READY or BYE lets it come about.
2. With the two nodes exchanged the result is the mirror image, as that of `share`.
3. The keeper owns nothing afterwards, and knows of all that the host owns.
4. The flags stay until the nodes have come together, and all that either knows is stored.
5. Nothing counts in the keeper's place alone before the host has the flag, in its record or beside.

Source: docs/models/keeper.pml.
"""

from __future__ import annotations

from bitmapd.partner.greeting import NIL, has, relies, stores_first
from bitmapd.partner.messages import Hello, HelloFlag, Role
from bitmapd.partner.share import Shares, View
from bitmapd.record.extents import zeros


def is_keeper(hello: Hello) -> bool:
    return hello.role is Role.KEEPER


def nobody_knows(mine: Hello, theirs: Hello) -> bool:
    """Whether what differs is in neither record.  One of both is a keeper."""
    host, keeper = (theirs, mine) if is_keeper(mine) else (mine, theirs)
    if not has(host, HelloFlag.FRESH):
        return False
    if host.volume == NIL:
        return has(keeper, HelloFlag.GONE_ON)
    return has(host, HelloFlag.VOLATILE) and has(keeper, HelloFlag.GONE_ON)


def share_with_keeper(mine: View, theirs: View, *, keeps: bool, everything: bool) -> Shares:
    """The division for the node that has sent `mine`, which is the keeper if it `keeps`.  `stored`
    of a keeper counts also while it lives: what it knows of the host."""
    host, keeper = (theirs, mine) if keeps else (mine, theirs)
    nothing = zeros(len(host.own))
    if everything:
        own = ~nothing
    elif host.fresh:
        own = host.own | host.stored | keeper.stored
    else:
        own = host.own.copy()
    if keeps:
        return Shares(nothing, own, nothing.copy(), everything)
    return Shares(own, nothing, own & ~host.own, everything)


def record_lacks(host: Hello, keeper: Hello) -> bool:
    """Whether the host's stored record need not name all that it may write from now on."""
    return host.volume == NIL or relies(host, keeper)


def may_lack(keeper: Hello, host: Hello) -> bool:
    """Whether the keeper's stored record need not name all that the host may write from now on."""
    return has(host, HelloFlag.GO_ON) or not stores_first(keeper, host)
