"""`dmctl stop --kill`: SIGKILL for a bitmapd that does not answer, and for nothing else.

It is safe at any moment: the record names whatever differs, and the next start copies it.  What is
not safe is to kill by a number that somebody wrote down.

1. A candidate is the process that listens at the control socket, as the kernel says, or the one in
   the pid file or the main process of the unit.
2. It is held by a pidfd before it is looked at, so that its number can pass to nobody else in
   between.
3. It is killed only if it holds the lock on the volume's record, which proves that it serves, or is
   about to.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bitmapd.config import Paths, ReceiverConfig, VolumeConfig, device_of
from bitmapd.errors import BitmapdError, TimeOutError
from bitmapd.net.sockets import peer_credentials
from dmctl.cli.processes import ended, has_unit, systemctl

PROC = Path("/proc")
CONNECT_TIMEOUT_S = 1.0
END_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds the lock on a volume's record."""

    pid: int
    pidfd: int


@contextmanager
def holder(paths: Paths, config: VolumeConfig | ReceiverConfig) -> Iterator[Holder | None]:
    """The volume's process, whatever it does; None if none is found."""
    record = _place(config.record)
    for pid in _candidates(paths, config.name):
        try:
            pidfd = os.pidfd_open(pid)
        except (ProcessLookupError, OSError):
            continue
        try:
            if record is not None and _locks(pid, record):
                yield Holder(pid, pidfd)
                return
        finally:
            os.close(pidfd)
    yield None


def kill(
    paths: Paths, config: VolumeConfig | ReceiverConfig, found: Holder, timeout_s: float | None
) -> None:
    """Return when it is gone; TimeOutError if the kernel keeps it."""
    name = config.name
    stays_stopped(paths, name)
    signal.pidfd_send_signal(found.pidfd, signal.SIGKILL)
    if not ended(found.pidfd, END_TIMEOUT_S if timeout_s is None else timeout_s):
        raise TimeOutError(
            f"bitmapd of volume '{name}' (process {found.pid}) is killed, and has not ended:"
            " the kernel waits for a device that does not answer",
            hint=f"'cat /proc/{found.pid}/stack' and dmesg say which; it ends when that answers",
        )


def stays_stopped(paths: Paths, name: str) -> None:
    """It is stopped, and has not died: neither systemd nor `dmctl monitor` is to start it again."""
    paths.pid_file(name).unlink(missing_ok=True)
    if has_unit(paths, name):
        with contextlib.suppress(TimeOutError):  # the process is to end all the same
            systemctl(name, "stop", "--no-block")


def waiting_hosts(config: VolumeConfig | ReceiverConfig) -> str:
    """What becomes of hosts without the process."""
    if isinstance(config, VolumeConfig) and config.attach == "dm":
        return (
            f"; what hosts ask of {device_of(config)} waits in the kernel until"
            f" 'dmctl start {config.name}'"
        )
    return ""


def _candidates(paths: Paths, name: str) -> Iterator[int]:
    """Process numbers, the most certain first."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(CONNECT_TIMEOUT_S)
        sock.connect(str(paths.control_socket(name)))
        pid, _uid = peer_credentials(sock)
        if pid > 0:
            yield pid
    with contextlib.suppress(OSError, ValueError):
        yield int(paths.pid_file(name).read_text())
    if has_unit(paths, name):
        with contextlib.suppress(ValueError):
            yield int(systemctl(name, "show", "-p", "MainPID", "--value").stdout)


def _place(path: str) -> tuple[int, int] | None:
    """What tells a file, or a block device whatever its name, from all others."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return _identity(found)


def _identity(found: os.stat_result) -> tuple[int, int]:
    if stat.S_ISBLK(found.st_mode):
        return -1, found.st_rdev
    return found.st_dev, found.st_ino


def _locks(pid: int, record: tuple[int, int]) -> bool:
    """Whether the process holds a lock on this medium.  proc(5): a descriptor's `fdinfo` lists the
    locks that were taken through it."""
    process = PROC / str(pid)
    try:
        descriptors = list((process / "fd").iterdir())
    except OSError:  # it has ended, or is another user's
        return False
    for descriptor in descriptors:
        try:
            if _identity(descriptor.stat()) != record:
                continue
            told = (process / "fdinfo" / descriptor.name).read_text()
        except OSError:  # closed meanwhile
            continue
        if any(line.startswith("lock:") and "OFDLCK" in line for line in told.splitlines()):
            return True
    return False


def not_found(name: str) -> BitmapdError:
    return BitmapdError(
        f"no process of volume '{name}' is found that could be killed: none that listens at its"
        " control socket or stands in its pid file holds the lock on its record",
        hint="'fuser -v' with the record's device names whoever has it open",
    )
