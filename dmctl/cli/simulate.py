"""simulate: record policies over block traces, and settings for a workload."""

from __future__ import annotations

import subprocess
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from bitmapd.errors import BitmapdError, UsageError
from bitmapd.record.geometry import MIB
from bitmapd.units import format_size, human_size
from dmctl.cli.context import Context
from dmctl.cli.output import Bar
from dmctl.simulate.chart import hit_rate_chart, limit_text, updates_chart
from dmctl.simulate.drbd import DEFAULT_SLOTS
from dmctl.simulate.files import load_trace
from dmctl.simulate.params import GIB, Params
from dmctl.simulate.recommend import EXTENT_SIZES, recommend
from dmctl.simulate.replay import POLICIES, make_model, replay
from dmctl.simulate.result import Result
from dmctl.simulate.svg import render
from dmctl.simulate.trace import Trace

DEFAULT_POLICIES = (*POLICIES, f"drbd-al:{DEFAULT_SLOTS}", "drbd-al:6433")
DEFAULT_LIMITS = (64 * MIB, 256 * MIB, GIB)
DEFAULT_DEPTHS = (1, 32)
DEFAULT_TARGET_S = 60.0
CONVERTER = "rsvg-convert"
PICTURES = (".svg", ".png")


def simulate(context: Context, args: Namespace) -> int:
    for file in args.plot or ():
        if Path(file).suffix not in PICTURES:
            raise UsageError(f"{file}: pictures are drawn as {' or '.join(PICTURES)}")
    traces = [load_trace(path, args.format) for path in args.traces]
    if args.recommend:
        return _recommend(context, args, traces)
    results = _replay_all(context, args, traces)
    for file in args.plot or ():
        _draw(results, file)
    if context.output.as_json:
        context.output.json("simulate", {"results": [result.to_json() for result in results]})
        return 0
    _table(context, results)
    shown = [r for r in results if r.limited or r.record_limit_bytes == _first_limit(args)]
    for line in (*updates_chart(shown), *hit_rate_chart(shown)):
        context.output.line(line)
    return 0


def _params(args: Namespace) -> Params:
    given = {
        "block_bytes": args.block_size,
        "era_interval_s": args.era_interval,
        "link_bytes_per_s": args.link_speed,
        "link_round_trip_s": args.link_latency,
        "record_latency_s": args.record_latency,
    }
    return replace(Params(), **{key: value for key, value in given.items() if value is not None})


def _limits(args: Namespace) -> list[int]:
    return [size for group in args.record_limit or () for size in group] or list(DEFAULT_LIMITS)


def _first_limit(args: Namespace) -> int:
    return _limits(args)[0]


def _combinations(args: Namespace) -> Iterator[tuple[str, Params]]:
    """Every policy with every extent size, queue depth and limit; what a policy makes no use of
    changes nothing but the row's label."""
    extents = [size for group in args.extent_size or () for size in group] or [MIB]
    base = _params(args)
    for depth, policy, extent, limit in product(
        args.queue_depth or DEFAULT_DEPTHS,
        args.policy or DEFAULT_POLICIES,
        extents,
        _limits(args),
    ):
        yield (
            policy,
            replace(base, extent_bytes=extent, record_limit_bytes=limit, queue_depth=depth),
        )


def _replay_all(context: Context, args: Namespace, traces: Sequence[Trace]) -> list[Result]:
    runs = list(dict.fromkeys(_combinations(args)))
    for policy, params in runs:
        make_model(traces[0], policy, params)  # reports a mistake before minutes of work
    results: list[Result] = []
    before = 0
    with context.output.progress("replaying") as bar:
        for trace in traces:
            results += _replay_one(trace, runs, bar, len(traces) * len(runs), before)
            before += len(runs)
    return results


def _replay_one(
    trace: Trace, runs: Sequence[tuple[str, Params]], bar: Bar, total: int, before: int
) -> list[Result]:
    """A row for each combination that means something else to the policy, and for each limit even
    where the policy has none; what is the same is replayed once."""
    known: dict[tuple[object, ...], Result] = {}
    rows: dict[Result, None] = {}
    for done, (policy, params) in enumerate(runs):
        model = make_model(trace, policy, params)
        key = (policy, model.unit_bytes, model.limit_units, params.queue_depth)
        if key not in known:
            known[key] = replay(trace, policy, params)
        found = known[key]
        if not found.limited:
            found = replace(found, record_limit_bytes=params.record_limit_bytes)
        rows[found] = None
        bar((before + done + 1) / total)
    return list(rows)


def _table(context: Context, results: Sequence[Result]) -> None:
    several = len({result.trace for result in results}) > 1
    head = ["POLICY", "EXTENT", "LIMIT", "DEPTH", "UPDATES", "WRITES", "HITS", "RESYNC", "P99",
            "IDLE", "SUPERSET", "STALLS"]  # fmt: skip
    rows = []
    told: set[tuple[object, ...]] = set()
    for result in results:
        limit = limit_text(result)
        key = (result.trace, result.policy, result.extent_size_bytes, limit, result.queue_depth)
        if key in told:
            continue
        told.add(key)
        ratio = result.superset_ratio
        row = [
            result.policy,
            format_size(result.extent_size_bytes),
            limit,
            str(result.queue_depth),
            f"{result.updates_per_1000:.1f}",
            f"{1000 * result.record_writes / result.writes:.1f}",
            f"{result.hits / result.writes:.2%}",
            human_size(result.mean_resync_bytes),
            human_size(result.p99_resync_bytes),
            human_size(result.idle_resync_bytes),
            "-" if ratio is None else f"{ratio:.1f}",
            str(result.stalls),
        ]
        rows.append([result.trace, *row] if several else row)
        if result.violations:
            rows[-1][-1] = f"red:{result.violations} violations"
    context.output.table(["TRACE", *head] if several else head, rows)
    context.output.line(
        "UPDATES: record updates that writes waited for, WRITES: all writes of the record, both per"
        " 1,000 writes;\nRESYNC, P99: what a power cut makes us copy, on average and at most in 99"
        " of 100 moments; IDLE: after an idle hour;\nSUPERSET: RESYNC to what is truly dirty.\n"
    )


def _draw(results: Sequence[Result], file: str) -> None:
    picture = render(results)
    if Path(file).suffix == ".svg":
        Path(file).write_text(picture, encoding="utf-8")
        return
    try:
        done = subprocess.run(
            [CONVERTER, "--output", file], input=picture.encode(), capture_output=True, check=False
        )
    except FileNotFoundError:
        raise BitmapdError(
            f"cannot draw {file}: there is no {CONVERTER}",
            hint="install librsvg2-bin, or name a .svg file",
        ) from None
    if done.returncode:
        raise BitmapdError(f"cannot draw {file}: {done.stderr.decode(errors='replace').strip()}")


def _recommend(context: Context, args: Namespace, traces: Sequence[Trace]) -> int:
    params = replace(_params(args), queue_depth=(args.queue_depth or [1])[0])
    target_s = args.resync_target or DEFAULT_TARGET_S
    budget = int(target_s * params.link_bytes_per_s)
    if args.record_limit:
        budget = max(_limits(args))
    extents = [size for group in args.extent_size or () for size in group] or EXTENT_SIZES
    out = context.output
    rows = []
    for trace in traces:
        with out.progress(f"trying settings on {trace.name}") as bar:
            found = recommend(trace, budget, params, extent_sizes=extents, tell=bar)
        settings = {
            "extent_size": format_size(found.extent_size_bytes),
            "record_limit": format_size(found.record_limit_bytes),
            "predictor": found.predictor,
        }
        rows.append(
            {
                "trace": trace.name,
                **settings,
                "reasons": list(found.reasons),
                "result": found.chosen.to_json(),
            }
        )
        if not out.as_json:
            out.line(f"# {trace.name}")
            for key, value in settings.items():
                out.line(f'{key} = "{value}"')
            for reason in found.reasons:
                out.line(f"# {reason}")
    if out.as_json:
        out.json("simulate", {"recommendations": rows, "results": [row["result"] for row in rows]})
    return 0
