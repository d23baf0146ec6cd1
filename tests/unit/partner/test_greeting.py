"""What HELLO means, row by row: `bitmapd/partner/greeting.py`."""

from __future__ import annotations

from typing import Any

import pytest

from bitmapd.partner.greeting import (
    SplitBrain,
    Standing,
    adopted,
    check,
    in_memory,
    relies,
    standing,
    stores_first,
)
from bitmapd.partner.messages import HelloFlag
from bitmapd.peer.frames import ErrorCode, PeerError
from tests.unit.partner.hellos import NIL, generations, hello

FRESH, ALONE = HelloFlag.FRESH, HelloFlag.ALONE


def test_two_that_fit() -> None:
    check(hello(1), hello(2))
    check(hello(1), hello(2, volume=NIL))
    check(hello(1), hello(2, lowest=1, highest=9))


@pytest.mark.parametrize(
    ("theirs", "code", "text"),
    [
        ({"lowest": 2, "highest": 3}, ErrorCode.VERSION, "no common version"),
        ({"lowest": 0, "highest": 0}, ErrorCode.VERSION, "no common version"),
        ({"volume": b"w" * 16}, ErrorCode.OTHER, "another volume"),
        ({"volume": b"w" * 16, "node": 1}, ErrorCode.OTHER, "both were created as node 1"),
        ({"node": 1}, ErrorCode.OTHER, "both nodes are node 1"),
        ({"machine": b"\1" * 16, "incarnation": 100}, ErrorCode.OTHER, "this node itself"),
        ({"name": "vol1"}, ErrorCode.OTHER, "volume name: 'vol0' here, 'vol1' at the partner"),
        ({"extent_bytes": 4096}, ErrorCode.OTHER, "extent size"),
        ({"block_bytes": 512}, ErrorCode.OTHER, "block size"),
        ({"size_bytes": 4096, "volume": NIL}, ErrorCode.OTHER, "volume size"),  # who joins
        ({"primary": "q"}, ErrorCode.OTHER, "primary"),
        ({"secondary": "q"}, ErrorCode.OTHER, "secondary"),
        ({"required": 1 << 40}, ErrorCode.VERSION, "required feature"),
        ({"offered": 1}, ErrorCode.VERSION, "required feature"),
    ],
)
def test_who_is_not_the_partner(theirs: dict[str, Any], code: ErrorCode, text: str) -> None:
    with pytest.raises(PeerError, match=text) as raised:
        check(hello(1), hello(2, **theirs))
    assert raised.value.code is code


def test_two_that_wait_to_join() -> None:
    with pytest.raises(PeerError, match="node 1 has to be created first"):
        check(hello(1, volume=NIL), hello(2, volume=NIL))


@pytest.mark.parametrize(
    ("mine", "my_flags", "theirs", "their_flags", "result"),
    [
        ("a", 0, "a", 0, Standing.EVEN),
        ("a", ALONE, "a", 0, Standing.EVEN),
        ("a", 0, "ba", ALONE, Standing.BEHIND),
        ("a", 0, "ba", FRESH, Standing.BEHIND),
        ("a", ALONE, "ba", ALONE, Standing.BEHIND),
        ("ba", ALONE, "a", 0, Standing.AHEAD),
        ("ba", ALONE, "a", FRESH, Standing.AHEAD),
        ("a", 0, "a", FRESH, Standing.AHEAD),
        ("a", FRESH, "a", 0, Standing.BEHIND),
        ("ba", FRESH, "a", 0, Standing.BEHIND),
        ("a", FRESH, "b", FRESH, Standing.EVEN),
        ("fedc", ALONE, "a", 0, Standing.AHEAD),  # four are remembered, no more
        ("a", 0, "fedc", ALONE, Standing.BEHIND),
    ],
)
def test_who_went_on_without_whom(
    mine: str, my_flags: int, theirs: str, their_flags: int, result: Standing
) -> None:
    one = hello(1, generations=generations(mine), flags=HelloFlag(my_flags))
    two = hello(2, generations=generations(theirs), flags=HelloFlag(their_flags))
    assert standing(one, two) is result


@pytest.mark.parametrize("flags", [HelloFlag(0), ALONE])
def test_both_went_on(flags: HelloFlag) -> None:
    one = hello(1, generations=generations("ba"), flags=flags)
    two = hello(2, generations=generations("ca"), flags=flags)
    with pytest.raises(SplitBrain) as raised:
        standing(one, two)
    assert raised.value.code is ErrorCode.SPLIT_BRAIN


@pytest.mark.parametrize(("term", "result"), [(3, Standing.AHEAD), (4, Standing.BEHIND)])
def test_a_link_that_ended_after_ready_was_said(term: int, result: Standing) -> None:
    """The node was alone, and is not so any more; the fresh one has not adopted its generations."""
    one = hello(1, generations=generations("ba"), term=3)
    two = hello(2, generations=generations("ca"), flags=FRESH, term=term)
    assert standing(one, two) is result


def test_a_fresh_node_is_never_a_split_brain() -> None:
    one = hello(1, generations=generations("ba"), flags=FRESH)
    two = hello(2, generations=generations("ca"), flags=ALONE)
    assert standing(one, two) is Standing.BEHIND
    assert standing(two, one) is Standing.AHEAD


@pytest.mark.parametrize(
    ("mine", "theirs", "result"),
    [
        ({"generations": "ba", "term": 4, "flags": ALONE}, {}, "ba"),
        ({}, {"generations": "ba", "term": 4, "flags": ALONE}, "ba"),
        ({"flags": FRESH, "generations": "ca", "term": 4}, {"flags": FRESH}, "ca"),
        ({"flags": FRESH}, {"flags": FRESH, "generations": "ca", "term": 4}, "ca"),
        ({"flags": FRESH, "generations": "ca", "term": 4},
         {"flags": FRESH, "term": 4, "generations": "da"}, "ca"),  # node 1's
        ({"flags": FRESH, "generations": "ca", "term": 9, "volume": NIL},
         {"flags": FRESH, "term": 1, "generations": "da"}, "da"),  # who joins brings nothing
    ],
)  # fmt: skip
def test_both_go_on_with_the_same(
    mine: dict[str, Any], theirs: dict[str, Any], result: str
) -> None:
    def made(node: int, given: dict[str, Any]) -> Any:
        return hello(node, **{**given, "generations": generations(given.get("generations", "a"))})

    one, two = made(1, mine), made(2, theirs)
    assert adopted(one, two) == adopted(two, one)
    assert adopted(one, two) == (generations(result), max(one.term, two.term))


# -- what counts as recorded ------------------------------------------------------------------
RELIES, STORED, UNSTORED = HelloFlag.RELIES, HelloFlag.STORED, HelloFlag.UNSTORED
NONE = HelloFlag(0)


@pytest.mark.parametrize(
    ("mine", "theirs", "i_rely", "i_store", "memory"),
    [
        (NONE, NONE, False, False, False),
        (RELIES, NONE, True, False, True),
        (NONE, RELIES, False, False, True),
        (RELIES, STORED, True, True, False),
        (RELIES | STORED, NONE, True, True, False),
        (NONE, RELIES | STORED, False, True, False),
        (STORED, NONE, False, True, False),
        # Whose record cannot be written stores nothing, and is not relied on.
        (RELIES, UNSTORED, False, False, False),
        (RELIES | STORED, UNSTORED, False, True, False),
        (STORED | UNSTORED, RELIES, False, False, False),
        (UNSTORED | RELIES, STORED, True, False, False),
        (UNSTORED | RELIES, NONE, True, False, True),
    ],
)
def test_what_a_node_counts_on(
    mine: HelloFlag, theirs: HelloFlag, i_rely: bool, i_store: bool, memory: bool
) -> None:
    here, there = hello(1, flags=mine), hello(2, flags=theirs)
    assert relies(here, there) is i_rely
    assert stores_first(here, there) is i_store
    assert in_memory(here, there) is in_memory(there, here) is memory
