"""Record devices as they are: files, loop devices of both sector sizes, and their failures."""

from __future__ import annotations

import errno
import gzip
import json
import mmap
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

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
    PermissionError_,
    RecordDamagedError,
    UsageError,
)
from bitmapd.record import tool
from bitmapd.record.geometry import Geometry
from bitmapd.record.layout import (
    EXTENTS_PER_PAGE,
    PAGE_BYTES,
    PAGES_OFFSET,
    SUPERBLOCK_OFFSETS,
    RecordFlag,
    encode_page,
    encode_superblock,
    page_bits,
    page_offset,
    record_size_bytes,
)
from bitmapd.record.pages import HEAL_JUMP
from tests.data import make_golden
from tests.support.loops import loop_device, run, sparse_file

NOW_S = 1_800_000_000
OTHER = UUID(int=42)
VOLUME = make_golden.VOLUME
NEED = record_size_bytes(make_golden.EXTENTS)
superblock = make_golden.superblock


@pytest.fixture(params=["file", "loop-512", "loop-4096"])
def medium(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty place for a record that is somewhat larger than needed."""
    path = sparse_file(tmp_path / "medium", NEED + 8192)
    if request.param == "file":
        yield str(path)
        return
    with loop_device(path, int(request.param.partition("-")[2])) as name:
        yield name


@pytest.fixture
def golden(tmp_path: Path) -> Callable[[str], str]:
    def unpack(name: str) -> str:
        packed = (make_golden.FOLDER / f"{name}.img.gz").read_bytes()
        path = tmp_path / name
        path.write_bytes(gzip.decompress(packed))
        return str(path)

    return unpack


def alter(path: str, offset: int, raw: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())


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
        "rotten-page": 20,
        "torn-page": 0,
    }


# -- format and load ----------------------------------------------------------------------------


@pytest.mark.parametrize("ones", [False, True])
def test_a_new_record_is_what_was_asked_for(medium: str, ones: bool) -> None:
    block = superblock()
    tool.format_record(medium, block, ones)
    loaded = tool.load(medium)
    assert loaded.superblock == block
    assert loaded.bits.count() == (make_golden.EXTENTS if ones else 0)
    assert loaded.messages == ()
    assert {(page.newest_slot, page.sequence) for page in loaded.pages} == {(0, 2)}
    assert tool.probe(medium) == block
    assert tool.check(medium, VOLUME).findings == ()


def test_the_smallest_medium_will_do_and_one_byte_less_will_not(tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "record", NEED)
    tool.format_record(path, superblock(), False)
    small = sparse_file(tmp_path / "small", NEED - 1)
    with pytest.raises(NoSpaceError, match=f"has {NEED - 1} bytes; .* needs {NEED}"):
        tool.format_record(small, superblock(), False, force=True)
    assert small.read_bytes() == bytes(NEED - 1)


def test_the_largest_volume_fits_and_loads(tmp_path: Path) -> None:
    geometry = Geometry(64 << 40)
    path = sparse_file(tmp_path / "record", record_size_bytes(geometry.extents))
    tool.format_record(path, superblock(geometry=geometry), True)
    loaded = tool.load(path)
    assert len(loaded.pages) == 2132
    assert loaded.bits.all()
    assert len(loaded.bits) == 1 << 26


def test_a_formatted_file_has_all_its_pages_allocated(tmp_path: Path) -> None:
    """A miss must not have to allocate: it would cost more, and could fail for want of space."""
    path = sparse_file(tmp_path / "record", NEED)
    tool.format_record(path, superblock(), False)
    with open(path, "rb") as file:
        assert os.lseek(file.fileno(), PAGES_OFFSET, os.SEEK_HOLE) == NEED


def test_a_used_place_is_refused_and_left_alone(medium: str) -> None:
    tool.format_record(medium, superblock(flags=RecordFlag.CLEAN), False)
    other = superblock(volume_uuid=OTHER, name="db")
    with pytest.raises(ForeignRecordError, match=r"holds the record of volume 'vol0' \(uuid 7a1c"):
        tool.format_record(medium, other, False)
    tool.format_record(medium, superblock(), False)  # the same volume, clean
    with pytest.raises(ExistsError, match="which was not stopped cleanly") as caught:
        tool.format_record(medium, superblock(sequence=77), False)
    assert caught.value.hint == "--force overwrites it"
    assert tool.load(medium).superblock == superblock()
    tool.format_record(medium, other, False, force=True)
    assert tool.load(medium).superblock == other


@pytest.mark.parametrize(
    ("name", "error"),
    [("no-superblock", RecordDamagedError), ("newer-format", FormatTooNewError)],
)
def test_a_record_that_cannot_be_read_is_not_overwritten(
    name: str, error: type[BitmapdError], golden: Callable[[str], str]
) -> None:
    path = golden(name)
    before = Path(path).read_bytes()
    with pytest.raises(error, match=path):
        tool.format_record(path, superblock(), False)
    assert Path(path).read_bytes() == before
    tool.format_record(path, superblock(), False, force=True)
    assert tool.load(path).messages == ()


def test_a_file_system_is_not_overwritten(medium: str) -> None:
    alter(medium, 1080, b"\x53\xef")
    with pytest.raises(ExistsError, match="ext2/3/4 file system"):
        tool.format_record(medium, superblock(), False)
    tool.format_record(medium, superblock(), False, force=True)
    assert tool.probe(medium) == superblock()


def test_a_mounted_device_is_refused_whatever_is_said(tmp_path: Path) -> None:
    image = sparse_file(tmp_path / "image", 8 << 20)
    where = tmp_path / "mnt"
    where.mkdir()
    run("mkfs.ext4", "-q", str(image))
    with loop_device(image) as name:
        try:
            run("mount", name, str(where))
        except RuntimeError as error:
            pytest.skip(f"NEEDS mount: {error}")
        try:
            with pytest.raises(BusyError, match=f"{name} is in use: mounted on {where}"):
                tool.format_record(name, superblock(), False, force=True)
            with pytest.raises(BusyError, match=f"{image} is in use: attached to {name}"):
                tool.format_record(image, superblock(), False, force=True)
        finally:
            run("umount", str(where))


def test_a_served_record_is_refused_whatever_is_said(medium: str) -> None:
    tool.format_record(medium, superblock(), False)
    with tool.RecordMedium.open(medium) as held:
        held.lock()
        with pytest.raises(BusyError, match="volume 'vol0'"):
            tool.format_record(medium, superblock(), False, force=True)
    tool.format_record(medium, superblock(), False, force=True)


class PowerCut(Exception):
    """Stands for the end of the machine."""


@pytest.mark.parametrize("remaining", range(6))
def test_a_format_cut_short_leaves_nothing_that_lies(
    remaining: int, golden: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut after 0, 1, … writes: first the old superblocks go, then the pages, then the new ones."""
    path = golden("dirty")
    write, left = os.pwritev, [remaining]

    def counted(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if not left[0]:
            raise PowerCut
        left[0] -= 1
        return write(fd, buffers, offset, flags)

    block = superblock(volume_uuid=OTHER, name="new")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", counted)
        if remaining < 5:
            with pytest.raises(PowerCut):
                tool.format_record(path, block, True, force=True)
        else:
            tool.format_record(path, block, True, force=True)
    if remaining < 2:
        assert tool.load(path).superblock == superblock()
    elif remaining < 4:
        assert tool.probe(path) is None
    else:
        assert tool.load(path).superblock == block
        assert tool.load(path).bits.all()


# -- opening ------------------------------------------------------------------------------------


def test_what_is_no_medium_is_named(tmp_path: Path) -> None:
    blank = sparse_file(tmp_path / "blank", NEED)
    with pytest.raises(NotFoundError, match="there is no record here"):
        tool.load(blank)
    assert tool.probe(blank) is None
    with pytest.raises(NotFoundError, match="No such file"):
        tool.load(tmp_path / "missing")
    with pytest.raises(NotFoundError, match="Not a directory"):
        tool.probe(blank / "below")
    with pytest.raises(UsageError, match="neither a block device nor a regular file"):
        tool.load(tmp_path)
    with pytest.raises(UsageError, match="null byte"):
        tool.probe("a\0b")
    with pytest.raises(BitmapdError, match="File name too long"):
        tool.probe("x" * 5000)


def test_an_empty_file_holds_no_record(tmp_path: Path) -> None:
    empty = sparse_file(tmp_path / "empty", 0)
    with pytest.raises(RecordDamagedError, match="cannot be read"):
        tool.probe(empty)


def test_a_device_that_may_not_be_opened_is_a_matter_of_permission(tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "record", NEED)
    with loop_device(path, 512, "--read-only") as name:
        with pytest.raises(PermissionError_, match="cannot "), tool.RecordMedium.open(name) as held:
            held.write(0, memoryview(bytearray(4096)))
        assert tool.probe(name) is None


def test_a_file_system_without_direct_io_will_do() -> None:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        pytest.skip("NEEDS a tmpfs at /dev/shm")
    path = folder / f"bitmapd-test-{os.getpid()}"
    try:
        sparse_file(path, NEED)
        tool.format_record(path, superblock(), True)
        assert tool.load(path).bits.all()
    finally:
        path.unlink(missing_ok=True)


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    medium = tool.RecordMedium.open(sparse_file(tmp_path / "record", 4096))
    assert medium.size_bytes == 4096
    medium.close()
    medium.close()


# -- locking ------------------------------------------------------------------------------------

HOLDER = """
import sys
from bitmapd.record.tool import RecordMedium
medium = RecordMedium.open(sys.argv[1])
medium.lock()
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_record_has_one_server_until_that_one_dies(
    golden: Callable[[str], str],
) -> None:
    path = golden("dirty")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"locked\n"
            with tool.RecordMedium.open(path) as second:
                with pytest.raises(BusyError, match="record of volume 'vol0', is in use"):
                    second.lock()
                holder.kill()
                holder.wait()
                second.lock()
            assert tool.probe(path) == superblock()  # reading needs no lock
        finally:
            holder.kill()


def test_a_locked_blank_file_is_busy_too(tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "record", 0)
    with tool.RecordMedium.open(path) as first, tool.RecordMedium.open(path) as second:
        first.lock()
        with pytest.raises(BusyError, match=f"{path}, is in use"):
            second.lock()


def test_a_medium_that_is_open_for_reading_cannot_be_locked(tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "record", 4096)
    with (
        tool.RecordMedium.open_read_only(path) as medium,
        pytest.raises(BitmapdError, match=f"cannot lock {path}"),
    ):
        medium.lock()


# -- superblock and pages in use ----------------------------------------------------------------


def test_a_superblock_is_replaced_in_both_places(medium: str) -> None:
    tool.format_record(medium, superblock(), False)
    later = superblock().updated(NOW_S, session=6, flags=RecordFlag.CLEAN)
    with tool.RecordMedium.open(medium) as held:
        tool.write_superblock(held, later)
    raw = Path(medium).read_bytes() if stat.S_ISREG(os.stat(medium).st_mode) else None
    if raw is not None:
        for offset in SUPERBLOCK_OFFSETS:
            assert raw[offset : offset + PAGE_BYTES] == encode_superblock(later)
    loaded = tool.load(medium)
    assert (loaded.superblock, loaded.messages) == (later, ())


def test_a_superblock_with_unknown_features_is_not_written(tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "record", NEED)
    with tool.RecordMedium.open(path) as held, pytest.raises(FormatTooNewError):
        tool.write_superblock(held, superblock(compatible_read_only=1))
    assert path.read_bytes() == bytes(NEED)


def test_pages_for_a_larger_volume_come_before_its_superblock(tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "record", NEED + 4 * PAGE_BYTES)
    tool.format_record(path, superblock(), False)
    geometry = Geometry((make_golden.EXTENTS + EXTENTS_PER_PAGE) << 20)
    larger = superblock().updated(NOW_S, geometry=geometry)
    bits = bitarray(geometry.extents, endian="little")
    bits[make_golden.EXTENTS :] = True
    with tool.RecordMedium.open(path) as held:
        tool.write_pages(held, larger, bits, 3, larger.page_count)
        assert tool.load(held).superblock == superblock()
        tool.write_superblock(held, larger)
        loaded = tool.load(held)
    assert loaded.bits[3 * EXTENTS_PER_PAGE :].all()
    assert loaded.messages == ()


def test_healing_ends_the_damage(medium: str) -> None:
    tool.format_record(medium, superblock(), False)
    for index, slot in ((0, 1), (2, 0), (2, 1)):
        alter(medium, page_offset(index, slot) + 1024, os.urandom(512))
    with tool.RecordMedium.open(medium) as held:
        found = tool.load(held)
        assert found.damaged == (0, 2)
        mended = tool.heal(held, found)
        assert tool.heal(held, mended) is mended
    again = tool.load(medium)
    assert again.messages == ()
    assert again.bits == found.bits
    assert again.pages == mended.pages
    assert again.bits.count() == EXTENTS_PER_PAGE + make_golden.EXTENTS - 2 * EXTENTS_PER_PAGE
    assert mended.pages[0].sequence == 3 + HEAL_JUMP


def test_a_cut_off_record_is_ones_where_it_ends(tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "record", NEED)
    tool.format_record(path, superblock(), False)
    os.truncate(path, page_offset(1, 1) + 100)
    loaded = tool.load(path)
    assert loaded.damaged == (1, 2)
    assert loaded.warnings[-1] == (
        f"the medium ends at byte {page_offset(1, 1) + 100}, the record at byte {NEED}"
    )
    assert not loaded.bits[:EXTENTS_PER_PAGE].any()
    assert loaded.bits[EXTENTS_PER_PAGE:].all()


def test_a_full_medium_is_named(tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "record", 8192)
    with loop_device(path) as name, tool.RecordMedium.open(name) as held:
        beyond = memoryview(bytearray(4096))
        with pytest.raises(NoSpaceError, match=f"at byte 8192 of {name}"):
            held.write(8192, beyond)


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
