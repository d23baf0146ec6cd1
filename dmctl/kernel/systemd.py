"""Files by which udev and systemd know of this host's volumes (edge).

`update` makes them from the configuration: the rules of dmctl/model/udev.py, and for each volume
and receiver a drop-in of its unit that says what it comes after, and which mounts come after it.
Only the configuration in /etc/dmctl is the host's; for any other folder nothing is written.

1. Each file is replaced whole.  A crash between two of them leaves older ones, which the next
   `update` mends.
2. A volume or receiver whose configuration cannot be read keeps the rules it had: what they hid
   stays hidden.
3. udev looks at the media again when the rules have changed, so that what is hidden disappears at
   once, and what is no longer a medium comes back.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bitmapd.config import (
    Paths,
    ReceiverConfig,
    VolumeConfig,
    atomic_write,
    load_any,
    unit_instance,
    volume_names,
)
from bitmapd.errors import BitmapdError
from dmctl.model import udev
from dmctl.model.assembly import local_media

ETC = Path("/etc")
UDEV_RUNS = Path("/run/udev/control")
SYSTEMD_RUNS = Path("/run/systemd/system")  # sd_booted(3)
RULES = Path("udev/rules.d") / udev.FILE_NAME
DROP_IN_NAME = "50-dmctl.conf"
COMMAND_TIMEOUT_S = 30
# What needs a file system or the network itself.
_LATE = "After=local-fs.target network.target"


@dataclass(slots=True)
class Outcome:
    """What `update` did, and what it could not do."""

    written: list[Path] = field(default_factory=list)
    problems: list[BitmapdError] = field(default_factory=list)


def media_of(config: VolumeConfig | ReceiverConfig) -> list[udev.Medium]:
    """What is waited for, and the record of which a promoted receiver will make use."""
    media, at_boot = local_media(config), True
    if isinstance(config, VolumeConfig):
        at_boot = config.start_at_boot
    elif config.promoted_record is not None:
        media["record"] = config.promoted_record
    return [udev.Medium(config.name, role, path, at_boot) for role, path in media.items()]


def drop_in(config: VolumeConfig | ReceiverConfig) -> str:
    """Which mounts come after the volume is up, and end before it is stopped.

    A device of device-mapper is there before any file system is mounted.  What needs a file system
    or the network itself comes later: mounts upon it are marked _netdev.  Nothing is mounted from a
    receiver.
    """
    files = [path for path in local_media(config).values() if udev.device_name(path) is None]
    lines = [f"RequiresMountsFor={_quoted(path)}" for path in files]
    if isinstance(config, ReceiverConfig):
        lines += [_LATE]
    elif files or config.attach == "nbd":
        lines += [_LATE, *_before("remote-fs-pre.target")]
    else:
        lines += _before("local-fs-pre.target")
    return "\n".join(["# Written by dmctl: changes here are lost.", "[Unit]", *lines, ""])


def _before(target: str) -> list[str]:
    return [f"Before={target}", f"Wants={target}"]


def _quoted(path: str) -> str:
    escaped = path.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


def is_host(paths: Paths, etc: Path = ETC) -> bool:
    """Whether this configuration is the one that udev and systemd are to know."""
    return paths.config_dir == etc / "dmctl"


def rules(paths: Paths, old: str = "") -> tuple[str, list[BitmapdError]]:
    """The rules of all there are; of one that cannot be read, the lines it has in `old`."""
    media: list[udev.Medium] = []
    problems: list[BitmapdError] = []
    kept: list[str] = []
    for name in volume_names(paths):
        try:
            found = media_of(load_any(paths, name))
        except BitmapdError as error:
            problems.append(error)
            kept += udev.lines_of(old, name)
            continue
        media += found
        problems += [problem for medium in found if (problem := udev.objection(medium))]
    return udev.render(media, kept), problems


def update(paths: Paths, also: Iterable[str] = (), *, etc: Path = ETC) -> Outcome:
    """Bring the files up to date.  `also` names media that have ceased to be ones."""
    outcome = Outcome()
    if not is_host(paths, etc):
        return outcome
    units = etc / "systemd/system"
    if units.is_dir():
        _update_drop_ins(paths, units, outcome)
    if not (etc / "udev").is_dir():
        return outcome
    path = etc / RULES
    old = _read(path)
    text, problems = rules(paths, old)
    outcome.problems += problems
    if text != old:
        atomic_write(path, text, mode=0o644)
        outcome.written.append(path)
        _look_again(dict.fromkeys([*_all_media(paths), *also]), outcome)
    return outcome


def _update_drop_ins(paths: Paths, units: Path, outcome: Outcome) -> None:
    before = len(outcome.written)
    wanted: dict[Path, str | None] = dict.fromkeys(
        units.glob(f"bitmapd@*.service.d/{DROP_IN_NAME}")
    )
    for name in volume_names(paths):
        path = units / f"bitmapd@{unit_instance(name)}.service.d" / DROP_IN_NAME
        try:
            wanted[path] = drop_in(load_any(paths, name))
        except BitmapdError:  # `rules` tells of it
            wanted.pop(path, None)
    for path, text in wanted.items():
        if text is None:
            path.unlink()
            with_others = any(path.parent.iterdir())
            if not with_others:
                path.parent.rmdir()
            outcome.written.append(path)
        elif _read(path) != text:
            atomic_write(path, text, mode=0o644)
            outcome.written.append(path)
    if len(outcome.written) > before and SYSTEMD_RUNS.is_dir():
        _run(["systemctl", "daemon-reload"], outcome)


def _all_media(paths: Paths) -> list[str]:
    found: list[str] = []
    for name in volume_names(paths):
        try:
            found += [medium.path for medium in media_of(load_any(paths, name))]
        except BitmapdError:
            continue  # `rules` tells of it
    return found


def _look_again(media: Iterable[str], outcome: Outcome) -> None:
    """Have udev read its rules, and apply them to these devices."""
    if not UDEV_RUNS.exists():
        return
    _run(["udevadm", "control", "--reload"], outcome)
    for path in media:
        try:
            found = os.stat(path)
            if stat.S_ISBLK(found.st_mode):
                number = f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
                Path("/sys/dev/block", number, "uevent").write_text("change")
        except FileNotFoundError:
            continue  # udev sees it when it appears
        except OSError as error:
            outcome.problems.append(
                BitmapdError(f"udev cannot look at {path} again: {error.strerror}")
            )


def _run(command: list[str], outcome: Outcome) -> None:
    program = shutil.which(command[0], path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        return
    try:
        answer = subprocess.run(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=COMMAND_TIMEOUT_S,
        )
        why = answer.stderr.decode(errors="replace").strip() if answer.returncode else ""
        failed = answer.returncode != 0
    except subprocess.TimeoutExpired:
        failed, why = True, f"no answer in {COMMAND_TIMEOUT_S} s"
    if failed:
        outcome.problems.append(BitmapdError(f"'{' '.join(command)}' failed: {why}"))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
