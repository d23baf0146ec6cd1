"""test-failover: look at a point of a receiver while it goes on."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

from bitmapd.errors import UsageError
from bitmapd.net.uri import NbdUri
from bitmapd.units import human_size
from dmctl.cli.context import Context
from dmctl.cli.points import receiver_of

WHOLE_TIMEOUT_S = 600.0  # a point that is being applied is waited for


def test_failover(context: Context, args: Namespace) -> int:
    name, output = args.name, context.output
    config = receiver_of(context, name)
    if args.end:
        others = (args.listen, args.view_limit, args.point, args.overlay)
        if any(value is not None for value in others):
            raise UsageError("--end goes with no other option")
        ended = _ask(context, name, {"end": True})["ended"]
        if output.as_json:
            output.json("test-failover", {"name": name, "view": None, "ended": ended})
        elif ended:
            output.say(f"the view of '{name}' is closed, and what was written to it is gone")
        else:
            output.say(f"no point of '{name}' was being looked at")
        return 0
    socket = str(context.paths.run_dir / f"{name}.view")
    listen = args.listen or str(NbdUri(tls=False, export=name, socket_path=socket))
    words = {
        "listen": listen,
        "limit_bytes": args.view_limit or config.view_limit_bytes,
        "point": args.point,
        "overlay": None if args.overlay is None else os.path.abspath(args.overlay),
    }
    view = _ask(context, name, words)
    if output.as_json:
        output.json("test-failover", {"name": name, "view": view})
        return 0
    of = f"point {view['point']} of {view['at']}" if view["at"] else f"point {view['point']}"
    output.say(f"{of} of '{name}' can be looked at: {view['device']}")
    output.say(
        f"what is written there is thrown away; it ends with 'dmctl test-failover {name} --end', or"
        f" when {human_size(view['limit_bytes'])} do not suffice for what changes there and here"
    )
    return 0


def _ask(context: Context, name: str, words: dict[str, Any]) -> dict[str, Any]:
    with context.control(name) as client:
        answer: dict[str, Any] = client.call("test-failover", words, within_s=WHOLE_TIMEOUT_S)
        return answer
