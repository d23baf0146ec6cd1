"""The threads of `bitmapd.media.workers` between two jobs."""

from __future__ import annotations

import threading
import weakref
from collections import deque

from bitmapd.media.workers import Workers


class Job:
    def __call__(self) -> int:
        return 1


def test_a_thread_that_waits_holds_nothing_of_its_last_job() -> None:
    """That would be a buffer of 1 MiB for each thread that copies."""
    finished: deque[int] = deque()
    over = threading.Event()
    workers = Workers(1, "test", finished, over.set)
    job = Job()
    held = weakref.ref(job)
    workers.submit(job)
    del job
    assert over.wait(10)
    assert held() is None
    assert list(finished) == [1]
    workers.close()
