"""status: of running volumes from their bitmapd, of stopped ones from their record."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from bitmapd.config import (
    ReceiverConfig,
    VolumeConfig,
    device_of,
    effective_block_size_bytes,
    effective_record_limit_bytes,
    load_any,
)
from bitmapd.control.events import iso_time
from bitmapd.control.states import check_status, hint
from bitmapd.errors import BitmapdError, TimeOutError, UsageError, WrongStateError
from bitmapd.units import human_duration, human_size
from dmctl.cli.context import Context, selected, side_by_side, worst
from dmctl.cli.output import Output
from dmctl.cli.processes import last_error

# In the name of a key -> how its value is shown; the longest first.
_UNITS: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("_bytes_per_second", lambda rate: f"{human_size(rate)}/s"),
    ("_bytes", human_size),
    ("_seconds", human_duration),
)
ANSWER_TIMEOUT_S = 5.0
COLOURS = {0: "green", 101: "yellow", 100: "yellow"}


def status(context: Context, args: Namespace) -> int:
    output = context.output
    if args.max_point_age is not None and not args.check:
        raise UsageError("--max-point-age goes with --check")
    volumes: list[dict[str, Any]] = []
    errors: list[BitmapdError] = []
    names = selected(context, args, default_all=True)
    found = dict(side_by_side(names, lambda name: _one(context, name)))
    for name in names:
        value = found[name]
        if isinstance(value, BitmapdError):
            errors.append(value)
        else:
            volumes.append(value)
    if output.as_json:
        body: dict[str, Any] = {"volumes": volumes}
        if errors:
            body["error"] = min(errors, key=lambda error: error.exit_status).to_json()
        output.json("status", body)
    else:
        for problem in errors:
            output.error(problem)
        if volumes and not output.quiet:
            _show(context, volumes)
        elif not errors:
            output.say("there are no volumes; 'dmctl create' makes one")
    statuses = [error.exit_status for error in errors]
    if args.check:
        statuses += [check_status(volume["state"]) for volume in volumes]
        if args.max_point_age is not None:
            statuses += [101 for volume in volumes if _is_late(volume, args.max_point_age)]
    return worst(statuses)


def _is_late(volume: Mapping[str, Any], most_s: float) -> bool:
    """Whether what a receiver can produce is older, or nobody knows how old it is; false where
    there is no receiver.  A receiver itself cannot tell: of a volume that nobody writes the newest
    point has everything, however old it is."""
    points = volume.get("points")
    if points is None:
        return False
    age_s = points["age_seconds"]
    return age_s is None or age_s > most_s


def _one(context: Context, name: str) -> dict[str, Any]:
    config = load_any(context.paths, name)
    if isinstance(config, ReceiverConfig):
        return receiver_status(context, config)
    return volume_status(context, config)


def volume_status(context: Context, config: VolumeConfig) -> dict[str, Any]:
    """One element of `volumes`."""
    try:
        return context.ask(config.name, "status", timeout_s=ANSWER_TIMEOUT_S)
    except WrongStateError:
        return _stopped(config, last_error(context.paths, config.name))
    except TimeOutError as error:
        hung = {"code": error.code, "message": error.message, "at": iso_time(time.time())}
        return _unknown(config, "failed", hung)


def receiver_status(context: Context, config: ReceiverConfig) -> dict[str, Any]:
    """One element of `volumes`: of a receiver, from its process or from its journal."""
    from bitmapd.volume.receiver_status import described  # noqa: PLC0415  (rarely needed)

    state, error = "stopped", last_error(context.paths, config.name)
    try:
        return context.ask(config.name, "status", timeout_s=ANSWER_TIMEOUT_S)
    except WrongStateError:
        pass
    except TimeOutError as hung:
        state = "failed"
        error = {"code": hung.code, "message": hung.message, "at": iso_time(time.time())}
    from bitmapd.receiver.commit import page_figures  # noqa: PLC0415
    from bitmapd.receiver.format import examine_journal  # noqa: PLC0415

    try:
        superblock, page = examine_journal(config.journal)
    except BitmapdError as problem:
        at = iso_time(time.time())
        wrong = {"code": problem.code, "message": problem.message, "at": at}
        return described(config, state, None, None, error or wrong)
    return described(config, state, superblock, page_figures(page), error)


def _unknown(config: VolumeConfig, state: str, error: dict[str, str] | None) -> dict[str, Any]:
    numbers = (
        "size_bytes", "dirty_bytes", "lag_seconds", "content_age_seconds", "record_bytes",
        "record_extents", "record_limit_bytes", "writes_total", "hits_total", "misses_total",
        "record_updates_total", "record_clears_total", "copied_bytes_total", "era", "resync",
        "last_recovery", "paused", "partner", "points", "receiver",
    )  # fmt: skip
    return {
        "name": config.name,
        "uuid": str(config.uuid),
        "attach": config.attach,
        "state": state,
        "device": device_of(config),
        "primary": config.primary,
        "secondary": config.secondary,
        "record": config.record,
        "extent_size_bytes": config.extent_size_bytes,
        "block_size_bytes": effective_block_size_bytes(config),
        **dict.fromkeys(numbers),
        "last_error": error,
    }


def _stopped(config: VolumeConfig, error: dict[str, str] | None) -> dict[str, Any]:
    """What the record of a volume that does not run says; null where nobody knows."""
    from bitmapd.record import tool  # noqa: PLC0415  (needed for stopped volumes only)

    result = _unknown(config, "stopped", error)
    try:
        loaded = tool.load(config.record)
    except BitmapdError as problem:
        at = iso_time(time.time())
        result["last_error"] = {"code": problem.code, "message": problem.message, "at": at}
        return result
    geometry = loaded.superblock.geometry
    extents = loaded.bits.count()
    result |= {
        "state": "demoted" if loaded.superblock.demoted else "stopped",
        "size_bytes": geometry.size_bytes,
        "extent_size_bytes": geometry.extent_bytes,
        "block_size_bytes": geometry.block_bytes,
        "record_extents": extents,
        "paused": loaded.superblock.paused,
        "record_bytes": min(extents * geometry.extent_bytes, geometry.size_bytes),
    }
    if config.resync_target_s is None:
        result["record_limit_bytes"] = effective_record_limit_bytes(config, geometry.size_bytes)
    if extents == 0:
        result |= {"dirty_bytes": 0, "lag_seconds": 0.0, "content_age_seconds": 0.0}
    return result


def _show(context: Context, volumes: list[dict[str, Any]]) -> None:
    output = context.output
    head = ["VOLUME", "STATE", "SIZE", "DIRTY", "LAG", "RECORD", "HITS", "DEVICE"]
    output.table(head, [_row(volume) for volume in volumes])
    for volume in volumes:
        if output.verbose:
            output.line()
            _details(output, volume)
        elif volume["last_error"] is not None:
            error = volume["last_error"]
            output.say(f"{volume['name']}: last error, {error['at']}: {error['message']}")
        todo = hint(volume["state"], volume["name"])
        if todo is not None and not output.verbose:
            output.say(f"hint: {todo}")


def _details(output: Output, values: Mapping[str, Any], indent: str = "  ") -> None:
    """Everything that the JSON has, in words and units for people."""
    for key, value in values.items():
        if key == "points" and value is None:
            output.line(f"{indent}{key:<{26 - len(indent)}} none (secondary is not a receiver)")
            continue
        label, text = _in_words(key, value)
        if label in values and label != key:
            label += " size"  # `record` is a path
        if isinstance(value, Mapping):
            output.line(f"{indent}{label}")
            _details(output, value, indent + "  ")
        else:
            output.line(f"{indent}{label.replace('_', ' '):<{26 - len(indent)}} {text}")


def _in_words(key: str, value: Any) -> tuple[str, str]:
    """The key without its unit, and the value with it."""
    for unit, words in _UNITS:
        if unit in key:
            key, show = key.replace(unit, ""), words
            break
    else:
        show = str
    key = key.removesuffix("_total") or key
    if value is None:
        return key, "-"
    if isinstance(value, bool):
        return key, "yes" if value else "no"
    return key, show(value) if isinstance(value, int | float) else str(value)


def _row(volume: dict[str, Any]) -> list[str]:
    state = volume["state"]
    colour = COLOURS.get(check_status(state), "red")
    shown = state
    if volume["resync"]:
        total, left = (volume["resync"][key] or 0 for key in ("total_bytes", "remaining_bytes"))
        shown += f" {100 * (total - left) // total}%" if total else ""
    writes, hits = volume["writes_total"], volume["hits_total"]
    receiver = volume.get("receiver")
    if receiver is not None:
        shown += f", point {receiver['committed']}" if receiver["committed"] else ", no point yet"
    return [
        volume["name"],
        f"{colour}:{shown}",
        _size(volume["size_bytes"]),
        _size(volume["dirty_bytes"]),
        "-" if volume["lag_seconds"] is None else human_duration(volume["lag_seconds"]),
        _size(volume["record_bytes"]),
        f"{100 * hits // writes}%" if writes else "-",
        volume["device"],
    ]


def _size(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else human_size(size_bytes)
