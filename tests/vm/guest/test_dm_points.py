"""Consistent points of a volume that hosts write past the gate, in a real kernel."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.vm.guest.disks import MIB, disks, drop_cache, same, sh, size_of
from tests.vm.guest.dmsites import (
    PIECE,
    DeviceWriter,
    FarSite,
    NearSite,
    dm_group,
    dm_sites,
    newest,
)

SIZE, LARGER = 16 * MIB, 24 * MIB
BUSY, NO_SPACE, WRONG_STATE, AWAY = 12, 13, 14, 15  # exit statuses

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
            # 16 MiB in all: what is written between two points has to fit into the journal.
            words = ["fio", "--name=load", "--thread", "--numjobs=2", "--fsync=8", "--bs=16k"]
            words += ["--directory", str(mount), "--rw=randrw", "--size=8m", "--time_based"]
            with subprocess.Popen([*words, "--runtime=600"], stdout=subprocess.DEVNULL) as load:
                try:
                    near.point(near.points()["number"] + 2)
                    near.kill()
                    far.dmctl("promote", far.name)
                    far.stop("--now")
                    drop_cache(far.primary.path)
                    # What a power cut at the instant of the point would have left: the journal is
                    # replayed.
                    assert "UNEXPECTED" not in sh("e2fsck", "-p", far.primary.path, check=False)
                    sh("e2fsck", "-fn", far.primary.path)
                finally:
                    near.start()  # for which the load waits in the kernel
                    load.kill()
        finally:
            sh("umount", str(mount), check=False)


def all_applied(status: dict[str, Any]) -> bool:
    """Of a receiver: whether its image is the newest point."""
    return bool(status["receiver"]["applied"] == status["receiver"]["committed"])


def both_have(told: int, near: NearSite, far: FarSite) -> None:
    """What a host wrote, up to this number and no more; both sites have stopped."""
    for site in (near, far):
        drop_cache(site.primary.path)
        assert newest(site.primary.path) == told


def test_a_planned_move_under_load() -> None:
    """Pause, verify, switchover: what an administrator does to a volume that hosts write past its
    gate.  Nothing is lost, and the device of a volume that is not given away goes on as before."""
    with (
        dm_sites(*RESTLESS, size_bytes=SIZE) as (near, far),
        disks(("site-nj", 80 * MIB)) as (journal,),
    ):
        move = ("switchover", near.name, "--journal", journal.path)
        writer = DeviceWriter(near.device)
        writer.more(300)
        near.dmctl("pause", near.name)
        paused = near.points()["number"]
        writer.more(100)
        assert near.points()["number"] == paused
        near.dmctl("resume", near.name)
        near.point(paused)
        near.dmctl("verify", near.name)
        assert "is in use" in near.dmctl(*move, status=BUSY)
        writer.more(100)
        told = writer.stop()

        os.kill(far.pid, signal.SIGSTOP)  # it cannot say that it has everything
        try:
            writer = DeviceWriter(near.device, first=told + 1)
            writer.more(10)
            told = writer.stop()
            said = near.dmctl(*move, "--timeout", "100s", status=AWAY)
            # In a slow guest the link is given up before the move begins: nobody is sent away then.
            assert "let in again" in said or "is away" in said
            writer = DeviceWriter(near.device, first=told + 1)
            writer.more(200)
        finally:
            os.kill(far.pid, signal.SIGCONT)
        near.point(near.points()["number"] + 1)
        assert near.until(lambda status: status["direct_extents"])
        told = writer.stop()

        near.dmctl(*move)
        assert not Path(near.device).exists()
        assert near.status()["state"] == "receiving"
        far.wait_in_sync()
        far.stop()
        near.until(all_applied)
        near.stop()
        both_have(told, near, far)


def test_after_promote_the_old_site_follows_once_its_kernel_has_ended() -> None:
    with dm_sites(size_bytes=SIZE) as (near, far), disks(("site-nj", 80 * MIB)) as (journal,):
        writer = DeviceWriter(near.device)
        writer.more(300)
        told = writer.answered
        near.point(near.points()["number"] + 1)
        last = writer.stop()
        near.kill()  # the kernel goes on
        far.dmctl("promote", far.name)
        back = ("failback", near.name, "--journal", journal.path, "--yes")
        assert "has layers" in near.dmctl(*back, status=WRONG_STATE)
        for line in near.dmctl("plan", near.name, "--remove").splitlines():
            if line.startswith("dmsetup"):
                sh("sh", "-c", line)
        near.dmctl(*back)
        far.dmctl("set", far.name, "point-interval=300ms")
        far.wait_in_sync()
        far.stop()
        near.until(all_applied)
        near.stop()
        drop_cache(near.primary.path)
        assert told <= newest(near.primary.path) <= last
        assert same(near.primary, far.primary, near.size_bytes)


def test_a_volume_that_went_over_and_came_back_has_its_device_again() -> None:
    with dm_sites(size_bytes=SIZE) as (near, far), disks(("site-nj", 80 * MIB)) as (journal,):
        writer = DeviceWriter(near.device)
        writer.more(100)
        writer.stop()
        near.dmctl("switchover", near.name, "--journal", journal.path)
        assert not Path(near.device).exists()
        far.dmctl("switchover", far.name)
        near.dmctl("wait", near.name, "--for", "started", "--timeout", "100s")
        assert near.status()["attach"] == "dm"
        writer = DeviceWriter(near.device)
        writer.more(300)
        near.point(near.points()["number"] + 1)
        assert near.until(lambda status: status["direct_extents"])
        told = writer.stop()
        near.wait_in_sync()
        near.stop()
        far.until(all_applied)
        far.stop()
        both_have(told, near, far)


def test_both_sides_grow_under_load_and_points_go_on() -> None:
    with dm_sites(*RESTLESS, size_bytes=SIZE) as (near, far):
        writer = DeviceWriter(near.device)
        writer.more(300)
        near.primary.grow(LARGER)
        assert str(SIZE) in near.dmctl("resize", near.name, status=NO_SPACE)
        far.primary.grow(LARGER)
        near.dmctl("resize", near.name)
        assert near.status()["size_bytes"] == size_of(near.device) == LARGER
        writer.more(100)
        told = writer.answered
        with open(near.device, "rb+", buffering=0) as volume:
            volume.seek(LARGER - PIECE)
            volume.write(b"\7" * PIECE)
            os.fsync(volume.fileno())
        near.point(near.points()["number"] + 1)
        assert near.until(lambda status: status["direct_extents"])
        near.kill()
        far.dmctl("promote", far.name)
        assert far.status()["size_bytes"] == LARGER
        far.stop("--now")
        drop_cache(far.primary.path)
        assert newest(far.primary.path) >= told
        assert far.primary.read()[-PIECE:] == b"\7" * PIECE
        near.start()  # the kernel has waited for it
        writer.more(10)
        writer.stop()


def test_volumes_of_a_group_have_points_of_one_instant() -> None:
    """A host writes n to one, and when that is answered n to the other."""
    with dm_group("--cut-patience", "2s") as pairs:
        (one, other), fars = [near for near, _ in pairs], [far for _, far in pairs]
        writer = DeviceWriter(one.device, other.device)
        writer.more(300)
        for near in (one, other):
            near.point(near.points()["number"] + 1)
        told = writer.answered
        number = one.points()["number"]
        one.until(lambda status: status["points"]["number"] >= number + 2)
        status = one.until(lambda status: status["direct_extents"])
        assert status["gate_writes_total"] < status["writes_total"], "nothing was direct"
        for near in (one, other):
            near.kill()
        fars[0].dmctl("promote", "--group", "g")
        for far in fars:
            far.stop("--now")
            drop_cache(far.primary.path)
        first, second = (newest(far.primary.path) for far in fars)
        assert second <= first <= second + 1
        assert second >= told
        for near in (one, other):
            near.start()
        writer.more(10)
        writer.stop()
