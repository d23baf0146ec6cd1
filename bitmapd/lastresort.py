"""Ends the process as a crash would, where going on would be worse (edge).

A crash is safe at any instant: the record names whatever differs, and the next start copies it.  So
what cannot be answered to one request is not repaired either.  It ends the process at once and
audibly, without a shutdown in a state that nobody has thought of: no request that never gets its
answer, no stop that waits for a count that never falls.

What ends the process:
1. An exception that nobody answers: of a callback of the loop, a task, a thread, a completion of
   the disk engine.  MemoryError is one of them.
2. A stop by SIGTERM or SIGINT that has not ended the process after `STOP_TIMEOUT_S`, whatever the
   loop is waiting for: signals are heard by a thread of its own (`Signals`).

What is answered, and ends nothing:
3. Want of something where a request begins.  A buffer: whoever asks the pool waits.  Memory, a
   descriptor or a thread for an operation on a medium: its OSError.  Room in the kernel's queue:
   the operation waits.  A descriptor for a client: accepting pauses for a second.
4. An OSError of the connection of one control or metrics client: asyncio has closed it.
5. A second end of a connection, of which asyncio has told its protocol once (CPython issue 156512):
   its own TLS writes where a transport may end, so whoever cuts the link at the wrong moment would
   end this process.

The exit status is that of the error; the error is in the log and in `RUN_DIR/NAME.err`.  If saying
so takes longer than `LAST_WORDS_S`, SIGALRM ends the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from bitmapd.errors import BitmapdError, TimeOutError

STOP_TIMEOUT_S = 45.0  # a service manager waits for a minute (examples/bitmapd@.service)
LAST_WORDS_S = 5.0

Tell = Callable[[BitmapdError, str], None]


class LastResort:
    """See the module docstring.  Any thread may call."""

    def __init__(self, tell: Tell, accepting_pauses: Callable[[OSError], None]) -> None:
        """`tell` is given the error and the traceback; it may fail."""
        self._tell = tell
        self._accepting_pauses = accepting_pauses

    def end(self, error: BitmapdError, trace: str = "") -> NoReturn:
        signal.setitimer(signal.ITIMER_REAL, LAST_WORDS_S)
        try:
            self._tell(error, trace)
        finally:
            os._exit(error.exit_status)

    def end_by(self, error: BaseException) -> NoReturn:
        """`error` is one that nobody has answered."""
        hint = "the next start copies what the record names"
        if isinstance(error, MemoryError):
            failure = BitmapdError("out of memory", f"{hint}; see 'Shortage of memory'")
        else:
            kind = type(error).__name__
            failure = BitmapdError(
                f"a mistake of the program: {kind}: {error}", f"{hint}; report it with the log"
            )
        self.end(failure, _trace(error))

    def on_loop(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """The loop's exception handler."""
        error = context.get("exception")
        if error is None:
            loop.default_exception_handler(context)
        elif isinstance(error, OSError) and "socket" in context:
            self._accepting_pauses(error)  # asyncio: BaseSelectorEventLoop._accept_connection
        elif isinstance(error, OSError) and "transport" in context:
            pass
        elif not _is_second_end(error):
            self.end_by(error)

    def on_thread(self, args: threading.ExceptHookArgs) -> None:
        """For `threading.excepthook`."""
        self.end_by(args.exc_value or RuntimeError("a thread ended"))


def _is_second_end(error: BaseException) -> bool:
    """Raised in asyncio itself: the first time has taken the socket and the protocol away."""
    last = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)][-1:]
    ends = asyncio.selector_events._SelectorTransport._call_connection_lost  # type: ignore[attr-defined]
    return isinstance(error, AttributeError) and last == [ends.__code__]


def _trace(error: BaseException) -> str:
    """Where it came from, without source lines: their files may lie on what this process serves."""
    frames = traceback.walk_tb(error.__traceback__)
    places = [
        f"{frame.f_code.co_filename}:{line} in {frame.f_code.co_name}" for frame, line in frames
    ]
    return "\n".join([*places, f"{type(error).__name__}: {error}"])


class Signals:
    """Hears signals on a thread of its own, and bounds the stop that some of them ask for."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        handlers: Mapping[signal.Signals, Callable[[], object]],
        last_resort: LastResort,
        *,
        stops: frozenset[signal.Signals] = frozenset({signal.SIGTERM, signal.SIGINT}),
        timeout_s: float = STOP_TIMEOUT_S,
    ) -> None:
        """To be made on the main thread.  Each handler is called on the loop's; those of `stops`
        are to end the process within `timeout_s`, unless `refused` is called."""
        self._loop = loop
        self._handlers = handlers
        self._last_resort = last_resort
        self._stops = stops
        self._timeout_s = timeout_s
        self._deadline_s: float | None = None
        self._heard, told = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # The thread first: a signal that is taken must have somebody who hears it.
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        for number in handlers:
            signal.signal(number, lambda *_: None)  # the interpreter writes the number into `told`
            signal.siginterrupt(number, False)

    def refused(self) -> None:
        """The stop was refused: the process goes on."""
        self._deadline_s = None

    def _listen(self) -> None:
        poll = select.poll()
        poll.register(self._heard, select.POLLIN)
        while True:
            if poll.poll(self._remaining_ms()):
                for number in map(signal.Signals, os.read(self._heard, 64)):
                    self._take(number)
            elif self._remaining_ms() == 0:
                self._last_resort.end(
                    TimeOutError(
                        f"the stop did not end the process in {self._timeout_s:g} s",
                        "something it waits for does not answer: see the log, and dmesg; the next"
                        " start copies what the record names",
                    )
                )

    def _remaining_ms(self) -> int | None:
        deadline_s = self._deadline_s
        return None if deadline_s is None else max(0, int((deadline_s - time.monotonic()) * 1000))

    def _take(self, number: signal.Signals) -> None:
        handler = self._handlers.get(number)
        if handler is None:
            return
        if number in self._stops and self._deadline_s is None:
            self._deadline_s = time.monotonic() + self._timeout_s
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is about to end
            self._loop.call_soon_threadsafe(handler)
