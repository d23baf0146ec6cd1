"""A group of two volumes loses its site at a random moment, and is promoted: round after round.

    python -m tests.soak.group --rounds 100 [--seed 1]

A host writes number n to volume A, flushes, and when that is answered writes n to B and flushes;
then n + 1.  At a random moment all four processes, or both of the site, are killed, in any order;
or one of the two volumes alone, or stopped by a signal, and the other one after it.
The group is promoted at the other site.  Its A and B have one instant: B <= A <= B + 1.

The last line has how long answers were withheld (`hold`), of all cuts of all rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.support import rawnbd
from tests.support.rawnbd import RawNbd
from tests.support.volumes import MIB, Volume, make_file

SIZE = 8 * MIB
PIECE = 4096
NAMES = ("a", "b")
STRIKES = ("site", "site, other order", "a first", "b first", "all", "frozen")


class GroupSites:
    """Two sites on one machine; `near` has volumes a and b of group db, `far` their receivers."""

    def __init__(self, folder: Path, *options: str, interval: str = "300ms") -> None:
        self.folder = folder
        for name in ("near", "far"):
            (folder / name).mkdir()
        self.near: dict[str, Volume] = {}
        self.far: dict[str, Volume] = {}
        for name in NAMES:
            more = ["--point-interval", interval, "--group", "db", *options]
            self.near[name] = Volume(
                folder / "near", SIZE, name, more, secondary_target=self.link(name)
            )
            self.near[name].secondary = folder / "near" / f"{name}.unused"
            self.far[name] = Volume(folder / "far", SIZE, name)

    def __enter__(self) -> GroupSites:
        return self

    def __exit__(self, *_: object) -> None:
        for volume in (*self.near.values(), *self.far.values()):
            volume.destroy()

    def link(self, name: str) -> str:
        return f"receiver+unix:///{name}?socket={self.folder}/{name}.link"

    def create(self) -> None:
        for name in NAMES:
            far = self.far[name]
            make_file(far.primary, SIZE)
            journal = make_file(self.folder / "far" / f"{name}.journal", 64 * MIB)
            far.dmctl(
                "receive", name, "--image", str(far.primary), "--journal", str(journal),
                "--listen", self.link(name), "--group", "db",
            )  # fmt: skip
            self.near[name].create()

    def start(self) -> None:
        for site in (self.far, self.near):
            site["a"].dmctl("start", *NAMES)
        self.points(1)

    def points(self, count: int) -> None:
        """All have so many points of the group, or more."""
        for volume in self.near.values():
            volume.until(lambda status: status["points"]["committed_total"] >= count)

    def group(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.near[name].ask("status")["points"]["group"]
        return found

    def promote(self, *words: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(
            self.far["a"].dmctl("--json", "promote", "--group", "db", "--force", *words)
        )
        return answer

    def found(self, name: str) -> int:
        """What the promoted volume has."""
        with RawNbd(self.far[name].socket, name) as host:
            (number,) = struct.unpack(">Q", host.call(rawnbd.READ, 0, PIECE)[:8])
            return int(number)


class Pair(threading.Thread):
    """The host.  `answered`: the last number that both volumes have answered."""

    def __init__(self, sites: GroupSites, first: int = 1) -> None:
        super().__init__(name="host", daemon=True)
        self._hosts = [RawNbd(sites.near[name].socket, name) for name in NAMES]
        self.answered = first - 1
        self._ended = threading.Event()
        self._grown = threading.Condition()
        self.start()

    def run(self) -> None:
        number = self.answered + 1
        try:
            while not self._ended.is_set():
                for host in self._hosts:
                    host.call(rawnbd.WRITE, 0, PIECE, struct.pack(">Q", number) * (PIECE // 8))
                    host.call(rawnbd.FLUSH, 0, 0)
                with self._grown:
                    self.answered = number
                    self._grown.notify()
                number += 1
        except (OSError, EOFError, AssertionError):  # a volume is gone
            with self._grown:
                self._ended.set()
                self._grown.notify()

    def until(self, number: int) -> None:
        with self._grown:
            self._grown.wait_for(lambda: self.answered >= number or self._ended.is_set(), 60)
            assert self.answered >= number

    def end(self) -> None:
        self._ended.set()
        self.join(60)
        assert not self.is_alive()
        for host in self._hosts:
            host.__exit__(None, None, None)


def one_round(folder: Path, rng: random.Random, holds: list[float]) -> str:
    """The strike; AssertionError if the promoted group has no one instant."""
    strike = rng.choice(STRIKES)
    with GroupSites(folder, "--cut-patience", "500ms") as sites:
        sites.create()
        sites.start()
        host = Pair(sites)
        sites.points(2 + rng.randrange(3))
        before = host.answered
        time.sleep(rng.random() * 0.6)  # the moment is what is random
        for name in NAMES:
            figures = sites.group(name)
            if figures["cuts_total"]:
                holds.append(figures["hold_seconds_total"] / figures["cuts_total"])
                holds.append(figures["hold_seconds_max"])
        near, far = sites.near, sites.far
        order = list(NAMES)
        if strike in ("b first", "site, other order"):
            order.reverse()
        if strike == "all":
            for volume in rng.sample([*near.values(), *far.values()], 4):
                volume.kill()
        elif strike == "frozen":
            os.kill(near[order[0]].pid, signal.SIGSTOP)
            time.sleep(rng.random())
            for name in order:
                near[name].kill()
        else:
            near[order[0]].kill()
            if strike.endswith("first"):
                time.sleep(rng.random() * 0.5)
            near[order[1]].kill()
        host.end()
        answer = sites.promote()
        assert {it["name"] for it in answer["volumes"]} == set(NAMES)
        assert all(it["consistent"] for it in answer["volumes"])
        assert len({it["at"] for it in answer["volumes"]}) == 1, answer
        a, b = sites.found("a"), sites.found("b")
        assert b <= a <= b + 1, f"{strike}: A has {a}, B has {b}"
        assert a <= host.answered + 1
        assert a > 0 or before == 0, f"{strike}: nothing came over"
    return strike


def run_rounds(folder: Path, count: int, seed: int) -> tuple[Counter[str], list[float]]:
    rng, done = random.Random(seed), Counter[str]()
    holds: list[float] = []
    for number in range(count):
        place = folder / str(number)
        place.mkdir()
        strike = one_round(place, rng, holds)
        done[strike] += 1
        print(f"round {number + 1}: {strike}", file=sys.stderr, flush=True)
    return done, holds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gr") as folder:
        done, holds = run_rounds(Path(folder), arguments.rounds, arguments.seed)
    took_s = time.monotonic() - began_s
    print(f"{arguments.rounds} rounds in {took_s:.0f} s, B <= A <= B + 1 in all: {dict(done)}")
    means, worst = holds[::2], holds[1::2]
    print(
        f"hold: median of the mean {statistics.median(means) * 1000:.2f} ms,"
        f" of the longest {statistics.median(worst) * 1000:.2f} ms,"
        f" worst {max(worst) * 1000:.2f} ms"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
