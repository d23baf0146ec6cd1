"""bitmapd with one effect that fails once, at a call that the test names.

`Forge` is a process that has imported bitmapd and forks a daemon for each run, which saves the
imports: a test makes hundreds of them.  In the fork the effect is wrapped, and the n-th call
raises, or answers short; everything else is the real thing.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import bitmapd.daemon
from bitmapd.media import aio, buffers

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 60.0

ERRORS: dict[str, Callable[[], BaseException]] = {
    "EIO": lambda: OSError(errno.EIO, "injected"),
    "ENOMEM": lambda: OSError(errno.ENOMEM, "injected"),
    "EMFILE": lambda: OSError(errno.EMFILE, "injected"),
    "MemoryError": MemoryError,
    "RuntimeError": lambda: RuntimeError("can't start new thread: injected"),
    "KeyError": lambda: KeyError("injected"),
}

# Where a name is looked up when it is called; of a loop, the class that has it.
PLACES: dict[str, tuple[Any, str]] = {
    **{
        f"os.{name}": (os, name)
        for name in ("open", "preadv", "pwritev", "fdatasync", "fsync", "fstat", "lseek", "rename")
    },
    "os.eventfd_write": (os, "eventfd_write"),
    "ioctl": (sys.modules["fcntl"], "ioctl"),
    "thread": (threading.Thread, "start"),
    **{f"loop.{name}": (asyncio.BaseEventLoop, name) for name in ("call_later", "call_at")},
    **{f"loop.{name}": (asyncio.BaseEventLoop, name) for name in ("call_soon", "create_task")},
    "loop.add_reader": (asyncio.SelectorEventLoop, "add_reader"),
    **{f"socket.{name}": (socket.socket, name) for name in ("accept", "sendmsg", "recv_into")},
    **{f"socket.{name}": (socket.socket, name) for name in ("send", "recv")},
    "pool.take": (buffers.BufferPool, "take"),
}


class _Trigger:
    """Counts calls; true at the one that is to fail, of which `hit` is left as a sign."""

    def __init__(self, nth: int, hit: str) -> None:
        self._nth = nth
        self._hit = hit
        self._count = 0

    def __call__(self) -> bool:
        self._count += 1
        if self._count != self._nth:
            return False
        Path(self._hit).touch()
        return True


def inject(effect: str, error: str, trigger: _Trigger) -> None:
    if effect == "io_submit":
        _refuse_submissions(trigger)
    elif effect in ("completion", "short"):
        _bend_completions(effect, error, trigger)
    elif effect == "aligned":
        really = buffers.aligned
        for module in list(sys.modules.values()):
            if getattr(module, "aligned", None) is really:
                module.aligned = _failing(really, error, trigger)  # type: ignore[attr-defined]
    else:
        owner, name = PLACES[effect]
        setattr(owner, name, _failing(getattr(owner, name), error, trigger))


def _failing(really: Callable[..., Any], error: str, trigger: _Trigger) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        if trigger():
            raise ERRORS[error]()
        return really(*arguments, **options)

    return call


def _refuse_submissions(trigger: _Trigger) -> None:
    begin = aio.AioEngine.__init__

    def begun(self: Any, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        really = self._syscall

        def syscall(number: Any, *rest: Any) -> int:
            if number is self._arg_submit and trigger():
                ctypes.set_errno(errno.EAGAIN)
                return -1
            return int(really(number, *rest))

        self._syscall = syscall

    aio.AioEngine.__init__ = begun  # type: ignore[method-assign]


def _bend_completions(effect: str, error: str, trigger: _Trigger) -> None:
    for name in ("_take_events", "_ask_for_events"):
        really = getattr(aio.AioEngine, name)

        def bent(self: Any, *arguments: Any, really: Any = really) -> list[tuple[int, int]]:
            return [self._bend(*found) for found in really(self, *arguments)]

        setattr(aio.AioEngine, name, bent)

    def bend(self: Any, slot: int, result: int) -> tuple[int, int]:
        operation = self._slots[slot]
        if effect == "short":
            if result >= 8192 and trigger():
                return slot, result // 8192 * 4096
        elif trigger():

            def raising(_: OSError | None) -> NoReturn:
                raise ERRORS[error]()

            self._slots[slot] = (*operation[:6], raising)
        return slot, result

    aio.AioEngine._bend = bend  # type: ignore[attr-defined]


def main() -> int:
    """Fork a daemon for each request, or collect the one that has ended."""
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.environ.update(request["environment"])
        if request["effect"]:
            inject(request["effect"], request["error"], _Trigger(request["nth"], request["hit"]))
        return bitmapd.daemon.main(request["argv"])
    return 0


class Forge:
    """See the module docstring; the test's end of it."""

    def __init__(self) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "tests.support.injected"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def _ask(self, **request: Any) -> int:
        if self._popen.stdin is None or self._popen.stdout is None:
            raise RuntimeError("no pipes")
        self._popen.stdin.write(json.dumps(request) + "\n")
        self._popen.stdin.flush()
        return int(self._popen.stdout.readline())

    def start(self, argv: list[str], **more: Any) -> Daemon:
        idle = {"effect": "", "error": "", "nth": 0, "hit": "", "environment": {}}
        pid = self._ask(argv=argv, **{**idle, **more})
        return Daemon(pid, lambda: self._ask(wait=pid))

    def close(self) -> None:
        self._popen.communicate()


class Daemon:
    def __init__(self, pid: int, collect: Callable[[], int]) -> None:
        self.pid = pid
        self._collect = collect
        self._pidfd = os.pidfd_open(pid)
        self._status: int | None = None

    @property
    def alive(self) -> bool:
        return not self.ends_within(0)

    def ends_within(self, seconds: float) -> bool:
        return self._status is not None or bool(select.select([self._pidfd], [], [], seconds)[0])

    def ends_before(self, readable: socket.socket) -> bool:
        """Which comes first: the end of the process, or something to read."""
        found = select.select([self._pidfd, readable], [], [], WAIT_S)[0]
        if not found:
            raise TimeoutError("neither the end of the process nor anything else")
        return readable not in found

    def ended(self) -> int:
        """The exit status; TimeoutError if it does not end."""
        if self._status is None:
            if not select.select([self._pidfd], [], [], WAIT_S)[0]:
                raise TimeoutError(f"process {self.pid} does not end")
            self._status = self._collect()
            os.close(self._pidfd)
        return self._status

    def send(self, number: int) -> None:
        if self._status is None:
            os.kill(self.pid, number)


if __name__ == "__main__":
    sys.exit(main())
