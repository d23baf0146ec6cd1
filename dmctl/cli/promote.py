"""promote: the receiver becomes the volume, where the other site is lost.

1. A sender that is there is not left behind unless it was forced: its hosts would go on without
   anybody who receives what they write.
2. A receiver that is not promoted after all receives again.
3. Whatever a crash leaves, the same command again goes on from there.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from bitmapd.config import Paths, ReceiverConfig, VolumeConfig, load_any, volume_names
from bitmapd.control.events import iso_time
from bitmapd.errors import BitmapdError, UsageError, WrongStateError
from bitmapd.points.group import newest_of_all
from bitmapd.receiver.format import examine_directory, examine_journal
from bitmapd.volume.promoting import Media, Which, default_record, exchange, promote_now
from dmctl.cli.checks import Findings, check_others, identified
from dmctl.cli.context import Context, combine
from dmctl.cli.copying import ask
from dmctl.cli.failover import demotable
from dmctl.cli.lifecycle import stop_now
from dmctl.cli.probe import keep_rules
from dmctl.cli.processes import is_running, launch, start_lock

STOP_TIMEOUT_S = 60.0


def promote(context: Context, args: Namespace) -> int:
    paths, names = context.paths, args.names
    if args.group is not None or len(names) > 1:
        return promote_group(context, args)
    if not names:
        raise UsageError("nothing to promote", hint="give NAME, or --group NAME")
    (name,) = names
    volume = demotable(paths, name)
    if volume is not None:
        from dmctl.cli.switchover import stands_demoted, take_back  # noqa: PLC0415  (costs 200 ms)

        if stands_demoted(paths, volume):
            return take_back(context, volume, args)
    config = receiver(paths, name)
    with start_lock(paths, name):
        if not args.force:
            refuse_alone(context, config)
        if args.record is not None and os.path.exists(args.record):
            refuse_used(context, args.record)
        running = [name] if is_running(paths, name) else []
        with stopped(context, args, running):
            body = carry_out(context, args, config, Which(args.point, args.label))
    if context.output.as_json:
        context.output.json("promote", body)
    return 0


def refuse_used(context: Context, record: str) -> None:
    """BusyError if the record that is to be made would be made on what a volume has."""
    found = Findings(force=False)
    media, known = {"record": record}, {"record": identified("record", record)}
    check_others(context, found, media, known)
    if found.errors:
        raise combine(found.errors, f"cannot make a record on {record}")


@contextmanager
def stopped(context: Context, args: Namespace, running: Sequence[str]) -> Iterator[None]:
    """Without these receivers, whose senders must be away.  After an error they receive as before,
    or go on as the volumes that they have become."""
    for name in running:
        refuse_a_sender(context, name, force=args.force)
    try:
        for name in running:
            stop_now(context, name, STOP_TIMEOUT_S)
        yield
    except BitmapdError:
        for name in running:
            if not is_running(context.paths, name):
                with suppress(BitmapdError):
                    launch(context.paths, name, args.timeout)
        raise


def carry_out(
    context: Context, args: Namespace, config: ReceiverConfig, which: Which
) -> dict[str, Any]:
    """Of a receiver that does not run: promote it, and start the volume."""
    name, output, paths = config.name, context.output, context.paths
    record = args.record or config.promoted_record or default_record(paths, name)
    media = Media(name, config.image, config.journal, record, config.listen)
    done = promote_now(media, config, force=args.force, which=which)
    exchange(paths, config, done, record)
    keep_rules(context, config)
    launch(paths, name, args.timeout)
    status = ask(context, name, "status", {})
    body = {
        "name": name,
        "point": done.point,
        "at": iso_time(done.wall_ns / 1e9) if done.wall_ns else None,
        "consistent": done.obstacle is None,
        "term": done.line.term,
        "record": record,
        "device": status["device"],
    }
    if output.as_json:
        return body
    if done.obstacle is not None:
        output.say(f"this relies on your word: {done.obstacle.value}")
    of = f"point {done.point} of {body['at']}" if body["at"] else f"point {done.point}"
    output.say(f"volume '{name}' is served here with {of}: {status['device']}")
    output.say(f"what is written from now on is recorded on {record}, for the way back")
    return body


def refuse_alone(context: Context, config: ReceiverConfig) -> None:
    """WrongStateError for one of several that belong together."""
    name, group = config.name, config.group
    others = [] if group is None else [it.name for it in members(context.paths, group)]
    if len(others) > 1:
        raise WrongStateError(
            f"receiver '{name}' is of group '{group}', with {', '.join(others)}: promoted alone it"
            " would not fit the others",
            hint=f"'dmctl promote --group {group}' takes the newest point that all have; --force"
            " takes the newest one of this alone",
        )


def members(paths: Paths, group: str) -> list[ReceiverConfig | VolumeConfig]:
    """Of this host, in order of names; those that were promoted already are volumes."""
    configs = [load_any(paths, name) for name in volume_names(paths)]
    return [config for config in configs if config.group == group]


def promote_group(context: Context, args: Namespace) -> int:
    """All receivers of a group, to the newest point that all have.

    Which one that is stands in their journals, which nobody writes meanwhile; so a call that was
    cut short is repeated, and finds the same one: those that were promoted have it.
    """
    paths, output = context.paths, context.output
    group = args.group or receiver(paths, args.names[0]).group
    found = [] if group is None else members(paths, group)
    receivers = [config for config in found if isinstance(config, ReceiverConfig)]
    names = [config.name for config in found]
    if not receivers:
        promoted = (
            f"{', '.join(names)} may have been promoted already: dmctl status" if names else None
        )
        raise WrongStateError(
            f"there is no receiver of group '{group}' here to promote", hint=promoted
        )
    if args.names and set(args.names) != set(names):
        raise WrongStateError(
            f"group '{group}' has {', '.join(names)}: its members are promoted together",
            hint=f"dmctl promote --group {group}",
        )
    if args.point is not None or args.record is not None:
        word = "--point" if args.point is not None else "--record"
        raise UsageError(f"{word} is of one receiver", hint="--label is the same at all")
    with ExitStack() as locks:
        for name in names:
            locks.enter_context(start_lock(paths, name))
        running = [config.name for config in receivers if is_running(paths, config.name)]
        with stopped(context, args, running):
            which = _points_of_all(found, args.label)
            bodies = [carry_out(context, args, it, which[it.name]) for it in receivers]
    if output.as_json:
        output.json("promote", {"group": group, "volumes": bodies})
    return 0


def _points_of_all(
    found: Sequence[ReceiverConfig | VolumeConfig], label: str | None
) -> dict[str, Which]:
    """By name; WrongStateError if there is no point that all have."""
    journals = {config.name: str(config.journal) for config in found if config.journal}
    if label is None:
        pages = {name: examine_journal(path)[1] for name, path in journals.items()}
        number = newest_of_all([page.groups for page in pages.values()])
        if number:
            return dict.fromkeys(pages, Which(group=number))
        raise WrongStateError(
            "there is no point that all members of the group have",
            hint="'dmctl points NAME' lists what each has; 'dmctl promote NAME --force' takes the"
            " newest of one alone",
        )
    labelled = {
        name: {it.wall_ns: it.point for it in examine_directory(path).points if it.label == label}
        for name, path in journals.items()
    }
    common = set.intersection(*(set(times) for times in labelled.values()))
    if not common:
        raise WrongStateError(f"not all members of the group have a point with the label {label!r}")
    return {name: Which(point=times[max(common)]) for name, times in labelled.items()}


def receiver(paths: Paths, name: str) -> ReceiverConfig:
    """WrongStateError for a volume."""
    config = load_any(paths, name)
    if isinstance(config, ReceiverConfig):
        return config
    how = "was promoted already" if config.receiver_dials else "is a volume, and no receiver"
    raise WrongStateError(
        f"'{name}' {how}: there is nothing to promote", hint=f"dmctl start {name}"
    )


def refuse_a_sender(context: Context, name: str, *, force: bool) -> None:
    figures: dict[str, Any] = ask(context, name, "status", {})["receiver"]
    if figures["connected"] and not force:
        raise WrongStateError(
            f"the sender of '{name}' is connected: its volume is in use, and would be left without"
            " a receiver",
            hint=f"stop the volume first; 'dmctl promote {name} --force' takes its place"
            " all the same, and what its hosts write from then on is a second history",
        )
