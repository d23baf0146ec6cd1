"""The life of a bitmapd process: one process serves one volume.

    bitmapd NAME [--foreground] [--config-dir DIR] [--run-dir DIR]

In the foreground it reports to the service manager when the volume can be used (sd_notify) and
logs to standard error.  Otherwise it becomes a daemon (python-daemon) and logs to syslog; whether
the start succeeded is learnt from the control socket, or from `RUN_DIR/NAME.err`, which holds the
error that ended it as one JSON object.

1. The lock on the record device is what makes it the only one; the pid file is for people.
2. Memory is locked and the process marked as one that writes back for others (PR_SET_IO_FLUSHER)
   before a thread starts: a host's page cache may wait for this process while memory is short.
3. SIGTERM and SIGINT stop without copying what is left; SIGHUP reads the configuration again.
4. What nobody answers, and a stop by a signal that does not end, end the process as a crash would
   (`lastresort`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import syslog
import threading
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from bitmapd import __version__
from bitmapd.attach.choose import resolved
from bitmapd.config import (
    Paths,
    atomic_write,
    change_volume,
    changed,
    check_name,
    from_unit_instance,
    load_volume,
)
from bitmapd.control.events import EventLog, LineSink, format_line
from bitmapd.control.metrics import MetricsServer
from bitmapd.control.notify import notify
from bitmapd.control.server import ControlServer, Handler, Progress, events_handler
from bitmapd.errors import BitmapdError, BusyError, UsageError, WrongStateError, explain, printable
from bitmapd.hardening import keep_standard_descriptors, protect_memory
from bitmapd.lastresort import STOP_TIMEOUT_S, LastResort, Signals
from bitmapd.predict.predictors import make_policy
from bitmapd.record.medium import RecordMedium
from bitmapd.volume.conversion import become_single
from bitmapd.volume.requestlog import check_log
from bitmapd.volume.stall import Stall, StalledError
from bitmapd.volume.volume import Volume

LOOK_AGAIN_S = 1.0

Emit = Callable[..., None]
T = TypeVar("T")

ALIVE_S = 0.5  # between two signs of life while a client waits


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bitmapd",
        description="Serve one mirrored volume: recover what the stored record names, export the"
        " volume over NBD, copy what hosts write to the secondary. 'dmctl start NAME' runs it, and"
        " 'dmctl create' makes the volume.",
        epilog="SIGTERM stops at once and leaves in the record what is not copied; if that takes"
        f" longer than {STOP_TIMEOUT_S:g} s the process ends as by a crash, with status 40. SIGHUP"
        " reads the configuration again. In the foreground it reports to the service manager when"
        " the volume can be used (sd_notify). The exit status is that of dmctl; an error that ended"
        " the process is also in RUN_DIR/NAME.err, as one JSON object.",
    )
    parser.add_argument("name", metavar="NAME", type=from_unit_instance, help="the volume")
    parser.add_argument(
        "--foreground", action="store_true", help="stay in the foreground, log to standard error"
    )
    parser.add_argument("--config-dir", metavar="DIR", help="default /etc/dmctl")
    parser.add_argument("--run-dir", metavar="DIR", help="default /run/dmctl")
    parser.add_argument("--version", action="version", version=f"bitmapd {__version__}")
    return parser


class Daemon:
    """Volume, control socket, metrics and signals on one loop."""

    def __init__(self, paths: Paths, name: str, log: EventLog, last_resort: LastResort) -> None:
        self._last_resort = last_resort
        self._signals: Signals | None = None
        self._paths = paths
        self._name = name
        self._log = log
        self._ended = asyncio.Event()
        self._stop_task: asyncio.Task[dict[str, Any]] | None = None
        self._metrics: MetricsServer | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._turn = asyncio.Lock()  # of what exchanges or ends the volume
        self._failure: BaseException | None = None

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._last_resort.on_loop)
        _look_again(loop)
        self.volume = self._make_volume()
        listen = self.volume.config.metrics_listen
        if listen is not None:
            # Before anything is opened, so that a missing package is an early error.
            self._metrics = MetricsServer(listen, self._figures)
        control = ControlServer(self._paths.control_socket(self._name), self._handlers())
        await self.volume.start()
        stop = partial(self._begin_stop, True)
        handlers: dict[signal.Signals, Callable[[], object]] = {
            signal.SIGTERM: stop,
            signal.SIGINT: stop,
            signal.SIGHUP: self._reload,
        }
        try:
            self._signals = Signals(loop, handlers, self._last_resort)
            if self._metrics is not None:
                await self._metrics.start()
            # Last: who reaches it takes the volume for started.
            await control.start()
        except BaseException:
            await self._begin_stop(True)
            raise
        self._log.emit("started", version=__version__, pid=os.getpid())
        notify("READY=1")
        await self._ended.wait()
        with contextlib.suppress(OSError):  # a manager that is gone sees the process end, and how
            notify("STOPPING=1")
        if self._metrics is not None:
            await self._metrics.close()
        await control.close()
        if self._failure is not None:
            raise self._failure
        if self._stop_task is not None:
            try:
                await self._stop_task  # its failure is the process's failure
            except StalledError as error:
                self._last_resort.end(error)  # any other end would wait for the medium, too

    def _figures(self) -> dict[str, Any]:
        return self.volume.status()

    def _make_volume(self) -> Volume:
        config = resolved(load_volume(self._paths, self._name))
        volume = Volume(config, self._paths, asyncio.get_running_loop(), self._log.emit)
        volume.on_outdated = _start_anew
        return volume

    # -- stopping -------------------------------------------------------------------------
    def _begin_stop(self, now: bool) -> asyncio.Task[dict[str, Any]]:
        """One stop for everybody who asks; a stop with `now` hurries one that copies."""
        if self._stop_task is None:
            self._stop_task = asyncio.ensure_future(self._stop_volume(now))
            self._stop_task.add_done_callback(self._stopped)
        elif now:
            self.volume.hurry()
        return self._stop_task

    async def _stop_volume(self, now: bool) -> dict[str, Any]:
        """StalledError if a medium does not answer: it will not be waited for any longer."""
        stop = asyncio.ensure_future(self._stop_in_turn(now))
        stall = Stall(STOP_TIMEOUT_S)
        while not (await asyncio.wait([stop], timeout=ALIVE_S))[0]:
            if stall.seen(asyncio.get_running_loop().time(), self.volume.asked()):
                raise StalledError(
                    f"the stop of volume '{self._name}' waits for {self.volume.silent_media()},"
                    f" which has not answered for {STOP_TIMEOUT_S:g} s: bitmapd ends as by a crash",
                    hint="what differs is in the record, and is copied after the next start",
                )
        return stop.result()

    async def _stop_in_turn(self, now: bool) -> dict[str, Any]:
        async with self._turn:
            return await self.volume.stop(now)

    def _stopped(self, task: asyncio.Task[dict[str, Any]]) -> None:
        if not task.cancelled() and isinstance(task.exception(), BusyError):
            # Hosts have the device open: nothing has been stopped, and they are served as before.
            self._stop_task = None
            if self._signals is not None:
                self._signals.refused()
            self._log.emit("stop-refused", message=str(task.exception()))
            return
        self._ended.set()
        if not task.cancelled() and task.exception() is not None:
            self._log.emit("failed", message=f"the stop failed: {task.exception()}")

    def _reload(self) -> None:
        try:
            self.volume.reconfigure(resolved(load_volume(self._paths, self._name)))
        except BitmapdError as error:
            self._log.emit("settings-refused", message=error.message)

    # -- verbs ----------------------------------------------------------------------------
    def _handlers(self) -> dict[str, Handler]:
        return {
            "ping": self._ping,
            "status": self._status,
            "stop": self._stop,
            "wait": self._wait,
            "resync": self._resync,
            "verify": self._verify,
            "pause": self._pause,
            "resume": self._resume,
            "set": self._set,
            "resize": self._resize,
            "partner": self._partner,
            "takeover": self._takeover,
            "demote": self._demote,
            "dissolve": self._dissolve,
            "events": events_handler(self._log),
        }

    async def _ping(self, args: dict[str, Any], progress: Progress) -> Any:
        return {"state": "ready", "pid": os.getpid(), "version": __version__}

    async def _status(self, args: dict[str, Any], progress: Progress) -> Any:
        return self.volume.status()

    async def _alive(self, task: asyncio.Future[T], progress: Progress) -> T:
        """Its value; meanwhile the client hears that this process lives, and how far it is.

        The task goes on when the client goes away.
        """
        while not (await asyncio.wait([task], timeout=ALIVE_S))[0]:
            figures = self.volume.status()
            await progress({key: figures[key] for key in ("state", "dirty_bytes")})
        return task.result()

    async def _while_asked(self, work: Coroutine[Any, Any, T], progress: Progress) -> T:
        """As `_alive`, for what nobody needs once the client has gone away."""
        task = asyncio.ensure_future(work)
        try:
            return await self._alive(task, progress)
        finally:
            task.cancel()

    async def _to_its_end(self, work: Coroutine[Any, Any, T], progress: Progress) -> T:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended_unasked)
        return await self._alive(task, progress)

    def _ended_unasked(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # if nobody waits for it any more, nobody hears of it

    async def _stop(self, args: dict[str, Any], progress: Progress) -> Any:
        return await self._alive(self._begin_stop(bool(args.get("now", False))), progress)

    async def _wait(self, args: dict[str, Any], progress: Progress) -> Any:
        return await self._while_asked(self._reach(str(args.get("for", "in-sync"))), progress)

    async def _reach(self, state: str) -> dict[str, Any]:
        await self.volume.wait(state)
        while self.volume.left:
            async with self._turn:
                if self._failure is not None:
                    raise WrongStateError(f"volume '{self._name}' has failed")
            await self.volume.wait(state)
        return {"state": self.volume.state}

    async def _resync(self, args: dict[str, Any], progress: Progress) -> Any:
        work = self.volume.resync(bool(args.get("checksum", False)))
        return await self._while_asked(work, progress)

    async def _verify(self, args: dict[str, Any], progress: Progress) -> Any:
        return await self.volume.verify(bool(args.get("repair", False)), progress)

    async def _pause(self, args: dict[str, Any], progress: Progress) -> Any:
        await self._to_its_end(self.volume.pause(), progress)
        return {"state": self.volume.state}

    async def _resume(self, args: dict[str, Any], progress: Progress) -> Any:
        await self._to_its_end(self.volume.resume(), progress)
        return {"state": self.volume.state}

    async def _set(self, args: dict[str, Any], progress: Progress) -> Any:
        changes = {str(key).replace("-", "_"): value for key, value in args.items()}
        if not changes:
            raise UsageError("nothing to change", hint="give KEY=VALUE")
        config = changed(self.volume.config, changes)
        make_policy(config.predictor, self.volume.geometry)  # refuses an unknown name
        if config.trace is not None and config.trace != self.volume.config.trace:
            await asyncio.get_running_loop().run_in_executor(None, check_log, config.trace)
        change_volume(self._paths, config, changes)
        self.volume.reconfigure(config)
        return {"changed": sorted(changes)}

    async def _resize(self, args: dict[str, Any], progress: Progress) -> Any:
        return await self._to_its_end(self._take_up_size(), progress)

    async def _partner(self, args: dict[str, Any], progress: Progress) -> Any:
        paired, count = self.volume.paired, int(args.get("ping", 0))
        if args.get("lead"):
            paired.pair.node.take_lead()
        if count:
            return await self._while_asked(paired.ping(count), progress)
        return paired.pair.status()

    async def _takeover(self, args: dict[str, Any], progress: Progress) -> Any:
        fenced, force, beside = (bool(args.get(word)) for word in ("fenced", "force", "beside"))
        return await self._to_its_end(
            self.volume.paired.take_over(fenced, force, beside=beside), progress
        )

    async def _demote(self, args: dict[str, Any], progress: Progress) -> Any:
        return await self._to_its_end(self.volume.paired.demote(bool(args.get("force"))), progress)

    async def _dissolve(self, args: dict[str, Any], progress: Progress) -> Any:
        return await self._to_its_end(self._become_single(), progress)

    async def _become_single(self) -> dict[str, Any]:
        async with self._turn:
            volume = self.volume
            volume.paired.refuse_unless_complete()
            await volume.stop(now=True)
            try:
                loop = asyncio.get_running_loop()

                def emit(event: str, **fields: Any) -> None:
                    loop.call_soon_threadsafe(partial(self._log.emit, event, **fields))

                make = partial(become_single, volume.config, self._paths, emit)
                await loop.run_in_executor(None, make)
                next_volume = self._make_volume()
                await next_volume.start()
                self.volume = next_volume
            except BaseException as error:
                self._failure = error
                self._ended.set()
                raise
        return {"state": self.volume.state}

    async def _take_up_size(self) -> dict[str, Any]:
        async with self._turn:
            try:
                answer = await self.volume.resize()
                if self.volume.left:
                    next_volume = self._make_volume()
                    await next_volume.start()
                    self.volume = next_volume
            except BaseException as error:
                if self.volume.left:
                    # The kernel holds hosts' writes back until the volume is started again.
                    self._failure = error
                    self._ended.set()
                raise
        return answer


def _start_anew() -> None:
    """The partner has taken over: whatever this process believes to own is no longer its own.  The
    kernel ends its I/O before the next program begins, and every descriptor is closed by that but
    the standard ones, without which the next one would not become a daemon."""
    for number in range(3):
        os.set_inheritable(number, True)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606


def _look_again(loop: asyncio.AbstractEventLoop) -> None:
    """A thread wakes the loop by a byte; asyncio forgets one that cannot be sent for want of memory
    (`_write_to_self`), and a loop without a timer would wait for ever."""
    loop.call_later(LOOK_AGAIN_S, _look_again, loop)


def _write_error(paths: Paths, name: str, error: BitmapdError) -> None:
    line = json.dumps(error.to_json()) + "\n"
    with contextlib.suppress(OSError):  # the error itself goes to the log as well
        atomic_write(paths.error_file(name), line.encode())


def serve(paths: Paths, name: str, *, foreground: bool) -> int:
    """Serve the volume until it is stopped; the exit status."""
    journal = "JOURNAL_STREAM" in os.environ
    sink: Any = LineSink(sys.stderr.write, journal=journal) if foreground else _to_syslog
    log = EventLog(name, wall_clock=time.time, clock=time.monotonic, sink=sink)

    def tell(error: BitmapdError, trace: str) -> None:
        _write_error(paths, name, error)
        log.emit("failed", code=error.code, message=error.message, hint=error.hint)
        if isinstance(sink, LineSink):
            sink.close()
        for line in trace.splitlines():
            if foreground:
                print(line, file=sys.stderr)
            else:
                syslog.syslog(syslog.LOG_CRIT, line)

    def accepting_pauses(error: OSError) -> None:
        log.emit("accepting-pauses", message=error.strerror or str(error))

    last_resort = LastResort(tell, accepting_pauses)
    threading.excepthook = last_resort.on_thread
    status = 0
    try:
        paths.error_file(name).unlink(missing_ok=True)
        protect_memory(log.emit)
        asyncio.run(Daemon(paths, name, log, last_resort).run())
    except BitmapdError as error:
        _write_error(paths, name, error)
        log.emit("failed", code=error.code, message=error.message, hint=error.hint)
        status = error.exit_status
    except OSError as error:
        failure = explain(error, f"volume '{name}'")
        _write_error(paths, name, failure)
        log.emit("failed", code=failure.code, message=failure.message)
        status = failure.exit_status
    except Exception as error:  # noqa: BLE001  (ends the process)
        last_resort.end_by(error)
    if isinstance(sink, LineSink):
        sink.close()
    return status


def _to_syslog(level: int, fields: Any) -> None:
    """A daemon's log; the socket of syslog is written without waiting."""
    line = format_line(level, fields, journal=True).removeprefix(f"<{level}>")
    syslog.syslog(level, line)


def _daemonise(paths: Paths, name: str) -> int:
    import daemon  # noqa: PLC0415  (costs 40 ms that the foreground need not pay)
    from daemon.pidfile import TimeoutPIDLockFile  # noqa: PLC0415
    from lockfile import LockError  # noqa: PLC0415

    # One that is left behind goes, whatever is in it (nothing, if the disk was full): nobody holds
    # the lock on the record, which is what proves a living process.
    paths.pid_file(name).unlink(missing_ok=True)
    syslog.openlog("bitmapd", syslog.LOG_PID, syslog.LOG_DAEMON)
    context = daemon.DaemonContext(
        working_directory="/",
        umask=0o077,
        pidfile=TimeoutPIDLockFile(str(paths.pid_file(name)), acquire_timeout=0),
        signal_map={},
    )
    try:
        context.open()
    except (OSError, LockError) as error:  # nobody reads what it prints any more
        failure = BitmapdError(f"volume '{name}' cannot become a daemon: {error}")
        syslog.syslog(syslog.LOG_ERR, failure.message)
        _write_error(paths, name, failure)
        return failure.exit_status
    with context:
        return serve(paths, name, foreground=False)


def _say(text: str) -> None:
    with contextlib.suppress(OSError, AttributeError):  # standard error is full, or was closed
        print(printable(text, keep="\n"), file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    keep_standard_descriptors()
    arguments = build_parser().parse_args(argv)
    paths = None
    try:
        check_name(arguments.name)
        found = Paths.find(os.environ, arguments.config_dir, arguments.run_dir)
        paths = Paths(found.config_dir.absolute(), found.run_dir.absolute())
        paths.run_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
        # A mistake, or a process that serves the volume already, is reported to whoever typed this.
        config = load_volume(paths, arguments.name)
        if not arguments.foreground:
            with RecordMedium.open(config.record) as medium:
                medium.lock()
    except (BitmapdError, OSError) as problem:
        error = problem if isinstance(problem, BitmapdError) else explain(problem)
        if paths is not None:
            _write_error(paths, arguments.name, error)
        _say(f"bitmapd: error: {error.message}")
        if error.hint:
            _say(f"hint: {error.hint}")
        return error.exit_status
    if arguments.foreground:
        return serve(paths, arguments.name, foreground=True)
    return _daemonise(paths, arguments.name)


if __name__ == "__main__":
    sys.exit(main())
