"""Side by side with nbdkit, qemu-nbd, nbdcopy and dd: `make bench`.

Prints tables of ratios, writes everything to `results/` as JSON and the tables to
docs/benchmarks.md.  With `--compiled` the modules that requests pass through are measured as they
are and as `make wheel-compiled` makes them.  `--quick` runs every part once with small numbers: it
shows that the command works, its figures mean nothing and docs/benchmarks.md is left alone.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.bench import ages, copies, loads, machine, report, servers
from tests.bench.ages import AgeLoad
from tests.bench.loads import KIB, MIB, Load, Outcome
from tests.bench.servers import Server
from tests.support.volumes import Volume, make_file

ROOT = Path(__file__).resolve().parents[2]
TIB = 1 << 40
TMPFS = Path("/dev/shm")
# The load of misses takes half a second; a process that had just been started took nearly twice as
# long for each.
START_S = 1.0
DISK_NOTE = (
    "Files on the machine's disk (ext4). bitmapd's secondary is in memory here, since nobody"
    " mirrors a disk to itself; its primary and record share the disk."
)


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    repeats: int
    seconds: int
    device_bytes: int
    region_bytes: int
    copy_bytes: int
    miss_device_bytes: int
    miss_requests: int
    big_bytes: int
    age: AgeLoad


FULL = Scale(
    repeats=3,
    seconds=3,
    device_bytes=1024 * MIB,
    region_bytes=64 * MIB,
    copy_bytes=1024 * MIB,
    miss_device_bytes=2048 * MIB,
    miss_requests=3000,
    big_bytes=16 * TIB,
    age=AgeLoad(375 * MIB, 20e6, "6MiB", 120.0),
)
QUICK = Scale(
    repeats=1,
    seconds=0,
    device_bytes=64 * MIB,
    region_bytes=16 * MIB,
    copy_bytes=32 * MIB,
    miss_device_bytes=64 * MIB,
    miss_requests=200,
    big_bytes=TIB,
    age=AgeLoad(16 * MIB, 20e6, "1MiB", 3.0),
)


def say(text: str) -> None:
    print(f"  {text}", flush=True)


@contextmanager
def folder_in(parent: Path) -> Iterator[Path]:
    parent.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix="bench", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@dataclass(frozen=True, slots=True)
class Places:
    """Folders for the media, for configuration and sockets, and in memory for secondaries."""

    media: Path
    state: Path
    away: Path

    def below(self, name: str) -> Places:
        found = Places(self.media / name, self.state / name, self.away / name)
        for folder in (found.media, found.state, found.away):
            folder.mkdir()
        return found


@contextmanager
def folders(parent: Path) -> Iterator[Places]:
    temporary = Path(tempfile.gettempdir())
    with folder_in(parent) as media, folder_in(temporary) as state, folder_in(TMPFS) as away:
        yield Places(media, state, away)


def counters(server: Server) -> tuple[int, int] | None:
    if server.volume is None:
        return None
    status = server.volume.status()
    return status["writes_total"], status["hits_total"]


def settle(server: Server) -> None:
    """Let the copier finish, so that the next contender has the machine to itself."""
    if server.volume is not None:
        server.volume.wait_in_sync()


@contextmanager
def volumes(
    where: Places, size_bytes: int, tree: Path | None, name: str, options: tuple[str, ...] = ()
) -> Iterator[list[Server]]:
    """One of each kind of program, with folders of its own."""
    with ExitStack() as stack:
        found = []
        for number, (kind, program) in enumerate(servers.programs(where.state, tree).items()):
            own = where.below(str(number))
            secondary = make_file(own.away / "secondary", size_bytes)
            server = servers.bitmapd(
                *(own.media, own.state, size_bytes, name, options),
                secondary=secondary,
                kind=kind,
                program=program,
            )
            found.append(stack.enter_context(server))
        yield found


@contextmanager
def contenders(where: Places, size_bytes: int, tree: Path | None) -> Iterator[list[Server]]:
    """All servers, their files written once."""
    media, state = where.media, where.state
    with ExitStack() as stack:
        found = stack.enter_context(volumes(where, size_bytes, tree, "bench"))
        for name in ("nbdkit", "qemu", "qemu-direct"):
            backing = media / f"{name}.img"
            make_file(backing, size_bytes)
            if name == "nbdkit":
                found.append(stack.enter_context(servers.nbdkit_file(backing, state)))
            else:
                direct = name == "qemu-direct"
                found.append(stack.enter_context(servers.qemu_nbd(backing, state, direct)))
        for server in found:
            loads.fill(server.uri, size_bytes)
            settle(server)
        yield found


def measure_serving(where: Places, scale: Scale, tree: Path | None) -> dict[str, Any]:
    measured = []
    with contenders(where, scale.device_bytes, tree) as found:
        for load in loads.loads(scale.region_bytes, scale.device_bytes):
            iops: dict[str, list[float]] = {server.name: [] for server in found}
            latency: dict[str, list[float]] = {server.name: [] for server in found}
            shares: dict[str, list[float]] = {}
            for repeat in range(scale.repeats):
                # The order turns, so that nobody always runs right behind the copier.
                turn = repeat % len(found)
                for server in found[turn:] + found[:turn]:
                    before = counters(server)
                    outcome = loads.over_nbd(server.uri, load, scale.seconds, repeat)
                    after = counters(server)
                    iops[server.name].append(outcome.iops)
                    latency[server.name].append(outcome.mean_us)
                    if before and after and after[0] > before[0]:
                        share = (after[1] - before[1]) / (after[0] - before[0])
                        shares.setdefault(server.name, []).append(share)
                    settle(server)
            say(f"{load.name}: " + ", ".join(f"{n} {max(v):.0f}" for n, v in iops.items()))
            measured.append(
                {
                    "name": load.name,
                    "block_bytes": load.block_bytes,
                    "depth": load.depth,
                    "iops": iops,
                    "mean_us": latency,
                    "hit_share": {name: report.median(all_) for name, all_ in shares.items()},
                }
            )
        volume = found[0].volume
        resident = machine.resident_bytes(volume.pid) if volume else (0, 0)
        return {"servers": [s.name for s in found], "loads": measured, "resident": resident}


def measure_misses(
    where: Places, scale: Scale, data_server: str, tree: Path | None
) -> dict[str, Any]:
    """Random writes into extents of 64 KiB that are not in the record, at depth 1: without
    predictions, so that nearly all of them miss, and with."""
    size, requests = scale.miss_device_bytes, scale.miss_requests
    one = Load("miss", "randwrite", 4 * KIB, 1, size, align_bytes=64 * KIB, requests=requests)
    again = Load("hit", "randwrite", 4 * KIB, 1, scale.region_bytes)
    small = Load("record", "randwrite", 4 * KIB, 1, MIB, requests=requests)
    media, state, kinds = where.media, where.state, servers.programs(where.state, tree)
    names = ("hit_us", "miss_us", "miss_share", "predicted_us", "predicted_share")
    ours: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in names} for kind in kinds}
    record_us: list[float] = []
    data_us: list[float] = []
    options = ("--extent-size", "64KiB", "--record-limit", f"{size // 2}B")
    scratch, backing = media / "record.scratch", media / "data.img"
    loads.make_written(scratch, MIB)
    make_file(backing, size)
    with ExitStack() as stack:
        made = stack.enter_context(volumes(where, size, tree, "miss", options))
        if data_server == "nbdkit":
            other = stack.enter_context(servers.nbdkit_file(backing, state))
        else:
            other = stack.enter_context(servers.qemu_nbd(backing, state, direct=True))
        for server in (*made, other):
            loads.fill(server.uri, size)
            settle(server)
        for repeat in range(scale.repeats):
            for server in made:
                found = ours[server.name]
                mixed, share = from_an_empty_record(server, one, 1000 + repeat, "lru")
                predicted, predicted_share = from_an_empty_record(
                    server, one, 1000 + repeat, "superset"
                )
                hit = loads.over_nbd(server.uri, again, scale.seconds, repeat)
                settle(server)
                found["hit_us"].append(hit.mean_us)
                found["miss_us"].append(only_misses(mixed, hit, share))
                found["miss_share"].append(share)
                found["predicted_us"].append(predicted.mean_us)
                found["predicted_share"].append(predicted_share)
            record_us.append(loads.on_file(scratch, small, 0, repeat, durable=True).mean_us)
            data_us.append(loads.over_nbd(other.uri, one, 0, 1000 + repeat).mean_us)
    for kind, figures in ours.items():
        said = ", ".join(f"{name} {report.median(all_):.2f}" for name, all_ in figures.items())
        say(f"misses, {kind}: {said}")
    return {
        "record_us": record_us,
        "data_us": data_us,
        "data_server": other.name,
        "ours": ours,
    }


def only_misses(mixed: Outcome, hit: Outcome, share: float) -> float:
    """Mean latency of the misses in a load of which a known share were misses."""
    return (mixed.mean_us - (1 - share) * hit.mean_us) / share if share else 0.0


def from_an_empty_record(
    server: Server, load: Load, seed: int, predictor: str
) -> tuple[Outcome, float]:
    """What the load does, and the share of misses; a clean stop leaves an empty record.  It begins
    when the process has settled."""
    if server.volume is not None:
        server.volume.stop()
        server.volume.start()
        server.volume.dmctl("set", server.volume.name, f"predictor={predictor}")
        time.sleep(START_S)
    before = counters(server) or (0, 0)
    outcome = loads.over_nbd(server.uri, load, 0, seed)
    after = counters(server) or (0, 0)
    settle(server)
    return outcome, 1 - (after[1] - before[1]) / max(1, after[0] - before[0])


def measure_copies(parent: Path, scale: Scale, tree: Path | None) -> list[dict[str, Any]]:
    found = []
    for name, fraction in (("full copy", 1.0), ("10 % random 64 KiB blocks", 0.1)):
        with folders(parent) as where:
            kinds = servers.programs(where.state, tree)
            seconds = copies.compare_copies(
                where.media, where.state, scale.copy_bytes, fraction, scale.repeats, kinds
            )
        data = len(copies.pick_blocks(scale.copy_bytes, fraction, 0)) * copies.BLOCK
        found.append({"name": name, "data_bytes": data, "seconds": seconds})
        say(f"{name}: " + ", ".join(f"{n} {report.median(s):.3f} s" for n, s in seconds.items()))
    return found


def measure_big_volume(media: Path, state: Path, scale: Scale) -> dict[str, Any]:
    """Memory and start of a large, clean volume of sparse files."""
    with Volume(
        state, scale.big_bytes, "big", options=["--initial-sync", "skip"], media_folder=media
    ) as volume:
        volume.create()
        volume.start()
        volume.stop()
        took = []
        for _ in range(scale.repeats):
            began = time.perf_counter()
            volume.start()
            took.append(time.perf_counter() - began)
            resident = machine.resident_bytes(volume.pid)
            volume.stop()
    return memory_entry(resident, scale.big_bytes, report.median(took))


def memory_entry(
    resident: tuple[int, int], size_bytes: int, start_s: float | None
) -> dict[str, Any]:
    return {
        "resident_mib": resident[0] / MIB,
        "peak_mib": resident[1] / MIB,
        "allowed_mib": 80 + 20 * size_bytes / TIB,
        "start_s": start_s,
    }


def raw_note(media: Path, scale: Scale) -> str:
    """What the medium itself does at depth 1, as a sentence."""
    path = media / "raw.img"
    said = []
    for name, pattern, durable in (
        ("read", "randread", False),
        ("write", "randwrite", False),
        ("durable write", "randwrite", True),
    ):
        loads.make_written(path, scale.region_bytes)
        load = Load(name, pattern, 4 * KIB, 1, scale.region_bytes)
        outcome = loads.on_file(path, load, scale.seconds, 0, durable)
        said.append(f"{name} {outcome.mean_us:.0f} us")
    path.unlink()
    return f"The medium itself with O_DIRECT, 4 KiB, depth 1: {', '.join(said)}."


def measure_backing(
    name: str, note: str, parent: Path, scale: Scale, only: str, tree: Path | None
) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "note": note, "copies": []}
    print(f"bench: {name}", flush=True)
    with folders(parent) as where:
        found["raw_note"] = raw_note(where.media, scale)
        say(found["raw_note"])
        found |= measure_serving(where, scale, tree)
    if only != "serving":
        with folders(parent) as where:
            peer = "nbdkit" if parent == TMPFS else "qemu-nbd direct"
            found["miss"] = measure_misses(where, scale, peer, tree)
        found["copies"] = measure_copies(parent, scale, tree)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description="compare bitmapd with nbdkit, qemu-nbd, nbdcopy, dd"
    )
    parser.add_argument("--quick", action="store_true", help="a run that only shows it works")
    parser.add_argument("--compiled", type=Path, help="a tree with compiled modules")
    parser.add_argument("--only", choices=["all", "serving"], default="all")
    parser.add_argument("--disk", type=Path, default=ROOT / "bench-run", help="folder on a disk")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    options = parser.parse_args()
    scale = QUICK if options.quick else FULL
    results: dict[str, Any] = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "make bench",
        "quick": options.quick,
        "repeats": scale.repeats,
        "machine": machine.describe(),
        "backings": [
            measure_backing(name, note, parent, scale, options.only, options.compiled)
            for name, note, parent in (
                ("tmpfs", "All files in memory.", TMPFS),
                ("disk", DISK_NOTE, options.disk),
            )
        ],
    }
    served = results["backings"][0]
    memory = {"1 GiB, after the loads": memory_entry(served["resident"], scale.device_bytes, None)}
    with folders(TMPFS) as where:
        name = f"{scale.big_bytes // TIB} TiB, clean"
        memory[name] = measure_big_volume(where.media, where.state, scale)
    results["memory"] = memory
    with folders(TMPFS) as where:
        results["age"] = ages.measure_ages(where.media, where.state, scale.age)
    results["machine"]["load average at the end"] = machine.load_average()
    document = None if options.quick or options.only != "all" else ROOT / "docs" / "benchmarks.md"
    path = report.write(results, options.results, document)
    print(report.to_terminal(results))
    print(f"\nbench: results in {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
