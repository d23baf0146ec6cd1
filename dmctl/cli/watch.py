"""events: the logs of one or of all running volumes, as JSON lines; what events mean."""

from __future__ import annotations

import dataclasses
import selectors
import textwrap
from argparse import Namespace
from contextlib import ExitStack
from typing import Any

from bitmapd.config import load_any, volume_names
from bitmapd.control.catalogue import EVENTS
from bitmapd.control.client import ControlClient
from bitmapd.control.protocol import Event, Failure
from bitmapd.errors import BitmapdError, WrongStateError
from dmctl.cli.context import Context, side_by_side, worst


def events(context: Context, args: Namespace) -> int:
    if args.explain:
        return _explain(context)
    if args.name is not None:
        load_any(context.paths, args.name)
        names = [args.name]
    else:
        names = volume_names(context.paths)
    return (_past if args.now else _follow)(context, names, named=args.name is not None)


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


def _past(context: Context, names: list[str], *, named: bool) -> int:
    """Of all that answer, in the order of time."""

    def one(name: str) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = []
        with context.control(name) as client:
            client.call("events", {"now": True}, on_event=entries.append)
        return entries

    entries: list[dict[str, Any]] = []
    statuses = []
    for _name, value in side_by_side(names, one):
        if not isinstance(value, BitmapdError):
            entries += value
        elif named or not isinstance(value, WrongStateError):
            context.output.error(value)
            statuses.append(value.exit_status)
    for entry in sorted(entries, key=lambda entry: str(entry.get("at"))):
        context.output.event(entry)
    return worst(statuses)


def _follow(context: Context, names: list[str], *, named: bool) -> int:
    """Until every volume has stopped."""
    clients: list[ControlClient] = []
    statuses = []
    with ExitStack() as stack:
        for _name, value in side_by_side(names, context.control):
            if not isinstance(value, BitmapdError):
                clients.append(stack.enter_context(value))
            elif named or not isinstance(value, WrongStateError):
                context.output.error(value)
                statuses.append(value.exit_status)
        _print_all(context, clients)
    return worst(statuses)


def _print_all(context: Context, clients: list[ControlClient]) -> None:
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
