"""What `create` does for one of two appliances.

Either node is created by the same command, with its number and a record of its own.  Node 1 is the
volume: its record has everything to be copied first, and it serves without a partner until it has
met one.  Node 2 joins: its record names nothing, knows no volume yet, and it serves nobody before
it has met node 1.  So does a new node 1 in the place of one that is lost with its record.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from bitmapd.config import VolumeConfig, has_receiver, is_keeper
from bitmapd.errors import UsageError
from bitmapd.record.layout import InitialSync, RecordFlag, Superblock
from bitmapd.record.pair_state import PairFlag, PairState, PartnerAck, RecordOn


def check_fencing(table: Mapping[str, Any], config: VolumeConfig | None) -> None:
    """UsageError for what `create` was told of fencing and cannot come true."""
    if config is None:
        return
    for key in ("fence_command", "takeover", "cut_patience"):
        waits = key == "cut_patience" and has_receiver(config)
        if config.node is None and key in table and not waits:
            option = "--" + key.replace("_", "-")
            raise UsageError(f"{option} is for one of two appliances", hint="give --node, too")
    if config.fence_command is not None and (found := fence_problem(config.fence_command)):
        raise UsageError(f"--fence-command {config.fence_command} {found[0]}", hint=found[1])


def fence_problem(path: str) -> tuple[str, str] | None:
    """Why it cannot be run as a fence command, and what to do; None if it can, as far as can be
    seen."""
    if not os.path.exists(path):
        return "is not there", "install it on this node, or name another"
    if not os.path.isfile(path):
        return "is no file", "name the program itself"
    if not os.access(path, os.X_OK):
        return "may not be executed", f"chmod +x {path}"
    return None


def as_node(
    config: VolumeConfig, superblock: Superblock, notes: list[str], *, joins: bool = False
) -> Superblock:
    """The superblock of this node; as it is for a single appliance.  Node 2 always joins, node 1
    if it takes the place of one that is lost."""
    if config.node is None:
        return superblock
    joins = joins or config.node == 2
    volume = None if joins else superblock.volume_uuid
    state = PairState(
        node=config.node,
        volume=volume,
        flags=PairFlag.NEVER_PAIRED,
        record_on=RecordOn[config.record_on.upper()],
        partner_ack=PartnerAck[config.partner_ack.upper()],
    )
    if joins and config.node == 1:
        notes.append(
            "the node that was node 1 must never run again: it would write beside this one"
        )
    elif joins and not is_keeper(config):
        notes.append("node 2 copies nothing at first: node 1 makes the secondary equal")
    if joins:
        superblock = dataclasses.replace(
            superblock, flags=RecordFlag(0), initial_sync=InitialSync.NONE
        )
    return superblock.with_pair(state)
