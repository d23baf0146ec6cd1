"""The servers that are compared, each over a file of its own in the same folder.

`bitmapd` runs as a mirrored volume with primary, secondary and record beside one another; the
others are what Debian ships.  A server is idle while another one is measured.
"""

from __future__ import annotations

import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.volumes import DMCTL, Volume

START_TIMEOUT_S = 20
INTERPRETED, COMPILED = "bitmapd", "bitmapd compiled"


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


def compiled_program(folder: Path, tree: Path) -> Path:
    """A dmctl that runs what is in that tree, and so does all that it starts."""
    path = folder / "dmctl-compiled"
    path.write_text(
        f"#!/bin/sh\nexport PYTHONPATH={tree.resolve()} PYTHONSAFEPATH=1\n"
        f'exec {sys.executable} -m dmctl "$@"\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def programs(folder: Path, tree: Path | None) -> dict[str, Path]:
    """By the name under which its figures go: dmctl as it is, and as in a tree where the modules
    that requests pass through are compiled."""
    found = {INTERPRETED: DMCTL}
    if tree is not None:
        found[COMPILED] = compiled_program(folder, tree)
    return found


@contextmanager
def bitmapd(
    media: Path,
    state: Path,
    size_bytes: int,
    name: str = "bench",
    options: tuple[str, ...] = (),
    *,
    secondary: Path,
    kind: str = INTERPRETED,
    program: Path = DMCTL,
) -> Iterator[Server]:
    """A started volume whose primary and secondary are empty and known to be equal; `kind`: one of
    those of `programs`."""
    said = ["--initial-sync", "skip", *options]
    with Volume(state, size_bytes, name, said, str(secondary), media, program=program) as volume:
        volume.create()
        volume.start()
        check_kind(volume, kind)
        yield Server(kind, volume.uri, direct=True, volume=volume)
        volume.stop("--now")


def check_kind(volume: Volume, kind: str) -> None:
    """So that nothing is measured under a wrong name."""
    if volume.ask("ping")["compiled"] != (kind == COMPILED):
        raise RuntimeError(f"volume '{volume.name}' is not what it should be: {kind}")
