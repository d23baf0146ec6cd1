"""events: the logs of one or of all running volumes, as JSON lines; what events mean."""

from __future__ import annotations

import dataclasses
import selectors
import textwrap
from argparse import Namespace
from contextlib import ExitStack
from typing import Any

from bitmapd.config import load_volume, volume_names
from bitmapd.control.catalogue import EVENTS
from bitmapd.control.client import ControlClient
from bitmapd.control.protocol import Event, Failure
from bitmapd.errors import UsageError, WrongStateError
from dmctl.cli.context import Context


def events(context: Context, args: Namespace) -> int:
    if args.explain:
        return _explain(context)
    if args.name is not None:
        load_volume(context.paths, args.name)
        names = [args.name]
    else:
        names = volume_names(context.paths)
    with ExitStack() as stack:
        clients: list[ControlClient] = []
        for name in names:
            try:
                clients.append(stack.enter_context(context.control(name)))
            except (WrongStateError, UsageError):
                if args.name is not None:
                    raise
        if args.now:
            _past(context, clients)
        else:
            _follow(context, clients)
    return 0


def _explain(context: Context) -> int:
    output = context.output
    if output.as_json:
        rows = [
            dataclasses.asdict(event) | {"level": event.level.name.lower()}
            for event in EVENTS.values()
        ]
        output.json("events", {"events": rows})
        return 0
    for event in EVENTS.values():
        output.line(
            f"{event.name} ({event.level.name.lower()}): {', '.join(event.fields)}".rstrip(": ")
        )
        for label, text in (("", event.meaning), ("what to do: ", event.advice)):
            for line in textwrap.wrap(label + text, 92):
                output.line(f"    {line}")
    return 0


def _past(context: Context, clients: list[ControlClient]) -> None:
    entries: list[dict[str, Any]] = []
    for client in clients:
        client.call("events", {"now": True}, on_event=entries.append)
    for entry in sorted(entries, key=lambda entry: str(entry.get("at"))):
        context.output.event(entry)


def _follow(context: Context, clients: list[ControlClient]) -> None:
    """Until every volume has stopped."""
    with selectors.DefaultSelector() as selector:
        for client in clients:
            client.send("events", {"now": False})
            selector.register(client, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ready in selector.select():
                client = key.fileobj  # type: ignore[assignment]  # only clients are registered
                answers = client.receive()
                if answers is None:
                    selector.unregister(client)
                for answer in answers or []:
                    if isinstance(answer, Failure):
                        raise answer.error
                    if isinstance(answer, Event):
                        context.output.event(answer.fields)
