"""A volume attached with device-mapper, as an administrator uses it, in a real kernel."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm.guest.disks import MIB, sh, size_of
from tests.vm.guest.dmvolume import DmVolume, dm_volume


@pytest.fixture
def volume() -> Iterator[DmVolume]:
    with dm_volume() as made:
        yield made


def fio(device: str, *options: str, timeout_s: float = 300) -> dict[str, object]:
    words = ["fio", "--name=job", f"--filename={device}", "--direct=1", "--output-format=json"]
    output = sh(*words, "--ioengine=libaio", *options, timeout_s=timeout_s)
    job: dict[str, object] = json.loads(output[output.index("{") :])["jobs"][0]
    assert job["error"] == 0, output
    return job


def put(volume: DmVolume, offset: int) -> None:
    """A durable write of 4 KiB; OSError if it is not one."""
    with open(volume.device, "r+b", buffering=0) as stream:
        stream.seek(offset)
        stream.write(b"x" * 4096)
        os.fsync(stream.fileno())


VERIFY = (
    "--verify=crc32c",
    "--do_verify=1",
    "--verify_fatal=1",
    "--verify_state_save=0",
    "--randseed=7",
)


def test_written_read_and_copied(volume: DmVolume) -> None:
    fio(volume.device, "--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=16m", *VERIFY)
    volume.wait_in_sync()
    status = volume.status()
    assert status["attach"] == "dm"
    assert status["device"] == volume.device
    assert status["writes_total"] >= 4096
    assert 0 < status["misses_total"] < status["writes_total"]
    answer = volume.stop()
    assert "stopped" in answer
    assert volume.is_equal()
    assert volume.status()["record_extents"] == 0
    left = [line.split()[0] for line in sh("dmsetup", "ls").splitlines()]
    assert [name for name in left if not name.startswith("dmtest-")] == []
    volume.start()
    assert volume.status()["last_recovery"]["extents"] == 0


def test_hits_stay_in_the_kernel(volume: DmVolume) -> None:
    assert volume.status()["block_size_bytes"] == 256 << 10
    volume.wait_in_sync()
    options = ("--rw=randwrite", "--bs=4k", "--iodepth=4", "--size=8m", "--number_ios=500")
    fio(volume.device, *options)
    volume.until(lambda status: status["direct_extents"] >= 8)
    before = volume.status()
    fio(volume.device, *options)
    after = volume.status()
    assert after["writes_total"] - before["writes_total"] >= 500
    assert after["gate_writes_total"] == before["gate_writes_total"]
    assert after["misses_total"] == before["misses_total"]
    volume.wait_in_sync()
    volume.stop()
    assert volume.is_equal()


def test_new_places_are_written_in_the_kernel_while_the_era_goes_on(volume: DmVolume) -> None:
    put(volume, 0)
    # The first copy has recorded everything, and an end of an era removes it: the next one, if
    # the copy was ready before this one was.
    before = volume.until(lambda status: status["record_extents"] <= 32)
    volume.dmctl("set", volume.name, "era-interval=10min")
    words = ["fio", "--name=job", f"--filename={volume.device}", "--direct=1", "--rw=randwrite"]
    words += ["--ioengine=libaio", "--bs=4k", "--iodepth=8", "--loops=4", *VERIFY]
    words += ["--offset=48m", "--size=8m"]  # where nothing was written, and nothing is recorded
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as job:
        after = volume.until(
            lambda status: (
                status["table_loads_total"] > before["table_loads_total"]
                and status["direct_extents"] > before["direct_extents"]
            )
        )
        assert after["barriers_total"] == before["barriers_total"]
        assert job.wait(300) == 0
    volume.stop()  # which waits for no era
    assert volume.is_equal()


@pytest.mark.parametrize("sector_bytes", [pytest.param(512, marks=pytest.mark.long), 4096])
def test_sectors_and_a_short_last_extent(sector_bytes: int) -> None:
    size = 33 * MIB + 7 * 4096
    with dm_volume("odd-name", size_bytes=size, sector_bytes=sector_bytes) as volume:
        bs = str(sector_bytes)
        fio(
            volume.device,
            "--rw=randwrite",
            f"--bs={bs}",
            "--iodepth=8",
            "--number_ios=2000",
            *VERIFY,
        )
        last = ("--rw=write", f"--bs={bs}", f"--offset={size - 64 * 1024}", "--size=64k")
        fio(volume.device, *last, *VERIFY)
        volume.wait_in_sync()
        volume.stop()
        assert volume.is_equal()


def test_an_ext4_that_is_used_and_trimmed(tmp_path: Path) -> None:
    with dm_volume("trimmed", discards=True) as volume:
        sh("mkfs.ext4", "-q", volume.device)
        mount = tmp_path / "mnt"
        mount.mkdir()
        sh("mount", volume.device, str(mount))
        try:
            shutil.copytree("/usr/include/linux", mount / "tree")
            for name in ("a", "b"):
                (mount / name).write_bytes(os.urandom(4 * MIB))
            os.sync()
            refused = volume.stop(status=12)
            assert "in use" in refused
            (mount / "a").unlink()
            os.sync()
            assert "bytes" in sh("fstrim", "-v", str(mount))
            rng = random.Random(3)
            with open(mount / "b", "r+b", buffering=0) as stream:
                for _ in range(200):
                    stream.seek(rng.randrange(4 * MIB - 8192))
                    stream.write(os.urandom(8192))
                    if rng.random() < 0.1:
                        os.fsync(stream.fileno())
        finally:
            sh("umount", str(mount))
        volume.wait_in_sync()
        volume.stop()
        assert volume.is_equal()
        sh("e2fsck", "-f", "-n", volume.secondary.path)


@pytest.mark.long
def test_an_ext4_that_grows_in_use(tmp_path: Path) -> None:
    with dm_volume("grows") as volume:
        sh("mkfs.ext4", "-q", volume.device)
        mount = tmp_path / "mnt"
        mount.mkdir()
        sh("mount", volume.device, str(mount))
        try:
            shutil.copytree("/usr/include/linux", mount / "one")
            words = ["fio", "--name=job", f"--filename={mount}/job", "--ioengine=libaio"]
            words += ["--rw=randwrite", "--bs=4k", "--iodepth=4", "--size=16m", "--direct=1"]
            words += ["--loops=8", *VERIFY]
            with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as job:
                volume.until(lambda status: status["direct_extents"] > 4)
                volume.primary.grow(96 * MIB)
                assert "secondary" in volume.dmctl("resize", volume.name, status=13)
                volume.secondary.grow(96 * MIB)
                volume.dmctl("resize", volume.name)
                assert volume.status()["size_bytes"] == 96 * MIB
                volume.dmctl("resize", volume.name)  # nothing left to do
                assert size_of(volume.device) == 96 * MIB
                sh("resize2fs", volume.device)
                shutil.copytree("/usr/include/linux", mount / "two")
                output, _ = job.communicate(timeout=300)
                assert job.returncode == 0, output
            (mount / "three").write_bytes(os.urandom(24 * MIB))
            volume.until(lambda status: status["direct_extents"] > 4)
        finally:
            sh("umount", str(mount))
        volume.wait_in_sync()
        volume.stop()
        volume.size_bytes = 96 * MIB
        assert volume.is_equal()
        sh("e2fsck", "-f", "-n", volume.secondary.path)
        volume.start()
        assert volume.status()["size_bytes"] == 96 * MIB


def test_bitmapd_killed_under_load(volume: DmVolume) -> None:
    """Direct writes go on, gated ones wait, a new process takes over; no host sees an error."""
    words = ["fio", "--name=job", f"--filename={volume.device}", "--direct=1", "--ioengine=libaio"]
    words += ["--rw=randwrite", "--bs=4k", "--iodepth=8", "--size=48m", "--time_based=0", *VERIFY]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        for _ in range(3):
            volume.until(lambda status: status["writes_total"] > 200)
            volume.kill()
            volume.start()
        output, _ = job.communicate(timeout=300)
        assert job.returncode == 0, output
    volume.wait_in_sync()
    volume.stop()
    assert volume.is_equal()


def test_a_primary_that_fails(volume: DmVolume) -> None:
    volume.wait_in_sync()
    volume.primary.break_it()
    with pytest.raises(OSError, match="Input"):
        put(volume, 0)
    volume.primary.mend()
    put(volume, 0)
    volume.wait_in_sync()
    volume.stop()
    assert volume.is_equal()


def test_a_secondary_that_fails_holds_up_nobody(volume: DmVolume) -> None:
    volume.wait_in_sync()
    volume.secondary.break_it()
    fio(volume.device, "--rw=randwrite", "--bs=4k", "--iodepth=8", "--size=24m", *VERIFY)
    volume.until(lambda status: status["state"] == "link-down")
    volume.secondary.mend()
    volume.wait_in_sync()
    volume.stop()
    assert volume.is_equal()


def test_a_record_that_fails(volume: DmVolume) -> None:
    """A miss is refused or waits, never acknowledged; hits go on."""
    volume.wait_in_sync()
    volume.record.break_it()
    with pytest.raises(OSError, match="Input"):
        put(volume, 40 * MIB)
    volume.until(lambda status: status["state"] == "degraded")
    volume.record.mend()
    fio(volume.device, "--rw=randwrite", "--bs=4k", "--iodepth=8", "--number_ios=500", *VERIFY)
    volume.wait_in_sync()
    volume.stop()
    assert volume.is_equal()


@pytest.mark.long
def test_two_volumes_at_once() -> None:
    with dm_volume("one") as one, dm_volume("two") as two:
        jobs = [
            subprocess.Popen(
                ["fio", "--name=job", f"--filename={volume.device}", "--direct=1", "--rw=randwrite",
                 "--ioengine=libaio", "--bs=4k", "--iodepth=4", "--size=16m", *VERIFY],
                stdout=subprocess.DEVNULL,
            )
            for volume in (one, two)
        ]  # fmt: skip
        assert [job.wait(300) for job in jobs] == [0, 0]
        for volume in (one, two):
            volume.wait_in_sync()
            volume.stop()
            assert volume.is_equal()
