"""What protects a process, and media from it, whatever it was started with (edge).

`protect_memory` keeps one that serves writes from waiting for itself when memory is short.
`keep_standard_descriptors` keeps a medium from becoming a place to print to.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable

_PR_SET_IO_FLUSHER = 57
_MCL_CURRENT = 1
_MCL_FUTURE = 2
_MCL_ONFAULT = 4
_STACK_BYTES = 512 << 10  # of a thread; locked memory, and 8 MiB by default

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

    Without the privilege, as in a container, this is told and the volume is served all the same.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        if number != errno.EINVAL:  # kernels before 5.6 do not know it
            emit(
                "not-io-flusher",
                message=f"PR_SET_IO_FLUSHER: {os.strerror(number)}; grant CAP_SYS_RESOURCE",
            )
    threading.stack_size(_STACK_BYTES)
    # What is mapped now is brought in and locked; what is mapped later is locked as it is used.
    if (
        libc.mlockall(_MCL_CURRENT) != 0
        or libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) != 0
    ):
        emit(
            "memory-not-locked",
            message=f"mlockall: {os.strerror(ctypes.get_errno())}; raise RLIMIT_MEMLOCK",
        )
