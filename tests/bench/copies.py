"""The copier beside nbdcopy and dd: the whole device, and scattered 64 KiB blocks.

bitmapd copies what is dirty, so the load is made by pausing the volume, writing, and resuming;
the time runs from `resume` to in-sync, with everything durable on the secondary.  nbdcopy and dd
get a source in which the same bytes are data and the rest is a hole, and must flush at the end.
The page cache of the sources is dropped first: bitmapd reads the primary itself.

Every target is written with zeros in full beforehand.  Memory that a virtual machine has not used
yet comes from its host at some 10 us a page, so whoever copies first into a fresh file would pay
for those who come after: 1.9 s for a GiB instead of 0.5 s, measured.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping
from pathlib import Path

from tests.bench import servers
from tests.support import rawnbd
from tests.support.rawnbd import RawNbd
from tests.support.volumes import MIB, Volume, make_file, run

BLOCK = 64 << 10
DEPTH = 16
COPY_TIMEOUT_S = 600.0


def pick_blocks(size_bytes: int, fraction: float, seed: int) -> list[int]:
    total = size_bytes // BLOCK
    if fraction >= 1:
        return list(range(total))
    return sorted(random.Random(seed).sample(range(total), int(total * fraction)))


def write_blocks(volume: Volume, blocks: list[int], seed: int) -> None:
    """Fresh data for the given blocks, through the export."""
    noise = random.Random(seed).randbytes(BLOCK + 4096)
    with RawNbd(volume.socket, volume.name) as client:
        for number, block in enumerate(blocks):
            shift = number % 4096
            client.submit(rawnbd.WRITE, block * BLOCK, BLOCK, noise[shift : shift + BLOCK])
            while client.in_flight >= DEPTH:
                _answer(client)
        while client.in_flight:
            _answer(client)
        client.call(rawnbd.FLUSH)
        client.disconnect()


def _answer(client: RawNbd) -> None:
    reply = client.reply()
    if reply.error:
        raise OSError(reply.error, "a write of the benchmark failed")


def forget_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sparse_source(path: Path, size_bytes: int, blocks: list[int], seed: int) -> None:
    noise = random.Random(seed)
    make_file(path, size_bytes)
    with path.open("r+b") as file:
        for block in blocks:
            file.seek(block * BLOCK)
            file.write(noise.randbytes(BLOCK))
    forget_cache(path)


def laid_out(path: Path, size_bytes: int) -> Path:
    """A file of zeros that has its room, without page cache where there is one."""
    zeros = bytes(min(16 * MIB, size_bytes))
    with path.open("wb") as file:
        for offset in range(0, size_bytes, len(zeros)):
            file.write(zeros[: size_bytes - offset])
    forget_cache(path)
    return path


def time_bitmapd(volume: Volume, blocks: list[int], seed: int) -> float:
    """Seconds from resume to in-sync with exactly these blocks dirty."""
    with volume.control(COPY_TIMEOUT_S) as control:
        control.call("pause")
        write_blocks(volume, blocks, seed)
        began = time.perf_counter()
        control.call("resume")
        control.call("wait", **{"for": "in-sync"})
        return time.perf_counter() - began


def time_command(command: list[str], source: Path) -> float:
    forget_cache(source)
    began = time.perf_counter()
    run(command, timeout_s=COPY_TIMEOUT_S)
    return time.perf_counter() - began


def compare_copies(
    media: Path,
    state: Path,
    size_bytes: int,
    fraction: float,
    repeats: int,
    kinds: Mapping[str, Path],
) -> dict[str, list[float]]:
    """Seconds of each contender, interleaved; the target is a file, or nbdkit serving one.
    `kinds`: programs by the name under which their seconds go (`servers.programs`)."""
    seconds: dict[str, list[float]] = {}
    source, target = media / "copy.source", media / "copy.target"
    served = media / "copy.served"
    for number in range(repeats):
        blocks = pick_blocks(size_bytes, fraction, number)
        sparse_source(source, size_bytes, blocks, number)
        for secondary in ("file", "nbd"):
            for place, (kind, program) in enumerate(kinds.items()):
                with (
                    servers.nbdkit_file(
                        laid_out(served, size_bytes), state, f"served{number}{place}"
                    ) as remote,
                    Volume(
                        state,
                        size_bytes,
                        f"copy{number}{place}{secondary}",
                        options=["--initial-sync", "skip", "--record-limit", f"{size_bytes}B"],
                        secondary_target=remote.uri if secondary == "nbd" else None,
                        media_folder=media,
                        program=program,
                    ) as volume,
                ):
                    volume.create()
                    laid_out(volume.secondary, size_bytes)
                    volume.start()
                    servers.check_kind(volume, kind)
                    took = time_bitmapd(volume, blocks, number)
                    seconds.setdefault(f"{kind} to {secondary}", []).append(took)
                    volume.stop()
                for path in (volume.primary, volume.secondary, volume.record):
                    path.unlink()
            with servers.nbdkit_file(
                laid_out(served, size_bytes), state, f"served{number}"
            ) as remote:
                laid_out(target, size_bytes)
                where = remote.uri if secondary == "nbd" else str(target)
                command = ["nbdcopy", "--flush", "--destination-is-zero", str(source), where]
                took = time_command(command, source)
                seconds.setdefault(f"nbdcopy to {secondary}", []).append(took)
        laid_out(target, size_bytes)
        command = ["dd", f"if={source}", f"of={target}", f"bs={MIB if fraction >= 1 else BLOCK}"]
        command += ["iflag=direct", "oflag=direct", "status=none"]
        command.append("conv=notrunc,fsync" + ("" if fraction >= 1 else ",sparse"))
        seconds.setdefault("dd to file", []).append(time_command(command, source))
    for path in (source, target, served):
        path.unlink()
    return seconds
