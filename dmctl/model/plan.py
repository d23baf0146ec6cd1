"""From the stack that is there to the one that is wanted: the steps in between (pure).

`plan` may be asked again after any step, after a crash in any step, and by another process: it
looks at nothing but what was observed.  It is empty exactly when the goal is reached.

1. First of all, inactive tables are forgotten and suspended layers are resumed, from below: the old
   table is always safe, and a barrier that died must not leave writes waiting.  Such a plan ends
   there; what follows is planned after another look, because a suspended era device is not asked.
2. An era device is never suspended and its table is never replaced: one that is wrong is removed,
   with its RAM, and made anew.  It is always made on new RAM.  Its marks are gone then, which is
   why the caller must treat a new era device as one that knows nothing.
3. What another program made is never touched: a device that has a name of ours and not our UUID is
   refused, a device that has our UUID under another name too.  What somebody has open is refused.
4. Layers are made from below and removed from above.  Discards are limited before anything is
   stacked on the era device, so that every layer above inherits the limit.
5. A crash in the middle of making a device leaves one without a table, or without a node where
   udev does not run: either is made good.
6. A table in force that is right keeps its segments, whatever segments are wanted: who attaches to
   a live stack learns what is in force.
7. A device that is taken from hosts while they have it open (SEVERED) answers with errors.
8. A volume grows in use in two plans: TRACKED with a new era device, for which no segment may be
   direct any more, then ATTACHED, which lengthens the tables above.  None shrinks in use.
"""

from __future__ import annotations

from typing import Final

from bitmapd.errors import BusyError, ExistsError, NotFoundError, WrongStateError
from dmctl.model.names import Layer, device_path
from dmctl.model.stack import (
    Goal,
    Mapped,
    Observed,
    Primary,
    Route,
    Segment,
    Volume,
    Wanted,
    check_nbd,
    check_primary,
    era_table,
    error_table,
    segments_of,
    top_table,
    with_devices,
    write_table,
)
from dmctl.model.steps import (
    NBD,
    RAM,
    Clear,
    ConnectNbd,
    Create,
    DisconnectNbd,
    FreeRam,
    LimitDiscard,
    MakeNode,
    MakeRam,
    Reload,
    Remove,
    Resume,
    Step,
)
from dmctl.model.targets import Table, render, table_bytes

_FROM_ABOVE: Final = (Layer.TOP, Layer.WRITE, Layer.ERA)
_FROM_BELOW: Final = _FROM_ABOVE[::-1]


def plan(observed: Observed, wanted: Wanted) -> list[Step]:
    """See the module docstring; raises what speaks against it."""
    planner = _Planner(observed, wanted.volume)
    planner.awaken()
    if not planner.steps:
        match wanted.goal:
            case Goal.GONE:
                planner.remove_all()
            case Goal.SEVERED:
                planner.sever()
            case Goal.CLOSED:
                planner.remove(Layer.TOP)
            case Goal.TRACKED:
                planner.track()
            case Goal.ATTACHED:
                planner.track()
                planner.route(wanted.segments)
                planner.offer()
            case _:  # AWAKE: that was all
                pass
    return planner.steps


class _Planner:
    """Collects steps; `there` is what will be there after those that it has."""

    def __init__(self, observed: Observed, volume: Volume) -> None:
        self.steps: list[Step] = []
        self._observed = observed
        self._volume = volume
        self._seen = {layer: observed.layer(volume, layer) for layer in Layer}
        self._there = dict(self._seen)
        self._paths = {layer: device_path(volume.device(layer)) for layer in Layer}

    # -- suspended layers ---------------------------------------------------------------------
    def awaken(self) -> None:
        for layer in _FROM_BELOW:
            device = self._there[layer]
            if device is not None:
                if device.inactive:
                    self.steps.append(Clear(device.name))
                if device.suspended:
                    self.steps.append(Resume(device.name))

    # -- removing -----------------------------------------------------------------------------
    def remove(self, layer: Layer) -> None:
        """Nothing of the volume may use it any more; BusyError if something else does."""
        device = self._there[layer]
        if device is None:
            return
        ours = sum(other is not None and other.uses(device) for other in self._seen.values())
        if device.open_count > ours:
            raise BusyError(
                f"{device_path(device.name)} is in use",
                hint=f"unmount it or stop what uses it; 'dmsetup ls --tree' and"
                f" 'fuser -v {device_path(device.name)}' show it",
            )
        table = None  # of an era device that is removed, the marks are out of date at once
        if layer is not Layer.ERA and device.table:
            table = with_devices(device.table, self._names())
        self.steps.append(Remove(device.name, device.uuid, table))
        self._there[layer] = None

    def remove_all(self) -> None:
        self.remove(Layer.TOP)
        self.remove(Layer.WRITE)
        if self._observed.nbd is not None:
            self.steps.append(DisconnectNbd(self._observed.nbd.path))
        self.remove(Layer.ERA)
        self._free_rams()

    def sever(self) -> None:
        """Hosts that have it open lose it.  What the gate has not answered ends first, with an
        error, so that nothing in flight holds up the change of tables."""
        nbd, top = self._observed.nbd, self._there[Layer.TOP]
        if top is None or not top.open_count:
            self.remove_all()
            return
        if nbd is not None:
            self.steps.append(DisconnectNbd(nbd.path))
        if top.table != error_table(top):
            self.steps.append(Reload(top.name, error_table(top), None))
        self.remove(Layer.WRITE)
        self.remove(Layer.ERA)
        self._free_rams()

    def _free_rams(self, but: str | None = None) -> None:
        """All RAM devices, but for the one with this number."""
        self.steps += [FreeRam(ram.path) for ram in self._observed.rams if ram.number != but]

    def _names(self) -> dict[str, str]:
        """Paths of what may be under another number when it is made again."""
        return {
            device.number: self._paths[layer]
            for layer, device in self._seen.items()
            if device is not None
        }

    # -- the era device -----------------------------------------------------------------------
    def track(self) -> None:
        volume, primary = self._volume, self._primary()
        self._check_names()
        check_primary(volume, primary)
        era = self._there[Layer.ERA]
        if era is not None:
            ram = self._ram_of(era, primary)
            if ram is not None:
                self._free_rams(but=ram)
                self._show(era)
                self._limit_discard(era.discard_max_bytes, era.discard_granularity_bytes)
                return
            self._remove_wrong(era, primary)
        ours = {device.number for device in self._observed.devices}
        foreign = [number for number in primary.holders if number not in ours]
        if use := f"part of {', '.join(foreign)}" if foreign else primary.use:
            raise BusyError(
                f"primary {volume.primary} is {use}",
                hint="unmount or detach it first; 'lsblk' shows what uses it",
            )
        self._free_rams()
        self.steps.append(MakeRam(volume.ram_bytes, volume.stamp))
        table = era_table(volume, ram=RAM, primary=volume.primary)
        self._create(Layer.ERA, table)
        self._limit_discard(primary.discard_max_bytes, primary.discard_granularity_bytes)

    def _primary(self) -> Primary:
        if self._observed.primary is None:
            raise NotFoundError(
                f"primary {self._volume.primary} is not there, or is no block device"
            )
        return self._observed.primary

    def _ram_of(self, era: Mapped, primary: Primary) -> str | None:
        """Number of the RAM device of an era device that is right."""
        for ram in self._observed.rams:
            if era.table == era_table(self._volume, ram=ram.number, primary=primary.number):
                return ram.number
        return None

    def _remove_wrong(self, era: Mapped, primary: Primary) -> None:
        try:
            if era.open_count:
                self.remove(Layer.TOP)
                self.remove(Layer.WRITE)
            self.remove(Layer.ERA)
        except BusyError as error:
            right = era_table(self._volume, ram="RAM", primary=primary.number)
            has = f"has the table '{render(era.table)}'" if era.table else "has no table"
            raise BusyError(
                f"{device_path(era.name)} {has}, '{render(right)}' is needed,"
                f" and it cannot be made anew: {error.message}",
                error.hint,
            ) from error

    def _limit_discard(self, max_bytes: int, granularity_bytes: int) -> None:
        """A discard of at most a block touches two blocks at most, and dm-era marks the first."""
        limit = self._volume.block_bytes
        if limit % max(granularity_bytes, 1):
            limit = 0  # pieces of a block cannot be had
        if max_bytes > limit:
            name = self._volume.device(Layer.ERA)
            self.steps.append(LimitDiscard(name, limit, max_bytes))

    # -- routes and the device of the hosts -----------------------------------------------------
    def route(self, wanted: tuple[Segment, ...]) -> None:
        volume, nbd = self._volume, self._observed.nbd
        if nbd is None:
            self.steps.append(ConnectNbd(volume.uuid))
        else:
            check_nbd(volume, nbd)
        write, era = self._there[Layer.WRITE], self._there[Layer.ERA]
        if write is not None:
            in_force = segments_of(
                write.lines,
                era=era.number if era is not None else "",
                nbd=nbd.number if nbd is not None else "",
            )
            if self._check_size(write) == volume.size_bytes and in_force is not None:
                self._show(write)
                return
        table = write_table(
            volume,
            wanted or ((0, volume.size_bytes, Route.GATE.value),),
            era=self._paths[Layer.ERA],
            nbd=nbd.path if nbd is not None else NBD,
        )
        self._put(Layer.WRITE, write, table)

    def offer(self) -> None:
        volume, primary = self._volume, self._primary()
        write, top = self._there[Layer.WRITE], self._there[Layer.TOP]
        if top is not None and write is not None:
            self._check_size(top)
            if top.table == top_table(volume, primary=primary.number, write=write.number):
                self._show(top)
                return
        table = top_table(volume, primary=volume.primary, write=self._paths[Layer.WRITE])
        self._put(Layer.TOP, top, table)

    def _check_size(self, device: Mapped) -> int:
        end = table_bytes(device.lines)
        if end > self._volume.size_bytes:
            raise WrongStateError(
                f"{device_path(device.name)} has {end} bytes, volume '{self._volume.name}' has"
                f" {self._volume.size_bytes}: a volume in use cannot shrink",
                hint="stop the volume first",
            )
        return end

    def _put(self, layer: Layer, device: Mapped | None, table: Table) -> None:
        if device is None:
            self._create(layer, table)
        else:
            before = with_devices(device.lines, self._names())
            self.steps.append(Reload(device.name, table, before))
            self._show(device)

    def _show(self, device: Mapped) -> None:
        if not device.has_node:
            self.steps.append(MakeNode(device.name))

    def _create(self, layer: Layer, table: Table) -> None:
        volume = self._volume
        self.steps.append(Create(volume.device(layer), volume.device_uuid(layer), table))

    # -- what is not ours -----------------------------------------------------------------------
    def _check_names(self) -> None:
        names = {self._volume.device(layer): self._volume.device_uuid(layer) for layer in Layer}
        uuids = {uuid: name for name, uuid in names.items()}
        for device in self._observed.devices:
            path = device_path(device.name)
            if device.uuid in uuids:
                if device.name != uuids[device.uuid]:
                    raise WrongStateError(
                        f"{path} belongs to volume '{self._volume.name}' under another name",
                        hint=f"dmsetup rename {device.name} {uuids[device.uuid]}",
                    )
            elif device.name in names:
                raise ExistsError(
                    f"{path} exists and does not belong to volume '{self._volume.name}' (its UUID"
                    f" is '{device.uuid}')",
                    hint=f"remove or rename it: dmsetup rename {device.name} NEWNAME",
                )
