"""The guest's part of a round of the power-cut tests.

    python -m tests.vm.powercut_guest NAME ROUND SIZE_BYTES FLUSHING

Starts the volume and waits until it is in sync (`started`, `recovered STATUS`), waits for SIGUSR1,
writes (`all …`, `one …`; see `tests/vm/powercut.py`) until SIGUSR2 comes, stops the volume
(`stopped`).  A power cut may come at any moment.  Everything in one process, since starting one
takes seconds in an emulated machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import mmap
import os
import signal
import struct
import sys
import threading

from dmctl.cli.main import main as dmctl
from tests.vm.powercut import CHUNK_PAGES, PAGE_BYTES, WRITERS, Kind, content, operations

_BLKDISCARD = 0x1277


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def run(*words: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = dmctl(words)
    if status:
        raise SystemExit(f"dmctl {' '.join(words)}: {status}: {said.getvalue()}")
    return said.getvalue()


class Writer(threading.Thread):
    def __init__(self, device: str, number: int, round_: int, pages: int, flushing: bool) -> None:
        super().__init__(name=f"writer {number}")
        self._number = number
        self._round = round_
        self._operations = operations(round_, number, pages, flushing=flushing)
        self._fd = os.open(device, os.O_RDWR | os.O_DIRECT)
        self._memory = memoryview(mmap.mmap(-1, CHUNK_PAGES * PAGE_BYTES))
        self.ended = threading.Event()

    def run(self) -> None:
        try:
            while not self.ended.is_set():
                self._one()
        except OSError as error:
            say(f"error {self.name}: {error}")
        finally:
            os.close(self._fd)

    def _one(self) -> None:
        operation = next(self._operations)
        offset, length = operation.page * PAGE_BYTES, operation.pages * PAGE_BYTES
        match operation.kind:
            case Kind.FLUSH:
                os.fsync(self._fd)
                say(f"all {self._number} {operation.number}")
            case Kind.DISCARD:
                fcntl.ioctl(self._fd, _BLKDISCARD, struct.pack("QQ", offset, length))
            case Kind.WRITE:
                view = self._memory[:length]
                view[:] = content(self._round, self._number, operation)
                flags = os.RWF_DSYNC if operation.durable else 0
                if os.pwritev(self._fd, [view], offset, flags) != length:
                    raise OSError(f"a write of {length} bytes at {offset} was cut short")
                if operation.durable:
                    say(f"one {self._number} {operation.number}")


def main() -> None:
    name, round_, size, flushing = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    run("start", name)
    say("started")
    run("wait", name, "--for", "in-sync", "--timeout", "300s")
    status = json.loads(run("--json", "status", name))["volumes"][0]
    # Not before `start`: what it starts would inherit it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})
    say(f"recovered {json.dumps(status)}")
    signal.sigwait({signal.SIGUSR1})
    pages = size // PAGE_BYTES
    device = f"/dev/mapper/{name}"
    writers = [Writer(device, number, round_, pages, flushing == "1") for number in range(WRITERS)]
    for writer in writers:
        writer.start()
    signal.sigwait({signal.SIGUSR2})
    for writer in writers:
        writer.ended.set()
    for writer in writers:
        writer.join()
    run("stop", name)
    say("stopped")


if __name__ == "__main__":
    main()
