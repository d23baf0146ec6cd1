"""Threads that carry out transfers with blocking calls, where kernel AIO would block the loop.

A file in memory (tmpfs) is copied to and from inside `io_submit`, so one thread would do all the
copying.  These threads copy while the loop goes on: the calls release the interpreter lock.

1. Every operation that was handed in is put into `finished` once, with what kernel AIO would have
   reported: the number of bytes, or a negative error number.  `wake` is called after that, on the
   worker's thread.  Nothing else is shared, and nobody but the loop calls a `done`.
2. Operations begin in the order in which they were handed in and end in any.
3. `close` returns when everything that was handed in has been put there.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

from bitmapd.media.base import Done

PREAD = 0
PWRITE = 1

# opcode of kernel AIO, descriptor, buffer, length, offset, flags, done
Operation = tuple[int, int, memoryview | None, int, int, int, Done]


class Workers:
    """See the module docstring; the threads run from the beginning."""

    def __init__(
        self,
        count: int,
        finished: deque[tuple[Operation, int]],
        wake: Callable[[], None],
    ) -> None:
        self._finished = finished
        self._wake = wake
        self._waiting: SimpleQueue[Operation | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"transfer-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, operation: Operation) -> None:
        self._waiting.put(operation)

    def close(self) -> None:
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        waiting, finished, wake = self._waiting, self._finished, self._wake
        while (operation := waiting.get()) is not None:
            finished.append((operation, transfer(operation)))
            wake()


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
