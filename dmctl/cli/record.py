"""record dump, check, repair; wiping a record."""

from __future__ import annotations

import json
import mmap
import os
import time
from argparse import Namespace

from bitmapd.config import VolumeConfig
from bitmapd.errors import BitmapdError, ExistsError, ForeignRecordError, explain
from bitmapd.record import tool
from bitmapd.record.layout import SUPERBLOCK_BYTES, SUPERBLOCK_OFFSETS
from bitmapd.units import human_size
from dmctl.cli.context import Context


def dump(context: Context, args: Namespace) -> int:
    loaded = tool.load(args.device)
    content = tool.dump(loaded)
    if args.output is not None:
        _write_new(args.output, json.dumps(content, indent=1) + "\n")
        context.output.say(f"written to {args.output}")
    if context.output.as_json:
        context.output.json("record dump", {"device": args.device, **content})
        return 0
    if args.output is not None:
        return 0
    out = context.output
    for key, value in content["superblock"].items():
        out.line(f"{key:<24} {json.dumps(value) if isinstance(value, list | dict) else value}")
    extents = content["extents"]
    size = human_size(extents["recorded_bytes"])
    out.line(f"{'extents':<24} {extents['recorded']} of {extents['total']} ({size})")
    for first, count in extents["runs"]:
        out.line(f"  {first} +{count}")
    for page in content["pages"]:
        if page["message"]:
            out.line(f"page {page['index']}: {page['message']}")
    for text in [*content["warnings"], *content["notes"]]:
        out.line(text)
    return 0


def _write_new(path: str, text: str) -> None:
    """A file that was not there; one that cannot be written whole is taken away again."""
    try:
        stream = open(path, "x", encoding="utf-8")  # noqa: SIM115  (not to be unlinked if it fails)
    except FileExistsError:
        raise ExistsError(f"{path} exists", hint="name a new file") from None
    try:
        with stream:
            stream.write(text)
    except OSError as error:
        os.unlink(path)
        raise explain(error, path) from error


def check(context: Context, args: Namespace) -> int:
    report = tool.check(args.device)
    if context.output.as_json:
        context.output.json("record check", {"device": args.device, **report.to_json()})
    else:
        for finding in report.findings:
            context.output.line(f"{finding.severity.value}: {finding.message}")
        if report.exit_status == 0:
            context.output.say(f"{args.device}: the record is sound")
    return report.exit_status


def repair(context: Context, args: Namespace) -> int:
    loaded = tool.repair(args.device, args.output, int(time.time()))
    context.output.say(
        f"a healed copy of the record of volume '{loaded.superblock.name}' is in {args.output};"
        f" damaged pages: {len(loaded.damaged)}"
    )
    if context.output.as_json:
        body = {
            "device": args.device,
            "output": args.output,
            "damaged_pages": list(loaded.damaged),
            "recorded_extents": loaded.bits.count(),
        }
        context.output.json("record repair", body)
    return 0


def recorded_extents(config: VolumeConfig) -> int | None:
    """How many extents a stopped volume's record names; None if it cannot be read."""
    try:
        return int(tool.load(config.record).bits.count())
    except BitmapdError:
        return None


def wipe(config: VolumeConfig) -> None:
    """Take the superblocks off the record of this volume, and of no other."""
    with tool.RecordMedium.open(config.record) as medium:
        medium.lock()
        found = tool.probe(medium)
        if found is not None and found.volume_uuid != config.uuid:
            raise ForeignRecordError(
                f"{config.record} holds the record of volume '{found.name}'"
                f" (uuid {found.volume_uuid}); it was not wiped",
                hint="remove the volume without --wipe-record",
            )
        nothing = memoryview(mmap.mmap(-1, SUPERBLOCK_BYTES))
        for offset_bytes in SUPERBLOCK_OFFSETS:
            medium.write(offset_bytes, nothing, os.RWF_DSYNC)
