"""monitor: volumes come up by themselves when their media have appeared, in any order.

One thread waits for what can change the answer: block devices (from udev and from the kernel, since
a device may have appeared before udev runs), mounts (a medium may be a file), signals, the end of a
start that is under way and the end of a volume's process.  After each of these it looks which media
are there, and `Assembly` (dmctl/model/assembly.py) decides.

1. Starts are processes of their own (`dmctl start`), so that a slow one holds up no other volume.
2. A volume that has joined the configuration while the monitor runs is not started by that:
   `dmctl create` does not start volumes.
3. Where systemd runs, volumes have units, which start them again when they die; elsewhere the
   monitor does, unless they were stopped: a daemon that stops cleanly takes its pid file away.

The monitor keeps nothing: one that was killed is started again, and finds volumes that run.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import syslog
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyudev

from bitmapd.config import Paths, ReceiverConfig, VolumeConfig, load_any, volume_names
from bitmapd.control.client import ControlClient
from bitmapd.control.events import EventLog, LineSink, Sink, format_line
from bitmapd.errors import BitmapdError, BusyError, TimeOutError, WrongStateError, error_from_json
from bitmapd.net.sockets import peer_credentials
from dmctl.cli.context import Context
from dmctl.cli.media import missing_media
from dmctl.cli.processes import start_command
from dmctl.model.assembly import PATIENCE_S, Assembly, Do

MOUNTS = "/proc/self/mountinfo"
EVENT_BUFFER_BYTES = 8 << 20
LOCK_NAME = ".monitor.lock"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(slots=True)
class Watched:
    """One volume that the monitor looks after."""

    assembly: Assembly
    log: EventLog
    starting: subprocess.Popen[bytes] | None = None
    process_fd: int | None = None  # pidfd of its bitmapd
    up: bool = False
    error: BitmapdError | None = None
    missing: dict[str, str] = field(default_factory=dict)
    problem: str = ""  # of its configuration, reported once


class Monitor:
    """See the module docstring.  With `once` it ends when every volume is up, or cannot be."""

    def __init__(
        self,
        paths: Paths,
        sink: Sink,
        *,
        names: Sequence[str] | None = None,
        once: bool = False,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._paths = paths
        self._sink = sink
        self._names = names
        self._once = once
        self._patience_s = patience_s
        self._volumes: dict[str, Watched] = {}
        self._poll = select.poll()
        self._ready: dict[int, Callable[[], None]] = {}
        self._again_at_s: float | None = None
        self._ended = False

    # -- the loop -----------------------------------------------------------------------------
    def run(self) -> BitmapdError | None:
        """Until a signal, or with `once` until there is nothing left to wait for; then the first
        error that a volume ended with."""
        with self._sources():
            self._read_configuration(first=True)
            while not self._ended:
                self._look()
                if self._once and all(w.up or w.error for w in self._volumes.values()):
                    break
                self._wait()
        for watched in self._volumes.values():
            if watched.process_fd is not None:
                os.close(watched.process_fd)
        return next((w.error for w in self._volumes.values() if w.error is not None), None)

    @contextlib.contextmanager
    def _sources(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            udev = pyudev.Context()
            for source in ("udev", "kernel"):
                devices = pyudev.Monitor.from_netlink(udev, source)
                devices.filter_by("block")
                devices.set_receive_buffer_size(EVENT_BUFFER_BYTES)
                devices.start()
                self._watch(devices.fileno(), select.POLLIN, _drain(devices))
            mounts = os.open(MOUNTS, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, mounts)
            self._watch(mounts, select.POLLPRI, lambda: None)
            inner, outer = socket.socketpair()
            stack.callback(inner.close)
            stack.callback(outer.close)
            inner.setblocking(False)
            outer.setblocking(False)
            before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
            wakeup = signal.set_wakeup_fd(outer.fileno())
            stack.callback(lambda: [signal.signal(*pair) for pair in before.items()])
            stack.callback(signal.set_wakeup_fd, wakeup)
            self._watch(inner.fileno(), select.POLLIN, lambda: self._signalled(inner.recv(64)))
            yield

    def _watch(self, fd: int, events: int, ready: Callable[[], None]) -> None:
        self._ready[fd] = ready
        self._poll.register(fd, events)

    def _unwatch(self, fd: int) -> None:
        del self._ready[fd]
        self._poll.unregister(fd)

    def _wait(self) -> None:
        timeout_s = None if self._again_at_s is None else self._again_at_s - time.monotonic()
        for fd, _ in self._poll.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000 + 1):
            if fd in self._ready:  # what came before it may have ended it
                self._ready[fd]()

    def _signalled(self, numbers: bytes) -> None:
        if signal.SIGHUP in numbers:
            self._read_configuration(first=False)
        self._ended = self._ended or bool(set(numbers) - {signal.SIGHUP})

    # -- volumes ------------------------------------------------------------------------------
    def _read_configuration(self, *, first: bool) -> None:
        names = volume_names(self._paths) if self._names is None else self._names
        for name in [name for name in self._volumes if name not in names]:
            watched = self._volumes[name]
            if watched.starting is None and watched.process_fd is None:
                del self._volumes[name]
        for name in names:
            if name not in self._volumes:
                self._volumes[name] = Watched(
                    Assembly(armed=first, patience_s=self._patience_s),
                    EventLog(name, wall_clock=time.time, clock=time.monotonic, sink=self._sink),
                )

    def _config(self, name: str, watched: Watched) -> VolumeConfig | ReceiverConfig | None:
        """Read anew each time: it is small, and may have been mended."""
        try:
            config = load_any(self._paths, name)
        except BitmapdError as error:
            if self._once:
                watched.error = error
            elif error.message != watched.problem:
                watched.problem = error.message
                watched.log.emit("not-assembled", code=error.code, message=error.message)
            return None
        watched.problem = ""
        wanted = isinstance(config, ReceiverConfig) or config.start_at_boot
        return config if wanted or self._names is not None else None

    def _look(self) -> None:
        self._again_at_s = None
        if not self._once:
            self._read_configuration(first=False)
        for name, watched in self._volumes.items():
            if watched.starting is not None or watched.error is not None:
                continue
            config = self._config(name, watched)
            if config is None:
                continue
            watched.missing = missing_media(config)
            verdict = watched.assembly.look(tuple(watched.missing), time.monotonic())
            if verdict.do is Do.WAIT:
                watched.log.emit("waiting", **watched.missing)
            elif verdict.do is Do.START:
                self._start(name, watched)
            if verdict.again_at_s is not None:
                self._look_at(verdict.again_at_s)

    def _look_at(self, when_s: float) -> None:
        self._again_at_s = when_s if self._again_at_s is None else min(self._again_at_s, when_s)

    def _start(self, name: str, watched: Watched) -> None:
        command = [sys.executable, *start_command(self._paths, name)]
        watched.starting = process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        pidfd = os.pidfd_open(process.pid)

        def ended() -> None:
            self._unwatch(pidfd)
            os.close(pidfd)
            watched.starting = None
            said, _ = process.communicate()
            self._started(name, watched, process.returncode, said)

        self._watch(pidfd, select.POLLIN, ended)

    def _started(self, name: str, watched: Watched, status: int, said: bytes) -> None:
        if status == 0:
            watched.up = True
            watched.log.emit("assembled", **{f"without_{k}": v for k, v in watched.missing.items()})
            if not self._once:
                self._follow(name, watched)
            return
        error = _error_in(said) or BitmapdError(f"'dmctl start' ended with status {status}")
        again_s = watched.assembly.failed(status, time.monotonic())
        fields = {"code": error.code, "message": error.message}
        if again_s is None:
            if self._once:
                watched.error = error
        else:
            fields["again_in_s"] = f"{again_s - time.monotonic():.0f}"
        watched.log.emit("not-assembled", **fields)

    def _follow(self, name: str, watched: Watched) -> None:
        """Learn of the end of its process."""
        try:
            with ControlClient(self._paths.control_socket(name), name) as client:
                pid, _uid = peer_credentials(client.socket)
                pidfd = os.pidfd_open(pid)
        except (WrongStateError, TimeOutError, OSError):
            return  # it has been stopped already
        watched.process_fd = pidfd

        def ended() -> None:
            self._unwatch(pidfd)
            os.close(pidfd)
            watched.process_fd = None
            watched.up = False
            if self._paths.pid_file(name).exists():
                again_s = watched.assembly.died(time.monotonic()) - time.monotonic()
                watched.log.emit("died", again_in_s=f"{again_s:.0f}")

        self._watch(pidfd, select.POLLIN, ended)


def _drain(devices: Any) -> Callable[[], None]:
    """Take all events that have come; what they are about is looked at anyway."""

    def drain() -> None:
        while True:
            try:
                if devices.poll(timeout=0) is None:
                    return
            except OSError:  # some were lost: the look that follows makes up for it
                return

    return drain


def _error_in(said: bytes) -> BitmapdError | None:
    try:
        answer = json.loads(said)
        return error_from_json(answer["error"])
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None


# -- commands ---------------------------------------------------------------------------------


def wait_for(context: Context, names: Sequence[str], *, patience_s: float) -> int:
    """`dmctl assemble --wait`: until these volumes are up."""
    sink = LineSink(sys.stderr.write, journal="JOURNAL_STREAM" in os.environ)
    error = Monitor(context.paths, sink, names=names, once=True, patience_s=patience_s).run()
    sink.close()
    if error is not None:
        raise error
    return 0


def monitor(context: Context, args: Namespace) -> int:
    context.paths.run_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
    if not args.daemon:
        sink = LineSink(sys.stderr.write, journal="JOURNAL_STREAM" in os.environ)
        with _only_one(context.paths):
            Monitor(context.paths, sink, patience_s=args.patience).run()
        sink.close()
        return 0
    with _only_one(context.paths):
        pass  # an error is reported while somebody listens
    import daemon  # noqa: PLC0415  (costs 40 ms that the foreground need not pay)

    with daemon.DaemonContext(working_directory="/", umask=0o077, signal_map={}):
        syslog.openlog("dmctl", syslog.LOG_PID, syslog.LOG_DAEMON)
        with _only_one(context.paths):
            Monitor(context.paths, _to_syslog, patience_s=args.patience).run()
    return 0


@contextlib.contextmanager
def _only_one(paths: Paths) -> Iterator[None]:
    path = Path(paths.run_dir, LOCK_NAME)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to read again
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode())  # for people
        try:
            yield
        finally:
            os.ftruncate(fd, 0)
    except BlockingIOError:
        raise BusyError(f"another 'dmctl monitor' runs with {paths.run_dir}") from None
    finally:
        os.close(fd)


def _to_syslog(level: int, fields: Any) -> None:
    line = format_line(level, fields, journal=True).removeprefix(f"<{level}>")
    syslog.syslog(level, line)
