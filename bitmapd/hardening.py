"""What protects a process, and media from it, whatever it was started with (edge).

`protect_memory` keeps one that serves writes from waiting for itself when memory is short, and from
being killed for it.  The wiring helper takes the steps of that one by one.
`keep_standard_descriptors` keeps a medium from becoming a place to print to.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path

_PR_SET_IO_FLUSHER = 57
_MCL_CURRENT = 1
_MCL_FUTURE = 2
_MCL_ONFAULT = 4
_STACK_BYTES = 512 << 10  # of a thread; locked memory, and 8 MiB by default

_OOM_SCORE = -1000
_OOM_SCORE_FILE = Path("/proc/self/oom_score_adj")

_libc = ctypes.CDLL(None, use_errno=True)

Emit = Callable[..., None]


def keep_standard_descriptors() -> None:
    """Open those of 0, 1 and 2 that the caller has closed, before anything else takes them.

    A record that was opened as number 2 would be overwritten by what the libraries of this process,
    or its children, print to standard error.
    """
    number = os.open(os.devnull, os.O_RDWR)  # the lowest that is free
    while number <= 2:
        os.set_inheritable(number, True)
        number = os.open(os.devnull, os.O_RDWR)
    os.close(number)


def protect_memory(emit: Emit) -> None:
    """Never wait for memory that only our own progress can free; see docs/recovery.md.

    Without the privilege, as in a container, this is an event; the volume is served all the same.
    """
    threading.stack_size(_STACK_BYTES)  # first: an event is told by a thread of its own
    # What the imports have left over would be locked in, too: 0.7 MiB.
    gc.collect()
    _libc.malloc_trim(0)
    number = become_io_flusher()
    if number not in (0, errno.EINVAL):  # kernels before 5.6 do not know it
        emit(
            "not-io-flusher",
            message=f"PR_SET_IO_FLUSHER: {os.strerror(number)}; grant CAP_SYS_RESOURCE",
        )
    # What is mapped now is brought in and locked; what is mapped later is locked as it is used.
    number = lock_memory(_MCL_CURRENT) or lock_memory(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT)
    if number:
        emit("memory-not-locked", message=f"mlockall: {os.strerror(number)}; raise RLIMIT_MEMLOCK")
    number = be_killed_last()
    if number:
        emit(
            "may-be-killed",
            message=f"oom_score_adj: {os.strerror(number)}; grant CAP_SYS_RESOURCE",
        )


# Each of these returns an errno, 0 for success.


def become_io_flusher() -> int:
    """Memory that this process asks for does not wait for write-out (PR_SET_IO_FLUSHER)."""
    arguments = map(ctypes.c_ulong, (1, 0, 0, 0))
    return ctypes.get_errno() if _libc.prctl(_PR_SET_IO_FLUSHER, *arguments) else 0


def lock_memory(flags: int = _MCL_CURRENT | _MCL_FUTURE) -> int:
    """As the flags of mlockall(2) have it; by default what is mapped now and later, as a whole."""
    return ctypes.get_errno() if _libc.mlockall(flags) else 0


def be_killed_last() -> int:
    """Not to be chosen when the kernel kills to get memory; left alone where somebody saw to it."""
    try:
        if int(_OOM_SCORE_FILE.read_text()) > _OOM_SCORE:
            _OOM_SCORE_FILE.write_text(str(_OOM_SCORE))
    except OSError as error:
        return error.errno or errno.EIO
    return 0
