"""Records that are damaged: golden images, unreadable places, repair."""

from __future__ import annotations

import errno
import gzip
import json
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from bitarray import bitarray

from bitmapd.errors import (
    BitmapdError,
    BusyError,
    ExistsError,
    ForeignRecordError,
    FormatTooNewError,
    NoSpaceError,
    NotFoundError,
    RecordDamagedError,
    UsageError,
)
from bitmapd.record import tool
from bitmapd.record.layout import (
    EXTENTS_PER_PAGE,
    PAGE_BYTES,
    RecordFlag,
    encode_page,
    page_bits,
    page_offset,
    record_size_bytes,
)
from tests.data import make_golden
from tests.support.loops import loop_device, sparse_file

NOW_S = 1_800_000_000
VOLUME = make_golden.VOLUME
NEED = record_size_bytes(make_golden.EXTENTS)
superblock = make_golden.superblock


# -- golden images ------------------------------------------------------------------------------

NAMES = sorted(make_golden.images())


@pytest.mark.parametrize("name", NAMES)
def test_the_golden_images_are_what_the_program_makes(name: str) -> None:
    packed = (make_golden.FOLDER / f"{name}.img.gz").read_bytes()
    assert gzip.decompress(packed) == make_golden.images()[name]


def test_no_golden_image_is_left_over() -> None:
    found = {path.name for path in make_golden.FOLDER.glob("*.img.gz")}
    assert found == {f"{name}.img.gz" for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_golden_images_are_read_as_ever(name: str, golden: Callable[[str], str]) -> None:
    path = golden(name)
    expected = json.loads((make_golden.FOLDER / f"{name}.json").read_text())
    assert make_golden.described(Path(path).read_bytes()) == expected
    report = tool.check(path, VOLUME)
    assert report.exit_status == expected["check"]["exit_status"]
    if "error" in expected["dump"]:
        with pytest.raises(BitmapdError) as caught:
            tool.load(path)
        assert caught.value.code == expected["dump"]["error"]["code"]
        assert caught.value.message == f"{path}: {expected['dump']['error']['message']}"
    else:
        assert tool.dump(tool.load(path)) == expected["dump"]
        assert report.to_json() == expected["check"]


def test_the_statuses_of_the_golden_images_differ_as_they_should(
    golden: Callable[[str], str],
) -> None:
    statuses = {name: tool.check(golden(name), VOLUME).exit_status for name in NAMES}
    assert statuses == {
        "clean": 0,
        "dirty": 0,
        "foreign": 22,
        "foreign-page": 20,
        "interrupted-update": 0,
        "newer-format": 21,
        "no-superblock": 20,
        "one-superblock": 20,
        "pair-joined": 22,
        "pair-joining": 22,
        "pair-origin": 0,
        "rotten-page": 20,
        "torn-page": 0,
    }


# -- unreadable places --------------------------------------------------------------------------


class BadSectors:
    """Reads through to a real file and fails as a disk does where sectors are bad."""

    def __init__(self, *sectors: int, sector_bytes: int = 512) -> None:
        self.bad = {sector * sector_bytes for sector in sectors}
        self.sector_bytes = sector_bytes

    def __call__(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        stop = offset + len(buffers[0])
        if any(offset < at + self.sector_bytes and at < stop for at in self.bad):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(fd, buffers, offset)


def test_one_bad_sector_costs_one_page_and_spares_its_neighbours(
    golden: Callable[[str], str],
) -> None:
    sector = (page_offset(1, 0) + 1536) // 512
    loaded = tool.load(golden("dirty"), BadSectors(sector))
    assert loaded.damaged == (1,)
    assert "slot 0 has damaged sectors: 3" in loaded.pages[1].message
    assert loaded.pages[1].highest == 200  # what could be read is known
    assert loaded.warnings == (
        f"the 4 KiB at byte {page_offset(1, 0)} cannot be read in full: Input/output error",
    )


def test_a_bad_sector_of_a_4_kib_device_costs_the_whole_slot(golden: Callable[[str], str]) -> None:
    read = BadSectors(page_offset(1, 1) // 4096, sector_bytes=4096)
    loaded = tool.load(golden("dirty"), read)
    assert loaded.damaged == (1,)
    assert "slot 1 cannot be read" in loaded.pages[1].message


def test_an_unreadable_superblock_copy_is_a_warning_and_two_are_damage(
    golden: Callable[[str], str],
) -> None:
    path = golden("dirty")
    report = tool.check(path, VOLUME, BadSectors(1))
    assert report.exit_status == 20
    assert any("superblock copy A" in finding.message for finding in report.findings)
    assert tool.probe(path, BadSectors(1)) == superblock()
    whole = BadSectors(0, 16, sector_bytes=4096)
    with pytest.raises(RecordDamagedError, match="both copies of the superblock are bad"):
        tool.load(path, whole)
    assert tool.check(path, VOLUME, whole).exit_status == 20


def test_a_file_that_ends_inside_a_bad_chunk_is_read_as_far_as_it_goes(
    golden: Callable[[str], str],
) -> None:
    path = golden("dirty")
    os.truncate(path, page_offset(2, 1) + 700)
    loaded = tool.load(path, BadSectors(page_offset(0, 0) // 512))
    assert loaded.damaged == (0, 2)
    assert "slot 1 is cut short after 700 bytes" in loaded.pages[2].message


def test_a_medium_that_cannot_be_flushed_is_not_relied_upon(
    golden: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = golden("dirty")

    def fails(number: int) -> Callable[[int], None]:
        def flush(_fd: int) -> None:
            raise OSError(number, os.strerror(number))

        return flush

    monkeypatch.setattr(os, "fdatasync", fails(errno.EIO))
    with pytest.raises(RecordDamagedError, match="cannot be flushed"):
        tool.load(path)
    monkeypatch.setattr(os, "fdatasync", fails(errno.EROFS))
    assert tool.load(path).superblock == superblock()
    monkeypatch.setattr(os, "fsync", fails(errno.EIO))
    with pytest.raises(BitmapdError, match=f"cannot flush {path}"):
        tool.format_record(path, superblock(), False, force=True)


# -- repair -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["dirty", "rotten-page", "torn-page", "one-superblock", "foreign-page", "interrupted-update"],
)
def test_a_repaired_copy_is_sound_and_names_no_less(
    name: str, golden: Callable[[str], str], tmp_path: Path
) -> None:
    path = golden(name)
    before = Path(path).read_bytes()
    found = tool.repair(path, tmp_path / "healed", NOW_S)
    assert Path(path).read_bytes() == before
    loaded = tool.load(tmp_path / "healed")
    assert loaded.bits == found.bits
    assert loaded.superblock == found.superblock.updated(
        NOW_S, flags=found.superblock.flags & ~RecordFlag.CLEAN
    )
    assert tool.check(tmp_path / "healed", VOLUME).findings == ()
    assert min(page.sequence for page in loaded.pages) > max(p.highest for p in found.pages)


def test_a_clean_record_stays_clean(golden: Callable[[str], str], tmp_path: Path) -> None:
    tool.repair(golden("clean"), tmp_path / "copy", NOW_S)
    assert tool.load(tmp_path / "copy").superblock.clean


@pytest.mark.parametrize(
    ("name", "error"), [("no-superblock", RecordDamagedError), ("newer-format", FormatTooNewError)]
)
def test_what_cannot_be_loaded_cannot_be_repaired(
    name: str, error: type[BitmapdError], golden: Callable[[str], str], tmp_path: Path
) -> None:
    with pytest.raises(error):
        tool.repair(golden(name), tmp_path / "healed", NOW_S)
    assert not (tmp_path / "healed").exists()


def test_a_record_is_never_repaired_in_place(golden: Callable[[str], str], tmp_path: Path) -> None:
    path = golden("rotten-page")
    (tmp_path / "link").symlink_to(path)
    os.link(path, tmp_path / "hard")
    before = Path(path).read_bytes()
    for output in (path, tmp_path / "link", tmp_path / "hard"):
        with pytest.raises(UsageError, match="is the record that is to be repaired"):
            tool.repair(path, output, NOW_S)
    with loop_device(Path(path)) as name, pytest.raises(UsageError, match="to be repaired"):
        tool.repair(path, name, NOW_S)
    assert Path(path).read_bytes() == before


def test_a_repair_overwrites_nothing(golden: Callable[[str], str], tmp_path: Path) -> None:
    path = golden("rotten-page")
    with pytest.raises(ExistsError, match="exists"):
        tool.repair(path, sparse_file(tmp_path / "there", 0), NOW_S)
    with pytest.raises(NotFoundError, match="cannot make"):
        tool.repair(path, tmp_path / "no" / "folder", NOW_S)
    with loop_device(sparse_file(tmp_path / "disk", NEED)) as name:
        tool.repair(path, name, NOW_S)
        assert tool.check(name, VOLUME).exit_status == 0
        with pytest.raises(ForeignRecordError, match="holds the record of volume 'vol0'") as caught:
            tool.repair(path, name, NOW_S)
        assert caught.value.hint == "name an empty device or a new file"
        with tool.RecordMedium.open(name), pytest.raises(BusyError, match="in use"):
            tool.repair(path, name, NOW_S)
    with (
        loop_device(sparse_file(tmp_path / "small", 8192)) as name,
        pytest.raises(NoSpaceError, match=f"has 8192 bytes; the record needs {NEED}"),
    ):
        tool.repair(path, name, NOW_S)


def test_a_failed_repair_leaves_no_file(
    golden: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output = golden("rotten-page"), tmp_path / "healed"

    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", fails)
        with pytest.raises(NoSpaceError):
            tool.repair(path, output, NOW_S)
    assert not output.exists()
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", fails)
        with pytest.raises(NoSpaceError):
            tool.repair(path, output, NOW_S)
    assert not output.exists()
    tool.repair(path, output, NOW_S)


def test_a_page_written_as_the_store_does_is_loaded_from_disk(medium: str) -> None:
    """The way of a miss: direct, durable, to the slot that is not the newest."""
    tool.format_record(medium, superblock(), False)
    bits = bitarray(make_golden.EXTENTS, endian="little")
    bits[EXTENTS_PER_PAGE + 5] = True
    state = tool.load(medium).pages[1]
    raw = encode_page(VOLUME.bytes, 1, state.highest + 1, state.sequence, page_bits(bits, 1))
    with tool.RecordMedium.open(medium) as held:
        view = memoryview(mmap.mmap(-1, PAGE_BYTES))
        view[:] = raw
        held.write(page_offset(1, 1 - state.newest_slot), view, os.RWF_DSYNC)
    loaded = tool.load(medium)
    assert loaded.bits == bits
    assert (loaded.pages[1].newest_slot, loaded.pages[1].sequence) == (1, 3)
