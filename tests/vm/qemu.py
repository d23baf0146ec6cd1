"""How qemu is started, and its monitor.

All files of one boot are in one folder: `console` and `qemu` (what the kernel and qemu say), `port`
and `qmp` (sockets on which the caller listens before qemu starts), `initrd`, and `scratch`, a new
disk for whatever the guest writes outside its own disks.
"""

from __future__ import annotations

import compileall
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.vm import initrd, pythonfs
from tests.vm.disks import GIB, GuestDisk
from tests.vm.kernel import CHECKOUT, Kernel, VmUnavailable

QEMU = "qemu-system-x86_64"
SCRATCH_BYTES = 8 * GIB
_KERNEL_ARGUMENTS = (
    *("console=ttyS0", "loglevel=5", "rdinit=/init", "nokaslr", "mitigations=off"),
    *("panic=-1", "oops=panic", "softlockup_panic=1", "watchdog_thresh=60", "unknown_nmi_panic=1"),
    # Else "IO-APIC + timer doesn't work" when this machine is busy while the guest counts ticks.
    "no_timer_check",
    # An emulated processor of a busy machine stands still for seconds at a time.
    *("rcupdate.rcu_cpu_stall_timeout=120", "tsc=reliable", "clocksource=tsc"),
    # What only costs time there.
    *("init_on_alloc=0", "randomize_kstack_offset=off", "hardened_usercopy=off"),
    *("lsm=", "audit=0"),
    # Code that is mapped elsewhere is translated anew: an exec takes twice as long.
    "norandmaps",
)


@dataclass(frozen=True, slots=True)
class Hardware:
    memory_mib: int
    cpus: int
    kernel_arguments: Sequence[str]
    share: Path | None
    with_network: bool = False


def prepare(
    kernel: Kernel, hardware: Hardware, disks: Sequence[GuestDisk], folder: Path
) -> list[str]:
    """Makes what one boot needs in `folder`; the command."""
    settings = {
        "LAB_CHECKOUT": str(CHECKOUT),
        "LAB_MODULES": str(kernel.modules.parent.resolve()),
        "LAB_PYTHON": ":".join(str(path) for path in pythonfs.folders()),
        "LAB_SHARE": "" if hardware.share is None else str(hardware.share),
    }
    for name in ("bitmapd", "dmctl", "tests"):
        # The guest sees the checkout read-only: each program would compile all of it at its start.
        compileall.compile_dir(CHECKOUT / name, quiet=1)
    (folder / "initrd").write_bytes(initrd.build(kernel, settings))
    (folder / "console").unlink(missing_ok=True)
    command = [
        *("setpriv", "--pdeathsig", "KILL", QEMU),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *accelerator(),
        *("-smp", str(hardware.cpus), "-m", str(hardware.memory_mib)),
        *("-kernel", str(kernel.image), "-initrd", str(folder / "initrd")),
        *("-append", " ".join((*_KERNEL_ARGUMENTS, *hardware.kernel_arguments))),
        *("-chardev", f"file,id=console,path={folder / 'console'}", "-serial", "chardev:console"),
        *("-chardev", f"socket,id=monitor,path={folder / 'qmp'}"),
        *("-mon", "chardev=monitor,mode=control"),
        *("-chardev", f"socket,id=port,path={folder / 'port'}"),
        *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=port,name=lab"),
        *("-virtfs", _virtfs("root", Path("/"), "readonly=on,multidevs=remap")),
    ]
    if hardware.share is not None:
        command += ["-virtfs", _virtfs("share", hardware.share, "multidevs=remap")]
    if hardware.with_network:
        command += ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="]
    files = {"scratch": _make_scratch(folder / "scratch"), "python": pythonfs.image()}
    backends = [(disk.name, disk.sector_bytes, disk.backend()) for disk in disks]
    backends += [(name, 512, _throwaway(path)) for name, path in files.items()]
    for name, sector_bytes, backend in backends:
        device = {
            "driver": "virtio-blk-pci",
            "id": name,
            "drive": f"node-{name}",
            "serial": name,
            "logical_block_size": sector_bytes,
            "physical_block_size": sector_bytes,
            "write-cache": "on",
        }
        command += ["-blockdev", json.dumps({"node-name": f"node-{name}"} | backend)]
        command += ["-device", json.dumps(device)]
    return command


class Monitor:
    """qemu's machine protocol: one question, one answer; events are dropped."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(30)
        self._socket = connection
        self._lines = connection.makefile("rb")
        self._lines.readline()
        self.ask("qmp_capabilities", {})

    def ask(self, command: str, arguments: dict[str, Any]) -> Any:
        message = {"execute": command, "arguments": arguments}
        self._socket.sendall(json.dumps(message).encode())
        while True:
            line = self._lines.readline()
            if not line:
                raise ConnectionError(f"qemu ended before it answered {command}")
            answer = json.loads(line)
            if "error" in answer:
                raise RuntimeError(f"qemu refused {command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


def check_machine() -> None:
    """Raises `VmUnavailable` where the lab cannot run."""
    for tool, package in ((QEMU, "qemu-system-x86"), ("setpriv", "util-linux")):
        if shutil.which(tool) is None:
            raise VmUnavailable(f"{tool} is not there; install the package {package}")
    if os.geteuid() != 0:
        raise VmUnavailable("the lab shows the guest this machine's root, so it needs root")


def accelerator() -> list[str]:
    """KVM where the processor has what a stock kernel needs to boot under it, else emulation."""
    flags = re.search(r"^flags\s*:.*\b(vmx|svm)\b", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    if flags is not None and os.access("/dev/kvm", os.R_OK | os.W_OK):
        return ["-accel", "kvm", "-cpu", "host"]
    # Where the processor says that its string instructions for bytes are fast (erms, fsrm), memory
    # is copied and cleared with them, which is emulated byte by byte: 64 KiB take 250 us, not 40.
    return ["-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,-erms,-fsrm"]


def listen(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.settimeout(30)
    listener.bind(str(path))
    listener.listen(1)
    return listener


def _throwaway(path: Path) -> dict[str, object]:
    """A disk whose flushes may be ignored."""
    cache = {"direct": False, "no-flush": True}
    file = {"driver": "file", "filename": str(path), "locking": "off"}
    return {"driver": "raw", "file": file, "cache": cache}


def _virtfs(tag: str, path: Path, options: str) -> str:
    return f"local,path={path},mount_tag={tag},security_model=none,{options}"


def _make_scratch(path: Path) -> Path:
    path.unlink(missing_ok=True)
    options = ["-q", "-F", "-O", "^has_journal", "-m", "0", "-E", "lazy_itable_init=1"]
    subprocess.run(
        ["/sbin/mkfs.ext4", *options, str(path), f"{SCRATCH_BYTES >> 10}k"],
        check=True,
        capture_output=True,
    )
    return path
