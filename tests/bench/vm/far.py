"""The receiver of the volume with points, as at another site: outside of the guest where there is
one, so that hosts do not share their processors with it, and over TLS."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.vm.command import dmctl
from tests.bench.vm.media import sh
from tests.support.peers import free_port

# Where a guest finds the machine that it runs on (qemu's user networking), and itself.
HOST_ADDRESS, GUEST_ADDRESS = "10.0.2.2", "10.0.2.15/24"
NAME, HERE, THERE = "bvm-far", "here", "there"
_JOURNAL_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Site:
    """What the sender's side has to know; the image can be read there, too."""

    uri: str
    certificates: str
    image: str

    @property
    def options(self) -> tuple[str, ...]:
        """For `dmctl create`."""
        names = ("--partner-certificates", self.certificates, "--partner-name", THERE)
        return ("--secondary", self.uri, *names)


def join_network() -> None:
    """In a guest: so that it reaches the machine that it runs on."""
    sh("modprobe", "virtio_net")
    (device,) = (path.parent.name for path in Path("/sys/class/net").glob("*/device"))
    sh("ip", "address", "add", GUEST_ADDRESS, "dev", device)
    sh("ip", "link", "set", device, "up")


@contextmanager
def site(folder: Path, address: str, size_bytes: int) -> Iterator[Site]:
    """A receiver that runs here and is reached at this address.  Everything it has is in the
    folder, whose path must be short."""
    for name, length_bytes in (("image", size_bytes), ("journal", _JOURNAL_BYTES)):
        with (folder / name).open("wb") as file:
            os.truncate(file.fileno(), length_bytes)
    keys, port = folder / "keys", free_port()
    dmctl(folder, "partner-keys", str(keys), "--names", f"{HERE},{THERE}")
    media = ("--image", str(folder / "image"), "--journal", str(folder / "journal"))
    listen = ("--listen", f"receiver+tls://127.0.0.1:{port}/{NAME}")
    trust = ("--certificates", str(keys / THERE), "--sender-name", HERE)
    dmctl(folder, "receive", NAME, *media, *listen, *trust)
    dmctl(folder, "start", NAME)
    try:
        uri = f"receiver+tls://{address}:{port}/{NAME}"
        yield Site(uri, str(keys / HERE), str(folder / "image"))
    finally:
        dmctl(folder, "stop", NAME, "--now", check=False)
