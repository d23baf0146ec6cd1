"""Settings for a workload, found by trying them on its trace (pure).

1. What a crash may make us copy is the administrator's decision: his budget in bytes is the largest
   limit that is tried, and the answer keeps to it whenever 64 extents, the least a volume accepts,
   fit into it.
2. Settings count as alike if a write waits about as rarely with them as with the best at that
   limit: 3 % more often, or once more in 1,000 writes.  Of few updates a share says nothing: one
   and three in 100,000 writes are the same to hosts.
3. Every extent size and predictor that is alike has its limit halved for as long as it stays so.
   Of all that are alike, the one that leaves the least to copy after a crash is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from bitmapd.config.volume import MIN_RECORD_LIMIT_EXTENTS
from bitmapd.errors import UsageError
from bitmapd.predict.predictors import PREDICTORS
from bitmapd.record.geometry import MAX_EXTENTS, MIB
from bitmapd.units import format_size, human_size
from dmctl.simulate.params import Params
from dmctl.simulate.replay import PREDICTOR, replay
from dmctl.simulate.result import Result
from dmctl.simulate.trace import Trace

EXTENT_SIZES = tuple(MIB * part // 16 for part in (1, 4, 8, 16, 32, 64, 256))
AS_GOOD = 1.03
AS_RARE_PER_1000 = 1.0
FEW_WRITES = 1000

Tell = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Recommendation:
    """`tried` is every replay that it rests on, `chosen` the one with these settings."""

    extent_size_bytes: int
    record_limit_bytes: int
    predictor: str
    chosen: Result
    reasons: tuple[str, ...]
    tried: tuple[Result, ...]


def recommend(
    trace: Trace,
    budget_bytes: int,
    params: Params,
    *,
    extent_sizes: Sequence[int] = EXTENT_SIZES,
    predictors: Sequence[str] = tuple(PREDICTORS),
    tell: Tell = lambda fraction: None,
) -> Recommendation:
    """Settings of which a crash makes us copy about `budget_bytes` at most."""
    sizes = [size for size in extent_sizes if _possible(trace, size, budget_bytes)]
    if not sizes:
        least = MIN_RECORD_LIMIT_EXTENTS * min(extent_sizes)
        raise UsageError(
            f"{trace.name}: {human_size(budget_bytes)} to copy after a crash is not enough for a"
            f" record of {MIN_RECORD_LIMIT_EXTENTS} extents",
            hint=f"choose a target of at least {human_size(least)}, or larger extents for a volume"
            " of this size",
        )
    tried: list[Result] = []
    count = len(sizes) * len(predictors)
    for size in sizes:
        for name in predictors:
            tried.append(_try(trace, size, budget_bytes, name, params))
            tell(len(tried) / (2 * count))
    fewest = min(result.waited_updates for result in tried)
    enough = max(AS_GOOD * fewest, fewest + AS_RARE_PER_1000 * len(trace) / 1000)
    largest = [result for result in tried if result.waited_updates <= enough]
    for done, result in enumerate(largest):
        tried += _smaller(trace, result, params, enough)
        tell((1 + done / len(largest)) / 2)
    chosen = min(
        (result for result in tried if result.waited_updates <= enough),
        key=lambda result: (
            result.mean_resync_bytes,
            result.record_limit_bytes,
            result.waited_updates,
        ),
    )
    tell(1.0)
    return Recommendation(
        chosen.extent_size_bytes,
        chosen.record_limit_bytes,
        chosen.policy.removeprefix(PREDICTOR),
        chosen,
        _reasons(chosen, tried, budget_bytes),
        tuple(tried),
    )


def _possible(trace: Trace, extent_bytes: int, budget_bytes: int) -> bool:
    extents = -(-trace.size_bytes // extent_bytes)
    return extents <= MAX_EXTENTS and MIN_RECORD_LIMIT_EXTENTS * extent_bytes <= budget_bytes


def _try(trace: Trace, extent: int, limit: int, name: str, params: Params) -> Result:
    wanted = replace(params, extent_bytes=extent, record_limit_bytes=limit)
    return replay(trace, PREDICTOR + name, wanted)


def _smaller(trace: Trace, largest: Result, params: Params, enough: float) -> Iterator[Result]:
    """The same with half the limit, a quarter and so on, until more than `enough` updates wait."""
    extent, limit = largest.extent_size_bytes, largest.record_limit_bytes // 2
    name = largest.policy.removeprefix(PREDICTOR)
    while limit >= MIN_RECORD_LIMIT_EXTENTS * extent:
        result = _try(trace, extent, limit, name, params)
        yield result
        if result.waited_updates > enough:
            return
        limit //= 2


def _reasons(chosen: Result, tried: Sequence[Result], budget_bytes: int) -> tuple[str, ...]:
    sizes = ", ".join(
        f"{format_size(result.extent_size_bytes)} {result.updates_per_1000:.1f}"
        for result in tried
        if result.policy == chosen.policy and result.record_limit_bytes == budget_bytes
    )
    same_size = [r for r in tried if r.extent_size_bytes == chosen.extent_size_bytes]
    others = ", ".join(
        f"{result.policy.removeprefix(PREDICTOR)} {result.updates_per_1000:.1f}"
        for result in same_size
        if result.record_limit_bytes == budget_bytes
    )
    limits = ", ".join(
        f"{human_size(result.record_limit_bytes)} {result.updates_per_1000:.1f}"
        for result in same_size
        if result.policy == chosen.policy
    )
    reasons = (
        "extent_size: record updates that a write waits for, per 1,000 writes, at a limit of"
        f" {human_size(budget_bytes)}: {sizes}; the least to copy of those within"
        f" {AS_RARE_PER_1000:.0f} or {AS_GOOD - 1:.0%} of the best",
        f"predictor: the same with {format_size(chosen.extent_size_bytes)} extents: {others}",
        f"record_limit: the same by limit: {limits}; with the chosen one a crash may make us copy"
        f" {human_size(chosen.record_limit_bytes)}, where {human_size(budget_bytes)} would be"
        " accepted",
        f"on this trace a crash would have made us copy {human_size(chosen.mean_resync_bytes)} on"
        f" average, {human_size(chosen.p99_resync_bytes)} in 99 of 100 moments at most",
    )
    if chosen.writes >= FEW_WRITES:
        return reasons
    return (
        *reasons,
        f"a trace of {chosen.writes} writes says little: record an hour that is typical, and the"
        " busiest one",
    )
