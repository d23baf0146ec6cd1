"""The request log: what hosts change, written to a file that `dmctl simulate` reads.

A line for each write, zeroing and trim that reaches the gate, in the CSV format of
`dmctl.simulate.formats`: `time_s,op,offset_bytes,length_bytes`, op W, Z or T, the time in seconds
since 1970.  In dm mode the kernel answers for recorded extents itself, and only requests that come
to the gate are seen.

1. A request costs one tuple on the loop's thread.  A thread of its own makes text of them and
   writes it; neither the loop nor a host ever waits for the file.
2. Memory is bounded: at most `BATCHES` batches wait for the thread.  What comes on top is dropped
   and counted, and a line `# N requests were not recorded` stands in its place.
3. The first error of the file ends the log, and is an event.  The volume goes on.
4. The file is appended to, so a log goes on after a restart.  What a crash leaves ends with a batch
   or in the middle of a line.

A log on a file system of the volume itself would record its own writes; it does no harm otherwise.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
from asyncio import AbstractEventLoop
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from bitmapd.errors import BitmapdError, ExistsError, UsageError
from bitmapd.gate.gate import Gate

HEADER = b"time_s,op,offset_bytes,length_bytes\n"
BATCH_REQUESTS = 1024
BATCHES = 32
CLOSE_PATIENCE_S = 5.0
_NEW_FILE = "name a new file for the log"

Entry = tuple[float, str, int, int]
Batch = tuple[list[Entry], int]  # and how many were dropped before it
Failed = Callable[[OSError], None]


def open_log(path: str | Path) -> int:
    """A descriptor to append to.

    `UsageError` if it is no regular file, `ExistsError` if it is one that holds something else: the
    name of a medium, or of the volume's own configuration, is soon given by mistake."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    fd = os.open(path, flags, 0o600)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise UsageError(f"{path} is not a regular file", hint=_NEW_FILE)
        if found.st_size > 0 and os.pread(fd, len(HEADER), 0) != HEADER:
            raise ExistsError(f"{path} exists and is not a log of requests", hint=_NEW_FILE)
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_log(path: str | Path) -> None:
    """Whether a log could be written there; raises what is against it."""
    os.close(open_log(path))


class RequestLog:
    """See the module docstring.  All methods are called on the loop's thread; `failed` is called
    on the log's own."""

    def __init__(self, path: str | Path, wall_clock_offset_s: float, failed: Failed) -> None:
        """`wall_clock_offset_s` is what makes seconds since 1970 of the loop's time."""
        self.path = str(path)
        self.dropped = 0
        self._offset_s = wall_clock_offset_s
        self._failed = failed
        self._entries: list[Entry] = []
        self._dropped_since = 0
        self._queue: SimpleQueue[Batch | None] = SimpleQueue()
        self._fd = open_log(path)
        self._thread = threading.Thread(target=self._work, name="request-log", daemon=True)
        self._thread.start()

    def note(self, now_s: float, op: str, offset_bytes: int, length_bytes: int) -> None:
        """A request has arrived, at this time of the loop."""
        entries = self._entries
        entries.append((now_s, op, offset_bytes, length_bytes))
        if len(entries) >= BATCH_REQUESTS:
            self.flush()

    def flush(self) -> None:
        """Hand over what was noted; once a second, so that the file is never far behind."""
        if not self._entries:
            return
        if self._queue.qsize() < BATCHES:
            self._queue.put((self._entries, self._dropped_since))
            self._dropped_since = 0
        else:
            self._dropped_since += len(self._entries)
            self.dropped += len(self._entries)
        self._entries = []

    def close(self) -> None:
        """Write what was noted, and end; a file that hangs is left alone after a while."""
        self.flush()
        self._queue.put(None)
        self._thread.join(CLOSE_PATIENCE_S)

    # -- the thread -----------------------------------------------------------------------
    def _work(self) -> None:
        try:
            if os.fstat(self._fd).st_size == 0:
                self._write(HEADER)
            while (batch := self._queue.get()) is not None:
                self._write(self._text(*batch))
        except OSError as error:
            self._failed(error)
        finally:
            os.close(self._fd)

    def _text(self, entries: list[Entry], dropped: int) -> bytes:
        offset_s = self._offset_s
        lines = [f"# {dropped} requests were not recorded\n"] if dropped else []
        lines += [f"{now_s + offset_s:.6f},{op},{at},{n}\n" for now_s, op, at, n in entries]
        return "".join(lines).encode()

    def _write(self, text: bytes) -> None:
        rest = memoryview(text)
        while rest:
            rest = rest[os.write(self._fd, rest) :]


class Recording:
    """Whether and where the requests of one gate are recorded."""

    def __init__(self, gate: Gate, loop: AbstractEventLoop, emit: Callable[..., None]) -> None:
        self._gate = gate
        self._loop = loop
        self._emit = emit
        self._log: RequestLog | None = None

    @property
    def dropped(self) -> int:
        """Requests that the present log had no room for."""
        return 0 if self._log is None else self._log.dropped

    def record_to(self, path: str | None) -> None:
        """Begin, go on or end; what is against it is told, and keeps nobody from anything."""
        if self._log is not None:
            if self._log.path == path:
                return
            self.close()
        if path is None:
            return
        offset_s = time.time() - self._loop.time()
        try:
            self._log = RequestLog(path, offset_s, partial(self._failed, path))
        except (OSError, BitmapdError) as error:
            self._tell(path, error)
            return
        self._gate.watch = self._log.note

    def flush(self) -> None:
        """Once a second."""
        if self._log is not None:
            self._log.flush()

    def close(self) -> None:
        """End the log, if there is one."""
        self._gate.watch = None
        if self._log is not None:
            log, self._log = self._log, None
            log.close()

    def _failed(self, path: str, error: OSError) -> None:
        """On the log's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
            self._loop.call_soon_threadsafe(self._ended, path, error)

    def _ended(self, path: str, error: OSError) -> None:
        self._tell(path, error)
        if self._log is not None and self._log.path == path:
            self.close()

    def _tell(self, path: str, error: Exception) -> None:
        text = error.strerror if isinstance(error, OSError) else str(error)
        self._emit("trace-error", file=path, message=f"cannot record requests to {path}: {text}")
