"""model/era: reading dm-era's metadata; golden images, and everything that can be wrong with it."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from bitarray import bitarray

from bitmapd.errors import UsageError, WrongStateError
from dmctl.model.era import EraDamagedError, Metadata, View, read_superblock, runs
from tests.data.era.build import ARRAY, INTERNAL, LEAF, Image, image, marks, room_of_node, seal

FOLDER = Path(__file__).parents[2] / "data" / "era"
GOLDEN = sorted({path.name.removesuffix(".json") for path in FOLDER.glob("*.json")} - {"kernel"})


def written(case: dict[str, Any], since: int, to: int) -> bitarray:
    """What a description says, written the slow way."""
    last = {era: set(marked) for era, marked in case["writesets"].items()}
    oldest = min(last, default=case["current"])
    return bitarray(
        (
            any(block in last[era] for era in last if since <= era <= to)
            or (since < min(oldest, to + 1) and digested >= since)
            for block, digested in enumerate(case["digested"])
        ),
        endian="little",
    )


def small(**changes: Any) -> Image:
    """16 blocks; eras 1 to 3 digested, 4 to 6 in the tree of two levels, 7 is current."""
    arguments: dict[str, Any] = {
        "blocks": 16,
        "writesets": {4: [1, 2], 5: [], 6: [15]},
        "digested": [0] * 10 + [3, 2, 1, 0, 0, 0],
        "current_era": 7,
        "fanout": 2,
    }
    return image(**{**arguments, **changes})


def view(made: Image) -> View:
    return Metadata(made.read).live()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_image(name: str) -> None:
    data = gzip.decompress((FOLDER / f"{name}.img.gz").read_bytes())
    case = json.loads((FOLDER / f"{name}.json").read_text())
    case["writesets"] = {int(era): marked for era, marked in case["writesets"].items()}
    case["digested"] = [era for era, count in case["digested"] for _ in range(count)]
    state = Metadata(lambda number: data[number * 4096 :][:4096]).live()
    assert state.superblock.blocks == case["blocks"]
    assert state.superblock.current_era == case["current"]
    assert state.superblock.block_bytes == 65536
    assert 0 < state.superblock.used < state.superblock.total == 1024
    assert list(state.writesets) == sorted(case["writesets"])
    for era, marked in case["writesets"].items():
        assert state.writeset_bits(era) == marks(case["blocks"], marked)
    newest = case["current"] - 1
    for since in {1, 2, 3, newest, newest + 1} & set(range(1, newest + 2)):
        for to in {since, newest} & set(range(newest + 1)):
            assert state.bits_written(since, to) == written(case, since, to), (since, to)


def test_golden_snapshot_of_a_real_kernel() -> None:
    data = gzip.decompress((FOLDER / "kernel.img.gz").read_bytes())
    case = json.loads((FOLDER / "kernel.json").read_text())
    eras = {int(era): set(blocks) for era, blocks in case["eras"].items()}
    metadata = Metadata(lambda number: data[number * 4096 :][:4096])
    state = metadata.snapshot()
    assert state.superblock == metadata.snapshot(case["root"]).superblock
    newest = max(eras) - 1  # the last one began with the snapshot
    assert state.newest_era == metadata.live().newest_era == newest
    assert 1 < min(state.writesets) <= newest, "some eras are digested, some are not"
    for since in range(1, newest + 1):
        expected = set().union(*(eras.get(era, set()) for era in range(since, newest + 1)))
        assert set(state.bits_written(since).search(bitarray("1"))) == expected


def test_runs() -> None:
    assert list(runs(bitarray("0110111", endian="little"))) == [(1, 3), (4, 7)]
    assert list(runs(bitarray("10", endian="little"))) == [(0, 1)]
    assert list(runs(bitarray("000", endian="little"))) == []
    assert list(runs(bitarray())) == []


def test_blocks_of_an_era_that_is_in_the_tree() -> None:
    state = view(small())
    assert state.newest_era == 6
    assert list(state.blocks_written(4)) == [(1, 3), (15, 16)]
    assert list(state.blocks_written(5, 5)) == []
    assert list(state.blocks_written(6)) == [(15, 16)]
    assert list(state.blocks_written(7)) == [], "nothing is over since then"


def test_the_array_is_read_only_for_eras_that_are_digested() -> None:
    made = small()
    array = view(made).superblock.era_array_root
    asked: list[int] = []
    state = Metadata(lambda number: asked.append(number) or made.read(number)).live()  # type: ignore[func-returns-value]
    state.bits_written(4)
    assert array not in asked
    assert list(state.blocks_written(3)) == [(1, 3), (10, 11), (15, 16)]
    assert array in asked


def test_an_older_end_still_counts_later_digested_eras() -> None:
    state = view(small())
    assert list(state.blocks_written(1, 1)) == [(10, 13)], "the array keeps the last era alone"
    assert list(state.blocks_written(2, 4)) == [(1, 3), (10, 12)]
    assert list(runs(state.digested_bits(3))) == [(10, 11)]


@pytest.mark.parametrize(
    ("since", "to", "said"),
    [
        (0, None, "eras 0 to 6 are no range"),
        (8, None, "eras 8 to 6 are no range"),
        (5, 3, "eras 5 to 3 are no range"),
        (4, 7, "era 7 is not over: the newest one that is, is 6"),
    ],
)
def test_eras_that_cannot_be_asked_for(since: int, to: int | None, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        view(small()).bits_written(since, to)


def test_a_suspended_device_has_archived_its_current_era() -> None:
    made = small(writesets={4: [], 5: [1], 6: [2], 7: [3]})
    with pytest.raises(EraDamagedError, match="writeset of era 7, the newest is 6"):
        view(made)
    made.patch(0, 192, bytes(8))  # no root of a current bitset
    assert list(view(made).blocks_written(6)) == [(2, 4)]
    everything = small(writesets={}, digested=[7] * 16)
    everything.patch(0, 192, bytes(8))
    assert list(view(everything).blocks_written(7)) == [(0, 16)]


def test_a_snapshot_is_found_through_the_superblock_or_by_its_root() -> None:
    made = small(snapshot=True)
    root = view(made).superblock.snapshot_root
    assert list(Metadata(made.read).snapshot().blocks_written(4)) == [(1, 3), (15, 16)]
    del made.blocks[0]  # not even looked at
    state = Metadata(made.read).snapshot(root)
    assert state.superblock.location == root
    assert list(state.blocks_written(4)) == [(1, 3), (15, 16)]


def test_no_snapshot() -> None:
    with pytest.raises(WrongStateError, match="holds no metadata snapshot"):
        Metadata(small().read).snapshot()


def test_blocks_are_asked_for_in_batches() -> None:
    made = image(40_000, {1: range(0, 40_000, 7)}, [0] * 40_000, 2)
    batches: list[int] = []

    def read_blocks(numbers: Sequence[int]) -> list[memoryview]:
        batches.append(len(numbers))
        return [memoryview(made.blocks[number]) for number in numbers]

    state = Metadata(made.read, read_blocks).live()
    assert state.bits_written(1).count() == len(range(0, 40_000, 7))
    assert 2 in batches, "the two array blocks of the bitset"


def test_a_bitset_from_before_the_volume_grew() -> None:
    made = small()
    made.patch(leaf_of(made, 4), value_at(0, 12), struct.pack("<I", 3))
    assert list(view(made).blocks_written(4, 4)) == [(1, 3)]


# -- damage ------------------------------------------------------------------------------------
def leaf_of(made: Image, era: int) -> int:
    """The leaf of the writeset tree in which `era` comes first."""
    value = struct.pack("<Q", era)
    return next(
        number
        for number, block in made.blocks.items()
        if block[4:8] == struct.pack("<I", LEAF)
        and block[28:40] == struct.pack("<I", 0) + value
        and block[24:28] == struct.pack("<I", 12)
    )


def value_at(index: int, size: int) -> int:
    return 32 + 8 * room_of_node(size) + index * size


def root_of(field: int) -> Callable[[Image], int]:
    return lambda made: struct.unpack_from("<Q", made.blocks[0], field)[0]


writeset_tree, era_array = root_of(200), root_of(208)


def first_array_block(made: Image, root: int) -> int:
    return int(struct.unpack_from("<Q", made.blocks[root], value_at(0, 8))[0])


@pytest.mark.parametrize(
    ("offset", "data", "said"),
    [
        (8, struct.pack("<Q", 3), "superblock 0 says that it is block 3"),
        (32, b"\1", "magic number"),
        (40, struct.pack("<I", 2), "of version 2, known is 1"),
        (176, struct.pack("<I", 16), "metadata blocks of 16 sectors"),
        (172, struct.pack("<I", 0), "blocks of no size"),
        (184, struct.pack("<I", 1 << 31), "era 2147483648 is out of range"),
        (52, struct.pack("<Q", 1 << 40), "metadata blocks are used"),
        (200, struct.pack("<Q", 0), "writeset tree at block 0"),
        (208, struct.pack("<Q", 1 << 40), "era array at block 1099511627776"),
        (216, struct.pack("<Q", 1 << 40), "snapshot at block 1099511627776"),
    ],
)
def test_superblock_that_makes_no_sense(offset: int, data: bytes, said: str) -> None:
    made = small()
    made.patch(0, offset, data)
    with pytest.raises(EraDamagedError, match=said) as caught:
        read_superblock(made.blocks[0])
    assert caught.value.hint
    assert caught.value.code == "era-damaged"


def test_superblock_of_another_place_or_size() -> None:
    block = small().blocks[0]
    with pytest.raises(EraDamagedError, match="superblock 5 says that it is block 0"):
        read_superblock(block, 5)
    with pytest.raises(EraDamagedError, match="is 512 bytes long"):
        read_superblock(block[:512])
    with pytest.raises(EraDamagedError, match="superblock 0 has a wrong checksum"):
        read_superblock(bytes(4096))
    assert read_superblock(memoryview(bytearray(block))).blocks == 16


def check(made: Image, said: str) -> None:
    with pytest.raises(EraDamagedError, match=said):
        view(made).bits_written(1)


def test_a_block_of_the_wrong_type() -> None:
    made = small()
    number = writeset_tree(made)
    made.blocks[number] = seal(made.blocks[number], ARRAY)
    check(made, f"writeset tree {number} has a wrong checksum")


@pytest.mark.parametrize(
    ("offset", "data", "said"),
    [
        (4, struct.pack("<I", INTERNAL | LEAF), "is of kind 3, values of 8 B"),
        (4, struct.pack("<I", LEAF), "is of kind 2, values of 8 B"),
        (24, struct.pack("<I", 12), "is of kind 1, values of 12 B"),
        (20, struct.pack("<I", 255), "has 2 of 255 entries"),
        (16, struct.pack("<I", 255), "has 255 of 252 entries"),
        (16, struct.pack("<I", 0), "is empty"),
        (32, struct.pack("<QQ", 6, 4), "out of order"),
        (32, struct.pack("<QQ", 4, 4), "out of order"),
        (32, struct.pack("<QQ", 4, 5), "out of order"),  # the first leaf holds 4 and 5
        (32, struct.pack("<QQ", 5, 6), "out of order"),
        (value_at(0, 8), struct.pack("<Q", 0), "leads to block 0 of"),
        (value_at(0, 8), struct.pack("<Q", 4096), "leads to block 4096 of"),
    ],
)
def test_inner_node_that_makes_no_sense(offset: int, data: bytes, said: str) -> None:
    made = small()
    made.patch(writeset_tree(made), offset, data)
    check(made, said)


def test_a_leaf_below_the_root_is_not_empty() -> None:
    made = small()
    made.patch(leaf_of(made, 6), 16, struct.pack("<I", 0))
    check(made, "is empty")


def test_a_tree_that_leads_to_itself() -> None:
    made = Image()
    made.blocks = dict(small().blocks)
    node = made.node(INTERNAL, 8, [(0, struct.pack("<Q", len(made.blocks) + 1))])
    made.salts[0] = small().salts[0]
    made.patch(0, 44, struct.pack("<Q", 1000))
    made.patch(0, 200, struct.pack("<Q", node))
    check(made, "writeset tree is deeper than 16 levels")


def test_leaves_at_different_depths() -> None:
    made = small()
    made.patch(0, 44, struct.pack("<Q", 1000))
    leaf = leaf_of(made, 6)
    inner = made.node(INTERNAL, 8, [(6, struct.pack("<Q", leaf))])
    made.patch(writeset_tree(made), value_at(1, 8), struct.pack("<Q", inner))
    check(made, "leaves at different depths")


@pytest.mark.parametrize(
    ("era", "at", "data", "said"),
    [
        (6, 32, struct.pack("<Q", 7), "writeset of era 7, the newest is 6"),
        (4, 32, struct.pack("<Q", 0), "out of order"),
        (4, value_at(0, 12), struct.pack("<I", 17), "writeset 4 has 17 blocks, the volume 16"),
        (4, value_at(0, 12), struct.pack("<I", 2), "era 4 marks blocks beyond its 2"),
        (4, value_at(0, 12), struct.pack("<I", 0), "has 1 blocks, not 0 in a row"),
    ],
)
def test_writeset_that_makes_no_sense(era: int, at: int, data: bytes, said: str) -> None:
    made = small()
    made.patch(leaf_of(made, era), at, data)
    check(made, said)


def test_era_zero_has_no_writeset() -> None:
    check(small(writesets={0: [], **{era: [] for era in range(1, 7)}}), "writeset of era 0")


@pytest.mark.parametrize("missing", [{4: [], 6: []}, {4: [], 5: []}])
def test_an_era_without_writeset_is_no_empty_era(missing: dict[int, list[int]]) -> None:
    check(small(writesets=missing), "of eras 4 to 6 only 2 have a writeset")


def test_after_a_restore_the_current_era_may_lack_its_writeset() -> None:
    made = small(current_era=8, writesets={6: [], 7: [3]})
    made.patch(0, 192, bytes(8))
    assert list(view(made).blocks_written(7, 8)) == [(3, 4)]
    made = small(current_era=8, writesets={5: [], 6: [3]})
    made.patch(0, 192, bytes(8))
    check(made, "of eras 5 to 8 only 2 have a writeset")


@pytest.mark.parametrize(
    ("offset", "data", "said"),
    [
        (4, struct.pack("<I", 509), "has 16 of 509 values of 4 B, not 16 of 1018 of 4 B"),
        (8, struct.pack("<I", 15), "has 15 of 1018 values"),
        (12, struct.pack("<I", 8), "values of 8 B"),
        (24 + 4 * 15, struct.pack("<I", 7), "blocks 0 to 15 was written in an era later than 6"),
        (24, struct.pack("<I", 1 << 31), "blocks 0 to 15 was written in an era later than 6"),
    ],
)
def test_array_block_that_makes_no_sense(offset: int, data: bytes, said: str) -> None:
    made = small()
    made.patch(first_array_block(made, era_array(made)), offset, data)
    check(made, said)


def test_array_that_lacks_a_block() -> None:
    made = image(2000, {}, [1] * 2000, 2)
    made.patch(era_array(made), 16, struct.pack("<I", 1))
    check(made, "has 1 blocks, not 2 in a row")
    made = image(2000, {}, [1] * 2000, 2)
    made.patch(era_array(made), 40, struct.pack("<Q", 2))
    check(made, "has 2 blocks, not 2 in a row")
