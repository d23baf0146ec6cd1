"""resync, verify, pause, resume, set, resize: what a running volume is asked to do."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from bitmapd.config import (
    ReceiverConfig,
    change_volume,
    changed,
    keys,
    load_any,
    load_volume,
)
from bitmapd.errors import BitmapdError, DifferencesError, UsageError, WrongStateError
from bitmapd.units import human_size
from dmctl.cli.context import Context, each, selected
from dmctl.cli.processes import is_running, start_lock

VERB_TIMEOUT_S = 60.0
# What a state in which nothing can be copied waits for.
AWAITED = {
    "link-down": "its secondary answers",
    "no-space": "its secondary has room",
    "secondary-failing": "its secondary takes what it refuses now",
}
RESIZE_TIMEOUT_S = 600.0  # waits for requests that are under way


def ask(
    context: Context,
    name: str,
    verb: str,
    args: dict[str, Any],
    within_s: float = VERB_TIMEOUT_S,
) -> Any:
    """The result of a verb; NotFoundError rather than "not running" for an unknown volume."""
    try:
        with context.control(name) as client:
            return client.call(verb, args, within_s=within_s)
    except WrongStateError:
        load_volume(context.paths, name)
        raise


def resync(context: Context, args: Namespace) -> int:
    named = bool(args.names)

    def one(name: str) -> dict[str, Any]:
        try:
            answer = ask(context, name, "resync", {"checksum": args.checksum})
        except WrongStateError as error:
            if named:
                raise
            reason = error.message
            if not is_running(context.paths, name):
                left = _left_in_record(context, name)
                if left is None:
                    context.output.detail(f"passed over: {reason}")
                    return {"result": "passed over", "state": None, "reason": reason}
                reason = f"volume '{name}' is not running, and {left}; first: dmctl start {name}"
            elif error.hint:
                reason = f"{reason}; first: {error.hint}"
            context.output.say(f"passed over: {reason}")
            return {"result": "passed over", "state": None, "reason": reason}
        awaited = AWAITED.get(answer.get("state", ""))
        if awaited is not None:
            reason = (
                f"volume '{name}' is {answer['state']}: it copies as soon as {awaited}; see"
                f" 'dmctl events {name} --now'"
            )
            context.output.say(f"passed over: {reason}")
            return {"result": "done", **answer, "reason": reason}
        context.output.detail(f"volume '{name}' is {answer.get('state')}")
        return {"result": "done", **answer}

    return each(context, "resync", selected(context, args, default_all=True), "resync", one)


def _left_in_record(context: Context, name: str) -> str | None:
    """What keeps a stopped volume from being in sync; None if nothing does."""
    from dmctl.cli.record import recorded_extents  # noqa: PLC0415  (imports the whole format)

    config = load_any(context.paths, name)
    if isinstance(config, ReceiverConfig):
        return None
    extents = recorded_extents(config)
    if extents is None:
        return f"its record {config.record} cannot be read"
    return f"its record names {extents} extents that the secondary may lack" if extents else None


def verify(context: Context, args: Namespace) -> int:
    load_volume(context.paths, args.name)
    with (
        context.control(args.name) as client,
        context.output.progress(f"verifying {args.name}") as bar,
    ):
        result: dict[str, Any] = client.call(
            "verify",
            {"repair": args.repair},
            on_event=lambda event: bar(float(event.get("progress") or 0.0)),
        )
    found, repaired = result["unexpected_bytes"], result["repaired_bytes"]
    compared = human_size(result["compared_bytes"])
    unread = result.get("unreadable_bytes", 0)  # a bitmapd from before an upgrade says nothing
    skipped = f"{unread} bytes could not be read and were not compared"
    error: BitmapdError | None = None
    if found > repaired:
        error = DifferencesError(
            f"volume '{args.name}': {found - repaired} bytes differ that the record does not name"
            f" ({compared} compared{f'; {skipped}' if unread else ''})",
            hint="find out which side is right, see 'The sides differ' in docs/recovery.md; if the"
            f" primary is, 'dmctl verify {args.name} --repair' copies them from there",
        )
    elif unread:
        error = BitmapdError(
            f"volume '{args.name}': {skipped} ({compared} compared)",
            hint="see 'The sides differ' in docs/recovery.md",
        )
    if context.output.as_json:
        trouble = {} if error is None else {"error": error.to_json()}
        context.output.json("verify", {"name": args.name, **result, **trouble})
        return 0 if error is None else error.exit_status
    for offset, length in result["unexpected"]:
        context.output.line(f"unexpected difference: {length} bytes at byte {offset}")
    for run in result.get("unreadable", []):
        context.output.line(
            f"not readable: {run['length_bytes']} bytes at byte {run['offset_bytes']} of the"
            f" {run['side']}"
        )
    if error is not None:
        raise error
    fixed = f"; {repaired} bytes were repaired" if repaired else ""
    context.output.say(f"volume '{args.name}': {compared} compared{fixed}, both sides agree")
    return 0


def _simple(context: Context, name: str, verb: str, args: dict[str, Any], said: str) -> int:
    return _tell(context, name, verb, ask(context, name, verb, args), said)


def _tell(context: Context, name: str, verb: str, result: dict[str, Any], said: str) -> int:
    context.output.say(f"volume '{name}': {said}")
    if context.output.as_json:
        context.output.json(verb, {"name": name, **result})
    return 0


def is_paused(context: Context, name: str) -> bool:
    """Whether a running volume copies nothing until `resume`."""
    return bool(ask(context, name, "status", {}).get("paused"))


def pause(context: Context, args: Namespace) -> int:
    return _simple(context, args.name, "pause", {}, "copying is paused until 'dmctl resume'")


def resume(context: Context, args: Namespace) -> int:
    return _simple(context, args.name, "resume", {}, "copying goes on")


def change(context: Context, args: Namespace) -> int:
    changes: dict[str, str] = {}
    for word in args.changes:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UsageError(f"{word!r} is not of the form KEY=VALUE")
        value = value or "none"
        if changes.setdefault(key.replace("-", "_"), value) != value:
            raise UsageError(f"{key} is given twice")
    said = ", ".join(f"{key.replace('_', '-')} = {value}" for key, value in changes.items())
    if "node" in changes and not is_running(context.paths, args.name):
        from dmctl.cli.joining import become_pair  # noqa: PLC0415  (imports the whole format)

        result = {"changed": sorted(changes), "notes": become_pair(context, args.name, changes)}
        return _tell(context, args.name, "set", result, said)
    if set(changes) <= {key.name for key in keys().values() if key.idle}:
        return _change_stopped(context, args.name, changes, said)
    try:
        return _simple(context, args.name, "set", dict(changes), said)
    except WrongStateError:
        config = load_any(context.paths, args.name)
        if isinstance(config, ReceiverConfig):
            raise WrongStateError(
                f"'{args.name}' is a receiver, which reads its settings when it starts",
                hint=f"change them in {context.paths.volume_file(args.name)}, then 'dmctl stop"
                f" {args.name}' and 'dmctl start {args.name}'",
            ) from None
        # A mistake in what was asked for is there whether or not the volume runs.
        changed(config, changes)
        raise


def _change_stopped(context: Context, name: str, changes: dict[str, str], said: str) -> int:
    """Settings that a volume takes up when it starts."""
    config = changed(load_volume(context.paths, name), changes, also=set(changes))
    with start_lock(context.paths, name):
        if is_running(context.paths, name):
            raise WrongStateError(
                f"volume '{name}' runs: {', '.join(changes)} can be changed while it is stopped",
                hint=f"'dmctl stop {name}' first; the partner goes on to serve",
            )
        change_volume(context.paths, config, changes)
    return _tell(context, name, "set", dict(changes), said)


def resize(context: Context, args: Namespace) -> int:
    result = ask(context, args.name, "resize", {}, RESIZE_TIMEOUT_S)
    size = human_size(result["size_bytes"])
    said = (
        f"the new size is taken up: {size}"
        if result["changed"]
        else f"still {size}, it has not grown"
    )
    return _tell(context, args.name, "resize", result, said)
