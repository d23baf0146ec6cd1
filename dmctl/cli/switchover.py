"""switchover and demote of a volume with a receiver: a planned move, which loses nothing.

1. Nothing is begun before everything has been checked that can be known.
2. The volume's process gives everything to the receiver and ends, demoted; what comes then is done
   here, and the same command again goes on wherever it was cut short.
"""

from __future__ import annotations

import time
from argparse import Namespace

from bitmapd.config import Paths, VolumeConfig
from bitmapd.errors import SplitBrainError, UnreachableError, WrongStateError
from bitmapd.points.switchover import Outlook
from bitmapd.record.superblock import Superblock
from bitmapd.units import human_size
from bitmapd.volume.demoting import mark
from bitmapd.volume.handing import hand_over_now, look_now
from bitmapd.volume.rejoining import recorded_runs
from dmctl.cli.context import Context
from dmctl.cli.copying import ask
from dmctl.cli.failback import become_receiver, journal_of, journal_path, volume_of
from dmctl.cli.lifecycle import stop_now
from dmctl.cli.processes import is_running, launch, start_lock

LEAST_S = 5.0  # for the other site to answer, whatever is left of the time


def switchover(context: Context, args: Namespace) -> int:
    name, output, paths = args.name, context.output, context.paths
    deadline_s = time.monotonic() + args.timeout
    config = volume_of(context, name)
    journal = journal_path(config, args.journal)
    with start_lock(paths, name):
        superblock, _ = recorded_runs(config.record, config.uuid)
        journal_of(context, config, journal, superblock, force=args.force)
        if is_running(paths, name):
            give_away(context, name, args.timeout, force=True)
            superblock, _ = recorded_runs(config.record, config.uuid)
        elif not superblock.demoted:
            raise WrongStateError(
                f"volume '{name}' is not running, and has not given everything to its receiver",
                hint=f"dmctl start {name}",
            )
        hand_over_now(config, superblock, max(LEAST_S, deadline_s - time.monotonic()))
        begin = journal_of(context, config, journal, superblock, force=args.force)
        rest_s = max(LEAST_S, deadline_s - time.monotonic())
        become_receiver(context, config, journal, begin, rest_s)
    if output.as_json:
        output.json("switchover", {"name": name, "volume_at": config.secondary, "journal": journal})
        return 0
    output.say(f"volume '{name}' is served at the other site; this is its receiver now")
    return 0


def demote_site(context: Context, config: VolumeConfig, args: Namespace) -> int:
    """Let hosts in no more: the first half of a switchover, or for an old primary."""
    name, output, paths = config.name, context.output, context.paths
    with start_lock(paths, name):
        if is_running(paths, name):
            give_away(context, name, args.timeout, force=args.force)
        else:
            superblock, runs = recorded_runs(config.record, config.uuid)
            extents = sum(stop - first for first, stop in runs)
            if extents and not args.force and _outlook(config, superblock) is not Outlook.TAKEN:
                size = human_size(extents * superblock.geometry.extent_bytes)
                raise WrongStateError(
                    f"up to {size} of volume '{name}' may never have left this site",
                    hint=f"'dmctl start {name}' sends them; --force demotes it all the same",
                )
            mark(config, paths, demoted=True)
    if output.as_json:
        output.json("demote", {"name": name, "demoted": True})
        return 0
    output.say(
        f"volume '{name}' lets no host in at this site; 'dmctl switchover {name}' hands it over,"
        f" 'dmctl promote {name}' takes it back"
    )
    return 0


def take_back(context: Context, config: VolumeConfig, args: Namespace) -> int:
    """Serve a demoted volume here again, since nobody has taken it."""
    name, output, paths = config.name, context.output, context.paths
    with start_lock(paths, name):
        superblock, _ = recorded_runs(config.record, config.uuid)
        if not args.force:
            _refuse_if_taken(config, superblock)
        mark(config, paths, demoted=False)
        launch(paths, name, args.timeout)
    device = ask(context, name, "status", {})["device"]
    if output.as_json:
        output.json("promote", {"name": name, "point": None, "device": device})
        return 0
    output.say(f"volume '{name}' is served here again: {device}")
    return 0


def _refuse_if_taken(config: VolumeConfig, superblock: Superblock) -> None:
    name = config.name
    try:
        found = look_now(config, superblock)
    except UnreachableError as error:
        raise UnreachableError(
            f"{error.message}; it may have been promoted meanwhile",
            hint=f"if it does not serve '{name}' for certain: 'dmctl promote {name} --force'",
        ) from None
    if found is Outlook.TAKEN:
        raise WrongStateError(
            f"volume '{name}' was taken: {config.secondary} serves it",
            hint=f"'dmctl switchover {name}' makes this its receiver",
        )
    if found is Outlook.OTHER:
        raise SplitBrainError(
            f"{config.secondary}: {found.value}", hint="see 'Both were written' in docs/recovery.md"
        )
    if found is Outlook.BUSY:
        raise WrongStateError(f"{config.secondary}: {found.value}")


def _outlook(config: VolumeConfig, superblock: Superblock) -> Outlook | None:
    try:
        return look_now(config, superblock)
    except UnreachableError:
        return None


def give_away(context: Context, name: str, timeout_s: float, *, force: bool) -> None:
    """Have the process of the volume demote it, and wait for its end."""
    words = {"force": force, "within_s": timeout_s}
    ask(context, name, "demote", words, timeout_s + LEAST_S)
    stop_now(context, name, timeout_s, now=False)


def stands_demoted(paths: Paths, config: VolumeConfig) -> bool:
    """Whether the volume is stopped, and lets no host in since it was demoted."""
    if is_running(paths, config.name):
        return False
    superblock, _ = recorded_runs(config.record, config.uuid)
    return superblock.demoted
