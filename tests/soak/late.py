"""Deaths, cuts, pauses and growth beside a server that carries out late.

    python -m tests.soak.late --seconds 3600

The load, the model and the checks are those of `tests.soak.soak`.  The secondary is stock nbdkit,
some of whose writes take up to `SLOWEST_S`, each as a process of its own that outlives the server:
so whatever is killed, what it had sent lands later.  In each life of bitmapd, at random: the server
is killed and started again, copying is paused and resumed, the volume grows, the content is
compared with repair, the record is copied again with comparison.

After each death every extent in which the sides differ is in the stored record.  Whenever the
volume is in sync and nothing is suspect, the sides are equal; while something is, what differs is
recorded.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.soak.soak import (
    BLOCK,
    Counts,
    Model,
    SoakFailure,
    Writer,
    check_content,
    check_superset,
    differing_extents,
)
from tests.support.nbdpeers import Peer, nbdkit
from tests.support.rawnbd import RawNbd
from tests.support.volumes import MIB, Volume

SIZE_BYTES = 8 * MIB
LARGEST_BYTES = 24 * MIB
SLOWEST_S = 4
LATE = "6s"  # the setting: longer than any write, and a busy machine


def late_plugin(image: Path, seldom: int) -> list[str]:
    """One write in `seldom`, on average, takes a while."""
    number = "$(od -An -N4 -tu4 /dev/urandom)"
    wait = f"if [ $(({number} % {seldom})) = 0 ]; then sleep $(({number} % {SLOWEST_S + 1})); fi"
    piece = f"{image}.$$"
    write = f"dd if={piece} of={image} bs=1M oflag=seek_bytes seek=$4 conv=notrunc status=none"
    read = f"dd if={image} bs=1M iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none"
    return [
        "eval",
        f"get_size=stat -c %s {image}",
        f"pread={read}",
        f"pwrite=cat >{piece}; {wait}; {write}; rm {piece}",
        "can_flush=true",
        "flush=true",
        "thread_model=echo parallel",
    ]


class Restarted:
    """A server that is started again when it has died: nbdkit 1.32 may abort when it answers a
    client that has left."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._turn = threading.Lock()
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._restart, daemon=True)

    def __enter__(self) -> Restarted:
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watch.join()

    def _restart(self) -> None:
        while not self._over.wait(0.2):
            with self._turn:
                if self._peer.process is None or self._peer.process.poll() is not None:
                    self._peer.start()

    def kill(self, pause_s: float) -> None:
        with self._turn:
            self._peer.kill()
            time.sleep(pause_s)
            self._peer.start()


def trouble(volume: Volume, server: Restarted, rng: random.Random) -> None:
    """One thing that an administrator, or the world, does."""
    what = rng.choice(["server", "server", "pause", "grow", "verify", "resync"])
    if what == "server":
        server.kill(rng.uniform(0, 1))
    elif what == "pause":
        volume.dmctl("pause", volume.name, check=False)
        time.sleep(rng.uniform(0, 2))
        volume.dmctl("resume", volume.name, check=False)
    elif what == "grow" and volume.size_bytes < LARGEST_BYTES:
        for file in (volume.secondary, volume.primary):
            os.truncate(file, volume.size_bytes + MIB)
        volume.dmctl("resize", volume.name, check=False)
    elif what == "verify":
        volume.dmctl("verify", volume.name, "--repair", check=False)
    else:
        volume.dmctl("resync", volume.name, "--checksum", check=False)


def one_life(
    volume: Volume, server: Restarted, model: Model, rng: random.Random, counts: Counts
) -> None:
    """Load with troubles, death at a random moment, checks, start, checks."""
    over = threading.Event()
    failures: list[Exception] = []

    def live() -> None:
        try:
            for _ in range(rng.randint(0, 3)):
                time.sleep(rng.uniform(0, 1.5))
                trouble(volume, server, rng)
            time.sleep(rng.uniform(0, 3))
            volume.kill()
        except Exception as error:  # noqa: BLE001  (raised below, on the main thread)
            failures.append(error)
        finally:
            over.set()

    life = threading.Thread(target=live)
    with RawNbd(volume.socket, volume.name) as client:
        life.start()
        try:
            Writer(model, rng, counts).run(client, over)
        finally:
            life.join()
    if failures:
        raise failures[0]
    check_superset(volume, counts)
    volume.start()
    volume.dmctl("resume", volume.name)
    volume.dmctl("resize", volume.name, check=False)
    volume.size_bytes = int(volume.status()["size_bytes"])
    model.acked += [0] * (volume.size_bytes // BLOCK - len(model.acked))
    check_content(volume, model)
    if rng.random() < 0.5:
        volume.wait_in_sync()
        check_superset(volume, counts)
        volume.until(lambda status: status["suspect_bytes"] == 0)
        volume.wait_in_sync()
        if differing := differing_extents(volume):
            raise SoakFailure(f"in sync, nothing is suspect, but extents {differing} differ")
        counts.compared += 1
    counts.cycles += 1


def soak(folder: Path, seconds: float, seed: int) -> Counts:
    rng, counts = random.Random(seed), Counts()
    model = Model([0] * (SIZE_BYTES // BLOCK))
    image = folder / "far"
    image.write_bytes(bytes(SIZE_BYTES))
    options = ["--initial-sync", "skip", "--era-interval", "100ms", "--late-writes", LATE]
    end_s = time.monotonic() + seconds
    with nbdkit(folder, *late_plugin(image, 12)) as peer, Restarted(peer) as server:
        volume = Volume(
            folder,
            SIZE_BYTES,
            options=options,
            secondary_target=str(peer.uri()),
            media={"secondary": image},
        )
        with volume:
            volume.create()
            volume.start()
            while time.monotonic() < end_s:
                one_life(volume, server, model, rng, counts)
                if counts.cycles % 20 == 0:
                    print(f"  {counts}", flush=True)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="late"))
    print(f"late: {options.seconds:.0f} s, seed {options.seed}, files in {folder}", flush=True)
    try:
        counts = soak(folder, options.seconds, options.seed)
    except BaseException:
        print(f"late: FAILED with seed {options.seed}; the files are kept in {folder}")
        raise
    shutil.rmtree(folder)
    print(f"late: {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
