"""media/transport: which disks may write after we have gone on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bitmapd.media import transport
from bitmapd.media.transport import is_remote, is_remote_disk, is_remote_path

VIRTUAL = "/sys/devices/virtual/block"
PCI = "/sys/devices/pci0000:00/0000:00:1f.2"


@pytest.mark.parametrize(
    ("name", "path", "transports", "remote"),
    [
        ("sda", f"{PCI}/ata1/host0/target0:0:0/0:0:0:0/block/sda", (), False),
        ("sdb", f"{PCI}/host2/port-2:0/end_device-2:0/target2:0:0/2:0:0:0/block/sdb", (), False),
        ("vda", f"{PCI}/virtio1/block/vda", (), False),
        ("nvme0n1", f"{PCI}/nvme/nvme0/nvme0n1", {"pcie"}, False),
        ("nvme0n1", "/sys/devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1", {"pcie"}, False),
        ("pmem0", "/sys/devices/LNXSYSTM:00/ndbus0/region0/namespace0.0/block/pmem0", (), False),
        ("zram0", f"{VIRTUAL}/zram0", (), False),
        ("loop7", f"{VIRTUAL}/loop7", (), False),
        (
            "sdc",
            "/sys/devices/platform/host3/session1/target3:0:0/3:0:0:0/block/sdc",
            (),
            True,
        ),
        ("sdd", f"{PCI}/host4/rport-4:0-0/target4:0:0/4:0:0:0/block/sdd", (), True),
        ("nvme1n1", "/sys/devices/virtual/nvme-fabrics/ctl/nvme1/nvme1n1", {"tcp"}, True),
        (
            "nvme2n1",
            "/sys/devices/virtual/nvme-subsystem/nvme-subsys2/nvme2n1",
            {"pcie", "rdma"},
            True,
        ),
        ("nbd3", f"{VIRTUAL}/nbd3", (), True),
        ("rbd0", "/sys/devices/rbd/0/block/rbd0", (), True),
        ("drbd1", f"{VIRTUAL}/drbd1", (), True),
        ("etherd!e1.0", f"{VIRTUAL}/etherd!e1.0", (), True),
    ],
)
def test_a_disk_is_judged_by_its_path_name_and_controllers(
    name: str, path: str, transports: set[str], remote: bool
) -> None:
    assert is_remote_disk(name, path, frozenset(transports)) is remote


@pytest.fixture
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes disks in a tree of its own, which takes the place of /sys."""
    monkeypatch.setattr(transport, "SYSFS", tmp_path)
    (tmp_path / "dev/block").mkdir(parents=True)

    def make(path: str, number: str, *, below: tuple[str, ...] = ()) -> Path:
        folder = tmp_path / "devices" / path
        (folder / "slaves").mkdir(parents=True)
        for other in below:
            link = folder / "slaves" / Path(other).name
            link.symlink_to(tmp_path / "devices" / other)
        (tmp_path / "dev/block" / number).symlink_to(folder)
        return folder

    return make


def judged(number: str) -> bool:
    major, minor = map(int, number.split(":"))
    return transport._is_remote_number(os.makedev(major, minor), 16)


def test_what_stands_on_others_is_judged_by_all_of_them(disks: Callable[..., Path]) -> None:
    disks("pci/ata1/host0/target0:0:0/block/sda", "8:0")
    disks("platform/host3/session1/target3:0:0/block/sdb", "8:16")
    disks("virtual/block/md0", "9:0", below=("pci/ata1/host0/target0:0:0/block/sda",))
    disks("virtual/block/dm-0", "254:0", below=("virtual/block/md0",))
    disks(
        "virtual/block/dm-1",
        "254:1",
        below=("virtual/block/md0", "platform/host3/session1/target3:0:0/block/sdb"),
    )
    assert [judged(n) for n in ("8:0", "9:0", "254:0")] == [False] * 3
    assert [judged(n) for n in ("8:16", "254:1")] == [True] * 2


def test_a_partition_is_judged_by_its_disk(disks: Callable[..., Path]) -> None:
    disk = disks("virtual/nvme-subsystem/nvme-subsys0/nvme0n1", "259:0")
    (disk / "device/nvme0").mkdir(parents=True)
    (disk / "device/nvme0/transport").write_text("tcp\n")
    part = disks("virtual/nvme-subsystem/nvme-subsys0/nvme0n1/nvme0n1p1", "259:1")
    (part / "partition").write_text("1\n")
    assert judged("259:1")
    (disk / "device/nvme0/transport").write_text("pcie\n")
    assert not judged("259:1")


def test_a_loop_device_is_judged_by_its_file(
    disks: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    loop = disks("virtual/block/loop0", "7:0")
    (loop / "loop").mkdir()
    (loop / "loop/backing_file").write_text(f"{file}\n")
    monkeypatch.setattr(transport, "file_system", lambda fd: 0x6969)
    assert judged("7:0")


def test_devices_that_stand_on_one_another_in_a_circle_end(disks: Callable[..., Path]) -> None:
    disks("virtual/block/dm-0", "254:0", below=("virtual/block/dm-1",))
    disks("virtual/block/dm-1", "254:1", below=("virtual/block/dm-0",))
    assert judged("254:0")


def test_files_of_this_machine_are_local(tmp_path: Path) -> None:
    for folder in (tmp_path, Path("/dev/shm")):
        path = folder / f"transport-{os.getpid()}"
        path.touch()
        fd = os.open(path, os.O_RDONLY)
        try:
            assert not is_remote(fd)
        finally:
            os.close(fd)
            path.unlink()


def test_what_cannot_be_told_counts_as_remote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.touch()
    fd = os.open(path, os.O_RDONLY)
    monkeypatch.setattr(transport, "SYSFS", tmp_path / "absent")
    try:
        assert is_remote(fd)
    finally:
        os.close(fd)
    assert is_remote(fd), "a descriptor that is none"


def test_what_is_not_there_is_not_remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    assert not is_remote_path(str(path))
    path.touch()
    monkeypatch.setattr(transport, "is_remote", lambda fd: True)
    assert is_remote_path(str(path))


def test_a_pipe_holds_nobody_up(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    assert not is_remote_path(str(path))
