"""The disks a guest may have.

A disk belongs to a test, not to a boot: `start` makes it in the guest's folder, every boot of the
guest uses it again, `stop` ends it.  In the guest it is `/dev/lab/NAME` (the name is its serial
number, at most 20 characters).
"""

from __future__ import annotations

import os
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from tests.vm.lossy import Loss, LossyStore, Mode
from tests.vm.lossy_server import LossyServer

MIB = 1 << 20
GIB = 1 << 30
_NAME = re.compile(r"[a-z0-9-]{1,20}")
_SIZE = re.compile(r"(\d+)([KMG]?)")

Cache = Literal["none", "writeback", "unsafe"]


class GuestDisk(Protocol):
    name: str
    sector_bytes: int

    def start(self, folder: Path) -> None: ...
    def backend(self) -> dict[str, object]:
        """What `blockdev-add` of qemu takes, without the node's name."""

    def cut(self) -> Loss | None:
        """The power went; the guest is gone already."""

    def stop(self) -> None: ...


@dataclass(slots=True)
class Disk:
    """A sparse raw file.  A power cut loses nothing of what qemu answered, flushed or not.

    `unsafe` ignores flushes and is for tests that do not cut the power; `none` is O_DIRECT.
    """

    name: str
    size_bytes: int = GIB
    sector_bytes: int = 512
    cache: Cache = "unsafe"
    path: Path = Path()

    def __post_init__(self) -> None:
        check_name(self.name)

    def start(self, folder: Path) -> None:
        if self.path == Path():
            self.path = folder / f"{self.name}.img"
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(fd).st_size < self.size_bytes:
                os.ftruncate(fd, self.size_bytes)
        finally:
            os.close(fd)

    def backend(self) -> dict[str, object]:
        return {
            "driver": "raw",
            "discard": "unmap",
            "cache": {"direct": self.cache == "none", "no-flush": self.cache == "unsafe"},
            "file": {
                "driver": "file",
                "filename": str(self.path),
                "discard": "unmap",
                "aio": "threads",
                "cache": {"direct": self.cache == "none", "no-flush": self.cache == "unsafe"},
            },
        }

    def cut(self) -> None:
        return None

    def stop(self) -> None:
        return None


class LossyDisk:
    """A disk with a volatile write cache (see `tests/vm/lossy.py`).

    `path` is its medium: after a power cut it is what the disk will show at the next boot.  `seed`
    decides what the cuts keep, `mode` can pin that down.
    """

    def __init__(
        self,
        name: str,
        size_bytes: int = GIB,
        sector_bytes: int = 512,
        *,
        seed: int,
        mode: Mode | None = None,
    ) -> None:
        check_name(name)
        self.name = name
        self.size_bytes = size_bytes
        self.sector_bytes = sector_bytes
        self.mode = mode
        self.losses: list[Loss] = []
        self._rng = random.Random(f"{name} {seed}")
        self._store: LossyStore | None = None
        self._server: LossyServer | None = None

    @property
    def path(self) -> Path:
        return self._running()[0].medium_path

    @property
    def server(self) -> LossyServer:
        return self._running()[1]

    def start(self, folder: Path) -> None:
        own = folder / self.name
        own.mkdir()
        self._store = LossyStore(own, self.size_bytes, self._rng)
        self._server = LossyServer(self._store, self.size_bytes, self.sector_bytes, own / "s")

    def backend(self) -> dict[str, object]:
        path = str(self.server.path)
        return {
            "driver": "nbd",
            "server": {"type": "unix", "path": path},
            "discard": "unmap",
            "cache": {"direct": True, "no-flush": False},
        }

    def cut(self) -> Loss:
        store, server = self._running()
        server.idle()
        server.thaw()
        loss = store.cut(self.mode)
        self.losses.append(loss)
        return loss

    def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._store is not None:
            self._store.close()
        self._server = self._store = None

    def _running(self) -> tuple[LossyStore, LossyServer]:
        if self._store is None or self._server is None:
            raise RuntimeError(f"disk {self.name} is not in use by a guest")
        return self._store, self._server


def check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or name in ("scratch", "python"):
        raise ValueError(f"{name!r} is no name for a disk: 1 to 20 of a-z, 0-9 and -")


def parse(text: str) -> Disk:
    """`NAME=SIZE[,4k][,none|writeback|unsafe]` of the command line."""
    name, _, rest = text.partition("=")
    size, *options = rest.split(",")
    match = _SIZE.fullmatch(size)
    if match is None:
        raise ValueError(f"{text!r}: a disk is NAME=SIZE, for example data=512M or data=1G,4k,none")
    disk = Disk(name, int(match[1]) * {"": 1, "K": 1 << 10, "M": MIB, "G": GIB}[match[2]])
    for option in options:
        match option:
            case "4k":
                disk.sector_bytes = 4096
            case "none" | "writeback" | "unsafe":
                disk.cache = option
            case _:
                raise ValueError(f"{text!r}: {option!r} is not 4k, none, writeback or unsafe")
    return disk
