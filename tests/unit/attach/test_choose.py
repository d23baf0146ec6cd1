"""attach/choose: what `auto` means, whatever the machine has."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitmapd.attach import choose
from bitmapd.config import Paths, load_volume

MEDIA = """
uuid = "6f9619ff-8b86-4011-b42d-00c04fc964ff"
primary = "/dev/p"
record = "/dev/r"
"""
PAIR = 'node = 1\npartner = "unix:///b"\npartner_listen = "unix:///a"\n'


@pytest.mark.parametrize(
    ("more", "attach"),
    [
        ('secondary = "/dev/s"\n', "dm"),
        ('secondary = "/dev/s"\n' + PAIR, "nbd"),
        ('secondary = "receiver+unix:///vol0?socket=/run/far"\n', "nbd"),
    ],
)
def test_hosts_that_have_to_come_through_the_gate_never_get_a_kernel_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, more: str, attach: str
) -> None:
    monkeypatch.setattr(choose, "why_not_dm", lambda primary: None)
    paths = Paths(tmp_path / "etc", tmp_path / "run")
    paths.volumes_dir.mkdir(parents=True)
    paths.volume_file("vol0").write_text(MEDIA + more)
    config = load_volume(paths, "vol0")
    assert config.attach == "auto"
    assert choose.resolved(config).attach == attach
