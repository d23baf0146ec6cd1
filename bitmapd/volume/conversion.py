"""A stopped volume of one appliance becomes node 1 of a pair, or a node a single appliance.

Only the superblock and the configuration change, in this order; what the record names stays, and
with it what has to be copied.  A node may become single only if it knows everything that the other
has written, which its process says (`Paired.refuse_unless_complete`) before it stops.

A crash in between leaves a record and a configuration that contradict one another: a start is
refused, and the same command goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from bitmapd.config import Paths, VolumeConfig, change_volume
from bitmapd.config.tables import OF_A_PAIR
from bitmapd.record import tool
from bitmapd.record.pair_state import PairFlag, PairState, PartnerAck, RecordOn
from bitmapd.volume.session import RecordSession

Emit = Callable[..., None]

_SINGLE: dict[str, Any] = {  # what is refused, or has no use, without a partner
    "node": None,
    "partner": None,
    "partner_listen": None,
    "takeover": "manual",
    "fence_command": None,
    **OF_A_PAIR,
}


def become_first(
    config: VolumeConfig, paired: VolumeConfig, changes: Iterable[str], paths: Paths, emit: Emit
) -> None:
    """Of a single appliance: be node 1 of a pair.  `config` is what it was, and `paired` what these
    keys make of it.  Every BitmapdError of a start, such as for a primary that was written."""
    state = PairState(
        1,
        config.uuid,
        PairFlag.NEVER_PAIRED,
        record_on=RecordOn[paired.record_on.upper()],
        partner_ack=PartnerAck[paired.partner_ack.upper()],
    )
    _convert(config, state, paths, emit)
    change_volume(paths, paired, changes)


def become_single(config: VolumeConfig, paths: Paths, emit: Emit) -> None:
    """Of a node of a pair: be a single appliance."""
    _convert(config, None, paths, emit)
    change_volume(paths, dataclasses.replace(config, **_SINGLE), _SINGLE)


def is_of_a_pair(config: VolumeConfig) -> bool:
    """Whether the record says so."""
    return tool.load(config.record).superblock.pair is not None


def _convert(config: VolumeConfig, state: PairState | None, paths: Paths, emit: Emit) -> None:
    """Nothing is done where it has been done before."""
    if is_of_a_pair(config) == (state is not None):
        return
    session = RecordSession(config, paths, emit, node=config.node)
    try:
        session.convert(state)
    finally:
        session.close()
