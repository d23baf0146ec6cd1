"""What is asked of the devices in the guest: fio with direct I/O, and a database."""

from __future__ import annotations

import json
import mmap
import os
import re
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.vm.media import sh

KIB = 1 << 10
MIB = 1 << 20
# Random loads stay in a region of this size.
REGION_BYTES = 64 * MIB
# A place every so often: each is an extent of its own, and the one behind it is not written.
PLACE_BYTES = 256 * KIB
PLACES = 999


@dataclass(frozen=True, slots=True)
class Load:
    """`options` are fio's own."""

    name: str
    title: str
    options: tuple[str, ...]
    block_bytes: int = 4 * KIB
    reads: bool = False

    @property
    def unit(self) -> str:
        return "MiB/s" if self.block_bytes > 64 * KIB else "1/s"


def _random(pattern: str, depth: int) -> tuple[str, ...]:
    return (f"--rw={pattern}", "--bs=4k", f"--iodepth={depth}", f"--size={REGION_BYTES}")


def _spread(depth: int, *more: str) -> tuple[str, ...]:
    size = PLACES * PLACE_BYTES
    places = (f"--blockalign={PLACE_BYTES}", f"--size={size}")
    return ("--rw=randwrite", "--bs=4k", f"--iodepth={depth}", *places, *more)


def _mixed(depth: int) -> tuple[str, ...]:
    zones = "--random_distribution=zoned:90/10:10/90"
    return ("--rw=randwrite", "--bs=4k", f"--iodepth={depth}", zones)


RANDOM_WRITES = (
    Load("rw1", "4 KiB random write, depth 1", _random("randwrite", 1)),
    Load("rw16", "4 KiB random write, depth 16", _random("randwrite", 16)),
)
RANDOM_READS = (
    Load("rr1", "4 KiB random read, depth 1", _random("randread", 1), reads=True),
    Load("rr16", "4 KiB random read, depth 16", _random("randread", 16), reads=True),
)
SEQUENTIAL = Load(
    "seq",
    "128 KiB sequential write, depth 4",
    ("--rw=write", "--bs=128k", "--iodepth=4", f"--size={REGION_BYTES}"),
    block_bytes=128 * KIB,
)
FSYNC = Load(
    "fsync", "4 KiB random write, each with fdatasync", (*_random("randwrite", 1), "--fdatasync=1")
)
RANDOM = (*RANDOM_WRITES, *RANDOM_READS)
MAIN = (*RANDOM, SEQUENTIAL, FSYNC)

# At 999 places 256 KiB apart: the same load for one segment and for 2,000.
SPREAD = (
    Load("spread16", "4 KiB random write, depth 16", _spread(16)),
    Load("spread-fsync", "with fdatasync each", _spread(1, "--fdatasync=1")),
)
MIXED = (
    Load("mix1", "mix, depth 1", _mixed(1)),
    Load("mix16", "mix, depth 16", _mixed(16)),
)
MISS_DEPTHS = (1, 16)
DATABASE = "database"
FILL = "fill"
TRIM = "trim"


@dataclass(frozen=True, slots=True)
class Outcome:
    rate: float  # requests or, for large blocks, MiB, a second
    mean_us: float
    p99_us: float
    requests: int


def fio(device: str, load: Load, seconds: float, ramp_s: float, seed: int) -> Outcome:
    """For a time; what was done in the first `ramp_s` does not count."""
    timed = (f"--runtime={seconds}", f"--ramp_time={ramp_s}", "--time_based=1", "--norandommap=1")
    return _fio(device, load.block_bytes, seconds + ramp_s, *load.options, *timed, seed=seed)


def fio_each_once(
    device: str, first_byte: int, stride_bytes: int, count: int, depth: int
) -> Outcome:
    """One write of 4 KiB every `stride_bytes`."""
    rest_kib = stride_bytes // KIB - 4
    words = (f"--rw=write:{rest_kib}k", "--bs=4k", f"--iodepth={depth}")
    place = (f"--offset={first_byte}", f"--size={count * stride_bytes}", f"--number_ios={count}")
    return _fio(device, 4 * KIB, 60, *words, *place, seed=1)


def fill(device: str, size_bytes: int) -> None:
    """So that no measurement has to take memory for the disk."""
    fd = os.open(device, os.O_WRONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, MIB) as piece:
            for offset in range(0, size_bytes, MIB):
                os.pwrite(fd, piece, offset)
    finally:
        os.close(fd)


def _fio(device: str, block_bytes: int, seconds: float, *options: str, seed: int) -> Outcome:
    command = ["fio", "--name=bench", f"--filename={device}", "--ioengine=libaio", "--direct=1"]
    command += ["--thread=1", f"--randseed={seed + 1}", "--output-format=json", *options]
    output = sh(*command, timeout_s=seconds + 120)
    # fio may put notes in front of the JSON.
    job: dict[str, Any] = json.loads(output[output.index("{") :])["jobs"][0]
    if job["error"]:
        raise RuntimeError(f"fio reported error {job['error']}: {' '.join(command)}")
    side = max((job["read"], job["write"]), key=lambda one: int(one["total_ios"]))
    rate = side["iops"] if block_bytes <= 64 * KIB else side["bw_bytes"] / MIB
    return Outcome(
        rate,
        side["lat_ns"]["mean"] / 1000,
        side["clat_ns"].get("percentile", {}).get("99.000000", 0) / 1000,
        int(side["total_ios"]),
    )


@contextmanager
def source_tree() -> Iterator[Path]:
    """An archive in memory: Python's own library."""
    with tempfile.TemporaryDirectory(prefix="bvm", dir="/dev/shm") as folder:
        archive = Path(folder) / "tree.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(Path(os.__file__).parent, "tree", filter=_source)
        yield archive


def _source(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if entry.name.endswith(("__pycache__", "dist-packages")) else entry


def unpack(archive: Path, folder: Path) -> float:
    """MiB a second."""
    began_s = time.monotonic()
    sh("tar", "-xf", str(archive), "-C", str(folder))
    sh("sync", "-f", str(folder))
    return archive.stat().st_size / MIB / (time.monotonic() - began_s)


def trim(folder: Path) -> float:
    """MiB of free space a second; CommandFailed where there are no discards."""
    began_s = time.monotonic()
    said = sh("fstrim", "-v", str(folder))
    seconds = time.monotonic() - began_s
    (trimmed,) = re.findall(r"\((\d+) bytes\)", said)
    return int(trimmed) / MIB / seconds


def database(folder: Path, seconds: float) -> float:
    """Transactions a second: SQLite, write-ahead log, synchronous=FULL, one row each."""
    with closing(sqlite3.connect(folder / "bench.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, body BLOB)")
        body = bytes(range(200))
        count, began_s = 0, time.monotonic()
        while (took_s := time.monotonic() - began_s) < seconds:
            connection.execute("INSERT INTO t(body) VALUES (?)", (body,))
            count += 1
    return count / took_s
