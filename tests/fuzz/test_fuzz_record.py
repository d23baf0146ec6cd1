"""Fuzz of the record as it comes from a device: nothing but our own errors, and never too few bits.

The images start from the golden ones, so that mutations get past the checksums' front door; half of
them get their checksums made valid again, as only a mistaken or malicious writer could.
`FUZZ_EXAMPLES` says how long.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from bitarray import bitarray
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.errors import BitmapdError, FormatTooNewError, NotFoundError, RecordDamagedError
from bitmapd.record import tool
from bitmapd.record.layout import (
    PAGE_BYTES,
    SUPERBLOCK_OFFSETS,
    assemble,
    choose_superblock,
    page_offset,
)
from bitmapd.record.pages import page_seed
from tests.data import make_golden

IMAGES = make_golden.images()
LENGTH = len(IMAGES["dirty"])
UNITS = LENGTH // PAGE_BYTES

offsets = st.one_of(
    st.integers(0, 800),
    st.integers(65536, 65536 + 800),
    st.integers(page_offset(0, 0), LENGTH - 1),
    st.builds(
        lambda unit, at: unit * PAGE_BYTES + at,
        st.integers(0, UNITS - 1),
        st.sampled_from([0, 4, 8, 16, 24, 496, 504, 508, 511, 512, 4092]),
    ),
)
mutations = st.lists(
    st.one_of(
        st.tuples(st.just("set"), offsets, st.binary(min_size=1, max_size=64)),
        st.tuples(st.just("flip"), offsets, st.integers(0, 7)),
        st.tuples(st.just("move"), st.integers(0, UNITS - 1), st.integers(0, UNITS - 1)),
        st.tuples(st.just("fill"), st.integers(0, UNITS - 1), st.sampled_from([0, 255])),
    ),
    max_size=8,
)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """One folder for all examples: a function's own would be shared by them, too."""
    with tempfile.TemporaryDirectory(prefix="fuzz-record-") as name:
        yield Path(name)


def mutate(image: bytearray, steps: list[tuple]) -> None:
    for name, first, second in steps:
        if name == "set":
            image[first : first + len(second)] = second
        elif name == "flip":
            image[first] ^= 1 << second
        elif name == "move":
            source = image[first * PAGE_BYTES : (first + 1) * PAGE_BYTES]
            image[second * PAGE_BYTES : (second + 1) * PAGE_BYTES] = source
        else:
            image[first * PAGE_BYTES : (first + 1) * PAGE_BYTES] = bytes([second]) * PAGE_BYTES
    del image[LENGTH:]


def reseal(image: bytearray) -> None:
    """Valid checksums everywhere, whatever they now vouch for."""
    seed = crc32c(b"bitmapd superblock")
    for offset in SUPERBLOCK_OFFSETS:
        end = offset + PAGE_BYTES - 4
        image[end : end + 4] = crc32c(image[offset:end], seed).to_bytes(4, "little")
    volume = make_golden.VOLUME.bytes
    for index in range(3):
        seed = page_seed(volume, index)
        for start in range(page_offset(index, 0), page_offset(index + 1, 0), 512):
            end = start + 508
            image[end : end + 4] = crc32c(image[start:end], seed).to_bytes(4, "little")


def everything_is_said_or_refused(image: bytes, folder: Path) -> None:
    """The same outcome from the device as from memory, and no error that is not ours."""
    path = folder / "record"
    path.write_bytes(image)
    try:
        loaded = tool.load(path)
    except (RecordDamagedError, FormatTooNewError, NotFoundError) as error:
        refused: BitmapdError | None = error
    else:
        refused = None
        json.dumps(tool.dump(loaded))
        assert len(loaded.bits) == loaded.superblock.geometry.extents
        assert len(loaded.pages) == loaded.superblock.page_count
    output = folder / "healed"
    try:
        report = tool.check(path, make_golden.VOLUME)
        assert (report.superblock is None) == (refused is not None)
        assert report.exit_status in (0, 20, 21, 22)
        found = tool.repair(path, output, 1)
        assert refused is None
        assert tool.load(output).bits == found.bits
    except (RecordDamagedError, FormatTooNewError, NotFoundError):
        # A record may be loaded and yet not be repaired: features that forbid writing, or
        # sequences that are used up.
        assert not output.exists()
    finally:
        output.unlink(missing_ok=True)


@given(st.sampled_from(sorted(IMAGES)), mutations, st.booleans(), st.integers(0, LENGTH))
def test_mutated_records(
    folder: Path, name: str, steps: list[tuple], sealed: bool, cut: int
) -> None:
    image = bytearray(IMAGES[name])
    mutate(image, steps)
    if sealed:
        reseal(image)
    if cut % 7 == 0:
        del image[cut:]
    everything_is_said_or_refused(bytes(image), folder)


@given(st.binary(max_size=300), st.integers(0, 2 * LENGTH))
def test_garbage(folder: Path, seed: bytes, length: int) -> None:
    image = (seed * (length // max(len(seed), 1) + 1))[:length]
    everything_is_said_or_refused(image, folder)


@pytest.mark.parametrize("fill", [b"\0", b"\xff"])
@pytest.mark.parametrize("length", [0, 1, 511, 4096, 65536, 65537, LENGTH, LENGTH + 1])
def test_wiped_devices(folder: Path, fill: bytes, length: int) -> None:
    everything_is_said_or_refused(fill * length, folder)


@given(mutations)
def test_mutations_without_a_forger_never_lose_an_extent(steps: list[tuple]) -> None:
    """What chance can do to a record leaves every extent in it, or it is refused."""
    original = IMAGES["dirty"]
    truth = bits_of(original)
    assert truth is not None
    image = bytearray(original)
    mutate(image, steps)
    try:
        found = bits_of(bytes(image))
    except (RecordDamagedError, FormatTooNewError):
        return
    if found is not None:
        assert truth & found == truth


def bits_of(image: bytes) -> bitarray | None:
    def unit(offset: int) -> bytes | None:
        return image[offset : offset + PAGE_BYTES] or None

    choice = choose_superblock(*(unit(offset) for offset in SUPERBLOCK_OFFSETS))
    if choice is None:
        return None
    count = choice.superblock.page_count
    return assemble(
        choice, [(unit(page_offset(i, 0)), unit(page_offset(i, 1))) for i in range(count)]
    ).bits


def test_random_bytes_are_refused(folder: Path) -> None:
    everything_is_said_or_refused(os.urandom(LENGTH), folder)
