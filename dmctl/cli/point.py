"""point: cut a volume with a receiver now."""

from __future__ import annotations

from argparse import Namespace

from dmctl.cli.context import Context
from dmctl.cli.copying import ask

POINT_TIMEOUT_S = 600.0  # for a point that is under way, and then for what this one has to read


def point(context: Context, args: Namespace) -> int:
    name, output = args.name, context.output
    words = {"label": args.label or "", "wait": args.wait}
    answer = ask(context, name, "point", words, POINT_TIMEOUT_S)
    if output.as_json:
        output.json("point", {"name": name, **answer})
        return 0
    done = "the receiver has it" if answer["committed"] else "it is on its way to the receiver"
    label = f" ({answer['label']})" if answer["label"] else ""
    output.say(f"volume '{name}': point {answer['point']}{label} is cut; {done}")
    return 0
