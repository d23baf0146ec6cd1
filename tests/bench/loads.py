"""fio as the one load generator: what is asked of a server, and what came out."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from tests.support.volumes import run

KIB = 1 << 10
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Load:
    """One access pattern inside the first `region_bytes` of a device.

    It runs for a time, or where the time is 0 for a number of requests.
    """

    name: str
    pattern: str
    block_bytes: int
    depth: int
    region_bytes: int
    align_bytes: int = 0
    requests: int = 0  # of each job
    jobs: int = 1  # each with a connection of its own

    def options(self, seconds: int, seed: int) -> list[str]:
        said = [
            f"--rw={self.pattern}",
            f"--bs={self.block_bytes}",
            f"--iodepth={self.depth}",
            f"--size={self.region_bytes}",
            f"--randseed={seed}",
            "--norandommap=1",
            f"--numjobs={self.jobs}",
            "--group_reporting=1",
        ]
        if self.align_bytes:
            said.append(f"--blockalign={self.align_bytes}")
        if seconds and not self.requests:
            return [*said, "--time_based=1", f"--runtime={seconds}", "--ramp_time=1"]
        some = 2000 if self.block_bytes <= 64 * KIB else 64
        count = self.requests or some
        return [*said, f"--number_ios={count}", f"--io_size={count * self.block_bytes}"]


@dataclass(frozen=True, slots=True)
class Outcome:
    requests: int
    iops: float
    bytes_per_s: float
    mean_us: float
    p99_us: float
    p999_us: float


def loads(region_bytes: int, whole_bytes: int) -> list[Load]:
    """The six loads of the comparison; random ones stay in a working set that fits the record."""
    return [
        Load("4 KiB random write, depth 1", "randwrite", 4 * KIB, 1, region_bytes),
        Load("4 KiB random write, depth 16", "randwrite", 4 * KIB, 16, region_bytes),
        Load("4 KiB random read, depth 1", "randread", 4 * KIB, 1, region_bytes),
        Load("4 KiB random read, depth 16", "randread", 4 * KIB, 16, region_bytes),
        Load("1 MiB sequential write, depth 4", "write", MIB, 4, whole_bytes),
        Load("1 MiB sequential read, depth 4", "read", MIB, 4, whole_bytes),
    ]


def over_nbd(uri: str, load: Load, seconds: int, seed: int) -> Outcome:
    return _fio(["--ioengine=nbd", f"--uri={uri}", *load.options(seconds, seed)], seconds)


def on_file(path: Path, load: Load, seconds: int, seed: int, durable: bool = False) -> Outcome:
    """The medium itself: O_DIRECT, and O_DSYNC where `durable`."""
    command = ["--ioengine=libaio", "--direct=1", f"--filename={path}", "--overwrite=1"]
    if durable:
        command.append("--sync=dsync")
    return _fio([*command, *load.options(seconds, seed)], seconds)


def fill(uri: str, size_bytes: int) -> None:
    """Write the whole device once with data that do not compress, and flush."""
    load = Load("fill", "write", MIB, 8, size_bytes, requests=size_bytes // MIB)
    command = ["--ioengine=nbd", f"--uri={uri}", "--end_fsync=1", *load.options(0, 1)]
    _fio(command, 120)


def make_written(path: Path, size_bytes: int) -> None:
    """A file whose blocks are allocated, written and on the medium."""
    with path.open("wb") as file:
        file.write(os.urandom(size_bytes))
        file.flush()
        os.fsync(file.fileno())


def _fio(options: list[str], seconds: int) -> Outcome:
    command = ["fio", "--name=bench", "--output-format=json", "--thread=1", *options]
    output = run(command, timeout_s=seconds + 180)
    # fio may put notes in front of the JSON.
    job = json.loads(output[output.index("{") :])["jobs"][0]
    if job["error"]:
        raise RuntimeError(f"fio reported error {job['error']}: {' '.join(command)}")
    side = max((job["read"], job["write"]), key=lambda one: one["total_ios"])
    percentiles = side["clat_ns"].get("percentile", {})
    return Outcome(
        requests=side["total_ios"],
        iops=side["iops"],
        bytes_per_s=side["bw_bytes"],
        mean_us=side["lat_ns"]["mean"] / 1000,
        p99_us=percentiles.get("99.000000", 0) / 1000,
        p999_us=percentiles.get("99.900000", 0) / 1000,
    )
