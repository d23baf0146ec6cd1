"""A stored record that is damaged, lost, old, or wanted by two."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bitmapd.record.layout import PAGE_BYTES, SUPERBLOCK_BYTES, SUPERBLOCK_OFFSETS, page_offset
from tests.support.volumes import KIB, MIB, Volume, noise

SIZE = 32 * MIB
EXTENTS = SIZE // MIB
SKIP = ["--initial-sync", "skip", "--era-interval", "100ms"]
BITMAPD = Path(sys.executable).parent / "bitmapd"


@contextmanager
def stopped(folder: Path) -> Iterator[Volume]:
    """A volume that was stopped at once, with extents 3 to 5 written and not copied."""
    with Volume(folder, SIZE, options=SKIP) as volume:
        volume.create()
        volume.start()
        volume.ask("pause")
        volume.write(3 * MIB, noise(1, 3 * MIB))
        volume.stop("--now")
        assert {3, 4, 5} <= volume.recorded() < set(range(EXTENTS))
        yield volume


def go_on(volume: Volume) -> None:
    """Start it; its pause has lasted over the stop."""
    volume.start()
    volume.ask("resume")


def overwrite(path: Path, offset_bytes: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset_bytes)
        file.write(data)


def flip(path: Path, offset_bytes: int) -> None:
    with path.open("rb") as file:
        file.seek(offset_bytes)
        (byte,) = file.read(1)
    overwrite(path, offset_bytes, bytes([byte ^ 4]))


def end_equal(volume: Volume) -> None:
    volume.wait_in_sync()
    volume.stop()
    assert volume.recorded() == set()
    assert volume.differing() == set()


# -- damage -------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [(0,), (1,), (0, 1)], ids=["slot 0", "slot 1", "both slots"])
def test_case_16_bit_rot_in_a_page_counts_as_ones(short_path: Path, slots: tuple[int, ...]) -> None:
    """The rotten slot is the newest one or the one before it, or both are rotten."""
    with stopped(short_path) as volume:
        for slot in slots:
            flip(volume.record, page_offset(0, slot) + PAGE_BYTES // 2)
        checked = volume.dmctl_process("record", "check", str(volume.record))
        recorded = volume.recorded()
        assert {3, 4, 5} <= recorded, "a rotten page never names less"
        if len(slots) == 2:
            assert checked.returncode == 20
            assert recorded == set(range(EXTENTS))
        go_on(volume)
        with volume.events() as events:
            if len(slots) == 2:
                told = events.wait("record-damaged")
                assert "page 0" in told["message"]
            recovery = events.wait("recovery-finished")
        assert recovery["reason"] == "crash"
        assert recovery["bytes_total"] == len(recorded) * MIB
        volume.wait_in_sync()
        volume.write(9 * MIB, noise(2, 64 * KIB))
        end_equal(volume)
        # Written anew: nothing is wrong with it any more.
        assert volume.dmctl_process("record", "check", str(volume.record)).returncode == 0


def test_case_17_one_bad_superblock_is_mended_from_the_other(short_path: Path) -> None:
    for number in (0, 1):
        folder = short_path / str(number)
        folder.mkdir()
        with stopped(folder) as volume:
            flip(volume.record, SUPERBLOCK_OFFSETS[number] + 64)
            go_on(volume)
            with volume.events() as events:
                events.wait("record-damaged")
            end_equal(volume)
            assert volume.dmctl_process("record", "check", str(volume.record)).returncode == 0


@pytest.mark.parametrize("damage", ["both superblocks", "zeros everywhere"])
def test_case_17_a_lost_record_is_no_clean_one(short_path: Path, damage: str) -> None:
    with stopped(short_path) as volume:
        if damage == "both superblocks":
            for offset in SUPERBLOCK_OFFSETS:
                overwrite(volume.record, offset, noise(1, SUPERBLOCK_BYTES))
        else:
            overwrite(volume.record, 0, bytes(volume.record.stat().st_size))
        before = volume.record.read_bytes()
        error = volume.refused("start", volume.name)
        assert error["exit_status"] in (10, 20)
        assert error["hint"], "there is a way out, and it has to be said"
        assert "sync" in error["hint"]
        assert not volume.socket.exists()
        assert volume.record.read_bytes() == before
        assert volume.dmctl_process("status", "--check").returncode == 14
        # The way out: a new record, and everything is copied that differs.
        volume.dmctl("remove", volume.name, "--yes")
        volume.options = ["--initial-sync", "checksum", "--force"]
        volume.create()
        go_on(volume)
        with volume.events() as events:
            recovery = events.wait("recovery-finished")
        assert recovery["bytes_total"] == SIZE
        assert volume.ask("status")["sent_bytes_total"] == 3 * MIB
        end_equal(volume)


def test_case_18_an_older_copy_of_the_record_is_refused(short_path: Path) -> None:
    """It would name less than what differs, and look perfectly sound."""
    with stopped(short_path) as volume:
        backup = short_path / "backup"
        shutil.copyfile(volume.record, backup)
        go_on(volume)
        volume.ask("pause")
        volume.write(20 * MIB, noise(2, 2 * MIB))
        volume.stop("--now")
        shutil.copyfile(backup, volume.record)
        assert not {20, 21} & volume.recorded()
        error = volume.refused("start", volume.name)
        assert error["exit_status"] == 22
        assert "older copy" in error["message"]
        assert error["hint"]
        assert not volume.socket.exists()
        assert {20, 21} <= volume.differing()
        volume.dmctl("remove", volume.name, "--yes")
        volume.options = ["--initial-sync", "checksum", "--force"]
        volume.create()
        go_on(volume)
        end_equal(volume)


def test_case_15_a_record_moves_to_another_device(short_path: Path) -> None:
    """What docs/recovery.md says of a record device that has to be replaced."""
    with stopped(short_path) as volume:
        moved = short_path / "moved"
        volume.dmctl("record", "repair", str(volume.record), "--output", str(moved))
        recorded = volume.recorded()
        configuration = short_path / "etc" / "volumes" / f"{volume.name}.toml"
        text = configuration.read_text()
        configuration.write_text(text.replace(str(volume.record), str(moved)))
        volume.record.unlink()
        volume.record = moved
        assert volume.recorded() == recorded
        go_on(volume)
        with volume.events() as events:
            recovery = events.wait("recovery-finished")
        assert recovery["bytes_total"] == len(recorded) * MIB
        end_equal(volume)


# -- two of them --------------------------------------------------------------------------


def test_case_27_a_second_daemon_ends_and_the_first_notices_nothing(short_path: Path) -> None:
    with Volume(short_path, SIZE, options=SKIP) as volume:
        volume.create()
        go_on(volume)
        volume.write(0, noise(1, MIB))
        volume.wait_in_sync()
        pid = volume.pid
        # The same configuration with another run folder: nothing but the record tells them apart.
        for run_dir in ("run", "elsewhere"):
            command = [str(BITMAPD), volume.name, "--foreground"]
            command += ["--config-dir", str(short_path / "etc")]
            command += ["--run-dir", str(short_path / run_dir)]
            second = subprocess.run(
                command, capture_output=True, text=True, timeout=60, check=False
            )
            assert second.returncode == 12, second.stderr
            assert "in use" in second.stderr
        assert volume.pid == pid
        assert volume.ask("ping")["pid"] == pid
        volume.write(MIB, noise(2, MIB))
        assert volume.read(0, MIB) == noise(1, MIB)
        assert volume.dmctl_process("start", volume.name).returncode == 0
        assert volume.pid == pid
        end_equal(volume)
