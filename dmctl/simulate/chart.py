"""Pictures of results for a terminal (pure)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bitmapd.units import human_size
from dmctl.simulate.result import Result

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_LEVELS = "▁▂▃▄▅▆▇█"
BAR_CELLS = 40


def bar(part: float, cells: int = BAR_CELLS) -> str:
    """A bar of `part` of so many cells, in eighths of a cell; cut off with a mark beyond 1."""
    if part > 1:
        return "█" * (cells - 1) + "▶"
    eighths = round(part * cells * 8)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()


def sparkline(values: Sequence[float | None]) -> str:
    """One character a value between 0 and 1; a space where there is none."""
    return "".join(
        " " if value is None else _LEVELS[min(int(value * len(_LEVELS)), len(_LEVELS) - 1)]
        for value in values
    )


def groups(results: Sequence[Result]) -> Iterator[tuple[str, int, list[Result]]]:
    """Trace, queue depth and the results of both, in the order in which they came."""
    keys = dict.fromkeys((result.trace, result.queue_depth) for result in results)
    for trace, depth in keys:
        yield (
            trace,
            depth,
            [r for r in results if (r.trace, r.queue_depth) == (trace, depth)],
        )


def limit_text(result: Result) -> str:
    return human_size(result.record_limit_bytes).replace(".0 ", " ") if result.limited else "none"


def updates_chart(results: Sequence[Result]) -> Iterator[str]:
    """Bars of waited-for updates, by limit; what has no limit comes last."""
    for trace, depth, found in groups(results):
        yield f"{trace}: record updates waited for, per 1,000 writes, queue depth {depth}"
        limited = sum(r.limited for r in found)
        ordered = sorted(found, key=lambda r: (not r.limited, r.limited and r.record_limit_bytes))
        # What has no limit may be far beyond the rest, and would leave nothing to be seen of it.
        most = max(r.updates_per_1000 for r in ordered[: limited or None]) or 1.0
        names = max(len(r.policy) for r in found)
        limits = max(len(limit_text(r)) for r in found)
        told = ""
        for result in ordered:
            limit = limit_text(result)
            shown, told = ("" if limit == told else limit), limit
            value = result.updates_per_1000
            line = f"  {shown:>{limits}}  {result.policy:<{names}}  {bar(value / most)} {value:.1f}"
            yield line
        yield ""


def hit_rate_chart(results: Sequence[Result]) -> Iterator[str]:
    """Hit rate over the time of the trace, of each policy with the largest limit tried."""
    for trace, depth, found in groups(results):
        yield f"{trace}: share of writes that waited for nothing, over time, queue depth {depth}"
        largest = {r.policy: r for r in sorted(found, key=lambda r: r.record_limit_bytes)}
        names = max(map(len, largest))
        for name, result in largest.items():
            share = result.hits / result.writes
            yield f"  {name:<{names}}  {sparkline(result.hit_rate.values)}  {share:.1%}"
        yield ""
