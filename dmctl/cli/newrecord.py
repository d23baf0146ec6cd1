"""`record replace`: a node of a pair gets a new record; the partner knows what the old one named.

The new one names nothing, and the flag VOLATILE says that this is not all: the node learns from a
partner that has lived, and two that both begin anew compare everything.  Node 1 keeps the pair's
UUID, which is that of its configuration; node 2 joins again.
"""

from __future__ import annotations

import dataclasses
import os
import time
from argparse import Namespace
from uuid import uuid4

from bitmapd.config import (
    VolumeConfig,
    change_volume,
    effective_block_size_bytes,
    is_keeper,
    load_volume,
)
from bitmapd.errors import BitmapdError, UsageError, WrongStateError
from bitmapd.record import tool
from bitmapd.record.geometry import Geometry
from bitmapd.record.layout import Superblock
from bitmapd.record.pair_state import PairFlag, PairState, PartnerAck, RecordOn
from dmctl.cli.checks import Findings, check_free, check_others, check_record, identified
from dmctl.cli.context import Context, combine
from dmctl.cli.processes import is_running, start_lock


def replace(context: Context, args: Namespace) -> int:
    name, paths = args.name, context.paths
    old = load_volume(paths, name)
    config = dataclasses.replace(old, record=os.path.abspath(args.device))
    if old.node is None or is_keeper(old):
        raise UsageError(
            f"volume '{name}' has no partner that knows what its record named"
            if old.node is None
            else f"'{name}' keeps the record of another node, and has none of its own media",
            hint="see 'The record is lost' in docs/recovery.md"
            if old.node is None
            else f"'dmctl remove {name}', then create it again",
        )
    with start_lock(paths, name):
        if is_running(paths, name):
            raise WrongStateError(
                f"volume '{name}' runs: its record can be replaced while it is stopped",
                hint=f"'dmctl stop {name}', with --now if the record's device does not let it",
            )
        found = Findings(args.force)
        superblock = _new(old, config)
        identity = found.attempt(lambda: identified("record", config.record))
        if identity is not None:
            check_free(found, "record", config.record, identity, config)
            check_record(context, found, config, identity, superblock.geometry)
        media, known = {"record": config.record}, {"record": identity}
        check_others(context, found, media, known, but=(name, "record"))
        if found.errors:
            raise combine(found.errors, f"cannot replace the record of '{name}'")
        tool.format_record(config.record, superblock, ones=False, force=True)
        change_volume(paths, config, ["record"])
        # What this host remembers is of the old record, and would refuse this one.
        paths.state_file(config.uuid).unlink(missing_ok=True)
    context.output.say(
        f"volume '{name}' has a new record, {config.record}; 'dmctl start {name}' starts it, and"
        " the partner says what differs"
    )
    if context.output.as_json:
        context.output.json("record replace", {"volume": name, "record": config.record})
    return 0


def _new(old: VolumeConfig, config: VolumeConfig) -> Superblock:
    primary, secondary = (identified(key, getattr(old, key)) for key in ("primary", "secondary"))
    pair = PairState(
        node=old.node or 0,
        volume=old.uuid if old.node == 1 else None,
        flags=PairFlag.VOLATILE if old.node == 1 else PairFlag.VOLATILE | PairFlag.NEVER_PAIRED,
        record_on=RecordOn[old.record_on.upper()],
        partner_ack=PartnerAck[old.partner_ack.upper()],
    )
    return Superblock(
        volume_uuid=config.uuid,
        name=config.name,
        geometry=_geometry(old, primary.size_bytes or 0),
        generations=(uuid4(),),
        primary=primary.text,
        primary_size_bytes=primary.size_bytes or 0,
        secondary=secondary.text,
        secondary_size_bytes=secondary.size_bytes or 0,
        created_s=int(time.time()),
        updated_s=int(time.time()),
        session=1,  # as after a process that died: what it had sent may land late
    ).with_pair(pair)


def _geometry(old: VolumeConfig, size_bytes: int) -> Geometry:
    """That of the old record, as far as it can be read: the primary may have grown since."""
    try:
        found = tool.probe(old.record)
    except BitmapdError:
        found = None
    if found is not None and found.volume_uuid == old.uuid:
        return found.geometry
    return Geometry(size_bytes, old.extent_size_bytes, effective_block_size_bytes(old))
