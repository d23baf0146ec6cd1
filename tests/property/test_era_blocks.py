"""Any metadata is read as it was made, and damage never makes blocks disappear."""

from __future__ import annotations

from typing import Any

from bitarray import bitarray
from hypothesis import given
from hypothesis import strategies as st

from dmctl.model.era import EraDamagedError, Metadata, runs
from tests.data.era.build import Image, image


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Eras oldest.. are in the tree, older ones are digested, the oldest perhaps by half."""
    blocks = draw(
        st.one_of(st.integers(1, 200), st.sampled_from((1018, 1019, 2037, 32_576, 32_577)))
    )
    current = draw(st.integers(1, 12))
    oldest = draw(st.integers(1, current))
    numbers = st.integers(0, blocks - 1)
    writesets = {
        era: draw(
            st.one_of(
                st.sets(numbers, max_size=8), st.builds(range, numbers, st.integers(0, blocks))
            )
        )
        for era in range(oldest, current)
    }
    digested = [0] * blocks
    for block, era in draw(
        st.dictionaries(numbers, st.integers(0, oldest - 1), max_size=20)
    ).items():
        digested[block] = era
    half = draw(numbers)
    for block in writesets.get(oldest, ()):
        if block < half:
            digested[block] = oldest
    return {
        "blocks": blocks,
        "writesets": writesets,
        "digested": digested,
        "current_era": current,
        "fanout": draw(st.sampled_from((None, 2, 3))),
        "snapshot": draw(st.booleans()),
    }


def written(case: dict[str, Any], since: int, to: int) -> set[int]:
    oldest = min(case["writesets"], default=case["current_era"])
    found = {
        block for era, marked in case["writesets"].items() if since <= era <= to for block in marked
    }
    if since < min(oldest, to + 1):
        found |= {block for block, era in enumerate(case["digested"]) if era >= since}
    return found


def read(made: Image, case: dict[str, Any], since: int, to: int) -> bitarray:
    metadata = Metadata(made.read)
    state = metadata.snapshot() if case["snapshot"] else metadata.live()
    return state.bits_written(since, to)


@given(cases(), st.data())
def test_metadata_is_read_as_it_was_made(case: dict[str, Any], data: st.DataObject) -> None:
    since = data.draw(st.integers(1, case["current_era"]))
    to = data.draw(st.integers(since - 1, case["current_era"] - 1))
    found = read(image(**case), case, since, to)
    assert set(found.search(1)) == written(case, since, to)
    assert {b for first, stop in runs(found) for b in range(first, stop)} == set(found.search(1))


@given(cases(), st.data())
def test_damage_is_an_error_or_harmless(case: dict[str, Any], data: st.DataObject) -> None:
    made = image(**case)
    since = data.draw(st.integers(1, case["current_era"]))
    number = data.draw(st.sampled_from(sorted(made.blocks)))
    kind = data.draw(st.sampled_from(("flip", "misdirected", "zeroed", "torn", "short")))
    block = bytearray(made.blocks[number])
    other = made.blocks[data.draw(st.sampled_from(sorted(made.blocks)))]
    match kind:
        case "flip":
            for bit in data.draw(st.sets(st.integers(0, 4096 * 8 - 1), min_size=1, max_size=5)):
                block[bit // 8] ^= 1 << bit % 8
        case "misdirected":
            block[:] = other
        case "zeroed":
            block[:] = bytes(4096)
        case "torn":
            half = data.draw(st.sampled_from((512, 1024, 3584)))
            block[half:] = other[half:]
        case "short":
            del block[data.draw(st.integers(0, 4095)) :]
    made.blocks[number] = bytes(block)
    try:
        found = read(made, case, since, case["current_era"] - 1)
    except EraDamagedError:
        return
    assert set(found.search(1)) >= written(case, since, case["current_era"] - 1)
