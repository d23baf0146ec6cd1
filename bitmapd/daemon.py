"""The life of a bitmapd process: one process serves one volume, or receives one's points.

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
import sys
import syslog
import threading
import time
from functools import partial
from typing import Any

from bitmapd import version_text
from bitmapd.attach.choose import resolved
from bitmapd.config import (
    Paths,
    ReceiverConfig,
    atomic_write,
    change_volume,
    changed,
    check_name,
    from_unit_instance,
    has_receiver,
    is_keeper,
    load_any,
    load_volume,
)
from bitmapd.control.events import EventLog, LineSink, format_line
from bitmapd.control.server import Handler, Progress
from bitmapd.errors import BitmapdError, UsageError, explain, printable
from bitmapd.hardening import keep_standard_descriptors, protect_memory
from bitmapd.lastresort import STOP_TIMEOUT_S, LastResort
from bitmapd.predict.predictors import make_policy
from bitmapd.process import Process, start_anew
from bitmapd.record.medium import RecordMedium
from bitmapd.volume.requestlog import check_log
from bitmapd.volume.volume import Volume

GIVE_AWAY_S = 120.0  # for a volume to send what is left


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bitmapd",
        description="Serve one mirrored volume: recover what the stored record names, export the"
        " volume over NBD, copy what hosts write to the secondary; or receive consistent points of"
        " a volume elsewhere. 'dmctl start NAME' runs it, 'dmctl create' makes the volume, 'dmctl"
        " receive' the receiver.",
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
    parser.add_argument("--version", action="version", version=f"bitmapd {version_text()}")
    return parser


class Daemon(Process[Volume]):
    """The process of a volume."""

    def _make_volume(self) -> Volume:
        config = resolved(load_volume(self._paths, self._name))
        volume = Volume(config, self._paths, asyncio.get_running_loop(), self._log.emit)
        volume.on_outdated = start_anew
        return volume

    def _make_way(self) -> None:
        self.volume.make_way()

    def _metrics_listen(self) -> str | None:
        return self.volume.config.metrics_listen

    def _reconfigure(self) -> None:
        self.volume.reconfigure(resolved(load_volume(self._paths, self._name)))

    def _handlers(self) -> dict[str, Handler]:
        return super()._handlers() | {
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
            "point": self._point,
            "group": self._group,
        }

    async def _has_point(self, newer_than: int) -> None:
        await self.volume.receiver.reached(newer_than)

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
            config = changed(self.volume.config, changes)  # somebody else may have set something
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
        if has_receiver(self.volume.config):
            within_s = float(args.get("within_s", GIVE_AWAY_S))
            work = self._give_away(within_s, force=bool(args.get("force")))
            return await self._to_its_end(work, progress)
        return await self._to_its_end(self.volume.paired.demote(bool(args.get("force"))), progress)

    async def _give_away(self, within_s: float, *, force: bool) -> dict[str, Any]:
        """The volume is demoted: it can only be stopped."""
        async with self._turn:
            volume = self.volume
            try:
                await volume.give_away(within_s, force=force)
            except BitmapdError as error:
                if volume.receiver.demoting.is_unknown:
                    self._fail(error)  # the next start reads what is durable
                raise
        return {"demoted": True}

    async def _dissolve(self, args: dict[str, Any], progress: Progress) -> Any:
        return await self._to_its_end(self._become_single(), progress)

    async def _become_single(self) -> dict[str, Any]:
        async with self._turn:
            volume = self.volume
            volume.paired.refuse_unless_complete()
            try:
                await self._unless_stalled(volume.stop(now=True))
                loop = asyncio.get_running_loop()

                def emit(event: str, **fields: Any) -> None:
                    loop.call_soon_threadsafe(partial(self._log.emit, event, **fields))

                from bitmapd.volume.conversion import become_single  # noqa: PLC0415  (rarely needed)

                make = partial(become_single, volume.config, self._paths, emit)
                await loop.run_in_executor(None, make)
                await self._exchange()
            except BaseException as error:
                if volume.stopping:  # else the stop was refused, and hosts are served as before
                    self._fail(error)
                raise
        return {"state": self.volume.state}

    async def _exchange(self) -> None:
        """Another volume takes the place of one that has stopped."""
        next_volume = self._make_volume()
        await next_volume.start()
        self.volume = next_volume

    async def _point(self, args: dict[str, Any], progress: Progress) -> Any:
        cut = self.volume.receiver.cut(str(args.get("label", "")), wait=bool(args.get("wait")))
        return await self._to_its_end(cut, progress)

    async def _group(self, args: dict[str, Any], progress: Progress) -> Any:
        return self.volume.receiver.grouping.obey(args)

    async def _take_up_size(self) -> dict[str, Any]:
        async with self._turn:
            return await self.volume.resize()


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
        process: type[Process[Any]] = Daemon
        config = load_any(paths, name)
        # A volume's process need not have the 1 MiB that these bring.
        if isinstance(config, ReceiverConfig):
            from bitmapd.receiverd import ReceiverProcess  # noqa: PLC0415

            process = ReceiverProcess
        elif is_keeper(config):
            from bitmapd.keeperd import KeeperProcess  # noqa: PLC0415

            process = KeeperProcess
        asyncio.run(process(paths, name, log, last_resort).run())
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
        config = load_any(paths, arguments.name)
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
