"""Kernel AIO for one event loop: queue, submit in batches, complete on the loop's thread.

Reads, writes and fdatasync go through `io_submit`, so that any number of them are in flight
from one thread; system calls without an asynchronous form run on a few worker threads.  Kernel
AIO is used rather than io_uring because container run-times and hardened kernels switch the
latter off, and rather than threads because of the measurement in docs/decisions/0001.

1. `done` is called on the loop's thread, from `kick` or the event file descriptor, never from a
   submitting call.
2. Operations queue up until `kick`; if nobody kicks, the loop does at its next turn.
3. At most `depth` operations are at the kernel; the rest wait in order of submission.
4. A short transfer is carried on where it stopped; no progress at all is EIO, which names the file
   and where it ends.

There are files on which AIO does all the work inside `io_submit` (those in memory, and those that
are not open for direct I/O).  For them there are `read_now` and `write_now`, plain calls at a
third of the price, and `read_aside` and `write_aside`, calls of a thread.  Whoever opens a file
chooses; 1 and 4 hold for all of them.

Numbers and structures are those of <linux/aio_abi.h>.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import mmap
import os
import platform
import struct
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, TypeVar

from bitmapd.errors import BitmapdError
from bitmapd.media.base import Done
from bitmapd.media.buffers import address_of
from bitmapd.media.workers import PREAD, PWRITE, Operation, Workers, transfer

FDSYNC = 3
RWF_DSYNC = 2
WORKERS = 4
_RESFD = 1
_RING_MAGIC = 0xA10A10A1
# Words of the ring's header.
_RING_SIZE_AT, _RING_HEAD_AT, _RING_TAIL_AT, _RING_MAGIC_AT, _RING_HEADER_AT = 1, 2, 3, 4, 7
_RING_HEADER_BYTES = 32
# Python has no memory barriers.  Where the processor may read an event before the tail that
# announces it, the ring only tells whether there is something to ask the kernel for.
_READS_IN_ORDER = platform.machine() == "x86_64"
_IOCB_BYTES = 64
_EVENT_BYTES = 32
_ROUNDS = 8  # of reaping in one kick, so that instant completions cannot hold the loop for ever

# io_setup, io_destroy, io_getevents, io_submit
_SYSCALLS = {
    "x86_64": (206, 207, 208, 209),
    "aarch64": (0, 1, 4, 2),
    "riscv64": (0, 1, 4, 2),
    "loongarch64": (0, 1, 4, 2),
    "ppc64le": (227, 228, 229, 230),
}

# data, key, rw_flags, opcode, priority, fd, buffer, length, offset, reserved, flags, eventfd
_IOCB = struct.Struct("<QIIHhIQQqQII")

T = TypeVar("T")


def _words(address: int, length_bytes: int, kind: Literal["I", "q"]) -> memoryview:
    """Memory at an address, as unsigned words of 32 bits (I) or signed ones of 64 (q)."""
    return memoryview((ctypes.c_char * length_bytes).from_address(address)).cast("B").cast(kind)


def _no_progress(fd: int, offset_bytes: int) -> str:
    """Why nothing could be transferred: usually a medium that has shrunk."""
    try:
        path = os.readlink(f"/proc/self/fd/{fd}")
        end_bytes = os.lseek(fd, 0, os.SEEK_END)
    except OSError:
        return f"no progress at byte {offset_bytes}"
    if end_bytes <= offset_bytes:
        return f"{path} ends at byte {end_bytes}"
    return f"no progress at byte {offset_bytes} of {path}"


class AioEngine:
    """One AIO context bound to one asyncio loop; see the module docstring."""

    def __init__(self, loop: asyncio.AbstractEventLoop, depth: int = 256) -> None:
        numbers = _SYSCALLS.get(platform.machine())
        if numbers is None or sys.byteorder != "little":
            raise BitmapdError(f"asynchronous I/O is not supported on {platform.machine()}")
        setup, self._destroy, getevents, submit = numbers
        libc = ctypes.CDLL(None, use_errno=True)
        libc.syscall.restype = ctypes.c_long
        self._syscall = libc.syscall
        context = ctypes.c_ulong(0)
        if libc.syscall(ctypes.c_long(setup), ctypes.c_long(depth), ctypes.byref(context)) != 0:
            number = ctypes.get_errno()
            raise BitmapdError(
                f"the kernel refused an AIO context of {depth} operations: {os.strerror(number)}",
                hint="raise the sysctl fs.aio-max-nr" if number == errno.EAGAIN else None,
            )
        self.loop = loop
        self.depth = depth
        self.before_submit: list[Callable[[], None]] = []
        self.after_reap: list[Callable[[], None]] = []
        self._context = ctypes.c_ulong(context.value)
        self._iocbs = mmap.mmap(-1, depth * _IOCB_BYTES)
        self._iocbs_at = address_of(memoryview(self._iocbs))
        self._pointers = (ctypes.c_uint64 * depth)()
        self._pointers_at = ctypes.addressof(self._pointers)
        self._arg_pointers = ctypes.c_void_p(self._pointers_at)
        self._arg_counts = [ctypes.c_long(count) for count in range(depth + 1)]
        self._arg_submit = ctypes.c_long(submit)
        self._arg_getevents = ctypes.c_long(getevents)
        self._arg_zero = ctypes.c_long(0)
        self._events = mmap.mmap(-1, depth * _EVENT_BYTES)
        self._event_words = memoryview(self._events).cast("q")
        self._arg_events = ctypes.c_void_p(address_of(memoryview(self._events)))
        # The context's address is that of a ring which user space may read, and take events from:
        # that saves a system call a batch, and another whenever nothing has completed.
        self._ring = _words(context.value, _RING_HEADER_BYTES, "I")
        self._ring_usable = (
            self._ring[_RING_MAGIC_AT] == _RING_MAGIC
            and self._ring[_RING_HEADER_AT] == _RING_HEADER_BYTES
        )
        self._ring_events: memoryview | None = None
        if self._ring_usable and _READS_IN_ORDER:
            length = self._ring[_RING_SIZE_AT] * _EVENT_BYTES
            self._ring_events = _words(context.value + _RING_HEADER_BYTES, length, "q")
        self._free = list(range(depth - 1, -1, -1))
        self._slots: list[Operation | None] = [None] * depth
        self._queue: deque[Operation] = deque()
        self._kick_scheduled = False
        self._inside = False
        self._executor = ThreadPoolExecutor(4, thread_name_prefix="media")
        self._workers: Workers | None = None
        self._finished: deque[tuple[Operation, int]] = deque()  # without the kernel's queue
        self._outside = 0  # in there, or on their way
        self._offloaded = 0
        self._fdsync_works = True
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        loop.add_reader(self._eventfd, self._on_eventfd)

    @property
    def in_flight(self) -> int:
        """Operations that were submitted and have not called back yet."""
        at_kernel = self.depth - len(self._free)
        return at_kernel + len(self._queue) + self._outside + self._offloaded

    # -- submitting -----------------------------------------------------------------------
    def read(self, fd: int, offset_bytes: int, buffer: memoryview, done: Done) -> None:
        self._enqueue((PREAD, fd, buffer, len(buffer), offset_bytes, 0, done))

    def write(
        self, fd: int, offset_bytes: int, buffer: memoryview, done: Done, fua: bool = False
    ) -> None:
        flags = RWF_DSYNC if fua else 0
        # As `_enqueue`, written out: every write of a host comes by here.
        self._queue.append((PWRITE, fd, buffer, len(buffer), offset_bytes, flags, done))
        if not self._inside and not self._kick_scheduled:
            self._kick_scheduled = True
            self.loop.call_soon(self._scheduled_kick)

    # Where kernel AIO would do the work inside `io_submit` a plain call costs a third of it; what
    # the loop should not wait for goes to a thread.
    def read_now(self, fd: int, offset_bytes: int, buffer: memoryview, done: Done) -> None:
        """As `read`, by a call that blocks."""
        operation = (PREAD, fd, buffer, len(buffer), offset_bytes, 0, done)
        self._called(operation, transfer(operation))

    def write_now(
        self, fd: int, offset_bytes: int, buffer: memoryview, done: Done, fua: bool = False
    ) -> None:
        flags = RWF_DSYNC if fua else 0
        operation = (PWRITE, fd, buffer, len(buffer), offset_bytes, flags, done)
        self._called(operation, transfer(operation))

    def read_aside(self, fd: int, offset_bytes: int, buffer: memoryview, done: Done) -> None:
        """As `read`, by a call of a thread."""
        self._hand_over((PREAD, fd, buffer, len(buffer), offset_bytes, 0, done))

    def write_aside(
        self, fd: int, offset_bytes: int, buffer: memoryview, done: Done, fua: bool = False
    ) -> None:
        flags = RWF_DSYNC if fua else 0
        self._hand_over((PWRITE, fd, buffer, len(buffer), offset_bytes, flags, done))

    def flush(self, fd: int, done: Done) -> None:
        if self._fdsync_works:
            self._enqueue((FDSYNC, fd, None, 0, 0, 0, done))
        else:
            self.offload(lambda: os.fdatasync(fd), lambda error, _: done(error))

    def offload(
        self, call: Callable[[], T], done: Callable[[OSError | None, T | None], None]
    ) -> None:
        """Run a blocking call on a worker thread; only OSError counts as its failure."""
        self._offloaded += 1
        future = self._executor.submit(call)
        future.add_done_callback(
            lambda finished: self.loop.call_soon_threadsafe(self._offload_done, finished, done)
        )

    def _offload_done(
        self, future: Future[T], done: Callable[[OSError | None, T | None], None]
    ) -> None:
        self._offloaded -= 1
        error = future.exception()
        if error is None:
            done(None, future.result())
        elif isinstance(error, OSError):
            done(error, None)
        else:
            raise error

    def _enqueue(self, operation: Operation) -> None:
        self._queue.append(operation)
        if not self._inside and not self._kick_scheduled:
            self._kick_scheduled = True
            self.loop.call_soon(self._scheduled_kick)

    def _called(self, operation: Operation, result: int) -> None:
        self._outside += 1
        self._finished.append((operation, result))
        if not self._inside and not self._kick_scheduled:
            self._kick_scheduled = True
            self.loop.call_soon(self._scheduled_kick)

    def _hand_over(self, operation: Operation) -> None:
        if self._workers is None:
            self._workers = Workers(
                WORKERS, self._finished, lambda: os.eventfd_write(self._eventfd, 1)
            )
        self._outside += 1
        self._workers.submit(operation)

    def cork(self) -> None:
        """Promise that `kick` will be called before the loop's next turn."""
        self._inside = True

    def _scheduled_kick(self) -> None:
        self._kick_scheduled = False
        self.kick()

    def kick(self) -> None:
        """Submit what is queued and complete what is finished."""
        self._inside = True
        ring = self._ring
        for _ in range(_ROUNDS):
            for hook in self.before_submit:
                hook()
            if self._queue and self._free:
                self._submit()
            if self._finished:
                self._collect()
                continue
            nothing = self._ring_usable and ring[_RING_HEAD_AT] == ring[_RING_TAIL_AT]
            if nothing or not self._reap():
                break
        self._inside = False
        if (self._finished or (self._queue and self._free)) and not self._kick_scheduled:
            self._kick_scheduled = True
            self.loop.call_soon(self._scheduled_kick)

    def _submit(self) -> None:
        queue, free, slots = self._queue, self._free, self._slots
        pack, iocbs, eventfd = _IOCB.pack_into, self._iocbs, self._eventfd
        pointers, base = self._pointers, self._iocbs_at
        count = 0
        while queue and free:
            operation = queue.popleft()
            opcode, fd, buffer, length, offset, flags, _ = operation
            slot = free.pop()
            slots[slot] = operation
            at = 0 if buffer is None else address_of(buffer)
            place = slot * _IOCB_BYTES
            pack(
                iocbs, place, slot, 0, flags, opcode, 0, fd, at, length, offset, 0, _RESFD, eventfd
            )
            pointers[count] = base + place
            count += 1
        start = 0
        while start < count:
            accepted = self._syscall(
                self._arg_submit,
                self._context,
                self._arg_counts[count - start],
                ctypes.c_void_p(self._pointers_at + 8 * start) if start else self._arg_pointers,
            )
            if accepted > 0:
                start += accepted
                continue
            number = ctypes.get_errno()
            if number == errno.EINTR:
                continue
            if number == errno.EAGAIN and len(free) + count - start < self.depth:
                # The kernel is out of room for now; completions will make some.
                self._requeue(start, count)
                return
            slot = (pointers[start] - base) // _IOCB_BYTES
            start += 1
            self.loop.call_soon(self._refused, slot, number)

    def _requeue(self, start: int, count: int) -> None:
        for position in range(count - 1, start - 1, -1):
            slot = (self._pointers[position] - self._iocbs_at) // _IOCB_BYTES
            operation = self._slots[slot]
            self._slots[slot] = None
            self._free.append(slot)
            if operation is not None:
                self._queue.appendleft(operation)

    # -- completing -----------------------------------------------------------------------
    def _on_eventfd(self) -> None:
        try:
            os.eventfd_read(self._eventfd)
        except BlockingIOError:
            return
        self.kick()

    def _reap(self) -> int:
        """Complete what the kernel has finished; returns how much that was."""
        events = self._ring_events
        finished = self._ask_for_events() if events is None else self._take_events(events)
        slots, free = self._slots, self._free
        for slot, result in finished:
            operation = slots[slot]
            if operation is None:
                raise RuntimeError(f"the kernel completed what was not in flight: slot {slot}")
            slots[slot] = None
            free.append(slot)
            if result == operation[3]:
                operation[6](None)
            else:
                self._fell_short(operation, result)
        if finished:
            for hook in self.after_reap:
                hook()
        return len(finished)

    def _take_events(self, events: memoryview) -> list[tuple[int, int]]:
        ring = self._ring
        head, tail, size = ring[_RING_HEAD_AT], ring[_RING_TAIL_AT], ring[_RING_SIZE_AT]
        finished = []
        while head != tail:
            finished.append((events[4 * head], events[4 * head + 2]))
            head = head + 1 if head + 1 < size else 0
        ring[_RING_HEAD_AT] = head
        return finished

    def _ask_for_events(self) -> list[tuple[int, int]]:
        count = self._syscall(
            self._arg_getevents,
            self._context,
            self._arg_zero,
            self._arg_counts[self.depth],
            self._arg_events,
            None,
        )
        words = self._event_words
        return [(words[4 * i], words[4 * i + 2]) for i in range(max(int(count), 0))]

    def _collect(self) -> None:
        """Complete what blocking calls have finished; what that leads to has its turn later."""
        finished = self._finished
        for _ in range(len(finished)):
            operation, result = finished.popleft()
            self._outside -= 1
            if result == operation[3]:
                operation[6](None)
            else:
                self._fell_short(operation, result)
        for hook in self.after_reap:
            hook()

    def _refused(self, slot: int, number: int) -> None:
        """The kernel did not take an operation."""
        operation = self._slots[slot]
        self._slots[slot] = None
        self._free.append(slot)
        if operation is not None:
            self._fell_short(operation, -number)

    def _fell_short(self, operation: Operation, result: int) -> None:
        """Anything but the whole length: an error, or a part of the transfer."""
        opcode, fd, buffer, length, offset, flags, done = operation
        if result < 0:
            if opcode == FDSYNC and result == -errno.EINVAL:
                # Kernels before 4.18 do not know the operation.
                self._fdsync_works = False
                self.flush(fd, done)
                return
            done(OSError(-result, os.strerror(-result)))
        elif result == 0 or buffer is None:
            done(OSError(errno.EIO, _no_progress(fd, offset)))
        else:
            rest = buffer[result:]
            self._enqueue((opcode, fd, rest, length - result, offset + result, flags, done))

    def close(self) -> None:
        """Free the context; blocks until the kernel has finished what is in flight."""
        self.loop.remove_reader(self._eventfd)
        self._executor.shutdown(wait=True)
        if self._workers is not None:
            self._workers.close()
        self._syscall(ctypes.c_long(self._destroy), self._context)
        self._ring.release()
        if self._ring_events is not None:
            self._ring_events.release()
        os.close(self._eventfd)
