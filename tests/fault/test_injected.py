"""One failure anywhere: the daemon goes on, or it ends as by a crash.  Nothing in between.

A small volume is started, written to, copied, flushed and stopped, and one call of one effect
fails: a system call, an allocation, a thread, a timer, a completion.  Then one of two things must
hold.  Either every request is answered and the stop works, or the process ends by itself within a
bound and says why.  In both cases what was acknowledged is on the primary, and after another start
both sides are equal and the record is empty.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bitmapd.control.client import ControlClient
from bitmapd.errors import BitmapdError
from bitmapd.record.geometry import KIB, MIB
from tests.support.injected import WAIT_S, Daemon, Forge
from tests.support.local import LocalVolume
from tests.support.rawnbd import FLUSH, FUA, READ, TRIM, WRITE, WRITE_ZEROES, RawNbd

BLOCK = 64 * KIB
# The first calls one by one, then ever larger steps.
DENSE = 10
STEP = 1.4

RESOURCES = [
    ("io_submit", "EAGAIN"),
    ("aligned", "ENOMEM"),
    ("aligned", "MemoryError"),
    ("thread", "RuntimeError"),
    ("os.open", "EMFILE"),
    ("socket.accept", "EMFILE"),
    ("pool.take", "MemoryError"),
]
MEDIA = [
    *((f"os.{name}", "EIO") for name in ("preadv", "pwritev", "fdatasync", "fsync")),
    *((f"os.{name}", "ENOMEM") for name in ("fstat", "lseek", "rename")),
    ("os.preadv", "MemoryError"),
    ("ioctl", "EIO"),
    ("short", ""),
]
LOOP = [
    *((f"loop.{name}", "MemoryError") for name in ("call_soon", "call_later", "call_at")),
    ("loop.create_task", "MemoryError"),
    ("loop.add_reader", "ENOMEM"),
    ("completion", "KeyError"),
    ("completion", "MemoryError"),
    ("os.eventfd_write", "KeyError"),
]
SOCKETS = [
    *((f"socket.{name}", "ENOMEM") for name in ("sendmsg", "recv_into", "send", "recv")),
    ("socket.recv_into", "MemoryError"),
]


@pytest.fixture(scope="module")
def forge() -> Iterator[Forge]:
    forge = Forge()
    yield forge
    forge.close()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("effect", "error"),
    [*RESOURCES, *MEDIA, *LOOP, *SOCKETS],
    ids=lambda value: value or "half",
)
def test_one_failure_anywhere(
    tmp_path: Path, short_path: Path, forge: Forge, effect: str, error: str
) -> None:
    hits = 0
    for nth in calls():
        folder = tmp_path / str(nth)
        folder.mkdir()
        run_dir = short_path / str(nth)
        run_dir.mkdir()
        run = Run(LocalVolume(folder, run_dir), forge)
        try:
            if not run.with_failure(effect, error, nth):
                break
        except Exception as problem:
            raise AssertionError(f"call {nth} of {effect}: {problem}\n{run.log()}") from problem
        hits += 1
        for file in folder.iterdir():
            if file.is_file():
                file.unlink()
    assert hits, "the effect is used"


def calls() -> Iterator[int]:
    nth = 1
    while True:
        yield nth
        nth = nth + 1 if nth < DENSE else int(nth * STEP)


class Run:
    """One volume, from the start in which something fails to the one that mends it."""

    def __init__(self, local: LocalVolume, forge: Forge) -> None:
        self._local = local
        self._forge = forge
        self._log = local.paths.run_dir / "log"
        self._manager = socket.socket()  # in place of the service manager
        # What the primary may hold: of each block the fills that it may have.
        self._may: dict[int, set[bytes]] = {}

    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def with_failure(self, effect: str, error: str, nth: int) -> bool:
        """Whether there was such a call at all."""
        hit = self._local.paths.run_dir / "hit"
        daemon = self._start(effect=effect, error=error, nth=nth, hit=str(hit))
        try:
            if daemon is not None:
                self._work(daemon)
                self._stop(daemon)
        finally:
            self._manager.close()
            if daemon is not None and daemon.alive:
                daemon.send(signal.SIGKILL)
                daemon.ended()
        self._check_acknowledged()
        again = self._start()
        assert again is not None, "the next start works"
        self._control(again, "wait", **{"for": "in-sync"})
        assert self._control(again, "stop")["clean"] is True
        assert again.ended() == 0
        self._check_acknowledged()
        assert self._local.differing() == set()
        assert self._local.recorded() == set()
        return hit.exists()

    def _start(self, **failure: Any) -> Daemon | None:
        """None if it ended with an error that it tells, instead of starting."""
        paths = self._local.paths
        address = paths.run_dir / "notify"
        address.unlink(missing_ok=True)
        self._manager.close()
        self._manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._manager.bind(str(address))
        folders = ["--config-dir", str(paths.config_dir), "--run-dir", str(paths.run_dir)]
        daemon = self._forge.start(
            [self._local.name, *folders, "--foreground"],
            environment={"NOTIFY_SOCKET": str(address)},
            log=str(self._log),
            **failure,
        )
        if not daemon.ends_before(self._manager):
            return daemon
        self._check_told(daemon)
        return None

    def _check_told(self, daemon: Daemon) -> None:
        """A process that ended other than by a clean stop has said why."""
        status = daemon.ended()
        assert status > 0, f"status {status}"
        if not self._local.paths.error_file(self._local.name).exists():
            assert "injected" in self.log()  # what failed was the writing of that file
            return
        error = json.loads(self._local.paths.error_file(self._local.name).read_text())
        assert error["exit_status"] == status
        assert error["message"]

    def _work(self, daemon: Daemon) -> None:
        """As a host: each request is answered, or the process ends."""
        socket_path = self._local.paths.nbd_socket(self._local.name)
        give_up_s = time.monotonic() + WAIT_S
        while time.monotonic() < give_up_s:
            try:
                with RawNbd(socket_path, self._local.name, WAIT_S) as host:
                    self._requests(host)
                    return
            except TimeoutError as error:
                raise AssertionError("a request without an answer") from error
            except OSError:
                # It is about to end, or a client whose connection breaks comes back.
                if daemon.ends_within(0.2):
                    return
        raise AssertionError("hosts are not served")

    def _requests(self, host: RawNbd) -> None:
        for block, fill in ((0, b"a"), (1, b"b"), (17, b"c"), (40, b"d")):
            self._change(host, block, fill, WRITE, fill * BLOCK, FUA if fill == b"b" else 0)
        self._call(host, FLUSH)
        self._change(host, 1, b"\0", WRITE_ZEROES)
        self._call(host, TRIM, 100 * BLOCK, BLOCK)
        self._may[100] = set()
        self._call(host, READ, 40 * BLOCK, BLOCK)
        self._change(host, 0, b"e", WRITE, b"e" * BLOCK)
        self._call(host, FLUSH)

    def _change(
        self, host: RawNbd, block: int, fill: bytes, command: int, data: bytes = b"", flags: int = 0
    ) -> None:
        before = self._may.get(block, {self._block(block)})
        self._may[block] = before | {fill}
        if self._call(host, command, block * BLOCK, BLOCK, data, flags):
            self._may[block] = {fill}

    def _call(self, host: RawNbd, *request: Any) -> bool:
        """Whether it succeeded; ConnectionError if the connection ended."""
        host.submit(*request)
        return host.reply().error == 0

    def _block(self, block: int) -> bytes:
        with self._local.primary.open("rb") as file:
            return os.pread(file.fileno(), BLOCK, block * BLOCK)

    def _check_acknowledged(self) -> None:
        for block, may in self._may.items():
            if may:
                wholes = {fill * BLOCK if len(fill) == 1 else fill for fill in may}
                found = self._block(block)
                # A write without an answer may have been carried out in part.
                assert found in wholes or len(may) > 1, f"block {block} holds {found[:8]!r}"

    def _stop(self, daemon: Daemon) -> None:
        try:
            self._control(daemon, "wait", **{"for": "in-sync"})
            self._control(daemon, "stop")
        except (BitmapdError, OSError):
            if not daemon.ends_within(0.2):
                daemon.send(signal.SIGTERM)
        # The signal may meet a process that is past hearing it, on its way out.
        if daemon.ended() not in (0, -signal.SIGTERM):
            self._check_told(daemon)

    def _control(self, daemon: Daemon, verb: str, **arguments: Any) -> Any:
        name = self._local.name
        with ControlClient(self._local.paths.control_socket(name), name) as client:
            return client.call(verb, arguments, timeout_s=WAIT_S)


def test_the_size_is_that_of_the_blocks() -> None:
    assert 101 * BLOCK < 8 * MIB
