"""Record devices as they are: files, loop devices of both sector sizes; format, lock, use."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
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
from bitmapd.record.hints import HINTS_BYTES
from bitmapd.record.layout import (
    EXTENTS_PER_PAGE,
    PAGE_BYTES,
    PAGES_OFFSET,
    SUPERBLOCK_OFFSETS,
    RecordFlag,
    encode_superblock,
    page_offset,
    record_size_bytes,
)
from bitmapd.record.pages import HEAL_JUMP
from tests.data import make_golden
from tests.support.loops import loop_device, run, sparse_file
from tests.support.records import alter

NOW_S = 1_800_000_000
OTHER = UUID(int=42)
VOLUME = make_golden.VOLUME
NEED = record_size_bytes(make_golden.EXTENTS)
superblock = make_golden.superblock


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


@pytest.mark.parametrize("remaining", range(7))
def test_a_format_cut_short_leaves_nothing_that_lies(
    remaining: int, golden: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut after 0, 1, … writes: old superblocks and hints go, then come pages and superblocks."""
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
        if remaining < 6:
            with pytest.raises(PowerCut):
                tool.format_record(path, block, True, force=True)
        else:
            tool.format_record(path, block, True, force=True)
    if remaining < 2:
        assert tool.load(path).superblock == superblock()
    elif remaining < 5:
        assert tool.probe(path) is None
    else:
        assert tool.load(path).superblock == block
        assert tool.load(path).bits.all()


# -- hints --------------------------------------------------------------------------------------


def test_hints_have_a_place_of_their_own(medium: str) -> None:
    assert tool.HINTS_OFFSET + HINTS_BYTES == PAGES_OFFSET
    tool.format_record(medium, superblock(), True)
    before = tool.load(medium)
    area = bytes(range(256)) * (HINTS_BYTES // 256)
    with tool.RecordMedium.open(medium) as opened:
        assert tool.read_hints(opened) == bytes(HINTS_BYTES)
        tool.write_hints(opened, area)
        assert tool.read_hints(opened) == area
    assert tool.load(medium) == before
    assert tool.check(medium, VOLUME).findings == ()
    tool.format_record(medium, superblock(), False, force=True)
    with tool.RecordMedium.open(medium) as opened:
        assert tool.read_hints(opened) == bytes(HINTS_BYTES)


def test_hints_that_cannot_be_read_are_none(golden: Callable[[str], str]) -> None:
    with tool.RecordMedium.open(golden("dirty")) as opened:
        readable, opened.fd = opened.fd, os.open("/", os.O_RDONLY)
        try:
            assert tool.read_hints(opened) == b""
        finally:
            os.close(opened.fd)
            opened.fd = readable


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
from bitmapd.record.medium import RecordMedium
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
