"""The direct path of a node of a pair: there while its hosts are served, and gone again (pure).

The gate of such a node lives longer than the kernel's tables, which are made when hosts are let in
and taken down before the partner serves.  So this stands in the gate for whichever direct path
there is.  Without one nothing is open, and no barrier is wanted.

1. What is open when the tables go counts as written (`end`), since no barrier brings it any more.
2. A barrier waits for every write that the gate has not answered.  While some wait for a partner
   that is not there (`is_held_up`), it would hold up all others until its deadline, for nothing: it
   is put off.  Not so once hosts are out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from bitmapd.gate.direct import DirectPath
from bitmapd.gate.elsewhere import Collected, Run


class PromotedPath:
    """See the module docstring; an `Elsewhere`."""

    def __init__(self) -> None:
        self.path: DirectPath | None = None
        self.is_held_up: Callable[[], bool] = lambda: False
        self._on_urgent: Callable[[], None] = lambda: None
        self._load = (0, 0)  # of paths that have gone
        self._seen = (0, 0)  # of all, when somebody asked last

    def begin(self, path: DirectPath) -> None:
        self.path = path
        path.when_urgent(self._on_urgent)

    def end(self) -> list[Run]:
        """No host can write any more.  Runs of extents of which the last writes are not known."""
        path, self.path = self.path, None
        self._load = self._seen  # the kernel's counters have gone by now
        if path is None:
            return []
        path.look_who_left(gone=True)
        return path.routes.open_runs

    # -- Elsewhere ----------------------------------------------------------------------------
    def is_open(self, extent: int) -> bool:
        return self.path is not None and self.path.is_open(extent)

    def cool(self, extents: Iterable[int]) -> None:
        if self.path is not None:
            self.path.cool(extents)

    def warm(self, extents: Iterable[int]) -> None:
        if self.path is not None:
            self.path.warm(extents)

    def closed(self) -> list[int]:
        return [] if self.path is None else self.path.closed()

    def missed(self) -> list[int]:
        return [] if self.path is None else self.path.missed()

    def gone(self, extents: Iterable[int]) -> None:
        if self.path is not None:
            self.path.gone(extents)

    def leave(self, extents: Iterable[int], call: Callable[[], None]) -> None:
        if self.path is None:
            call()
        else:
            self.path.leave(extents, call)

    def gated_hit(self, first: int, stop: int) -> None:
        if self.path is not None:
            self.path.gated_hit(first, stop)

    def when_urgent(self, call: Callable[[], None]) -> None:
        self._on_urgent = call
        if self.path is not None:
            self.path.when_urgent(call)

    @property
    def can_grow(self) -> bool:
        return self.path is not None and self.path.can_grow and not self._is_held_up

    def grow(self, recorded: Iterable[Run], done: Callable[[], None]) -> None:
        if self.path is None:
            done()
        else:
            self.path.grow(recorded, done)

    @property
    def held_s(self) -> tuple[float, float]:
        return (0.0, 0.0) if self.path is None else self.path.held_s

    @property
    def _is_held_up(self) -> bool:
        return self.path is not None and not self.path.routes.is_sealed and self.is_held_up()

    def barrier(self, recorded: Iterable[Run], done: Collected) -> None:
        if self.path is None:
            done(())
        elif self._is_held_up:
            done(None)
        else:
            self.path.barrier(recorded, done)

    @property
    def wants_barrier(self) -> bool:
        return self.path is not None and self.path.wants_barrier and not self._is_held_up

    @property
    def is_urgent(self) -> bool:
        return self.path is not None and self.path.is_urgent and not self._is_held_up

    @property
    def written(self) -> bool:
        return self.path is not None and self.path.written

    @property
    def being_written(self) -> bool:
        return self.path is not None and self.path.being_written

    @property
    def marks_s(self) -> float:
        return 0.0 if self.path is None else self.path.marks_s

    @property
    def host_load(self) -> tuple[int, int]:
        if self.path is not None:
            requests, written_bytes = self.path.host_load
            self._seen = (self._load[0] + requests, self._load[1] + written_bytes)
        return self._seen
