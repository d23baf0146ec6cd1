"""plan: what the kernel has of a volume, and the commands from there to what is wanted.

Nothing is changed.  The commands are those of the wiring helper, which asks the same planner.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any
from uuid import UUID

from bitmapd.attach.choose import resolved
from bitmapd.config import VolumeConfig, load_volume
from bitmapd.errors import BitmapdError, NotFoundError, PermissionError_, WrongStateError, explain
from bitmapd.record import tool
from bitmapd.record.geometry import Geometry
from dmctl.cli.context import Context
from dmctl.kernel.dm_ioctl import CONTROL, DeviceMapper
from dmctl.kernel.observe import observe, primary_facts
from dmctl.model.plan import plan
from dmctl.model.stack import Goal, Mapped, Observed, Volume, Wanted
from dmctl.model.steps import Step
from dmctl.model.targets import render_line


def volume_of(config: VolumeConfig, geometry: Geometry) -> Volume:
    """NotFoundError if the primary is no block device that is there."""
    primary = str(Path(config.primary).resolve())
    facts = primary_facts(primary)
    if facts is None:
        raise NotFoundError(f"primary {config.primary} is not there, or is no block device")
    return Volume(
        name=config.name,
        uuid=config.uuid.hex,
        primary=primary,
        size_bytes=geometry.size_bytes,
        logical_block_bytes=facts.logical_block_bytes,
        block_bytes=geometry.block_bytes,
    )


def build_commands(config: VolumeConfig, geometry: Geometry) -> list[str]:
    """What brings a volume up of which nothing is there yet."""
    volume = volume_of(config, geometry)
    observed = Observed(primary=primary_facts(volume.primary))
    return [step.command for step in plan(observed, Wanted(volume, Goal.ATTACHED))]


def show(context: Context, args: Namespace) -> int:
    config = resolved(load_volume(context.paths, args.name))
    if config.attach != "dm":
        raise WrongStateError(
            f"volume '{config.name}' is attached over NBD: the kernel has no tables of it",
            hint=f"hosts use {config.listen}",
        )
    volume = volume_of(config, _geometry(config))
    observed = _observed(volume)
    goal = Goal.GONE if args.remove else Goal.ATTACHED
    steps = plan(observed, Wanted(volume, goal))
    if context.output.as_json:
        context.output.json("plan", _body(volume, observed, goal, steps))
        return 0
    for line in plan_text(observed, goal, steps):
        context.output.line(line)
    return 0


def refuse_layers(config: VolumeConfig, geometry: Geometry) -> None:
    """WrongStateError if the kernel goes on with a volume whose process has died."""
    if config.attach == "dm" and _observed(volume_of(config, geometry)).devices:
        raise WrongStateError(
            f"the kernel has layers of volume '{config.name}', for hosts that wait there",
            hint=f"have them close the device, then run what 'dmctl plan {config.name} --remove'"
            " prints",
        )


def plan_text(observed: Observed, goal: Goal, steps: list[Step]) -> list[str]:
    """A script for a shell; what is there stands in its comments."""
    lines = ["# there is:"]
    for device in observed.devices:
        lines += [f"#   {text}" for text in _described(device)]
    if observed.nbd is not None:
        lines.append(f"#   {observed.nbd.path}: connected to bitmapd")
    lines += [f"#   {ram.path}: metadata of the era device" for ram in observed.rams]
    if len(lines) == 1:
        lines = ["# nothing of the volume is there"]
    if not steps:
        lines.append("# nothing is left to do")
    elif goal is Goal.GONE:
        lines.append("# to remove it:")
    else:
        lines.append("# to attach it ('dmctl start' does it):")
    lines += [line for step in steps for line in step.command.splitlines()]
    return lines


def _described(device: Mapped) -> list[str]:
    notes = [f"open {device.open_count}"]
    if device.suspended:
        notes.append("suspended")
    if device.inactive:
        notes.append("with a table that is not in force")
    head = f"{device.name} ({device.number}, {', '.join(notes)})"
    return [head, *(f"  {render_line(line)}" for line in device.lines)]


def _geometry(config: VolumeConfig) -> Geometry:
    superblock = tool.probe(config.record)
    if superblock is None:
        raise NotFoundError(f"there is no record on {config.record}, which has the volume's size")
    if superblock.volume_uuid != config.uuid:
        raise WrongStateError(
            f"record {config.record} belongs to another volume (uuid {superblock.volume_uuid})"
        )
    return superblock.geometry


def _observed(volume: Volume) -> Observed:
    if not Path(CONTROL).exists():
        return observe(volume, None)
    try:
        mapper = DeviceMapper()
    except PermissionError as error:
        raise PermissionError_(
            "only root can see the kernel's tables", hint="run it with sudo"
        ) from error
    try:
        return observe(volume, mapper)
    except BitmapdError:
        raise
    except OSError as error:
        raise explain(error) from error
    finally:
        mapper.close()


def _body(volume: Volume, observed: Observed, goal: Goal, steps: list[Step]) -> dict[str, Any]:
    return {
        "volume": volume.name,
        "uuid": str(UUID(volume.uuid)),
        "goal": goal.value,
        "devices": [
            {
                "name": device.name,
                "uuid": device.uuid,
                "number": device.number,
                "open_count": device.open_count,
                "suspended": device.suspended,
                "table": [render_line(line) for line in device.lines],
            }
            for device in observed.devices
        ],
        "nbd": observed.nbd.path if observed.nbd is not None else None,
        "ram": [ram.path for ram in observed.rams],
        "commands": [step.command for step in steps],
    }
