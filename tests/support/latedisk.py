"""A secondary that keeps a write for as long as the test says, with stock nbdkit."""

from __future__ import annotations

import time
from pathlib import Path

from tests.support import rawnbd
from tests.support.rawnbd import RawNbd


class LateDisk:
    """A file behind `nbdkit eval`.  While it is `armed`, the next write waits; others go on."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        self.image = folder / "image"
        with self.image.open("wb") as file:
            file.truncate(size_bytes)
        self.armed, self.begun, self.go = folder / "armed", folder / "begun", folder / "go"
        self._size_bytes = size_bytes

    def plugin(self, *parameters: str) -> list[str]:
        """The plugin and its parameters, with these of filters."""
        wait = f"touch {self.begun}; while ! test -e {self.go}; do sleep 0.05; done"
        keep = f"cat >{self.image}.$$; if rm {self.armed} 2>/dev/null; then {wait}; fi"
        write = f"dd if={self.image}.$$ of={self.image} bs=1M oflag=seek_bytes seek=$4"
        read = f"dd if={self.image} bs=1M iflag=skip_bytes,count_bytes skip=$4 count=$3"
        return [
            "eval",
            f"get_size=echo {self._size_bytes}",
            f"pread={read} status=none",
            f"pwrite={keep}; {write} conv=notrunc status=none; rm {self.image}.$$",
            "flush=true",
            "can_flush=true",
            "thread_model=echo parallel",
            *parameters,
        ]

    def until_begun(self) -> None:
        """A write waits."""
        while not self.begun.exists():
            time.sleep(0.02)

    def lose_a_connection(self, socket: Path, data: bytes) -> None:
        """One that has sent a write of `data` at byte 0, which has begun."""
        self.armed.touch()
        with RawNbd(socket) as client:
            client.submit(rawnbd.WRITE, 0, len(data), data)
            self.until_begun()

    def let_go(self, data: bytes, offset_bytes: int = 0) -> None:
        """The write lands: `data` are there."""
        self.go.touch()
        while self.content(offset_bytes, len(data)) != data:
            time.sleep(0.02)

    def content(self, offset_bytes: int, length_bytes: int) -> bytes:
        with self.image.open("rb") as file:
            file.seek(offset_bytes)
            return file.read(length_bytes)
