"""The servers that are compared, each over a file of its own in the same folder.

`bitmapd` runs as a mirrored volume with primary, secondary and record beside one another; the
others are what Debian ships.  A server is idle while another one is measured.
"""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.volumes import Volume

START_TIMEOUT_S = 20


@dataclass(frozen=True, slots=True)
class Server:
    """`volume` is set for bitmapd only; `direct` says whether it bypasses the page cache."""

    name: str
    uri: str
    direct: bool
    volume: Volume | None = None
    pid: int = 0  # of those that have no volume


def wait_listening(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Return once something accepts connections on the unix socket."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            said = Path(f"{path}.log").read_text(errors="replace")
            raise RuntimeError(f"{process.args!r} ended at once; said: {said.strip()}")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
                return
            except (FileNotFoundError, ConnectionRefusedError):
                # Foreign programs announce nothing: looking again is the only way.
                time.sleep(0.02)
    raise TimeoutError(f"{process.args!r} did not listen within {START_TIMEOUT_S} s")


@contextmanager
def _running(command: list[str], path: Path) -> Iterator[int]:
    with Path(f"{path}.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        wait_listening(path, process)
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        path.unlink(missing_ok=True)


@contextmanager
def nbdkit_file(backing: Path, sockets: Path, name: str = "nbdkit") -> Iterator[Server]:
    path = sockets / f"{name}.sock"
    with _running(["nbdkit", "--foreground", "-U", str(path), "file", str(backing)], path) as pid:
        yield Server(name, f"nbd+unix:///?socket={path}", direct=False, pid=pid)


@contextmanager
def qemu_nbd(backing: Path, sockets: Path, direct: bool) -> Iterator[Server]:
    """`direct`: cache=none and kernel AIO, as bitmapd works; else the defaults."""
    name = "qemu-nbd direct" if direct else "qemu-nbd"
    path = sockets / f"{name.replace(' ', '-')}.sock"
    command = ["qemu-nbd", "--persistent", "--format=raw", "--shared=8", f"--socket={path}"]
    if direct:
        command += ["--cache=none", "--aio=native"]
    with _running([*command, str(backing)], path):
        yield Server(name, f"nbd+unix:///?socket={path}", direct=direct)


@contextmanager
def bitmapd(
    media: Path,
    state: Path,
    size_bytes: int,
    name: str = "bench",
    options: tuple[str, ...] = (),
    *,
    secondary: Path,
) -> Iterator[Server]:
    """A started volume whose primary and secondary are empty and known to be equal."""
    said = ["--initial-sync", "skip", *options]
    with Volume(state, size_bytes, name, said, str(secondary), media) as volume:
        volume.create()
        volume.start()
        yield Server("bitmapd", volume.uri, direct=True, volume=volume)
        volume.stop("--now")
