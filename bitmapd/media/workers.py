"""Threads that carry out blocking calls, so that the loop goes on meanwhile.

Calls that have no asynchronous form, and transfers for which kernel AIO would do all the work
inside `io_submit`: a file in memory (tmpfs) is copied to and from there.  The calls release the
interpreter lock.

1. Every job that was handed in runs once, and what it returns is put into `finished` once.  `wake`
   is called after that, on the worker's thread.  Nothing else is shared; what becomes of an answer
   is for the loop.
2. Jobs begin in the order in which they were handed in and end in any.
3. All threads run from the beginning: nothing that is handed in can fail for want of one.
4. `close` returns when everything that was handed in has been put there.

A job answers for its own exceptions (`attempt`, `transfer`).  One that raises all the same ends its
thread and, by way of `threading.excepthook`, the process (`bitmapd.lastresort`).
"""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

from bitmapd.media.base import Done

PREAD = 0
PWRITE = 1

# opcode of kernel AIO, descriptor, buffer, length, offset, flags, done
Operation = tuple[int, int, memoryview | None, int, int, int, Done]

T = TypeVar("T")


class Workers(Generic[T]):
    """See the module docstring.  OSError if the threads cannot be had."""

    def __init__(
        self, count: int, name: str, finished: deque[T], wake: Callable[[], object]
    ) -> None:
        self._finished = finished
        self._wake = wake
        self._waiting: SimpleQueue[Callable[[], T] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        for number in range(count):
            thread = threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                self.close()
                raise OSError(errno.EAGAIN, f"cannot start a thread: {error}") from error
            self._threads.append(thread)

    def submit(self, job: Callable[[], T]) -> None:
        self._waiting.put(job)

    def close(self) -> None:
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        waiting, finished, wake = self._waiting, self._finished, self._wake
        while (job := waiting.get()) is not None:
            finished.append(job())
            del job  # and its buffer, which an idle pool gives up
            wake()


def attempt(call: Callable[[], T]) -> tuple[BaseException | None, T | None]:
    """What a call raises, or returns.  Want of memory is an error like any other."""
    try:
        return None, call()
    except MemoryError:
        return OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), None
    except BaseException as error:  # noqa: BLE001  (raised again where somebody hears of it)
        return error, None


def transfer(operation: Operation) -> int:
    """Carry out a read or write; the result is that of kernel AIO."""
    opcode, fd, buffer, _, offset_bytes, flags, _ = operation
    if buffer is None:
        return -errno.EINVAL
    try:
        if opcode == PREAD:
            return os.preadv(fd, (buffer,), offset_bytes)
        if flags:
            return os.pwritev(fd, (buffer,), offset_bytes, flags)
        return os.pwrite(fd, buffer, offset_bytes)
    except OSError as error:
        return -(error.errno or errno.EIO)
    except MemoryError:
        return -errno.ENOMEM
