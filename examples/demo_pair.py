#!/usr/bin/env python3
"""Two appliances serve one volume; one is killed in mid-write.  Run: make demo-pair

Two hosts write through a node each, to a half of the volume each, with libnbd, which is foreign
code.  Node 1 is killed with kill -9; its partner takes over, by the administrator's word, and
copies what its record of node 1 names.  Node 1 comes back and serves again.  In the end every
block that was acknowledged is read through the other node, and primary and secondary are compared.

Everything lives in ./demo-pair-run, which is removed at the end (KEEP=1 keeps it), but for the
picture of what went on: ./demo-pair.svg.  DEMO_DIR names another folder for both.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from demo_common import (
    DMCTL,
    MIB,
    DemoFailed,
    run,
    say,
    step,
    wait_until,
)

SIZE_BYTES = 512 * MIB
ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("DEMO_DIR", ROOT))
RUN = FOLDER / "demo-pair-run"
PICTURE = FOLDER / "demo-pair.svg"
NAME = "demo"
SAMPLE_S = 0.2

# A host: writes numbered blocks of 64 KiB into its half until it is told to stop, or its node dies;
# then it says which block holds which number, and which one it had no answer for.
HOST = """
import json, random, select, sys
import nbd
uri, start, blocks, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
size, chance, held, doubt, number = 65536, random.Random(seed), {}, None, seed * 1000000
disk = nbd.NBD()
disk.connect_uri(uri)
try:
    while not select.select([sys.stdin], [], [], 0)[0]:
        # Nine of ten writes to a tenth of the half, as hosts do.
        block = chance.randrange(blocks // 10 if chance.random() < 0.9 else blocks)
        number += 1
        doubt = (block, number)
        disk.pwrite(number.to_bytes(8, "big") * (size // 8), start + block * size)
        held[block], doubt = number, None
        if number % 50 == 0:
            disk.flush()
    disk.shutdown()
except nbd.Error:
    pass
print(json.dumps({"held": sorted(held.items()), "doubt": doubt}))
"""
# Reads all of that through another node; says how many blocks hold something else.
CHECK = """
import json, sys
import nbd
uri, start, size = sys.argv[1], int(sys.argv[2]), 65536
disk = nbd.NBD()
disk.connect_uri(uri)
wrong = 0
for block, numbers in json.load(sys.stdin):
    data = disk.pread(size, start + block * size)
    wrong += data not in [number.to_bytes(8, "big") * (size // 8) for number in numbers]
print(wrong)
"""
BLOCK_BYTES = 65536
HALF_BLOCKS = SIZE_BYTES // 2 // BLOCK_BYTES


def node_of(number: int) -> tuple[str, ...]:
    return ("--config-dir", str(RUN / f"etc{number}"), "--run-dir", str(RUN / f"run{number}"))


def dmctl(node: int, *words: str | Path) -> str:
    return run(DMCTL, *node_of(node), *words)


def show(node: int, *words: str | Path) -> None:
    said = " ".join(str(word).replace(f"{RUN}/", "") for word in words)
    say(f"   node {node} $ dmctl {said}")
    dmctl(node, *words)


def status(node: int) -> dict[str, Any]:
    (volume,) = json.loads(dmctl(node, "--json", "status", NAME))["volumes"]
    return dict(volume)


def uri(node: int) -> str:
    return f"nbd+unix:///{NAME}?socket={RUN}/run{node}/{NAME}.nbd"


@dataclass
class Half:
    """What a half of the volume has to hold: for each block the numbers that may be there."""

    start: int
    seeds: int
    may_be: dict[int, list[int]] = field(default_factory=dict)
    written: int = 0

    def host(self, node: int) -> subprocess.Popen[str]:
        self.seeds += 2
        words = [uri(node), str(self.start), str(HALF_BLOCKS), str(self.seeds)]
        return subprocess.Popen(
            ["/usr/bin/python3", "-c", HOST, *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def end(self, host: subprocess.Popen[str]) -> None:
        out, _ = host.communicate("stop\n" if host.poll() is None else None, timeout=60)
        said = json.loads(out)
        for block, number in said["held"]:
            self.may_be[block] = [number]
        self.written += len(said["held"])
        if said["doubt"] is not None:
            block, number = said["doubt"]
            self.may_be.setdefault(block, [0]).append(number)

    def check(self, node: int) -> None:
        command = ["/usr/bin/python3", "-c", CHECK, uri(node), str(self.start)]
        may_be = json.dumps(sorted(self.may_be.items()))
        done = subprocess.run(command, input=may_be, capture_output=True, text=True, check=True)
        if int(done.stdout):
            raise DemoFailed(f"{done.stdout.strip()} blocks through node {node} are not as written")


class Watch(threading.Thread):
    """Asks both nodes a few times a second what they are at."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.began = time.monotonic()
        self.ended = threading.Event()
        self.samples: dict[int, list[tuple[float, dict[str, Any]]]] = {1: [], 2: []}
        self.marks: list[tuple[float, str]] = []

    def run(self) -> None:
        while not self.ended.wait(SAMPLE_S):
            for node, samples in self.samples.items():
                try:
                    found = status(node)
                except (DemoFailed, ValueError):
                    continue
                if found.get("partner"):
                    samples.append((time.monotonic() - self.began, found))

    def mark(self, text: str) -> None:
        self.marks.append((time.monotonic() - self.began, text))


def demo() -> None:
    began = time.monotonic()
    step(1, "Two appliances: primary and secondary are the same, each has a record of its own")
    for name in ("primary", "secondary"):
        with (RUN / name).open("wb") as file:
            file.truncate(SIZE_BYTES)
    for node in (1, 2):
        with (RUN / f"record{node}").open("wb") as file:
            file.truncate(MIB)
        show(
            node, "create", NAME, "--primary", RUN / "primary", "--secondary", RUN / "secondary",
            "--record", RUN / f"record{node}", "--node", str(node),
            "--partner", f"unix://{RUN}/p{3 - node}", "--partner-listen", f"unix://{RUN}/p{node}",
        )  # fmt: skip
    for node in (1, 2):
        show(node, "start", NAME)
    wait_until(lambda: all(status(n)["partner"]["state"] == "paired" for n in (1, 2)), "the pair")
    watch = Watch()
    watch.start()

    step(2, "Hosts write through both, each to its half")
    left, right = Half(0, 1), Half(SIZE_BYTES // 2, 2)
    hosts = {1: left.host(1), 2: right.host(2)}
    time.sleep(4)
    tell()

    step(3, "kill -9 node 1, in mid-write")
    pid = int((RUN / "run1" / f"{NAME}.pid").read_text())
    os.kill(pid, signal.SIGKILL)
    watch.mark("kill -9 node 1")
    left.end(hosts[1])
    wait_until(lambda: status(2)["partner"]["state"] == "cut", "the cut")
    partner = status(2)["partner"]
    named = partner["partner_extents"] + partner["owed_extents"]
    say(f"   node 2 knows {named} extents in which node 1 may have written; its own host goes on")

    step(4, "Node 1 is dead for certain (this demo has killed it), so node 2 takes over")
    asked_s = time.monotonic()
    answer = json.loads(dmctl(2, "--json", "takeover", NAME, "--fenced"))["partner"]
    took_ms = (time.monotonic() - asked_s) * 1000
    watch.mark("takeover")
    say(f"   in {took_ms:.0f} ms, the command included: {answer['absorbed_extents_total']} extents")
    say(f"   taken over, {answer['compared_extents_total']} compared")
    if answer["absorbed_extents_total"] != named or answer["compared_extents_total"]:
        raise DemoFailed(f"exactly what the record names was to be taken over: {answer}")
    hosts[1] = left.host(2)  # node 1's host comes in by the other door
    time.sleep(3)
    tell(2)

    step(5, "Node 1 comes back; nothing is compared, and its host goes home")
    show(1, "start", NAME)
    wait_until(lambda: status(1)["partner"]["state"] == "paired", "the pair")
    watch.mark("node 1 is back")
    left.end(hosts[1])
    hosts[1] = left.host(1)
    time.sleep(3)
    tell()
    left.end(hosts[1])
    right.end(hosts[2])

    step(6, "In sync at both; every block is read through the other node; the sides are compared")
    for node in (1, 2):
        show(node, "wait", NAME, "--for", "in-sync", "--timeout", "1min")
    left.check(2)
    right.check(1)
    if not filecmp.cmp(RUN / "primary", RUN / "secondary", shallow=False):
        raise DemoFailed("primary and secondary differ")
    watch.ended.set()
    watch.join()
    messages = sum(status(node)["partner"]["messages_total"] for node in (1, 2))
    for node in (1, 2):
        show(node, "stop", NAME)
    PICTURE.write_text(picture(watch))
    blocks = len(left.may_be) + len(right.may_be)
    say()
    for label, value in (
        ("blocks that were written and checked", f"{blocks:,}"),
        ("taken over from the dead node", f"{named} extents"),
        ("messages since each process began", f"{messages:,}"),
        ("the whole demo took", f"{time.monotonic() - began:.0f} s"),
    ):
        say(f"   {label:<38}{value:>16}")
    say(f"   what went on is drawn in {PICTURE.name}")


def tell(*nodes: int) -> None:
    for node in nodes or (1, 2):
        found = status(node)
        partner = found["partner"]
        say(
            f"   node {node}: {partner['state']:<7} {found['writes_total']:>7,} writes,"
            f" {partner['own_extents']:>4} extents its own,"
            f" {partner['messages_total']:>5,} messages,"
            f" {found['dirty_bytes'] / MIB:>6.1f} MiB to copy"
        )


# -- the picture ------------------------------------------------------------------------------

COLOURS = {1: "#1971c2", 2: "#e8590c"}
WIDTH, HEIGHT, LEFT, GAP = 900, 150, 60, 60


def rates(samples: list[tuple[float, dict[str, Any]]]) -> list[tuple[float, float]]:
    found = []
    for (before_s, before), (at_s, after) in pairwise(samples):
        sent = after["partner"]["messages_total"] - before["partner"]["messages_total"]
        found.append((at_s, sent / (at_s - before_s)))
    return found


def lives(samples: list[tuple[float, dict[str, Any]]]) -> list[list[tuple[float, dict[str, Any]]]]:
    """Of a node: the samples of each of its processes, one after the other."""
    return [list(life) for _, life in groupby(samples, lambda sample: sample[1]["session"])]


def picture(watch: Watch) -> str:
    """Messages a second, extents by owner, and what is to be copied, of both nodes over time."""
    whole_s = max(at_s for samples in watch.samples.values() for at_s, _ in samples)
    panels = (
        ("messages per second", rates),
        (
            "extents that the node may write",
            lambda s: [(t, v["partner"]["own_extents"]) for t, v in s],
        ),
        (
            "MiB that are not on the secondary",
            lambda s: [(t, v["dirty_bytes"] / MIB) for t, v in s],
        ),
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH + LEFT + 20}"'
        f' height="{len(panels) * (HEIGHT + GAP) + 30}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, (title, values) in enumerate(panels):
        top = 30 + number * (HEIGHT + GAP)
        lines = [
            (node, values(life))
            for node, samples in watch.samples.items()
            for life in lives(samples)
        ]
        most = max([1.0, *(value for _, line in lines for _, value in line)])
        parts.append(f'<text x="{LEFT}" y="{top - 8}" font-weight="bold">{title}</text>')
        parts.append(f'<text x="4" y="{top + 10}">{most:,.0f}</text>')
        parts.append(
            f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none"'
            ' stroke="#adb5bd"/>'
        )
        for row, (at_s, text) in enumerate(watch.marks):
            x = LEFT + WIDTH * at_s / whole_s
            parts.append(
                f'<path d="M{x:.1f} {top}v{HEIGHT}" stroke="#868e96" stroke-dasharray="4"/>'
            )
            y = top + 14 + 14 * row
            parts.append(f'<text x="{x + 4:.1f}" y="{y}" fill="#868e96">{text}</text>')
        for node, line in lines:
            points = " ".join(
                f"{LEFT + WIDTH * at_s / whole_s:.1f},{top + HEIGHT * (1 - value / most):.1f}"
                for at_s, value in line
            )
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{COLOURS[node]}"'
                ' stroke-width="2"/>'
            )
        for at_s in range(0, int(whole_s) + 1, 5):
            x = LEFT + WIDTH * at_s / whole_s
            parts.append(
                f'<text x="{x:.1f}" y="{top + HEIGHT + 28}" fill="#868e96">{at_s} s</text>'
            )
    for node, colour in COLOURS.items():
        x = LEFT + WIDTH - 150 + 75 * (node - 1)
        parts.append(f'<text x="{x}" y="14" fill="{colour}">node {node}</text>')
    return "\n".join([*parts, "</svg>", ""])


def clean() -> None:
    for node in (1, 2):
        try:
            os.kill(int((RUN / f"run{node}" / f"{NAME}.pid").read_text()), signal.SIGKILL)
        except (OSError, ValueError):
            continue
    if RUN.exists() and os.environ.get("KEEP") != "1":
        shutil.rmtree(RUN)


def main() -> int:
    if not DMCTL.exists():
        say(f"demo: {DMCTL.name} is not installed beside this Python; run it as: make demo-pair")
        return 1
    clean()
    RUN.mkdir(parents=True)
    try:
        demo()
    except DemoFailed as error:
        say(f"\ndemo: FAILED: {error}")
        return 1
    finally:
        clean()
    say("\nNothing was lost, nothing was compared, and what the record named was taken over.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
