"""Configuration: merging, every error with file and key, what a crash of a writer leaves."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd import config as cfg
from bitmapd.config import (
    ConfigError,
    Paths,
    VolumeConfig,
    atomic_write,
    change_volume,
    changed,
    check_name,
    create_volume,
    device_of,
    effective_block_size_bytes,
    effective_cut_patience_s,
    effective_era_intervals_s,
    effective_fence_delay_s,
    effective_record_limit_bytes,
    from_unit_instance,
    has_receiver,
    keys,
    load_all,
    load_volume,
    parse_metrics_listen,
    remove_volume,
    render,
    unit_instance,
    volume_names,
)
from bitmapd.config.problems import Problem, config_error, denied
from bitmapd.errors import ExistsError, NotFoundError, PermissionError_, UsageError
from bitmapd.net.uri import parse_uri
from dmctl.model.assembly import local_media

UUID_A = "6f9619ff-8b86-4011-b42d-00c04fc964ff"
UUID_B = "0b5e8a1e-1111-4222-8333-444455556666"
BASE = {"uuid": UUID_A, "primary": "/dev/p", "secondary": "/dev/s", "record": "/dev/r"}

Write = Callable[..., Paths]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write files as given, `defaults` for dmctl.toml and one keyword a volume."""

    def write_files(defaults: str | None = None, **volumes: str) -> Paths:
        paths = Paths(tmp_path / "etc", Path("/run/dmctl"))
        paths.volumes_dir.mkdir(parents=True, exist_ok=True)
        if defaults is not None:
            paths.defaults_file.write_text(defaults)
        for name, text in volumes.items():
            paths.volume_file(name).write_text(text)
        return paths

    return write_files


def toml_of(**changes: Any) -> str:
    table = {**BASE, **changes}
    return "".join(
        f"{key} = {json.dumps(value)}\n" for key, value in table.items() if value is not None
    )


def problems_of(paths: Paths, name: str | None = "vol0") -> list[tuple[str, str | None]]:
    with pytest.raises(ConfigError) as caught:
        load_all(paths) if name is None else load_volume(paths, name)
    return [(Path(p.file).name, p.key) for p in caught.value.problems]


def test_builtin_defaults(write: Write) -> None:
    config = load_volume(write(vol0=toml_of()), "vol0")
    assert config == VolumeConfig(
        name="vol0",
        uuid=UUID(UUID_A),
        primary="/dev/p",
        secondary="/dev/s",
        record="/dev/r",
        attach="auto",
        listen="nbd+unix:///vol0?socket=/run/dmctl/vol0.nbd",
        extent_size_bytes=1 << 20,
        block_size_bytes=None,
        record_limit_bytes=None,
        resync_target_s=None,
        era_interval_s=None,
        initial_sync="full",
        predictor="superset",
        copy_rate_bytes_per_s=None,
        late_writes_s=600.0,
        tls_certificates=None,
        allow_plaintext_loopback=False,
        busy_poll=True,
        metrics_listen=None,
        node=None,
        partner=None,
        partner_listen=None,
        partner_role="pair",
        record_on="both",
        partner_ack="memory",
        record_fallback=True,
        partner_record=None,
        on_cut="wait",
        partner_name=None,
        partner_fingerprint=None,
        partner_certificates=None,
        partner_timeout_s=2.0,
        partner_wait_s=10.0,
        serve="always",
        fence_command=None,
        fence_options=(),
        fence_delay_s=None,
        fence_timeout_s=60.0,
        fence_aborts_io=False,
        takeover="manual",
        cut_patience_s=None,
        point_interval_s=30.0,
        spool_limit_bytes=256 << 20,
        spool=None,
        spool_file_limit_bytes=4 << 30,
        compress="auto",
        start_alone="yes",
        group=None,
        receiver_dials=False,
        journal=None,
        trace=None,
        start_at_boot=True,
    )


def test_a_volume_wins_over_dmctl_toml_which_wins_over_the_builtin_default(write: Write) -> None:
    paths = write(
        '[defaults]\nera_interval = "2s"\ncopy_rate = "10MiB/s"\nblock_size = 131072\n',
        vol0=toml_of(era_interval="500ms", copy_rate="none"),
    )
    config = load_volume(paths, "vol0")
    assert config.era_interval_s == 0.5
    assert config.copy_rate_bytes_per_s is None
    assert config.block_size_bytes == 131072
    assert config.extent_size_bytes == 1 << 20


@pytest.mark.parametrize(
    ("own", "limit_bytes", "target_s"),
    [
        ({}, None, 30.0),
        ({"record_limit": "1GiB"}, 1 << 30, None),
        ({"resync_target": "5s"}, None, 5.0),
        ({"resync_target": "none"}, None, None),
    ],
)
def test_record_limit_and_resync_target_withdraw_each_other(
    write: Write, own: dict[str, str], limit_bytes: int | None, target_s: float | None
) -> None:
    paths = write('[defaults]\nresync_target = "30s"\n', vol0=toml_of(**own))
    config = load_volume(paths, "vol0")
    assert (config.record_limit_bytes, config.resync_target_s) == (limit_bytes, target_s)


def test_both_in_one_file_are_refused(write: Write) -> None:
    paths = write(vol0=toml_of(record_limit="1GiB", resync_target="5s"))
    assert problems_of(paths) == [("vol0.toml", "resync_target")]


def test_all_errors_of_all_files_at_once(write: Write) -> None:
    paths = write(
        'default = 1\n[defaults]\nera_intervall = "1s"\nprimary = "/dev/x"\ncopy_rate = "1MB/s"\n',
        alpha='uuid = "no"\nprimary = "dev/p"\nsecondary = "nbd://"\nextent_size = "3MiB"\n',
        beta="this is not TOML",
        **{"-gamma": toml_of()},
        vol0=toml_of(),
    )
    assert problems_of(paths, None) == [
        ("dmctl.toml", "default"),
        ("dmctl.toml", "era_intervall"),
        ("dmctl.toml", "primary"),
        ("dmctl.toml", "copy_rate"),
        ("-gamma.toml", None),
        ("alpha.toml", "uuid"),
        ("alpha.toml", "primary"),
        ("alpha.toml", "secondary"),
        ("alpha.toml", "record"),
        ("beta.toml", None),
    ]
    with pytest.raises(ConfigError) as caught:
        load_all(paths)
    message = caught.value.message
    assert message.startswith("10 errors in the configuration:\n")
    assert f"{paths.defaults_file}: era_intervall: unknown key (did you mean era_interval?)" in (
        message
    )
    assert "write 1MiB for 1048576 bytes" in message
    assert caught.value.to_json()["problems"][0]["key"] == "default"
    assert caught.value.exit_status == 2


def test_another_volume_with_an_error_is_no_obstacle(write: Write) -> None:
    paths = write(vol0=toml_of(), broken="?")
    assert load_volume(paths, "vol0").name == "vol0"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"uuid": None}, "uuid"),
        ({"uuid": 5}, "uuid"),
        ({"primary": ""}, "primary"),
        ({"primary": "/dev/\x07"}, "primary"),
        ({"secondary": "relative"}, "secondary"),
        ({"secondary": "http://host/x"}, "secondary"),
        ({"secondary": "nbds://host/x"}, "secondary"),
        ({"secondary": "/dev/p"}, "secondary"),
        ({"secondary": "nbd+unix:///vol0?socket=/run/dmctl/vol0.nbd"}, "secondary"),
        ({"record": "/dev/s"}, "record"),
        ({"attach": "kernel"}, "attach"),
        ({"listen": "nbd://192.0.2.1/x"}, "listen"),
        ({"listen": "nbd://127.0.0.1/x"}, "listen"),
        ({"listen": "nbds://0.0.0.0/x"}, "listen"),
        ({"extent_size": "3MiB"}, "extent_size, block_size"),
        ({"block_size": "2MiB"}, "extent_size, block_size"),
        ({"block_size": 0}, "block_size"),
        ({"block_size": True}, "block_size"),
        ({"record_limit": "none"}, "record_limit"),
        ({"resync_target": "0s"}, "resync_target"),
        ({"era_interval": "1ms"}, "era_interval"),
        ({"era_interval": 5}, "era_interval"),
        ({"initial_sync": "ful"}, "initial_sync"),
        ({"predictor": "No Such"}, "predictor"),
        ({"copy_rate": "0"}, "copy_rate"),
        ({"tls_certificates": "certs"}, "tls_certificates"),
        ({"allow_plaintext_loopback": "yes"}, "allow_plaintext_loopback"),
        ({"metrics_listen": "0.0.0.0:9500"}, "metrics_listen"),
        ({"busy_poll": "200us"}, "busy_poll"),
        ({"metrics_listen": "127.0.0.1"}, "metrics_listen"),
        ({"Primary": "/dev/p"}, "Primary"),
    ],
)
def test_one_wrong_value_is_told_with_its_key(
    write: Write, change: dict[str, Any], key: str
) -> None:
    assert problems_of(write(vol0=toml_of(**change))) == [("vol0.toml", key)]


@pytest.mark.parametrize(
    "change",
    [
        {"secondary": "nbd://backup.example/vol0"},
        {"secondary": "nbds://backup/x?tls-certificates=/etc/pki/nbd"},
        {"secondary": "nbds://backup/x", "tls_certificates": "/etc/pki/nbd"},
        {"listen": "nbd://127.0.0.1:1/x", "allow_plaintext_loopback": True},
        {"listen": "nbd://[::1]/x", "allow_plaintext_loopback": True},
        {"listen": "nbds://0.0.0.0/x", "tls_certificates": "/etc/pki/nbd"},
        {"listen": "nbd+unix:///x?socket=/run/x"},
        {"attach": "auto"},
        {"metrics_listen": "unix:/run/m"},
        {"metrics_listen": "[::1]:9500"},
        {"copy_rate": 1 << 20},
        {"record_limit": "auto"},
    ],
)
def test_good_values(write: Write, change: dict[str, Any]) -> None:
    assert load_volume(write(vol0=toml_of(**change)), "vol0").name == "vol0"


def test_volumes_that_share_a_medium_are_refused_together(write: Write) -> None:
    paths = write(a=toml_of(), b=toml_of(uuid=UUID_B, secondary="/dev/s2", record="/dev/r2"))
    assert problems_of(paths, None) == [("b.toml", "primary")]
    assert load_volume(paths, "b").primary == "/dev/p"


def test_files_that_are_not_read(write: Write, tmp_path: Path) -> None:
    paths = write(vol0=toml_of())
    (tmp_path / "elsewhere").write_text(toml_of())
    paths.volume_file("link").symlink_to(tmp_path / "elsewhere")
    paths.volume_file("big").write_bytes(b"#" * ((1 << 20) + 1))
    paths.volume_file("latin").write_bytes(b'primary = "\xe9"')
    paths.volume_file("folder").mkdir()
    (paths.volumes_dir / ".vol0.toml.123").write_text("?")
    (paths.volumes_dir / "notes.txt").write_text("?")
    assert problems_of(paths, None) == [
        ("big.toml", None),
        ("folder.toml", None),
        ("latin.toml", None),
        ("link.toml", None),
    ]
    with pytest.raises(ConfigError, match="symbolic link"):
        load_volume(paths, "link")


def test_defaults_that_are_no_table(write: Write) -> None:
    assert problems_of(write("defaults = 3\n", vol0=toml_of())) == [("dmctl.toml", "defaults")]


def test_a_volume_that_does_not_exist(write: Write) -> None:
    with pytest.raises(NotFoundError) as caught:
        load_volume(write(vol0=toml_of()), "vol1")
    assert caught.value.hint == "did you mean vol0?"
    with pytest.raises(NotFoundError) as caught:
        load_volume(write(), "quite-different")
    assert caught.value.hint == "there are: vol0"
    with pytest.raises(NotFoundError) as caught:
        load_volume(Paths(Path("/nonexistent"), Path("/run")), "vol0")
    assert "create" in str(caught.value.hint)
    assert volume_names(Paths(Path("/nonexistent"), Path("/run"))) == []


@pytest.mark.parametrize("name", ["", "-a", ".a", "a b", "a/b", "..", "a\n", "\u00e9", "a\\x2b"])
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name"):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "0", "Vol0", "a-b_c", "+a.b", "_", "a.toml", "a" * 64])
def test_names(name: str) -> None:
    assert check_name(name) == name


def test_a_long_name_is_reported_as_long() -> None:
    with pytest.raises(UsageError, match="has 65 characters, that of a volume has at most 64"):
        check_name("a" * 65)
    with pytest.raises(UsageError, match="has 1000000 characters") as caught:
        check_name("/" * 1_000_000)
    assert len(caught.value.message) < 200
    with pytest.raises(UsageError, match="more \\+ than the name of a unit"):
        check_name("+" * 64)


NAMES = st.from_regex(r"[A-Za-z0-9+_][A-Za-z0-9+_.-]{0,63}", fullmatch=True)


@given(NAMES, NAMES)
def test_every_name_has_files_and_units_of_its_own(one: str, other: str) -> None:
    paths = Paths(Path("/etc/dmctl"), Path("/run/dmctl"))

    def files(name: str) -> set[Path]:
        return {
            paths.volume_file(name),
            paths.control_socket(name),
            paths.nbd_socket(name),
            paths.pid_file(name),
            paths.error_file(name),
        }

    for name in (one, other):
        instance = unit_instance(name)
        assert re.fullmatch(r"[A-Za-z0-9:_.\\-]+", instance), "what systemd allows"
        assert from_unit_instance(instance) == from_unit_instance(name) == name
        assert all(file.parent in (paths.volumes_dir, paths.run_dir) for file in files(name))
        assert parse_uri(paths.default_listen(name)).export == name
    if one != other:
        assert not files(one) & files(other)


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "[" * 100_000,
        "x = " + "{a=" * 50_000,
        "x = " + "1" * 5000,
        "x = 1979-99-99",
        "primary." + "a." * 100_000 + "b = 1",
        "[" + "a." * 100_000 + "b]",
        "primary.a.a = {" + "'a'." * 20_000 + "b=1}",
        "primary = [" + "'x'," * 100_000 + "]",
    ],
    ids=["arrays", "tables", "number", "date", "keys", "header", "inline", "long"],
)
def test_3_a_file_that_is_too_much_is_a_problem_of_its_volume(write: Write, text: str) -> None:
    paths = write(bad="", good=toml_of())
    paths.volume_file("bad").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_volume(paths, "bad")
    assert str(paths.volume_file("bad")) in caught.value.message
    assert len(caught.value.message) < 3000
    assert load_volume(paths, "good").name == "good"
    with pytest.raises(ConfigError) as caught:
        load_all(paths)
    assert {problem.file for problem in caught.value.problems} == {str(paths.volume_file("bad"))}
    paths.volume_file("bad").unlink()
    paths.defaults_file.write_text(text)
    with pytest.raises(ConfigError, match=str(paths.defaults_file)):
        load_volume(paths, "good")


@pytest.mark.parametrize(
    ("size_bytes", "limit_bytes"),
    [(1 << 40, 4 << 30), (3 << 30, 3 << 30), (100 << 20, 100 << 20), (1, 64 << 20)],
)
def test_automatic_record_limit(write: Write, size_bytes: int, limit_bytes: int) -> None:
    config = load_volume(write(vol0=toml_of()), "vol0")
    assert effective_record_limit_bytes(config, size_bytes) == limit_bytes
    small = dataclasses.replace(config, record_limit_bytes=1)
    assert effective_record_limit_bytes(small, size_bytes) == 64 << 20


def test_changes_to_a_running_volume(write: Write) -> None:
    config = load_volume(write(vol0=toml_of(record_limit="1GiB")), "vol0")
    new = changed(config, {"resync_target": "10s", "copy_rate": "5MiB/s"})
    assert (new.record_limit_bytes, new.resync_target_s) == (None, 10.0)
    assert new.copy_rate_bytes_per_s == 5 << 20
    assert dataclasses.replace(
        new, record_limit_bytes=1 << 30, resync_target_s=None, copy_rate_bytes_per_s=None
    ) == (config)
    with pytest.raises(ConfigError) as caught:
        changed(config, {"copy_rat": "1m", "primary": "/dev/x", "era_interval": "1"})
    assert [p.key for p in caught.value.problems] == ["copy_rat", "primary", "era_interval"]
    assert caught.value.problems[0].hint == "did you mean copy_rate?"
    with pytest.raises(ConfigError, match="excludes"):
        changed(config, {"record_limit": "1g", "resync_target": "1s"})


def test_written_changes_keep_comments_and_are_read_back(write: Write) -> None:
    text = '# mine\nrecord_limit = "2GiB"  # generous\n' + toml_of() + '# copy_rate = "1MiB/s"\n'
    paths = write(vol0=text)
    new = changed(load_volume(paths, "vol0"), {"resync_target": "10s", "copy_rate": "7m"})
    change_volume(paths, new, ["resync_target", "copy_rate"])
    assert load_volume(paths, "vol0") == new
    written = paths.volume_file("vol0").read_text()
    assert "# mine\n" in written
    assert '# copy_rate = "1MiB/s"\n' in written


def test_a_file_that_cannot_be_edited_by_lines_is_written_anew(write: Write) -> None:
    paths = write(vol0=toml_of() + 'copy_rate = """\\\n  1MiB/s"""\n')
    new = changed(load_volume(paths, "vol0"), {"copy_rate": "2MiB/s"})
    change_volume(paths, new, ["copy_rate"])
    assert load_volume(paths, "vol0") == new


def test_writing_into_a_broken_file_is_refused(write: Write) -> None:
    paths = write(vol0=toml_of())
    config = load_volume(paths, "vol0")
    paths.volume_file("vol0").write_text("?")
    with pytest.raises(ConfigError):
        change_volume(paths, config, ["copy_rate"])
    assert paths.volume_file("vol0").read_text() == "?"


def test_create_and_remove(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "new", Path("/run/dmctl"))
    create_volume(paths, "vol0", BASE)
    file = paths.volume_file("vol0")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert tomllib.loads(file.read_text()) == BASE
    with pytest.raises(ExistsError):
        create_volume(paths, "vol0", BASE | {"primary": "/dev/other"})
    assert tomllib.loads(file.read_text()) == BASE
    paths.state_file(UUID(UUID_A)).parent.mkdir()
    paths.state_file(UUID(UUID_A)).write_text("{}")
    remove_volume(paths, "vol0", UUID(UUID_A))
    assert [p for p in paths.config_dir.rglob("*") if p.is_file()] == []


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_in_the_place_of_the_file_is_replaced_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "link").symlink_to(victim)
    atomic_write(tmp_path / "link", b"new")
    assert victim.read_bytes() == b"precious"
    assert (tmp_path / "link").read_bytes() == b"new"


def test_paths_come_from_arguments_environment_defaults() -> None:
    environment = {"DMCTL_CONFIG_DIR": "/env/etc", "DMCTL_RUN_DIR": "/env/run"}
    assert Paths.find({}) == Paths(Path("/etc/dmctl"), Path("/run/dmctl"))
    assert Paths.find(environment) == Paths(Path("/env/etc"), Path("/env/run"))
    assert Paths.find(environment, "/a", "/b") == Paths(Path("/a"), Path("/b"))
    assert Paths.find({}, "a").config_dir == Path.cwd() / "a"


def test_a_socket_path_that_is_too_long_is_reported_with_its_length() -> None:
    paths = Paths.find({}, run_dir="/r" * 40)  # 80 bytes
    assert len(str(paths.control_socket("n" * 22))) == 107
    for path in (paths.control_socket, paths.nbd_socket, paths.default_listen):
        with pytest.raises(UsageError, match="has a path of 108 bytes; the system allows 107") as e:
            path("n" * 23)
        assert "--run-dir" in str(e.value.hint)


def test_metrics_addresses() -> None:
    assert parse_metrics_listen("unix:/run/m") == Path("/run/m")
    assert parse_metrics_listen("[::1]:80") == ("::1", 80)
    for bad in ("unix:m", "127.0.0.1:0", "127.0.0.1:99999", "example.org:80", ":80"):
        with pytest.raises(UsageError):
            parse_metrics_listen(bad)


def test_the_manual_is_whole() -> None:
    fields = {field.name for field in dataclasses.fields(VolumeConfig)}
    assert set(keys()) == fields - {"name"}
    assert {key.name for key in keys().values() if key.live} == {
        "copy_rate", "record_limit", "resync_target", "era_interval", "predictor", "trace",
        "late_writes", "fence_command", "fence_options", "fence_delay", "fence_timeout", "takeover",
        "cut_patience", "point_interval", "spool_limit", "compress",
    }  # fmt: skip
    assert all(key.doc.endswith(".") for key in keys().values())


toml_values = st.recursive(
    st.text(max_size=12) | st.integers() | st.floats() | st.booleans(),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=3,
)


@given(st.dictionaries(st.sampled_from([key.name for key in keys().values()]), toml_values))
def test_any_table_gives_a_volume_or_problems(table: dict[str, Any]) -> None:
    config, problems = cfg.build_volume("v", table, {}, "f", "nbd+unix:///v?socket=/s")
    assert (config is None) == bool(problems)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "copy_rate": st.integers(1, 1 << 40),
            "record_limit": st.integers(1, 1 << 50),
            "era_interval": st.integers(100, 600_000).map(lambda ms: f"{ms}ms"),
            "predictor": st.sampled_from(["superset", "lru", "none"]),
            "late_writes": st.sampled_from(["0s", "1500ms", "10min", "2h"]),
        },
    )
)
def test_what_is_rendered_is_read_back(changes: dict[str, Any]) -> None:
    listen = "nbd+unix:///v?socket=/s"
    config, _ = cfg.build_volume("v", BASE | changes, {}, "f", listen)
    assert config is not None
    table = cfg.render(config, [key.name for key in keys().values()])
    assert cfg.build_volume("v", table, {}, "f", listen) == (config, [])


def test_what_this_user_may_not_read_is_a_matter_of_permission_if_it_is_all() -> None:
    hidden, wrong = denied("f", "cannot be read"), Problem("g", "k", "is wrong", None)
    assert isinstance(config_error([hidden]), PermissionError_)
    assert config_error([hidden]).hint == "run it as root"
    assert isinstance(config_error([hidden, wrong]), ConfigError)
    assert isinstance(config_error([]), ConfigError)


RECEIVER = {"secondary": "receiver+unix:///far?socket=/run/far", "attach": "nbd"}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"secondary": "receiver+tcp://far/vol0"}, "secondary"),
        ({"secondary": "receiver+tls://far/.x"}, "secondary"),
        ({"secondary": "receiver+tls://far/vol0"}, "partner_certificates"),
        ({"initial_sync": "checksum"}, "initial_sync"),
        ({"initial_sync": "skip"}, "initial_sync"),
        ({"point_interval": "50ms"}, "point_interval"),
        ({"point_interval": "25h"}, "point_interval"),
        ({"spool_limit": 0}, "spool_limit"),
        ({"spool": "not/absolute"}, "spool"),
        ({"spool_file_limit": 0}, "spool_file_limit"),
        ({"compress": "zstd"}, "compress"),
        ({"start_alone": True}, "start_alone"),
        ({"node": 1, "partner": "unix:///b", "partner_listen": "unix:///a"}, "secondary"),
    ],
)
def test_a_volume_with_a_receiver_is_refused_with_its_key(
    write: Write, changes: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_volume(write(vol0=toml_of(**{**RECEIVER, **changes})), "vol0")
    assert [problem.key for problem in caught.value.problems] == [key]


def test_a_receiver_is_a_secondary_with_settings_of_its_own(write: Write) -> None:
    table = {**RECEIVER, "point_interval": "300ms", "spool_limit": "1MiB", "start_alone": "no"}
    config = load_volume(write(vol0=toml_of(**table)), "vol0")
    assert has_receiver(config)
    assert (config.point_interval_s, config.spool_limit_bytes) == (0.3, 1 << 20)
    assert (config.compress, config.start_alone) == ("auto", "no")
    assert effective_cut_patience_s(config) == 0.05
    config = changed(config, {"cut_patience": "2s", "point_interval": "1h", "compress": "off"})
    assert effective_cut_patience_s(config) == 2.0
    assert (config.point_interval_s, config.compress) == (3600.0, "off")
    tls = {**RECEIVER, "secondary": "receiver+tls://far/vol0", "tls_certificates": "/c"}
    assert has_receiver(load_volume(write(vol0=toml_of(**tls)), "vol0"))


def test_a_group_is_of_volumes_with_a_receiver(write: Write) -> None:
    assert problems_of(write(vol0=toml_of(group="g"))) == [("vol0.toml", "group")]


def test_settings_of_points_are_refused_without_a_receiver(write: Write) -> None:
    config = load_volume(write(vol0=toml_of()), "vol0")
    assert not has_receiver(config)
    with pytest.raises(ConfigError) as caught:
        changed(config, {"point_interval": "1s", "copy_rate": "1MiB/s"})
    (problem,) = caught.value.problems
    assert problem.key == "point_interval"
    assert "receiver" in problem.message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("serve", "on-promote"),
        ("record_on", "partner"),
        ("partner_ack", "stored"),
        ("record_fallback", "false"),
        ("partner_record", "/dev/r2"),
        ("on_cut", "go-on"),
    ],
)
def test_what_only_a_pair_has_is_refused_without_one(write: Write, key: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_volume(write(vol0=toml_of(**{key: value})), "vol0")
    (problem,) = caught.value.problems
    assert problem.key == key
    assert f"{value} is for one of two appliances" in problem.message


PAIR = {"node": 1, "partner": "tls://b", "partner_listen": "tls://a", "attach": "nbd"}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"node": 3}, "node"),
        ({"node": True}, "node"),
        ({"partner": "nbd://b"}, "partner"),
        ({"partner": "tls://a:10820"}, "partner"),
        ({"partner_listen": "none"}, "partner_listen"),
        ({"node": "none"}, "node"),
        ({"attach": "dm"}, "attach"),
        ({"partner_certificates": "none"}, "partner_certificates"),
        ({"partner_name": "a b"}, "partner_name"),
        ({"partner_fingerprint": "12:34"}, "partner_fingerprint"),
        ({"partner_timeout": "0s"}, "partner_timeout"),
        ({"takeover": "auto"}, "takeover"),
        ({"takeover": "always"}, "takeover"),
        ({"fence_command": "fence_scsi"}, "fence_command"),
        ({"fence_command": ""}, "fence_command"),
        ({"fence_options": "ip"}, "fence_options"),
        ({"fence_options": "ip="}, "fence_options"),
        ({"fence_options": "i.p=x"}, "fence_options"),
        ({"fence_options": "ip=1 ip=2"}, "fence_options"),
        ({"fence_options": "ip='1"}, "fence_options"),
        ({"fence_options": "action=status"}, "fence_options"),
        ({"fence_options": 3}, "fence_options"),
        ({"fence_timeout": "0s"}, "fence_timeout"),
        ({"cut_patience": "0s"}, "cut_patience"),
    ],
)
def test_a_pair_is_refused_with_its_key(write: Write, changes: dict[str, Any], key: str) -> None:
    table = {**PAIR, "partner_certificates": "/etc/pair", **changes}
    with pytest.raises(ConfigError) as caught:
        load_volume(write(vol0=toml_of(**table)), "vol0")
    assert [problem.key for problem in caught.value.problems] == [key]


def test_a_pair_is_complete_with_three_keys(write: Write) -> None:
    table = {**PAIR, "partner": "unix:///run/b", "partner_listen": "unix:///run/a", "node": "2"}
    config = load_volume(write(vol0=toml_of(**table)), "vol0")
    assert (config.node, config.partner, config.partner_listen) == (
        2,
        "unix:///run/b",
        "unix:///run/a",
    )
    pinned = ":".join(["AB"] * 32)
    table = {**PAIR, "tls_certificates": "/c", "partner_fingerprint": pinned, "partner_name": "b.x"}
    config = load_volume(write(vol0=toml_of(**table)), "vol0")
    assert (config.partner, config.partner_fingerprint) == ("tls://b:10820", "ab" * 32)
    assert config.partner_name == "b.x"


def test_with_device_mapper_one_node_of_a_pair_serves(write: Write) -> None:
    table = {**PAIR, "partner": "unix:///run/b", "partner_listen": "unix:///run/a", "attach": "dm"}
    config = load_volume(write(vol0=toml_of(**table, serve="on-promote")), "vol0")
    assert (config.attach, config.serve) == ("dm", "on-promote")
    with pytest.raises(ConfigError) as caught:
        load_volume(write(vol0=toml_of(**table)), "vol0")
    (problem,) = caught.value.problems
    assert "one node of a pair serves at a time" in problem.message
    assert "serve = on-promote at both nodes" in str(problem.hint)


def test_how_the_other_node_is_fenced(write: Write) -> None:
    table = {
        **PAIR,
        "partner": "unix:///run/b",
        "partner_listen": "unix:///run/a",
        "fence_command": "/usr/sbin/fence_ipmilan",
        "fence_options": "ip=10.0.0.9 password='a b' action=reboot",
        "takeover": "auto",
        "cut_patience": "30s",
    }
    config = load_volume(write(vol0=toml_of(**table)), "vol0")
    said = (("ip", "10.0.0.9"), ("password", "a b"), ("action", "reboot"))
    assert (config.fence_command, config.fence_options) == ("/usr/sbin/fence_ipmilan", said)
    assert config.cut_patience_s == 30.0
    written = render(config, ["fence_options", "cut_patience"])
    assert written == {
        "fence_options": "ip=10.0.0.9 'password=a b' action=reboot",
        "cut_patience": "30s",
    }
    as_table = toml_of(**{**table, "fence_options": None}) + "[fence_options]\nip = '10.0.0.9'\n"
    assert load_volume(write(vol0=as_table), "vol0").fence_options == said[:1]


def test_automatic_takeover_is_never_without_a_fence_command(write: Write) -> None:
    """Whichever of the two is set last."""
    table = {**PAIR, "partner_certificates": "/c", "fence_command": "/bin/true"}
    config = load_volume(write(vol0=toml_of(**table)), "vol0")
    config = changed(config, {"takeover": "auto"})
    assert (config.takeover, config.fence_options) == ("auto", ())
    with pytest.raises(ConfigError) as caught:
        changed(config, {"fence_command": "none"})
    assert [problem.key for problem in caught.value.problems] == ["takeover"]


@pytest.mark.parametrize(
    ("node", "written", "delay_s"), [("1", "auto", 1.0), ("2", "auto", 6.0), ("2", "0s", 0.0)]
)
def test_two_that_live_do_not_shoot_at_once(
    write: Write, node: str, written: str, delay_s: float
) -> None:
    table = {**PAIR, "partner_certificates": "/c", "node": node, "fence_delay": written}
    config = load_volume(write(vol0=toml_of(**table)), "vol0")
    assert effective_fence_delay_s(config) == delay_s


KEEPER = {
    "partner_role": "keeper",
    "primary": None,
    "secondary": None,
    "node": 2,
    "partner": "unix:///run/a",
    "partner_listen": "unix:///run/b",
}


def test_a_keeper_names_its_record_and_nothing_else(write: Write) -> None:
    config = load_volume(write(vol0=toml_of(**KEEPER)), "vol0")
    assert device_of(config) == ""
    assert local_media(config) == {"record": config.record}


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"primary": "/dev/p"}, "primary"),
        ({"secondary": "/dev/s"}, "secondary"),
        ({"node": 1}, "node"),
        ({"on_cut": "go-on"}, "on_cut"),
    ],
)
def test_what_a_keeper_has_no_use_for_is_refused(
    write: Write, more: dict[str, Any], key: str
) -> None:
    assert ("vol0.toml", key) in problems_of(write(vol0=toml_of(**{**KEEPER, **more})))


@pytest.mark.parametrize(
    ("more", "intervals_s"),
    [
        ({}, (1.0, 1.0)),
        ({"attach": "dm"}, (5.0, 20.0)),
        ({"era_interval": "2s"}, (2.0, 2.0)),
        ({"era_interval": "2s", "attach": "dm"}, (2.0, 2.0)),
    ],
)
def test_how_long_eras_are(
    write: Write, more: dict[str, str], intervals_s: tuple[float, float]
) -> None:
    config = load_volume(write(vol0=toml_of(**more)), "vol0")
    assert effective_era_intervals_s(config) == intervals_s


@pytest.mark.parametrize(
    ("more", "block_kib"),
    [
        ({}, 64),
        ({"attach": "nbd"}, 64),
        ({"attach": "dm"}, 256),
        ({"attach": "dm", "block_size": "32KiB"}, 32),
        ({"attach": "dm", "block_size": "auto", "extent_size": "128KiB"}, 128),
        ({"extent_size": "16KiB"}, 16),
        ({"attach": "dm", "secondary": "nbd://far/vol0"}, 64),
        ({**RECEIVER, "attach": "dm"}, 64),
        ({**KEEPER}, 64),
    ],
)
def test_how_large_blocks_are(write: Write, more: dict[str, Any], block_kib: int) -> None:
    config = load_volume(write(vol0=toml_of(**more)), "vol0")
    assert effective_block_size_bytes(config) == block_kib << 10


def test_the_nodes_of_a_pair_have_the_same_block_whatever_each_is_attached_by(write: Write) -> None:
    config = load_volume(write(vol0=toml_of(attach="dm")), "vol0")
    one_of_two = dataclasses.replace(config, partner="partner+tls://other")
    assert effective_block_size_bytes(one_of_two) == 64 << 10
