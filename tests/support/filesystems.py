"""A file system on a volume, through foreign programs that wait for a daemon which comes back.

    file system - loop device - FUSE file of qemu-storage-daemon - NBD - bitmapd

qemu's client has `reconnect-delay`: requests wait while bitmapd is dead.  `Exerciser` is a user of
the file system that knows what its file has to hold.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.needs import lacks, need
from tests.support.volumes import KIB, MIB, Volume, run, wait_gone

RECONNECT_S = 300
MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}
CHECK = {
    "ext4": ["e2fsck", "-f", "-n"],
    "xfs": ["xfs_repair", "-n"],
    "btrfs": ["btrfs", "check", "--readonly"],
}
_PUNCH_HOLE, _ZERO_RANGE, _KEEP_SIZE = 2, 16, 1


def need_filesystem(kind: str) -> None:
    need("qemu-storage-daemon", "fusermount3", "losetup", MAKE[kind][0], CHECK[kind][0])
    if os.geteuid():
        lacks("to be root, who may mount")
    if kind not in Path("/proc/filesystems").read_text().split():
        lacks(f"{kind} in the kernel")
    if not Path("/dev/fuse").exists():
        lacks("/dev/fuse")


class Shown:
    """The export as a file, until `end`."""

    def __init__(self, volume: Volume) -> None:
        self.path = volume.folder / "shown"
        self.path.touch()
        node = (
            f"driver=nbd,node-name=n,server.type=unix,server.path={volume.socket}"
            f",export={volume.name},reconnect-delay={RECONNECT_S},cache.direct=on,discard=unmap"
        )
        pid_file = volume.folder / "shown.pid"
        export = f"type=fuse,id=f,node-name=n,mountpoint={self.path},writable=on"
        # It becomes a daemon once the file is there.
        command = ["qemu-storage-daemon", "--daemonize", "--pidfile", str(pid_file)]
        run([*command, "--blockdev", node, "--export", export])
        self.pid = int(pid_file.read_text())

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return
        wait_gone(self.pid)
        if number is signal.SIGKILL:
            # libfuse's helper may have been faster.
            run(["fusermount3", "-u", "-z", str(self.path)], check=False)


@contextmanager
def mounted(source: Path, folder: Path, kind: str, *options: str) -> Iterator[Path]:
    """What is in that file or image, mounted; whatever happened, nothing is left mounted."""
    folder.mkdir(exist_ok=True)
    device = run(["losetup", "--find", "--show", str(source)]).strip()
    try:
        run(["mount", "-t", kind, *options, device, str(folder)])
        try:
            yield folder
        finally:
            run(["umount", str(folder)])
    finally:
        run(["losetup", "--detach", device])


def check(kind: str, image: Path) -> None:
    """Raises CommandFailed, with what the program said, if it finds anything wrong."""
    run([*CHECK[kind], str(image)])


class Exerciser(threading.Thread):
    """Writes, maps, cuts, grows, punches and reads one file, and compares what it reads.

    `until(count)` waits for so many operations more; `finish` raises what went wrong."""

    LONGEST_BYTES = 256 * KIB

    def __init__(self, path: Path, size_bytes: int = 8 * MIB, seed: int = 1) -> None:
        super().__init__(name="exerciser")
        self._path = path
        self._size_bytes = size_bytes
        self._chance = random.Random(seed)
        self.content = bytearray()
        self._done = threading.Condition()
        self._count = 0
        self._ending = False
        self._error: BaseException | None = None
        self._libc = ctypes.CDLL(None, use_errno=True)

    def until(self, count: int) -> None:
        with self._done:
            target = self._count + count
            if not self._done.wait_for(lambda: self._count >= target or self._error, 300):
                raise AssertionError(f"{self._count} of {target} operations after 300 s")
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        self._ending = True
        self.join(300)
        if self._error is not None:
            raise self._error
        assert not self.is_alive()

    def run(self) -> None:
        kinds = [self._write, self._write, self._map, self._read, self._read, self._cut]
        kinds += [self._grow, self._punch, self._zero, self._sync]
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                while not self._ending:
                    self._chance.choice(kinds)(fd)
                    with self._done:
                        self._count += 1
                        self._done.notify()
                os.fsync(fd)
            finally:
                os.close(fd)
        except BaseException as error:  # noqa: BLE001  (raised by `until` and `finish`)
            with self._done:
                self._error = error
                self._done.notify()

    def _range(self, within_bytes: int) -> tuple[int, int]:
        start = self._chance.randrange(within_bytes)
        return start, min(self._chance.randrange(1, self.LONGEST_BYTES), within_bytes - start)

    def _put(self, start: int, data: bytes) -> None:
        if start > len(self.content):
            self.content += bytes(start - len(self.content))
        self.content[start : start + len(data)] = data

    def _write(self, fd: int) -> None:
        start, length = self._range(self._size_bytes)
        data = self._chance.randbytes(length)
        assert os.pwrite(fd, data, start) == length
        self._put(start, data)

    def _map(self, fd: int) -> None:
        if not self.content:
            return
        start, length = self._range(len(self.content))
        data = self._chance.randbytes(length)
        with mmap.mmap(fd, len(self.content)) as view:
            assert view[start : start + length] == self.content[start : start + length]
            view[start : start + length] = data
            if self._chance.random() < 0.3:
                view.flush()
        self._put(start, data)

    def _read(self, fd: int) -> None:
        if not self.content:
            return
        start, length = self._range(len(self.content))
        if self._chance.random() < 0.5:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        found = os.pread(fd, length, start)
        assert found == self.content[start : start + length], f"{length} bytes at {start} differ"

    def _cut(self, fd: int) -> None:
        length = self._chance.randrange(len(self.content) + 1)
        os.ftruncate(fd, length)
        del self.content[length:]

    def _grow(self, fd: int) -> None:
        length = self._chance.randrange(len(self.content), self._size_bytes + 1)
        os.ftruncate(fd, length)
        self.content += bytes(length - len(self.content))

    def _fallocate(self, fd: int, mode: int) -> None:
        if not self.content:
            return
        start, length = self._range(len(self.content))
        arguments = (fd, mode, ctypes.c_long(start), ctypes.c_long(length))
        if self._libc.fallocate(*arguments):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._put(start, bytes(length))

    def _punch(self, fd: int) -> None:
        self._fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE)

    def _zero(self, fd: int) -> None:
        self._fallocate(fd, _ZERO_RANGE | _KEEP_SIZE)

    def _sync(self, fd: int) -> None:
        os.fsync(fd)
