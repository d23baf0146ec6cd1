"""kill -9 cycles under verify load: `python -m tests.soak.soak --cycles 200`.

A writer keeps many requests in flight on the export of a small volume: writes of 1 to 64 blocks
of 4 KiB, write-zeroes, flushes, FUA.  Every block says which block it is and which generation.
At a random moment `bitmapd` is killed.  Then, in this order:

1. Superset.  With the daemon dead, primary and secondary are compared on disk; every extent in
   which they differ must be in the stored record.
2. Start again.  Every block is read back through the export: it holds the generation that was
   acknowledged last, or one that was in flight when the daemon died; nothing else, and nothing
   torn within a block.
3. In a part of the cycles, wait for in-sync and compare primary and secondary byte by byte; in
   others the next kill hits while recovery is still copying, which a copy rate below the speed of
   the load makes likely.

One block never has two requests in flight, so what it may hold is always known.  The seed is
printed; `--seed` gives the same load again (not the same moments of death).
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bitmapd.record import tool
from tests.support import rawnbd
from tests.support.rawnbd import RawNbd
from tests.support.volumes import MIB, Volume

BLOCK = 4096
EXTENT = MIB
DEPTH = 24
LONGEST_BLOCKS = 64
COPY_RATE = "32MiB"
_HEADER = struct.Struct("<8sQQ")
_MAGIC = b"soakblok"
_ZEROS = bytes(BLOCK)


class SoakFailure(AssertionError):
    """Data were lost, or the record did not name a difference."""


def block_content(block: int, generation: int) -> bytes:
    """4 KiB that name their place and generation; generation 0 is a block of zeros."""
    if not generation:
        return _ZEROS
    head = _HEADER.pack(_MAGIC, block, generation)
    return head + random.Random(generation * 1_000_003 + block).randbytes(8) * ((BLOCK - 24) // 8)


def block_generation(block: int, content: bytes) -> int | None:
    """The generation a block holds, None when it is not a whole block of this soak."""
    if content == _ZEROS:
        return 0
    magic, place, generation = _HEADER.unpack_from(content)
    if magic != _MAGIC or place != block or content != block_content(block, generation):
        return None
    return int(generation)


@dataclass
class Model:
    """What each block may hold: one acknowledged generation, and those still in doubt."""

    acked: list[int]
    doubt: dict[int, set[int]] = field(default_factory=dict)
    generation: int = 0

    def next_generation(self) -> int:
        self.generation += 1
        return self.generation

    def check(self, block: int, content: bytes) -> None:
        """Compare with what was read after a crash, and settle the doubt."""
        allowed = {self.acked[block]} | self.doubt.pop(block, set())
        found = block_generation(block, content)
        if found not in allowed:
            raise SoakFailure(
                f"block {block}: found generation {found}, allowed {sorted(allowed)};"
                f" first bytes {content[:24].hex()}"
            )
        self.acked[block] = found


@dataclass
class Counts:
    cycles: int = 0
    acked_requests: int = 0
    in_doubt: int = 0
    compared: int = 0
    differing_extents: int = 0
    recorded_extents: int = 0
    died_in_recovery: int = 0


class Writer:
    """Random load until the server dies or `stop` is set."""

    def __init__(self, model: Model, rng: random.Random, counts: Counts) -> None:
        self._model = model
        self._rng = rng
        self._counts = counts
        self._busy: set[int] = set()
        self._pending: dict[int, list[tuple[int, int]]] = {}
        # A few places are written again and again (hits); the rest of the volume gives misses.
        blocks = len(model.acked)
        self._hot = [rng.randrange(blocks) for _ in range(4)]

    def run(self, client: RawNbd, stop: threading.Event) -> None:
        """Returns when stopped or when the server is gone; what is unanswered is in doubt."""
        try:
            while not stop.is_set():
                while client.in_flight < DEPTH:
                    self._submit(client)
                self._take_reply(client)
            while client.in_flight:
                self._take_reply(client)
            client.disconnect()
        except ConnectionError:
            for written in self._pending.values():
                for block, generation in written:
                    self._model.doubt.setdefault(block, set()).add(generation)
                    self._counts.in_doubt += 1

    def _take_reply(self, client: RawNbd) -> None:
        reply = client.reply()
        written = self._pending.pop(reply.handle)
        if reply.error:
            raise SoakFailure(f"a request failed with error {reply.error}; no fault was injected")
        for block, generation in written:
            self._model.acked[block] = generation
            self._busy.discard(block)
        self._counts.acked_requests += 1

    def _submit(self, client: RawNbd) -> None:
        rng = self._rng
        if rng.random() < 0.02:
            self._remember(client, rawnbd.FLUSH, 0, 0, b"", 0, [])
            return
        first, count = self._free_range()
        flags = rawnbd.FUA if rng.random() < 0.1 else 0
        if rng.random() < 0.08:
            written = [(block, 0) for block in range(first, first + count)]
            self._remember(client, rawnbd.WRITE_ZEROES, first, count, b"", flags, written)
            return
        generation = self._model.next_generation()
        written = [(block, generation) for block in range(first, first + count)]
        payload = b"".join(block_content(block, generation) for block, _ in written)
        self._remember(client, rawnbd.WRITE, first, count, payload, flags, written)

    def _remember(
        self,
        client: RawNbd,
        command: int,
        first: int,
        count: int,
        payload: bytes,
        flags: int,
        written: list[tuple[int, int]],
    ) -> None:
        # Entered before it is sent: a server that dies while we send may have carried it out.
        self._pending[client.next_handle] = written
        self._busy.update(block for block, _ in written)
        client.submit(command, first * BLOCK, count * BLOCK, payload, flags)

    def _free_range(self) -> tuple[int, int]:
        """A random run of blocks of which none is in flight."""
        rng = self._rng
        total = len(self._model.acked)
        while True:
            count = rng.choice((1, 1, 1, 2, 4, 16, LONGEST_BLOCKS))
            if rng.random() < 0.7:
                base = rng.choice(self._hot) + rng.randrange(128)
            else:
                base = rng.randrange(total)
            first = min(base, total - count)
            if self._busy.isdisjoint(range(first, first + count)):
                return first, count


def blocks_of(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(EXTENT):
            yield chunk


def differing_extents(volume: Volume) -> list[int]:
    pairs = zip(blocks_of(volume.primary), blocks_of(volume.secondary), strict=True)
    return [extent for extent, (ours, theirs) in enumerate(pairs) if ours != theirs]


def check_superset(volume: Volume, counts: Counts) -> None:
    loaded = tool.load(str(volume.record))
    differing = differing_extents(volume)
    missing = [extent for extent in differing if not loaded.bits[extent]]
    if missing:
        raise SoakFailure(f"extents {missing} differ but are not in the stored record")
    counts.differing_extents += len(differing)
    counts.recorded_extents += loaded.bits.count(1)


def check_content(volume: Volume, model: Model) -> None:
    with RawNbd(volume.socket, volume.name) as client:
        for start in range(0, volume.size_bytes, EXTENT):
            data = client.call(rawnbd.READ, start, EXTENT)
            for offset in range(0, EXTENT, BLOCK):
                model.check((start + offset) // BLOCK, data[offset : offset + BLOCK])
        client.disconnect()
    if model.doubt:
        raise SoakFailure(f"blocks {sorted(model.doubt)} were never read")


def one_cycle(volume: Volume, model: Model, rng: random.Random, counts: Counts) -> None:
    """Load, death at a random moment, checks, start."""
    # Short lives die in recovery, long ones in the steady state.
    life_s = rng.uniform(0.0, 0.15) if rng.random() < 0.4 else rng.uniform(0.2, 1.2)
    over = threading.Event()

    def kill() -> None:
        try:
            volume.kill()
        finally:
            over.set()

    death = threading.Timer(life_s, kill)
    with RawNbd(volume.socket, volume.name) as client:
        death.start()
        try:
            Writer(model, rng, counts).run(client, over)
        finally:
            death.join()
    check_superset(volume, counts)
    volume.start()
    check_content(volume, model)
    if rng.random() < 0.35:
        volume.wait_in_sync()
        differing = differing_extents(volume)
        if differing:
            raise SoakFailure(f"in sync, but extents {differing} differ")
        counts.compared += 1
    elif volume.status()["state"] == "resyncing":
        counts.died_in_recovery += 1
    counts.cycles += 1


def soak(folder: Path, cycles: int, seed: int, size_bytes: int = 64 * MIB) -> Counts:
    """Run the cycles in `folder`; SoakFailure (or a failed command) says what went wrong."""
    rng = random.Random(seed)
    counts = Counts()
    model = Model([0] * (size_bytes // BLOCK))
    options = ["--record-limit", "24MiB", "--initial-sync", "full", "--era-interval", "100ms"]
    with Volume(folder, size_bytes, options=options) as volume:
        volume.create()
        volume.start()
        volume.dmctl("set", volume.name, f"copy-rate={COPY_RATE}")
        for number in range(cycles):
            one_cycle(volume, model, rng, counts)
            if sys.stdout.isatty() or number % 20 == 19:
                print(f"  cycle {number + 1}/{cycles}: {counts}", flush=True)
        volume.wait_in_sync()
        volume.stop()
        if differing_extents(volume):
            raise SoakFailure("stopped cleanly, but primary and secondary differ")
        if tool.load(str(volume.record)).bits.any():
            raise SoakFailure("stopped cleanly, but the stored record is not empty")
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description="kill -9 cycles under verify load")
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)))
    parser.add_argument("--size-mib", type=int, default=64)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak"))
    print(f"soak: {options.cycles} cycles, seed {options.seed}, files in {folder}")
    began = time.monotonic()
    try:
        counts = soak(folder, options.cycles, options.seed, options.size_mib * MIB)
    except BaseException:
        print(f"soak: FAILED with seed {options.seed}; the files are kept in {folder}")
        raise
    shutil.rmtree(folder)
    print(f"soak: {counts}")
    print(f"soak: no acknowledged write was lost in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
