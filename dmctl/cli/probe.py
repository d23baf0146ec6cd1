"""probe, udev-rules: what udev asks, and what it gets."""

from __future__ import annotations

import re
from argparse import Namespace
from uuid import UUID

from bitmapd.config import ReceiverConfig, VolumeConfig, load_volume, volume_names
from bitmapd.errors import BitmapdError, NotFoundError, WrongStateError
from bitmapd.record import tool
from bitmapd.record.layout import record_size_bytes
from dmctl.cli.context import Context
from dmctl.kernel import systemd

_SAFE = re.compile(r"[A-Za-z0-9_.:+-]*", re.ASCII)


def probe(context: Context, args: Namespace) -> int:
    superblock = tool.probe(args.device)
    if superblock is None:
        raise NotFoundError(f"{args.device}: there is no record here")
    values = {
        "type": "record",
        "format": superblock.version,
        "volume_uuid": str(superblock.volume_uuid),
        "volume_name": superblock.name,
        "clean": superblock.clean,
        "session": superblock.session,
        "size_bytes": superblock.geometry.size_bytes,
        "record_size_bytes": record_size_bytes(superblock.geometry.extents),
    }
    if args.export:
        owner = _configured(context, superblock.volume_uuid)
        if owner is not None:
            # The name that this host has given the volume, which is to be trusted.
            values |= {"volume": owner.name, "role": "record", "assemble": owner.start_at_boot}
        for key, value in values.items():
            text = str(int(value)) if isinstance(value, bool) else str(value)
            # A superblock may come from anywhere; udev and shells see harmless characters only.
            if _SAFE.fullmatch(text):
                context.output.line(f"DMCTL_{key.upper()}={text}")
    elif context.output.as_json:
        context.output.json("probe", {"device": args.device, **values})
    else:
        state = "clean" if superblock.clean else "not clean"
        context.output.line(
            f"{args.device}: record of volume '{superblock.name}' (uuid {superblock.volume_uuid}),"
            f" {state}"
        )
    return 0


def _configured(context: Context, uuid: UUID) -> VolumeConfig | None:
    """This host's volume of that identity; one whose configuration has errors is none."""
    for name in volume_names(context.paths):
        try:
            config = load_volume(context.paths, name)
        except BitmapdError:
            continue
        if config.uuid == uuid:
            return config
    return None


def udev_rules(context: Context, args: Namespace) -> int:
    output = context.output
    if args.print:
        text, problems = systemd.rules(context.paths)
        if output.as_json:
            output.json("udev-rules", {"rules": text, "written": []})
        else:
            output.text(text)
    else:
        if not systemd.is_host(context.paths):
            raise WrongStateError(
                f"udev and systemd know the volumes in {systemd.ETC / 'dmctl'} only, not those in"
                f" {context.paths.config_dir}",
                hint="--print shows the rules",
            )
        outcome = systemd.update(context.paths)
        problems = outcome.problems
        written = [str(path) for path in outcome.written]
        if output.as_json:
            output.json("udev-rules", {"written": written})
        for path in written:
            output.say(f"written: {path}")
        if not written:
            output.say("everything is up to date")
    for problem in problems:
        output.say(f"note: {problem.message}" + (f" ({problem.hint})" if problem.hint else ""))
    return 0


def keep_rules(context: Context, former: VolumeConfig | ReceiverConfig | None = None) -> None:
    """After a volume or receiver was made, removed or turned into the other, with what it was
    before: update the rules; what fails is a note."""
    media = [] if former is None else systemd.media_of(former)
    try:
        problems = systemd.update(context.paths, [medium.path for medium in media]).problems
    except OSError as error:
        problems = [
            BitmapdError(f"udev's rules were not brought up to date: {error}", "dmctl udev-rules")
        ]
    for problem in problems:
        context.output.say(f"note: {problem.message}")
