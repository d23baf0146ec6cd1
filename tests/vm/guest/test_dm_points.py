"""Consistent points of a volume that hosts write past the gate, in a real kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vm.guest.disks import MIB, disks, drop_cache, sh
from tests.vm.guest.dmsites import DeviceWriter, dm_sites, newest

BUSY = 12  # exit status

# A table that changes all the time, so that cuts meet both ways.
RESTLESS = ("--extent-size", "128KiB", "--record-limit", "8MiB", "--predictor", "lru")


@pytest.mark.parametrize("options", [(), RESTLESS], ids=["usual", "restless"])
def test_a_point_is_a_prefix_of_what_one_host_wrote(options: tuple[str, ...]) -> None:
    with dm_sites(*options) as (near, far):
        writer = DeviceWriter(near.device)
        writer.more(2500)
        before = near.points()["number"]
        for _ in range(4):
            told = writer.answered
            near.point(near.points()["number"] + 1)  # was cut after this line
            writer.more(300)
        status = near.status()
        near.kill()
        far.dmctl("promote", far.name)
        far.stop("--now")
        drop_cache(far.primary.path)
        found = newest(far.primary.path)
        assert status["points"]["number"] >= before + 4
        assert found >= told
        assert status["gate_writes_total"] < status["writes_total"], "nothing was direct"
        near.start()  # the kernel has waited for it
        writer.more(10)
        last = writer.stop()
        assert found <= last


def test_an_ext4_under_load_is_clean_at_a_point(tmp_path: Path) -> None:
    with dm_sites(size_bytes=256 * MIB) as (near, far):
        sh("mkfs.ext4", "-q", near.device)
        mount = tmp_path / "mnt"
        mount.mkdir()
        sh("mount", near.device, str(mount))
        try:
            words = ("--directory", str(mount), "--rw=randrw", "--bs=16k", "--size=32m")
            sh(
                *("fio", "--name=load", "--numjobs=2", "--fsync=8", "--time_based"),
                *("--runtime=12", *words),
                timeout_s=200,
            )
            assert near.points()["number"] >= 3
            near.kill()
            far.dmctl("promote", far.name)
            far.stop("--now")
            drop_cache(far.primary.path)
            # What a power cut at the instant of the point would have left: the journal is replayed.
            assert "UNEXPECTED" not in sh("e2fsck", "-p", far.primary.path, check=False)
            sh("e2fsck", "-fn", far.primary.path)
            near.start()
        finally:
            sh("umount", str(mount), check=False)


def test_pause_verify_and_a_switchover_while_the_device_is_in_use() -> None:
    """Under load; the volume that is not given away goes on as before."""
    with (
        dm_sites(*RESTLESS, size_bytes=16 * MIB) as (near, _),
        disks(("site-nj", 80 * MIB)) as (journal,),
    ):
        writer = DeviceWriter(near.device)
        writer.more(300)
        near.dmctl("pause", near.name)
        paused = near.points()["number"]
        writer.more(100)
        assert near.points()["number"] == paused
        near.dmctl("resume", near.name)
        near.point(paused)
        near.dmctl("verify", near.name)
        move = ("switchover", near.name, "--journal", journal.path)
        assert "is in use" in near.dmctl(*move, status=BUSY)
        writer.more(100)
        writer.stop()
