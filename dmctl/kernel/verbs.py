"""What the wiring helper does for each request; its invariants are those of `helper`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from bitmapd.attach.helper_frames import pack_runs
from bitmapd.errors import BusyError, UsageError, WrongStateError
from bitmapd.media.blockstat import BlockStat
from dmctl.kernel.barrier import Barrier, MetadataFile, counters
from dmctl.kernel.dm_ioctl import DeviceMapper
from dmctl.kernel.dm_wire import Target
from dmctl.kernel.execute import Dmsetup
from dmctl.kernel.lock import LOCK_PATIENCE_S, LOCK_TIMEOUT_S, lock
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

RECONNECT_TIMEOUT_S: Final = 20.0
# Where an era device is found alive, and so no self-test was made: what a mark may cost.
DEFAULT_MARK_S: Final = 0.0002
# A discard may be that long above the era device, which cuts it: few requests for the gate, and a
# barrier waits for no more than this.
DISCARD_BYTES: Final = 32 << 20
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
            "swap": self.swap,
            "stat": self.stat,
            "close_top": self.close_top,
            "detach": self.detach,
            "look": self.look,
            "sever": self.sever,
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
        made, served, mark_s = False, False, DEFAULT_MARK_S
        if not self.owns():
            seen = observe(self._volume, self._mapper)
            served = seen.layer(self._volume, Layer.TOP) is not None
        if not served:
            self.own()
            seen = self._reach(Goal.AWAKE)
            steps = plan(seen, Wanted(self._volume, Goal.TRACKED))
            made = any(isinstance(step, Create) for step in steps)
            if made:
                mark_s = selftest(self._mapper, self._actor)
        era = self._layer(seen if served else self._reach(Goal.TRACKED), Layer.ERA)
        self._have_counted(Layer.ERA, era)
        answer = {
            "era_device": device_path(era.name),
            # A volume that grows gets a new era device under hosts that go on.
            "adopted": not made or seen.layer(self._volume, Layer.TOP) is not None,
            "current_era": self._barrier_of(era).status().current_era,
            "mark_us": round(1e6 * mark_s),
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
        for layer in (Layer.WRITE, Layer.TOP):
            self._pass_discards(layer)
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
        table: Sequence[Target] | None = None
        if self._barrier is None or segments is not None:
            barrier, table = self._barrier_and_table(segments)
        else:
            barrier = self._barrier
        self._lapses = request.number("lapses")
        restored, uncounted = self._count_on()
        collected = barrier(table, since_era, deadline_s)
        if table is not None:
            self._pass_discards(Layer.WRITE)
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

    def swap(self, request: Request) -> Answer:
        """A table that has all that is direct in the one in force; no era ends."""
        self.own()
        barrier, table = self._barrier_and_table(request.segments())
        if table is None:
            raise UsageError("a swap without a table")
        window_s = barrier.swap(table, request.seconds("deadline_s"))
        self._pass_discards(Layer.WRITE)
        return {"window_s": window_s}, b""

    def _barrier_and_table(
        self, segments: tuple[Segment, ...] | None
    ) -> tuple[Barrier, Sequence[Target] | None]:
        seen = observe(self._volume, self._mapper)
        era = self._layer(seen, Layer.ERA)
        self._layer(seen, Layer.WRITE)
        barrier = self._barrier_of(era)
        if segments is None:
            return barrier, None
        nbd = self._nbd_number(seen)
        return barrier, wired(write_table(self._volume, segments, era=era.number, nbd=nbd))

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

    def look(self, request: Request) -> Answer:
        """The segments in force, if hosts have the volume; None otherwise.  Without `owns` perhaps
        not for long: another helper may be about to change them."""
        if request.number("owns"):
            self.own()
        else:
            self.owns()
        seen = observe(self._volume, self._mapper)
        layers = [seen.layer(self._volume, layer) for layer in (Layer.TOP, Layer.WRITE, Layer.ERA)]
        top, write, era = layers
        segments = None
        if top is not None and write is not None and top.uses(write):
            # Without an era device while a volume grows, when nothing is direct.
            era_number = era.number if era is not None else ""
            segments = segments_of(write.lines, era=era_number, nbd=self._nbd_number(seen))
        return {"segments": segments or None}, b""

    def sever(self, request: Request) -> Answer:
        del request
        self.own()
        self._forget()
        self._reach(Goal.SEVERED)
        return {}, b""

    def _pass_discards(self, layer: Layer) -> None:
        """In long pieces, if at all.

        Before 6.9, a table takes the limit of the era device below it when it comes in force
        (`blk_stack_limits`), and discards would reach the gate in pieces of one block.
        """
        name = self._volume.device(layer)
        device = self._mapper.device(name)
        if device is not None and queue_number(device.number, "discard_max_bytes"):
            self._actor.limit_discard(name, DISCARD_BYTES)

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
