"""What stands upon a volume attached with device-mapper, and what it stands upon."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vm.guest.disks import MIB, SECTOR, disks, sh
from tests.vm.guest.dmvolume import DmVolume
from tests.vm.guest.test_dm_faults import (
    RESTLESS,
    Medium,
    fio_at_work,
    mapped,
    over,
    quick_volume,
    stopped_and_equal,
)

GROUP = "dmtestvg"
TABLES = 200
SHORT = ("--era-interval", "300ms", "--initial-sync", "skip")


# -- file systems ---------------------------------------------------------------------------------
class Stress(threading.Thread):
    """Files of its own that are written, cut, renamed and removed; it knows what is in them."""

    LONGEST = 256 << 10

    def __init__(self, folder: Path, seed: int, count: int) -> None:
        super().__init__()
        self.folder = folder / str(seed)
        self.folder.mkdir()
        self.files: dict[str, bytearray] = {}
        self.error: BaseException | None = None
        self._chance = random.Random(seed)
        self._count = count

    def run(self) -> None:
        try:
            for number in range(self._count):
                self._one(number)
        except BaseException as error:
            self.error = error
            raise

    def _one(self, number: int) -> None:
        chance = self._chance
        draw = chance.random()
        if draw < 0.25 or not self.files:
            where = chance.choice(("", "sub/", "sub/deep/"))
            (self.folder / where).mkdir(parents=True, exist_ok=True)
            name = f"{where}{number}"
            self.files[name] = bytearray()
            self._write(name, 0, chance.randrange(1, self.LONGEST))
            return
        name = chance.choice(sorted(self.files))
        size = len(self.files[name])
        if draw < 0.6:
            self._write(name, chance.randrange(size + 1), chance.randrange(1, 64 << 10))
        elif draw < 0.7:
            length = chance.randrange(self.LONGEST)
            os.truncate(self.folder / name, length)
            del self.files[name][length:]
            self.files[name].extend(bytes(length - len(self.files[name])))
        elif draw < 0.8:
            self.files[f"{number}"] = self.files.pop(name)
            (self.folder / name).rename(self.folder / f"{number}")
        elif draw < 0.95:
            (self.folder / name).unlink()
            del self.files[name]
        else:
            os.sync()

    def _write(self, name: str, offset: int, length: int) -> None:
        data = self._chance.randbytes(length)
        with open(self.folder / name, "r+b" if (self.folder / name).exists() else "wb") as stream:
            stream.seek(offset)
            stream.write(data)
            if self._chance.random() < 0.2:
                stream.flush()
                os.fsync(stream.fileno())
        content = self.files[name]
        content[offset : offset + length] = data

    def assert_found(self, root: Path) -> None:
        folder = root / self.folder.name
        found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert found == set(self.files)
        for name, content in self.files.items():
            assert (folder / name).read_bytes() == content, name


@contextlib.contextmanager
def mounted(device: str, folder: Path, options: str = "defaults") -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    sh("mount", "-o", options, device, str(folder))
    try:
        yield folder
    finally:
        sh("umount", str(folder))


@pytest.mark.parametrize(
    ("make", "check", "again", "size_bytes"),
    [
        (["mkfs.ext4", "-q"], ["e2fsck", "-f", "-n"], "ro", 96 * MIB),
        # mkfs.xfs makes nothing smaller.
        (["mkfs.xfs", "-q", "-f"], ["xfs_repair", "-n"], "ro,nouuid", 304 * MIB),
    ],
    ids=["ext4", "xfs"],
)
def test_a_file_system_under_stress(
    make: list[str], check: list[str], again: str, size_bytes: int, tmp_path: Path
) -> None:
    for program in (make[0], check[0]):
        if shutil.which(program) is None:
            pytest.skip(f"NEEDS {program} (packages e2fsprogs, xfsprogs)")
    with on_lab_disks(size_bytes) as media, over("vol0", tmp_path, media, *SHORT) as volume:
        sh(*make, volume.device)
        with mounted(volume.device, tmp_path / "mnt") as root:
            threads = [Stress(root, seed, 80) for seed in range(3)]
            for thread in threads:
                thread.start()
            threads[0].join(300)
            sh("fstrim", str(root))
            for thread in threads:
                thread.join(300)
                assert not thread.is_alive()
                assert thread.error is None
        stopped_and_equal(volume)
        sh(*check, volume.secondary.path)
        with mounted(volume.secondary.path, tmp_path / "copy", again) as copy:
            for thread in threads:
                thread.assert_found(copy)


@contextlib.contextmanager
def on_lab_disks(size_bytes: int) -> Iterator[list[Medium]]:
    """Media that take discards, as the RAM disks of the other tests do not."""
    sizes = {"disk0": size_bytes, "disk1": size_bytes, "disk2": 4 * MIB}
    with contextlib.ExitStack() as stack:
        media = []
        for disk, size in sizes.items():
            # Afterwards it reads as zeros, so that both sides are equal.
            sh("blkdiscard", "-f", f"/dev/lab/{disk}")
            table = f"0 {size // SECTOR} linear /dev/lab/{disk} 0"
            media.append(stack.enter_context(mapped(f"dmtest-{disk}", table)))
        yield media


# -- LVM ------------------------------------------------------------------------------------------
def lvm(command: str, *words: str, accept: list[str]) -> str:
    """A command of LVM without udev; `accept`: the filter."""
    patterns = ", ".join(f'"{pattern}"' for pattern in accept)
    config = (
        f"devices {{ global_filter=[{patterns}] use_devicesfile=0 obtain_device_list_from_udev=0 }}"
        " activation { udev_sync=0 udev_rules=0 monitoring=0 } backup { backup=0 archive=0 }"
    )
    done = subprocess.run(
        ["lvm", command, "--config", config, *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def documented(volume: DmVolume) -> list[str]:
    """The filter of docs/boot.md; below the lab's own disks are RAM disks, which show the same."""
    return [
        *(f"a|^{volume.device}$|", "r|^/dev/nbd|", "r|^/dev/mapper/dmctl-|"),
        *(f"r|^{disk.path}$|" for disk in (volume.primary, volume.secondary)),
        # No "a|.*|" at the end: it would match other names of what is refused here.
        "r|^/dev/ram|",
    ]


@pytest.fixture
def with_lvm() -> None:
    if shutil.which("lvm") is None:
        pytest.skip("NEEDS lvm (package lvm2)")


@pytest.mark.usefixtures("with_lvm")
def test_a_physical_volume_of_lvm_upon_a_volume(tmp_path: Path) -> None:
    with quick_volume("vol0") as volume:
        accept = documented(volume)
        lvm("pvcreate", "-q", volume.device, accept=accept)
        lvm("vgcreate", "-q", GROUP, volume.device, accept=accept)
        lvm("lvcreate", "-q", "-y", "-n", "data", "-L", "24m", GROUP, accept=accept)
        try:
            volume.wait_in_sync()
            # The copy and every layer show the same physical volume by now.
            listed = lvm("pvs", "--noheadings", "-o", "pv_name,vg_name", accept=accept)
            assert listed.split() == [volume.device, GROUP]
            assert "Not using device" in lvm("pvs", accept=["a|.*|"])
            sh("mkfs.ext4", "-q", f"/dev/{GROUP}/data")
            with mounted(f"/dev/{GROUP}/data", tmp_path / "mnt") as root:
                (root / "file").write_bytes(b"lvm" * 1000)
            assert "in use" in volume.stop(status=12)
        finally:
            lvm("vgchange", "-q", "-an", GROUP, accept=accept)
        stopped_and_equal(volume)
        # The copy is a physical volume that can be used in place of a lost primary.
        only = [f"a|^{volume.secondary.path}$|", "r|.*|"]
        lvm("vgchange", "-q", "-ay", GROUP, accept=only)
        try:
            with mounted(f"/dev/{GROUP}/data", tmp_path / "copy", "ro") as root:
                assert (root / "file").read_bytes() == b"lvm" * 1000
        finally:
            lvm("vgchange", "-q", "-an", GROUP, accept=only)


@pytest.mark.usefixtures("with_lvm")
def test_a_start_tells_that_lvm_would_go_past_the_gate() -> None:
    with quick_volume("vol0") as volume:
        assert "lvm-error" not in volume.dmctl("events", volume.name, "--now")
        lvm("pvcreate", "-q", volume.device, accept=documented(volume))
        volume.wait_in_sync()
        volume.stop()
        volume.start()
        assert "lvm-error" in volume.dmctl("events", volume.name, "--now")
        assert volume.status()["last_error"]["code"] == "lvm-error"


@pytest.mark.usefixtures("with_lvm")
def test_logical_volumes_of_lvm_as_media(tmp_path: Path) -> None:
    with disks(("pv", 128 * MIB)) as (disk,):
        only = [f"a|^{disk.path}$|", "r|.*|"]
        sizes = {"primary": 48, "secondary": 48, "record": 4}
        try:
            lvm("pvcreate", "-q", "-ff", "-y", disk.path, accept=only)
            lvm("vgcreate", "-q", GROUP, disk.path, accept=only)
            for name, mib in sizes.items():
                words = ("-n", name, "-L", f"{mib}m", GROUP)
                lvm("lvcreate", "-q", "-y", "-Wn", *words, accept=only)
            media = [Medium(f"/dev/{GROUP}/{name}", mib * MIB) for name, mib in sizes.items()]
            with over("vol0", tmp_path, media) as volume:
                with fio_at_work(volume, "--size=16m", "--loops=1"):
                    pass
                stopped_and_equal(volume)
        finally:
            lvm("vgremove", "-q", "-f", "-y", GROUP, accept=only)


# -- tables ---------------------------------------------------------------------------------------
def test_the_volume_is_suspended_and_resumed_under_load() -> None:
    with quick_volume("vol0", *RESTLESS) as volume:
        with fio_at_work(volume, "--size=24m", "--loops=2") as job:

            def went_on(status: dict[str, Any]) -> bool:
                return job.poll() is not None or status["writes_total"] > writes + 50

            for number in range(12):
                writes = volume.status()["writes_total"]
                how = ("--noflush", "--nolockfs") if number % 2 else ()
                sh("dmsetup", "suspend", *how, volume.name)
                sh("dmsetup", "resume", "--noudevsync", volume.name)
                volume.until(went_on)
                if job.poll() is not None:
                    break
        assert number > 3
        stopped_and_equal(volume)


def test_fio_verifies_through_hundreds_of_tables() -> None:
    with quick_volume("vol0", *RESTLESS) as volume:
        volume.wait_in_sync()
        loads = 0
        while loads < TABLES:
            with fio_at_work(volume, "--size=40m", "--loops=3", "--verify_backlog=512"):
                pass
            status = volume.status()
            assert status["table_loads_total"] > loads
            loads = status["table_loads_total"]
        assert status["barrier_errors_total"] == 0
        assert status["record_clears_total"]
        stopped_and_equal(volume)
