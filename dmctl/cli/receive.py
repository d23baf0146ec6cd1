"""receive: make a receiver of consistent points.

1. Nothing is changed before every check has been made; all reasons against it are reported at once.
2. The image is not written: its first sender does that.  The journal is formatted, and the
   configuration is written last.  A crash in between leaves a journal that belongs to nobody's
   configuration; making the receiver again overwrites it without being forced to.
3. What is in use is never taken.  `--force` overrides what was found on image and journal, and
   nothing else.
"""

from __future__ import annotations

import os
import time
from argparse import Namespace
from functools import partial
from typing import Any
from uuid import uuid4

from bitmapd.config import (
    ConfigError,
    Problem,
    ReceiverConfig,
    build_receiver,
    check_name,
    create_volume,
    render_receiver,
)
from bitmapd.errors import (
    ExistsError,
    ForeignRecordError,
    FormatTooNewError,
    NoSpaceError,
    RecordDamagedError,
    UsageError,
    explain,
)
from bitmapd.media.identity import Identity, same_medium, signature
from bitmapd.net.tls import node_context
from bitmapd.receiver.format import format_journal, probe_journal
from bitmapd.receiver.places import Places
from bitmapd.receiver.superblock import JournalSuperblock
from bitmapd.record import tool
from bitmapd.record.geometry import MIB, Geometry
from bitmapd.record.medium import RecordMedium
from bitmapd.units import human_size
from bitmapd.volume.copies import clone_obstacle
from dmctl.cli.checks import Findings, check_free, check_others, identified
from dmctl.cli.context import Context, combine
from dmctl.cli.probe import keep_rules

LEAST_IMAGE_BYTES = MIB  # an extent of the usual size
ROOM_FOR = 10  # a journal of a tenth of the image is a good size
_MEDIA = ("image", "journal")
_PATHS = (*_MEDIA, "certificates", "point_hook")
_OPTIONS = (
    *_PATHS, "listen", "sender_name", "sender_fingerprint", "retain", "group", "catch_up",
    "metrics_listen",
)  # fmt: skip


def receive(context: Context, args: Namespace) -> int:
    name, output = args.name, context.output
    found = Findings(args.force)
    with found.collect():
        if context.paths.volume_file(check_name(name)).exists():
            found.errors.append(ExistsError(f"'{name}' exists already"))
    table = _table(args)
    config, problems = build_receiver(name, table, "command line")
    if problems:
        options = [
            Problem(p.file, f"--{(p.key or '').replace('_', '-')}", p.message, p.hint)
            for p in problems
        ]
        found.errors.append(ConfigError(options))
    superblock = _check(context, found, name, table)
    if config is not None and config.certificates is not None:
        found.attempt(partial(node_context, config.certificates, accepts=True))
    if config is not None:
        _check_keeping(found, config)
    if found.errors or config is None or superblock is None:
        raise combine(found.errors, f"cannot make the receiver '{name}'")
    plan = {
        "name": name,
        "image": config.image,
        "journal": config.journal,
        "listen": config.listen,
        "image_bytes": superblock.image_bytes,
        "journal_bytes": superblock.journal_bytes,
        "overwritten": found.overridden,
        "notes": found.notes,
    }
    if not args.dry_run:
        try:
            format_journal(config.journal, superblock)
            create_volume(context.paths, name, render_receiver(config))
        except OSError as error:
            raise explain(error) from error
        keep_rules(context)
    if output.as_json:
        output.json("receive", {"dry_run": args.dry_run, "receiver": plan})
        return 0
    if args.dry_run:
        for label, value in plan.items():
            for item in value if isinstance(value, list) else [value]:
                output.line(f"{label:<16} {item}")
        return 0
    for note in found.notes:
        output.say(f"note: {note}")
    output.say(f"receiver '{name}' is made; 'dmctl start {name}' starts it")
    return 0


def _table(args: Namespace) -> dict[str, Any]:
    """The receiver's file as the options give it; paths become absolute, names of links stay."""
    table: dict[str, Any] = {"role": "receiver"}
    for key in _OPTIONS:
        value = getattr(args, key)
        if value is not None:
            table[key] = os.path.abspath(value) if key in _PATHS and value else value
    return table


# -- checks -----------------------------------------------------------------------------------


def _check(
    context: Context, found: Findings, name: str, table: dict[str, Any]
) -> JournalSuperblock | None:
    """Everything that can be known of the media; None if one of them cannot be used."""
    media = {key: str(table[key]) for key in _MEDIA}
    for key, value in media.items():
        if "://" in value.removeprefix(os.getcwd()):
            found.errors.append(UsageError(f"{key} {value} is no block device and no file"))
    known = {key: found.attempt(partial(identified, key, value)) for key, value in media.items()}
    for key, value in media.items():
        identity = known[key]
        if identity is not None:
            check_free(found, key, value, identity, None)
    if all(known.values()) and found.attempt(partial(same_medium, *media.values())):
        found.errors.append(UsageError(f"image and journal are the same medium, {media['image']}"))
    check_others(context, found, media, known)
    image, journal = known["image"], known["journal"]
    if image is not None:
        _check_image(found, media["image"], image)
    if journal is not None:
        check_journal(found, name, media["journal"], journal)
    if image is None or journal is None:
        return None
    size_bytes = (journal.size_bytes or 0) // 4096 * 4096
    if (image.size_bytes or 0) >= LEAST_IMAGE_BYTES:
        _check_size(found, image.size_bytes or 0, size_bytes, media["journal"], journal.kind)
    now_s = int(time.time())
    return JournalSuperblock(
        journal=uuid4(),
        name=name,
        journal_bytes=size_bytes,
        image=image.text,
        image_bytes=image.size_bytes or 0,
        created_s=now_s,
        updated_s=now_s,
    )


def _check_size(found: Findings, image_bytes: int, have: int, path: str, kind: str) -> None:
    """Of the journal, if the volume is as large as the image and has extents of the usual size."""
    try:
        Places(Geometry(image_bytes), have)
    except NoSpaceError as error:
        hint = error.hint if kind == "block" else f"{error.hint}: truncate -s SIZE {path}"
        found.errors.append(NoSpaceError(f"journal {path}: {error.message}", hint))
        return
    tenth = image_bytes // ROOM_FOR
    if have < tenth:
        found.notes.append(
            f"the journal has {human_size(have)}, and a point that is larger cannot be received;"
            f" {human_size(tenth)} is a good size"
        )


def _check_keeping(found: Findings, config: ReceiverConfig) -> None:
    """Whether points can be kept, if that is wanted."""
    wanted = [] if config.retain is None else ["--retain"]
    wanted += ["--catch-up clone"] if config.catch_up == "clone" else []
    if not wanted or config.point_hook is not None:
        return
    obstacle = clone_obstacle(config.image)
    if obstacle is not None:
        hint = (
            "put the image on XFS or btrfs, or give --point-hook PROGRAM; or do without"
            f" {' and '.join(wanted)}"
        )
        found.errors.append(UsageError(f"no points can be retained: {obstacle}", hint))


def _check_image(found: Findings, path: str, identity: Identity) -> None:
    have = identity.size_bytes or 0
    if have < LEAST_IMAGE_BYTES:
        hint = "make it as large as the volume" if identity.kind == "file" else None
        found.errors.append(
            NoSpaceError(f"image {path} has {have} bytes, less than one extent", hint)
        )
        return
    with found.collect():
        content = None if identity.read_only else signature(path)
        if content is not None:
            found.unless_forced(ExistsError(f"image {path} holds something: {content}"))


def check_journal(found: Findings, name: str, path: str, identity: Identity) -> None:
    """Whether a journal may be made there."""
    if identity.read_only:
        return  # reported already
    with found.collect(), RecordMedium.open(path) as medium:
        medium.lock()
    with found.collect():
        try:
            old = probe_journal(path)
            record = tool.probe(path)
        except (RecordDamagedError, FormatTooNewError) as error:
            found.unless_forced(error)
            return
        if old is not None:
            _check_old_journal(found, name, path, old)
        elif record is not None:
            found.unless_forced(
                ForeignRecordError(f"journal {path} holds the record of volume '{record.name}'")
            )
        elif (content := signature(path)) is not None:
            found.unless_forced(ExistsError(f"journal {path} holds something: {content}"))


def _check_old_journal(found: Findings, name: str, path: str, old: JournalSuperblock) -> None:
    if old.line is None and old.name == name:
        found.notes.append("the journal of an earlier try is overwritten")
        return
    found.unless_forced(
        ForeignRecordError(f"journal {path} belongs to an earlier receiver '{old.name}'")
    )
