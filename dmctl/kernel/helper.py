"""The wiring helper of one volume: `python -P -m dmctl.kernel.helper --fd N` (edge).

It changes the kernel's tables for bitmapd, over a socket pair and `bitmapd.attach.helper_frames`,
because what holds writes must not be what those writes wait for.  It carries out one request at a
time and ends when the other end of its socket has gone.

1. One helper of a volume changes its devices: a lock, which the kernel takes back when its holder
   dies, is waited for.  Who has it begins and ends by resuming whatever of the volume is suspended.
   The lock is not needed to give the kernel a connection to bitmapd: a suspend first submits what
   was held back by the one before, which nothing interrupts, and which waits for room in the
   kernel's NBD client, and so for that connection.  Hence another helper can make it, of this
   bitmapd or of the next one, that takes a living stack over.  Started with `--connects` it does
   only that, and it alone has pyroute2 in memory: 20 MiB.
2. While it serves it needs nothing that could wait for the volume: its memory is locked, allocation
   does not write pages back, everything is imported, and signals of the terminal do not end it.
   The answer to `hello` names what of this is not permitted, which is no error.
3. State is the kernel's: each request begins with a look at what is there.  Kept are only the
   counters of the latest barrier, and losing those makes the next one bring more.
4. What fails is answered with a code: the name of an errno, or the code of an error class.
"""

from __future__ import annotations

import argparse
import errno
import gc
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Final

from bitmapd.attach.helper_frames import Frame, FrameError, FrameReader, encode, failure, result
from bitmapd.errors import BitmapdError, BusyError, UsageError, WrongStateError
from bitmapd.hardening import be_killed_last, become_io_flusher, lock_memory
from dmctl.kernel.dm_ioctl import DeviceMapper, load_module
from dmctl.kernel.verbs import Answer, Helper, Request
from dmctl.model.stack import Volume

_CHUNK_BYTES: Final = 1 << 20
_MAX_FDS: Final = 4


# -- serving ----------------------------------------------------------------------------------
class Server:
    """Frames in, frames out; until the other end has gone."""

    def __init__(self, sock: socket.socket, warnings: Sequence[str], *, connects: bool) -> None:
        self._socket = sock
        self._connects = connects
        self._warnings = list(warnings)
        self._helper: Helper | None = None

    def serve(self) -> None:
        reader = FrameReader()
        fds: list[int] = []
        try:
            while True:
                data, received, _, _ = socket.recv_fds(
                    self._socket, _CHUNK_BYTES, _MAX_FDS, socket.MSG_CMSG_CLOEXEC
                )
                fds += received
                if not data:
                    return
                for frame in reader.feed(data):
                    header, payload = self._answer(frame, fds)
                    _close_all(fds)
                    self._socket.sendall(encode(header, payload))
                    gc.collect()
        except ConnectionError:
            return
        finally:
            _close_all(fds)
            if self._helper is not None:
                self._helper.end()

    def _answer(self, frame: Frame, fds: Sequence[int]) -> Answer:
        number = frame.header.get("id")
        if not isinstance(number, int):
            raise FrameError(f"a request has the id {number!r}")
        try:
            fields, payload = self._carry_out(frame.verb, Request(frame.header, fds))
        except BusyError as error:
            return failure(number, "EBUSY", _with_hint(error)), b""
        except BitmapdError as error:
            return failure(number, error.code, _with_hint(error)), b""
        except OSError as error:
            code = errno.errorcode.get(error.errno or errno.EIO, "EIO")
            return failure(number, code, error.strerror or str(error)), b""
        return result(number, **fields), payload

    def _carry_out(self, verb: str, request: Request) -> Answer:
        if verb == "hello":
            return self._hello(request)
        if self._helper is None:
            raise WrongStateError(f"'{verb}' came before 'hello'")
        if verb not in self._helper.verbs:
            raise UsageError(f"unknown verb '{verb}'")
        return self._helper.verbs[verb](request)

    def _hello(self, request: Request) -> Answer:
        if self._helper is not None:
            raise WrongStateError("a helper serves one volume")
        volume = Volume(
            name=request.text("name"),
            uuid=request.text("uuid"),
            primary=request.text("primary"),
            size_bytes=request.number("size_bytes"),
            logical_block_bytes=request.number("logical_block_bytes"),
            block_bytes=request.number("block_bytes"),
        )
        load_module("dm_mod")
        mapper = DeviceMapper()
        helper = Helper(volume, mapper)
        try:
            if not self._connects:
                helper.owns()
            described = helper.described()
        except BaseException:
            mapper.close()
            raise
        self._helper = helper
        return {**described, "warnings": self._warnings}, b""


def _with_hint(error: BitmapdError) -> str:
    return f"{error.message}; {error.hint}" if error.hint else error.message


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


# -- the process ------------------------------------------------------------------------------
def harden() -> list[str]:
    """Make the process independent of the devices that it suspends; what was not permitted."""
    steps = {
        "PR_SET_IO_FLUSHER": become_io_flusher,
        "mlockall": lock_memory,
        "oom_score_adj": be_killed_last,
    }
    return [f"{name}: {os.strerror(number)}" for name, step in steps.items() if (number := step())]


def _complain(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """In place of a traceback, which would open source files."""
    del trace
    os.write(2, f"<3>wiring helper: {kind.__name__}: {error}\n".encode(errors="replace"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dmctl.kernel.helper", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="one end of a stream socket pair")
    parser.add_argument("--connects", action="store_true", help="make connections, nothing else")
    given = parser.parse_args(arguments)
    if given.connects:
        from dmctl.kernel import nbd_messages  # noqa: F401, PLC0415  (for later)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which programs would inherit
    sys.excepthook = _complain
    with socket.socket(fileno=given.fd) as sock:
        sock.set_inheritable(False)
        os.chdir("/")
        warnings = harden()
        gc.disable()
        gc.freeze()
        Server(sock, warnings, connects=given.connects).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
