"""A volume attached with device-mapper, on disks of its own, through the commands of dmctl."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.support.volumes import Control
from tests.vm.guest.disks import MIB, SECTOR, Disk, disks, same, sh

WAIT_S = 120.0


class DmVolume:
    """`primary`, `secondary` and `record` are disks; commands are those of dmctl."""

    def __init__(self, name: str, folder: Path, media: list[Disk]) -> None:
        self.name = name
        self.primary, self.secondary, self.record = media
        self.size_bytes = self.primary.size_bytes
        self.device = f"/dev/mapper/{name}"
        self.run_dir = folder / "run"
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.environment = {
            **os.environ,
            "DMCTL_CONFIG_DIR": str(folder / "etc"),
            "DMCTL_RUN_DIR": str(self.run_dir),
            "NO_COLOR": "1",
        }

    def words(self, *words: str) -> list[str]:
        """Of a command of dmctl, to be run in `environment`."""
        return [sys.executable, "-P", "-m", "dmctl", *words]

    def dmctl(self, *words: str, status: int | None = 0, timeout_s: float = WAIT_S) -> str:
        done = subprocess.run(
            self.words(*words),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if status is not None and done.returncode != status:
            raise AssertionError(
                f"dmctl {' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}\n"
                + self.log()
            )
        return done.stdout + done.stderr

    def log(self) -> str:
        """What the kernel and the volume's events say last."""
        return sh("dmesg", check=False)[-3000:]

    def create(self, *options: str) -> None:
        self.dmctl(
            *("create", self.name, "--attach", "dm", "--primary", self.primary.path),
            *("--secondary", self.secondary.path, "--record", self.record.path, *options),
        )

    def start(self) -> None:
        self.dmctl("start", self.name)

    def stop(self, *options: str, status: int = 0) -> str:
        return self.dmctl("stop", self.name, *options, status=status)

    def wait_in_sync(self, timeout_s: float = WAIT_S) -> None:
        self.dmctl("wait", self.name, "--for", "in-sync", "--timeout", f"{int(timeout_s)}s")

    def status(self) -> dict[str, Any]:
        """What `dmctl status` says, of a volume that runs without a process of its own: the
        emulated processor takes seconds to start one."""
        with contextlib.suppress(OSError), Control(self.run_dir / f"{self.name}.ctl") as control:
            return dict(control.call("status"))
        volume: dict[str, Any] = json.loads(self.dmctl("status", self.name, "--json"))["volumes"][0]
        return volume

    def until(self, condition: Callable[[dict[str, Any]], bool], timeout_s: float = WAIT_S) -> Any:
        """A figure of the status that has no event of its own."""
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            status = self.status()
            if condition(status):
                return status
            time.sleep(0.2)
        raise AssertionError(f"not in {timeout_s} s: {status}")

    @property
    def pid(self) -> int:
        return int((self.run_dir / f"{self.name}.pid").read_text())

    def kill(self, number: int = signal.SIGKILL) -> None:
        pid = self.pid
        pidfd = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(pidfd, number)
            if number == signal.SIGKILL:
                _await_end(pidfd)
        finally:
            os.close(pidfd)

    def is_equal(self) -> bool:
        return same(self.primary, self.secondary, self.size_bytes)

    def destroy(self) -> None:
        """Whatever state it is in: no process and no device of it is left."""
        self.dmctl("stop", self.name, "--now", status=None)
        with contextlib.suppress(OSError, ValueError, ProcessLookupError):
            self.kill()
        inner = self.name.replace("-", "--")
        for name in (self.name, f"dmctl-{inner}-w", f"dmctl-{inner}-era"):
            sh("dmsetup", "resume", name, check=False)
            sh("dmsetup", "remove", "--noudevsync", "-f", name, check=False)


def helpers_of(volume: DmVolume) -> list[int]:
    """Process numbers."""
    pid = volume.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wiring_of(volume: DmVolume) -> int:
    """The one that changes tables."""
    (wiring,) = (
        helper
        for helper in helpers_of(volume)
        if b"--connects" not in Path(f"/proc/{helper}/cmdline").read_bytes()
    )
    return wiring


def _await_end(pidfd: int) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(20_000), "a killed process does not end"


@contextlib.contextmanager
def dm_volume(
    name: str = "vol0",
    *options: str,
    size_bytes: int = 64 * MIB,
    sector_bytes: int = SECTOR,
    started: bool = True,
    discards: bool = False,
) -> Iterator[DmVolume]:
    with (
        tempfile.TemporaryDirectory(prefix="dmv-") as folder,
        disks(
            (f"{name}-p", size_bytes),
            (f"{name}-s", size_bytes),
            (f"{name}-r", 4 * MIB),
            sector_bytes=sector_bytes,
            discards=discards,
        ) as media,
    ):
        volume = DmVolume(name, Path(folder), media)
        try:
            volume.create(*options)
            if started:
                volume.start()
            yield volume
        finally:
            volume.destroy()
