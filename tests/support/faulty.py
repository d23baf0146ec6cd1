"""Real block devices that fail when told to.

`faulty_disk` is a loop device over a file that nbdfuse shows and nbdkit serves, with nbdkit's error
filter in between: errors of the kind that was asked for come while a trigger file exists, and a
stopped nbdkit is a disk that does not answer.  `full_disk` is a small tmpfs.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.loops import loop_device, run
from tests.support.nbdpeers import Peer, nbdkit, need

WAIT_S = 60.0


class FaultyDisk:
    """`path` is the block device; `backing` holds its content."""

    def __init__(self, path: Path, backing: Path, triggers: Path, server: Peer) -> None:
        self.path = path
        self.backing = backing
        self._triggers = triggers
        self._server = server

    @contextmanager
    def failing(self, *kinds: str) -> Iterator[None]:
        """EIO for every `pread`, `pwrite`, `zero` or `trim` that reaches the disk meanwhile."""
        for kind in kinds:
            (self._triggers / kind).touch()
        try:
            yield
        finally:
            for kind in kinds:
                (self._triggers / kind).unlink()

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """No request is answered meanwhile; all of them are afterwards."""
        self._server.stop()
        try:
            yield
        finally:
            self._server.signal(signal.SIGCONT)


@contextmanager
def faulty_disk(folder: Path, backing: Path) -> Iterator[FaultyDisk]:
    need("nbdfuse")
    folder.mkdir(exist_ok=True)
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("NEEDS /dev/fuse: disks that fail were NOT tested")
    rules = [
        f"error-{kind}{rule}"
        for kind in ("pread", "pwrite", "zero", "trim")
        for rule in ("=EIO", "-rate=1", f"-file={folder / kind}")
    ]
    with ExitStack() as stack:
        server = stack.enter_context(
            nbdkit(folder, "--filter=error", "file", f"file={backing}", *rules)
        )
        shown = folder / "disk"
        shown.touch()
        _show(stack, shown, server, backing.stat().st_size)
        path = stack.enter_context(loop_device(shown, 512, "--direct-io=on"))
        # What is asked of a server that does not answer would keep the device for ever.
        stack.callback(server.kill)
        yield FaultyDisk(Path(path), backing, folder, server)


def _show(stack: ExitStack, shown: Path, server: Peer, size_bytes: int) -> None:
    process = subprocess.Popen(
        ["nbdfuse", str(shown), f"nbd+unix://?socket={server.path}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    deadline_s = time.monotonic() + WAIT_S
    pidfd = os.pidfd_open(process.pid)
    try:
        # No event tells that something is mounted; the end of the process is one.
        while shown.stat().st_size != size_bytes:
            if select.select([pidfd], [], [], 0.01)[0] or time.monotonic() > deadline_s:
                pytest.skip("NEEDS a working nbdfuse: disks that fail were NOT tested")
    finally:
        os.close(pidfd)
    stack.callback(run, "fusermount3", "-u", "-z", str(shown))


@contextmanager
def small_filesystem(folder: Path, size_mib: int) -> Iterator[Path]:
    """A tmpfs of that size, mounted on `folder`; its size can be changed by `resize`."""
    folder.mkdir(exist_ok=True)
    try:
        run("mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(folder))
    except (RuntimeError, FileNotFoundError) as error:
        pytest.skip(f"NEEDS to mount a tmpfs, for which one has to be root: {error}")
    try:
        yield folder
    finally:
        run("umount", "-l", str(folder))


def resize(filesystem: Path, size_mib: int) -> None:
    run("mount", "-o", f"remount,size={size_mib}m", str(filesystem))
