"""One run of a program of somebody else's, such as a fence agent, which may do anything (edge).

`run` blocks, so it belongs into a thread: even the start may wait for a disk, and the loop serves
hosts meanwhile.

1. The agent has a session of its own.  When its time is up, or nobody wants it any more, all that
   it has started there is killed with it.
2. It inherits no descriptor of ours.  What it reads is in memory, so nobody waits for it to read.
3. What it prints is read to the end, however much it is, and the last `KEPT_BYTES` are kept.
4. What it leaves behind when it ends in time is its own affair: a program that goes on, and holds
   its output open, is not waited for.

The process is not copied to start another one (CPython uses vfork here), so locked memory does not
count twice.

A crash of ours leaves the agent at work: the other node is fenced, and nobody relies on it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bitmapd.partner.fence_policy import last_words

KEPT_BYTES = 4096
GRACE_S = 5.0  # a process that is killed and does not end hangs in the kernel
_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Run:
    """How it went.  `status`: what the agent ended with (negative: the signal), None if it was
    killed by us; `output`: the end of what it printed."""

    status: int | None
    output: bytes

    def explain(self, timeout_s: float) -> str:
        """Words that go on after the name of the program."""
        if self.status is None:
            ended = f"did not end within {timeout_s:g} s, and was killed"
        elif self.status < 0:
            ended = f"was killed by signal {-self.status}"
        else:
            ended = f"ended with status {self.status}"
        said = last_words(self.output)
        return f"{ended}: {said}" if said else ended


def run(command: str, said: bytes, timeout_s: float, wanted: int, words: Sequence[str] = ()) -> Run:
    """Run it with `words`, and with `said` on standard input.  OSError if it cannot be started.
    `wanted`: the end of a pipe whose other end is closed once nobody wants it any more; closed on
    return."""
    try:
        return _run([command, *words], said, timeout_s, wanted)
    finally:
        os.close(wanted)


def _run(command: list[str], said: bytes, timeout_s: float, wanted: int) -> Run:
    stdin = os.memfd_create("fence", os.MFD_CLOEXEC)
    try:
        os.write(stdin, said)
        os.lseek(stdin, 0, os.SEEK_SET)
        process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            start_new_session=True,
        )
    finally:
        os.close(stdin)
    pidfd = os.pidfd_open(process.pid)
    try:
        return _follow(process, pidfd, timeout_s, wanted)
    finally:
        os.close(pidfd)
        if process.stdout is not None:
            process.stdout.close()


def _follow(process: subprocess.Popen[bytes], pidfd: int, timeout_s: float, wanted: int) -> Run:
    output = _Output(process)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(wanted, select.POLLIN)
    poll.register(output.fd, select.POLLIN)
    deadline_s = time.monotonic() + timeout_s
    while (left_s := deadline_s - time.monotonic()) > 0:
        found = {fd for fd, _ in poll.poll(left_s * 1000)}
        if output.fd in found and not output.read():
            poll.unregister(output.fd)
        if pidfd in found:
            output.read()
            return Run(process.wait(), output.kept)
        if wanted in found:
            break
    # It has not been waited for, so its number is nobody else's.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    output.read()
    return Run(None, output.kept)


class _Output:
    """What it has printed so far, and the end of it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        if process.stdout is None:
            raise RuntimeError("the agent was started without a pipe")
        self.fd = process.stdout.fileno()
        self.kept = b""
        os.set_blocking(self.fd, False)

    def read(self) -> bool:
        """Take what there is; False at the end."""
        while True:
            try:
                data = os.read(self.fd, _CHUNK_BYTES)
            except BlockingIOError:
                return True
            if not data:
                return False
            self.kept = (self.kept + data)[-KEPT_BYTES:]
