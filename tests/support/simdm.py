"""A simulated kernel: mapped devices, RAM devices and the NBD client, one effect at a time.

`SimDm` is an `Actor`.  Each effect first spends one unit of `life`: when that is used up the
process "dies" (`Died`) or the kernel refuses (`OSError`), whichever `fault` says.  What must never
be asked of a kernel raises `Violation`: touching what is not ours, a second table for an era
device, an era device on RAM that was used before, something stacked on an era device before
discards are limited.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field, replace

from dmctl.model.names import MAPPER_DIR, Layer, device_path, parse_layer_uuid
from dmctl.model.stack import Mapped, Nbd, Observed, Primary, Ram, Volume, with_devices
from dmctl.model.targets import Delay, Era, Linear, Table, parse, render

MIB = 1 << 20


class Died(BaseException):
    """The process ended here."""


class Violation(Exception):
    """Something was done that must never be done."""


@dataclass
class SimDevice:
    name: str
    uuid: str
    number: str
    table: Table | None = None
    inactive: Table | None = None
    suspended: bool = False
    opens: int = 0
    has_node: bool = False
    discard_max_bytes: int = 0

    @property
    def layer(self) -> Layer | None:
        parsed = parse_layer_uuid(self.uuid)
        return parsed[1] if parsed else None


@dataclass
class SimRam:
    number: str
    size_bytes: int = 0
    stamp: str = ""
    used: bool = False


@dataclass
class SimDm:
    volume: Volume
    primary: Primary
    devices: dict[str, SimDevice] = field(default_factory=dict)
    rams: dict[str, SimRam] = field(default_factory=dict)
    nbd: Nbd | None = None
    life: int | None = None
    fault: str = "die"
    minors: int = 0
    effects: int = 0

    # -- faults -------------------------------------------------------------------------------
    def _effect(self) -> None:
        self.effects += 1
        if self.life is None:
            return
        if self.life == 0:
            self.life = None
            if self.fault == "die":
                raise Died
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        self.life -= 1

    # -- what there is ------------------------------------------------------------------------
    def open_count(self, device: SimDevice) -> int:
        users = 0
        for other in self.devices.values():
            tables = [table for table in (other.table, other.inactive) if table]
            users += any(device.number in used(table) for table in tables)
        return device.opens + users

    def state(self) -> object:
        """What can be told apart, but for numbers and for RAM that nobody can find."""
        paths = {device.number: device_path(name) for name, device in self.devices.items()}
        paths |= {ram.number: "RAM" for ram in self.rams.values()}
        return (
            {
                name: (
                    device.uuid,
                    render(with_devices(device.table or (), paths)),
                    bool(device.inactive),
                    device.suspended,
                    device.opens,
                    device.has_node,
                    device.discard_max_bytes,
                )
                for name, device in self.devices.items()
            },
            sorted(ram.stamp for ram in self.rams.values() if ram.stamp),
            self.nbd,
        )

    def observe(self) -> Observed:
        names = {self.volume.device(layer) for layer in Layer}
        seen = []
        for device in self.devices.values():
            parsed = parse_layer_uuid(device.uuid)
            ours = parsed is not None and parsed[0] == self.volume.uuid
            if ours or device.name in names:
                seen.append(
                    Mapped(
                        name=device.name,
                        uuid=device.uuid,
                        number=device.number,
                        open_count=self.open_count(device),
                        suspended=device.suspended,
                        inactive=device.inactive is not None,
                        # As text and back: what the kernel shows, not what it was given.
                        table=parse(render(device.table))
                        if ours and device.table and not device.suspended
                        else None,
                        has_node=device.has_node,
                        discard_max_bytes=device.discard_max_bytes,
                        discard_granularity_bytes=self.primary.discard_granularity_bytes,
                    )
                )
        metadata = {
            line.target.metadata
            for device in seen
            for line in device.lines
            if isinstance(line.target, Era)
        }
        holders = tuple(
            device.number
            for device in self.devices.values()
            if self.primary.number in used(device.table or ())
        )
        return Observed(
            primary=replace(self.primary, holders=holders),
            devices=tuple(seen),
            nbd=self.nbd,
            rams=tuple(
                Ram(path, ram.number)
                for path, ram in self.rams.items()
                if ram.stamp == self.volume.stamp or ram.number in metadata
            ),
        )

    def number_of(self, word: str) -> str:
        if word.startswith(MAPPER_DIR):
            name = word.removeprefix(MAPPER_DIR)
            if name in self.devices and self.devices[name].has_node:
                return self.devices[name].number
        elif word == self.primary.path:
            return self.primary.number
        elif word in self.rams:
            return self.rams[word].number
        elif self.nbd is not None and word == self.nbd.path:
            return self.nbd.number
        elif word[0].isdigit():
            return word
        raise OSError(errno.ENOENT, f"no device {word}")

    def add(self, name: str, uuid: str) -> SimDevice:
        self.minors += 1
        self.devices[name] = SimDevice(name, uuid, f"253:{self.minors}")
        return self.devices[name]

    # -- Actor --------------------------------------------------------------------------------
    def make_ram(self, size_bytes: int, stamp: str) -> str:
        self._effect()
        self.minors += 1
        path = f"/dev/zram{self.minors}"
        ram = self.rams[path] = SimRam(f"252:{self.minors}")
        try:
            self._effect()
            ram.size_bytes = size_bytes
            self._effect()
        except OSError:
            del self.rams[path]
            raise
        ram.stamp = stamp
        return path

    def free_ram(self, device: str) -> None:
        self._effect()
        ram = self.rams.get(device)
        if ram is None:
            return
        if ram.stamp != self.volume.stamp:
            raise Violation(f"{device} is not of the volume")
        if any(ram.number in used(other.table or ()) for other in self.devices.values()):
            raise OSError(errno.EBUSY, "in use")
        del self.rams[device]

    def disconnect_nbd(self, device: str) -> None:
        self._effect()
        if self.nbd is None or self.nbd.path != device:
            raise Violation(f"{device} is not of the volume")
        top = self.devices.get(self.volume.device(Layer.TOP))
        in_use = any(self.nbd.number in used(other.table or ()) for other in self.devices.values())
        if in_use and not (top is not None and top.opens):
            raise Violation("the gate is taken from under a table")
        self.nbd = None

    def create(self, name: str, uuid: str, table: Table) -> None:
        self._effect()
        if name in self.devices or any(device.uuid == uuid for device in self.devices.values()):
            raise OSError(errno.EBUSY, "exists")
        device = self.add(name, uuid)
        try:
            self._effect()
            self._load(device, table)
            self._effect()
            self._swap(device)
            if device.layer is Layer.ERA:
                device.discard_max_bytes = self.primary.discard_max_bytes
            self._effect()
            device.has_node = True
        except OSError:
            del self.devices[name]
            raise

    def remove(self, name: str) -> None:
        self._effect()
        device = self._ours(name)
        if self.open_count(device):
            raise OSError(errno.EBUSY, "in use")
        del self.devices[name]

    def reload(self, name: str, table: Table) -> None:
        self._effect()
        device = self._ours(name)
        if device.layer is Layer.ERA:
            raise Violation("a second table for an era device")
        self._load(device, table)
        try:
            self._effect()
        except OSError:
            device.inactive = None
            raise
        self._swap(device)

    def clear(self, name: str) -> None:
        self._effect()
        self._ours(name).inactive = None

    def resume(self, name: str) -> None:
        self._effect()
        device = self._ours(name)
        device.suspended = False
        if device.inactive:
            self._swap(device)

    def make_node(self, name: str) -> None:
        self._effect()
        self._ours(name).has_node = True

    def limit_discard(self, name: str, limit_bytes: int) -> None:
        self._effect()
        self._ours(name).discard_max_bytes = limit_bytes

    # -- inside -------------------------------------------------------------------------------
    def _ours(self, name: str) -> SimDevice:
        if name not in self.devices:
            raise OSError(errno.ENXIO, "No such device or address")
        device = self.devices[name]
        parsed = parse_layer_uuid(device.uuid)
        if parsed is None or parsed[0] != self.volume.uuid:
            raise Violation(f"{name} is not of the volume")
        return device

    def _load(self, device: SimDevice, table: Table) -> None:
        numbers = {word: self.number_of(word) for word in used(table)}
        for line in table:
            if isinstance(line.target, Era):
                ram = self.rams.get(line.target.metadata)
                if ram is None or ram.used or ram.stamp != self.volume.stamp:
                    raise Violation("an era device on RAM that is not new")
                if ram.size_bytes != self.volume.ram_bytes:
                    raise Violation("an era device on RAM of another size")
                ram.used = True
            elif isinstance(line.target, Linear):
                self._check_limit()
        device.inactive = with_devices(table, numbers)

    def _check_limit(self) -> None:
        era = self.devices.get(self.volume.device(Layer.ERA))
        if era is not None and era.discard_max_bytes > self.volume.block_bytes:
            raise Violation("discards are not limited")

    def _swap(self, device: SimDevice) -> None:
        if device.layer is Layer.ERA and device.table:
            raise Violation("a second table for an era device")
        device.table, device.inactive = device.inactive, None


def used(table: Table) -> set[str]:
    words: set[str] = set()
    for line in table:
        match line.target:
            case Linear(device, _):
                words.add(device)
            case Era(metadata, origin, _):
                words |= {metadata, origin}
            case Delay(reads, writes, flushes):
                words |= {reads.device, writes.device, flushes.device}
    return words
