"""A process that claims a medium: `python -m tests.support.claimant PATH NODE PAIR [write]`.

NODE 0 is a volume without a partner, PAIR "-" that of a node that has not joined.  It says "up", or
why not and ends with 12.  With `write` it keeps 32 writes in flight until it is killed.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from bitmapd.errors import BitmapdError
from bitmapd.media.aio import AioEngine
from bitmapd.media.buffers import aligned
from bitmapd.media.claims import Claim
from bitmapd.media.kdevice import KernelDevice

_BYTES = 256 << 10


def spoken(claim: Claim) -> list[str]:
    return [str(claim.node or 0), "-" if claim.pair is None else str(claim.pair)]


@contextmanager
def claimant(path: str, claim: Claim, *more: str) -> Iterator[subprocess.Popen[str]]:
    """Killed at the end, and gone with its I/O; `stdout` begins with "up" or an error."""
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, path, *spoken(claim), *more],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


async def _claim(path: str, claim: Claim, writes: bool) -> None:
    engine = AioEngine(asyncio.get_running_loop())
    device = KernelDevice(path, engine, claim=claim)
    buffer = aligned(_BYTES)
    places = device.size_bytes // _BYTES
    written = 0

    def again(error: OSError | None) -> None:
        nonlocal written
        written += 1
        device.write(written % places * _BYTES, buffer, again)

    for _ in range(32 * writes):
        again(None)
    print("up", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    path, node, pair, *more = sys.argv[1:]
    made = Claim(int(node) or None, None if pair == "-" else UUID(pair))
    try:
        asyncio.run(_claim(path, made, bool(more)))
    except BitmapdError as error:
        print(error.message, flush=True)
        sys.exit(12)
