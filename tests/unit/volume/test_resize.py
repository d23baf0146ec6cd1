"""resize: the record while a volume grows, when hosts, errors and crashes come in between."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path

import pytest

from bitmapd.errors import BitmapdError
from bitmapd.media.waiting import completion
from bitmapd.record import tool
from bitmapd.record.geometry import KIB, MIB, Geometry
from bitmapd.record.layout import EXTENTS_PER_PAGE, page_count, record_size_bytes
from bitmapd.volume.resize import new_page_states
from tests.support.local import LocalVolume
from tests.support.mirror import BLOCK, EXTENT, Answers, Mirror, copy_everything, settled
from tests.support.serving import BrokenRecord, run, serving
from tests.support.sim import drain

# -- the last extent, which has a new part -----------------------------------------------------


def short() -> Mirror:
    """The last extent, 7, is half inside the volume, recorded and clean."""
    mirror = Mirror(size_bytes=8 * EXTENT - 2 * BLOCK, limit_extents=2)
    mirror.policy.kept = {7}
    mirror.put(28)
    copy_everything(mirror)
    settled(mirror)
    assert mirror.recorded() == {7}
    assert mirror.gate.is_clean(7)
    return mirror


def evict_7(mirror: Mirror) -> None:
    """Misses elsewhere, and the policy wants to be rid of 7."""
    mirror.policy.unloved, mirror.policy.kept, mirror.policy.expiring = [7], set(), [7]
    mirror.put(0)
    mirror.put(4)
    mirror.gate.tick()
    mirror.run()


@pytest.mark.parametrize("recorded", [True, False])
def test_the_last_extent_cannot_leave_while_a_volume_grows(recorded: bool) -> None:
    mirror = short()
    if not recorded:
        evict_7(mirror)
        assert 7 not in mirror.stored()
    answers: Answers = []
    mirror.gate.prepare_growth(answers.append)
    evict_7(mirror)
    assert answers == [None]
    mirror.gate.drop_all_clean()
    mirror.run()
    assert 7 in mirror.stored()
    assert mirror.gate.may_differ(28, 29)
    mirror.gate.grow(dataclasses.replace(mirror.geometry, size_bytes=10 * EXTENT))
    assert mirror.gate.is_dirty(30, 32)


def test_it_leaves_like_any_other_when_the_volume_has_grown() -> None:
    mirror = short()
    answers: Answers = []
    mirror.gate.prepare_growth(answers.append)
    mirror.run()
    larger = dataclasses.replace(mirror.geometry, size_bytes=8 * EXTENT)
    mirror.store.grow(larger, ())
    mirror.gate.grow(larger)
    copy_everything(mirror)
    settled(mirror)
    evict_7(mirror)
    assert 7 not in mirror.stored()


def test_a_last_extent_that_is_full_is_left_alone() -> None:
    mirror = Mirror(size_bytes=8 * EXTENT)
    answers: Answers = []
    mirror.gate.prepare_growth(answers.append)
    drain(mirror.loop, mirror.record)
    assert answers == [None]
    assert mirror.stored() == set()


# -- errors at every step -----------------------------------------------------------------------

EXTENT_BYTES = 64 * KIB
OLD_BYTES = 8 * MIB + 4 * KIB
NEW = Geometry((EXTENTS_PER_PAGE + 8) * EXTENT_BYTES, EXTENT_BYTES, 64 * KIB)


def growing(tmp_path: Path, short_path: Path) -> LocalVolume:
    """A volume whose media have grown until its record needs a second page."""
    local = LocalVolume(
        tmp_path, short_path, size_bytes=OLD_BYTES, extent_bytes=EXTENT_BYTES, extent_size="64KiB"
    )
    for path, size_bytes in (
        (local.primary, NEW.size_bytes),
        (local.secondary, NEW.size_bytes),
        (local.record, record_size_bytes(NEW.extents)),
    ):
        os.truncate(path, size_bytes)
    return local


def check_stored(local: LocalVolume, folder: Path) -> int:
    """The size that would be in force after a crash; whatever it is, the record is right for it."""
    image = folder / "crashed"
    image.write_bytes(local.record.read_bytes())
    loaded = tool.load(image)
    assert not loaded.damaged
    geometry = loaded.superblock.geometry
    first = OLD_BYTES // EXTENT_BYTES
    if geometry.size_bytes > OLD_BYTES:
        assert loaded.bits[first:].all(), "new extents are not in the record"
    return geometry.size_bytes


def content(path: Path) -> dict[int, bytes]:
    """Every piece of 64 KiB that is not zero; holes of the 2 GiB are not read."""
    found = {}
    with path.open("rb") as stream:
        at = 0
        while True:
            try:
                at = os.lseek(stream.fileno(), at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # no data up to the end
                    raise
                return found
            at -= at % EXTENT_BYTES
            piece = os.pread(stream.fileno(), EXTENT_BYTES, at)
            if any(piece):
                found[at] = piece
            at += EXTENT_BYTES


class Failing:
    """The write of that number, and every one after it, fails; of the first so much lands."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, landing: bool) -> None:
        self.left = number
        self.hit = False
        write = tool.RecordMedium.write

        def failing(
            medium: tool.RecordMedium, offset: int, view: memoryview, flags: int = 0
        ) -> None:
            self.left -= 1
            if self.left >= 0:
                write(medium, offset, view, flags)
                return
            if landing and not self.hit:
                write(medium, offset, view, flags)
            self.hit = True
            raise BitmapdError("cannot write: Input/output error")

        monkeypatch.setattr(tool.RecordMedium, "write", failing)


@pytest.mark.parametrize("landing", [False, True])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_growth_that_failed_at_any_write_can_be_repeated(
    tmp_path: Path, short_path: Path, number: int, landing: bool
) -> None:
    """The writes are those of the new pages and of the two superblocks."""
    local = growing(tmp_path, short_path)

    async def test() -> None:
        async with serving(local) as served:
            volume = served.volume
            with pytest.MonkeyPatch.context() as patch:
                failing = Failing(patch, number, landing)
                with pytest.raises(BitmapdError, match="cannot write"):
                    await volume.resize()
                assert failing.hit
                assert volume.status()["size_bytes"] == OLD_BYTES
                await served.write(0, b"w" * 4096)  # hosts go on
                await served.in_sync()
                volume.gate.drop_all_clean()
                volume.gate.tick()
                await completion(volume._parts.store.when_idle)
                check_stored(local, tmp_path)
            assert await volume.resize() == {"size_bytes": NEW.size_bytes, "changed": True}
            assert check_stored(local, tmp_path) == NEW.size_bytes
            assert len(volume._parts.store._pages._pages) == page_count(NEW.extents)
            assert volume._parts.store.recorded_extents == volume._parts.store.recorded.count()
            await served.in_sync()

    run(test())
    assert local.superblock.clean
    assert local.superblock.geometry == NEW


def test_a_size_that_failed_stays_right_when_a_smaller_one_is_tried(
    tmp_path: Path, short_path: Path
) -> None:
    """The larger one is in force in one copy of the superblock; then only pages are written."""
    local = growing(tmp_path, short_path)

    async def test() -> None:
        async with serving(local) as served:
            for extents, landing, in_force in ((8, True, 8), (4, False, 8), (4, True, 4)):
                size_bytes = (EXTENTS_PER_PAGE + extents) * EXTENT_BYTES
                os.truncate(local.primary, size_bytes)
                with pytest.MonkeyPatch.context() as patch:
                    Failing(patch, 1, landing)
                    with pytest.raises(BitmapdError, match="cannot write"):
                        await served.volume.resize()
                found = check_stored(local, tmp_path)
                assert found == (EXTENTS_PER_PAGE + in_force) * EXTENT_BYTES

    run(test())


def test_growth_whose_page_cannot_be_written_can_be_repeated(
    tmp_path: Path, short_path: Path
) -> None:
    local = growing(tmp_path, short_path)

    async def test() -> None:
        async with serving(local) as served:
            broken = BrokenRecord(served)
            with pytest.raises(OSError, match="Bad file descriptor"):
                await served.volume.resize()
            assert check_stored(local, tmp_path) == OLD_BYTES
            broken.mend()
            assert (await served.volume.resize())["changed"]
            assert check_stored(local, tmp_path) == NEW.size_bytes
            await served.in_sync()

    run(test())
    assert content(local.primary) == content(local.secondary)


@pytest.mark.parametrize("landing", [False, True])
def test_a_stop_after_growth_that_failed_leaves_a_record_that_is_right(
    tmp_path: Path, short_path: Path, landing: bool
) -> None:
    local = growing(tmp_path, short_path)

    async def test() -> None:
        async with serving(local) as served:
            with pytest.MonkeyPatch.context() as patch:
                Failing(patch, 2, landing)
                with pytest.raises(BitmapdError):
                    await served.volume.resize()
            answer = await served.volume.stop(False)
            assert (answer["clean"], answer["record_extents"]) == (False, 1)

    run(test())
    check_stored(local, tmp_path)


def test_pages_are_added_as_they_were_written() -> None:
    assert len(new_page_states(Geometry(OLD_BYTES, EXTENT_BYTES, EXTENT_BYTES), NEW)) == 1
