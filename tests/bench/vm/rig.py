"""All contenders side by side in one guest; one that cannot be set up is named, with the reason."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.vm import peers
from tests.bench.vm.far import Site
from tests.bench.vm.loads import KIB, MIB, PLACE_BYTES, PLACES
from tests.bench.vm.media import CommandFailed, Media, sh
from tests.bench.vm.stack import PointStack, Shape, Stack

SIZE_BYTES = 256 * MIB
MISS_EXTENT_BYTES = 64 * KIB

RAW, LINEAR, ERA = "raw device", "dm-linear", "dm-era alone"
THREE = "dm-linear, three deep"
WHOLE, SPLIT = "dm-linear over dm-era", "reads past both by dm-delay"
HITS, PAUSED = "stack, all hits", "stack, all hits, paused"
SEGMENTS, MISSES = "stack, 2,000 segments", "stack, all misses"
CLASSES = "stack, one kind of write after another"
POINTS = "stack, all hits, with points"
MIX, FRESH = "stack, defaults", "stack, defaults, nothing recorded"
MD, MD_BEHIND = "md raid1, bitmap", "md raid1, bitmap, write-behind"
MIRROR = "dm-mirror, disk log"
DRBD, DRBD_ALONE = "DRBD 8.4, protocol A", "DRBD 8.4, disconnected"
SLOW_LINEAR, SLOW_HITS = "dm-linear, slow disk", "stack, all hits, slow disk"
PEERS = (MD, MD_BEHIND, MIRROR, DRBD, DRBD_ALONE)
MAIN = (RAW, LINEAR, THREE, ERA, HITS, PAUSED, *PEERS)
LAYERS = (RAW, LINEAR, ERA, WHOLE, SPLIT, HITS)
SLOW = (SLOW_LINEAR, SLOW_HITS)
SPREAD = (LINEAR, HITS, SEGMENTS)
MIXED = (LINEAR, HITS, MIX, *PEERS)
BLOCKS_KIB = (64, 256, 1024)
BLOCKS = tuple(f"stack, all direct, blocks of {kib} KiB" for kib in BLOCKS_KIB)
PLAIN = BLOCKS[0]  # as large as those of a volume with a receiver

# The emulated processor is about ten times slower than the bare one, so beside it this is what a
# quick NVMe drive is beside the bare one.
LATENCY_US = 100

_ROOMY = ("--record-limit", f"{2 * SIZE_BYTES}B", "--predictor", "lru")
# Nothing leaves a roomy record by itself, so what is direct stays direct.
SHAPES = {
    HITS: Shape("hits", SIZE_BYTES, MIB, _ROOMY),
    SLOW_HITS: Shape("slow", SIZE_BYTES, MIB, _ROOMY, LATENCY_US),
    SEGMENTS: Shape("segs", SIZE_BYTES, PLACE_BYTES // 2, _ROOMY),
    MISSES: Shape("miss", SIZE_BYTES, MISS_EXTENT_BYTES, _ROOMY),
    CLASSES: Shape("class", SIZE_BYTES, MIB, _ROOMY),
    POINTS: Shape("points", SIZE_BYTES, MIB, _ROOMY, points=True),
    MIX: Shape("mix", SIZE_BYTES, MIB),
    FRESH: Shape("fresh", SIZE_BYTES, MIB),
    **{
        name: Shape(f"b{kib}", SIZE_BYTES, MIB, (*_ROOMY, "--block-size", f"{kib}KiB"))
        for name, kib in zip(BLOCKS, BLOCKS_KIB, strict=True)
    },
}


@dataclass(slots=True)
class Rig:
    """Devices by contender, volumes by contender, and why others are not here."""

    devices: dict[str, str] = field(default_factory=dict)
    stacks: dict[str, Stack] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def keep_awake(self) -> None:
        for stack in {stack for name, stack in self.stacks.items() if name != FRESH}:
            stack.keep_awake()


@contextmanager
def rig(folder: Path, wanted: Collection[str], site: Site) -> Iterator[Rig]:
    """Those of the contenders that are wanted.  The volumes' configuration and sockets are in the
    folder, whose path must be short; `site` is where points go."""
    made = Rig(versions=_versions())
    with ExitStack() as stack:
        media = stack.enter_context(Media())
        sh("modprobe", "dm-mod")

        def disk(name: str, latency_us: int = 0) -> str:
            # One each, so that each can have a file system.
            return media.make(name, SIZE_BYTES, latency_us)

        peer: dict[str, Callable[[], AbstractContextManager[str]]] = {
            RAW: lambda: nullcontext(disk("raw")),
            LINEAR: lambda: peers.linear("linear", disk("lower"), SIZE_BYTES),
            THREE: lambda: peers.three_deep(disk("deep"), SIZE_BYTES),
            SLOW_LINEAR: lambda: peers.linear("slow-linear", disk("slow", LATENCY_US), SIZE_BYTES),
            ERA: lambda: peers.era(media, disk("tracked"), SIZE_BYTES),
            WHOLE: lambda: peers.layers(media, disk("whole"), SIZE_BYTES, splits=False),
            SPLIT: lambda: peers.layers(media, disk("split"), SIZE_BYTES, splits=True),
            MD: lambda: peers.md_raid1(media, 0, SIZE_BYTES, write_behind=False),
            MD_BEHIND: lambda: peers.md_raid1(media, 1, SIZE_BYTES, write_behind=True),
            MIRROR: lambda: peers.dm_mirror(media, SIZE_BYTES),
            DRBD: lambda: peers.drbd_connected(media, SIZE_BYTES),
            DRBD_ALONE: lambda: peers.drbd_alone(media, SIZE_BYTES),
        }
        for name in filter(wanted.__contains__, peer):
            try:
                made.devices[name] = stack.enter_context(peer[name]())
            except (CommandFailed, OSError, TimeoutError) as error:
                made.missing[name] = str(error)
                print(f"bench: NOT MEASURED: {name}: {error}", flush=True)
        # Without these there is nothing to compare: what goes wrong here ends the run.
        for name in filter(wanted.__contains__, SHAPES):
            shape = SHAPES[name]
            volume: Stack = stack.enter_context(
                PointStack(media, folder, shape, site)
                if shape.points
                else Stack(media, folder, shape)
            )
            made.stacks[name], made.devices[name] = volume, volume.device
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda volume: volume.start(), made.stacks.values()))
        if PAUSED in wanted:
            made.stacks[PAUSED], made.devices[PAUSED] = made.stacks[HITS], made.devices[HITS]
        for name in {HITS, SLOW_HITS, POINTS, *BLOCKS}.intersection(made.stacks):
            made.stacks[name].make_direct(list(range(0, SIZE_BYTES, MIB)))
        if SEGMENTS in made.stacks:
            made.stacks[SEGMENTS].make_direct([place * PLACE_BYTES for place in range(PLACES)])
        yield made


def _versions() -> dict[str, str]:
    found = {"guest kernel": sh("uname", "-r").strip(), "fio": sh("fio", "--version").strip()}
    for module in ("drbd", "md-mod"):
        version = sh("modinfo", "-F", "version", module, check=False).strip()
        if version:
            found[module] = version
    return found
