"""Which servers may carry out a write of a lost connection beside the next one, and which may not:
the table of docs/recovery.md, "What may land late"."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import rawnbd
from tests.support.nbdserve import MIB
from tests.support.rawnbd import RawNbd

KEPT = b"1" * 4096


@contextmanager
def running(socket: Path, *command: str) -> Iterator[Path]:
    process = subprocess.Popen(command)
    try:
        while not socket.exists():
            assert process.poll() is None, "the server has ended"
            time.sleep(0.02)
        yield socket
    finally:
        process.kill()
        process.wait()


class Disk:
    """A file behind `nbdkit eval`, whose writes wait until the test lets them go."""

    def __init__(self, folder: Path) -> None:
        self.image = folder / "image"
        self.image.write_bytes(bytes(MIB))
        self.begun, self.go = folder / "begun", folder / "go"

    def plugin(self, *parameters: str) -> list[str]:
        """With these parameters of filters."""
        wait = f"touch {self.begun}; while ! test -e {self.go}; do sleep 0.05; done"
        return [
            "eval",
            f"get_size=echo {MIB}",
            f"pread=dd if={self.image} iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none",
            f"pwrite={wait}; dd of={self.image} oflag=seek_bytes seek=$4 conv=notrunc status=none",
            "thread_model=echo parallel",
            *parameters,
        ]

    def lose_a_connection(self, socket: Path) -> None:
        """One that has sent a write which has begun."""
        with RawNbd(socket) as client:
            client.submit(rawnbd.WRITE, 0, len(KEPT), KEPT)
            while not self.begun.exists():
                time.sleep(0.02)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


def lands_on_top(disk: Disk, socket: Path) -> bool:
    """Whether the next client, greeted by now, finds the old write landing after it has looked."""
    disk.lose_a_connection(socket)
    with RawNbd(socket) as client:
        before = client.call(rawnbd.READ, 0, len(KEPT))
        disk.go.touch()
        while disk.image.read_bytes()[: len(KEPT)] != KEPT:
            time.sleep(0.02)
        return before != client.call(rawnbd.READ, 0, len(KEPT))


@pytest.mark.parametrize("filters", [[], ["--filter=limit"]], ids=["plain", "limit"])
def test_nbdkit_carries_out_late(disk: Disk, sock_dir: Path, filters: list[str]) -> None:
    limit = ["limit=2"] if filters else []
    socket = sock_dir / "s"
    with running(socket, "nbdkit", "-f", "-U", str(socket), *filters, *disk.plugin(*limit)):
        assert lands_on_top(disk, socket)


def test_qemu_nbd_carries_out_late_whatever_the_number_of_clients(
    disk: Disk, sock_dir: Path
) -> None:
    inner, socket = sock_dir / "i", sock_dir / "s"
    uri = f"nbd+unix:///?socket={inner}"
    with (
        running(inner, "nbdkit", "-f", "-U", str(inner), *disk.plugin()),
        running(socket, "qemu-nbd", "-t", "-e", "1", "-k", str(socket), "-f", "raw", uri),
    ):
        assert lands_on_top(disk, socket)


def test_nbdkit_that_serializes_connections_does_not(disk: Disk, sock_dir: Path) -> None:
    socket = sock_dir / "s"
    filters = ["--filter=noparallel"]
    plugin = disk.plugin("serialize=connections")
    with running(socket, "nbdkit", "-f", "-U", str(socket), *filters, *plugin):
        disk.lose_a_connection(socket)
        with pytest.raises(TimeoutError):
            RawNbd(socket, timeout_s=1.0)
        disk.go.touch()
        with RawNbd(socket) as client:
            assert client.call(rawnbd.READ, 0, len(KEPT)) == KEPT
