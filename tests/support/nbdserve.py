"""Export a file with the real server, engine and device, in a process or a thread of its own.

    python -m tests.support.nbdserve --file F (--unix SOCKET | --tcp PORT) [--tls FOLDER] …

As a process it prints one JSON line with the port once it listens, and drains on SIGTERM.
`ServerThread` serves any device; `HeldDevice` is one in memory whose operations complete when the
test says so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitmapd.media.aio import AioEngine
from bitmapd.media.base import AllocationDone, Done
from bitmapd.media.buffers import BufferPool
from bitmapd.media.kdevice import KernelDevice
from bitmapd.nbd.server.export import NbdServer
from bitmapd.nbd.server.hub import ConnectionLimits
from bitmapd.net.tls import server_context

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]


class HeldDevice:
    """A device in memory.  While `held`, operations wait in `waiting` until `release`."""

    name = "held"

    def __init__(self, loop: asyncio.AbstractEventLoop, size_bytes: int = MIB, block: int = 512):
        self.loop = loop
        self.size_bytes = size_bytes
        self.block_size_bytes = block
        self.content = bytearray(size_bytes)
        self.held = False
        self.waiting: list[tuple[str, Callable[[], None]]] = []
        self.log: list[tuple[Any, ...]] = []
        self.fail_with: OSError | None = None
        self.pieces: list[tuple[int, int]] | None = None

    def _later(self, what: str, work: Callable[[], None], done: Callable[[Any], None]) -> None:
        def finish() -> None:
            if self.fail_with is None:
                work()
            done(self.fail_with)

        if self.held:
            self.waiting.append((what, finish))
        else:
            self.loop.call_soon(finish)

    def release(self, count: int | None = None) -> None:
        released = self.waiting[:count]
        del self.waiting[:count]
        for _, finish in released:
            finish()

    def read(self, offset_bytes: int, buffer: memoryview, done: Done) -> None:
        end = offset_bytes + len(buffer)

        def work() -> None:
            buffer[:] = self.content[offset_bytes:end]

        self.log.append(("read", offset_bytes, len(buffer)))
        self._later("read", work, done)

    def write(self, offset_bytes: int, buffer: memoryview, done: Done, fua: bool = False) -> None:
        def work() -> None:
            self.content[offset_bytes : offset_bytes + len(buffer)] = buffer

        self.log.append(("write", offset_bytes, len(buffer), fua))
        self._later("write", work, done)

    def zero(
        self,
        offset_bytes: int,
        length_bytes: int,
        done: Done,
        *,
        fua: bool = False,
        unmap: bool = True,
        fast: bool = False,
    ) -> None:
        def work() -> None:
            self.content[offset_bytes : offset_bytes + length_bytes] = bytes(length_bytes)

        self.log.append(("zero", offset_bytes, length_bytes, fua, unmap, fast))
        self._later("zero", work, done)

    def trim(self, offset_bytes: int, length_bytes: int, done: Done, *, fua: bool = False) -> None:
        self.log.append(("trim", offset_bytes, length_bytes, fua))
        self._later("trim", lambda: None, done)

    def flush(self, done: Done) -> None:
        self.log.append(("flush",))
        self._later("flush", lambda: None, done)

    def allocation(self, offset_bytes: int, length_bytes: int, done: AllocationDone) -> None:
        self.log.append(("allocation", offset_bytes, length_bytes))
        pieces = self.pieces if self.pieces is not None else [(length_bytes, 0)]
        self._later("allocation", lambda: None, lambda error: done(error, pieces))


class ServerThread:
    """A loop in a thread with one server; `call` runs a function there.

    `open_device(loop, engine)` makes what is exported.
    """

    def __init__(
        self,
        open_device: Callable[[asyncio.AbstractEventLoop, AioEngine], Any],
        *,
        pool_bytes: int = 64 * MIB,
        **options: Any,
    ) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.failures: list[dict[str, Any]] = []
        self._open_device = open_device
        self._pool_bytes = pool_bytes
        self._options = {
            "export_name": "vol0",
            "description": "a volume",
            "tls": None,
            "emit": lambda event, **fields: self.events.append((event, fields)),
        } | options
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nbd-server")

    def __enter__(self) -> ServerThread:
        self._thread.start()
        if not self._ready.wait(30):
            raise RuntimeError("the server did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        if self._thread.is_alive():
            raise RuntimeError("the server did not stop")
        if self.failures:
            raise RuntimeError(f"an exception reached the loop: {self.failures}")

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(lambda _, context: self.failures.append(context))
        self._stop = asyncio.Event()
        engine = AioEngine(self.loop)
        self.device = self._open_device(self.loop, engine)
        self.pool = BufferPool(self.loop, self._pool_bytes)
        self.server = NbdServer(
            self.loop, self.device, self.pool, engine.kick, cork=engine.cork, **self._options
        )
        engine.after_reap.append(self.server.flush_replies)
        self._ready.set()
        await self._stop.wait()
        await self.server.drain(1.0)
        engine.close()

    def call(self, function: Callable[[], Any]) -> Any:
        """Run on the loop's thread and return the result."""

        async def work() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(work(), self.loop).result(30)

    def drain(self, timeout_s: float) -> bool:
        return asyncio.run_coroutine_threadsafe(self.server.drain(timeout_s), self.loop).result(60)

    def until(self, condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
        """Ask on the loop's thread until it is true."""

        async def work() -> Any:
            async with asyncio.timeout(timeout_s):
                while not (answer := condition()):
                    await asyncio.sleep(0.005)
                return answer

        return asyncio.run_coroutine_threadsafe(work(), self.loop).result(timeout_s + 5)


class ServerProcess:
    """What `serve` yields: where it listens and the process."""

    def __init__(self, process: subprocess.Popen[str], unix: str | None, port: int | None) -> None:
        self.process = process
        self.unix = unix
        self.port = port

    def uri(self, export: str = "", scheme: str = "nbd") -> str:
        if self.unix is not None:
            return f"{scheme}+unix:///{export}?socket={self.unix}"
        return f"{scheme}://localhost:{self.port}/{export}"

    def resident_bytes(self) -> int:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("the server is gone")


@contextmanager
def serve(file: Path, *arguments: str, unix: Path | None = None) -> Iterator[ServerProcess]:
    """A server process for a file, on a unix socket or else on a free TCP port."""
    where = ["--tcp", "0"] if unix is None else ["--unix", str(unix)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.nbdserve", "--file", str(file), *where, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        if process.stdout is None or not select.select([process.stdout], [], [], 30)[0]:
            raise RuntimeError("the server did not start")
        port = json.loads(process.stdout.readline() or '{"port": null}')["port"]
        yield ServerProcess(process, None if unix is None else str(unix), port)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stdout is not None:
            process.stdout.close()


async def _serve(arguments: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    engine = AioEngine(loop)
    device = KernelDevice(arguments.file, engine)
    server = NbdServer(
        loop,
        device,
        BufferPool(loop, arguments.pool_mib * MIB),
        engine.kick,
        export_name=arguments.name,
        description="a file",
        tls=None if arguments.tls is None else server_context(arguments.tls),
        emit=lambda event, **fields: arguments.quiet or print(event, fields, file=sys.stderr),
        read_only=arguments.read_only,
        cork=engine.cork,
        limits=ConnectionLimits(
            handshake_timeout_s=arguments.timeout, message_timeout_s=arguments.timeout
        ),
    )
    engine.after_reap.append(server.flush_replies)
    port = None
    if arguments.unix is not None:
        server.listen_unix(arguments.unix, tls=arguments.tls is not None)
    else:
        port = server.listen_tcp("127.0.0.1", arguments.tcp)[0][1]
    print(json.dumps({"port": port}), flush=True)
    await stop.wait()
    await server.drain(5.0)
    if not arguments.quiet:
        print(server.stats.by_command(), file=sys.stderr)
    engine.close()
    device.close()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--file", required=True)
    parser.add_argument("--unix")
    parser.add_argument("--tcp", type=int, default=0)
    parser.add_argument("--tls", type=Path)
    parser.add_argument("--name", default="vol0")
    parser.add_argument("--read-only", action="store_true")
    parser.add_argument("--pool-mib", type=int, default=64)
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--timeout", type=float, default=30.0)
    asyncio.run(_serve(parser.parse_args()))
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main())
