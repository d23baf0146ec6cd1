"""What a model of a record is, and what the models share (pure).

A model is driven by one trace.  `run` is called for consecutive writes; `elapse` lets everything
happen that happens by itself up to a time.  The driver never passes `due_s` in a call of `run`.

1. The stored record covers a write before the write is over, and until the write is durable on
   both sides (the models' tests check it at every step through `covers`).
2. Time is that of the trace; an update of the record takes no time in which others arrive, except
   that it holds together the writes of one batch.  Where a model makes writes wait for
   something else (a stall), the writes after them wait too.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from typing import Protocol

from dmctl.simulate.meter import Meter, Watch
from dmctl.simulate.params import Params
from dmctl.simulate.trace import Trace

NEVER_S = float("inf")


class Model(Protocol):
    """See the module docstring."""

    meter: Meter
    unit_bytes: int
    clock_s: float  # how far it is; ahead of the trace after a stall

    @property
    def limit_units(self) -> int | None:
        """How many units the record may hold; None if it has no limit."""

    @property
    def due_s(self) -> float:
        """When `elapse` has to be called next."""

    def elapse(self, until_s: float) -> None:
        """Let happen what is due up to and including `until_s`."""

    def run(self, first: int, stop: int) -> None:
        """Writes [first, stop) of the trace; all of them before `due_s`."""

    def covers(self, first_unit: int, stop_unit: int) -> bool:
        """Whether the *stored* record names all of these units."""


class BatchModel:
    """A model that learns which writes are in flight together, by `submit`."""

    unit_bytes: int
    limit_units: int | None = None
    due_s = NEVER_S
    clock_s = 0.0

    def __init__(self, trace: Trace, params: Params, unit_bytes: int) -> None:
        self.meter = Meter()
        self.watch = Watch(self.meter)
        self.unit_bytes = unit_bytes
        self.params = params
        self.trace = trace
        spans = trace.spans(unit_bytes)
        self.first, self.stop = spans.first, spans.stop

    def elapse(self, until_s: float) -> None:
        """Nothing happens by itself."""

    def run(self, first: int, stop: int) -> None:
        times, params = self.trace.time_s, self.params
        while first < stop:
            together = first + 1
            if params.queue_depth > 1:
                last_s = times[first] + params.record_latency_s
                together = bisect_right(
                    times, last_s, first + 1, min(stop, first + params.queue_depth)
                )
            self.submit(times[first], first, together)
            first = together

    def submit(self, now_s: float, first: int, stop: int) -> None:
        raise NotImplementedError


class Link:
    """A link that carries writes one after the other, as they come.

    A write is durable on the other side one round trip after its last byte has left; `pending`
    tells of those that are not, oldest first.
    """

    def __init__(self, params: Params) -> None:
        self._params = params
        self._free_s = 0.0
        self.pending: deque[tuple[float, int, int]] = deque()  # durable when; units [first, stop)

    def send(self, now_s: float, length_bytes: int, first: int, stop: int) -> float:
        """When the write will be durable."""
        self._free_s = max(self._free_s, now_s) + length_bytes / self._params.link_bytes_per_s
        durable_s = self._free_s + self._params.link_round_trip_s
        self.pending.append((durable_s, first, stop))
        return durable_s

    def arrived(self, until_s: float) -> list[tuple[float, int, int]]:
        """Take what has become durable by then."""
        done = []
        while self.pending and self.pending[0][0] <= until_s:
            done.append(self.pending.popleft())
        return done
