"""When what was written becomes clean: the copy cycle of an era copier (pure).

Which blocks are dirty does not depend on the record, so the eras of a trace are laid out once and
every policy is replayed against them.

1. An era ends at the first multiple of the interval after its first write, or later when the copy
   of the era before is not done by then: one era is copied at a time.
2. Its distinct blocks go over the link once; then both sides are flushed, which takes one round
   trip more.  At that moment, not earlier, they count as clean unless written again.  (The
   daemon settles long copies every 5 s; a whole era at once is the worse for us.)
3. A write at the very moment in which an era ends belongs to the next one.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from dmctl.simulate.params import Params
from dmctl.simulate.trace import Trace


@dataclass(frozen=True, slots=True)
class Era:
    """Writes [first, stop) of the trace; clean at `settled_s` unless written again."""

    first: int
    stop: int
    ended_s: float
    settled_s: float
    blocks: int


@dataclass(frozen=True, slots=True)
class EraPlan:
    eras: tuple[Era, ...]
    mean_dirty_bytes: float  # over the time from the first write to the last


def plan_eras(trace: Trace, params: Params) -> EraPlan:
    """The eras of all writes of the trace; laid out once for all replays with these params."""
    key = (
        "eras",
        params.block_bytes,
        params.era_interval_s,
        params.link_bytes_per_s,
        params.link_round_trip_s,
    )
    if key not in trace.derived:
        trace.derived[key] = _plan(trace, params)
    plan: EraPlan = trace.derived[key]
    return plan


def _plan(trace: Trace, params: Params) -> EraPlan:
    spans = trace.spans(params.block_bytes)
    times = trace.time_s
    interval_s = params.era_interval_s
    eras: list[Era] = []
    first, free_s = 0, 0.0
    dirty_byte_s = 0.0
    while first < len(times):
        ended_s = (int(times[first] / interval_s) + 1) * interval_s
        while ended_s <= times[first]:  # rounding
            ended_s += interval_s
        ended_s = max(ended_s, free_s)
        stop = bisect_left(times, ended_s, first)
        seen: set[int] = set()
        since_s = 0.0  # sum of the times at which the blocks became dirty
        for now_s, low, high in zip(
            times[first:stop], spans.first[first:stop], spans.stop[first:stop], strict=True
        ):
            if high - low == 1:
                if low not in seen:
                    seen.add(low)
                    since_s += now_s
            else:
                known = len(seen)
                seen.update(range(low, high))
                since_s += (len(seen) - known) * now_s
        seconds = len(seen) * params.block_bytes / params.link_bytes_per_s
        free_s = ended_s + seconds + 2 * params.link_round_trip_s
        dirty_byte_s += (len(seen) * min(free_s, trace.end_s) - since_s) * params.block_bytes
        eras.append(Era(first, stop, ended_s, free_s, len(seen)))
        first = stop
    return EraPlan(tuple(eras), dirty_byte_s / trace.end_s if trace.end_s else 0.0)
