"""What `create` checks of a keeper, which has a record and no media, and of a node that joins."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from typing import Any
from uuid import uuid4

from bitmapd.config import VolumeConfig, effective_block_size_bytes, is_keeper
from bitmapd.errors import UsageError
from bitmapd.record.geometry import Geometry
from bitmapd.record.layout import InitialSync, RecordFlag, Superblock
from bitmapd.units import parse_size
from dmctl.cli.checks import Findings, check_free, check_others, check_record, identified
from dmctl.cli.context import Context

# Options of `create` that say how hosts are served and what is copied.
_OF_HOSTS = (
    "attach", "listen", "record_limit", "resync_target", "era_interval", "initial_sync",
    "predictor", "copy_rate", "late_writes", "fence_command", "fence_options", "fence_delay",
    "fence_timeout", "fence_aborts_io", "takeover", "cut_patience", "allow_plaintext_loopback",
)  # fmt: skip


def check_role(args: Namespace, table: Mapping[str, Any], config: VolumeConfig | None) -> None:
    """UsageError for options that do not go with what this node is to be."""
    if config is None:
        return
    if is_keeper(config):
        wrong = [f"--{key.replace('_', '-')}" for key in _OF_HOSTS if key in table]
        if args.join:
            wrong.append("--join")
        if wrong:
            raise UsageError(
                f"{', '.join(wrong)}: for nodes that serve hosts, not for a keeper",
                hint="leave it out" if len(wrong) == 1 else "leave them out",
            )
    elif args.size is not None:
        raise UsageError("--size is for a keeper: the size of a volume is that of its primary")
    elif args.join and config.node != 1:
        raise UsageError(
            "--join is for node 1 of a pair"
            + ("; node 2 joins by itself" if config.node == 2 else ""),
        )


def check_keeper(
    context: Context, found: Findings, name: str, config: VolumeConfig | None, args: Namespace
) -> Superblock | None:
    """Everything that can be known before the record is written; None if a part is missing."""
    media = {"record": str(args.record)}
    record = found.attempt(partial(identified, "record", args.record))
    with found.collect():
        context.paths.run_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
    if record is not None:
        check_free(found, "record", args.record, record, config)
    check_others(context, found, media, {"record": record})
    if args.size is None:
        found.errors.append(
            UsageError(
                "--size is missing: a keeper has no primary to learn it from",
                hint="'dmctl --json status' at node 1 has it as size_bytes",
            )
        )
    if config is None or args.size is None:
        return None
    with found.collect():
        geometry = Geometry(
            parse_size(args.size), config.extent_size_bytes, effective_block_size_bytes(config)
        )
        if record is not None and not record.read_only:
            check_record(context, found, config, record, geometry)
        now_s = int(time.time())
        return Superblock(
            volume_uuid=config.uuid,
            name=name,
            geometry=geometry,
            generations=(uuid4(),),
            primary="",
            primary_size_bytes=geometry.size_bytes,
            secondary="",
            secondary_size_bytes=geometry.size_bytes,
            created_s=now_s,
            updated_s=now_s,
            flags=RecordFlag(0),
            initial_sync=InitialSync.NONE,
        )
    return None
