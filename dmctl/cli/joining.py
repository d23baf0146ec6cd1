"""A volume of one appliance becomes one of a pair."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitmapd.config import (
    VolumeConfig,
    changed,
    effective_block_size_bytes,
    keys,
    load_volume,
)
from bitmapd.config.tables import OF_A_PAIR
from bitmapd.config.volume import BLOCK_BYTES
from bitmapd.errors import UsageError, WrongStateError
from bitmapd.media.identity import identify
from bitmapd.units import format_size
from bitmapd.volume.conversion import become_first
from dmctl.cli.context import Context
from dmctl.cli.processes import start_lock


def become_pair(context: Context, name: str, changes: Mapping[str, Any]) -> list[str]:
    """Make a stopped volume node 1; returns notes."""
    config = load_volume(context.paths, name)
    if config.node is not None:
        raise WrongStateError(
            f"volume '{name}' is node {config.node} of a pair already",
            hint=f"edit {context.paths.volume_file(name)} to change where the partner is",
        )
    paired = changed(config, changes, also=_pair_keys())
    if paired.node != 1:
        raise UsageError(
            f"node={changes['node']}: a volume that has data is node 1 of a pair",
            hint="'dmctl create … --node 2' makes the other one, whose record names nothing",
        )

    def emit(event: str, **fields: Any) -> None:
        context.output.say(str(fields.get("message", event)))

    notes = [*_block(paired), *_unstable(paired)]  # an error of these changes nothing
    with start_lock(context.paths, name):
        become_first(config, paired, changes, context.paths, emit)
    for note in notes:
        context.output.say(f"note: {note}")
    return notes


def _block(config: VolumeConfig) -> list[str]:
    size_bytes = effective_block_size_bytes(config)
    if size_bytes == BLOCK_BYTES:
        return []
    return [f"create node 2 with --block-size {format_size(size_bytes)}: both have the same block"]


def _pair_keys() -> list[str]:
    """What only a pair has a use for."""
    names = [key.name for key in keys().values()]
    of_one_word = ("node", "takeover", "cut_patience", *OF_A_PAIR)
    return [name for name in names if name in of_one_word or name.startswith(("partner", "fence"))]


def _unstable(config: VolumeConfig) -> list[str]:
    found = {"primary": identify(config.primary), "secondary": identify(config.secondary)}
    return [
        f"both nodes compare what they call {key}: {identity.text!r} has to be the same there"
        for key, identity in found.items()
        if not identity.stable
    ]
