"""Whether a volume can be attached with device-mapper on this machine (edge; changes nothing)."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import stat
from pathlib import Path

from bitmapd.attach.helper import HELPER_MODULE
from bitmapd.config import VolumeConfig, has_receiver
from bitmapd.errors import UsageError

# A kernel's modules by name, with what they are needed for.
MODULES = ("dm_mod", "dm_era", "dm_delay", "nbd", "zram")


def _missing_modules() -> list[str]:
    """Modules that are neither loaded, nor built in, nor to be found for the running kernel."""
    wanted = {name for name in MODULES if not Path("/sys/module", name).exists()}
    folder = Path("/lib/modules", os.uname().release)
    for index in ("modules.dep", "modules.builtin"):
        try:
            text = (folder / index).read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        there = {
            line.partition(":")[0].rpartition("/")[2].partition(".")[0].replace("-", "_")
            for line in text.splitlines()
        }
        wanted -= there
    return sorted(wanted)


def why_not_dm(primary: str) -> str | None:
    """The first reason against device-mapper, or None if there is none."""
    try:
        if not stat.S_ISBLK(os.stat(primary).st_mode):
            return f"primary {primary} is not a block device"
    except OSError as error:
        return f"primary {primary}: {error.strerror}"
    missing = _missing_modules()
    if missing:
        return f"the kernel has no {', '.join(missing)}"
    if os.geteuid() != 0:
        return "only root can make devices"
    if importlib.util.find_spec(HELPER_MODULE.partition(".")[0]) is None:
        return "dmctl is not installed"
    return None


def resolved(config: VolumeConfig) -> VolumeConfig:
    """The configuration with `auto` decided; UsageError if dm is asked for and cannot be had."""
    if config.attach == "nbd":
        return config
    if config.attach == "auto" and (config.node is not None or has_receiver(config)):
        # Hosts that ask a partner, or wait for a cut, have to come through the gate.
        return dataclasses.replace(config, attach="nbd")
    reason = why_not_dm(config.primary)
    if config.attach == "auto":
        return dataclasses.replace(config, attach="nbd" if reason else "dm")
    if reason:
        raise UsageError(f"attach = dm cannot be had: {reason}", hint="use --attach nbd")
    return config
