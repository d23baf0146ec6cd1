"""Processor time of a server for a request, and its memory, beside nbdkit: `make bench-cost`.

Requests a second swing with whatever else a machine does; the time that a server's threads have had
does so far less.  All contenders run at once over files in memory, one after the other is loaded,
the order turns, and each figure is the median of all turns.  bitmapd is measured with its copier
paused and at work, as it is and, with `--compiled`, as `make wheel-compiled` makes it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bitmapd.media.buffers import IDLE_S
from tests.bench import loads, machine, report, servers
from tests.bench.loads import KIB, MIB, Load
from tests.support.volumes import Volume, make_file

ROOT = Path(__file__).resolve().parents[2]
NOTES = (
    "User and system time of all threads of the server, divided by the requests; nbdkit's of"
    " connections that have ended included. 4 KiB in 64 MiB that the record has; files in memory;"
    " fio's NBD engine over a unix socket. `copying`: the copier is at work, and what it costs is"
    " in the figure. `bitmapd compiled`: [decisions/0008](decisions/0008-compiled-modules.md)."
    " Memory: what a process has written and shares with nobody (Private_Dirty); at first, and when"
    " it has had nothing to do for a while after all that."
)


@dataclass(frozen=True, slots=True)
class Contender:
    name: str
    uri: str
    pid: int


def own_mib(pid: int) -> float:
    """What a process has written and shares with nobody; MiB (`Private_Dirty` of proc(5))."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"the kernel says nothing of the memory of process {pid}")


def the_loads(region_bytes: int, requests: int) -> list[Load]:
    def load(name: str, pattern: str, depth: int, jobs: int = 1) -> Load:
        return Load(
            name, pattern, 4 * KIB, depth, region_bytes, requests=requests // jobs, jobs=jobs
        )

    return [
        load("hit, depth 1", "randwrite", 1),
        load("hit, depth 16", "randwrite", 16),
        load("hit, 4 connections of depth 4", "randwrite", 4, 4),
        load("read, depth 1", "randread", 1),
        load("read, depth 16", "randread", 16),
    ]


def measure(
    tree: Path | None, turns: int, requests: int, size_bytes: int, rest_s: float
) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    with ExitStack() as stack:
        state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cost")))
        media = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm", prefix="c")))
        backing = make_file(media / "nbdkit.img", size_bytes)
        peer = stack.enter_context(servers.nbdkit_file(backing, state))
        found = [Contender("nbdkit", peer.uri, peer.pid)]
        copying_ones: list[Volume] = []
        for kind, program in servers.programs(state, tree).items():
            for copying in (False, True):
                name = f"{kind}, copying" if copying else kind
                folder, place = state / str(len(found)), media / name
                folder.mkdir(parents=True)
                place.mkdir()
                volume = stack.enter_context(
                    Volume(
                        folder,
                        size_bytes,
                        "cost",
                        ["--initial-sync", "skip"],
                        str(make_file(place / "secondary", size_bytes)),
                        place,
                        program=program,
                    )
                )
                volume.create()
                volume.start()
                servers.check_kind(volume, kind)
                if copying:
                    copying_ones.append(volume)
                else:
                    volume.dmctl("pause", "cost")
                found.append(Contender(name, volume.uri, volume.pid))
        for one in found:
            figures[f"memory, idle at first: {one.name}"] = {"MiB": round(own_mib(one.pid), 1)}
        for one in found:
            loads.fill(one.uri, size_bytes)
        for load in the_loads(min(64 * MIB, size_bytes), requests):
            cost: dict[str, list[float]] = {one.name: [] for one in found}
            p99: dict[str, list[float]] = {one.name: [] for one in found}
            for turn in range(turns):
                at = turn % len(found)
                for one in found[at:] + found[:at]:
                    before_s = machine.processor_s(one.pid)
                    outcome = loads.over_nbd(one.uri, load, 0, turn)
                    spent_s = machine.processor_s(one.pid) - before_s
                    cost[one.name].append(1e6 * spent_s / outcome.requests)
                    p99[one.name].append(outcome.p99_us)
            base = statistics.median(cost["nbdkit"])
            for one in found:
                middle = statistics.median(cost[one.name])
                figures[f"{load.name}: {one.name}"] = {
                    "us a request": round(middle, 2),
                    "of nbdkit": round(middle / base, 2),
                    "p99 us": round(statistics.median(p99[one.name]), 0),
                }
                print(load.name, one.name, figures[f"{load.name}: {one.name}"], flush=True)
        for volume in copying_ones:
            volume.wait_in_sync()
        time.sleep(rest_s)
        for one in found:
            figures[f"memory, idle again: {one.name}"] = {"MiB": round(own_mib(one.pid), 1)}
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description="processor time of a request, beside nbdkit")
    parser.add_argument("--compiled", type=Path, help="a tree with compiled modules")
    parser.add_argument("--quick", action="store_true", help="a run that only shows it works")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    turns, requests = (1, 400) if options.quick else (options.turns, 40_000)
    rest_s = 0.0 if options.quick else 2 * IDLE_S
    results = {
        "command": "make bench-cost",
        "at": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": machine.describe(),
        "figures": measure(
            options.compiled, turns, requests, (16 if options.quick else 256) * MIB, rest_s
        ),
    }
    page = report.figures_page("Processor time of a request", results, NOTES)
    if options.quick:
        print(page)
    else:
        (ROOT / "docs" / "benchmarks-cost.md").write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
