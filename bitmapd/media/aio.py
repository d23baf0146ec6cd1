"""Kernel AIO for one event loop: queue, submit in batches, complete on the loop's thread.

Reads, writes and fdatasync go through `io_submit`, so that any number of them are in flight
from one thread; system calls without an asynchronous form run on a few worker threads.  Kernel
AIO is used rather than io_uring because container run-times and hardened kernels switch the
latter off, and rather than threads because of the measurement in docs/decisions/0001.

1. Each operation's `done` is called once, on the loop's thread, from `kick` or the event file
   descriptor, never from a submitting call.
2. Operations queue up until `kick`; if nobody kicks, the loop does at its next turn.
3. At most `depth` operations are at the kernel; the rest wait in order of submission.  What the
   kernel has no memory for (EAGAIN) waits there too and is submitted again.
4. A short transfer is carried on where it stopped; no progress at all is EIO, which names the file
   and where it ends.
5. A `done`, a hook or a call of `call_soon` that raises costs nobody else anything: the exception
   goes to the loop's exception handler (which in bitmapd ends the process), and the rest of the
   batch is completed.

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
from functools import partial
from typing import Any, Literal, TypeVar, cast

from bitmapd.errors import BitmapdError
from bitmapd.media.base import Done
from bitmapd.media.buffers import address_of
from bitmapd.media.workers import PREAD, PWRITE, Operation, Workers, attempt, transfer

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
_RETRY_S = 0.01  # after the kernel had no memory for an operation

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
Returned = Callable[[OSError | None, T | None], None]


def _numbers() -> tuple[int, int, int, int]:
    """The system calls of this process, which are those of its own word size."""
    machine, bits = platform.machine(), 8 * ctypes.sizeof(ctypes.c_void_p)
    numbers = _SYSCALLS.get(machine)
    if numbers is None or sys.byteorder != "little":
        raise BitmapdError(f"asynchronous I/O is not supported on {machine}")
    if bits != 64:
        raise BitmapdError(
            f"a Python of {bits} bits cannot serve a volume on {machine}: the system calls of its"
            " kernel have other numbers for it",
            hint=f"install and use a 64-bit Python in place of {sys.executable}",
        )
    return numbers


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
        setup, self._destroy, getevents, submit = _numbers()
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
        self.time, self.call_later = loop.time, loop.call_later
        self.after_reap: list[Callable[[], None]] = []
        self.on_shut_out: Callable[[], None] | None = None  # told after each EBADE
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
        self._due: list[Callable[[], None]] = []  # of `call_soon`
        self._kick_scheduled = False
        self._inside = False
        self._no_memory = False  # of the kernel, for what is in the queue
        self._closed = False
        self._idle_waiters: list[Callable[[], None]] = []
        # Completed without the kernel's queue: transfers, and other calls of threads.
        self._finished: deque[tuple[Operation, int]] = deque()
        self._returned: deque[tuple[Returned[Any], BaseException | None, Any]] = deque()
        self._outside = 0  # in there, or on their way
        self._fdsync_works = True
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wake = partial(os.eventfd_write, self._eventfd, 1)
        self._callers: Workers[Any] = Workers(WORKERS, "media", self._returned, self._wake)
        self._asides: Workers[Any] | None = None
        self._copiers: Workers[Any] | None = None
        loop.add_reader(self._eventfd, self._on_eventfd)

    def work_aside(self) -> None:
        """Have threads for what hosts do not wait for; OSError if they cannot be had.

        What is handed to them may hang as long as it likes: they have nothing else to do.
        """
        if self._copiers is None:
            self._copiers = Workers(WORKERS, "transfer", self._finished, self._wake)
        if self._asides is None:
            self._asides = Workers(WORKERS, "aside", self._returned, self._wake)

    @property
    def in_flight(self) -> int:
        """Operations that were submitted and have not called back yet."""
        at_kernel = self.depth - len(self._free)
        return at_kernel + len(self._queue) + self._outside

    def when_idle(self, call: Callable[[], None]) -> None:
        """Call back once, from the loop, when nothing is in flight."""
        self._idle_waiters.append(call)
        self._schedule_kick()

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
            self._schedule_kick()

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

    def offload(self, call: Callable[[], T], done: Returned[T], *, aside: bool = False) -> None:
        """Run a blocking call on a worker thread.

        OSError is its failure; any other exception is a mistake, which `done` hears of as EIO.
        `aside`: on one of those that `work_aside` begins.
        """
        workers = self._asides if aside and self._asides is not None else self._callers
        self._outside += 1
        workers.submit(lambda: (done, *attempt(call)))

    async def call(self, call: Callable[[], T], *, aside: bool = False) -> T:
        """Await a blocking call on a worker thread; what it raises is raised here."""
        answer: asyncio.Future[tuple[BaseException | None, T | None]] = self.loop.create_future()

        def returned(
            _: OSError | None, found: tuple[BaseException | None, T | None] | None
        ) -> None:
            if found is not None and not answer.done():
                answer.set_result(found)

        self.offload(lambda: attempt(call), returned, aside=aside)
        error, value = await answer
        if error is not None:
            raise error
        return cast(T, value)

    def answer(self, done: Done, error: OSError | None) -> None:
        """Complete a request outside of the engine, as invariant 5 has it."""
        self._guarded(partial(done, error))

    def _enqueue(self, operation: Operation) -> None:
        self._queue.append(operation)
        if not self._inside and not self._kick_scheduled:
            self._schedule_kick()

    def _called(self, operation: Operation, result: int) -> None:
        self._outside += 1
        self._finished.append((operation, result))
        if not self._inside and not self._kick_scheduled:
            self._schedule_kick()

    def _hand_over(self, operation: Operation) -> None:
        if self._copiers is None:
            self._called(operation, transfer(operation))
            return
        self._outside += 1
        self._copiers.submit(lambda: (operation, transfer(operation)))

    def call_soon(self, callback: Callable[..., Any], *args: Any) -> None:
        """As the loop's, but at the end of this batch, before what is queued is submitted."""
        self._due.append(partial(callback, *args) if args else callback)
        if not self._inside:
            self._schedule_kick()

    def _schedule_kick(self) -> None:
        if not self._kick_scheduled:
            self._kick_scheduled = True
            self.loop.call_soon(self._scheduled_kick)

    def cork(self) -> None:
        """Promise that `kick` will be called before the loop's next turn."""
        self._inside = True

    def _scheduled_kick(self) -> None:
        self._kick_scheduled = False
        self.kick()

    def kick(self) -> None:
        """Submit what is queued and complete what is finished."""
        if self._closed:
            return
        self._inside = True
        ring = self._ring
        try:
            for _ in range(_ROUNDS):
                if self._due:
                    due, self._due = self._due, []
                    for call in due:
                        self._guarded(call)
                    continue
                if self._queue and self._free and not self._no_memory:
                    self._submit()
                if self._finished or self._returned:
                    self._collect()
                    continue
                nothing = self._ring_usable and ring[_RING_HEAD_AT] == ring[_RING_TAIL_AT]
                if nothing or not self._reap():
                    break
        finally:
            self._inside = False
        submits = self._queue and self._free and not self._no_memory
        if submits or self._due or self._finished or self._returned:
            self._schedule_kick()
        elif self._idle_waiters and not self.in_flight:
            waiting, self._idle_waiters = self._idle_waiters, []
            for call in waiting:
                self.loop.call_soon(call)

    def _guarded(self, call: Callable[[], None]) -> None:
        """Call a hook; see invariant 5."""
        try:
            call()
        except Exception as error:  # noqa: BLE001  (reported, and not at others' expense)
            self._mistake(error)

    def _mistake(self, error: BaseException) -> None:
        what = "a completion, or a hook of the disk engine, raised an exception"
        self.loop.call_exception_handler({"message": what, "exception": error})

    def _memory_again(self) -> None:
        self._no_memory = False
        self.kick()

    def _submit(self) -> None:
        queue, free, slots = self._queue, self._free, self._slots
        pack, iocbs, eventfd = _IOCB.pack_into, self._iocbs, self._eventfd
        pointers, base = self._pointers, self._iocbs_at
        count = 0
        while queue and free:
            operation = queue.popleft()
            opcode, fd, buffer, length, offset, flags, _ = operation
            slot = free[-1]
            to = slot * _IOCB_BYTES
            try:
                at = 0 if buffer is None else address_of(buffer)
                pack(
                    iocbs, to, slot, 0, flags, opcode, 0, fd, at, length, offset, 0, _RESFD, eventfd
                )
            except Exception as error:  # noqa: BLE001  (no buffer, or no offset, of a medium)
                self._mistake(error)
                self._called(operation, -errno.EINVAL)
                continue
            free.pop()
            slots[slot] = operation
            pointers[count] = base + to
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
            if number == errno.EAGAIN:
                # The kernel has no memory for it now (aio_get_req in fs/aio.c).
                self._requeue(start, count)
                self._no_memory = True
                self.loop.call_later(_RETRY_S, self._memory_again)
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
            try:
                if result == operation[3]:
                    operation[6](None)
                else:
                    self._fell_short(operation, result)
            except Exception as error:  # noqa: BLE001  (as `_guarded`, without a call more)
                self._mistake(error)
        if finished:
            for hook in self.after_reap:
                self._guarded(hook)
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
        finished, returned = self._finished, self._returned
        for _ in range(len(finished)):
            operation, result = finished.popleft()
            self._outside -= 1
            try:
                if result == operation[3]:
                    operation[6](None)
                else:
                    self._fell_short(operation, result)
            except Exception as error:  # noqa: BLE001  (as `_guarded`, without a call more)
                self._mistake(error)
        for _ in range(len(returned)):
            done, problem, value = returned.popleft()
            self._outside -= 1
            if problem is not None and not isinstance(problem, OSError):
                self._mistake(problem)
                problem = OSError(errno.EIO, f"a mistake of the program: {problem!r}")
            if problem is not None:
                self._look(problem.errno)
            self._guarded(partial(done, problem, value))
        for hook in self.after_reap:
            self._guarded(hook)

    def _refused(self, slot: int, number: int) -> None:
        """The kernel did not take an operation."""
        operation = self._slots[slot]
        self._slots[slot] = None
        self._free.append(slot)
        if operation is not None:
            self._guarded(partial(self._fell_short, operation, -number))

    def _fell_short(self, operation: Operation, result: int) -> None:
        """Anything but the whole length: an error, or a part of the transfer."""
        opcode, fd, buffer, length, offset, flags, done = operation
        if result < 0:
            if opcode == FDSYNC and result == -errno.EINVAL:
                # Kernels before 4.18 do not know the operation.
                self._fdsync_works = False
                self.flush(fd, done)
                return
            self._look(-result)
            done(OSError(-result, os.strerror(-result)))
        elif result == 0 or buffer is None:
            done(OSError(errno.EIO, _no_progress(fd, offset)))
        else:
            rest = buffer[result:]
            self._enqueue((opcode, fd, rest, length - result, offset + result, flags, done))

    def _look(self, number: int | None) -> None:
        """EBADE is the kernel's word for a reservation conflict (BLK_STS_RESV_CONFLICT), of SCSI
        and of NVMe: the storage takes nothing from this machine any more."""
        if number == errno.EBADE and self.on_shut_out is not None:
            self.loop.call_soon(self.on_shut_out)

    def close(self) -> None:
        """Free the context; blocks until the kernel has finished what is in flight."""
        self._closed = True
        self.loop.remove_reader(self._eventfd)
        for workers in (self._callers, self._asides, self._copiers):
            if workers is not None:
                workers.close()
        self._syscall(ctypes.c_long(self._destroy), self._context)
        self._ring.release()
        if self._ring_events is not None:
            self._ring_events.release()
        os.close(self._eventfd)
