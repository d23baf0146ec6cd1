"""Commands that make, remove or promote a receiver: what udev learns of it from them."""

from __future__ import annotations

import re
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from bitmapd.config import ReceiverConfig, VolumeConfig, load_any
from bitmapd.receiver.superblock import JournalSuperblock, Line
from bitmapd.record.geometry import Geometry
from bitmapd.volume.promoting import Promoted, Which
from dmctl.cli import failback, promote
from dmctl.cli.context import Context
from dmctl.cli.output import Output
from tests.support.cli import MIB, Cli, new_cli

FAR = "receiver+unix:///vol0?socket=/run/far.sock"


class Host:
    """A machine whose media have names below /dev, and are files."""

    def __init__(self, cli: Cli, etc: Path, media: Path) -> None:
        self.cli = cli
        self.media = media
        self.rules = etc / "udev/rules.d/63-volumes-dmctl.rules"
        self.seen: set[str] = set()  # what udev was asked to look at

    def file(self, role: str, size_bytes: int = MIB) -> str:
        with (self.media / role).open("wb") as stream:
            stream.truncate(size_bytes)
        return f"{self.media}/{role}"

    def roles(self) -> dict[str, str]:
        """By the names of the files, what the rules say they are."""
        if not self.rules.exists():
            return {}
        folder = str(self.media).removeprefix("/dev/")
        line = re.compile(rf'SYMLINK=="{folder}/(\w+)", .*ENV\{{DMCTL_ROLE\}}="(\w+)"')
        return dict(line.findall(self.rules.read_text()))

    def looked_at(self) -> set[str]:
        names, self.seen = {Path(path).name for path in self.seen}, set()
        return names

    def receive(self, *options: str) -> None:
        image, journal = self.file("image"), self.file("journal", 64 * MIB)
        words = ("receive", "vol0", "--image", image, "--journal", journal, "--listen", FAR)
        self.cli.ok(*words, *options)

    @property
    def context(self) -> Context:
        return Context(self.cli.paths, Output({}, quiet=True))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with new_cli(tmp_path) as cli, tempfile.TemporaryDirectory(dir="/dev/shm") as media:
        made = Host(cli, cli.as_host(monkeypatch), Path(media))
        monkeypatch.setattr(
            "dmctl.kernel.systemd._look_again", lambda media, outcome: made.seen.update(media)
        )
        for module in (failback, promote):
            monkeypatch.setattr(module, "launch", lambda paths, name, timeout_s: None)
        yield made


def test_a_receiver_is_hidden_from_its_making_to_its_end(host: Host) -> None:
    host.receive("--dry-run")
    assert host.roles() == {}
    host.receive()
    assert host.roles() == {"image": "image", "journal": "journal"}
    assert host.looked_at() == {"image", "journal"}
    host.cli.ok("remove", "vol0", "--yes")
    assert host.roles() == {}
    assert host.looked_at() == {"image", "journal"}


def test_an_old_primary_stays_hidden_as_the_image_of_a_receiver(host: Host) -> None:
    """That of `failback` and of `switchover`."""
    media = [f"--{role}={host.file(role, 8 * MIB)}" for role in ("primary", "record")]
    host.cli.ok("create", "vol0", *media, f"--secondary={FAR}")
    assert host.roles() == {"primary": "primary", "record": "record"}
    config = load_any(host.cli.paths, "vol0")
    assert isinstance(config, VolumeConfig)
    journal = host.file("journal", 64 * MIB)
    begin = JournalSuperblock(uuid4(), "vol0", 64 * MIB, "image", 8 * MIB, 1, 1)
    failback.become_receiver(host.context, config, journal, begin, 1.0)
    assert host.roles() == {"primary": "image", "journal": "journal", "record": "record"}


def test_a_receiver_that_is_promoted_has_the_rules_of_a_volume(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.receive()
    host.looked_at()
    config = load_any(host.cli.paths, "vol0")
    assert isinstance(config, ReceiverConfig)
    line = Line(uuid4(), Geometry(MIB), (uuid4(),), 1)
    done = Promoted(line, 1, 0, 0, None)
    monkeypatch.setattr(promote, "promote_now", lambda *args, **options: done)
    monkeypatch.setattr(promote, "ask", lambda *args: {"device": "nbd"})
    args = Namespace(record=host.file("record"), timeout=1.0, force=False)
    body: dict[str, Any] = promote.carry_out(host.context, args, config, Which())
    assert body["point"] == 1
    assert host.roles() == {"image": "primary", "record": "record"}
    assert host.looked_at() == {"image", "journal", "record"}
