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
   What of this is not permitted is told in the answer to `hello`, and is no error.
3. State is the kernel's: each request begins with a look at what is there.  Kept are only the
   counters of the latest barrier, and losing those makes the next one bring more.
4. What fails is answered with a code: the name of an errno, or the code of an error class.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import gc
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from bitmapd.attach.helper_frames import (
    Frame,
    FrameError,
    FrameReader,
    encode,
    failure,
    pack_runs,
    result,
)
from bitmapd.errors import BitmapdError, BusyError, UsageError, WrongStateError
from bitmapd.hardening import be_killed_last, become_io_flusher, lock_memory
from bitmapd.media.blockstat import BlockStat
from dmctl.kernel.barrier import Barrier, MetadataFile, alarm, counters
from dmctl.kernel.dm_ioctl import CONTROL, DeviceMapper, load_module
from dmctl.kernel.dm_wire import Target
from dmctl.kernel.execute import Dmsetup
from dmctl.kernel.lvm import taken_by_lvm
from dmctl.kernel.nbd_netlink import NbdNetlink, find_device, raise_request_size
from dmctl.kernel.observe import observe, queue_number
from dmctl.kernel.selftest import selftest
from dmctl.model.era import runs
from dmctl.model.names import Layer, device_path
from dmctl.model.plan import plan
from dmctl.model.stack import (
    Goal,
    Mapped,
    Observed,
    Segment,
    Volume,
    Wanted,
    segments_of,
    write_table,
)
from dmctl.model.steps import Create
from dmctl.model.targets import SECTOR_BYTES, Table, kind_and_parameters

# Longer than any barrier's deadline, so that a helper that is about to end is outlived.
LOCK_TIMEOUT_S: Final = 30.0
# For a helper whose bitmapd has died: the time that it takes to see that, and to end.
LOCK_PATIENCE_S: Final = 2.0
RECONNECT_TIMEOUT_S: Final = 20.0
_CHUNK_BYTES: Final = 1 << 20
_MAX_FDS: Final = 4
_READS, _WRITES, _WRITE_SECTORS, _DISCARDS = 0, 4, 6, 11  # fields of /sys/block/X/stat

Answer = tuple[dict[str, Any], bytes]


class Request:
    """The fields of one request; UsageError where one is missing or of another kind."""

    def __init__(self, header: dict[str, Any], fds: Sequence[int]) -> None:
        self._header = header
        self._fds = fds

    def text(self, key: str) -> str:
        return str(self._get(key, str))

    def number(self, key: str) -> int:
        return int(self._get(key, int))

    def seconds(self, key: str) -> float:
        return float(self._get(key, int, float))

    def segments(self) -> tuple[Segment, ...] | None:
        """First byte, end byte and route of each; None if there are none."""
        if self._header.get("segments") is None:
            return None
        try:
            return tuple((int(a), int(b), str(c)) for a, b, c in self._get("segments", list))
        except (TypeError, ValueError) as error:
            raise UsageError(f"segments of another shape: {error}") from error

    def fd(self) -> int:
        if len(self._fds) != 1:
            raise UsageError(f"{len(self._fds)} sockets came with the request, not one")
        return self._fds[0]

    def _get(self, key: str, *kinds: type) -> Any:
        value = self._header.get(key)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise UsageError(f"field '{key}' of '{self._header.get('verb')}' is {value!r}")
        return value


class Helper:
    """One volume.  Every method named after a verb answers a request of that name."""

    def __init__(self, volume: Volume, mapper: DeviceMapper) -> None:
        self._volume = volume
        self._mapper = mapper
        self._actor = Dmsetup(mapper)
        self._lock: int | None = None
        self._barrier: Barrier | None = None
        self._files: list[MetadataFile | BlockStat] = []
        self._stats: dict[Layer, BlockStat] = {}
        self._lapses = 0  # those that bitmapd has seen
        self._restored = 0
        self.verbs: dict[str, Callable[[Request], Answer]] = {
            "awake": self.awake,
            "build": self.build,
            "connect": self.connect,
            "attach": self.attach,
            "barrier": self.barrier,
            "stat": self.stat,
            "close_top": self.close_top,
            "detach": self.detach,
        }

    # -- the lock -----------------------------------------------------------------------------
    def own(self, timeout_s: float = LOCK_TIMEOUT_S) -> None:
        """Lock the volume and resume what is suspended, once; BusyError if another one has it."""
        if self._lock is not None:
            return
        self._lock = lock(self._volume.uuid, timeout_s)
        self._reach(Goal.AWAKE)

    def owns(self) -> bool:
        """Whether the volume is, or can be, locked within a moment."""
        with contextlib.suppress(BusyError):
            self.own(LOCK_PATIENCE_S)
        return self._lock is not None

    def end(self) -> None:
        if self._lock is not None:
            self._reach(Goal.AWAKE)

    # -- looking ------------------------------------------------------------------------------
    def described(self) -> dict[str, Any]:
        seen = observe(self._volume, self._mapper)
        era = seen.layer(self._volume, Layer.ERA)
        return {
            "era": era is not None,
            "era_device": None if era is None else device_path(era.name),
            "nbd": find_device(self._volume.uuid),
            "write": seen.layer(self._volume, Layer.WRITE) is not None,
            "top": seen.layer(self._volume, Layer.TOP) is not None,
        }

    def _reach(self, goal: Goal, segments: tuple[Segment, ...] = ()) -> Observed:
        return self._actor.reach(Wanted(self._volume, goal, segments))

    def _layer(self, seen: Observed, layer: Layer) -> Mapped:
        device = seen.layer(self._volume, layer)
        if device is None:
            raise WrongStateError(
                f"volume '{self._volume.name}' has no {layer.value} device", hint="attach it first"
            )
        return device

    # -- verbs --------------------------------------------------------------------------------
    def awake(self, request: Request) -> Answer:
        """Nothing of the volume is suspended, and no other helper can suspend it."""
        del request
        self.own()
        return {}, b""

    def build(self, request: Request) -> Answer:
        del request
        self._forget()
        made, served = False, False
        if not self.owns():
            seen = observe(self._volume, self._mapper)
            served = seen.layer(self._volume, Layer.TOP) is not None
        if not served:
            self.own()
            seen = self._reach(Goal.AWAKE)
            steps = plan(seen, Wanted(self._volume, Goal.TRACKED))
            made = any(isinstance(step, Create) for step in steps)
            if made:
                selftest(self._mapper, self._actor)
        era = self._layer(seen if served else self._reach(Goal.TRACKED), Layer.ERA)
        self._have_counted(Layer.ERA, era)
        answer = {
            "era_device": device_path(era.name),
            # A volume that grows gets a new era device under hosts that go on.
            "adopted": not made or seen.layer(self._volume, Layer.TOP) is not None,
            "current_era": self._barrier_of(era).status().current_era,
        }
        return answer, b""

    def connect(self, request: Request) -> Answer:
        timeout_s = request.number("timeout_s")
        dead_conn_timeout_s = request.number("dead_conn_timeout_s")
        size_bytes = request.number("size_bytes")
        uuid = self._volume.uuid
        with NbdNetlink() as client:
            index = find_device(uuid)
            if index is None:
                index = client.connect(
                    request.fd(),
                    uuid,
                    size_bytes=size_bytes,
                    logical_block_bytes=request.number("logical_block_bytes"),
                    timeout_s=timeout_s,
                    dead_conn_timeout_s=dead_conn_timeout_s,
                    flags=request.number("flags"),
                )
                try:
                    raise_request_size(index, self._primary_request_kib())
                except BaseException:
                    client.disconnect(index)
                    raise
            else:
                client.reconnect(
                    index,
                    request.fd(),
                    uuid,
                    timeout_s=timeout_s,
                    dead_conn_timeout_s=dead_conn_timeout_s,
                    deadline_s=RECONNECT_TIMEOUT_S,
                )
                client.resize(index, uuid, size_bytes)
        return {"index": index}, b""

    def _primary_request_kib(self) -> int:
        primary = observe(self._volume, self._mapper).primary
        return queue_number(primary.number, "max_sectors_kb") if primary is not None else 0

    def attach(self, request: Request) -> Answer:
        self.own()
        self._forget()
        seen = self._reach(Goal.ATTACHED, request.segments() or ())
        write = self._layer(seen, Layer.WRITE)
        era = self._layer(seen, Layer.ERA)
        for layer in Layer:
            self._have_counted(layer, self._layer(seen, layer))
        below = {write.number, era.number, self._nbd_number(seen)}
        if seen.primary is not None:
            below.add(seen.primary.number)
        answer = {
            "taken_by_lvm": taken_by_lvm(self._volume.primary, below),
            "write_device": write.name,
            "top_device": self._layer(seen, Layer.TOP).name,
            "segments": segments_of(write.lines, era=era.number, nbd=self._nbd_number(seen)),
        }
        return answer, b""

    def barrier(self, request: Request) -> Answer:
        segments = request.segments()
        self.own()
        since_era, deadline_s = request.number("since_era"), request.seconds("deadline_s")
        if self._barrier is None or segments is not None:
            seen = observe(self._volume, self._mapper)
            era = self._layer(seen, Layer.ERA)
            self._layer(seen, Layer.WRITE)
            barrier = self._barrier_of(era)
            table = None
            if segments is not None:
                nbd = self._nbd_number(seen)
                table = write_table(self._volume, segments, era=era.number, nbd=nbd)
        else:
            barrier, table = self._barrier, None
        self._lapses = request.number("lapses")
        restored, uncounted = self._count_on()
        collected = barrier(None if table is None else wired(table), since_era, deadline_s)
        answer = {
            "collected_to_era": collected.to_era,
            "window_s": collected.window_s,
            "skipped": collected.skipped,
            "widened": collected.widened,
            "damage": collected.damage,
            "counted_again": restored,
            "uncounted": uncounted,
        }
        return answer, pack_runs(runs(collected.blocks))

    def stat(self, request: Request) -> Answer:
        del request
        seen = observe(self._volume, self._mapper)
        era = self._layer(seen, Layer.ERA)
        status = self._barrier_of(era).status()
        answer: dict[str, Any] = {
            "metadata_used": status.used_blocks,
            "metadata_total": status.total_blocks,
            "current_era": status.current_era,
        }
        for layer in (Layer.ERA, Layer.WRITE, Layer.TOP):
            device = seen.layer(self._volume, layer)
            if device is not None:
                answer[layer.value] = counters_of(device.number)
        return answer, b""

    def close_top(self, request: Request) -> Answer:
        del request
        self.own()
        self._reach(Goal.CLOSED)
        return {}, b""

    def detach(self, request: Request) -> Answer:
        del request
        self.own()
        self._forget()
        self._reach(Goal.GONE)
        return {}, b""

    # -- the barrier's files --------------------------------------------------------------------
    def _barrier_of(self, era: Mapped) -> Barrier:
        """The same one as long as the era device lives: it knows the counters of the latest."""
        if self._barrier is None:
            metadata = MetadataFile(node(self._mapper.table(era.name)[0].parameters.split()[0]))
            self._files.append(metadata)
            stat = self._stat_of(Layer.ERA, era)
            write = self._volume.device(Layer.WRITE)
            self._barrier = Barrier(
                self._mapper,
                era.name,
                write,
                metadata,
                lambda: counters(stat, self._lapses + self._restored),
            )
        return self._barrier

    # -- counting -------------------------------------------------------------------------------
    def _stat_of(self, layer: Layer, device: Mapped) -> BlockStat:
        if layer not in self._stats:
            self._stats[layer] = BlockStat(device.number)
            self._files.append(self._stats[layer])
        return self._stats[layer]

    def _have_counted(self, layer: Layer, device: Mapped) -> None:
        """Whether something was written directly is known from the kernel's counters alone."""
        try:
            self._stat_of(layer, device).switch_on()
        except OSError as error:
            raise WrongStateError(
                f"the kernel does not count the writes of {device_path(device.name)}, and cannot be"
                f" told to: {error}",
                hint="queue/iostats of device-mapper's devices has to be 1; or use --attach nbd",
            ) from error

    def _count_on(self) -> tuple[list[str], str]:
        """Names of the layers that somebody had the kernel not count, and why it still does not.

        Before a barrier and not as soon as it is seen: every look until then finds it.
        """
        restored, problem = [], ""
        for layer, stat in self._stats.items():
            try:
                if stat.switch_on():
                    restored.append(self._volume.device(layer))
                    self._restored += 1
            except OSError as error:
                problem = f"{device_path(self._volume.device(layer))}: {error}"
        return restored, problem

    def _forget(self) -> None:
        """The devices are about to change."""
        self._barrier = None
        for file in self._files:
            file.close()
        self._files.clear()
        self._stats.clear()

    def _nbd_number(self, seen: Observed) -> str:
        return seen.nbd.number if seen.nbd is not None else ""


def wired(table: Table) -> list[Target]:
    """A table in the kernel's units."""
    return [
        Target(
            line.first_byte // SECTOR_BYTES,
            line.length_bytes // SECTOR_BYTES,
            *kind_and_parameters(line.target),
        )
        for line in table
    ]


def node(number: str) -> str:
    """Where a block device is found by its number "major:minor"."""
    return f"/dev/{Path('/sys/dev/block', number).resolve().name}"


def counters_of(number: str) -> dict[str, int]:
    stat = BlockStat(number)
    try:
        fields = stat.read()
    finally:
        stat.close()
    return {
        "reads": fields[_READS],
        "writes": fields[_WRITES],
        "written_bytes": fields[_WRITE_SECTORS] * SECTOR_BYTES,
        "discards": fields[_DISCARDS],
    }


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


def lock(uuid: str, timeout_s: float = LOCK_TIMEOUT_S) -> int:
    """Lock the volume against other helpers; the descriptor that holds the lock.

    The lock is a byte of the control device, chosen by the UUID: it needs no file of ours.
    """
    fd = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    start = int(uuid, 16) & 0x3FFFFFFFFFFFFFFF
    wanted = struct.pack("@hhqqi", fcntl.F_WRLCK, os.SEEK_SET, start, 1, 0)
    try:
        with alarm(timeout_s, _give_up):
            fcntl.fcntl(fd, fcntl.F_OFD_SETLKW, wanted)
    except TimeoutError:
        os.close(fd)
        raise BusyError(
            "another wiring helper of the volume is alive",
            hint="is there another bitmapd of the same volume? 'ps' shows dmctl.kernel.helper",
        ) from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def _give_up(number: int, frame: object) -> None:
    """fcntl(2) is repeated after a signal whose handler does not raise."""
    raise TimeoutError


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
