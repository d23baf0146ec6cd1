"""What becomes of a pair's configuration in a single volume, and the other way round."""

from __future__ import annotations

from pathlib import Path

from bitmapd.config import Paths, changed, keys, load_volume
from bitmapd.config.tables import OF_A_PAIR
from bitmapd.volume import conversion
from dmctl.cli.joining import _pair_keys

PAIR = """
uuid = "6f9619ff-8b86-4011-b42d-00c04fc964ff"
primary = "/dev/p"
secondary = "/dev/s"
record = "/dev/r"
attach = "nbd"
node = 1
partner = "unix:///b"
partner_listen = "unix:///a"
serve = "on-promote"
record_on = "partner"
partner_ack = "stored"
on_cut = "go-on"
fence_command = "/bin/true"
takeover = "auto"
"""


def test_nothing_is_left_that_a_single_volume_must_not_have(tmp_path: Path, monkeypatch) -> None:
    paths = Paths(tmp_path / "etc", tmp_path / "run")
    paths.volumes_dir.mkdir(parents=True)
    paths.volume_file("vol0").write_text(PAIR)
    monkeypatch.setattr(conversion, "_convert", lambda *_: None)  # no record is here
    conversion.become_single(load_volume(paths, "vol0"), paths, print)
    config = load_volume(paths, "vol0")
    assert config.node is None
    assert {name: getattr(config, name) for name in OF_A_PAIR} == OF_A_PAIR


def test_all_of_it_can_be_said_of_a_volume_that_becomes_a_pair(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "etc", tmp_path / "run")
    paths.volumes_dir.mkdir(parents=True)
    single = "\n".join(PAIR.splitlines()[:6])
    paths.volume_file("vol0").write_text(single)
    words = [line.split(" = ") for line in PAIR.splitlines()[6:]]
    changes = {name: value.strip('"') for name, value in words}
    config = changed(load_volume(paths, "vol0"), changes, also=_pair_keys())
    assert (config.node, config.on_cut, config.record_on) == (1, "go-on", "partner")
    assert set(_pair_keys()) <= {key.name for key in keys().values()}
