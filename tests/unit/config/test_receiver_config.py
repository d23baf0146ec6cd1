"""The file of a receiver: what may stand in it, and what is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bitmapd.config import (
    ConfigError,
    Paths,
    ReceiverConfig,
    build_receiver,
    create_volume,
    load_all,
    load_any,
    load_volume,
    receiver_keys,
    render_receiver,
)
from bitmapd.config.files import exchange_role, former_volume, remove_volume
from bitmapd.errors import BitmapdError, WrongStateError
from dmctl.model.assembly import NEEDED, local_media

UNIX = "receiver+unix:///vol0?socket=/run/dmctl/vol0.points"
PLAIN: dict[str, Any] = {
    "role": "receiver",
    "image": "/dev/image",
    "journal": "/dev/journal",
    "listen": UNIX,
}
TLS = PLAIN | {
    "listen": "receiver+tls://here:10830/vol0",
    "certificates": "/etc/keys",
    "sender_name": "there",
    "sender_fingerprint": "ab" * 32,
}


KEEPS = PLAIN | {
    "retain": "24 x 1h, 14 x 1d, 3 x 90s",
    "point_hook": "/hook",
    "catch_up": "in-place",
    "metrics_listen": "unix:/run/m",
}


@pytest.mark.parametrize("table", [PLAIN, TLS, KEEPS])
def test_what_is_read_is_written_again(table: dict[str, Any]) -> None:
    config, problems = build_receiver("vol0", table, "file")
    assert not problems
    assert config is not None
    assert render_receiver(config) == table
    assert config.record == "/dev/journal"
    assert set(table) <= {key.name for key in receiver_keys().values()}


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"imagge": "/x"}, ["imagge"]),
        ({"image": "x", "journal": 3}, ["image", "journal"]),
        ({"journal": "/dev/image"}, ["journal"]),
        ({"listen": "tls://here"}, ["listen"]),
        ({"listen": "receiver+unix:///other?socket=/x"}, ["listen"]),
        ({"listen": "receiver+tls://here/vol0"}, ["certificates", "sender_name"]),
        ({"role": "sender"}, ["role"]),
        ({"retain": "24"}, ["retain"]),
        ({"retain": "24 x 1"}, ["retain"]),
        ({"retain": "0 x 1h"}, ["retain"]),
        ({"retain": "2 x 500ms"}, ["retain"]),
        ({"retain": "40 x 1h, 9 x 1d"}, ["retain"]),
        ({"point_hook": "hook"}, ["point_hook"]),
        ({"catch_up": "no"}, ["catch_up"]),
        ({"metrics_listen": "0.0.0.0:9501"}, ["metrics_listen"]),
        ({"catch_up": "clone", "group": "db"}, ["catch_up"]),
    ],
)
def test_everything_that_is_wrong_is_reported(changes: dict[str, Any], keys: list[str]) -> None:
    config, problems = build_receiver("vol0", PLAIN | changes, "file")
    assert config is None
    assert [problem.key for problem in problems] == keys
    assert all(problem.file == "file" for problem in problems)


def test_a_receiver_waits_for_both_of_its_media() -> None:
    config, _ = build_receiver("vol0", PLAIN, "file")
    assert config is not None
    assert local_media(config) == {"image": "/dev/image", "journal": "/dev/journal"}
    assert set(local_media(config)) <= NEEDED


def test_what_is_missing_is_reported() -> None:
    config, problems = build_receiver("vol0", {"role": "receiver"}, "file")
    assert config is None
    assert [problem.key for problem in problems] == ["image", "journal", "listen"]


def test_a_receiver_is_no_volume(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "etc", tmp_path / "run")
    create_volume(paths, "vol0", PLAIN)
    assert isinstance(load_any(paths, "vol0"), ReceiverConfig)
    with pytest.raises(WrongStateError, match="is a receiver"):
        load_volume(paths, "vol0")
    assert load_all(paths) == {}
    paths.volume_file("vol0").write_text('role = "receiver"\n')
    for load in (lambda: load_any(paths, "vol0"), lambda: load_all(paths)):
        with pytest.raises(ConfigError, match="image: is missing"):
            load()
    paths.volume_file("vol0").write_text("role = \n")
    with pytest.raises(BitmapdError, match="not TOML"):
        load_any(paths, "vol0")


def test_two_that_would_serve_metrics_at_one_address_are_reported(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "etc", tmp_path / "run")
    address = {"metrics_listen": "127.0.0.1:9501"}
    volume = {
        "uuid": "6f0d2a54-9b7c-4f43-8b50-0d2f6a4f6c01",
        "primary": "/dev/primary",
        "secondary": UNIX,  # the receiver beside it
        "record": "/dev/record",
    }
    create_volume(paths, "near", volume | address)
    create_volume(paths, "vol0", PLAIN)
    assert set(load_all(paths)) == {"near"}
    exchange_role(paths, "vol0", PLAIN | address)
    other = PLAIN | {"listen": "receiver+unix:///vol1?socket=/x"}
    create_volume(paths, "vol1", other | address | {"image": "/dev/other"})
    with pytest.raises(ConfigError) as caught:
        load_all(paths)
    assert [(Path(str(it.file)).name, it.key, it.message) for it in caught.value.problems] == [
        (f"{name}.toml", "metrics_listen", "is used by volume 'near' too")
        for name in ("vol0", "vol1")
    ]
    paths.volume_file("near").unlink()
    with pytest.raises(ConfigError, match="metrics_listen: is used by receiver 'vol0' too"):
        load_all(paths)


def test_rules_of_points_that_stay_are_numbers_and_seconds() -> None:
    config, _ = build_receiver("vol0", PLAIN | {"retain": "24 x 1h,14x1d"}, "file")
    assert config is not None
    assert config.retain == ((24, 3600.0), (14, 86400.0))


def test_what_was_chosen_for_a_receiver_is_there_when_it_is_one_again(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "etc", tmp_path / "run")
    create_volume(paths, "vol0", KEEPS)
    exchange_role(paths, "vol0", {"primary": "/dev/image"})
    exchange_role(paths, "vol0", PLAIN | {"point_hook": "/other"})
    again = load_any(paths, "vol0")
    assert isinstance(again, ReceiverConfig)
    assert again.retain == ((24, 3600.0), (14, 86400.0), (3, 90.0))
    assert again.point_hook == "/other"


@pytest.mark.parametrize("left_by", ["removal", "an earlier version"])
def test_a_new_site_has_nothing_of_one_that_was_removed(tmp_path: Path, left_by: str) -> None:
    paths = Paths(tmp_path / "etc", tmp_path / "run")
    create_volume(paths, "vol0", {"primary": "/dev/image", "listen": "nbd://there/vol0"})
    exchange_role(paths, "vol0", KEEPS)
    exchange_role(paths, "vol0", {"primary": "/dev/image"})
    if left_by == "removal":
        remove_volume(paths, "vol0", None)
        assert list(paths.volumes_dir.iterdir()) == []
    else:
        paths.volume_file("vol0").unlink()
    create_volume(paths, "vol0", PLAIN)
    assert former_volume(paths, "vol0") == {}
    exchange_role(paths, "vol0", {"primary": "/dev/image"})
    exchange_role(paths, "vol0", PLAIN)
    again = load_any(paths, "vol0")
    assert isinstance(again, ReceiverConfig)
    assert again.retain is None
