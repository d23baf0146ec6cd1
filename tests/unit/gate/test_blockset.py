"""BlockSet against a plain Python set."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bitmapd.gate.blockset import REGION_BLOCKS, BlockSet

EDGE = REGION_BLOCKS
positions = st.one_of(
    st.integers(0, 60), st.integers(EDGE - 30, EDGE + 30), st.integers(3 * EDGE - 5, 3 * EDGE + 5)
)
ranges = st.builds(
    lambda first, length: (first, first + length),
    positions,
    st.one_of(st.integers(0, 40), st.just(2 * EDGE + 7)),
)
operations = st.lists(st.tuples(st.sampled_from(["add", "discard"]), ranges), max_size=12)


def build(steps: list[tuple[str, tuple[int, int]]]) -> tuple[BlockSet, set[int]]:
    blocks, model = BlockSet(), set()
    for name, (first, stop) in steps:
        if name == "add":
            blocks.add(first, stop)
            model.update(range(first, stop))
        else:
            blocks.discard(first, stop)
            model.difference_update(range(first, stop))
    return blocks, model


def members(blocks: BlockSet) -> set[int]:
    found = {block for first, stop in blocks.runs() for block in range(first, stop)}
    assert blocks.count() == len(found), "the running count is of what is there"
    return found


@given(operations, ranges)
def test_like_a_set(steps: list[tuple[str, tuple[int, int]]], probe: tuple[int, int]) -> None:
    blocks, model = build(steps)
    assert members(blocks) == model
    assert bool(blocks) == bool(model)
    wanted = set(range(*probe))
    assert blocks.any(*probe) == bool(wanted & model)
    assert blocks.count_in(*probe) == len(wanted & model)


@given(operations, positions, st.one_of(st.none(), st.integers(1, 2 * EDGE)))
def test_next_run(steps: list[tuple[str, tuple[int, int]]], start: int, limit: int | None) -> None:
    blocks, model = build(steps)
    run = blocks.next_run(start, limit)
    later = sorted(block for block in model if block >= start)
    if not later:
        assert run is None
        return
    assert run is not None
    first, stop = run
    assert first == later[0]
    assert set(range(first, stop)) <= model
    assert limit is None or stop - first <= limit
    assert stop - first == limit or stop not in model


@given(operations, operations)
def test_update(
    mine: list[tuple[str, tuple[int, int]]], other: list[tuple[str, tuple[int, int]]]
) -> None:
    blocks, model = build(mine)
    added, added_model = build(other)
    blocks.update(added)
    assert members(blocks) == model | added_model
    blocks.add(5, 6)
    assert members(added) == added_model, "update shares no state"


@given(operations, operations)
def test_intersect(
    mine: list[tuple[str, tuple[int, int]]], other: list[tuple[str, tuple[int, int]]]
) -> None:
    blocks, model = build(mine)
    others, other_model = build(other)
    blocks.intersect(others)
    assert members(blocks) == model & other_model
    assert bool(blocks) == bool(model & other_model), "no empty region is left"
    assert members(others) == other_model


def test_an_empty_range_is_nothing() -> None:
    blocks = BlockSet([(5, 5)])
    blocks.add(3 * EDGE - 5, 3 * EDGE - 5)
    assert not blocks
    assert blocks.next_run(0) is None


def test_a_run_that_ends_with_its_region() -> None:
    blocks = BlockSet()
    blocks.add(REGION_BLOCKS - 3, REGION_BLOCKS)
    assert blocks.next_run(0) == (REGION_BLOCKS - 3, REGION_BLOCKS)
    assert blocks.any(REGION_BLOCKS - 1, REGION_BLOCKS + 1)
    assert not blocks.any(REGION_BLOCKS, REGION_BLOCKS)


@given(st.sets(st.integers(0, 40_000)), st.sets(st.integers(0, 40_000)))
def test_two_sets_are_compared(one: set[int], other: set[int]) -> None:
    left, right = (BlockSet((block, block + 1) for block in blocks) for blocks in (one, other))
    rest = left.minus(right)
    assert members(rest) == one - other
    assert bool(rest) is bool(one - other)
    assert left.meets(right) is not one.isdisjoint(other)
    assert members(left) == one, "it stays as it is"
