"""What is the same of every bitmapd process: start, control socket, signals, stop.

`Process` owns one thing that is served, a volume or a receiver, as far as the life of the process
is concerned; `daemon` says which, and what else can be asked of it.

1. The control socket answers when what is served has started: who reaches it takes it for started.
2. There is one stop for everybody who asks.  If a medium does not answer in the course of it, the
   process ends as a crash would (`lastresort`).
3. Whoever waits for an answer hears twice a second that the process lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from bitmapd import __version__, is_compiled
from bitmapd.config import Paths
from bitmapd.control.events import EventLog
from bitmapd.control.notify import notify
from bitmapd.control.server import ControlServer, Handler, Progress, events_handler
from bitmapd.errors import BitmapdError, BusyError
from bitmapd.lastresort import STOP_TIMEOUT_S, LastResort, Signals
from bitmapd.volume.stall import Stall, StalledError

if TYPE_CHECKING:
    from bitmapd.control.metrics import MetricsServer

LOOK_AGAIN_S = 1.0
ALIVE_S = 0.5  # between two signs of life while a client waits

T = TypeVar("T")


class Served(Protocol):
    """What a process needs of what it serves: a volume or a receiver."""

    @property
    def state(self) -> str: ...

    async def start(self) -> None: ...

    async def stop(self, now: bool) -> dict[str, Any]: ...

    def hurry(self) -> None: ...

    def asked(self) -> tuple[int, ...] | None: ...

    def silent_media(self) -> str: ...

    def status(self) -> dict[str, Any]: ...

    async def wait(self, state: str) -> None: ...


S = TypeVar("S", bound=Served)


class Process(ABC, Generic[S]):
    """What it serves, control socket, metrics and signals on one loop."""

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
        listen = self._metrics_listen()
        if listen is not None:
            from bitmapd.control.metrics import MetricsServer  # noqa: PLC0415  (off by default)

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
        compiled = is_compiled()
        self._log.emit("started", version=__version__, compiled=compiled, pid=os.getpid())
        notify("READY=1")
        await self._ended.wait()
        with contextlib.suppress(OSError):  # a manager that is gone sees the process end, and how
            notify("STOPPING=1")
        if self._metrics is not None:
            await self._metrics.close()
        await control.close()
        try:
            if self._failure is not None:
                raise self._failure
            if self._stop_task is not None:
                await self._stop_task  # its failure is the process's failure
        except StalledError as error:
            self._last_resort.end(error)  # any other end would wait for the medium, too

    def _figures(self) -> dict[str, Any]:
        return self.volume.status()

    @abstractmethod
    def _make_volume(self) -> S: ...

    def _metrics_listen(self) -> str | None:
        return None

    @abstractmethod
    def _reconfigure(self) -> None:
        """Read the configuration again.  A BitmapdError changes nothing."""

    def _reload(self) -> None:
        try:
            self._reconfigure()
        except BitmapdError as error:
            self._log.emit("settings-refused", message=error.message)

    def _fail(self, error: BaseException) -> None:
        """The process ends with this error, and nothing is stopped before."""
        self._failure = error
        self._ended.set()

    # -- stopping -------------------------------------------------------------------------
    def _begin_stop(self, now: bool) -> asyncio.Task[dict[str, Any]]:
        """One stop for everybody who asks; a stop with `now` hurries one that copies."""
        if self._stop_task is None:
            self._make_way()
            self._stop_task = asyncio.ensure_future(self._unless_stalled(self._stop_in_turn(now)))
            self._stop_task.add_done_callback(self._stopped)
        elif now:
            self.volume.hurry()
        return self._stop_task

    def _make_way(self) -> None:
        """End what has the turn and waits for somebody else."""

    async def _unless_stalled(self, work: Coroutine[Any, Any, T]) -> T:
        """What a stop gives; StalledError if a medium does not answer: it will not be waited for
        any longer."""
        stop = asyncio.ensure_future(work)
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

    # -- verbs ----------------------------------------------------------------------------
    def _handlers(self) -> dict[str, Handler]:
        return {
            "ping": self._ping,
            "status": self._status,
            "stop": self._stop,
            "wait": self._wait,
            "events": events_handler(self._log),
        }

    async def _ping(self, args: dict[str, Any], progress: Progress) -> Any:
        return {
            "state": "ready",
            "pid": os.getpid(),
            "version": __version__,
            "compiled": is_compiled(),
        }

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
        state = str(args.get("for", "in-sync"))
        if state == "point":
            reached = self._has_point(int(args.get("newer_than", 0)))
        else:
            reached = self.volume.wait(state)
        await self._while_asked(reached, progress)
        return {"state": self.volume.state}

    async def _has_point(self, newer_than: int) -> None:
        """Return when there is a point of a larger number; what never has one says so."""
        await self.volume.wait("point")


def start_anew() -> None:
    """Of a process that has another role now, or whose partner has taken over: whatever it believes
    to own is no longer its own.  The kernel ends its I/O before the next program begins, and every
    descriptor is closed by that but the standard ones, without which the next one would not become
    a daemon."""
    for number in range(3):
        os.set_inheritable(number, True)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606


def _look_again(loop: asyncio.AbstractEventLoop) -> None:
    """A thread wakes the loop by a byte; asyncio forgets one that cannot be sent for want of memory
    (`_write_to_self`), and a loop without a timer would wait for ever."""
    loop.call_later(LOOK_AGAIN_S, _look_again, loop)
