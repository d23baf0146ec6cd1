"""points: what a receiver can produce."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from bitmapd.config import ReceiverConfig, load_any
from bitmapd.errors import WrongStateError, printable
from bitmapd.units import human_size
from dmctl.cli.context import Context
from dmctl.cli.copying import ask


def receiver_of(context: Context, name: str) -> ReceiverConfig:
    """WrongStateError if it is a volume."""
    config = load_any(context.paths, name)
    if not isinstance(config, ReceiverConfig):
        raise WrongStateError(f"'{name}' is a volume; its receiver, if it has one, has the points")
    return config


def points(context: Context, args: Namespace) -> int:
    """What the receiver can produce; of one that does not run from its journal."""
    name, output = args.name, context.output
    config = receiver_of(context, name)
    if args.drop is not None:
        ask(context, name, "drop-point", {"point": args.drop})
        if output.as_json:
            output.json("points", {"name": name, "dropped": args.drop})
        else:
            output.say(f"receiver '{name}' does without point {args.drop} now")
        return 0
    found = _points(context, config)
    if output.as_json:
        output.json("points", {"name": name, "points": found})
        return 0
    if not found:
        output.say(f"receiver '{name}' has no point yet")
        return 0
    rows = [
        [
            str(point["point"]),
            point["at"] or "-",
            "-" if point["bytes"] is None else human_size(point["bytes"]),
            point["state"] if point["state"] == "kept" or not point["kept"] else "applied, kept",
            printable(point["label"]) or "-",
        ]
        for point in found
    ]
    output.table(["POINT", "CUT AT", "SIZE", "STATE", "LABEL"], rows)
    return 0


def _points(context: Context, config: ReceiverConfig) -> list[dict[str, Any]]:
    try:
        return list(context.ask(config.name, "points")["points"])
    except WrongStateError:
        from bitmapd.receiver.format import (  # noqa: PLC0415  (a receiver that runs says it)
            examine_directory,
            examine_journal,
        )
        from bitmapd.volume.receiver_status import points as points_of  # noqa: PLC0415

        _, page = examine_journal(config.journal)
        return points_of(page, examine_directory(config.journal), {})
