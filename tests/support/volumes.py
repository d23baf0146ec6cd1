"""A volume of files in a folder of its own, run through the commands that an administrator uses.

Nothing here imports the product: `dmctl` is a program, its JSON the interface, and the control
socket is spoken to line by line.  `Volume.destroy` kills the daemon whatever state it is in, so a
failing test leaves no process behind.

What has an event is waited for as one (`Events`); a figure that has none is asked for again and
again (`Volume.until`), with the end of the daemon as an event that ends the waiting.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support import rawnbd
from tests.support.rawnbd import RawNbd

KIB = 1 << 10
MIB = 1 << 20
WAIT_S = 120.0
POLL_MS = 50
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


def wait_gone(pid: int, timeout_s: float = 60) -> None:
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


def noise(seed: int, length_bytes: int) -> bytes:
    return random.Random(seed).randbytes(length_bytes)


class Control:
    """One connection to a control socket."""

    def __init__(self, path: Path, timeout_s: float = WAIT_S) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout_s)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")

    def __enter__(self) -> Control:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._lines.close()
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, verb: str, **args: Any) -> None:
        self._socket.sendall(json.dumps({"verb": verb, "args": args}).encode() + b"\n")

    def line(self, timeout_s: float = WAIT_S) -> dict[str, Any]:
        """The next message; TimeoutError, or ConnectionError at the end of the daemon."""
        self._socket.settimeout(max(timeout_s, 0.001))
        line = self._lines.readline()
        if not line:
            raise ConnectionError("the daemon closed its control socket")
        return dict(json.loads(line))

    def call(self, verb: str, **args: Any) -> Any:
        self.send(verb, **args)
        while True:
            answer = self.line()
            if "error" in answer:
                raise CommandFailed(f"{verb}: {answer['error']}")
            if "result" in answer:
                return answer["result"]


class Events:
    """What a running volume has told since its start, and what it tells from now on."""

    def __init__(self, control: Control) -> None:
        self.seen: list[dict[str, Any]] = []
        self._control = control
        control.send("events", now=False)

    def wait(self, name: str, timeout_s: float = WAIT_S, **fields: Any) -> dict[str, Any]:
        """The next event of that name with those fields; each is returned once, in order."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                event = self._control.line(deadline_s - time.monotonic())["event"]
            except (TimeoutError, ConnectionError) as error:
                told = [entry["event"] for entry in self.seen]
                raise AssertionError(f"no event {name} {fields}; there were {told}") from error
            self.seen.append(event)
            if event["event"] == name and fields.items() <= event.items():
                return dict(event)


@dataclass
class Volume:
    """`folder` must have a short path: unix sockets live in it.

    `media` puts another file or device in the place of `primary`, `secondary` or `record`;
    `secondary_target` is what the volume is told, where `secondary` is what a server has behind it.
    """

    folder: Path
    size_bytes: int = 64 * MIB
    name: str = "vol0"
    options: list[str] = field(default_factory=list)
    secondary_target: str | None = None
    media_folder: Path | None = None
    media: dict[str, Path | str] = field(default_factory=dict)
    program: Path = DMCTL

    def __post_init__(self) -> None:
        folder = self.media_folder or self.folder
        self.primary, self.secondary, self.record = (
            Path(self.media.get(role, folder / f"{self.name}.{role}"))
            for role in ("primary", "secondary", "record")
        )
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
        command = [str(self.program), "--config-dir", str(self.folder / "etc")]
        command += ["--run-dir", str(self.folder / "run"), *arguments]
        return run(command, timeout_s, check)

    def refused(self, *arguments: str) -> dict[str, Any]:
        """The `error` object of a command that has to fail; its exit status is the one it names."""
        done = self.dmctl_process("--json", *arguments)
        if not done.returncode:
            raise CommandFailed(f"{arguments} succeeded: {done.stdout}")
        error = dict(json.loads(done.stdout)["error"])
        assert error["exit_status"] == done.returncode, error
        return error

    def dmctl_process(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.program), "--config-dir", str(self.folder / "etc")]
        return subprocess.run(
            [*command, "--run-dir", str(self.folder / "run"), *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            stdin=subprocess.DEVNULL,
        )

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
        self.dmctl(*self.create_command(*more))

    def create_command(self, *more: str) -> list[str]:
        return [
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
        ]

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

    # -- the control socket ---------------------------------------------------------------
    def control(self, timeout_s: float = WAIT_S) -> Control:
        return Control(self.folder / "run" / f"{self.name}.ctl", timeout_s)

    def ask(self, verb: str, **args: Any) -> Any:
        with self.control() as control:
            return control.call(verb, **args)

    @contextlib.contextmanager
    def events(self) -> Iterator[Events]:
        with self.control() as control:
            yield Events(control)

    def last_words(self) -> str:
        """What the last process said when it ended by a mistake."""
        path = self.folder / "run" / f"{self.name}.err"
        return path.read_text() if path.exists() else ""

    def until(
        self, reached: Callable[[dict[str, Any]], bool], timeout_s: float = WAIT_S
    ) -> dict[str, Any]:
        """The first status that satisfies `reached`."""
        deadline_s = time.monotonic() + timeout_s
        pidfd = os.pidfd_open(self.pid)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            with self.control() as control:
                while True:
                    figures = control.call("status")
                    if reached(figures):
                        return dict(figures)
                    if time.monotonic() > deadline_s:
                        raise AssertionError(f"not reached in {timeout_s} s: {figures}")
                    if poll.poll(POLL_MS):
                        raise ConnectionError
        except ConnectionError:
            raise AssertionError(f"the daemon has ended: {self.last_words()}") from None
        finally:
            os.close(pidfd)

    # -- data -----------------------------------------------------------------------------
    def host(self, timeout_s: float = WAIT_S) -> RawNbd:
        """A host that is connected to the export."""
        return RawNbd(self.socket, self.name, timeout_s)

    def write(self, offset_bytes: int, data: bytes) -> None:
        """As a host, a MiB at a time, acknowledged and flushed."""
        with self.host() as host:
            for at in range(0, len(data), MIB):
                piece = data[at : at + MIB]
                host.call(rawnbd.WRITE, offset_bytes + at, len(piece), piece)
            host.call(rawnbd.FLUSH)
            host.disconnect()

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        with self.host() as host:
            data = host.call(rawnbd.READ, offset_bytes, length_bytes)
            host.disconnect()
        return data

    def recorded(self) -> set[int]:
        """Extents in the stored record, read from its medium."""
        dump = json.loads(self.dmctl("--json", "record", "dump", str(self.record)))
        return {
            extent
            for first, count in dump["extents"]["runs"]
            for extent in range(first, first + count)
        }

    def differing(self) -> set[int]:
        """Extents in which primary and secondary differ."""
        found = set()
        with (
            self.primary.open("rb", buffering=0) as mine,
            self.secondary.open("rb", buffering=0) as theirs,
        ):
            for extent in range(-(-self.size_bytes // MIB)):
                offset, length = extent * MIB, min(MIB, self.size_bytes - extent * MIB)
                if os.pread(mine.fileno(), length, offset) != os.pread(
                    theirs.fileno(), length, offset
                ):
                    found.add(extent)
        return found

    # -- life -----------------------------------------------------------------------------
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
