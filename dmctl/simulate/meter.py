"""What is measured of one replay (pure).

`Level` is a quantity that is held for a time: its mean and quantiles are over *time*, that is over
every instant at which the power might fail, not over requests.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

from dmctl.simulate.trace import Trace

BUCKETS = 60


class Level:
    """A number of units over time, from 0 on; times never go back."""

    def __init__(self) -> None:
        self.value = 0
        self.highest = 0
        self._since_s = 0.0
        self._held_s: dict[int, float] = {}

    def set(self, now_s: float, value: int) -> None:
        if value != self.value:
            self.hold(now_s)
            self.value = value
            self.highest = max(self.highest, value)

    def hold(self, now_s: float) -> None:
        """Count the time up to now."""
        held_s = now_s - self._since_s
        if held_s > 0:
            self._held_s[self.value] = self._held_s.get(self.value, 0.0) + held_s
            self._since_s = now_s

    def mean(self) -> float:
        total_s = sum(self._held_s.values())
        if not total_s:
            return float(self.value)
        return sum(value * held_s for value, held_s in self._held_s.items()) / total_s

    def quantile(self, part: float) -> int:
        """The least value that is not exceeded for this part of the time."""
        rest_s = part * sum(self._held_s.values())
        for value, held_s in sorted(self._held_s.items()):
            rest_s -= held_s
            if rest_s <= 0:
                return value
        return self.value


class Meter:
    """Counts of one replay.  `stored` and `record` are in units of the policy's extents: what a
    power cut leaves to be copied, and what the record is meant to hold."""

    def __init__(self) -> None:
        self.stored = Level()
        self.record = Level()
        self.waited_updates = 0
        self.record_writes = 0
        self.record_flushes = 0
        self.record_written_bytes = 0
        self.wait_s = 0.0
        self.longest_wait_s = 0.0
        self.stalls = 0
        self.stall_s = 0.0
        self.violations = 0
        self.waits = array("q")  # the numbers of the writes that waited

    def wrote_record(self, writes: int, bytes_each: int, flushes: int = 1) -> None:
        self.record_writes += writes
        self.record_flushes += flushes
        self.record_written_bytes += writes * bytes_each

    def waited(self, writes: Iterable[int], wait_s: float) -> None:
        """These writes waited for the record, each as long."""
        before = len(self.waits)
        self.waits.extend(writes)
        self.wait_s += (len(self.waits) - before) * wait_s
        self.longest_wait_s = max(self.longest_wait_s, wait_s)

    def both(self, now_s: float, units: int) -> None:
        """For records of which what is stored is what is meant."""
        self.stored.set(now_s, units)
        self.record.set(now_s, units)


class Watch:
    """An account of what is dirty beside a model's own: nothing dirty may leave the record."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._until_s: dict[int, float] = {}

    def written(self, unit: int, until_s: float) -> None:
        """The unit is dirty until then; later writes never become clean earlier."""
        self._until_s[unit] = until_s

    def removed(self, unit: int, now_s: float) -> None:
        if self._until_s.pop(unit, now_s) > now_s:
            self._meter.violations += 1


@dataclass(frozen=True, slots=True)
class HitRate:
    """Share of the writes that did not wait, in each of the equal parts of the trace's time; None
    where nothing was written."""

    part_s: float
    values: tuple[float | None, ...]


def hit_rate(trace: Trace, waits: Iterable[int], parts: int = BUCKETS) -> HitRate:
    part_s = trace.end_s / parts
    bounds = [i * part_s for i in range(1, parts)]
    waited = sorted(waits)
    values: list[float | None] = []
    write = wait = 0
    for bound_s in [*bounds, None]:
        last = len(trace) if bound_s is None else bisect_left(trace.time_s, bound_s)
        last_wait = bisect_left(waited, last)
        count = last - write
        values.append(1 - (last_wait - wait) / count if count else None)
        write, wait = last, last_wait
    return HitRate(part_s, tuple(values))
