"""Bits, runs and numbers are the same sets."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from bitmapd.record.extents import bits_of, each, joined, runs_of, unset

SIZE = 24
SETS = st.sets(st.integers(0, SIZE - 1))


@given(SETS)
def test_they_say_the_same(numbers: set[int]) -> None:
    runs = joined(numbers)
    assert list(each(runs)) == sorted(numbers)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(runs))
    assert runs_of(bits_of(runs, SIZE)) == runs


@given(SETS, st.integers(0, SIZE), st.integers(0, SIZE))
def test_zeros_within(numbers: set[int], first: int, stop: int) -> None:
    found = list(each(unset(bits_of(joined(numbers), SIZE), first, stop)))
    assert found == [extent for extent in range(first, stop) if extent not in numbers]


def test_a_set_of_extents_is_joined_to_runs() -> None:
    assert joined({5, 1, 2, 7, 6}) == ((1, 3), (5, 8))
    assert joined(set()) == ()
