"""How old the content of the secondary becomes while hosts write more than is copied.

A host writes random blocks of a region at a steady rate, and one block again and again with the
time in it.  What the secondary's file holds of that block says how old it is there;
`content_age_seconds` says it of all others, or more.
"""

from __future__ import annotations

import os
import random
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import rawnbd
from tests.support.volumes import MIB, Volume

BLOCK = 64 << 10
HOT_INTERVAL_S = 0.075
HOT_BLOCK = 7


@dataclass(frozen=True, slots=True)
class AgeLoad:
    """What is written, and how much of it is copied."""

    region_bytes: int
    load_bytes_per_s: float
    copy_rate: str
    seconds: float


def measure_ages(media: Path, state: Path, load: AgeLoad) -> dict[str, Any]:
    """The worst age of the hottest block, from when each block was dirty once, and of the rest."""
    options = ["--initial-sync", "skip", "--copy-rate", load.copy_rate]
    with Volume(state, load.region_bytes + MIB, "age", options, media_folder=media) as volume:
        volume.create()
        volume.start()
        ages_s = _write(volume, load)
        told_s = volume.status()["content_age_seconds"]
        volume.stop("--now")
    return {
        "region_bytes": load.region_bytes,
        "load_bytes_per_s": load.load_bytes_per_s,
        "copy_rate": load.copy_rate,
        "seconds": load.seconds,
        "hottest_age_s": max(ages_s),
        "content_age_s": told_s,
    }


def _write(volume: Volume, load: AgeLoad) -> list[float]:
    """Ages of the hottest block in the second half of the load."""
    chance, data = random.Random(1), bytearray(random.Random(2).randbytes(BLOCK))
    blocks = load.region_bytes // BLOCK
    began_s = hot_s = time.monotonic()
    written_bytes, ages_s = 0, [0.0]
    with volume.secondary.open("rb", buffering=0) as far, volume.host() as host:
        while (now_s := time.monotonic()) - began_s < load.seconds:
            if now_s >= hot_s:
                hot_s += HOT_INTERVAL_S
                data[:8] = struct.pack("<d", now_s)
                host.call(rawnbd.WRITE, HOT_BLOCK * BLOCK, BLOCK, bytes(data))
                if now_s - began_s > load.seconds / 2:
                    (held_s,) = struct.unpack("<d", os.pread(far.fileno(), 8, HOT_BLOCK * BLOCK))
                    ages_s.append(now_s - max(held_s, began_s))
            block = chance.randrange(HOT_BLOCK + 1, blocks)
            host.call(rawnbd.WRITE, block * BLOCK, BLOCK, bytes(data))
            written_bytes += BLOCK
            ahead_s = written_bytes / load.load_bytes_per_s - (time.monotonic() - began_s)
            time.sleep(max(0.0, min(ahead_s, HOT_INTERVAL_S)))
        host.disconnect()
    return ages_s
