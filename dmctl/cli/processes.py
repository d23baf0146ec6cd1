"""The process behind a volume: starting it, noticing its end, and ending one that hangs.

Whether a volume runs is learnt from its control socket alone.  The process is watched through a
pidfd, so that its end is an event and a process number that is used again deceives nobody.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from bitmapd.config import Paths, atomic_write, unit_instance
from bitmapd.config.files import DEFAULT_CONFIG_DIR, DEFAULT_RUN_DIR
from bitmapd.control.client import ControlClient, ask
from bitmapd.control.events import iso_time
from bitmapd.errors import BitmapdError, TimeOutError, WrongStateError, error_from_json
from bitmapd.net.sockets import peer_credentials

POLL_S = 0.03
SYSTEMD_RUNS = Path("/run/systemd/system")  # sd_booted(3)
FORK_TIMEOUT_S = 60.0  # until a bitmapd that becomes a daemon has left its parent
SILENT_S = 10.0  # until a daemon has written its pid file
LOCK_TIMEOUT_S = 150.0  # more than a start takes that is given the time it has by default
SYSTEMCTL_TIMEOUT_S = 10.0


def is_running(paths: Paths, name: str) -> bool:
    """Whether a bitmapd answers; TimeOutError if one is there and does not."""
    try:
        ask(paths.control_socket(name), name, "ping")
    except WrongStateError:
        return False
    return True


@contextlib.contextmanager
def start_lock(paths: Paths, name: str, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[Path]:
    """One start or removal of a volume at a time: a second one waits, and then looks again."""
    deadline_s = time.monotonic() + timeout_s
    paths.run_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    path = paths.run_dir / f"{name}.lock"
    fd = os.open(path, flags, 0o600)
    try:
        while not _locked(fd):
            if time.monotonic() >= deadline_s:
                raise TimeOutError(
                    f"another command that starts or removes volume '{name}' has not ended",
                    hint=f"it holds {path} ('lsof {path}' names it)",
                )
            select.select([], [], [], POLL_S)  # nobody tells that a lock was given up
        yield path
    finally:
        os.close(fd)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def launch(paths: Paths, name: str, timeout_s: float) -> None:
    """Start bitmapd and return when it serves the volume; raise the error that ended it."""
    deadline_s = time.monotonic() + timeout_s
    paths.error_file(name).unlink(missing_ok=True)
    if has_unit(paths, name):
        _start_unit(paths, name, timeout_s)
        _await_ready(paths, name, deadline_s, None)
        return
    # Where it cannot leave its process number it cannot leave an error either.
    atomic_write(paths.error_file(name), b"\n")
    paths.error_file(name).unlink()
    stale = _mark(paths.pid_file(name))
    command = [sys.executable, "-P", "-m", "bitmapd.daemon", name]
    command += ["--config-dir", str(paths.config_dir), "--run-dir", str(paths.run_dir)]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said
        )
        try:
            status = process.wait(min(timeout_s, FORK_TIMEOUT_S))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise TimeOutError(f"bitmapd of volume '{name}' did not become a daemon") from None
        if status != 0:
            raise _reported(paths, name) or _unreported(name, status, said)
    _await_ready(paths, name, deadline_s, stale)


def start_command(paths: Paths, name: str) -> list[str]:
    """The words that start a volume as `dmctl start` does; the interpreter comes before them."""
    folders = ["--config-dir", str(paths.config_dir), "--run-dir", str(paths.run_dir)]
    return ["-P", "-m", "dmctl", *folders, "--json", "start", name]


def has_unit(paths: Paths, name: str) -> bool:
    """Whether systemd runs here and has our unit, which serves the default folders."""
    if (str(paths.config_dir), str(paths.run_dir)) != (DEFAULT_CONFIG_DIR, DEFAULT_RUN_DIR):
        return False
    if not SYSTEMD_RUNS.is_dir() or shutil.which("systemctl") is None:
        return False
    return systemctl(name, "cat").returncode == 0


def systemctl(name: str, *words: str) -> subprocess.CompletedProcess[bytes]:
    """About the volume's unit; TimeOutError if systemd does not answer."""
    command = ["systemctl", *words, f"bitmapd@{unit_instance(name)}.service"]
    try:
        return subprocess.run(
            command, capture_output=True, check=False, timeout=SYSTEMCTL_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise TimeOutError(f"'{' '.join(command)}' did not end in time") from None


def _start_unit(paths: Paths, name: str, timeout_s: float) -> None:
    command = ["systemctl", "start", f"bitmapd@{unit_instance(name)}.service"]
    try:
        answer = subprocess.run(command, capture_output=True, check=False, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise _too_slow(name) from None
    if answer.returncode != 0:
        raise _reported(paths, name) or BitmapdError(
            answer.stderr.decode(errors="replace").strip() or "systemctl failed",
            hint=f"see 'journalctl -u bitmapd@{unit_instance(name)}'",
        )


def _await_ready(paths: Paths, name: str, deadline_s: float, stale: tuple[int, int] | None) -> None:
    """Nobody tells when a socket of another process begins to answer, so it is asked for; between
    two questions the end of the process is waited for."""
    silent_until_s = time.monotonic() + SILENT_S
    pidfd: int | None = None
    try:
        while not is_running(paths, name):
            error = _reported(paths, name)
            if error is not None:
                raise error
            if time.monotonic() > deadline_s:
                raise _too_slow(name)
            if pidfd is None:
                pidfd = _new_daemon(paths.pid_file(name), stale)
            if pidfd is None:
                if time.monotonic() > silent_until_s:
                    raise _vanished(name)
                select.select([], [], [], POLL_S)
            elif ended(pidfd, POLL_S):
                raise _reported(paths, name) or _vanished(name)
    finally:
        if pidfd is not None:
            os.close(pidfd)


def _mark(path: Path) -> tuple[int, int] | None:
    """What tells a file from another one of the same name."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _new_daemon(pid_file: Path, stale: tuple[int, int] | None) -> int | None:
    """A pidfd of the process in the pid file, unless the file is one that was there before."""
    if _mark(pid_file) in (None, stale):
        return None
    try:
        return os.pidfd_open(int(pid_file.read_text()))
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return None  # being written, or gone: its error file tells


def ended(pidfd: int, timeout_s: float | None) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


def _reported(paths: Paths, name: str) -> BitmapdError | None:
    """The error that a bitmapd left behind."""
    try:
        return error_from_json(json.loads(paths.error_file(name).read_bytes()))
    except (FileNotFoundError, ValueError, RecursionError, AttributeError):
        return None


def last_error(paths: Paths, name: str) -> dict[str, str] | None:
    """The error of the last start, as `status` shows it."""
    error = _reported(paths, name)
    if error is None:
        return None
    try:
        at = iso_time(paths.error_file(name).stat().st_mtime)
    except FileNotFoundError:
        return None
    return {"code": error.code, "message": error.message, "at": at}


def _unreported(name: str, status: int, said: IO[bytes]) -> BitmapdError:
    said.seek(0)
    lines = said.read().decode(errors="replace").strip().splitlines()
    why = f": {lines[-1]}" if lines else ""
    return BitmapdError(f"bitmapd of volume '{name}' ended with status {status}{why}")


def _vanished(name: str) -> BitmapdError:
    return BitmapdError(
        f"bitmapd of volume '{name}' ended without saying why",
        hint=f"look into the system's log, or run 'bitmapd {name} --foreground'",
    )


def _too_slow(name: str) -> TimeOutError:
    return TimeOutError(
        f"volume '{name}' was not ready in time",
        hint=f"it may become so: 'dmctl wait {name} --for started'",
    )


class Watched:
    """The process at the other end of a control connection, until it ends."""

    def __init__(self, client: ControlClient) -> None:
        self._client = client
        pid, _uid = peer_credentials(client.socket)
        self._pidfd: int | None = None
        # Another pid namespace hides the number; the connection's end must do then.
        with contextlib.suppress(ProcessLookupError, OSError):
            self._pidfd = os.pidfd_open(pid) if pid > 0 else None

    def wait(self, timeout_s: float | None) -> bool:
        """Whether it has ended within the time."""
        if self._pidfd is not None:
            return ended(self._pidfd, timeout_s)
        self._client.socket.settimeout(timeout_s)
        try:
            while self._client.receive() is not None:
                pass
        except TimeOutError:
            return False
        return True

    def close(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
