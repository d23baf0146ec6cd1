"""The one interface through which everything reaches a medium, and the loop that drives it.

Contract of a `Device`, which every implementation (kernel device, NBD client, simulated disk)
keeps and every caller relies on:

1. A submitted operation ends with exactly one call of its `done`, on the event loop's thread,
   never from inside the submitting call.  `done(None)` is success, `done(OSError)` failure.
2. Operations may complete in any order.  A caller that needs an order waits for `done`.
3. A buffer belongs to the device from submission until `done`.  It is a writable, C-contiguous
   memoryview of bytes; its address is aligned to 4096 (`media.buffers` hands out such buffers).
4. Offsets and lengths are multiples of `block_size_bytes` and lie inside `size_bytes`.  The
   caller validates; a violation is answered with EINVAL.
5. A completed write may sit in a volatile cache.  `flush` makes durable every write that was
   *completed* before the flush was submitted.  `fua=True` makes that one write durable.
6. An error says nothing about what is on the medium: old, new or a mixture by logical block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

Done = Callable[[OSError | None], None]

# (length_bytes, flags) pairs in order; flags are those of the NBD base:allocation context.
AllocationDone = Callable[[OSError | None, list[tuple[int, int]]], None]

ALLOC_HOLE = 1
ALLOC_ZERO = 2


class Timer(Protocol):
    """A callback that was scheduled; `cancel` may be called any number of times."""

    def cancel(self) -> None: ...


class Scheduler(Protocol):
    """The part of `asyncio.AbstractEventLoop` that the core uses; simulated in tests."""

    def time(self) -> float: ...

    def call_soon(self, callback: Callable[..., Any], *args: Any) -> Any: ...

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> Timer: ...


class Export(Protocol):
    """The part of a device that a server needs."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def block_size_bytes(self) -> int: ...

    def read(self, offset_bytes: int, buffer: memoryview, done: Done) -> None: ...

    def write(
        self, offset_bytes: int, buffer: memoryview, done: Done, fua: bool = False
    ) -> None: ...

    def zero(
        self,
        offset_bytes: int,
        length_bytes: int,
        done: Done,
        *,
        fua: bool = False,
        unmap: bool = True,
        fast: bool = False,
    ) -> None:
        """Make the range read as zeros.  `unmap` allows a hole; `fast` answers EOPNOTSUPP
        rather than being slower than it would be to write the zeros."""

    def trim(self, offset_bytes: int, length_bytes: int, done: Done, *, fua: bool = False) -> None:
        """A hint that the range is not needed; its content is unspecified afterwards."""

    def flush(self, done: Done) -> None: ...

    def allocation(self, offset_bytes: int, length_bytes: int, done: AllocationDone) -> None:
        """Which parts are holes or read as zeros; covers at least the start of the range."""


class Device(Export, Protocol):
    """A block device; see the module's contract."""

    @property
    def name(self) -> str: ...

    def close(self) -> None:
        """Release the medium; nothing may be in flight."""


class Target(Device, Protocol):
    """A secondary: a device that may go away and come back."""

    @property
    def connected(self) -> bool: ...

    @property
    def writes_late(self) -> bool:
        """Whether what was asked of it may be carried out after whoever asked is gone."""

    @property
    def takes_many(self) -> bool:
        """Whether several clients may use it at a time: a flush of one then covers what was
        completed for any of them."""

    def lands_late(self, error: OSError) -> bool:
        """Whether a write that ended in this error may still be carried out afterwards."""

    def open(self, done: Done) -> None:
        """Connect, or connect again; `size_bytes` is valid once `done(None)` was called."""


def after_all(parts: int, done: Done) -> Done:
    """What each of so many parts ends with; `done` hears when all have, and of the first error."""
    failed: OSError | None = None

    def ended(error: OSError | None) -> None:
        nonlocal parts, failed
        parts -= 1
        failed = failed or error
        if not parts:
            done(failed)

    return ended
