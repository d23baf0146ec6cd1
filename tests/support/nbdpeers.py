"""Foreign NBD servers, and a way to drive an `NbdTarget` from a test.

A server listens on a unix socket of its own, or on a TCP port of the loopback interface that the
test has bound for it (systemd's socket activation, so that no port can be lost to somebody else).
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bitmapd.media.base import Done
from bitmapd.media.buffers import aligned
from bitmapd.nbd.client.target import NbdTarget
from bitmapd.net.uri import NbdUri
from tests.support.needs import need

WAIT_S = 60.0
KIB = 1 << 10
MIB = 1 << 20

# Makes the listening socket descriptor 3, and tells the server that it is meant for this process.
_ACTIVATE = 'export LISTEN_PID=$$ LISTEN_FDS=1; fd=$1; shift; exec "$@" 3<&"$fd"'


@contextmanager
def short_folder() -> Iterator[Path]:
    """A folder whose path leaves room for the name of a unix socket."""
    path = Path(tempfile.mkdtemp(prefix="nbdc"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


class Peer:
    """A server process.  `unix_options` come first; `{path}` in them is that of its socket."""

    def __init__(self, folder: Path, command: list[str], unix_options: list[str], tcp: bool):
        need(command[0])
        self.path = str(folder / "nbd.sock")
        self._log = folder / "server.log"
        self._listener: socket.socket | None = None
        self._command = command
        self._unix_options = [word.replace("{path}", self.path) for word in unix_options]
        if tcp:
            self._listener = socket.create_server(("127.0.0.1", 0))
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        if self._listener is None:
            raise RuntimeError("this server listens on a unix socket")
        return int(self._listener.getsockname()[1])

    def uri(self, export: str = "", **fields: object) -> NbdUri:
        if self._listener is None:
            return NbdUri(
                bool(fields.pop("tls", False)),
                export,
                socket_path=self.path,
                **fields,  # type: ignore[arg-type]
            )
        fields.setdefault("host", "127.0.0.1")
        tls = bool(fields.pop("tls", False))
        return NbdUri(tls, export, port=self.port, **fields)  # type: ignore[arg-type]

    def start(self) -> None:
        program, *arguments = self._command
        with open(self._log, "ab") as log:
            if self._listener is not None:
                fd = self._listener.fileno()
                activated = ["bash", "-c", _ACTIVATE, "bash", str(fd), program, *arguments]
                self.process = subprocess.Popen(activated, pass_fds=(fd,), stderr=log, stdout=log)
                return
            Path(self.path).unlink(missing_ok=True)
            command = [program, *self._unix_options, *arguments]
            self.process = subprocess.Popen(command, stderr=log, stdout=log)
        deadline = time.monotonic() + WAIT_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command} did not start: {self._log.read_text()}")
            time.sleep(0.01)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(self.path) == 0

    def signal(self, number: signal.Signals) -> None:
        if self.process is None:
            raise RuntimeError("the server does not run")
        self.process.send_signal(number)

    def stop(self) -> None:
        """SIGSTOP, and wait until it stands still: until the one thread that gets the signal has
        run, which takes a while on a busy machine, the others go on."""
        self.signal(signal.SIGSTOP)
        if self.process is not None:
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        self.kill()
        if self._listener is not None:
            self._listener.close()


@contextmanager
def nbdkit(folder: Path, *arguments: object, tcp: bool = False) -> Iterator[Peer]:
    # With socket activation nbdkit stays in the foreground by itself.
    options = [] if tcp else ["-f"]
    peer = Peer(folder, ["nbdkit", *options, *map(str, arguments)], ["-U", "{path}"], tcp)
    try:
        peer.start()
        yield peer
    finally:
        peer.close()


@contextmanager
def qemu_nbd(folder: Path, *arguments: object, tcp: bool = False) -> Iterator[Peer]:
    command = ["qemu-nbd", "--persistent", "--format=raw", *map(str, arguments)]
    peer = Peer(folder, command, ["-k", "{path}"], tcp)
    try:
        peer.start()
        yield peer
    finally:
        peer.close()


@contextmanager
def qemu_storage_daemon(folder: Path, file: Path) -> Iterator[Peer]:
    command = [
        "qemu-storage-daemon",
        *(
            "--blockdev",
            f"driver=file,node-name=disk,filename={file},cache.direct=on,discard=unmap",
        ),
        *("--export", "type=nbd,id=export,node-name=disk,name=disk,writable=on"),
    ]
    peer = Peer(folder, command, ["--nbd-server", "addr.type=unix,addr.path={path}"], tcp=False)
    try:
        peer.start()
        yield peer
    finally:
        peer.close()


_NBD_SERVER = """\
[generic]
    unixsock = {socket}
[disk]
    exportname = {file}
    filesize = {size}
    flush = true
    fua = true
    trim = true
"""


@contextmanager
def nbd_server(folder: Path, file: Path) -> Iterator[str]:
    """The NBD project's own; the path of its socket.  It becomes a daemon once it listens."""
    need("nbd-server")
    path, pid_file, config = (str(folder / name) for name in ("s.sock", "s.pid", "s.config"))
    text = _NBD_SERVER.format(socket=path, file=file, size=file.stat().st_size)
    Path(config).write_text(text)
    subprocess.run(["nbd-server", "-C", config, "-p", pid_file], check=True, timeout=WAIT_S)
    deadline = time.monotonic() + WAIT_S
    while not (Path(pid_file).exists() and (text := Path(pid_file).read_text().strip())):
        if time.monotonic() > deadline:
            raise RuntimeError("nbd-server did not start")
        time.sleep(0.01)
    try:
        yield path
    finally:
        os.kill(int(text), signal.SIGTERM)


# -- driving a target ---------------------------------------------------------------------
async def completion(submit: Callable[[Done], None]) -> OSError | None:
    """What an operation ended with.  Fails if `done` is called twice, or inside `submit`."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[OSError | None] = loop.create_future()
    submitted = False

    def done(error: OSError | None) -> None:
        if not submitted:
            raise RuntimeError("done was called from inside the submitting call")
        future.set_result(error)

    submit(done)
    submitted = True
    return await asyncio.wait_for(future, WAIT_S)


async def succeed(submit: Callable[[Done], None]) -> None:
    error = await completion(submit)
    if error is not None:
        raise error


async def fail(number: int, submit: Callable[[Done], None]) -> str:
    """The text of an error that has to have this number."""
    error = await completion(submit)
    if error is None:
        raise AssertionError(f"succeeded where {errno.errorcode[number]} was expected")
    assert error.errno == number, error
    return str(error.strerror)


async def opened(uri: NbdUri, **options: object) -> NbdTarget:
    target = NbdTarget(asyncio.get_running_loop(), uri, **options)  # type: ignore[arg-type]
    await succeed(target.open)
    return target


async def reopen(target: NbdTarget) -> None:
    """Open again as the copier does: until it works."""
    async with asyncio.timeout(WAIT_S):
        while await completion(target.open) is not None:
            await asyncio.sleep(0.05)


async def write(target: NbdTarget, offset_bytes: int, data: bytes, *, fua: bool = False) -> None:
    buffer = aligned(len(data))
    buffer[:] = data
    await succeed(lambda done: target.write(offset_bytes, buffer, done, fua))


async def read(target: NbdTarget, offset_bytes: int, length_bytes: int) -> bytes:
    buffer = aligned(length_bytes)
    await succeed(lambda done: target.read(offset_bytes, buffer, done))
    return bytes(buffer)


async def allocation(
    target: NbdTarget, offset_bytes: int, length_bytes: int
) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []

    def submit(done: Done) -> None:
        def told(error: OSError | None, pieces: list[tuple[int, int]]) -> None:
            found.extend(pieces)
            done(error)

        target.allocation(offset_bytes, length_bytes, told)

    await succeed(submit)
    return found


async def exercise(
    target: NbdTarget, operations: int = 300, depth: int = 16, seed: int = 1
) -> bytes:
    """Random operations, many at a time but never two on one place, checked against a model.

    Returns what the whole export must hold at the end, everything flushed.
    """
    rng = random.Random(seed)
    block, size = target.block_size_bytes, target.size_bytes
    model = bytearray(await read_all(target))
    busy: list[tuple[int, int]] = []

    def place(most_bytes: int) -> tuple[int, int] | None:
        length = block * rng.randint(1, max(1, min(most_bytes, size) // block))
        offset = block * rng.randint(0, (size - length) // block)
        if any(offset < stop and start < offset + length for start, stop in busy):
            return None
        return offset, length

    async def one() -> None:
        kind = rng.choice(["read", "read", "write", "write", "zero", "trim", "flush"])
        if kind == "flush":
            await succeed(target.flush)
            return
        chosen = place(rng.choice([block, 64 * KIB, 2 * MIB]))
        if chosen is None:
            return
        offset, length = chosen
        stop = offset + length
        busy.append((offset, stop))
        if kind == "read":
            assert await read(target, offset, length) == model[offset:stop]
        elif kind == "write":
            data = rng.randbytes(length)
            await write(target, offset, data, fua=rng.random() < 0.2)
            model[offset:stop] = data
        elif kind == "zero":
            options = {"fua": rng.random() < 0.2, "unmap": rng.random() < 0.5}
            await succeed(lambda done: target.zero(offset, length, done, **options))
            model[offset:stop] = bytes(length)
        else:
            await succeed(lambda done: target.trim(offset, length, done, fua=True))
            await write(target, offset, bytes([7]) * length)
            model[offset:stop] = bytes([7]) * length
        busy.remove((offset, stop))

    async def worker() -> None:
        for _ in range(operations // depth):
            await one()

    async with asyncio.TaskGroup() as group:
        for _ in range(depth):
            group.create_task(worker())
    await succeed(target.flush)
    assert await read_all(target) == model
    return bytes(model)


async def read_all(target: NbdTarget) -> bytes:
    pieces = [
        await read(target, at, min(MIB, target.size_bytes - at))
        for at in range(0, target.size_bytes, MIB)
    ]
    return b"".join(pieces)


def image(path: Path, size_bytes: int, seed: int | None = None) -> Path:
    """A file of zeros, or of data that a seed gives."""
    with open(path, "wb") as file:
        if seed is None:
            file.truncate(size_bytes)
        else:
            file.write(random.Random(seed).randbytes(size_bytes))
    return path


def descriptors() -> int:
    """How many files this process has open, to find leaks."""
    return len(os.listdir("/proc/self/fd"))
