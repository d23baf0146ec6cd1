"""Primary and record that fail: real block devices that answer with errors, or not at all."""

from __future__ import annotations

import errno
from contextlib import ExitStack
from pathlib import Path

import pytest

from bitmapd.record.page_writer import SLOW_S
from tests.support import rawnbd
from tests.support.faulty import FaultyDisk, faulty_disk
from tests.support.loops import loop_device
from tests.support.volumes import KIB, MIB, Volume, make_file, noise

SIZE = 32 * MIB
SKIP = ["--initial-sync", "skip", "--era-interval", "100ms"]


def failing_volume(stack: ExitStack, folder: Path, role: str) -> tuple[Volume, FaultyDisk]:
    """A running volume, one of whose media can be made to fail."""
    backing = make_file(folder / "backing", 2 * MIB if role == "record" else SIZE)
    disk = stack.enter_context(faulty_disk(folder / "faulty", backing))
    # Predictions would leave no misses in so small a volume.
    options = [*SKIP, "--predictor", "lru"]
    volume = Volume(folder, SIZE, options=options, media={role: disk.path})
    stack.enter_context(volume)
    volume.create()
    volume.start()
    return volume, disk


def end_equal(volume: Volume) -> None:
    volume.wait_in_sync()
    volume.stop()
    assert volume.recorded() == set()
    assert volume.differing() == set()


# -- the primary --------------------------------------------------------------------------


def test_case_13_blocks_that_cannot_be_read_hold_back_themselves_only(short_path: Path) -> None:
    """The end of the file behind a loop device is cut off: a medium error from there on."""
    backing = make_file(short_path / "backing", SIZE)
    bad_from = 24 * MIB
    with loop_device(backing, 512, "--direct-io=on") as device:
        media = {"primary": device}
        with Volume(short_path, SIZE, options=SKIP, media=media) as volume:
            volume.create()
            volume.start()
            volume.ask("pause")
            volume.write(20 * MIB, noise(1, 8 * MIB))
            with backing.open("r+b") as file:
                file.truncate(bad_from)
            with volume.events() as events:
                volume.ask("resume")
                told = events.wait("copy-error")
                assert told["device"] == device
                # First in a run with good blocks, then one by one.
                assert told["offset_bytes"] + told["length_bytes"] > bad_from
                assert "cannot read the primary" in told["message"]
                # Everything else is copied, durably, and leaves the dirty set.
                figures = volume.until(lambda status: status["dirty_bytes"] == 4 * MIB)
                assert figures["state"] == "primary-failing"
                assert volume.dmctl_process("status", "--check").returncode == 100
                assert figures["last_error"]["code"] == "copy-error"
                assert figures["read_errors_total"] > 0
                assert volume.secondary.read_bytes()[20 * MIB : bad_from] == noise(1, 4 * MIB)
                assert set(range(24, 28)) <= volume.recorded()
                # The host gets the error of what it reads there, and is served elsewhere.
                with pytest.raises(OSError, match="failed") as caught:
                    volume.read(bad_from, 64 * KIB)
                assert caught.value.errno == errno.EIO
                volume.write(MIB, noise(2, MIB))
                # Repaired, or written anew: tried again by itself.
                with backing.open("r+b") as file:
                    file.truncate(SIZE)
                volume.write(24 * MIB, noise(3, 4 * MIB))
            end_equal(volume)


def test_case_13_a_stop_does_not_wait_for_what_cannot_be_read(short_path: Path) -> None:
    backing = make_file(short_path / "backing", SIZE)
    with loop_device(backing, 512, "--direct-io=on") as device:
        media = {"primary": device}
        with Volume(short_path, SIZE, options=SKIP, media=media) as volume:
            volume.create()
            volume.start()
            volume.ask("pause")
            volume.write(20 * MIB, noise(1, 8 * MIB))
            with backing.open("r+b") as file:
                file.truncate(24 * MIB)
            volume.ask("resume")
            volume.dmctl("stop", volume.name, "--timeout", "60s")
            with backing.open("r+b") as file:
                file.truncate(SIZE)
            assert volume.recorded() == {24, 25, 26, 27}
            assert volume.differing() == set()  # what cannot be read any more reads as zeros now
            volume.start()
            end_equal(volume)


def test_case_14_an_error_of_the_primary_goes_to_the_host_that_wrote(short_path: Path) -> None:
    with ExitStack() as stack:
        volume, disk = failing_volume(stack, short_path, "primary")
        volume.write(0, noise(1, 4 * MIB))
        volume.wait_in_sync()
        with volume.events() as events, volume.host() as host:
            with disk.failing("pwrite", "zero", "trim"):
                for offset in (MIB, 20 * MIB):  # a hit and a miss
                    with pytest.raises(OSError, match="failed") as caught:
                        host.call(rawnbd.WRITE, offset, 8 * KIB, noise(2, 8 * KIB))
                    assert caught.value.errno == errno.EIO
                    told = events.wait("primary-error", offset_bytes=offset)
                    assert (told["device"], told["length_bytes"]) == (str(disk.path), 8 * KIB)
                    assert "cannot write the primary for a host" in told["message"]
                figures = volume.ask("status")
                assert figures["primary_errors_total"] == 2
                assert figures["state"] == "primary-failing"
                assert volume.dmctl_process("status", "--check").returncode == 100
                assert figures["last_error"]["code"] == "primary-error"
                # What is on the medium now is unknown, so it is dirty and recorded.
                assert {1, 20} <= volume.recorded()
                # Reading goes on, on the same connection.
                assert host.call(rawnbd.READ, 0, 64 * KIB) == noise(1, 4 * MIB)[: 64 * KIB]
            host.call(rawnbd.WRITE, MIB, 8 * KIB, noise(4, 8 * KIB))
            host.call(rawnbd.FLUSH)
            host.disconnect()
        end_equal(volume)


# -- the record ---------------------------------------------------------------------------


def test_case_15_a_miss_is_refused_while_the_record_cannot_be_written(short_path: Path) -> None:
    with ExitStack() as stack:
        volume, disk = failing_volume(stack, short_path, "record")
        volume.write(0, noise(1, MIB))
        before = volume.primary.read_bytes()
        with volume.events() as events, volume.host() as host:
            with disk.failing("pwrite"):
                with pytest.raises(OSError, match="failed"):
                    host.call(rawnbd.WRITE, 20 * MIB, 64 * KIB, noise(2, 64 * KIB))
                # Neither acknowledged nor written.
                assert volume.primary.read_bytes() == before
                assert "cannot write the record" in events.wait("record-error")["message"]
                figures = volume.ask("status")
                assert figures["state"] == "degraded"
                assert figures["last_error"]["code"] == "record-error"
                assert figures["record_errors_total"] >= 1
                assert volume.dmctl_process("status", "--check").returncode == 100
                # Hits need no record, and reads neither.
                host.call(rawnbd.WRITE, 64 * KIB, 64 * KIB, noise(3, 64 * KIB))
                assert host.call(rawnbd.READ, 64 * KIB, 64 * KIB) == noise(3, 64 * KIB)
                assert volume.ask("status")["hits_total"] >= 1
            # Repaired: the same miss succeeds, and the state says so.
            host.call(rawnbd.WRITE, 20 * MIB, 64 * KIB, noise(2, 64 * KIB))
            events.wait("record-ok")
            volume.until(lambda status: status["state"] in ("in-sync", "copying"))
            host.disconnect()
        volume.kill()
        assert volume.differing() <= volume.recorded()
        volume.start()
        end_equal(volume)


def test_case_15_a_record_that_does_not_answer_holds_up_misses_only(short_path: Path) -> None:
    with ExitStack() as stack:
        volume, disk = failing_volume(stack, short_path, "record")
        volume.write(0, noise(1, MIB))
        with volume.events() as events, volume.host() as host, volume.host() as other:
            with disk.hanging():
                missing = host.submit(rawnbd.WRITE, 20 * MIB, 64 * KIB, noise(2, 64 * KIB))
                for number in range(20):
                    other.call(rawnbd.WRITE, number * 4 * KIB, 4 * KIB, noise(number, 4 * KIB))
                assert other.call(rawnbd.READ, 0, 4 * KIB) == noise(0, 4 * KIB)
                # Not a byte of the miss before it is in the record.
                assert other.call(rawnbd.READ, 20 * MIB, 64 * KIB) == bytes(64 * KIB)
                assert host.in_flight == 1
                assert volume.ask("status")["misses_total"] >= 2
                # Nobody is left in the dark.
                told = events.wait("record-slow")
                assert told["device"] == str(disk.path)
                figures = volume.ask("status")
                assert figures["state"] == "degraded"
                assert figures["record_wait_seconds"] >= SLOW_S
                assert figures["last_error"]["message"] == told["message"]
                assert volume.dmctl_process("status", "--check").returncode == 100
                other.call(rawnbd.WRITE, 0, 4 * KIB, noise(5, 4 * KIB))
            answer = host.reply()
            assert (answer.handle, answer.error) == (missing, 0)
            events.wait("record-ok")
            assert sum(entry["event"] == "record-slow" for entry in events.seen) == 1
            assert volume.ask("status")["state"] in ("in-sync", "copying")
            host.disconnect()
            other.disconnect()
        end_equal(volume)


def test_case_15_a_start_with_a_record_that_cannot_be_written_is_refused(short_path: Path) -> None:
    with ExitStack() as stack:
        volume, disk = failing_volume(stack, short_path, "record")
        volume.write(0, noise(1, MIB))
        volume.stop()
        with disk.failing("pwrite"):
            error = volume.refused("start", volume.name)
            assert str(disk.path) in error["message"]
            assert not volume.socket.exists()
        volume.start()
        end_equal(volume)


def test_case_15_a_stop_without_the_record_says_that_it_was_not_clean(short_path: Path) -> None:
    with ExitStack() as stack:
        volume, disk = failing_volume(stack, short_path, "record")
        volume.write(0, noise(1, 2 * MIB))
        volume.wait_in_sync()
        with disk.failing("pwrite"):
            volume.stop()
        assert {0, 1} <= volume.recorded()  # the clears never arrived: a copy more, nothing less
        volume.start()
        with volume.events() as events:
            assert events.wait("recovery-finished")["reason"] == "crash"
        end_equal(volume)
