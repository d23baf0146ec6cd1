"""What keeps a process that serves writes from waiting for itself when memory is short (edge)."""

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
