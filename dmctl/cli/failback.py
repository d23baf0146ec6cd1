"""failback: an old primary becomes the receiver of the site that took its place."""

from __future__ import annotations

import os
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from uuid import uuid4

from bitmapd.config import ReceiverConfig, VolumeConfig, has_receiver, load_any
from bitmapd.config.files import exchange_role
from bitmapd.config.roles import receiver_table
from bitmapd.errors import ExistsError, ForeignRecordError, UsageError, WrongStateError
from bitmapd.media.identity import identify
from bitmapd.receiver.format import format_journal, probe_journal
from bitmapd.receiver.places import Places
from bitmapd.receiver.superblock import JournalSuperblock
from bitmapd.record.superblock import Superblock
from bitmapd.units import human_size
from bitmapd.volume.rejoining import (
    ask_now,
    line_of,
    recorded_runs,
    refuse_unless_old,
    save,
)
from bitmapd.volume.session import RecordSession
from dmctl.cli.checks import Findings, check_free, check_others, identified
from dmctl.cli.context import Context, combine
from dmctl.cli.plan import refuse_layers
from dmctl.cli.probe import keep_rules
from dmctl.cli.processes import is_running, launch, start_lock
from dmctl.cli.receive import check_journal


def failback(context: Context, args: Namespace) -> int:
    name, output, paths = args.name, context.output, context.paths
    config = volume_of(context, name)
    journal = journal_path(config, args.journal)
    with start_lock(paths, name):
        if is_running(paths, name):
            raise WrongStateError(
                f"volume '{name}' is running", hint=f"first: dmctl stop {name} --now"
            )
        refuse_foreign(context, config)
        superblock, runs = recorded_runs(config.record, config.uuid)
        refuse_layers(config, superblock.geometry)
        begin = journal_of(context, config, journal, superblock, force=args.force)
        theirs = ask_now(config, superblock)
        refuse_unless_old(config, superblock, theirs)
        lost_bytes = sum(stop - first for first, stop in runs) * superblock.geometry.extent_bytes
        lost_bytes = min(lost_bytes, superblock.geometry.size_bytes)
        if args.save is not None:
            _save(context, superblock, config, args.save, runs)
        kept = f"it is saved in {args.save}" if args.save else "--save FILE keeps it"
        output.confirm(
            f"up to {human_size(lost_bytes)} of volume '{name}' may never have left this site and"
            f" are overwritten with what {config.secondary} has; {kept}",
            f"Make {config.primary} the copy of {config.secondary}?",
            yes=args.yes,
        )
        become_receiver(context, config, journal, begin, args.timeout)
    if output.as_json:
        output.json("failback", {"name": name, "lost_bytes": lost_bytes, "journal": journal})
        return 0
    output.say(
        f"'{name}' is the receiver of {config.secondary} now; only what differs is copied, and its"
        " first point makes it consistent"
    )
    return 0


def refuse_foreign(context: Context, config: VolumeConfig) -> None:
    """ForeignRecordError where a start would be refused: the record does not name what differs, or
    the primary is another disk."""
    try:
        RecordSession(config, context.paths, lambda event, **fields: None, node=config.node).close()
    except ForeignRecordError as error:
        raise type(error)(
            error.message,
            f"if {config.primary} is the right disk: 'dmctl start {config.name} --resync-all' has"
            " all of it compared; that start is refused, and then this is not",
        ) from error


def volume_of(context: Context, name: str) -> VolumeConfig:
    config = load_any(context.paths, name)
    if isinstance(config, ReceiverConfig):
        raise WrongStateError(
            f"'{name}' is a receiver already", hint=f"'dmctl points {name}' shows how far it is"
        )
    if not has_receiver(config):
        raise WrongStateError(
            f"the secondary of volume '{name}' is not a receiver: nothing was promoted there"
        )
    return config


def journal_path(config: VolumeConfig, given: str | None) -> str:
    """Where a receiver in the place of this volume would have its journal."""
    journal = given or config.journal
    if journal is None:
        raise UsageError(
            f"volume '{config.name}' has no journal to receive points in",
            hint="give --journal DEV: at least 64MiB, a tenth of the volume is a good size",
        )
    return os.path.abspath(journal)


def become_receiver(
    context: Context,
    config: VolumeConfig,
    journal: str,
    begin: JournalSuperblock,
    timeout_s: float,
) -> None:
    """`begin` is what `journal_of` has found fit."""
    format_journal(journal, begin)
    exchange_role(context.paths, config.name, receiver_table(config, journal))
    keep_rules(context, config)
    launch(context.paths, config.name, timeout_s)


def _save(
    context: Context,
    superblock: Superblock,
    config: VolumeConfig,
    path: str,
    runs: tuple[tuple[int, int], ...],
) -> None:
    target = Path(path).absolute()
    if target.exists():
        raise ExistsError(f"{target} exists already", hint="name a file that does not")
    with context.output.progress(f"saving to {target}") as bar:
        save(superblock, config.primary, runs, target, bar)


def journal_of(
    context: Context, config: VolumeConfig, path: str, superblock: Superblock, *, force: bool
) -> JournalSuperblock:
    """What the journal will begin with, once everything about its medium has been checked.  One of
    this volume, from an earlier time or a call that was cut short, is of no use."""
    name, found = config.name, Findings(force)
    identity = found.attempt(partial(identified, "journal", path))
    if identity is not None:
        check_free(found, "journal", path, identity, None)
        old = None if identity.read_only else found.attempt(partial(probe_journal, path))
        mine = old is not None and old.line is not None and old.line.volume == config.uuid
        if not (mine or found.errors):
            check_journal(found, name, path, identity)
    size_bytes = (identity.size_bytes or 0) // 4096 * 4096 if identity is not None else 0
    if identity is not None:
        found.attempt(partial(Places, superblock.geometry, size_bytes))
    check_others(context, found, {"journal": path}, {"journal": identity})
    if found.errors:
        raise combine(found.errors, f"cannot make '{name}' a receiver")
    image, now_s = identify(config.primary), int(time.time())
    return JournalSuperblock(
        journal=uuid4(),
        name=name,
        journal_bytes=size_bytes,
        image=image.text,
        image_bytes=image.size_bytes or 0,
        created_s=now_s,
        updated_s=now_s,
        line=line_of(superblock),
    )
