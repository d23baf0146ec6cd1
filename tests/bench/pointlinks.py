"""What points cost on their way and at the receiver: the link, the journal, promote, failback.

Each part makes two sites of its own and returns figures by name; `tests.bench.points` prints them.
"""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.bench import loads
from tests.bench.loads import KIB, MIB
from tests.bench.machine import processor_s
from tests.bench.pairlinks import quartiles
from tests.support import rawnbd
from tests.support.loops import loop_device
from tests.support.pairlink import Link
from tests.support.sites import Sites
from tests.support.volumes import Volume, make_file

GIB = 1 << 30
BLOCK_BYTES = 64 * KIB
SECTOR_BYTES = 512

Found = dict[str, Any]


@contextmanager
def two_sites(size_bytes: int, *options: str, **more: Any) -> Iterator[Sites]:
    """Everything in memory, extents as small as blocks, nothing sent before a test says so."""
    with (
        tempfile.TemporaryDirectory(prefix="bp", dir="/dev/shm") as folder,
        Sites(Path(folder), size_bytes, "--extent-size", "64KiB", *options, **more) as sites,
    ):
        sites.create()
        yield sites


@contextmanager
def cuttable(size_bytes: int, *options: str, **more: Any) -> Iterator[tuple[Sites, Link]]:
    """Two sites with somebody in the middle of the link."""
    with tempfile.TemporaryDirectory(prefix="bl", dir="/dev/shm") as folder:
        outer = Path(folder) / "outer"
        with two_sites(
            size_bytes, *options, secondary=f"receiver+unix:///vol0?socket={outer}", **more
        ) as sites:
            link = Link(outer, sites.folder / "link")
            try:
                yield sites, link
            finally:
                link.close()


def scatter(volume: Volume, total_bytes: int, seed: int, run_bytes: int = BLOCK_BYTES) -> None:
    """Write so much to runs anywhere, what does not compress, each place once."""
    size_bytes = min(run_bytes, BLOCK_BYTES)  # of a write
    chance = random.Random(seed)
    runs = chance.sample(range(volume.size_bytes // run_bytes), total_bytes // run_bytes)
    with volume.host() as host:
        for at in (
            run * run_bytes + step for run in runs for step in range(0, run_bytes, size_bytes)
        ):
            host.submit(rawnbd.WRITE, at, size_bytes, chance.randbytes(size_bytes))
            while host.in_flight > 7:
                host.reply()
        while host.in_flight:
            host.reply()
        host.disconnect()


def load_at(volume: Volume, rate: str, seconds: float) -> subprocess.Popen[bytes]:
    """fio that writes blocks anywhere at this rate."""
    command = [
        "fio", "--name=b", "--thread=1", "--ioengine=nbd", f"--uri={volume.uri}", "--rw=randwrite",
        "--bs=64k", "--iodepth=4", "--norandommap=1", f"--size={volume.size_bytes}",
        "--time_based=1", f"--runtime={seconds:.0f}", f"--rate={rate}", "--refill_buffers=1",
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def measure_age(interval_s: int, cycles: int, size_bytes: int) -> Found:
    """Hosts write half of what the link carries; the age of the newest point, all the time."""
    oldest_s = 0.0
    options = ("--copy-rate", "20MiB", "--compress", "off", "--point-interval", f"{interval_s}s")
    with two_sites(size_bytes, *options, journal_bytes=512 * MIB) as sites:
        sites.start()
        with load_at(sites.near, "10m", interval_s * (cycles + 1)) as load:
            sites.point(sites.points()["number"])  # the first one under load
            with sites.near.control() as control:
                while load.poll() is None:
                    age_s = control.call("status")["points"]["age_seconds"]
                    oldest_s = max(oldest_s, age_s or 0.0)
                    time.sleep(0.1)
    return {"interval s": interval_s, "oldest / interval": oldest_s / interval_s}


def points_per_hour(round_trip_s: float, interval_s: int, cycles: int, size_bytes: int) -> float:
    options = ("--compress", "off", "--point-interval", f"{interval_s}s")
    with cuttable(size_bytes, *options) as (sites, link):
        sites.start()
        link.delay_s = round_trip_s / 2
        with load_at(sites.near, "2m", interval_s * (cycles + 3)):
            sites.point(sites.points()["number"])
            began_s, before = time.monotonic(), sites.points()["number"]
            sites.point(before + cycles - 1)
            took_s = time.monotonic() - began_s
    return 3600 * cycles / took_s


def measure_round_trip(interval_s: int, cycles: int, size_bytes: int) -> Found:
    slow, fast = (
        points_per_hour(seconds, interval_s, cycles, size_bytes) for seconds in (0.2, 0.001)
    )
    return {"interval s": interval_s, "points an hour, 200 ms / 1 ms": slow / fast}


def measure_cuts(cuts: int, sent_bytes: int, size_bytes: int) -> Found:
    """One point, during which the link is cut again and again, beside one without."""
    sent: list[int] = []
    options = ("--copy-rate", "10MiB", "--compress", "off")
    with cuttable(size_bytes, *options, journal_bytes=512 * MIB) as (sites, link):
        sites.start()
        for number in (0, cuts):
            sites.near.dmctl("set", "vol0", "point-interval=1h")
            before = sites.points()
            scatter(sites.near, sent_bytes, number)
            waiting = threading.Thread(
                target=sites.near.dmctl,
                args=("point", "vol0", "--wait"),
                kwargs={"check": False, "timeout_s": 310},  # it ends with the first cut
            )
            waiting.start()
            passed = before["sent_bytes_total"]
            for _ in range(number):
                passed += sent_bytes // (cuts + 2)
                sites.near.until(
                    lambda status, least=passed: status["points"]["sent_bytes_total"] >= least
                )
                link.cut()
            waiting.join()
            sites.near.dmctl("set", "vol0", "point-interval=300ms")
            sites.point(before["number"])
            sent.append(sites.points()["sent_bytes_total"] - before["sent_bytes_total"])
    return {"cuts": cuts, "bytes sent / once": sent[1] / sent[0]}


def measure_promote(point_bytes: int, size_bytes: int) -> Found:
    """The receiver dies with a point in its journal, and is promoted."""
    with two_sites(size_bytes, "--compress", "off", journal_bytes=2 * point_bytes) as sites:
        sites.start()
        sites.near.dmctl("set", "vol0", "point-interval=1h", "spool-limit=1GiB")
        scatter(sites.near, point_bytes, 1)
        number = sites.points()["number"]
        sites.near.dmctl("point", "vol0", "--label", "queued")
        with sites.far.control() as control:
            while control.call("status")["receiver"]["committed"] == number:
                time.sleep(0.001)
            queued_bytes = control.call("status")["receiver"]["queued_bytes"]
        sites.far.kill()
        sites.near.kill()
        record = ("--record", str(make_file(sites.folder / "far" / "record", 4 * MIB)))
        began_s = time.monotonic()
        sites.far.dmctl("promote", "vol0", *record)
        took_s = time.monotonic() - began_s
        copy_s = _nbdcopy_s(sites.folder, point_bytes)
    allowed_s = queued_bytes / (0.8 * point_bytes / copy_s) + 2
    return {
        "queued MiB": queued_bytes / MIB,
        "took s": took_s,
        "allowed s": allowed_s,
        "took / allowed": took_s / allowed_s,
    }


def _nbdcopy_s(folder: Path, size_bytes: int) -> float:
    """Of nbdcopy with so many bytes from file to file."""
    source, target = folder / "source", folder / "target"
    loads.make_written(source, size_bytes)
    target.touch()
    os.truncate(target, size_bytes)
    began_s = time.monotonic()
    subprocess.run(["nbdcopy", str(source), str(target)], check=True)
    return time.monotonic() - began_s


def measure_failback(size_bytes: int, run_bytes: int) -> Found:
    """One per cent is written at either site since they parted, in runs of this length.  What the
    old site's record names, with its guesses, is compared, and pieces that differ are copied."""
    part = size_bytes // 100
    with two_sites(size_bytes, journal_bytes=GIB) as sites:
        sites.far.start()
        sites.near.start()
        words = ("wait", "vol0", "--for", "point", "--timeout", "900s")
        sites.near.dmctl(*words, timeout_s=910)
        sites.near.until(lambda status: status["record_bytes"] < part // 4, timeout_s=300)
        sites.near.dmctl("set", "vol0", "point-interval=1h")
        scatter(sites.near, part, 1, run_bytes)
        named = sites.near.status()["record_bytes"]
        sites.near.kill()
        record = make_file(sites.folder / "far" / "record", 16 * MIB)
        sites.far.dmctl("promote", "vol0", "--record", str(record))
        sites.far.dmctl("set", "vol0", "point-interval=1h")
        scatter(sites.far, part, 2, run_bytes)
        words = ("failback", "vol0", "--journal", str(sites.near_journal), "--yes")
        began_s = time.monotonic()
        sites.near.dmctl(*words)
        sites.far.dmctl("set", "vol0", "point-interval=300ms")
        sites.far.wait_in_sync(300)
        took_s = time.monotonic() - began_s
        points = sites.far.status()["points"]
    return {
        "size GiB": size_bytes / GIB,
        "named by the old site's record / size": named / size_bytes,
        "compared / size": points["compared_bytes_total"] / size_bytes,
        "copied / size": points["sent_bytes_total"] / size_bytes,
        "sums on the wire, MiB": points["sums_bytes_total"] / MIB,
        "took s": took_s,
    }


def _written_bytes(device: str) -> int:
    fields = Path(f"/sys/block/{Path(device).name}/stat").read_text().split()
    return int(fields[6]) * SECTOR_BYTES


def measure_work(turns: int, point_bytes: int, size_bytes: int) -> Found:
    """Processor time of either site's process for a point of whole blocks that do not compress."""
    spent_s: list[list[float]] = []
    with two_sites(size_bytes, journal_bytes=4 * point_bytes) as sites:
        sites.start()
        sites.near.dmctl("set", "vol0", "point-interval=1h")
        for number in range(turns):
            scatter(sites.near, point_bytes, number)
            before_s = [processor_s(volume.pid) for volume in (sites.near, sites.far)]
            sites.near.dmctl("point", "vol0", "--wait")
            sites.far.until(lambda s: s["receiver"]["applied"] == s["receiver"]["committed"])
            after_s = [processor_s(volume.pid) for volume in (sites.near, sites.far)]
            spent_s.append([b - a for a, b in zip(before_s, after_s, strict=True)])
    sender, receiver = (
        quartiles([1000 * MIB * s / point_bytes for s in site])
        for site in zip(*spent_s, strict=True)
    )
    return {"sender, ms a MiB": sender, "receiver, ms a MiB": receiver}


def measure_written(seconds: int, size_bytes: int) -> Found:
    """What the receiver's disks write for what comes over the link; loop devices count it."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bp", dir="/dev/shm")))
        options = ("--compress", "off", "--point-interval", "1s", "--extent-size", "64KiB")
        sites = stack.enter_context(Sites(folder, size_bytes, *options, journal_bytes=512 * MIB))
        sites.image.touch()
        os.truncate(sites.image, size_bytes)
        image = stack.enter_context(loop_device(sites.image))
        journal = stack.enter_context(loop_device(sites.journal))
        sites.far.dmctl(
            "receive", "vol0", "--image", image, "--journal", journal, "--listen", sites.listen
        )
        sites.near.create()
        sites.start()
        before = sites.points()["wire_bytes_total"]
        written = _written_bytes(image) + _written_bytes(journal)
        load_at(sites.near, "20m", seconds).wait()
        sites.near.wait_in_sync()
        sites.far.until(lambda s: s["receiver"]["applied"] == s["receiver"]["committed"])
        received = sites.points()["wire_bytes_total"] - before
        written = _written_bytes(image) + _written_bytes(journal) - written
        sites.near.stop()
        sites.far.stop()
    return {"received MiB": received / MIB, "written / received": written / received}
