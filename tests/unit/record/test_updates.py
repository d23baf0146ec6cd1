"""updates: superblocks of a record in use, with writes that fail and land all the same, or torn."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.errors import BitmapdError
from bitmapd.record import tool
from bitmapd.record.geometry import MIB, Geometry
from bitmapd.record.layout import SUPERBLOCK_BYTES, SUPERBLOCK_OFFSETS, Superblock
from bitmapd.record.updates import SuperblockUpdates
from tests.support.records import superblock

SECTORS = SUPERBLOCK_BYTES // 512
GEOMETRY = Geometry(8 * MIB)


class Unsteady(tool.RecordMedium):
    """Of every write with a fate so many sectors land, and then it fails."""

    fates: list[int | None]

    def write(self, offset_bytes: int, view: memoryview, flags: int = 0) -> None:
        landing = self.fates.pop(0) if self.fates else None
        if landing is None:
            super().write(offset_bytes, view, flags)
            return
        if landing:
            super().write(offset_bytes, view[: landing * 512], flags)
        raise BitmapdError("cannot write: Input/output error")


def unsteady(path: Path) -> Unsteady:
    medium = Unsteady.open(path)
    assert isinstance(medium, Unsteady)
    medium.fates = []
    return medium


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("updates") / "record"
    path.write_bytes(bytes(1 << 20))
    return path


def test_invariant_1_a_sequence_is_used_once(record: Path) -> None:
    """Copy B was written although the write failed; then power is cut before it is again."""
    tool.format_record(record, superblock(GEOMETRY), False, force=True)
    with unsteady(record) as medium:
        updates = SuperblockUpdates(medium, tool.load(medium))
        medium.fates = [None, SECTORS]
        with pytest.raises(BitmapdError):
            updates.update(5, session=1)
        assert updates.superblock == superblock(GEOMETRY)
        medium.fates = [None, 0]
        with pytest.raises(BitmapdError):
            updates.update(6, session=2)
        assert tool.load(medium).superblock.session == 2
        written = updates.update(7, session=3)
        assert (written.sequence, written.session) == (superblock(GEOMETRY).sequence + 3, 3)
        assert updates.superblock == written
        assert tool.load(medium).messages == ()


@pytest.mark.parametrize("spoilt", [0, 1])
def test_invariant_2_the_only_good_copy_is_never_written_first(record: Path, spoilt: int) -> None:
    tool.format_record(record, superblock(GEOMETRY), False, force=True)
    with record.open("r+b") as stream:
        stream.seek(SUPERBLOCK_OFFSETS[spoilt])
        stream.write(os.urandom(SUPERBLOCK_BYTES))
    with unsteady(record) as medium:
        updates = SuperblockUpdates(medium, tool.load(medium))
        medium.fates = [3]
        with pytest.raises(BitmapdError):
            updates.update(5, session=1)
        assert tool.load(medium).superblock == superblock(GEOMETRY)


fates = st.one_of(st.none(), st.integers(0, SECTORS))


@given(lives=st.lists(st.lists(st.tuples(fates, fates), min_size=1, max_size=4), max_size=4))
def test_whatever_fails_the_next_start_finds_a_superblock_that_was_asked_for(
    record: Path, lives: list[list[tuple[int | None, int | None]]]
) -> None:
    """Each life is one session: it loads the record, updates it, and ends at any point."""
    tool.format_record(record, superblock(GEOMETRY), False, force=True)
    expected: list[Superblock] = [superblock(GEOMETRY)]  # what was durable last, then what failed
    session = 0
    for updates_of_life in [*lives, []]:
        with unsteady(record) as medium:
            loaded = tool.load(medium)
            assert loaded.superblock.session in [known.session for known in expected]
            expected = [loaded.superblock]
            updates = SuperblockUpdates(medium, loaded)
            for fate in updates_of_life:
                medium.fates = list(fate)
                session += 1
                tried = updates.superblock.updated(session, session=session)
                try:
                    expected = [updates.update(session, session=session)]
                except BitmapdError:
                    expected.append(tried)
