"""A volume of files in a folder of its own, run through the commands that an administrator uses.

Nothing here imports the product: `dmctl` is a program, its JSON the interface.  `Volume.destroy`
kills the daemon whatever state it is in, so a failing test leaves no process behind.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

MIB = 1 << 20
DMCTL = Path(sys.executable).parent / "dmctl"


class CommandFailed(AssertionError):
    """A dmctl command ended with a status other than the expected one."""


def run(command: list[str], timeout_s: float = 120, check: bool = True) -> str:
    """Standard output of a program; what it said on both streams is in the error."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if check and done.returncode:
        said = (done.stdout + done.stderr).strip()
        raise CommandFailed(f"{' '.join(command)}: exit status {done.returncode}\n{said}")
    return done.stdout


def make_file(path: Path, size_bytes: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return path


def wait_gone(pid: int, timeout_s: float = 30) -> None:
    """Return when the process has ended and its I/O with it."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            raise TimeoutError(f"process {pid} did not end within {timeout_s} s")
    finally:
        os.close(fd)


@dataclass
class Volume:
    """`folder` must have a short path: unix sockets live in it."""

    folder: Path
    size_bytes: int = 64 * MIB
    name: str = "vol0"
    options: list[str] = field(default_factory=list)
    secondary_target: str | None = None
    media_folder: Path | None = None

    def __post_init__(self) -> None:
        media = self.media_folder or self.folder
        self.primary = media / f"{self.name}.primary"
        self.secondary = media / f"{self.name}.secondary"
        self.record = media / f"{self.name}.record"
        self.socket = self.folder / "run" / f"{self.name}.nbd"

    def __enter__(self) -> Volume:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.destroy()

    @property
    def uri(self) -> str:
        return f"nbd+unix:///{self.name}?socket={self.socket}"

    @property
    def pid(self) -> int:
        return int((self.folder / "run" / f"{self.name}.pid").read_text())

    def dmctl(self, *arguments: str, timeout_s: float = 120, check: bool = True) -> str:
        command = [str(DMCTL), "--config-dir", str(self.folder / "etc")]
        command += ["--run-dir", str(self.folder / "run"), *arguments]
        return run(command, timeout_s, check)

    def make_media(self) -> None:
        """Three sparse files; one that is there already is kept."""
        pages = -(-self.size_bytes // MIB // 31488) + 1
        for path, size in (
            (self.primary, self.size_bytes),
            (self.secondary, self.size_bytes),
            (self.record, MIB + pages * 8192),
        ):
            if not path.exists():
                make_file(path, size)

    def create(self, *more: str) -> None:
        self.make_media()
        self.dmctl(
            "create",
            self.name,
            "--primary",
            str(self.primary),
            "--secondary",
            self.secondary_target or str(self.secondary),
            "--record",
            str(self.record),
            "--attach",
            "nbd",
            *self.options,
            *more,
        )

    def start(self) -> None:
        self.dmctl("start", self.name)

    def stop(self, *more: str) -> None:
        self.dmctl("stop", self.name, *more)

    def wait_in_sync(self, timeout_s: float = 120) -> None:
        self.dmctl(
            "wait",
            self.name,
            "--for",
            "in-sync",
            "--timeout",
            f"{timeout_s:.0f}s",
            timeout_s=timeout_s + 10,
        )

    def status(self) -> dict[str, Any]:
        report = json.loads(self.dmctl("--json", "status", self.name))
        (volume,) = report["volumes"]
        return dict(volume)

    def kill(self) -> None:
        """kill -9; returns when the process is gone, which is after its last I/O has ended."""
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        wait_gone(pid)

    def destroy(self) -> None:
        """End the daemon if there is one; the files are the caller's."""
        try:
            self.kill()
        except (FileNotFoundError, ProcessLookupError, ValueError):
            return
