"""The reader of era metadata against era_restore, era_check, era_dump and era_invalidate.

`era_dump --logical` of 0.9.0 is no yardstick: of a block that several writesets mark it prints the
oldest era.  `era_invalidate` of 0.9.0 reads the live superblock only, which is what is read here.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from bitarray import bitarray
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmctl.model.era import EraDamagedError, Metadata, View
from tests.data.era.build import image
from tests.data.era.make_golden import restore, xml

pytestmark = pytest.mark.skipif(
    shutil.which("era_dump") is None,
    reason="era_dump is not installed: apt-get install thin-provisioning-tools",
)
SIZE_BLOCKS = 256
few = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=tmp_path) as made:
        yield Path(made)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    blocks = draw(st.one_of(st.integers(1, 300), st.sampled_from((1018, 1019, 2500))))
    current = draw(st.integers(2, 9))
    oldest = draw(st.integers(1, current))
    numbers = st.integers(0, blocks - 1)
    marks = draw(st.dictionaries(numbers, st.integers(0, oldest - 1), max_size=30))
    return {
        "blocks": blocks,
        "writesets": {
            era: sorted(draw(st.sets(numbers, max_size=20))) for era in range(oldest, current)
        },
        "digested": [marks.get(block, 0) for block in range(blocks)],
        "current": current,
    }


def view(data: bytes) -> View:
    return Metadata(lambda number: data[number * 4096 :][:4096]).live()


def dump(path: Path) -> ElementTree.Element | None:
    """What era_dump says, or None where it refuses."""
    done = subprocess.run(["era_dump", str(path)], capture_output=True, check=False, timeout=60)
    if done.returncode:
        return None
    try:
        return ElementTree.fromstring(done.stdout)  # noqa: S314 (of our own image)
    except ElementTree.ParseError:
        return None  # it found the damage after it had begun to print


def marked(top: ElementTree.Element, blocks: int) -> dict[int, bitarray]:
    """The writesets of a dump."""
    found = {}
    for writeset in top.findall("writeset"):
        bits = bitarray(blocks, endian="little")
        for bit in writeset.findall("bit"):
            bits[int(bit.attrib["block"])] = bit.attrib["value"] == "true"
        found[int(writeset.attrib["era"])] = bits
    return found


def eras(top: ElementTree.Element) -> list[int]:
    """The era array of a dump."""
    array = top.find("era_array")
    return [] if array is None else [int(era.attrib["era"]) for era in array]


def invalidated(path: Path, since: int) -> set[int]:
    """What era_invalidate says was written in era `since` or later."""
    done = subprocess.run(
        ["era_invalidate", "--written-since", str(since), str(path)],
        capture_output=True,
        check=True,
        timeout=60,
    )
    found: set[int] = set()
    for item in ElementTree.fromstring(done.stdout):  # noqa: S314 (of our own image)
        if item.tag == "block":
            found.add(int(item.attrib["block"]))
        else:
            found |= set(range(int(item.attrib["begin"]), int(item.attrib["end"])))
    return found


def agree(path: Path, state: View) -> None:
    whole = dump(path)
    assert whole is not None
    blocks = state.superblock.blocks
    assert int(whole.attrib["nr_blocks"]) == blocks
    assert int(whole.attrib["current_era"]) == state.superblock.current_era
    writesets = marked(whole, blocks)
    assert list(state.writesets) == sorted(writesets)
    for era, bits in writesets.items():
        assert state.writeset_bits(era) == bits, era
    newest = state.newest_era
    for since in {1, min(writesets, default=newest), newest}:
        digested = bitarray((era >= since for era in eras(whole)), endian="little")
        assert state.digested_bits(since) == digested
        for era, bits in writesets.items():
            if era >= since:
                digested |= bits
        assert state.bits_written(since) == digested
        assert {
            block for first, stop in state.blocks_written(since) for block in range(first, stop)
        } == invalidated(path, since)


@few
@given(case=cases())
def test_what_era_restore_made(folder: Path, case: dict[str, Any]) -> None:
    path = folder / "era.img"
    restore(xml(**case), path, SIZE_BLOCKS)
    agree(path, view(path.read_bytes()))


@few
@given(case=cases())
def test_what_the_tests_make_themselves(folder: Path, case: dict[str, Any]) -> None:
    made = image(case["blocks"], case["writesets"], case["digested"], case["current"])
    path = folder / "era.img"
    path.write_bytes(made.to_bytes(len(made.blocks)))
    agree(path, view(path.read_bytes()))


@few
@given(case=cases(), data=st.data())
def test_flipped_bits(folder: Path, case: dict[str, Any], data: st.DataObject) -> None:
    """The reader sees the damage, or it is where nothing is read for the answer, which is right."""
    path = folder / "era.img"
    restore(xml(**case), path, SIZE_BLOCKS)
    whole = path.read_bytes()
    before = view(whole).bits_written(1)
    used = view(whole).superblock.used
    changed = bytearray(whole)
    for bit in data.draw(st.sets(st.integers(0, used * 4096 * 8 - 1), min_size=1, max_size=4)):
        changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    try:
        after = view(bytes(changed)).bits_written(1)
    except EraDamagedError:
        checked = subprocess.run(["era_check", "-q", str(path)], check=False, timeout=60)
        assert checked.returncode, "the reader says damaged, era_check finds nothing"
    else:
        # era_dump may refuse: it also reads the era array, which these eras do not need.
        assert after == before


def test_era_check_accepts_what_the_golden_script_makes(folder: Path) -> None:
    path = folder / "era.img"
    restore(xml(20, {1: [3]}, [0] * 20, 2), path, SIZE_BLOCKS)
    subprocess.run(["era_check", str(path)], check=True, capture_output=True)
