"""The initial RAM disk of the lab: busybox, the modules that reach the root, one script.

An uncompressed cpio archive ("newc"), made anew for every boot in some milliseconds.
"""

from __future__ import annotations

import shlex
import shutil
import stat
from pathlib import Path

from tests.vm.kernel import Kernel, VmUnavailable

INIT = Path(__file__).with_name("init.sh")
# crc32c_generic: ext4 asks for it by the name of the algorithm, of which modules.dep knows nothing.
NEEDED = (
    *("virtio_pci", "virtio_blk", "virtio_console"),
    *("9p", "9pnet_virtio", "overlay", "crc32c_generic", "ext4"),
)


def build(kernel: Kernel, settings: dict[str, str]) -> bytes:
    """`settings` are shell variables for the script."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise VmUnavailable("busybox is not there; install the package busybox-static")
    modules = module_order(kernel.modules, NEEDED)
    assignments = "".join(f"{key}={shlex.quote(value)}\n" for key, value in settings.items())
    archive = _Archive()
    for folder in ("bin", "mods", "proc", "sys", "dev", "host", "rw", "python", "full", "new"):
        archive.add(folder, stat.S_IFDIR | 0o755)
    archive.add("bin/busybox", stat.S_IFREG | 0o755, Path(busybox).read_bytes())
    archive.add("init", stat.S_IFREG | 0o755, INIT.read_bytes())
    archive.add("settings", stat.S_IFREG | 0o644, assignments.encode())
    for path in modules:
        archive.add(f"mods/{path.name}", stat.S_IFREG | 0o644, path.read_bytes())
    names = "".join(f"{path.name}\n" for path in modules)
    archive.add("modlist", stat.S_IFREG | 0o644, names.encode())
    return archive.close()


def module_order(folder: Path, wanted: tuple[str, ...]) -> list[Path]:
    """The modules and all they depend on, each after what it needs."""
    needs: dict[str, list[str]] = {}
    places: dict[str, Path] = {}
    for line in (folder / "modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        places[_name(path)] = folder / path
        needs[_name(path)] = [_name(other) for other in rest.split()]
    builtin = {_name(line) for line in (folder / "modules.builtin").read_text().splitlines()}
    order: dict[str, Path] = {}

    def visit(name: str) -> None:
        if name in order or name in builtin:
            return
        if name not in places:
            raise VmUnavailable(f"the kernel in {folder} has no module {name}")
        for other in needs[name]:
            visit(other)
        order[name] = places[name]

    for name in wanted:
        visit(name.replace("-", "_"))
    return list(order.values())


def _name(path: str) -> str:
    return Path(path).name.partition(".")[0].replace("-", "_")


class _Archive:
    def __init__(self) -> None:
        self._out = bytearray()
        self._inode = 0

    def add(self, name: str, mode: int, data: bytes = b"") -> None:
        self._inode += 1
        raw = name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        fields = (self._inode, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(raw), 0)
        self._out += b"070701" + b"".join(b"%08X" % field for field in fields)
        for part in (raw, data):
            self._out += part
            self._out += bytes(-len(self._out) % 4)

    def close(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return bytes(self._out)
