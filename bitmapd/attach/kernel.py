"""The attachment of a volume to the kernel, as bitmapd sees it (edge).

Start, in this order: `prepare` (metadata and era device, new or found alive), gate and server,
`connect` (the kernel's NBD client on a socket pair), `attach` (tables; from here on hosts can
write).  Stop: `close_hosts`, last barriers, `detach`.

1. A stack that was found alive keeps its table until the first barrier, and what it marks direct
   counts as open (`routes.adopt`).
2. The kernel gives up a connection on which an answer takes too long, whether a medium does not
   answer or this process is stopped.  Then it gets a new one, on which it sends again what had no
   answer; the server lets it in when all that came over the old one has been carried out.  That is
   done by a helper of its own, which exists before it is needed.
3. What the kernel has marked and this process has not collected survives it; after the host's
   death the record is what counts, and the stack is built anew.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from bitmapd.attach.helper import Wiring
from bitmapd.attach.helper_frames import Frame, FrameError, HelperError, unpack_runs
from bitmapd.config import VolumeConfig
from bitmapd.errors import BitmapdError, BusyError, error_from_json
from bitmapd.gate.direct import BarrierDone, Counters, HostCounters, Landed, PutOffError, SwapDone
from bitmapd.gate.routes import Segment
from bitmapd.media.blockstat import BlockStat
from bitmapd.nbd.numbers import ExportFlag, HandshakeFlag, Opt
from bitmapd.nbd.server.export import NbdServer
from bitmapd.nbd.wire import CLIENT_FLAGS, EXPORT_NAME_REPLY, GREETING, OPTION
from bitmapd.record.geometry import Geometry

SECTOR_BYTES = 512
# How long the kernel waits for an answer before it cuts the connection: longer than the slowest
# record write that is not an error, for what waits is sent again only after it.
REQUEST_TIMEOUT_S = 10
# Of one of two appliances, whose hosts may wait for a partner that is away: on a new connection
# nothing would go on before all that came over the old one had been answered.
PAIR_REQUEST_TIMEOUT_S = 24 * 3600
RECONNECT_PAUSE_S = 1.0
# How long requests wait for a gate that is gone; the administrator can give up earlier.
DEAD_GATE_TIMEOUT_S = 30 * 24 * 3600
BARRIER_DEADLINE_S = 5.0
_SOCKET_BUFFER_BYTES = 4 << 20

Emit = Callable[..., None]


class KernelAttachment:
    """See the module docstring; it is the `Kernel` of a `DirectPath`."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        config: VolumeConfig,
        geometry: Geometry,
        logical_block_bytes: int,
        emit: Emit,
    ) -> None:
        self._loop = loop
        self._config = config
        self._geometry = geometry
        self._logical_block_bytes = logical_block_bytes
        self.emit = emit
        hello = {
            "name": config.name,
            "uuid": config.uuid.hex,
            "primary": str(Path(config.primary).resolve()),
            "size_bytes": geometry.size_bytes,
            "logical_block_bytes": logical_block_bytes,
            "block_bytes": geometry.block_bytes,
        }
        self._wiring = Wiring(loop, hello, emit)
        # A helper that holds the writes of hosts may wait for what needs the connection.
        self._connector = Wiring(loop, hello, emit, "--connects", suspends=False)
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: NbdServer | None = None  # as long as the kernel is to be connected to it
        self._stats: dict[str, BlockStat] = {}
        self._uncounted = self._restored = False  # at the latest barrier
        self.era_device = ""
        self.adopted = False
        self.current_era = 0
        self.mark_s = 0.0  # what a host waits for at its first write to a block in an era
        self.device = f"/dev/mapper/{config.name}"

    # -- start and stop -----------------------------------------------------------------------
    async def prepare(self) -> None:
        """Make the era device, or find it alive."""
        answer = (await self._call("build")).header
        self.era_device = str(answer["era_device"])
        self.adopted = bool(answer["adopted"])
        self.current_era = int(answer["current_era"])
        self.mark_s = int(answer["mark_us"]) / 1e6
        self._open_stat("era", self.era_device)

    async def look(self, *, owns: bool) -> list[Segment] | None:
        """The segments in force of a stack that hosts have; None if there is none that works.  They
        stay so if this helper `owns` the stack; the size does in any case."""
        segments = (await self._call("look", {"owns": int(owns)})).header["segments"]
        if segments is None:
            return None
        return [(int(a), int(b), str(kind)) for a, b, kind in segments]

    async def sever(self) -> None:
        """Take the volume from hosts, also from those that have it open: all they ask fails from
        now on.  What was not answered fails, too.  Remove the rest of the stack."""
        self._server = None
        self._close_stats()
        await self._call("sever")

    async def connect(self, server: NbdServer) -> None:
        """Have the kernel's NBD client talk to the server over a socket pair, until `detach`."""
        self._server = server
        try:
            ended = await self._connect(server)
        except HelperError as error:
            self._server = None
            raise self._failure(error) from error
        except BaseException:
            self._server = None
            raise
        self._begin(self._keep_connected(server, ended))

    async def _keep_connected(self, server: NbdServer, ended: asyncio.Event) -> None:
        while True:
            await ended.wait()
            if self._server is not server:
                return
            try:
                ended = await self._connect(server)
            except (BitmapdError, OSError) as error:
                if self._server is not server:
                    return
                message = f"the kernel cannot be connected again; that is tried again: {error}"
                self.emit("gate-error", message=message)
                await asyncio.sleep(RECONNECT_PAUSE_S)

    async def _connect(self, server: NbdServer) -> asyncio.Event:
        """What is set when the connection has ended."""
        ended = asyncio.Event()
        ours, kernels = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            for sock in (ours, kernels):
                for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                    sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)
            kernels.setblocking(False)
            server.adopt(ours, "kernel", ended.set)
            size, flags = await negotiate(self._loop, kernels, server.export_name)
            kernels.setblocking(True)
            if ended.is_set() or self._server is not server:
                raise OSError(errno.ECONNRESET, "the gate's server closed the connection")
            wanted = ExportFlag.HAS_FLAGS | ExportFlag.SEND_FLUSH | ExportFlag.SEND_FUA
            if self._offers_discard():
                wanted |= ExportFlag.SEND_TRIM
            await self._connector.call(
                "connect",
                {
                    "size_bytes": size,
                    "logical_block_bytes": self._logical_block_bytes,
                    "timeout_s": REQUEST_TIMEOUT_S
                    if self._config.node is None
                    else PAIR_REQUEST_TIMEOUT_S,
                    "dead_conn_timeout_s": DEAD_GATE_TIMEOUT_S,
                    "flags": int(wanted) & flags,
                },
                fds=[kernels.fileno()],
            )
        finally:
            kernels.close()
        return ended

    async def attach(self) -> list[Segment]:
        """Bring the tables up, with everything through the gate; hosts can write from here on.

        Returns the segments that are in force, which are older ones if the stack was alive.
        """
        whole = [(0, self._geometry.size_bytes, "gate")]
        answer = (await self._call("attach", {"segments": whole})).header
        self._open_stat("write", f"/dev/mapper/{answer['write_device']}")
        self._open_stat("top", self.device)
        if taken := answer["taken_by_lvm"]:
            self.emit(
                "lvm-error",
                message=f"LVM takes {', '.join(taken)} for the physical volume that is on"
                f" {self.device}: what it writes there passes the record by",
            )
        return [(int(a), int(b), str(kind)) for a, b, kind in answer["segments"]]

    async def close_hosts(self) -> None:
        """Take the volume from the hosts; BusyError while one of them has it open."""
        try:
            await self._wiring.call("close_top")
        except HelperError as error:
            if error.code == "EBUSY":
                raise BusyError(
                    f"{self.device} is in use: {error.strerror}",
                    hint="unmount it, or stop what uses it, first",
                ) from error
            raise self._failure(error) from error

    def stay_disconnected(self) -> None:
        """What the kernel sends from now on waits for another process, or for `connect`."""
        self._server = None

    async def detach(self) -> None:
        """Remove the stack; afterwards nothing of the volume is left in the kernel."""
        self._server = None
        self._connector.close()
        self._close_stats()
        await self._call("detach")

    def close(self) -> None:
        """End the helper.  The stack stays as it is."""
        self._server = None
        self._close_stats()
        self._connector.close()
        self._wiring.close()

    def _close_stats(self) -> None:
        for stat in self._stats.values():
            stat.close()
        self._stats.clear()

    async def _call(
        self, verb: str, fields: dict[str, Any] | None = None, *, fds: Sequence[int] = ()
    ) -> Frame:
        try:
            return await self._wiring.call(verb, fields, fds=fds)
        except HelperError as error:
            raise self._failure(error) from error

    def _failure(self, error: HelperError) -> BitmapdError:
        code = "busy" if error.code == "EBUSY" else error.code
        message = f"cannot attach '{self._config.name}': {error.strerror}"
        return error_from_json({"code": code, "message": message})

    # -- while hosts write --------------------------------------------------------------------
    def _open_stat(self, layer: str, device: str) -> None:
        number = os.stat(device).st_rdev
        if (old := self._stats.pop(layer, None)) is not None:
            old.close()
        self._stats[layer] = BlockStat(f"{os.major(number)}:{os.minor(number)}")

    def _offers_discard(self) -> bool:
        number = os.stat(self.era_device).st_rdev
        queue = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/queue")
        return int((queue / "discard_max_bytes").read_text()) > 0

    def counters(self) -> Counters:
        """Of the era device, which every direct write passes."""
        if "era" not in self._stats:
            return Counters(0, 0)
        fields = self._stats["era"].read()
        return Counters(fields[6] * SECTOR_BYTES, fields[11], self._stats["era"].lapses)

    def host_counters(self) -> HostCounters:
        """What hosts asked for, whatever way it took; zeros before `attach`."""
        if "top" not in self._stats:
            return HostCounters(0, 0, 0, 0)
        written = self._stats["write"].read()
        top = self._stats["top"].read()
        written_bytes = written[6] * SECTOR_BYTES
        return HostCounters(written[4], written_bytes, written[11], top[0], written[8])

    def barrier(
        self, segments: Sequence[Segment] | None, since_era: int, done: BarrierDone
    ) -> None:
        self._begin(self._barrier(segments, since_era, done))

    def swap(self, segments: Sequence[Segment], done: SwapDone) -> None:
        self._begin(self._swap(segments, done))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _barrier(
        self, segments: Sequence[Segment] | None, since_era: int, done: BarrierDone
    ) -> None:
        fields = {
            "segments": segments,
            "since_era": since_era,
            "deadline_s": BARRIER_DEADLINE_S,
            "lapses": self._stats["era"].lapses if "era" in self._stats else 0,
        }
        try:
            frame = await self._wiring.call("barrier", fields)
            landed = Landed(
                unpack_runs(frame.payload),
                int(frame.header["collected_to_era"]),
                float(frame.header["window_s"]),
                bool(frame.header["skipped"]),
                str(frame.header["damage"]),
            )
            self._tell_of_counting(frame.header["counted_again"], str(frame.header["uncounted"]))
        except HelperError as error:
            late = error.code == "ENOBUFS"
            done(PutOffError(errno.ENOBUFS, error.strerror) if late else error, None)
        except (FrameError, KeyError, ValueError, TypeError) as error:
            done(OSError(errno.EPROTO, f"the wiring helper's answer: {error}"), None)
        else:
            done(None, landed)

    async def _swap(self, segments: Sequence[Segment], done: SwapDone) -> None:
        fields = {"segments": segments, "deadline_s": BARRIER_DEADLINE_S}
        try:
            frame = await self._wiring.call("swap", fields)
            window_s = float(frame.header["window_s"])
        except HelperError as error:
            done(error, 0.0)
        except (KeyError, ValueError, TypeError) as error:
            done(OSError(errno.EPROTO, f"the wiring helper's answer: {error}"), 0.0)
        else:
            done(None, window_s)

    def _tell_of_counting(self, restored: Sequence[str], problem: str) -> None:
        """Somebody has the kernel not count: see `media/blockstat`.

        What the helper switched on may have been off since our own reading, which saw nothing.
        """
        if restored and "era" in self._stats:
            self._stats["era"].lapses += 1
        if problem and not self._uncounted:
            self.emit(
                "counters-error",
                message=f"the kernel does not count writes, so every era is taken as written:"
                f" {problem}",
            )
        elif restored and not self._restored:
            self.emit(
                "counters-restored",
                message=f"queue/iostats of {', '.join(restored)} was 0 and is 1 again: without it"
                " direct writes are not seen",
            )
        self._uncounted = bool(problem)
        self._restored = bool(restored)


async def negotiate(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, export: str
) -> tuple[int, int]:
    """The client's part of a handshake, after which the kernel can take the socket over.

    NBD_OPT_EXPORT_NAME, since the kernel knows simple replies only.  Size in bytes and flags.
    """
    name = export.encode()
    handshake = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
    _, options, _ = GREETING.unpack(await _receive_exactly(loop, sock, GREETING.size))
    await loop.sock_sendall(sock, CLIENT_FLAGS.pack(int(handshake)))
    await loop.sock_sendall(sock, OPTION.pack(options, int(Opt.EXPORT_NAME), len(name)) + name)
    size, flags = EXPORT_NAME_REPLY.unpack(
        await _receive_exactly(loop, sock, EXPORT_NAME_REPLY.size)
    )
    return size, flags


async def _receive_exactly(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, length: int
) -> bytes:
    data = b""
    while len(data) < length:
        piece = await loop.sock_recv(sock, length - len(data))
        if not piece:
            raise OSError(errno.ECONNRESET, "the gate's server closed the kernel's connection")
        data += piece
    return data
