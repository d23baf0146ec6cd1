"""Where two nodes may have written without one another."""

from __future__ import annotations

from bitmapd.partner.split import MOST_SHOWN, Conflicts, conflicts
from bitmapd.record.extents import bits_of


def test_what_both_have_is_what_both_name() -> None:
    mine = bits_of(((0, 4), (8, 10)), 12)
    assert conflicts(mine, ((2, 9),)) == Conflicts(6, 7, 3, ((2, 4), (8, 9)))
    assert conflicts(mine, ()) == Conflicts(6, 0, 0, ())


def test_what_is_shown_has_a_bound_and_what_is_counted_has_none() -> None:
    every_other = tuple((at, at + 1) for at in range(0, 4 * MOST_SHOWN, 2))
    found = conflicts(bits_of(((0, 4 * MOST_SHOWN),), 4 * MOST_SHOWN), every_other)
    shown = found.to_json()
    assert (shown["own_extents"], shown["partner_extents"]) == (4 * MOST_SHOWN, 2 * MOST_SHOWN)
    assert shown["both_extents"] == 2 * MOST_SHOWN
    assert shown["both"] == [[at, 1] for at in range(0, 2 * MOST_SHOWN, 2)]
