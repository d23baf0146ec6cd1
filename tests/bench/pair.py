"""Two appliances beside one, and beside a bare echo: `make bench-pair`.

The pair and the single volume lie in memory and take turns in one run, so that what the machine
does besides hits both.  Ratios are medians of the turns, with quartiles.
`--quick` shows that the command works; its figures mean nothing.

What is measured, and why:
- hits and reads outside the other's record: a pair must not cost them anything;
- a miss: a message and its answer beside the data, against a single volume's miss and against a
  bare echo of as many bytes over a socket of the same kind;
- disjoint hosts at both nodes: how many messages a thousand writes take;
- two hosts at two nodes on one extent: what changing hands costs;
- a takeover after kill -9: until the first read is answered, and what is compared and copied;
- an exchange of 16 TiB with 100,000 runs, in one process without a link;
- a miss at some distance, in round trips of an echo over the same link (`pairdistance`);
- what the link costs and bears (`pairlinks`): TLS, reads of what the other writes, an exchange over
  it, a cut, one cut after another; the destage of a large record; messages of recorded traces.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bitarray import bitarray

from bitmapd.partner import codec
from bitmapd.partner.messages import Record
from bitmapd.partner.share import View, share
from bitmapd.peer import frames
from bitmapd.record.extents import bits_of, runs_of
from tests.bench import loads, machine, pairlinks
from tests.bench.bench import ROOT
from tests.bench.loads import KIB, MIB, Load
from tests.bench.pairdistance import measure_distance
from tests.bench.pairlinks import GIB, TIB, echo_us, quartiles
from tests.bench.report import figures_page
from tests.support import rawnbd
from tests.support.pairs import Pair
from tests.support.volumes import Volume

SIZE_BYTES = 1024 * MIB
REGION_BYTES = 64 * MIB
EXTENTS_16_TIB = 16 << 20
RUNS = 100_000

Found = dict[str, Any]


class Contenders:
    """A pair and a single volume with the same settings."""

    def __init__(self, stack: ExitStack, size_bytes: int, *options: str) -> None:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bp", dir="/dev/shm")))
        said = ["--extent-size", "64KiB", "--record-limit", f"{size_bytes // 2}B", *options]
        (base / "pair").mkdir()
        self.pair = stack.enter_context(Pair(base / "pair", size_bytes, *said))
        self.pair.create()
        self.pair.start()
        (base / "one").mkdir()
        self.single = stack.enter_context(Volume(base / "one", size_bytes, "one", options=said))
        self.single.create()
        self.single.start()
        for volume in (self.pair[1], self.single):
            loads.fill(volume.uri, size_bytes)
        self.settle()

    def settle(self) -> None:
        for volume in (self.pair[1], self.pair[2], self.single):
            volume.wait_in_sync()

    def copy(self, on: bool) -> None:
        """Whether anything is copied: a miss leaves dirt, which takes the longer of two runs more
        of its own time."""
        for volume in (self.pair[1], self.single):
            volume.ask("resume" if on else "pause")

    def emptied(self) -> None:
        """Records without an extent: what is clean leaves when nobody writes for long enough, so
        both are stopped and started."""
        for node in (1, 2):
            self.pair[node].stop()
        self.single.stop()
        for node in (1, 2):
            self.pair[node].dmctl_process("start", "vol0")
        self.single.start()
        for node in (1, 2):
            self.pair.until(node, "paired")


def both(made: Contenders, load: Load, seconds: int, turn: int) -> float:
    """The pair's mean latency divided by the single volume's, in one turn."""
    found = {}
    for name, uri in (("pair", made.pair[1].uri), ("one", made.single.uri))[:: 1 - 2 * (turn % 2)]:
        found[name] = loads.over_nbd(uri, load, seconds, turn).mean_us
        made.settle()
    return found["pair"] / found["one"]


def measure_beside_one(turns: int, seconds: int, requests: int, size_bytes: int) -> Found:
    region = min(REGION_BYTES, size_bytes // 4)
    result: Found = {}
    with ExitStack() as stack:
        made = Contenders(stack, size_bytes, "--predictor", "lru")
        hits = (
            Load("hit, depth 1", "randwrite", 4 * KIB, 1, region),
            Load("hit, depth 16", "randwrite", 4 * KIB, 16, region),
            Load("read elsewhere, depth 1", "randread", 4 * KIB, 1, region),
        )
        with made.pair[2].host() as host:  # what node 2 has besides, so that reads look
            for at in range(size_bytes // 2, size_bytes, size_bytes // 32):
                host.call(rawnbd.WRITE, at, 4 * KIB, bytes(4 * KIB))
            host.disconnect()
        for load in hits:
            loads.over_nbd(made.pair[1].uri, load, 0, 99)  # its extents come into the records
            loads.over_nbd(made.single.uri, load, 0, 99)
            ratios = [both(made, load, seconds, turn) for turn in range(turns)]
            result[load.name] = {"pair / one": quartiles(ratios)}
        miss = Load(
            "miss", "randwrite", 4 * KIB, 1, size_bytes, align_bytes=64 * KIB, requests=requests
        )
        found: dict[str, list[float]] = {}
        for turn in range(turns):
            made.emptied()
            made.copy(False)
            one = loads.over_nbd(made.single.uri, miss, 0, turn)
            two = loads.over_nbd(made.pair[1].uri, miss, 0, turn)
            hit = loads.over_nbd(made.pair[1].uri, miss, 0, turn)  # the same places again
            middle_us = echo_us(2000 if requests > 500 else 200)
            made.copy(True)
            for name, value in (
                ("pair / one", two.mean_us / one.mean_us),
                ("pair us", two.mean_us),
                ("one us", one.mean_us),
                ("the same places again us", hit.mean_us),
                ("bare echo us", middle_us),
                ("what it takes beside a hit, in echoes", (two.mean_us - hit.mean_us) / middle_us),
                ("p99 of the pair us", two.p99_us),
                ("p99 of one us", one.p99_us),
            ):
                found.setdefault(name, []).append(value)
            made.settle()
        result["miss, depth 1"] = {name: quartiles(values) for name, values in found.items()}
        deep = Load(
            "miss", "randwrite", 4 * KIB, 16, size_bytes, align_bytes=64 * KIB, requests=requests
        )
        made.emptied()
        before = made.pair.partner(1)["messages_total"]
        loads.over_nbd(made.pair[1].uri, deep, 0, 7)
        sent = made.pair.partner(1)["messages_total"] - before
        result["misses, depth 16"] = {"messages per write": sent / requests}
        resident = {
            "pair": machine.resident_bytes(made.pair[1].pid)[0],
            "one": machine.resident_bytes(made.single.pid)[0],
        }
        result["memory"] = resident
    return result


def measure_disjoint(seconds: int, size_bytes: int) -> Found:
    """A host at each node, in a working set of its own that its record holds."""
    with tempfile.TemporaryDirectory(prefix="bp", dir="/dev/shm") as folder:
        options = ("--record-limit", f"{size_bytes // 4}B")
        with Pair(Path(folder), size_bytes, *options) as pair:
            pair.create()
            pair.start()
            for node in (1, 2):
                pair[node].wait_in_sync()
            before = [pair[node].status() for node in (1, 2)]
            region = size_bytes // 8
            running = []
            for node in (1, 2):
                command = [
                    "fio", "--name=b", "--thread=1", "--ioengine=nbd", f"--uri={pair[node].uri}",
                    "--rw=randwrite", "--bs=4k", "--iodepth=4", "--norandommap=1",
                    f"--offset={(node - 1) * size_bytes // 2}", f"--size={region}",
                    "--time_based=1", f"--runtime={seconds}", "--random_distribution=zipf:1.1",
                ]  # fmt: skip
                running.append(threading.Thread(target=loads.run, args=(command, seconds + 60)))
            for thread in running:
                thread.start()
            for thread in running:
                thread.join()
            after = [pair[node].status() for node in (1, 2)]
    writes = sum(b["writes_total"] - a["writes_total"] for a, b in zip(before, after, strict=True))
    sent = sum(
        b["partner"]["messages_total"] - a["partner"]["messages_total"]
        for a, b in zip(before, after, strict=True)
    )
    asks = sum(b["partner"]["asks_total"] for b in after)
    return {"writes": writes, "messages per 1,000 writes": 1000 * sent / writes, "asks": asks}


def measure_contended(seconds: int) -> Found:
    """Depth 8 on one extent: one host at one node, then one at each."""
    load = Load("one extent", "randwrite", 4 * KIB, 8, MIB)
    with (
        tempfile.TemporaryDirectory(prefix="bp", dir="/dev/shm") as folder,
        Pair(Path(folder), 64 * MIB) as pair,
    ):
        pair.create()
        pair.start()
        alone = loads.over_nbd(pair[1].uri, load, seconds, 1).iops
        rates: dict[int, float] = {}

        def host(node: int) -> None:
            rates[node] = loads.over_nbd(pair[node].uri, load, seconds, node).iops

        threads = [threading.Thread(target=host, args=(node,)) for node in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        handovers = sum(pair.partner(node)["handovers_total"] for node in (1, 2))
    return {
        "both / one alone": sum(rates.values()) / alone,
        "slower / faster": min(rates.values()) / max(rates.values()),
        "handovers": handovers,
    }


def measure_takeover(turns: int, size_bytes: int) -> Found:
    served, compared, copied = [], [], []
    for turn in range(turns):
        with (
            tempfile.TemporaryDirectory(prefix="bp", dir="/dev/shm") as folder,
            Pair(Path(folder), size_bytes) as pair,
        ):
            pair.create()
            pair.start()
            for node in (1, 2):
                pair[node].wait_in_sync()
            load = Load("dirt", "randwrite", 64 * KIB, 8, size_bytes, requests=400)
            loads.over_nbd(pair[1].uri, load, 0, turn)
            pair[1].kill()
            pair.until(2, "cut")
            named = pair.partner(2)["partner_extents"] + pair.partner(2)["owed_extents"]
            before = pair[2].status()["copied_bytes_total"]
            began = time.perf_counter()
            pair[2].ask("takeover", fenced=True)
            pair[2].read(0, 4 * KIB)
            served.append(time.perf_counter() - began)
            pair[2].wait_in_sync()
            status = pair[2].status()
            compared.append(status["partner"]["compared_extents_total"])
            copied.append((status["copied_bytes_total"] - before) / max(1, named * MIB))
            if not pair.equal():
                raise RuntimeError("primary and secondary differ")
    return {
        "served after s": quartiles(served),
        "compared extents": max(compared),
        "copied / named": quartiles(copied),
    }


def spread_runs(runs: int, start: int) -> bitarray:
    step = EXTENTS_16_TIB // runs
    return bits_of(tuple((at + start, at + start + 1) for at in range(0, runs * step, step)),
                   EXTENTS_16_TIB)  # fmt: skip


def measure_exchange(runs: int) -> Found:
    """What one node computes: its RECORD, the other's, the division and its digest."""
    mine, theirs = spread_runs(runs, 0), spread_runs(runs, 7)
    nothing = bits_of((), EXTENTS_16_TIB)
    began = time.perf_counter()
    sent = [
        frames.encode(part, number)
        for number, part in enumerate(codec.encode(Record(runs_of(mine), (), (), ())), 1)
    ]
    encoded = time.perf_counter()
    reader, decoder = frames.Reader(frames.MAX_PAYLOAD_BYTES), codec.Decoder(EXTENTS_16_TIB)
    for raw in sent:
        reader.feed(raw)
        while (frame := reader.take()) is not None:
            decoder.feed(frame)
    decoded = time.perf_counter()
    shares = share(View(False, mine, nothing, nothing), View(False, theirs, nothing, nothing), 1)
    shares.digest(1)
    ended = time.perf_counter()
    return {
        "bytes": sum(map(len, sent)),
        "encode s": encoded - began,
        "decode s": decoded - encoded,
        "share s": ended - decoded,
        "together s": ended - began,
    }


NOTES = """\
How to read this: primary, secondary and records lie in memory, so a hit is nearly all CPU, and what
a pair costs shows undiluted: a hit asks two bits instead of one, a read one more question. A miss
is carried by two processes that wake one another, and by what each computes: message, record, page.
A bare echo computes nothing, so 1.5 of them are out of reach of this program where both nodes are
processes of one machine; `echoes` says how far. A miss takes one round trip all the same, and what
is computed is lost in it where the nodes are apart: `at a distance`. Nothing is copied while misses
are measured: they leave dirt, and whichever run takes longer would copy more of its own. A read of
what the other writes asks first, unless the extent is clean and was given up; its median has at
most two round trips and the writes that it waits for. Messages per 1,000 writes of a trace follow
its misses, of which the best policy can save only some (docs/prediction.md)."""


def main() -> int:
    parser = argparse.ArgumentParser(description="two appliances beside one")
    parser.add_argument("--quick", action="store_true", help="a run that only shows it works")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    options = parser.parse_args()
    quick = options.quick
    turns, seconds = (1, 0) if quick else (5, 3)
    size_bytes = 64 * MIB if quick else SIZE_BYTES
    results: Found = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "make bench-pair",
        "quick": quick,
        "machine": machine.describe(),
        "figures": measure_beside_one(turns, seconds, 100 if quick else 3000, size_bytes)
        | {
            "miss over TLS, depth 1": pairlinks.measure_tls(
                turns, 100 if quick else 3000, size_bytes
            ),
            "miss at a distance, depth 1": measure_distance(
                *((1, 50, size_bytes, (0.2,)) if quick else (3, 1000, size_bytes))
            ),
            "disjoint hosts": measure_disjoint(2 if quick else 20, size_bytes),
            "one extent, two hosts": measure_contended(1 if quick else 5),
            "reads of what the other writes": pairlinks.measure_reads(1 if quick else 5),
            "cut": pairlinks.measure_cut(turns),
            "destage of 1 TiB": pairlinks.measure_destage(),
            "exchange over a link": pairlinks.measure_live_exchange(
                100 if quick else RUNS, TIB if quick else 16 * TIB
            ),
            "link ends every 100 ms": pairlinks.measure_flaps(2 if quick else 30),
            "takeover after kill -9": measure_takeover(1 if quick else 5, size_bytes),
            "exchange, 16 TiB": measure_exchange(1000 if quick else RUNS),
        }
        | {
            f"trace {name}": pairlinks.measure_trace(
                f"{name}.csv.gz", 200 if quick else 20_000, 8 * GIB
            )
            for name in ("ext4-sqlite", "xfs-mail", "ext4-postgres")[: 1 if quick else 3]
        },
    }
    options.results.mkdir(parents=True, exist_ok=True)
    name = f"pair-{results['at'].replace(':', '')}.json"
    (options.results / name).write_text(json.dumps(results, indent=1) + "\n")
    text = figures_page("Two appliances: figures", results, NOTES)
    print(text)
    if not quick:
        (ROOT / "docs" / "benchmarks-pair.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
