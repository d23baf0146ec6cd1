"""Settings for a workload, found by trying them on its trace (pure).

1. What a crash may make us copy is the administrator's decision: his budget in bytes is the largest
   limit that is tried, and the answer keeps to it whenever 64 extents, the least a volume accepts,
   fit into it.
2. Extent size and predictor: those with the fewest waited-for updates at that limit; of sizes that
   are within 3 % of the best, the one that leaves the least to copy.
3. The limit is then halved as long as that costs at most 3 %: a larger record would only mean more
   to copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from bitmapd.config.volume import MIN_RECORD_LIMIT_EXTENTS
from bitmapd.errors import UsageError
from bitmapd.record.geometry import MAX_EXTENTS, MIB
from bitmapd.record.predictors import PREDICTORS
from bitmapd.simulate.params import Params
from bitmapd.simulate.replay import PREDICTOR, replay
from bitmapd.simulate.result import Result
from bitmapd.simulate.trace import Trace
from bitmapd.units import format_size, human_size

EXTENT_SIZES = tuple(MIB * part // 16 for part in (1, 4, 8, 16, 32, 64, 256))
AS_GOOD = 1.03

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
            tell(len(tried) / (count + 2))
    fewest = min(result.waited_updates for result in tried)
    good = [result for result in tried if result.waited_updates <= AS_GOOD * fewest]
    best = min(good, key=lambda result: (result.mean_resync_bytes, result.waited_updates))
    smaller = list(_smaller(trace, best, params))
    chosen = best
    for result in smaller:
        if result.waited_updates <= AS_GOOD * best.waited_updates:
            chosen = result
    tell(1.0)
    return Recommendation(
        chosen.extent_size_bytes,
        chosen.record_limit_bytes,
        chosen.policy.removeprefix(PREDICTOR),
        chosen,
        _reasons(chosen, best, tried, smaller, budget_bytes),
        (*tried, *smaller),
    )


def _possible(trace: Trace, extent_bytes: int, budget_bytes: int) -> bool:
    extents = -(-trace.size_bytes // extent_bytes)
    return extents <= MAX_EXTENTS and MIN_RECORD_LIMIT_EXTENTS * extent_bytes <= budget_bytes


def _try(trace: Trace, extent: int, limit: int, name: str, params: Params) -> Result:
    wanted = replace(params, extent_bytes=extent, record_limit_bytes=limit)
    return replay(trace, PREDICTOR + name, wanted)


def _smaller(trace: Trace, best: Result, params: Params) -> Iterator[Result]:
    """The same with half the limit, a quarter and so on, until it costs too much."""
    extent, limit = best.extent_size_bytes, best.record_limit_bytes // 2
    name = best.policy.removeprefix(PREDICTOR)
    while limit >= MIN_RECORD_LIMIT_EXTENTS * extent:
        result = _try(trace, extent, limit, name, params)
        yield result
        if result.waited_updates > AS_GOOD * best.waited_updates:
            return
        limit //= 2


def _reasons(
    chosen: Result,
    best: Result,
    tried: Sequence[Result],
    smaller: Sequence[Result],
    budget_bytes: int,
) -> tuple[str, ...]:
    sizes = ", ".join(
        f"{format_size(result.extent_size_bytes)} {result.updates_per_1000:.1f}"
        for result in tried
        if result.policy == best.policy
    )
    others = ", ".join(
        f"{result.policy.removeprefix(PREDICTOR)} {result.updates_per_1000:.1f}"
        for result in tried
        if result.extent_size_bytes == best.extent_size_bytes
    )
    limits = ", ".join(
        f"{human_size(result.record_limit_bytes)} {result.updates_per_1000:.1f}"
        for result in (best, *smaller)
    )
    return (
        f"extent_size: record updates that a write waits for, per 1,000 writes: {sizes}",
        f"predictor: the same with {format_size(best.extent_size_bytes)} extents: {others}",
        f"record_limit: the same by limit: {limits}; a crash may make us copy"
        f" {human_size(budget_bytes)}",
        f"on this trace a crash would have made us copy {human_size(chosen.mean_resync_bytes)} on"
        f" average, {human_size(chosen.p99_resync_bytes)} in 99 of 100 moments at most",
    )
