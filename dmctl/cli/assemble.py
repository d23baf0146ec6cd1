"""assemble: start volumes whose media are there, and say what the others wait for."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from bitmapd.config import VolumeConfig, load_any
from dmctl.cli.context import Context, each, selected
from dmctl.cli.media import listed, missing_media
from dmctl.cli.processes import is_running, launch, start_lock
from dmctl.model.assembly import NEEDED


def assemble(context: Context, args: Namespace) -> int:
    names = selected(context, args, default_all=False)
    if args.wait:
        from dmctl.cli.monitor import wait_for  # noqa: PLC0415  (needs udev)

        return wait_for(context, names, patience_s=args.patience)

    def one(name: str) -> dict[str, Any]:
        config = load_any(context.paths, name)
        if args.all and isinstance(config, VolumeConfig) and not config.start_at_boot:
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
