"""The guest is what the other tests take it for."""

from __future__ import annotations

import mmap
import os
import platform
import subprocess
from pathlib import Path

import pytest

GIB = 1 << 30
MODULES = (
    *("dm-era", "dm-delay", "dm-flakey", "dm-log-writes", "dm-mirror", "dm-snapshot", "raid1"),
    *("nbd", "zram", "brd", "loop", "drbd", "null_blk", "scsi_debug", "ext4", "xfs"),
)


def test_runs_debian_s_own_kernel() -> None:
    assert "Debian" in platform.version()
    assert os.environ["LAB_GUEST"] == "1"


@pytest.mark.parametrize("module", MODULES)
def test_module_can_be_loaded(module: str) -> None:
    done = subprocess.run(
        ["modprobe", "--show-depends", module], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    paths = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("insmod")]
    assert all(Path(path).exists() for path in paths), paths


@pytest.mark.parametrize(
    ("name", "sector_bytes"),
    [*((f"disk{n}", 512) for n in range(4)), *((f"disk4k{n}", 4096) for n in range(3))],
)
def test_disk_is_there(name: str, sector_bytes: int) -> None:
    block = Path("/sys/block") / Path(f"/dev/lab/{name}").resolve().name
    assert int((block / "size").read_text()) * 512 == GIB
    assert int((block / "queue/logical_block_size").read_text()) == sector_bytes
    assert (block / "queue/write_cache").read_text().strip() == "write back"
    assert int((block / "queue/discard_max_bytes").read_text()) > 0


def test_temporary_files_can_be_written_directly(tmp_path: Path) -> None:
    with mmap.mmap(-1, 4096) as page:
        page[:] = b"\x5a" * 4096
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        try:
            assert os.pwrite(fd, page, 4096) == 4096
        finally:
            os.close(fd)
    assert (tmp_path / "file").read_bytes()[4096:] == b"\x5a" * 4096


def test_what_is_written_stays_in_the_guest() -> None:
    """The root below is not writable even for root."""
    roots = [
        line.split()
        for line in Path("/proc/mounts").read_text().splitlines()
        if line.split()[1] == "/"
    ]
    assert [root[0] for root in roots] == ["overlay"]
    assert "upperdir=/rw/upper" in roots[0][3]
    assert "lowerdir=/host" in roots[0][3]
