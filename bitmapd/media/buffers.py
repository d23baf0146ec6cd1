"""Page-aligned buffers for direct I/O, from a pool with a limit.

Every buffer is its own private anonymous mapping, so its address is a multiple of the page size
as O_DIRECT wants it on every kernel (since 6.0 some devices ask for less, none for more).  Sizes
are rounded up to a power of two, and returned mappings are kept by size for the next taker.

1. The sum of the buffers that are out never exceeds the limit, with one exception: when none is
   out the limit refuses nothing, so the largest request can proceed whatever it is.
2. Buffers kept for reuse hold at most `KEEP_BYTES`; anything above goes back to the system.  When
   that much is kept and a size has to be made anew, the largest that are kept make room for it:
   else a burst of large requests would have each small one map its own memory, which doubles what
   a write of 4 KiB costs.
3. After `IDLE_S` without a taker `IDLE_BYTES` of them are kept: a process locks what it has mapped
   into memory.
4. A buffer's content is whatever its last user left in it.
5. Memory that the system does not give is as a limit that is reached: the kept buffers are given
   up, and whoever waits is called again when something comes back, or after `RETRY_S`.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

from bitmapd.media.base import Scheduler

PAGE_BYTES = 4096
KEEP_BYTES = 8 << 20
IDLE_BYTES = 256 << 10
IDLE_S = 10.0
RETRY_S = 0.1

_addressof, _from_buffer = ctypes.addressof, ctypes.c_char.from_buffer


def aligned(length_bytes: int) -> memoryview:
    """A buffer of its own, zero-filled, that lives as long as it is referenced."""
    rounded = -(-length_bytes // PAGE_BYTES) * PAGE_BYTES
    mapping = mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return memoryview(mapping)[:length_bytes]


def address_of(buffer: memoryview) -> int:
    """Where the buffer's bytes are; it must be writable and contiguous."""
    return _addressof(_from_buffer(buffer))


class BufferPool:
    """See the module docstring; used on the loop's thread only."""

    def __init__(self, scheduler: Scheduler, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.out_bytes = 0
        self.kept_bytes = 0
        self._scheduler = scheduler
        self._kept: dict[int, list[memoryview]] = {}
        self._waiting: list[Callable[[], None]] = []
        self._retrying = False
        self._taken = False  # since an idle pool was last looked for
        self._looking = False

    def take(self, length_bytes: int) -> memoryview | None:
        """A buffer of exactly this many bytes (at least one), or None if the limit is reached."""
        size = PAGE_BYTES if length_bytes <= PAGE_BYTES else 1 << (length_bytes - 1).bit_length()
        if self.out_bytes and self.out_bytes + size > self.limit_bytes:
            return None
        kept = self._kept.get(size)
        if kept:
            view = kept.pop()
            self.kept_bytes -= size
        else:
            made = self._made(size)
            if made is None:
                return None
            view = made
        self.out_bytes += size
        self._taken = True
        return view if size == length_bytes else view[:length_bytes]

    def _made(self, size: int) -> memoryview | None:
        """A new buffer; None, and another try later, if the system has no memory for it."""
        if size <= KEEP_BYTES:
            self._keep_at_most(KEEP_BYTES - size)
        try:
            return aligned(size)
        except (OSError, MemoryError):
            self._kept.clear()
            self.kept_bytes = 0
            if not self._retrying:
                self._retrying = True
                self._scheduler.call_later(RETRY_S, self._retry)
            return None

    def _keep_at_most(self, most_bytes: int) -> None:
        while self.kept_bytes > most_bytes:
            largest = max(kept for kept, views in self._kept.items() if views)
            self._kept[largest].pop()
            self.kept_bytes -= largest

    def _look_in_a_while(self) -> None:
        self._looking, self._taken = True, False
        self._scheduler.call_later(IDLE_S, self._look)

    def _look(self) -> None:
        self._looking = False
        if not self._taken:
            self._keep_at_most(IDLE_BYTES)
        elif self.kept_bytes > IDLE_BYTES:
            self._look_in_a_while()

    def _retry(self) -> None:
        self._retrying = False
        self._call_waiting()

    def give(self, buffer: memoryview) -> None:
        """Return a buffer that `take` handed out; it must not be used afterwards."""
        mapping = buffer.obj
        if not isinstance(mapping, mmap.mmap):
            raise TypeError("only buffers of this pool can be given back")
        size = len(mapping)
        self.out_bytes -= size
        if self.kept_bytes + size <= KEEP_BYTES:
            whole = buffer if len(buffer) == size else memoryview(mapping)
            kept = self._kept.get(size)
            if kept is None:
                self._kept[size] = [whole]
            else:
                kept.append(whole)
            self.kept_bytes += size
            if self.kept_bytes > IDLE_BYTES and not self._looking:
                self._look_in_a_while()
        if self._waiting:
            self._call_waiting()

    def _call_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for callback in waiting:
            self._scheduler.call_soon(callback)

    def when_free(self, callback: Callable[[], None]) -> None:
        """Call back once, from the loop, after something has been given back."""
        self._waiting.append(callback)
