"""assemble: start volumes whose media are there, and say what the others wait for."""

from __future__ import annotations

import os
import stat
from argparse import Namespace
from pathlib import Path
from typing import Any

from bitmapd.config import Paths, VolumeConfig, load_volume
from dmctl.cli.context import Context, each, selected
from dmctl.cli.processes import is_running, launch, start_lock
from dmctl.model.assembly import NEEDED, local_media


def present(path: str) -> bool:
    """Whether a medium is there: a file, or a block device that has a size by now."""
    try:
        found = os.stat(path)
        if stat.S_ISREG(found.st_mode):
            return True
        if not stat.S_ISBLK(found.st_mode):
            return False
        number = f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
        return int(Path("/sys/dev/block", number, "size").read_text()) > 0
    except (OSError, ValueError):
        return False


def missing_media(config: VolumeConfig) -> dict[str, str]:
    """Role -> path of what is not there."""
    return {role: path for role, path in local_media(config).items() if not present(path)}


def listed(missing: dict[str, str]) -> str:
    """Such as `its primary /dev/x and its record /dev/y`."""
    return " and ".join(f"its {role} {path}" for role, path in missing.items())


def assemble(context: Context, args: Namespace) -> int:
    names = selected(context, args, default_all=False)
    if args.wait:
        from dmctl.cli.monitor import wait_for  # noqa: PLC0415  (needs udev)

        return wait_for(context, names, patience_s=args.patience)

    def one(name: str) -> dict[str, Any]:
        config = load_volume(context.paths, name)
        if args.all and not config.start_at_boot:
            return {"result": "not wanted", "missing": []}
        missing = missing_media(config)
        with start_lock(context.paths, name):
            if is_running(context.paths, name):
                result = "running"
            elif missing.keys() & NEEDED or (missing and not args.degraded):
                result = "waiting"
            else:
                launch(context.paths, name, args.timeout)
                result = "started"
        _tell(context, name, result, missing)
        rows = [{"role": role, "path": path} for role, path in missing.items()]
        return {"result": result, "missing": rows}

    return each(context, "assemble", names, "assemble", one)


def _tell(context: Context, name: str, result: str, missing: dict[str, str]) -> None:
    if result == "waiting":
        text = f"volume '{name}' waits for {listed(missing)}"
        if not missing.keys() & NEEDED:
            text += "; --degraded starts it without"
    elif result == "running":
        text = f"volume '{name}' runs already"
    else:
        text = f"volume '{name}' is started" + (f" without {listed(missing)}" if missing else "")
    context.output.say(text)


def start_command(paths: Paths, name: str) -> list[str]:
    """The words that start a volume as `dmctl start` does; the interpreter comes before them."""
    folders = ["--config-dir", str(paths.config_dir), "--run-dir", str(paths.run_dir)]
    return ["-P", "-m", "dmctl", *folders, "--json", "start", name]
