"""What the guest measured as tables: on the terminal, and as docs/benchmarks-vm.md (pure but for
`write`)."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from tests.bench.report import table
from tests.bench.vm import rig

Results = dict[str, Any]
Row = list[str]
# Which part of which, and what the project asks of itself.
WRITES_OF_LINEAR = 0.9
READS_OF_LINEAR = 0.95
WINDOW_MS = 10.0
WINDOW_SHARE = 0.01
SEGMENTS_PART = 0.9
MIX_OF_LINEAR = 0.75  # all of it direct
MIX_BARS = ((rig.MD, 1.0), (rig.MIRROR, 1.0), (rig.DRBD, 2.0))
FILL_OF_MD = 0.8
TRIM_OF_RAW = 0.5
POINTS_PART = 0.93


def rates(load: Results, name: str) -> list[float]:
    return [float(one["rate"]) for one in load["outcomes"].get(name, [])]


def median_rate(load: Results, name: str) -> float:
    return statistics.median(rates(load, name))


def ratio(load: Results, name: str, other: str) -> float | None:
    """Median of the ratios of each repeat, so that a slow moment of the machine below meets both;
    None where one of them was not measured."""
    pairs = list(zip(rates(load, name), rates(load, other), strict=False))
    if not pairs or not all(below for _, below in pairs):
        return None
    return statistics.median(above / below for above, below in pairs)


def _rate(value: float, unit: str) -> str:
    return f"{value / 1000:.2f}k" if unit == "1/s" and value >= 1000 else f"{value:.0f}"


def _part(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _middle(load: Results, name: str, key: str) -> float | None:
    """Median of what the volume did in its turns."""
    values = [one["volume"][key] for one in load["outcomes"][name] if "volume" in one]
    values = [value for value in values if value is not None]
    return statistics.median(values) if values else None


def load_rows(load: Results, base: str = rig.LINEAR) -> tuple[Row, list[Row]]:
    head = ["contender", load["unit"], "least", "most", "of dm-linear", "of raw", "copied MiB/s"]
    rows = []
    for name in load["outcomes"]:
        all_ = rates(load, name)
        copied, seconds = (_middle(load, name, key) for key in ("copied_bytes", "seconds"))
        rows.append(
            [
                name,
                *(
                    _rate(one, load["unit"])
                    for one in (median_rate(load, name), min(all_), max(all_))
                ),
                _part(ratio(load, name, base)),
                _part(ratio(load, name, rig.RAW)),
                "-" if copied is None or not seconds else f"{copied / seconds / (1 << 20):.0f}",
            ]
        )
    return head, rows


def mixed_rows(results: Results) -> tuple[Row, list[Row]]:
    head = ["load", "1/s", "mean us", "hits", "in the kernel", "of dm-linear", "table changes"]
    rows = []
    for load in [*results["misses"], *results["mixed"]]:
        (name,) = {rig.MISSES, rig.MIX}.intersection(load["outcomes"])
        mean_us = statistics.median(one["mean_us"] for one in load["outcomes"][name])
        rows.append(
            [
                load["title"],
                _rate(median_rate(load, name), "1/s"),
                f"{mean_us:.0f}",
                _share(_middle(load, name, "hit_share")),
                _share(_middle(load, name, "direct_share")),
                _part(ratio(load, name, rig.LINEAR)),
                f"{_middle(load, name, 'table_loads') or 0:.0f}",
            ]
        )
    return head, rows


def window_rows(results: Results) -> tuple[Row, list[Row]]:
    head = ["volume under 4 KiB random writes, depth 16", "barriers", "with a new table"]
    head += ["median ms", "90 % ms", "max ms"]
    rows = []
    for one in results["windows"]:
        held = sorted(1000 * window_s for window_s in one["windows_s"])
        figures = ["-"] * 3
        if held:
            nine = held[min(len(held) - 1, int(0.9 * len(held)))]
            figures = [f"{value:.2f}" for value in (statistics.median(held), nine, held[-1])]
        loads = str(one["volume"]["table_loads"])
        rows.append([one["name"], str(len(held)), loads, *figures])
    return head, rows


def window_share(results: Results) -> float:
    """Of the time under random writes, at the default era interval."""
    held_s = busy_s = 0.0
    for load in results["main"]:
        if load["name"] in {"rw1", "rw16"}:
            for one in load["outcomes"][rig.HITS]:
                held_s += one["volume"]["suspended_s"]
                busy_s += one["busy_s"]
    return held_s / busy_s


def _by_name(loads: list[Results], name: str) -> Results:
    """One without outcomes where it was not measured."""
    return next((load for load in loads if load["name"] == name), {"outcomes": {}})


def bar_rows(results: Results) -> list[Row]:
    """What the project asks of itself, beside what this run measured."""
    rows: list[Row] = []

    def judge(what: str, wanted: str, value: float | None, met: bool, digits: int = 2) -> None:
        if value is None:
            rows.append([what, wanted, "NOT MEASURED", "-"])
        else:
            rows.append([what, wanted, f"{value:.{digits}f}", "met" if met else "MISSED"])

    def at_least(what: str, least: float, value: float | None) -> None:
        judge(what, f">= {least}", value, value is not None and value >= least)

    for depth in (1, 16):
        load = _by_name(results["main"], f"rw{depth}")
        for name, said in ((rig.HITS, "hits"), (rig.PAUSED, "hits, paused")):
            what = f"4 KiB random writes, {said}, depth {depth}, of dm-linear"
            at_least(what, WRITES_OF_LINEAR, ratio(load, name, rig.LINEAR))
        for peer in rig.PEERS:
            what = f"4 KiB random writes, hits, depth {depth}, of {peer}"
            at_least(what, 1.0, ratio(load, rig.HITS, peer))
        slow = _by_name(results["slow"], f"rw{depth}")
        what = f"the same on a disk of {rig.LATENCY_US} us, depth {depth}, of dm-linear"
        at_least(what, WRITES_OF_LINEAR, ratio(slow, rig.SLOW_HITS, rig.SLOW_LINEAR))
    for depth in (1, 16):
        load = _by_name(results["main"], f"rr{depth}")
        what = f"4 KiB random reads, depth {depth}, of dm-linear"
        at_least(what, READS_OF_LINEAR, ratio(load, rig.HITS, rig.LINEAR))
    for one in results["windows"]:
        held = [1000 * window_s for window_s in one["windows_s"]]
        middle = statistics.median(held) if held else None
        met = middle is not None and middle <= WINDOW_MS
        judge(f"writes held by a barrier, median ms, {one['name']}", "<= 10", middle, met)
    share = window_share(results)
    what = "writes held, % of the time at the default era interval"
    judge(what, "<= 1", 100 * share, share <= WINDOW_SHARE, 3)
    fsync = _by_name(results["spread"], "spread-fsync")
    what = "writes with fdatasync, 2,000 segments, of one segment"
    at_least(what, SEGMENTS_PART, ratio(fsync, rig.SEGMENTS, rig.HITS))
    for depth in (1, 16):
        load = _by_name(results["mixed"], f"mix{depth}")
        for peer, least in MIX_BARS:
            what = f"mix, default settings, depth {depth}, of {peer}"
            at_least(what, least, ratio(load, rig.MIX, peer))
        what = f"mix, all direct, depth {depth}, of dm-linear"
        at_least(what, MIX_OF_LINEAR, ratio(load, rig.HITS, rig.LINEAR))
    for depth in (1, 16):
        load = _by_name(results["points"], f"rw{depth}")
        what = f"4 KiB random writes, hits, depth {depth}, with points, of without a receiver"
        at_least(what, POINTS_PART, ratio(load, rig.POINTS, rig.PLAIN))
    what = f"first fill of a file system, default settings, of {rig.MD}"
    at_least(what, FILL_OF_MD, ratio(results["fill"], rig.FRESH, rig.MD))
    what = f"fstrim of a fresh file system, default settings, of the {rig.RAW}"
    at_least(what, TRIM_OF_RAW, ratio(results["trim"], rig.FRESH, rig.RAW))
    for name, equal in results["equal"].items():
        judge(f"both ends equal afterwards: {name}", "yes", float(equal), equal, 0)
    return rows


def sections(results: Results) -> list[tuple[str, str, list[str]]]:
    """(heading, explanation, table) in the order in which they are shown."""
    parts = [("Bars", "", table(["bar", "wanted", "measured", ""], bar_rows(results)))]
    if results["missing"]:
        rows = [[name, reason] for name, reason in results["missing"].items()]
        note = "**These contenders could not be set up; nothing is known of them.**"
        parts.append(("NOT MEASURED", note, table(["contender", "reason"], rows)))
    for load in results["main"]:
        parts.append((load["title"], "", table(*load_rows(load))))
    for load in (results["database"], results["fill"], results["trim"], *results["mixed"]):
        note = MIX_NOTE if load in results["mixed"] else ""
        parts.append((load["title"], note, table(*load_rows(load))))
    for load in results["points"]:
        had = "; ".join(f"{name}: {_processor(load, name)}" for name in load["outcomes"])
        note = f"{POINTS_NOTE} {had}."
        parts.append((load["title"], note, table(*load_rows(load, rig.PLAIN))))
    for load in results["slow"]:
        heading = f"On disks that take {rig.LATENCY_US} us: {load['title']}"
        parts.append((heading, SLOW_NOTE, table(*load_rows(load, rig.SLOW_LINEAR))))
    for load in results["layers"]:
        heading = f"By layers: {load['title']}"
        parts.append((heading, LAYERS_NOTE, table(*load_rows(load))))
    for load in results["spread"]:
        heading = f"One segment and 2,000 segments: {load['title']}"
        parts.append((heading, "At 999 places 256 KiB apart.", table(*load_rows(load))))
    parts.append(("What one write takes", CLASS_NOTE, table(*class_rows(results))))
    parts.append(("Misses and a mix, by the way they took", "", table(*mixed_rows(results))))
    parts.append(("How long a barrier holds writes", WINDOW_NOTE, table(*window_rows(results))))
    return parts


SLOW_NOTE = (
    "The emulated processor is about ten times slower than the bare one: beside it such a disk is"
    " what a quick NVMe drive is beside the bare one."
)
LAYERS_NOTE = (
    "What a volume's layers cost by themselves where everything is recorded and one segment:"
    " writes pass dm-delay, dm-linear and dm-era, reads dm-delay alone."
)
POINTS_NOTE = (
    "In the column `of dm-linear` is what it is of a volume with a plain secondary and blocks of"
    " the same size, which has a barrier every 5 to 20 s and copies meanwhile. Each turn lasts as"
    " long as the interval, with one cut in its middle. The receiver runs outside of the guest, as"
    " at another site, and is reached over TLS and an emulated network card. The load writes all of"
    " its 64 MiB between two cuts, so each sends these, on the processors that hosts use; and what"
    " that takes is emulated, too, while the interval is not ten times as long."
)
MIX_NOTE = (
    "The mix is 9 of 10 writes to a tenth of the volume, the others anywhere; the volume has the"
    " default settings."
)
CLASS_NOTE = (
    "One write of 4 KiB to each of some extents, one after another. What is first in its era waits"
    " for dm-era, which commits its metadata."
)
WINDOW_NOTE = (
    "The time from suspend to resume, as the wiring helper measures it. Eras of 300 ms, so that"
    " there are many barriers; the share of time in the table of bars is that of the default"
    " era interval."
)
INTRODUCTION = (
    "Generated by `make bench-vm`; do not edit. Debian's kernel in a virtual machine, all"
    " contenders side by side in one boot. They take turns within each load; each figure is the"
    " median of {repeats}, beside the least and the most; a ratio is the median of the repeats'"
    " ratios. The media are RAM disks with a volatile"
    " write cache (null_blk): a medium that costs little shows what the layers cost, and without a"
    " write cache (brd has none) the kernel ends flushes above the layers that are to be measured."
)
READING = [
    "## How to read this",
    "",
    "- Without hardware virtualisation (`tcg`) processor work costs about ten times what it costs"
    " on the bare machine, and a medium that answers at once leaves nothing else to measure. Ratios"
    " of layers mean something, absolute figures nothing. On a disk that takes 50 us a write the"
    " layers are a small part of it.",
    "- `stack, all hits`: every extent is in the record and direct, and the volume mirrors. A turn"
    " with writes lasts as long as the longest era (20 s); what comes in the 3 s before does not"
    " count. So it has a barrier or more, the marks that dm-era makes anew in each era for the"
    " region's 256 blocks, and the copying of what was written. `paused`: the same without"
    " copying.",
    "- The copier and the benchmark share two processors. DRBD's other node and the second legs of"
    " md and dm-mirror are in the same kernel too; protocol A answers when the data are in the"
    " socket.",
    "- Mirrors that write both legs before they answer (md without write-behind, dm-mirror) promise"
    " more than an asynchronous one, and need a second leg that is near.",
    "- `dm-linear, three deep` passes as many layers as a hit does, and nothing happens in them:"
    " what a volume has less than this is its own doing, the rest is the price of three layers.",
    "- `dm-era alone` keeps its metadata on a disk, so that they outlive the power: it answers a"
    " write to a new block when these are durable. It copies nothing.",
]


def to_terminal(results: Results) -> str:
    lines = []
    for heading, _, rows in sections(results):
        lines += ["", heading, *rows]
    return "\n".join(lines)


def parts_to_terminal(results: Results) -> str:
    """Of a run that left parts out: each load with what the volumes did in it."""
    lines = ["", *table(*class_rows(results))] if "classes" in results else []
    for part in results.values():
        for load in part if isinstance(part, list) else [part]:
            if isinstance(load, dict) and load.get("outcomes"):
                head, rows = load_rows(load)
                lines += ["", load["title"], *table(head, rows)]
                lines += _volume_lines(load)
    return "\n".join(lines)


def _volume_lines(load: Results) -> list[str]:
    lines = []
    for name, outcomes in load["outcomes"].items():
        if "volume" in outcomes[0]:
            hits, direct = (
                _share(_middle(load, name, f"{key}_share")) for key in ("hit", "direct")
            )
            loads, held_s = (_middle(load, name, key) for key in ("table_loads", "suspended_s"))
            lines.append(
                f"{name}: {hits} hits, {direct} in the kernel, {loads:.0f} table changes,"
                f" writes held {1000 * (held_s or 0):.0f} ms, {_processor(load, name)}"
            )
    return lines


def _processor(load: Results, name: str) -> str:
    had_s, seconds = (_middle(load, name, key) for key in ("processor_s", "seconds"))
    return f"bitmapd had {had_s or 0:.2f} s of processor time in {seconds or 0:.0f} s"


def class_rows(results: Results) -> tuple[Row, list[Row]]:
    head = ["one write of 4 KiB, depth 1", "mean us", "99 % us", "hits", "in the kernel"]
    rows = []
    for load in results["classes"]:
        outcomes = load["outcomes"][rig.CLASSES]
        mean_us, p99_us = (
            statistics.median(one[key] for one in outcomes) for key in ("mean_us", "p99_us")
        )
        shares = (_share(_middle(load, rig.CLASSES, f"{key}_share")) for key in ("hit", "direct"))
        rows.append([load["title"], f"{mean_us:.0f}", f"{p99_us:.0f}", *shares])
    return head, rows


def to_markdown(results: Results) -> str:
    lines = [
        "# Benchmarks in a kernel",
        "",
        INTRODUCTION.format(repeats=results["scale"]["repeats"]),
        "",
        f"Command: `{results['command']}`",
        "",
        *table(["machine", ""], [[key, value] for key, value in results["machine"].items()]),
    ]
    for heading, note, rows in sections(results):
        lines += ["", f"## {heading}", "", *([note, ""] if note else []), *rows]
    return "\n".join([*lines, "", *READING, ""])


def write(results: Results, folder: Path, document: Path | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"bench-vm-{results['scale']['name']}"
    path = folder / f"{stem}-{results['at'].replace(':', '')}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    if document is not None:
        document.write_text(to_markdown(results))
    return path
