"""Two appliances under load and a nemesis: what hosts saw is what one disk could have shown.

    python -m tests.soak.pair --rounds 500 --jobs 2

Each round makes a pair of processes with a link that can be cut.  Eight hosts, four at each node,
write, read and flush registers of 4 KiB, half of which all of them share.  Meanwhile one thing
after another goes wrong: a node is killed, and taken over from; stopped cleanly; stands still for a
while; the link is cut, held in one direction, or slow.  Then everything heals.

After each round: the history of every register is linearizable (`tests.support.histories`), what
both nodes show is the same, both are paired and in sync, and primary and secondary are equal.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from tests.support.histories import BLOCK_BYTES, History, Value, block_of, value_of
from tests.support.pairlink import Link
from tests.support.pairs import Pair
from tests.support.rawnbd import FLUSH, FUA, READ, WRITE, RawNbd
from tests.support.volumes import MIB

SIZE_BYTES = 2 * MIB
HOSTS = 8
SHARED = 24  # registers that every host uses
PRIVATE = 6  # of each host
REGISTERS = SHARED + HOSTS * PRIVATE
SPREAD = 5  # blocks from one register to the next: three share an extent, and few a block
HEAL_S = 60.0
OPTIONS = ("--extent-size", "64KiB", "--block-size", "16KiB", "--partner-timeout", "500ms")


class Violation(AssertionError):
    """What no single disk could have shown, or a round that did not heal."""


def offset_of(register: int) -> int:
    return register * SPREAD * BLOCK_BYTES


class Host(threading.Thread):
    """One host at one node; its requests go one after another."""

    def __init__(self, number: int, pair: Pair, history: History, seed: int) -> None:
        super().__init__(daemon=True)
        self.number = number
        self.node = 1 + (number & 1)
        self._pair = pair
        self._history = history
        self._chance = random.Random(seed)
        self._written = 0
        self.done = threading.Event()
        self.answered = 0
        self.problem: BaseException | None = None
        own = SHARED + number * PRIVATE
        self._registers = [*range(SHARED), *range(own, own + PRIVATE)]

    def run(self) -> None:
        try:
            while not self.done.is_set():
                try:
                    with self._pair[self.node].host(timeout_s=HEAL_S) as disk:
                        self._use(disk)
                except (OSError, EOFError):
                    self.done.wait(0.05)  # the node is not there
        except BaseException as error:  # noqa: BLE001  (told by the round)
            self.problem = error

    def _use(self, disk: RawNbd) -> None:
        while not self.done.is_set():
            dice = self._chance.random()
            if dice < 0.1:
                disk.call(FLUSH)
                continue
            half = self._registers[:SHARED] if dice < 0.55 else self._registers[SHARED:]
            register = self._chance.choice(half)
            if self._chance.random() < 0.45:
                self._write(disk, register)
            else:
                self._read(disk, register)
            self.answered += 1

    def _write(self, disk: RawNbd, register: int) -> None:
        self._written += 1
        value: Value = (self.number + 1, self._written)
        start = time.monotonic()
        flags = FUA if self._chance.random() < 0.2 else 0
        try:
            disk.submit(WRITE, offset_of(register), BLOCK_BYTES, block_of(value), flags)
            failed = disk.reply().error
        except BaseException:
            self._history.wrote(register, value, start)
            raise
        if failed:
            self._history.wrote(register, value, start)
        else:
            self._history.wrote(register, value, start, time.monotonic())

    def _read(self, disk: RawNbd, register: int) -> None:
        start = time.monotonic()
        disk.submit(READ, offset_of(register), BLOCK_BYTES)
        reply = disk.reply()
        if not reply.error:
            self._history.read(register, value_of(reply.data), start, time.monotonic())


class Nemesis:
    """Makes one thing go wrong, and mends it."""

    def __init__(self, pair: Pair, link: Link, chance: random.Random) -> None:
        self._pair = pair
        self._link = link
        self._chance = chance
        self.done: Counter[str] = Counter()

    def strike(self) -> None:
        what = self._chance.choice(
            ("kill", "takeover", "stand still", "stop", "cut", "one way", "slow", "flap")
        )
        self.done[what] += 1
        getattr(self, "_" + what.replace(" ", "_"))(self._chance.choice((1, 2)))

    def _start(self, node: int) -> None:
        done = self._pair[node].dmctl_process("start", "vol0")
        if done.returncode not in (0, 15):  # 15 while it waits for the other
            raise Violation(f"node {node} did not start: {done.returncode} {done.stderr}")

    def _kill(self, node: int) -> None:
        self._pair[node].kill()
        self._rest()
        self._start(node)

    def _takeover(self, node: int) -> None:
        self._pair[node].kill()
        other = self._pair[3 - node]
        for _ in range(50):  # it has to notice first
            if other.dmctl_process("takeover", "vol0", "--fenced").returncode == 0:
                break
            time.sleep(0.1)
        self._rest()
        self._start(node)

    def _stand_still(self, node: int) -> None:
        pid = self._pair[node].pid
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self._chance.uniform(0.1, 2))
        os.kill(pid, signal.SIGCONT)

    def _stop(self, node: int) -> None:
        done = self._pair[node].dmctl_process("stop", "vol0", "--now")
        if done.returncode:
            raise Violation(f"node {node} did not stop: {done.returncode} {done.stderr}")
        self._rest()
        self._start(node)

    def _cut(self, _: int) -> None:
        self._link.accepts = False
        self._link.cut()
        self._rest()
        self._link.accepts = True

    def _one_way(self, node: int) -> None:
        self._link.held = {node == 1}
        time.sleep(self._chance.uniform(0.1, 2))
        self._link.held = set()

    def _slow(self, _: int) -> None:
        self._link.delay_s = self._chance.choice((0.001, 0.02, 0.2))
        time.sleep(self._chance.uniform(0.2, 1))
        self._link.delay_s = 0.0

    def _flap(self, _: int) -> None:
        for _ in range(5):
            self._link.cut()
            time.sleep(0.1)

    def _rest(self) -> None:
        time.sleep(self._chance.uniform(0, 0.6))


def play(folder: Path, seed: int, seconds: float) -> tuple[Counter[str], int]:
    """One round: what went wrong in it, and how many requests were answered."""
    chance = random.Random(seed)
    history = History()
    with Pair(folder, SIZE_BYTES, *OPTIONS) as pair:
        dialled = pair[2].options
        at = dialled.index("--partner") + 1
        dialled[at] = f"unix://{folder}/link"
        pair.create()
        with closing(Link(folder / "link", folder / "p1")) as link:
            hosts = [Host(number, pair, history, seed * 100 + number) for number in range(HOSTS)]
            nemesis = Nemesis(pair, link, chance)
            try:
                pair.start()
                for host in hosts:
                    host.start()
                until_s = time.monotonic() + seconds
                while time.monotonic() < until_s:
                    time.sleep(chance.uniform(0.1, 0.5))
                    nemesis.strike()
                heal(pair)
            finally:
                for host in hosts:
                    host.done.set()
                for host in hosts:
                    if host.ident is not None:  # it was begun
                        host.join(HEAL_S)
            settle(pair, history)
        judge(pair, history, hosts)
    return nemesis.done, sum(host.answered for host in hosts)


def heal(pair: Pair) -> None:
    """Both nodes run and are paired, with hosts at work."""
    for node in (1, 2):
        pair.until(node, "paired")


def settle(pair: Pair, history: History) -> None:
    """In sync at both nodes; then each register is read through both."""
    for node in (1, 2):
        pair[node].wait_in_sync(HEAL_S)
    for node in (1, 2):
        with pair[node].host() as disk:
            for register in range(REGISTERS):
                start = time.monotonic()
                data = disk.call(READ, offset_of(register), BLOCK_BYTES)
                history.read(register, value_of(data), start, time.monotonic())
            disk.disconnect()


def judge(pair: Pair, history: History, hosts: list[Host]) -> None:
    for host in hosts:
        if host.is_alive():
            raise Violation(f"host {host.number} still waits: {pair.partner(host.node)}")
        if host.problem is not None:
            raise Violation(f"host {host.number}: {host.problem!r}") from host.problem
    for register, reason in history.violations():
        raise Violation(f"register {register}: {reason}")
    if not pair.equal():
        raise Violation("primary and secondary differ")


def play_somewhere(seed: int, seconds: float) -> tuple[Counter[str], int]:
    with tempfile.TemporaryDirectory(prefix="pair", dir="/tmp") as folder:
        try:
            return play(Path(folder), seed, seconds)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise


def main() -> int:
    parser = argparse.ArgumentParser(description="histories of a pair under a nemesis")
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each round")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--jobs", type=int, default=1, help="rounds at a time")
    options = parser.parse_args()
    struck: Counter[str] = Counter()
    answered = 0
    seeds = range(options.seed, options.seed + options.rounds)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        played = pool.map(partial(play_somewhere, seconds=options.seconds), seeds)
        for number, (seed, (done, requests)) in enumerate(zip(seeds, played, strict=True), 1):
            struck += done
            answered += requests
            print(f"round {number}, seed {seed}: {requests} requests", flush=True)
    print(f"{options.rounds} rounds, {answered} requests, {dict(struck)}: linearizable")
    return 0


if __name__ == "__main__":
    sys.exit(main())
