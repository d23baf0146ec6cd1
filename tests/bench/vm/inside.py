"""The part of `make bench-vm` that runs in the guest; what it measured goes to a file as JSON.

1. All contenders exist at the same time, each over disks of its own.
2. Contenders take turns within each load, and the order turns with each repeat, so that a slow
   moment of the machine below does not always meet the same one.
3. A volume's turn with writes lasts for one of the longest eras, since dm-era marks blocks anew in
   each.  What comes in the seconds before does not count; so there is a barrier in it, wherever it
   falls, the marks of one era at least, and something to copy.
4. A volume's turn ends when its copier has nothing left to do.  At the end both ends of every
   volume are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tests.bench.vm import far, loads, rig
from tests.bench.vm.far import Site
from tests.bench.vm.loads import Load
from tests.bench.vm.media import MIB, CommandFailed, sh
from tests.bench.vm.rig import Rig
from tests.bench.vm.stack import Delta, PointStack

Results = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured; `longest_era_s` is the longest that the default era interval stands
    for, or less where figures mean nothing; `few`: of each kind of load only one or two."""

    name: str
    repeats: int
    seconds: float
    read_s: float
    longest_era_s: float
    ramp_s: float
    window_s: float
    misses: int
    interval_s: float  # of points
    few: bool = False

    def of(self, chosen: tuple[Load, ...]) -> tuple[Load, ...]:
        return tuple(load for load in chosen if load.name in FEW) if self.few else chosen


FEW = {"rw16", "rr1", "fsync", "spread-fsync", "mix16"}
FULL = Scale("full", 3, 1.0, 1.0, 20.0, 3.0, 8.0, 600, 30.0)
SCALES = {
    scale.name: scale
    for scale in (
        FULL,
        Scale("quick", 1, 0.4, 0.3, 2.0, 0, 4.0, 200, 4.0, few=True),
        Scale("smoke", 1, 0.1, 0.1, 0.1, 0, 1.2, 50, 2.0, few=True),
    )
}


MARK_ERAS_S = (5, 20, 60)
CLASS_EXTENTS = 80
GATED_EXTENTS = 40  # too few for a change of the table
CLASSES = (
    "miss",
    "hit through the gate",
    "in the kernel, first in its era",
    "in the kernel, again",
)


class Bench:
    def __init__(self, made: Rig, scale: Scale) -> None:
        self._rig = made
        self._scale = scale
        self._seed = 0

    def compare(self, chosen: tuple[Load, ...], names: tuple[str, ...]) -> list[Results]:
        return [self._compare(load, names) for load in self._scale.of(chosen)]

    def _compare(self, load: Load, names: tuple[str, ...]) -> Results:
        left_out = set() if load in loads.RANDOM_WRITES else {rig.THREE, rig.PAUSED}
        if load.reads:  # what a mirror does with writes does not matter then
            left_out |= set(rig.PEERS)
        outcomes: dict[str, list[Results]] = {}
        for name in self._turns([name for name in names if name not in left_out]):
            outcomes.setdefault(name, []).append(self._turn(name, load))
        return self._found(load.name, load.title, load.unit, outcomes)

    def _turns(self, names: Iterable[str]) -> Iterator[str]:
        """Those that are there, one after the other, as often as is measured."""
        present = [name for name in names if name in self._rig.devices]
        for repeat in range(self._scale.repeats):
            turn = repeat % len(present)
            for name in present[turn:] + present[:turn]:
                self._rig.keep_awake()
                yield name

    def _found(
        self, name: str, title: str, unit: str, outcomes: dict[str, list[Results]]
    ) -> Results:
        self._tell(title, _rates(outcomes))
        return {"name": name, "title": title, "unit": unit, "outcomes": outcomes}

    def _turn(self, name: str, load: Load, lasts_s: float = 0.0) -> Results:
        """`lasts_s`: of a volume, instead of the longest era."""
        scale, stack = self._scale, self._rig.stacks.get(name)
        self._seed += 1
        device = self._rig.devices[name]
        if stack is None:
            seconds = scale.read_s if load.reads else scale.seconds
            return asdict(loads.fio(device, load, seconds, 0, self._seed))
        stack.make_ready()
        seconds = scale.read_s if load.reads else lasts_s or scale.longest_era_s
        ramp_s = 0 if load.reads else scale.ramp_s
        if name == rig.PAUSED:
            stack.call("pause")
        with stack.watched() as deltas:
            outcome = loads.fio(device, load, seconds, ramp_s, self._seed)
        if name == rig.PAUSED:
            stack.call("resume")
        stack.settle()
        return {**asdict(outcome), "busy_s": seconds + ramp_s, **_said(deltas)}

    def misses(self) -> list[Results]:
        """Every write goes to an extent that is not in the record; each extent is used once."""
        stack, count, found = self._rig.stacks[rig.MISSES], self._scale.misses, []
        first_byte = 0
        for depth in loads.MISS_DEPTHS:
            outcomes = []
            for _ in range(self._scale.repeats):
                with stack.watched() as deltas:
                    outcome = loads.fio_each_once(
                        stack.device, first_byte, rig.MISS_EXTENT_BYTES, count, depth
                    )
                first_byte += count * rig.MISS_EXTENT_BYTES
                stack.settle()
                outcomes.append({**asdict(outcome), **_said(deltas)})
            title = f"each write into another extent, depth {depth}"
            found.append(
                {"name": f"miss{depth}", "title": title, "unit": "1/s"}
                | {"outcomes": {rig.MISSES: outcomes}}
            )
            self._tell(title, {rig.MISSES: [one["rate"] for one in outcomes]})
        return found

    def classes(self) -> list[Results]:
        """One write to each of some extents, which is at first a miss and in the end nothing but
        three layers of device-mapper; each extent is used for one repeat."""
        stack, count = self._rig.stacks[rig.CLASSES], CLASS_EXTENTS
        outcomes: dict[str, list[Results]] = {title: [] for title in CLASSES}

        def write(title: str, first_byte: int, times: int) -> None:
            with stack.watched() as deltas:
                outcome = loads.fio_each_once(stack.device, first_byte, MIB, times, 1)
            outcomes[title].append({**asdict(outcome), **_said(deltas)})

        for repeat in range(self._scale.repeats):
            self._rig.keep_awake()
            first_byte = repeat * count * MIB
            offsets = [first_byte + number * MIB for number in range(count)]
            write(CLASSES[0], first_byte, count)
            write(CLASSES[1], first_byte, GATED_EXTENTS)
            stack.make_direct([*range(0, first_byte, MIB), *offsets])
            write(CLASSES[2], first_byte, count)
            write(CLASSES[3], first_byte, count)
            stack.settle()
        self._tell("mean us", {t: [one["mean_us"] for one in all_] for t, all_ in outcomes.items()})
        return [
            {
                "name": "class",
                "title": title,
                "unit": "1/s",
                "outcomes": {rig.CLASSES: outcomes[title]},
            }
            for title in CLASSES
        ]

    def marks(self) -> list[Results]:
        """What dm-era's marks and the copying of whole blocks cost, by block and by era."""
        lasts_s = max(MARK_ERAS_S) * self._scale.longest_era_s / FULL.longest_era_s
        found = []
        for era_s in MARK_ERAS_S:
            for name in rig.BLOCKS:
                self._rig.stacks[name].call("set", era_interval=f"{era_s}s")
            load = replace(
                loads.MIXED[0], name=f"marks{era_s}", title=f"mix, depth 1, eras of {era_s} s"
            )
            outcomes = {
                name: [self._turn(name, load, lasts_s)] for name in (rig.LINEAR, *rig.BLOCKS)
            }
            found.append(self._found(load.name, load.title, load.unit, outcomes))
        return found

    def points(self) -> list[Results]:
        """With one cut in the middle of a turn that lasts as long as the interval, and without a
        receiver."""
        names, seconds = (rig.PLAIN, rig.POINTS), self._scale.interval_s
        found = []
        for load in self._scale.of(loads.RANDOM_WRITES):
            outcomes: dict[str, list[Results]] = {}
            for name in self._turns(names):
                self._seed += 1
                stack = self._rig.stacks[name]
                stack.make_ready()
                cut = stack.cut_after(seconds / 2) if isinstance(stack, PointStack) else None
                with stack.watched() as deltas, cut or nullcontext():
                    outcome = loads.fio(stack.device, load, seconds, 0, self._seed)
                outcomes.setdefault(name, []).append({**asdict(outcome), **_said(deltas)})
            title = f"{load.title}, a point every {seconds:g} s"
            found.append(self._found(load.name, title, load.unit, outcomes))
        return found

    def windows(self) -> list[Results]:
        """How long barriers hold writes; with short eras, so that there are many of them."""
        found = []
        for name, load in (
            (rig.HITS, loads.RANDOM_WRITES[1]),
            (rig.SEGMENTS, loads.SPREAD[0]),
            (rig.MIX, loads.MIXED[1]),
        ):
            self._rig.keep_awake()
            stack = self._rig.stacks[name]
            stack.call("set", era_interval="300ms")
            stack.make_ready()
            with stack.watched() as deltas, stack.sampled() as windows_s:
                loads.fio(stack.device, load, self._scale.window_s, 0, 1)
            stack.call("set", era_interval="auto")
            stack.settle()
            found.append({"name": name, "windows_s": windows_s, **_said(deltas)})
            self._tell(f"windows, {name}, ms", {name: [1000 * one for one in windows_s]})
        return found

    def databases(self) -> Results:
        """SQLite on ext4 on each of them."""
        left_out = {rig.THREE, rig.PAUSED}
        wanted = [name for name in (*rig.MAIN, rig.MIX) if name not in left_out]
        outcomes: dict[str, list[Results]] = {}
        for name in self._turns(wanted):
            stack = self._rig.stacks.get(name)
            if stack is not None:
                stack.make_ready()
            with _mounted(self._rig.devices[name]) as folder:
                rate = loads.database(folder, self._scale.seconds)
            outcomes.setdefault(name, []).append({"rate": rate})
            if stack is not None:
                stack.settle()
        title = "SQLite, one row a transaction, on ext4"
        return self._found(loads.DATABASE, title, "1/s", outcomes)

    def fills(self) -> Results:
        """A source tree is unpacked into a fresh ext4, and synced; the volume has the default
        settings, and its record is empty."""
        wanted = (rig.LINEAR, rig.FRESH, *rig.PEERS)
        outcomes: dict[str, list[Results]] = {}
        with loads.source_tree() as tree:
            for name in self._turns(wanted):
                stack = self._rig.stacks.get(name)
                if stack is not None:
                    stack.until(lambda status: not status["record_extents"], "at rest")
                with _mounted(self._rig.devices[name]) as folder:
                    outcomes.setdefault(name, []).append({"rate": loads.unpack(tree, folder)})
                if stack is not None:
                    stack.settle()
        title = "first fill: a source tree is unpacked on ext4, and synced"
        return self._found(loads.FILL, title, "MiB/s", outcomes)

    def trims(self) -> Results:
        """A fresh ext4 is trimmed, of which mkfs has discarded everything before; the volume has
        the default settings."""
        wanted = (rig.RAW, rig.LINEAR, rig.FRESH, *rig.PEERS)
        outcomes: dict[str, list[Results]] = {}
        for name in self._turns(wanted):
            stack = self._rig.stacks.get(name)
            # A mirror that takes no discards has no outcome.
            with _mounted(self._rig.devices[name]) as folder, contextlib.suppress(CommandFailed):
                rate = loads.trim(folder)
                outcomes.setdefault(name, []).append({"rate": rate})
            if stack is not None:
                stack.settle()
        return self._found(loads.TRIM, "fstrim of a fresh ext4", "MiB/s", outcomes)

    def equal(self) -> dict[str, bool]:
        """Stops the volumes."""
        stacks = self._rig.stacks
        return {name: stack.stop() for name, stack in stacks.items() if name != rig.PAUSED}

    def _tell(self, what: str, figures: dict[str, list[float]]) -> None:
        shown = ", ".join(f"{name} {max(all_, default=0):.1f}" for name, all_ in figures.items())
        print(f"  {what}: {shown}", flush=True)


@contextmanager
def _mounted(device: str) -> Iterator[Path]:
    sh("mkfs.ext4", "-q", "-F", device)
    with tempfile.TemporaryDirectory(prefix="bvm") as folder:
        sh("mount", "-o", "noatime", device, folder)
        try:
            yield Path(folder)
        finally:
            sh("umount", folder)


def _rates(outcomes: dict[str, list[Results]]) -> dict[str, list[float]]:
    return {name: [one["rate"] for one in all_] for name, all_ in outcomes.items()}


def _said(deltas: list[Delta]) -> Results:
    (delta,) = deltas
    shares = {"hit_share": delta.hit_share, "direct_share": delta.direct_share}
    return {"volume": {**asdict(delta), **shares}}


def measure(scale: Scale, site: Site, only: Sequence[str] = ()) -> Results:
    """All parts but `ASKED_FOR`, or only some, and the contenders that these need; points go to
    that site."""
    chosen = [part for part in PARTS if (part in only if only else part not in ASKED_FOR)]
    wanted = {name for part in chosen for name in PARTS[part][0]}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bvm")))
        began_s = time.monotonic()
        made = stack.enter_context(rig.rig(folder, wanted, site))
        print("bench: contenders: " + ", ".join(made.devices), flush=True)
        untouched = {rig.SEGMENTS, rig.FRESH, rig.MISSES, rig.CLASSES}
        whole = set(rig.MIXED)  # the mix is written everywhere
        filled = {name: device for name, device in made.devices.items() if name not in untouched}
        for device in set(filled.values()):
            everywhere = device in {filled[name] for name in whole if name in filled}
            loads.fill(device, rig.SIZE_BYTES if everywhere else loads.REGION_BYTES)
        for volume in made.stacks.values():
            volume.settle()
        print(f"bench: set up: {time.monotonic() - began_s:.0f} s", flush=True)
        bench = Bench(made, scale)
        results: Results = {
            "missing": made.missing,
            "versions": made.versions,
            "scale": asdict(scale),
        }
        for part in chosen:
            began_s = time.monotonic()
            results[part] = PARTS[part][1](bench)
            print(f"bench: {part}: {time.monotonic() - began_s:.0f} s", flush=True)
        return results


# Each with the contenders that it is about.
PARTS: dict[str, tuple[tuple[str, ...], Callable[[Bench], Any]]] = {
    "main": (rig.MAIN, lambda bench: bench.compare(loads.MAIN, rig.MAIN)),
    "slow": (rig.SLOW, lambda bench: bench.compare(loads.RANDOM_WRITES, rig.SLOW)),
    "spread": (rig.SPREAD, lambda bench: bench.compare(loads.SPREAD, rig.SPREAD)),
    "layers": (rig.LAYERS, lambda bench: bench.compare(loads.RANDOM, rig.LAYERS)),
    "classes": ((rig.CLASSES,), Bench.classes),
    "misses": ((rig.MISSES,), Bench.misses),
    "mixed": (rig.MIXED, lambda bench: bench.compare(loads.MIXED, rig.MIXED)),
    "marks": ((rig.LINEAR, *rig.BLOCKS), Bench.marks),
    "points": ((rig.PLAIN, rig.POINTS), Bench.points),
    "windows": ((rig.HITS, rig.SEGMENTS, rig.MIX), Bench.windows),
    "database": ((*rig.MAIN, rig.MIX), Bench.databases),
    "fill": ((rig.LINEAR, rig.FRESH, *rig.PEERS), Bench.fills),
    "trim": ((rig.RAW, rig.LINEAR, rig.FRESH, *rig.PEERS), Bench.trims),
    "equal": ((), Bench.equal),
}
# For a decision, not for the page.
ASKED_FOR = {"marks"}


def main() -> int:
    parser = argparse.ArgumentParser(description="the guest's part of make bench-vm")
    parser.add_argument("--scale", choices=sorted(SCALES), default="full")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--site", type=Path, required=True, help="JSON file that says where it is")
    parser.add_argument("--only", action="append", choices=PARTS, default=[])
    options = parser.parse_args()
    far.join_network()
    site = Site(**json.loads(options.site.read_text()))
    results = measure(SCALES[options.scale], site, options.only)
    options.out.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
