"""What two nodes own after they have met: `bitmapd/partner/share.py`."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bitmapd.partner.share import Shares, SplitRights, View, share
from bitmapd.record.extents import bits_of, joined, runs_of

SIZE = 12
SETS = st.sets(st.integers(0, SIZE - 1)).map(lambda numbers: bits_of(joined(numbers), SIZE))


@st.composite
def views(draw: st.DrawFn) -> tuple[View, View]:
    """What two nodes may say: what a fresh one owns its kernel writes, and it owes nothing."""
    made = []
    for _ in range(2):
        fresh, own, owed, stored = draw(st.booleans()), draw(SETS), draw(SETS), draw(SETS)
        if fresh:
            owed = bits_of((), SIZE)
        made.append(View(fresh, own, owed & ~own, stored, draw(st.booleans())))
    return made[0], made[1]


def view(own: str = "", owed: str = "", stored: str = "", **more: bool) -> View:
    bits = [bits_of(joined(map(int, text)), SIZE) for text in (own, owed, stored)]
    return View(more.get("fresh", False), *bits, more.get("volatile", False))


def named(shares: Shares) -> tuple[str, str, str]:
    return tuple(
        "".join(str(e) for first, stop in runs_of(bits) for e in range(first, stop))
        for bits in (shares.own, shares.other, shares.dirty)
    )


@given(views())
def test_both_come_to_the_same_and_nothing_has_two_owners_or_none(pair: tuple[View, View]) -> None:
    one, two = pair
    assume(not (one.own & two.own).any())
    here, there = share(one, two, 1), share(two, one, 2)
    assert (here.own, here.other) == (there.other, there.own)
    assert here.digest(1) == there.digest(2)
    assert here.everything == there.everything
    assert not (here.own & here.other).any()
    named_by_any = one.own | one.owed | two.own | two.owed
    for it in pair:
        if it.fresh:
            named_by_any |= it.stored
    assert not (named_by_any & ~(here.own | here.other)).any()
    for shares, mine in ((here, one), (there, two)):
        assert not (shares.dirty & ~shares.own).any()
        # A node that met a fresh one has absorbed what it owed and knew before it said so.
        gained = shares.own if mine.fresh else shares.own & ~mine.own
        assert not (gained & ~shares.dirty).any()


@given(SETS, SETS)
def test_the_digest_differs_where_the_results_do(own: object, other: object) -> None:
    one, two = Shares(own, other, own), Shares(other, own, own)  # type: ignore[arg-type]
    assert (one.digest(1) == two.digest(1)) == (own == other)


@pytest.mark.parametrize(
    ("mine", "theirs", "node", "result"),
    [
        (view("12"), view("3"), 1, ("12", "3", "")),  # as it was
        (view("", "1"), view(), 1, ("1", "", "1")),  # the grant was lost
        (view("", "1"), view(), 2, ("1", "", "1")),
        (view(), view("", "1"), 1, ("", "1", "")),
        (view("", "1"), view("1"), 1, ("", "1", "")),  # it has arrived
        (view("", "1"), view("", "1"), 1, ("1", "", "1")),  # there and back
        (view("", "1"), view("", "1"), 2, ("", "1", "")),
        (view(fresh=True, stored="12"), view("2"), 1, ("", "12", "")),
        (view("2"), view(fresh=True, stored="12"), 1, ("12", "", "1")),
        (view("2", fresh=True, stored="12"), view("3"), 1, ("2", "13", "2")),
        (view("3", "1"), view("2", fresh=True, stored="12"), 1, ("13", "2", "1")),
        (view("2", fresh=True), view(fresh=True, stored="12"), 2, ("2", "1", "2")),
        (view(fresh=True, stored="12"), view("2", fresh=True), 1, ("1", "2", "1")),
        (view(fresh=True, stored="12"), view(fresh=True, stored="23"), 1, ("12", "3", "12")),
        (view(fresh=True, stored="23"), view(fresh=True, stored="12"), 2, ("3", "12", "3")),
    ],
)
def test_every_row(mine: View, theirs: View, node: int, result: tuple[str, str, str]) -> None:
    shares = share(mine, theirs, node)
    assert named(shares) == result
    assert not shares.everything


@pytest.mark.parametrize("node", [1, 2])
@pytest.mark.parametrize("which", [0, 1])
def test_what_was_in_memory_only_makes_two_fresh_nodes_compare_everything(
    node: int, which: int
) -> None:
    pair = [view(fresh=True, stored="1", volatile=which == n) for n in (0, 1)]
    shares = share(pair[0], pair[1], node)
    assert shares.everything
    assert (shares.own.count(), shares.other.count()) == ((SIZE, 0) if node == 1 else (0, SIZE))


def test_both_own_the_same() -> None:
    with pytest.raises(SplitRights) as raised:
        share(view("123"), view("235"), 1)
    assert raised.value.runs == ((2, 4),)


@pytest.mark.parametrize("fresh", [(False, True), (True, False), (True, True)])
def test_what_two_kernels_write_has_no_owner(fresh: tuple[bool, bool]) -> None:
    one, two = (view("12", fresh=one) for one in fresh)
    with pytest.raises(SplitRights):
        share(one, two, 1)
