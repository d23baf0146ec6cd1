"""create: check everything, then format the record, then write the configuration.

1. Nothing is changed before every check has been made; all reasons against it are reported at once.
2. The configuration is written last and appears whole, so that a volume exists completely or not at
   all.  If it cannot be written the record is wiped again.  A crash in between leaves a record that
   was never started: creating the volume again overwrites it without being forced to.
3. What is in use is never taken, and the primary is never written.  `--force` overrides what was
   found on the record and on the secondary, and nothing else.
4. A secondary that is known to have been in sync with another primary may be the last good copy:
   overwriting it is asked for, and only `--yes` answers.
"""

from __future__ import annotations

import dataclasses
import os
from argparse import Namespace
from contextlib import suppress
from functools import partial
from typing import Any
from uuid import uuid4

from bitmapd.attach.choose import resolved
from bitmapd.config import (
    ConfigError,
    Problem,
    VolumeConfig,
    build_volume,
    check_name,
    create_volume,
    device_of,
    effective_block_size_bytes,
    effective_record_limit_bytes,
    has_receiver,
    is_keeper,
    load_defaults,
    render,
)
from bitmapd.config.volume import BLOCK_BYTES, KEEPER
from bitmapd.errors import BitmapdError, ExistsError, UsageError, explain
from bitmapd.media.transport import is_remote_path
from bitmapd.record import tool
from bitmapd.record.layout import InitialSync, Superblock, record_size_bytes
from bitmapd.record.points_state import PointsState
from bitmapd.units import human_size
from bitmapd.volume.sides import forget_copies
from dmctl.cli.checks import Findings, check
from dmctl.cli.context import Context, combine
from dmctl.cli.keeper import check_keeper, check_role
from dmctl.cli.pair import as_node, check_fencing
from dmctl.cli.plan import build_commands
from dmctl.cli.probe import keep_rules
from dmctl.cli.record import wipe
from dmctl.cli.withreceiver import check_points, notes_on_points
from dmctl.model.names import Layer, layer_name

OPTION_KEYS = (
    "primary", "secondary", "record", "attach", "listen", "extent_size", "block_size",
    "record_limit", "resync_target", "era_interval", "initial_sync", "predictor", "copy_rate",
    "late_writes",     "tls_certificates", "allow_plaintext_loopback", "metrics_listen",
    "node", "partner", "partner_listen", "partner_role", "record_on",
    "partner_ack", "record_fallback", "on_cut", "partner_name", "partner_record",
    "partner_fingerprint",
    "partner_certificates", "partner_timeout", "partner_wait", "serve", "fence_command",
    "fence_options",
    "fence_delay", "fence_timeout", "fence_aborts_io", "takeover", "cut_patience",
    "point_interval", "spool_limit", "spool", "spool_file_limit", "compress", "start_alone",
    "group",
)  # fmt: skip

_PATHS = {"primary", "record", "partner_record", "tls_certificates", "partner_certificates"}


def create(context: Context, args: Namespace) -> int:
    name = args.name
    doing = f"cannot create '{name}'"
    found = Findings(args.force)
    with found.collect():
        if context.paths.volume_file(check_name(name)).exists():
            found.errors.append(ExistsError(f"volume '{name}' exists already"))
    table = _table(args)
    config, problems = _configure(context, name, table)
    if problems:
        found.errors.append(ConfigError(problems))
    if config is not None:
        config = found.attempt(partial(_decided, config, table))
    with found.collect():
        check_points(table, config)
    with found.collect():
        check_fencing(table, config)
    with found.collect():
        check_role(args, table, config)
    if table.get("partner_role") == KEEPER:
        superblock = check_keeper(context, found, name, config, args)
    elif "primary" in table and "secondary" in table:
        superblock = check(context, found, name, table, config, joins=args.join)
    else:
        superblock = None
    if config is not None and superblock is not None:
        superblock = as_node(config, superblock, found.notes, joins=args.join)
        if has_receiver(config):
            superblock = superblock.with_points(PointsState())
    if found.errors or config is None or superblock is None:
        raise combine(found.errors, doing)
    plan = _plan(config, superblock, found)
    if not args.dry_run:
        if found.lost:
            context.output.confirm(
                f"this may overwrite the last good copy: {'; '.join(found.lost)}",
                f"Overwrite {config.secondary} with {config.primary}?",
                yes=args.yes,
            )
        try:
            _make(context, config, superblock, table)
        except OSError as error:
            raise combine([explain(error)], doing) from error
        keep_rules(context)
    if context.output.as_json:
        context.output.json("create", {"dry_run": args.dry_run, "volume": plan})
        return 0
    if args.dry_run:
        for label, value in plan.items():
            for item in value if isinstance(value, list) else [value]:
                context.output.line(f"{label:<20} {item}")
        return 0
    for note in plan["notes"]:
        context.output.say(f"note: {note}")
    what = f"a keeper of '{name}'" if is_keeper(config) else f"volume '{name}'"
    context.output.say(f"{what} is created; 'dmctl start {name}' starts it")
    return 0


# -- values -----------------------------------------------------------------------------------


def _table(args: Namespace) -> dict[str, Any]:
    """The volume's file as the options give it; paths become absolute, names of links stay."""
    table: dict[str, Any] = {"uuid": str(uuid4())}
    for key in OPTION_KEYS:
        value = getattr(args, key)
        if value is None:
            continue
        if key in _PATHS or (key == "secondary" and "://" not in value):
            value = os.path.abspath(value) if value else value
        table[key] = value
    return table


def _configure(
    context: Context, name: str, table: dict[str, Any]
) -> tuple[VolumeConfig | None, list[Problem]]:
    defaults, problems = load_defaults(context.paths)
    listen = context.paths.default_listen(name)
    config, found = build_volume(name, table, defaults, "command line", listen)
    options = [
        Problem(
            problem.file,
            ", ".join(f"--{key.replace('_', '-')}" for key in (problem.key or "").split(", ")),
            problem.message,
            problem.hint,
        )
        for problem in found
    ]
    return config, problems + options


def _decided(config: VolumeConfig, table: dict[str, Any]) -> VolumeConfig:
    """What is `auto` and stays as it is when the volume is created, whatever the machine has later:
    how it is attached, and its block."""
    config = _with_attach(config, table)
    block_bytes = effective_block_size_bytes(config)
    is_auto = config.block_size_bytes is None
    if is_auto and block_bytes > BLOCK_BYTES and is_remote_path(config.secondary):
        block_bytes = BLOCK_BYTES
    return dataclasses.replace(config, block_size_bytes=block_bytes)


def _with_attach(config: VolumeConfig, table: dict[str, Any]) -> VolumeConfig:
    if config.attach == "auto" and "listen" in table:  # an export was asked for
        return dataclasses.replace(config, attach="nbd")
    config = resolved(config)
    if config.attach == "dm":
        layer_name(config.name, Layer.ERA)  # refuses what begins like an inner device
    if config.attach == "dm" and "listen" in table:
        raise UsageError(
            "--listen is for --attach nbd: with dm hosts use /dev/mapper/" + config.name,
            hint="leave one of the two out",
        )
    return config


# -- doing it ---------------------------------------------------------------------------------


def _plan(config: VolumeConfig, superblock: Superblock, found: Findings) -> dict[str, Any]:
    geometry = superblock.geometry
    limit = effective_record_limit_bytes(config, geometry.size_bytes)
    notes = list(found.notes)
    own_limit = config.resync_target_s is not None or config.record_limit_bytes is not None
    if not (own_limit or is_keeper(config)):
        notes.append(f"the record is limited to {human_size(limit)}; see --record-limit")
    notes += notes_on_points(config)
    return {
        "name": config.name,
        "uuid": str(config.uuid),
        "primary": config.primary,
        "secondary": config.secondary,
        "record": config.record,
        "size_bytes": geometry.size_bytes,
        "size": human_size(geometry.size_bytes),
        "extent_size_bytes": geometry.extent_bytes,
        "block_size_bytes": geometry.block_bytes,
        "extents": geometry.extents,
        "record_size_bytes": record_size_bytes(geometry.extents),
        "record_limit_bytes": None if config.resync_target_s is not None else limit,
        "resync_target_seconds": config.resync_target_s,
        "initial_sync": config.initial_sync,
        "commands": build_commands(config, geometry) if config.attach == "dm" else [],
        "attach": config.attach,
        "device": device_of(config),
        "listen": None if config.attach == "dm" else config.listen,
        "overwritten": [*found.overridden, *found.lost],
        "notes": notes,
    }


def _make(
    context: Context, config: VolumeConfig, superblock: Superblock, table: dict[str, Any]
) -> None:
    # What was given stands in the file as it is understood; geometry is fixed from now on.
    pinned = {*table, "extent_size", "block_size"}
    if not is_keeper(config):
        pinned.add("attach")
    kept = {key: value for key, value in render(config, pinned).items() if key in pinned}
    ones = superblock.initial_sync is not InitialSync.NONE
    # The checks above said what may be overwritten; the tool's own look again would know less.
    tool.format_record(config.record, superblock, ones=ones, force=True)
    try:
        create_volume(context.paths, config.name, kept)
    except (BitmapdError, OSError):
        # A record of a volume that does not exist would be in somebody's way.
        with suppress(BitmapdError, OSError):
            wipe(config)
        raise
    if superblock.secondary:
        forget_copies(context.paths, superblock.secondary)
