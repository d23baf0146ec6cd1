"""Debian's own kernel for the lab, kept out of the way of the machine it is tested on.

The package is downloaded with apt and unpacked into `.venv/vm-kernel/RELEASE/`: nothing below
/boot or /lib/modules of this machine changes.  What the lab never loads (graphics, sound, wireless
and the like, four fifths of the package) is left out.  The folder appears in one rename, so that
an interrupted download leaves nothing that could be taken for a kernel.  Remove the folder to get
the distribution's newest kernel again.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
CACHE = CHECKOUT / ".venv" / "vm-kernel"
META_PACKAGE = "linux-image-amd64"
_IMAGE = re.compile(r"^Depends:.*?\b(linux-image-\d[\w.+-]*-amd64)\b", re.MULTILINE)
_LEFT_OUT = (
    "sound",
    *(f"drivers/{name}" for name in ("gpu", "hid", "hwmon", "iio", "infiniband", "input", "media")),
    *(f"drivers/{name}" for name in ("net/ethernet", "net/wireless", "platform", "staging", "usb")),
)
_DOWNLOAD_S = 600


class VmUnavailable(Exception):
    """The lab cannot run on this machine; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Kernel:
    release: str
    image: Path
    modules: Path
    """What belongs at /lib/modules/RELEASE."""


def ready() -> Kernel:
    """The newest kernel in the cache, downloaded first if there is none."""
    return _cached() or _download()


def _cached() -> Kernel | None:
    for folder in sorted(CACHE.glob("[0-9]*"), reverse=True):
        release = folder.name
        return Kernel(release, folder / f"vmlinuz-{release}", folder / "modules" / release)
    return None


def _download() -> Kernel:
    for tool in ("apt-get", "dpkg-deb", "depmod"):
        if shutil.which(tool) is None:
            raise VmUnavailable(f"{tool} is needed to unpack Debian's kernel and is not there")
    package = _package()
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new", dir=CACHE) as name:
        folder = Path(name)
        # As root apt would fetch as a user of its own, who may not write here.
        _call(["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package], folder)
        _unpack(next(folder.glob("*.deb")), folder / "tree")
        image = next((folder / "tree" / "boot").glob("vmlinuz-*"))
        release = image.name.removeprefix("vmlinuz-")
        _call(["depmod", "-b", str(folder / "tree"), release], folder)
        made = folder / release
        made.mkdir()
        image.rename(made / image.name)
        (folder / "tree" / "lib" / "modules").rename(made / "modules")
        try:
            made.rename(CACHE / release)
        except OSError:
            # Somebody else was quicker; theirs is the same.
            if not (CACHE / release).is_dir():
                raise
    found = _cached()
    if found is None:
        raise VmUnavailable(f"{CACHE} holds no kernel although one was put there")
    return found


def _package() -> str:
    """The package that the distribution's meta package stands for today."""
    for attempt in range(2):
        shown = subprocess.run(
            ["apt-cache", "--no-all-versions", "show", META_PACKAGE],
            capture_output=True,
            text=True,
            check=False,
        )
        match = _IMAGE.search(shown.stdout)
        if match is not None:
            return match[1]
        if attempt == 0 and os.geteuid() == 0:
            _call(["apt-get", "-q", "update"], Path("/"))
    raise VmUnavailable(f"apt knows no package {META_PACKAGE}; run apt-get update as root")


def _unpack(package: Path, into: Path) -> None:
    into.mkdir()
    skipped = [f"--exclude=./lib/modules/*/kernel/{part}" for part in _LEFT_OUT]
    tar = ["tar", "-x", "-C", str(into), "--no-same-owner", *skipped, "./boot", "./lib/modules"]
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=-1) as source:
        done = subprocess.run(tar, stdin=source.stdout, check=False)
    if done.returncode or source.returncode:
        raise VmUnavailable(f"{package.name} could not be unpacked into {into}")


def _call(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_DOWNLOAD_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise VmUnavailable(f"{command[0]} took more than {_DOWNLOAD_S} s") from None
    if done.returncode:
        raise VmUnavailable(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
