"""Results as JSON, as a table on the terminal, and as docs/benchmarks.md."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from tests.bench.servers import COMPILED, INTERPRETED

Results = dict[str, Any]


def median(values: list[float]) -> float:
    return statistics.median(values)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table; the first column is text, the others numbers."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: list[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return f"| {' | '.join(cells)} |"

    rule = "| " + " | ".join(["-" * widths[0], *[f"{'-' * (w - 1)}:" for w in widths[1:]]]) + " |"
    return [line(head), rule, *[line(row) for row in rows]]


def _amount(value: float, block_bytes: int) -> str:
    return f"{value / 1000:.1f}k/s" if block_bytes <= 1 << 16 else f"{value:.0f} MiB/s"


def kinds(backing: Results) -> list[str]:
    """The volumes among the servers."""
    return [name for name in backing["servers"] if name in (INTERPRETED, COMPILED)]


def serving_rows(backing: Results) -> tuple[list[str], list[list[str]]]:
    names: list[str] = backing["servers"]
    ratios = [
        (kind, peer)
        for kind in kinds(backing)
        for peer in ("nbdkit", "qemu-nbd", "qemu-nbd direct")
    ]
    head = ["load", *names, *(f"{kind} of {peer}" for kind, peer in ratios), "hits"]
    rows = []
    for load in backing["loads"]:
        scale = 1.0 if load["block_bytes"] <= 1 << 16 else load["block_bytes"] / (1 << 20)
        middle = {name: median(load["iops"][name]) * scale for name in names}
        row = [load["name"], *[_amount(middle[name], load["block_bytes"]) for name in names]]
        for kind, peer in ratios:
            row.append(f"{_ratio_of(load, kind, peer):.2f}" if peer in middle else "-")
        share = min(load["hit_share"].values(), default=None)
        row.append("-" if share is None else f"{100 * share:.1f} %")
        rows.append(row)
    return head, rows


def miss_rows(miss: Results) -> tuple[list[str], list[list[str]]]:
    record_us, data_us = median(miss["record_us"]), median(miss["data_us"])
    names = list(miss["ours"])
    rows = [
        ["durable 4 KiB write to the record device (fio, O_DIRECT + O_DSYNC)"]
        + [f"{record_us:.0f}"] * len(names),
        [f"4 KiB write through {miss['data_server']}"] + [f"{data_us:.0f}"] * len(names),
    ]

    def row(what: str, of: Callable[[dict[str, float]], str]) -> None:
        shown = [
            of({name: median(all_) for name, all_ in miss["ours"][kind].items()}) for kind in names
        ]
        rows.append([what, *shown])

    row("4 KiB write, hit", lambda one: f"{one['hit_us']:.0f}")
    row("4 KiB write, miss", lambda one: f"{one['miss_us']:.0f}")
    row(
        "miss / (record write + data write)",
        lambda one: f"{one['miss_us'] / (record_us + data_us):.2f}",
    )
    row(
        "miss / (record write + hit)",
        lambda one: f"{one['miss_us'] / (record_us + one['hit_us']):.2f}",
    )
    row("share of misses in that load", lambda one: f"{100 * one['miss_share']:.0f} %")
    row("the same load with predictions: mean of all", lambda one: f"{one['predicted_us']:.0f}")
    row("share of misses then", lambda one: f"{100 * one['predicted_share']:.0f} %")
    return ["depth 1; us, or ratio", *names], rows


def copy_rows(copies: Results) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name, took in copies["seconds"].items():
        speed = copies["data_bytes"] / (1 << 20) / median(took)
        kind = name.split(" to ")[1]
        peer = median(copies["seconds"][f"nbdcopy to {kind}"])
        rows.append(
            [name, f"{median(took):.3f}", f"{speed:.0f}", f"{peer / median(took):.2f}"],
        )
    return [copies["name"], "seconds", "MiB/s of data", "of nbdcopy"], rows


def _ratio_of(load: Results, kind: str, peer: str) -> float:
    """Median of the turns' ratios, so that a slow moment of the machine meets both."""
    pairs = zip(load["iops"][kind], load["iops"][peer], strict=True)
    return median([ours / theirs for ours, theirs in pairs])


def bar_rows(results: Results) -> list[list[str]]:
    """What the project asks of itself, beside what this run measured."""
    rows = []

    def judge(what: str, wanted: str, value: float, met: bool, digits: int = 2) -> None:
        rows.append([what, wanted, f"{value:.{digits}f}", "met" if met else "MISSED"])

    for backing in results["backings"]:
        where, ours = backing["name"], kinds(backing)
        # Through the page cache a server does not do the same work on a disk; see below.
        peers = ("nbdkit", "qemu-nbd") if where == "tmpfs" else ("qemu-nbd direct",)
        for load in backing["loads"]:
            if "random write" not in load["name"]:
                continue
            for kind, peer in product(ours, peers):
                least = 0.95 if peer == "nbdkit" else 1.0
                ratio = _ratio_of(load, kind, peer)
                what = f"{where}: {kind}, hits, depth {load['depth']}, of {peer}"
                judge(what, f">= {least}", ratio, ratio >= least)
        for kind in ours if backing.get("miss") else ():
            record_us, one = median(backing["miss"]["record_us"]), backing["miss"]["ours"][kind]
            ratio = median(one["miss_us"]) / (record_us + median(one["hit_us"]))
            what = f"{where}: {kind}, miss of (record write + hit)"
            judge(what, "<= 1.2", ratio, ratio <= 1.2)
        for copies, leasts in zip(backing["copies"], ((0.9, 1.0), (0.8, 0.8)), strict=False):
            for kind, (target, least) in product(ours, zip(("file", "nbd"), leasts, strict=True)):
                peer_s = median(copies["seconds"][f"nbdcopy to {target}"])
                ratio = peer_s / median(copies["seconds"][f"{kind} to {target}"])
                what = f"{where}: {kind}, {copies['name']} to {target}, of nbdcopy"
                judge(what, f">= {least}", ratio, ratio >= least)
    for name, one in results["memory"].items():
        allowed = one["allowed_mib"]
        peak = one["peak_mib"]
        judge(f"{name}: memory, MiB", f"<= {allowed:.0f}", peak, peak <= allowed, 0)
        if one.get("start_s") is not None:
            judge(f"{name}: start, s", "< 2", one["start_s"], one["start_s"] < 2)
    age = results["age"]
    judge("age of the hottest block, s", "<= 12", age["hottest_age_s"], age["hottest_age_s"] <= 12)
    return rows


def age_section(age: Results) -> tuple[str, str, list[str]]:
    note = (
        f"Random 64 KiB blocks of {age['region_bytes'] >> 20} MiB are written at"
        f" {age['load_bytes_per_s'] / 1e6:.0f} MB/s for {age['seconds']:.0f} s and copied at"
        f" {age['copy_rate']}/s; one block is written every 75 ms. Its age is what the secondary's"
        " file holds of it, at worst in the second half; that of all others is"
        " `content_age_seconds` at the end, which is never less than the truth."
    )
    rows = [
        ["the block that is written all the time", f"{age['hottest_age_s']:.1f}"],
        ["any block, at most", f"{age['content_age_s']:.1f}"],
    ]
    return "Age of the secondary's content", note, table(["content of", "age s"], rows)


def sections(results: Results) -> list[tuple[str, str, list[str]]]:
    """(heading, explanation, table) in the order in which they are shown."""
    note = "On tmpfs the peers are nbdkit and qemu-nbd, on the disk `qemu-nbd direct`: see below."
    parts = [("Bars", note, table(["bar", "wanted", "measured", ""], bar_rows(results)))]
    for backing in results["backings"]:
        note = backing["note"] + " " + backing["raw_note"]
        parts.append((f"Serving: {backing['name']}", note, table(*serving_rows(backing))))
        if backing.get("miss"):
            note = (
                "Random 4 KiB writes, each into another extent of 64 KiB, without predictions"
                ' (`predictor = "lru"`); the few hits are taken out of the figure of a miss. For'
                " predictions this is the worst load: twice as many extents as the record may hold."
            )
            parts.append((f"Misses: {backing['name']}", note, table(*miss_rows(backing["miss"]))))
        for copies in backing["copies"]:
            note = (
                "From `resume` to in-sync, durable on the secondary; the others flush at the end."
            )
            rows = table(*copy_rows(copies))
            parts.append((f"Copying, {copies['name']}: {backing['name']}", note, rows))
    memory = results["memory"]
    memories = [
        [
            name,
            f"{one['resident_mib']:.0f}",
            f"{one['peak_mib']:.0f}",
            f"{one['allowed_mib']:.0f}",
            f"{one['start_s']:.2f}" if one.get("start_s") is not None else "-",
        ]
        for name, one in memory.items()
    ]
    head = ["volume", "resident MiB", "peak MiB", "bar MiB", "`dmctl start` s"]
    note = "Bar: 80 MiB plus 20 MiB per TiB of volume; a clean 16 TiB volume starts in under 2 s."
    parts.append(("Memory and start", note, table(head, memories)))
    parts.append(age_section(results["age"]))
    return parts


def to_terminal(results: Results) -> str:
    lines = []
    for heading, _, rows in sections(results):
        lines += ["", heading, *rows]
    return "\n".join(lines)


def to_markdown(results: Results) -> str:
    lines = [
        "# Benchmarks",
        "",
        "Generated by `make bench`; do not edit. Every server runs over a file of its own in the"
        " same place, fio's NBD engine over a unix socket is the load, the measurements of the"
        f" contenders are interleaved, and each figure is the median of {results['repeats']}."
        " bitmapd mirrors all the while: the copier works during the measurement, the others"
        " copy nothing.",
        "",
        f"Command: `{results['command']}`",
        "",
        *table(["machine", ""], [[key, value] for key, value in results["machine"].items()]),
    ]
    for heading, note, rows in sections(results):
        lines += ["", f"## {heading}", "", note, "", *rows]
    return "\n".join([*lines, "", *READING, ""])


READING = [
    "## How to read this",
    "",
    "- nbdkit's file plugin and qemu-nbd's default go through the page cache: on a disk their"
    " writes end in memory and reach the disk later. bitmapd and `qemu-nbd direct`"
    " (`--cache=none --aio=native`) answer when the disk has answered; on a disk only these two"
    " do the same work, and the ratio to `qemu-nbd direct` is the one that means something.",
    "- On tmpfs every server ends in memory, so the ratios show what a request costs in CPU.",
    "- `bitmapd compiled`: the wheel of `make wheel-compiled`"
    " ([decisions/0008](decisions/0008-compiled-modules.md)).",
    "- The generator, the server and bitmapd's copier share the cores listed above. bitmapd runs on"
    " one thread of Python; at depth 16 it answers many requests per wake-up, at depth 1 each"
    " request pays the interpreter's price and, where the kernel lets it, a short busy-wait hides"
    " the wake-up.",
    "- `hits` is the share of writes that found their extents in the record; a hit does no record"
    " I/O.",
]


def write(results: Results, folder: Path, document: Path | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    stem = "bench-quick" if results["quick"] else "bench"
    path = folder / f"{stem}-{results['at'].replace(':', '')}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    if document is not None:
        document.write_text(to_markdown(results))
    return path


def figures_page(title: str, results: dict[str, Any], notes: str) -> str:
    """A page of `figures`: what was measured, which figure of it, and a number or its quartiles."""
    lines = [
        f"# {title}",
        "",
        f"`{results['command']}`, {results['at']}: "
        + ", ".join(f"{name} {value}" for name, value in results["machine"].items())
        + ".",
        "Ratios are medians of turns in one run, quartiles in brackets.",
        "",
        "| what | figure | value |",
        "| --- | --- | ---: |",
    ]
    for what, figures in results["figures"].items():
        for name, value in figures.items():
            if isinstance(value, list):
                low, middle, high = value
                text = f"{middle:.3g} ({low:.3g} to {high:.3g})"
            else:
                text = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
            lines.append(f"| {what} | {name} | {text} |")
    return "\n".join([*lines, "", notes, ""])
