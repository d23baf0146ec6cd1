"""What the first message of the other node means for the two of us (pure).

HELLO says who is there, which volume it serves, and how far its knowledge of the volume's history
goes.  The history is a list of generations: each time a node goes on without the other it begins a
new one, so that it can be told later who has gone on without whom.

A node that is *fresh* (its process has met nobody yet) owns nothing: it follows the other, and two
of them start from what both have stored.  Of two that have lived:

| my generations, theirs | I am |
| --- | --- |
| the same current one | even: nobody has gone on alone since we met |
| theirs has my current one further back | behind: it had proof that I was dead, and went on |
| mine has theirs further back | ahead |
| neither, one of us is alone | ahead if that is me: four generations are remembered, no more |
| neither, the other is fresh | ahead; behind if its term is higher and I am not alone |
| neither, both are alone | `SplitBrain`: one of the proofs was false |

A live node that is behind is *outdated*, also if the process that went on has died since (and says
HELLO as a fresh one).  If a node that is alone meets a fresh one which had gone on alone as well,
then one after the other did so: both compare everything, so nothing is lost.

Source: docs/partner-protocol.md, "HELLO" and "Coming together".
"""

from __future__ import annotations

from enum import Enum

from bitmapd.partner.messages import Hello, HelloFlag, Role
from bitmapd.peer.frames import ErrorCode, PeerError

NIL = bytes(16)
VERSION = 1
DIRT_AS_BLOCKS, EMBARGO, GIVES_UP, SAYS_VOLATILE, STORES_FIRST = 1, 2, 4, 8, 16
KNOWS_GO_ON, KNOWS_DIRECT, KNOWS_KEEPERS = 32, 64, 128
REQUIRED = DIRT_AS_BLOCKS | EMBARGO
OFFERED = REQUIRED | GIVES_UP | SAYS_VOLATILE | STORES_FIRST | KNOWS_GO_ON | KNOWS_DIRECT
OFFERED |= KNOWS_KEEPERS


class Standing(Enum):
    """What we are to the node that has said HELLO."""

    EVEN = "even"
    BEHIND = "behind"  # it has gone on without us
    AHEAD = "ahead"  # we have gone on without it


class SplitBrain(PeerError):
    """Both nodes have gone on without the other."""

    def __init__(self) -> None:
        super().__init__(
            ErrorCode.SPLIT_BRAIN, "both nodes have gone on alone: neither generation is older"
        )


def check(mine: Hello, theirs: Hello) -> None:
    """Whether the other is the partner of this volume at all; PeerError if not."""
    if theirs.lowest > mine.highest or theirs.highest < mine.lowest:
        raise PeerError(
            ErrorCode.VERSION,
            f"no common version of the protocol: {theirs.lowest} to {theirs.highest} there,"
            f" {mine.lowest} to {mine.highest} here",
        )
    nil = NIL in (mine.volume, theirs.volume)
    if not nil and mine.volume != theirs.volume:
        twice = f": both were created as node {mine.node}" if mine.node == theirs.node else ""
        raise PeerError(ErrorCode.OTHER, f"the partner serves another volume{twice}")
    if mine.volume == theirs.volume == NIL:
        raise PeerError(ErrorCode.OTHER, "both nodes wait to join: node 1 has to be created first")
    if mine.node == theirs.node:
        raise PeerError(ErrorCode.OTHER, f"both nodes are node {mine.node}")
    if (mine.machine, mine.incarnation) == (theirs.machine, theirs.incarnation):
        raise PeerError(ErrorCode.OTHER, "the partner's address leads to this node itself")
    if mine.role is theirs.role is Role.KEEPER:
        raise PeerError(ErrorCode.OTHER, "both nodes are keepers: nobody has the volume")
    shared = Role.KEEPER not in (mine.role, theirs.role)  # the media are
    for what, here, there in (
        ("volume name", mine.name, theirs.name),
        ("extent size", mine.extent_bytes, theirs.extent_bytes),
        ("block size", mine.block_bytes, theirs.block_bytes),
        *((("volume size", mine.size_bytes, theirs.size_bytes),) if nil else ()),
        *((("primary", mine.primary, theirs.primary),) if shared else ()),
        *((("secondary", mine.secondary, theirs.secondary),) if shared else ()),
    ):
        if here != there:
            raise PeerError(ErrorCode.OTHER, f"{what}: {here!r} here, {there!r} at the partner")
    if has(mine, HelloFlag.GO_ON) and has(theirs, HelloFlag.GO_ON):
        raise PeerError(ErrorCode.OTHER, "both nodes have on_cut = go-on: one of them may")
    missing = theirs.required & ~mine.offered | mine.required & ~theirs.offered
    if missing:
        raise PeerError(ErrorCode.VERSION, f"a required feature is missing: bits {missing:#x}")
    direct = any(has(one, HelloFlag.DIRECT) for one in (mine, theirs))
    if direct and not shared:
        raise PeerError(
            ErrorCode.OTHER, "a volume whose record a keeper holds needs attach = nbd, not dm"
        )
    if direct and not all(has(one, HelloFlag.ON_PROMOTE) for one in (mine, theirs)):
        raise PeerError(
            ErrorCode.OTHER,
            "with attach = dm one node serves hosts at a time: both need serve = on-promote",
        )


def standing(mine: Hello, theirs: Hello) -> Standing:
    """Who has gone on without whom; SplitBrain if both."""
    fresh, other_fresh = has(mine, HelloFlag.FRESH), has(theirs, HelloFlag.FRESH)
    if fresh:
        return Standing.EVEN if other_fresh else Standing.BEHIND
    here, there = mine.generations, theirs.generations
    alone, other_alone = has(mine, HelloFlag.ALONE), has(theirs, HelloFlag.ALONE)
    if here[0] == there[0]:
        return Standing.AHEAD if other_fresh else Standing.EVEN
    if here[0] in there[1:]:
        return Standing.BEHIND
    if there[0] in here[1:]:
        return Standing.AHEAD
    if other_fresh and not alone:
        return Standing.BEHIND if theirs.term > mine.term else Standing.AHEAD
    if alone == other_alone:
        raise SplitBrain
    return Standing.AHEAD if alone else Standing.BEHIND


def has_new_record(mine: Hello, theirs: Hello) -> bool:
    """Whether what the other's earlier processes had stored is lost: its record knows nothing of
    our history, nor we of its."""
    both_know = set(mine.generations) & set(theirs.generations) - {NIL}
    return theirs.volume == NIL or not both_know


def is_over(mine: Hello, theirs: Hello) -> bool:
    """Whether the other has gone on without a node whose process is fresh and whose kernel still
    writes: what it writes is not its own any more."""
    if mine.generations[0] == theirs.generations[0]:
        return has(theirs, HelloFlag.ALONE)
    return theirs.generations[0] not in mine.generations[1:]


def relies(mine: Hello, theirs: Hello) -> bool:
    """Whether I count on the other's copy of my record while we are paired."""
    return has(mine, HelloFlag.RELIES) and not has(theirs, HelloFlag.UNSTORED)


def stores_first(mine: Hello, theirs: Hello) -> bool:
    """Whether I grant what is in my stored record only: one of both wants that, and I can."""
    wanted = has(mine, HelloFlag.STORED) or has(theirs, HelloFlag.STORED)
    return wanted and not has(mine, HelloFlag.UNSTORED)


def in_memory(mine: Hello, theirs: Hello) -> bool:
    """Whether what one of both owns may stand in the other's memory only, while they are paired."""
    return any(
        relies(one, other) and not stores_first(other, one)
        for one, other in ((mine, theirs), (theirs, mine))
    )


def has(hello: Hello, flag: HelloFlag) -> bool:
    """Whether it says so."""
    return bool(hello.flags & flag)


def adopted(mine: Hello, theirs: Hello) -> tuple[tuple[bytes, ...], int]:
    """The generations and the term that both go on with."""
    found = standing(mine, theirs)
    if found is Standing.EVEN:  # of two fresh ones, the one that went on last as far as is known
        found = Standing.AHEAD if _rank(mine) > _rank(theirs) else Standing.BEHIND
    leading = mine if found is Standing.AHEAD else theirs
    return leading.generations, max(mine.term, theirs.term)


def _rank(hello: Hello) -> tuple[bool, int, int]:
    return hello.volume != NIL, hello.term, -hello.node
