"""What the demos share: how they speak, run commands, kill, wait, and clean up."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

MIB = 1 << 20
DMCTL = Path(sys.executable).parent / "dmctl"


class DemoFailed(Exception):
    """The demo met something that must not happen; the message says what."""


def say(text: str = "") -> None:
    print(text, flush=True)


def step(number: int, text: str) -> None:
    say(f"\n{number}. {text}")


def mib(count: float) -> str:
    return f"{count / MIB:,.1f} MiB"


def run(*command: str | Path, check: bool = True) -> str:
    """What it prints; DemoFailed with all that it said if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    if check and done.returncode:
        raise DemoFailed(f"{' '.join(words)} failed:\n{(done.stdout + done.stderr).strip()}")
    return done.stdout


def kill(pid_file: Path, name: str) -> None:
    """kill -9 of the daemon of volume `name`, and wait until it is really gone; nothing if there is
    none."""
    try:
        pid = int(pid_file.read_text())
        if name not in Path(f"/proc/{pid}/cmdline").read_text():
            return
        handle = os.pidfd_open(pid)
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        poll.poll(10_000)
    finally:
        os.close(handle)


def wait_until(ready: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    """For what announces nothing."""
    deadline_s = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline_s:
            raise DemoFailed(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(0.05)


def can_mount() -> bool:
    return (
        os.geteuid() == 0
        and os.environ.get("DEMO_MOUNT") != "no"
        and Path("/dev/fuse").exists()
        and Path("/dev/loop-control").exists()
        and shutil.which("nbdfuse") is not None
    )


def clean_mounts(folder: Path) -> None:
    """Unmount what is mounted below a demo's folder, the innermost first."""
    for _ in range(3):
        mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for place in sorted((at for at in mounted if at.startswith(f"{folder}/")), reverse=True):
            # A file system whose disk has gone lets go only lazily.
            run("umount", place, check=False)
            if place in Path("/proc/mounts").read_text():
                run("umount", "--lazy", place, check=False)
