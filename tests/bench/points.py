"""A volume with a receiver beside one with a plain secondary: `make bench-points`.

Both lie in memory and take turns in one run, so that what the machine does besides hits both.
Ratios are medians of the turns, with quartiles.  `--quick` shows that the command works; its
figures mean nothing.

What is measured, and why:
- writes of hosts while points are cut, and while none is open: hosts do not pay; what a hit costs
  more in the gate, since it is less than a turn of hosts can show;
- the slowest writes, against those without points and a read of the same disk;
- the age of the newest point under half of what the link carries; points an hour over a long link;
- what is sent when the link is cut again and again in the course of one point;
- promote with a point in the journal, against nbdcopy; failback after both sites were written;
- what both processes compute for a point, and what the receiver's disks write for what it
  receives.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.bench import gates, loads, machine, pointlinks
from tests.bench.bench import ROOT
from tests.bench.loads import KIB, MIB, Load
from tests.bench.pairlinks import quartiles
from tests.bench.pointlinks import GIB
from tests.bench.report import figures_page
from tests.support.sites import Sites
from tests.support.volumes import Volume

SIZE_BYTES = 1024 * MIB
REGION_BYTES = 64 * MIB
INTERVAL_S = 30

Found = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """`write_us`: processor time of the volume's process for a write, whatever else it did."""

    outcome: loads.Outcome
    write_us: float


class Contenders:
    """A volume with a receiver, and one with a plain secondary, with the same settings."""

    def __init__(self, stack: ExitStack, size_bytes: int) -> None:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bp", dir="/dev/shm")))
        said = ["--extent-size", "64KiB", "--record-limit", f"{size_bytes // 2}B"]
        said += ["--predictor", "lru"]
        journal_bytes = 2 * size_bytes  # its first content may come as one point
        self.sites = stack.enter_context(
            Sites(base, size_bytes, *said, journal_bytes=journal_bytes)
        )
        self.sites.create()
        self.sites.start()
        (base / "one").mkdir()
        self.single = stack.enter_context(Volume(base / "one", size_bytes, "one", options=said))
        self.single.create()
        self.single.start()
        for volume in self.volumes:
            loads.fill(volume.uri, size_bytes)
        self.settle()

    @property
    def volumes(self) -> tuple[Volume, Volume]:
        return self.sites.near, self.single

    def interval(self, text: str) -> None:
        self.sites.near.dmctl("set", "vol0", f"point-interval={text}")

    def settle(self) -> None:
        self.interval("300ms")
        for volume in self.volumes:
            volume.wait_in_sync()

    def turn(self, load: Load, seconds: int, number: int) -> tuple[Turn, Turn]:
        """With points, without; which comes first changes."""
        order = 1 - 2 * (number % 2)
        first, second = [
            _measured(volume, load, seconds, number) for volume in self.volumes[::order]
        ][::order]
        return first, second


def _measured(volume: Volume, load: Load, seconds: int, number: int) -> Turn:
    writes, processor_s = volume.status()["writes_total"], machine.processor_s(volume.pid)
    outcome = loads.over_nbd(volume.uri, load, seconds, number)
    processor_s = machine.processor_s(volume.pid) - processor_s
    return Turn(outcome, 1e6 * processor_s / (volume.status()["writes_total"] - writes))


def measure_hosts(
    turns: int, quiet_turns: int, interval_s: int, seconds: int, size_bytes: int
) -> Found:
    """`seconds`: of a turn without a cut; one with cuts is longer than the interval.  Without a cut
    there are more of them, since a turn swings by more than the difference that is looked for."""
    region = min(REGION_BYTES, size_bytes // 4)
    result: Found = {}
    with ExitStack() as stack:
        made = Contenders(stack, size_bytes)
        by_depth = {
            depth: Load(f"writes, depth {depth}", "randwrite", 4 * KIB, depth, region)
            for depth in (1, 16)
        }
        least_us = float("inf")  # of a host's write without points
        for load in by_depth.values():
            made.interval("1h")  # no cut is open, and a plain volume copies nothing
            made.single.ask("pause")
            made.turn(load, 0, 99)  # its extents come into the records
            pairs = [made.turn(load, seconds, number) for number in range(quiet_turns)]
            result[f"{load.name}, no cut open"] = _ratios(pairs)
            least_us = min(least_us, *(plain.write_us for _, plain in pairs))
            made.single.ask("resume")
            made.settle()
        hit = gates.measure(20 * quiet_turns)
        hit["more / processor time of a write"] = hit["more, ns"] / (1000 * least_us)
        result["a hit in the gate alone, no cut open"] = hit
        for depth, load in by_depth.items():
            pairs, slowest = [], []
            for number in range(turns):
                made.interval(f"{interval_s}s")
                points, plain = made.turn(load, interval_s + seconds, number)
                read = Load("a block", "randread", 64 * KIB, 1, region)
                disk = loads.on_file(made.sites.near.primary, read, seconds, number)
                pairs.append((points, plain))
                beside_us = max(1.0, plain.outcome.p999_us + disk.p999_us)
                slowest.append(points.outcome.p999_us / beside_us)
                made.settle()
            result[f"{load.name}, a cut each {interval_s} s"] = _ratios(pairs)
            if depth == 1:
                result["p99.9 of a write, depth 1"] = {
                    "with points / (without + a read of 64 KiB)": quartiles(slowest)
                }
        figures = made.sites.points()
        result["waits of hosts"] = {
            "copies before write": figures["cbw_total"],
            "longest ms": 1000 * figures["cbw_wait_seconds_max"],
            "cuts given up": sum(figures["void_total"].values()),
        }
    return result


def _ratios(pairs: list[tuple[Turn, Turn]]) -> Found:
    return {
        "with / without": quartiles([a.outcome.iops / b.outcome.iops for a, b in pairs]),
        "processor time a write, with / without": quartiles(
            [a.write_us / b.write_us for a, b in pairs]
        ),
    }


NOTES = """\
How to read this: primary, secondary, image and journal lie in memory and share the processors, so
a hit is nearly all CPU, and what the receiver computes for a point is taken from the hosts as it
would not be at another site. Intervals other than 30 s are scaled: what they show does not depend
on the length of the interval."""


def parts(quick: bool) -> dict[str, Callable[[], Found]]:
    """What is measured, by the option `--only`; each gives figures of one or more rows."""
    turns, quiet_turns, seconds = (1, 1, 1) if quick else (3, 15, 3)
    interval_s, cycles = (1, 2) if quick else (5, 6)
    size = 128 * MIB if quick else SIZE_BYTES
    point = 16 * MIB if quick else 200 * MIB

    def row(name: str, measure: Callable[..., Found], *arguments: int) -> Callable[[], Found]:
        return lambda: {name: measure(*arguments)}

    return {
        "hosts": lambda: measure_hosts(
            turns, quiet_turns, 1 if quick else INTERVAL_S, seconds, size
        ),
        "age": row(
            "age of the newest point, load half of the link",
            pointlinks.measure_age, interval_s, cycles, size,
        ),
        "trip": row("long link", pointlinks.measure_round_trip, interval_s, cycles, size),
        "cuts": row(
            "link cut in one point", pointlinks.measure_cuts, 3 if quick else 20, point, size
        ),
        "promote": row("promote", pointlinks.measure_promote, max(32 * MIB, point), size),
        "failback": row(
            "failback, 1 % written at either site, a MiB at a place",
            pointlinks.measure_failback, 256 * MIB if quick else 10 * GIB, MIB,
        ),
        "scattered": row(
            "failback, 1 % written at either site, 64 KiB at a place",
            pointlinks.measure_failback, 256 * MIB if quick else 10 * GIB, 64 * KIB,
        ),
        "pieces": row(
            "failback, 1 % written at either site, 4 KiB at a place",
            pointlinks.measure_failback, 256 * MIB if quick else 10 * GIB, 4 * KIB,
        ),
        "work": row(
            "processor time of a point", pointlinks.measure_work, 1 if quick else 7, point, size
        ),
        "written": row("receiver's disks", pointlinks.measure_written, 2 if quick else 20, size),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="consistent points beside a plain secondary")
    parser.add_argument("--quick", action="store_true", help="a run that only shows it works")
    parser.add_argument("--only", choices=parts(True), action="append", help="not all of it")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    options = parser.parse_args()
    results: Found = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "make bench-points",
        "quick": options.quick,
        "machine": machine.describe(),
        "figures": {},
    }
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"points-{results['at'].replace(':', '')}.json"
    for name, measure in parts(options.quick).items():
        if options.only is None or name in options.only:
            results["figures"] |= measure()
            path.write_text(json.dumps(results, indent=1) + "\n")  # what comes next may fail
            print(f"bench: {name} is measured", flush=True)
    text = figures_page("Consistent points: figures", results, NOTES)
    print(text)
    if not options.quick and options.only is None:
        (ROOT / "docs" / "benchmarks-points.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
