"""The checker of histories agrees with a search that tries every order, and torn blocks show."""

from __future__ import annotations

import random
from math import inf

import pytest

from tests.support.histories import (
    INITIAL,
    History,
    Operation,
    TornBlock,
    Value,
    block_of,
    value_of,
    violation,
)


def an_order_exists(operations: list[Operation]) -> bool:
    """Wing and Gong's search, which remembers where it has been (Lowe)."""
    operations = [o for o in operations if o.answered or o.writes]
    needed = {i for i, o in enumerate(operations) if o.answered}
    seen: set[tuple[frozenset[int], Value]] = set()

    def search(done: frozenset[int], held: Value) -> bool:
        if needed <= done:
            return True
        if (done, held) in seen:
            return False
        seen.add((done, held))
        open_ = [i for i in range(len(operations)) if i not in done]
        first_end = min(operations[i].end for i in open_)
        for i in open_:
            o = operations[i]
            possible = o.start <= first_end and (o.writes or o.value == held)
            if possible and search(done | {i}, o.value):
                return True
        return False

    return search(frozenset(), INITIAL)


def random_history(rng: random.Random) -> list[Operation]:
    count = rng.randrange(1, 8)
    times = [float(t) for t in range(2 * count)]
    rng.shuffle(times)
    kinds = [rng.random() < 0.5 for _ in range(count)]
    values = [INITIAL] + [(1, i + 1) for i, writes in enumerate(kinds) if writes]
    operations = []
    for i, writes in enumerate(kinds):
        start, end = sorted(times[2 * i : 2 * i + 2])
        answered = rng.random() < 0.85
        value = (1, i + 1) if writes else rng.choice(values)
        operations.append(Operation(writes, value, start, end if answered else inf))
    return operations


def test_zones_and_search_agree() -> None:
    rng = random.Random(20)
    verdicts = []
    for _ in range(3000):
        operations = random_history(rng)
        holds = an_order_exists(operations)
        assert (violation(operations) is None) == holds, operations
        verdicts.append(holds)
    assert 300 < sum(verdicts) < 2700  # both verdicts are common, else agreement says little


def test_a_read_of_what_was_replaced_is_found() -> None:
    history = History()
    history.wrote(7, (1, 1), 0, 1)
    history.wrote(7, (2, 1), 2, 3)
    history.read(7, (1, 1), 4, 5)
    history.wrote(8, (1, 2), 0, 1)
    history.read(8, (1, 2), 2, 3)
    assert [register for register, _ in history.violations()] == [7]


def test_an_unanswered_write_may_appear_late_but_not_vanish_again() -> None:
    write = Operation(True, (1, 1), 0)
    old, new = Operation(False, INITIAL, 1, 2), Operation(False, (1, 1), 3, 4)
    assert violation([write, old, new]) is None
    assert violation([write, old, new, Operation(False, INITIAL, 5, 6)]) is not None


def test_values_are_written_once() -> None:
    with pytest.raises(ValueError, match="twice"):
        violation([Operation(True, (1, 1), 0, 1), Operation(True, (1, 1), 2, 3)])


def test_a_block_shows_its_value() -> None:
    for value in (INITIAL, (1, 1), (8, 1 << 40)):
        assert value_of(block_of(value)) == value


@pytest.mark.parametrize("cut", [512, 2048, 4095])
def test_a_torn_block_is_seen(cut: int) -> None:
    with pytest.raises(TornBlock):
        value_of(block_of((1, 2))[:cut] + block_of((3, 4))[cut:])


def test_sectors_in_the_wrong_place_are_seen() -> None:
    block = block_of((1, 2))
    with pytest.raises(TornBlock):
        value_of(block[512:1024] + block[:512] + block[1024:])
