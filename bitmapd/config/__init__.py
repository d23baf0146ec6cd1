"""Configuration: TOML files into frozen values, and the manual of what may stand in them.

`CONFIG_DIR/dmctl.toml` holds defaults for all volumes in a table `[defaults]`;
`CONFIG_DIR/volumes/NAME.toml` holds one volume as a flat table.  A value in the volume's file wins
over one in `dmctl.toml`, which wins over the built-in default.  `VolumeConfig` is the manual: each
field carries the key it is written as, its kind, its default and its explanation, and parser,
`dmctl config show --explain` and `dmctl set` all read them from there.

1. Nothing is ignored: an unknown key is an error that names the nearest known one.
2. All errors are found before any is reported: `ConfigError.problems` lists them with file and key.
3. A volume is judged by its own file and `dmctl.toml` alone, so that a mistake in one volume's file
   never keeps another volume from starting.  `load_all` judges all of them, and against each other.
4. `record_limit` and `resync_target` exclude each other.  Setting one of them in a more specific
   place withdraws the other one inherited from a less specific place.
5. Values from the command line pass through the same parsers as those from files.

Reading follows no symbolic link at the last component and refuses files above 1 MiB, and what is
nested deeper than Python's stack.  A written
file appears whole or not at all, and is durable when the call returns.
"""

from __future__ import annotations

from bitmapd.config.files import (
    Paths,
    atomic_write,
    change_volume,
    create_volume,
    load_all,
    load_any,
    load_defaults,
    load_volume,
    remove_volume,
    volume_names,
)
from bitmapd.config.kinds import (
    check_name,
    from_unit_instance,
    is_loopback,
    parse_metrics_listen,
    unit_instance,
)
from bitmapd.config.problems import ConfigError, Problem, nearest
from bitmapd.config.receiver import (
    ReceiverConfig,
    build_receiver,
    receiver_keys,
    render_receiver,
)
from bitmapd.config.tables import build_volume, changed, parse_table, render
from bitmapd.config.volume import (
    Key,
    VolumeConfig,
    device_of,
    effective_block_size_bytes,
    effective_cut_patience_s,
    effective_era_intervals_s,
    effective_fence_delay_s,
    effective_record_limit_bytes,
    has_receiver,
    is_keeper,
    keys,
    taken_up,
)

__all__ = [
    "ConfigError",
    "Key",
    "Paths",
    "Problem",
    "ReceiverConfig",
    "VolumeConfig",
    "atomic_write",
    "build_receiver",
    "build_volume",
    "change_volume",
    "changed",
    "check_name",
    "create_volume",
    "device_of",
    "effective_block_size_bytes",
    "effective_cut_patience_s",
    "effective_era_intervals_s",
    "effective_fence_delay_s",
    "effective_record_limit_bytes",
    "from_unit_instance",
    "has_receiver",
    "is_keeper",
    "is_loopback",
    "keys",
    "load_all",
    "load_any",
    "load_defaults",
    "load_volume",
    "nearest",
    "parse_metrics_listen",
    "parse_table",
    "receiver_keys",
    "remove_volume",
    "render",
    "render_receiver",
    "taken_up",
    "unit_instance",
    "volume_names",
]
