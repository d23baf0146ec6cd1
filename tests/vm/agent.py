"""The guest's agent: runs what the host asks for, over a virtio serial port.

Started by the init script under the bare interpreter, so it imports the standard library only.
One JSON object a line.  From the host: `{"id", "run": [...], "cwd", "env", "input"}` starts a
program, `{"id", "signal": n}` signals its process group.  To the host: `{"hello": seconds since
boot}` once, `{"id", "fd": 1 or 2, "data": base64}` for output, `{"id", "status": n}` at its end
(negative: the signal that ended it), `{"beat": seconds}` whenever nothing happened for a while,
by which the host tells a slow guest from a dead one.

One thread, one selector.  A program has ended when its process has, even if a daemon it left keeps
the pipes open; what is in the pipes by then is still sent.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

PORT_NAME = "lab"
BEAT_S = 5.0
CHUNK_BYTES = 32 << 10
PIPE_BYTES = 64 << 10
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
    "LAB_GUEST": "1",
}


class Job:
    def __init__(self, number: int, request: dict[str, Any]) -> None:
        self.number = number
        self.process = subprocess.Popen(
            request["run"],
            cwd=request.get("cwd") or "/",
            env=ENVIRONMENT | request.get("env", {}),
            stdin=subprocess.PIPE if "input" in request else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.pidfd = os.pidfd_open(self.process.pid)
        self.input = memoryview(base64.b64decode(request.get("input", "")))
        self.pipes: dict[int, IO[bytes]] = {}
        for fd, pipe in ((1, self.process.stdout), (2, self.process.stderr)):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)
                self.pipes[fd] = pipe
        if self.process.stdin is not None:
            os.set_blocking(self.process.stdin.fileno(), False)


class Agent:
    def __init__(self, port: int) -> None:
        self._port = port
        self._line = b""
        self._jobs: dict[int, Job] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(port, selectors.EVENT_READ, self._requests)

    def serve(self) -> None:
        self._send(hello=uptime_s(), release=os.uname().release)
        while True:
            ready = self._selector.select(BEAT_S)
            for key, _ in ready:
                key.data()
            if not ready:
                self._send(beat=uptime_s())

    def _send(self, **message: Any) -> None:
        left = memoryview(json.dumps(message).encode() + b"\n")
        while left:
            left = left[os.write(self._port, left) :]

    def _requests(self) -> None:
        got = os.read(self._port, CHUNK_BYTES)
        if not got:
            # Only a host that is gone closes its end; the guest goes with it.
            sys.exit()
        *lines, self._line = (self._line + got).split(b"\n")
        for line in lines:
            self._request(json.loads(line))

    def _request(self, request: dict[str, Any]) -> None:
        number = request["id"]
        if "signal" in request:
            job = self._jobs.get(number)
            if job is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(job.process.pid, request["signal"])
            return
        try:
            job = Job(number, request)
        except OSError as error:
            self._output(number, 2, f"{error}\n".encode())
            self._send(id=number, status=127)
            return
        self._jobs[number] = job
        self._selector.register(job.pidfd, selectors.EVENT_READ, lambda: self._ended(job))
        for fd in job.pipes:
            pipe = job.pipes[fd]
            self._selector.register(
                pipe, selectors.EVENT_READ, lambda fd=fd: self._readable(job, fd)
            )
        if job.process.stdin is not None:
            self._selector.register(
                job.process.stdin, selectors.EVENT_WRITE, lambda: self._writable(job)
            )

    def _output(self, number: int, fd: int, data: bytes) -> None:
        self._send(id=number, fd=fd, data=base64.b64encode(data).decode())

    def _readable(self, job: Job, fd: int) -> bool:
        """Sends what one read gives; whether there may be more."""
        pipe = job.pipes.get(fd)
        if pipe is None:
            return False
        try:
            data = os.read(pipe.fileno(), CHUNK_BYTES)
        except BlockingIOError:
            return False
        if data:
            self._output(job.number, fd, data)
            return True
        self._selector.unregister(pipe)
        pipe.close()
        del job.pipes[fd]
        return False

    def _writable(self, job: Job) -> None:
        pipe = job.process.stdin
        if pipe is None or pipe.closed:
            return
        try:
            job.input = job.input[os.write(pipe.fileno(), job.input) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            job.input = job.input[:0]
        if job.input:
            return
        self._selector.unregister(pipe)
        pipe.close()

    def _ended(self, job: Job) -> None:
        for fd in tuple(job.pipes):
            # No more than a pipe holds: a daemon left behind may write for ever.
            for _ in range(PIPE_BYTES // CHUNK_BYTES):
                if not self._readable(job, fd):
                    break
        for pipe in (*job.pipes.values(), job.process.stdin):
            if pipe is not None and not pipe.closed:
                self._selector.unregister(pipe)
                pipe.close()
        job.pipes.clear()
        self._selector.unregister(job.pidfd)
        os.close(job.pidfd)
        del self._jobs[job.number]
        self._send(id=job.number, status=job.process.wait())


def uptime_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def find_port() -> str:
    for name in Path("/sys/class/virtio-ports").glob("*/name"):
        if name.read_text().strip() == PORT_NAME:
            return f"/dev/{name.parent.name}"
    raise SystemExit(f"agent: there is no virtio port {PORT_NAME}")


def name_disks() -> None:
    """`/dev/lab/SERIAL` leads to each virtio disk of the test's own."""
    folder = Path("/dev/lab")
    folder.mkdir(exist_ok=True)
    for serial in Path("/sys/block").glob("vd*/serial"):
        (folder / serial.read_text().strip()).symlink_to(f"/dev/{serial.parent.name}")


def main() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    name_disks()
    Agent(os.open(find_port(), os.O_RDWR | os.O_CLOEXEC)).serve()


if __name__ == "__main__":
    main()
