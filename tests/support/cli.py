"""Running dmctl in tests, in a place of its own, and leaving no process behind.

`Cli.run` starts a real process; `Cli.call` runs `main` in this one, which is quicker and counts for
coverage.  Sockets live in a folder with a short name, because pytest's own can be too long for
them.  Clean-up kills a process only if its command line names that folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from bitmapd.config import Paths
from bitmapd.control.server import ControlServer, Handler
from dmctl.cli.main import main

TIMEOUT_S = 60.0
MIB = 1 << 20

STATUS_KEYS = {
    "name": str,
    "uuid": str,
    "attach": str,
    "state": str,
    "device": str,
    "primary": str,
    "secondary": str,
    "record": str,
    "size_bytes": int | None,
    "extent_size_bytes": int,
    "block_size_bytes": int,
    "dirty_bytes": int | None,
    "lag_seconds": float | None,
    "record_bytes": int | None,
    "record_extents": int | None,
    "record_limit_bytes": int | None,
    "writes_total": int | None,
    "hits_total": int | None,
    "misses_total": int | None,
    "record_updates_total": int | None,
    "record_clears_total": int | None,
    "copied_bytes_total": int | None,
    "era": int | None,
    "resync": dict | None,
    "last_recovery": dict | None,
    "last_error": dict | None,
}


def check_status(volume: Mapping[str, Any]) -> None:
    """That one element of `volumes` has every key of the contract, with its type."""
    for key, kind in STATUS_KEYS.items():
        assert key in volume, f"status has no {key}"
        assert isinstance(volume[key], kind), f"{key} is {volume[key]!r}"


@dataclass(frozen=True, slots=True)
class Outcome:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Cli:
    """One configuration folder, one run folder, and media in `folder`."""

    def __init__(self, folder: Path, run_dir: Path) -> None:
        self.folder = folder
        self.paths = Paths(folder / "etc", run_dir)

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "DMCTL_CONFIG_DIR": str(self.paths.config_dir),
            "DMCTL_RUN_DIR": str(self.paths.run_dir),
            "NO_COLOR": "1",
        }

    def popen(self, *words: str, **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-m", "dmctl", *words]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return subprocess.Popen(
            command, env=self._environment(), stdin=subprocess.DEVNULL, text=True, **options
        )

    def run(self, *words: str) -> Outcome:
        with self.popen(*words) as process:
            try:
                out, err = process.communicate(timeout=TIMEOUT_S)
            finally:
                process.kill()
        return Outcome(process.returncode, out, err)

    def call(self, *words: str, answer: str | None = None) -> Outcome:
        """`answer` is typed at a terminal; without it there is none."""
        out, err, typed = io.StringIO(), io.StringIO(), io.StringIO(answer or "")
        if answer is not None:
            typed.isatty = lambda: True  # type: ignore[method-assign]
        with (
            patch.dict(os.environ, self._environment(), clear=True),
            patch("sys.stdin", typed),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                status = main(words)
            except SystemExit as ended:
                status = int(ended.code or 0)
        return Outcome(status, out.getvalue(), err.getvalue())

    def ok(self, *words: str) -> Outcome:
        outcome = self.call(*words)
        assert outcome.status == 0, outcome
        return outcome

    def medium(self, name: str, size_bytes: int = 8 * MIB) -> str:
        """A file with content that differs from place to place."""
        path = self.folder / name
        with path.open("wb") as stream:
            for number in range(0, size_bytes, 65536):
                stream.write(f"{name} {number}".encode())
                stream.seek(min(number + 65536, size_bytes))
            stream.truncate(size_bytes)
        return str(path)

    def create(self, name: str = "vol0", *options: str, size_bytes: int = 8 * MIB) -> Outcome:
        """A volume on files of its own; `options` come after the others."""
        return self.call(
            *("create", name, "--primary", self.medium(f"{name}.primary", size_bytes)),
            *("--secondary", self.medium(f"{name}.secondary", size_bytes)),
            *("--record", self.medium(f"{name}.record", MIB), *options),
        )

    def status(self, name: str = "vol0") -> dict[str, Any]:
        volume: dict[str, Any] = self.ok("status", name, "--json").json["volumes"][0]
        check_status(volume)
        return volume

    def pid(self, name: str = "vol0") -> int:
        return int(self.paths.pid_file(name).read_text())

    def kill(self, name: str = "vol0") -> None:
        """SIGKILL to the volume's bitmapd, and wait for its end."""
        with _pidfd(self.pid(name)) as pidfd:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            _await_end(pidfd)

    def as_host(self, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Have this configuration be the host's, in an /etc of our own, which is returned; udev
        does not run."""
        etc = self.folder / "host"
        (etc / "udev").mkdir(parents=True)
        monkeypatch.setattr("dmctl.kernel.systemd.ETC", etc)
        monkeypatch.setattr("dmctl.kernel.systemd.update.__kwdefaults__", {"etc": etc})
        monkeypatch.setattr("dmctl.kernel.systemd.is_host.__defaults__", (etc,))
        monkeypatch.setattr("dmctl.kernel.systemd.UDEV_RUNS", etc / "no-udev")
        self.paths = Paths(etc / "dmctl", self.paths.run_dir)
        return etc

    def clean_up(self) -> None:
        for pid in self._processes():
            with contextlib.suppress(ProcessLookupError), _pidfd(pid) as pidfd:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                _await_end(pidfd)
        shutil.rmtree(self.paths.run_dir, ignore_errors=True)

    def _processes(self) -> list[int]:
        """Processes whose command line names our run folder."""
        mark = os.fsencode(self.paths.run_dir)
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if mark in (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
        return found


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        os.close(fd)


def _await_end(pidfd: int) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(10_000), "a killed process does not end"


@contextlib.contextmanager
def new_cli(folder: Path) -> Iterator[Cli]:
    cli = Cli(folder, Path(tempfile.mkdtemp(prefix="dmctl-")))
    try:
        yield cli
    finally:
        cli.clean_up()


@contextlib.contextmanager
def control_thread(path: Path, handlers: Mapping[str, Handler]) -> Iterator[None]:
    """A control socket with these verbs, for states that a real volume is hard to bring into."""
    path.parent.mkdir(exist_ok=True)
    ready, end = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        server = ControlServer(path, handlers)
        await server.start()
        ready.set()
        await end.wait()
        await server.close(0.1)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(10)
        yield
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(10)
        loop.close()
