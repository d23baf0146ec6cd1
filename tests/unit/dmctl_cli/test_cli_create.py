"""create: what it makes, and everything it refuses, all at once and without a trace."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bitmapd.config import load_volume
from bitmapd.record import tool
from bitmapd.record.layout import InitialSync, RecordFlag
from dmctl.cli import create
from tests.support.cli import MIB, Cli, Outcome, new_cli


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    with new_cli(tmp_path) as made:
        yield made


def content(cli: Cli) -> dict[str, bytes]:
    """Every file that a command might have changed."""
    return {str(path): path.read_bytes() for path in cli.folder.rglob("*") if path.is_file()}


def refused(cli: Cli, status: int, *words: str) -> Outcome:
    before = content(cli)
    outcome = cli.call(*words)
    assert outcome.status == status, outcome
    assert content(cli) == before
    return outcome


def words(cli: Cli, name: str = "vol0", **options: str) -> list[str]:
    """`create` with media that are there, unless an option says otherwise."""
    line = ["create", name]
    for key, value in ({"primary": "p", "secondary": "s", "record": "r"} | options).items():
        is_path = key in ("primary", "secondary", "record") and "://" not in value
        line.append(f"--{key.replace('_', '-')}={cli.folder / value if is_path else value}")
    return line


@pytest.fixture
def media(cli: Cli) -> Cli:
    for name in ("p", "s"):
        cli.medium(name)
    cli.medium("r", MIB)
    return cli


def test_a_volume_is_made_of_record_and_configuration(media: Cli) -> None:
    outcome = media.call(*words(media, record_limit="80m", era_interval="500ms"))
    assert outcome.status == 0
    assert outcome.out == ""
    assert "dmctl start vol0" in outcome.err
    config = load_volume(media.paths, "vol0")
    assert config.record_limit_bytes == 80 * MIB
    assert config.era_interval_s == 0.5
    table = tomllib.loads(media.paths.volume_file("vol0").read_text())
    assert table["extent_size"] == "1MiB"
    assert "predictor" not in table
    loaded = tool.load(media.folder / "r")
    superblock = loaded.superblock
    assert superblock.volume_uuid == config.uuid
    assert superblock.name == "vol0"
    assert superblock.geometry.size_bytes == 8 * MIB
    assert superblock.initial_sync is InitialSync.FULL
    assert superblock.session == 0
    assert loaded.bits.all()


@pytest.mark.parametrize(
    ("mode", "initial", "ones"),
    [("checksum", InitialSync.CHECKSUM, True), ("skip", InitialSync.NONE, False)],
)
def test_initial_sync(media: Cli, mode: str, initial: InitialSync, ones: bool) -> None:
    shutil.copyfile(media.folder / "p", media.folder / "s")
    media.ok(*words(media, initial_sync=mode))
    loaded = tool.load(media.folder / "r")
    assert loaded.superblock.initial_sync is initial
    assert loaded.bits.all() == ones
    assert loaded.bits.any() == ones
    assert bool(loaded.superblock.flags & RecordFlag.SYNC_SKIPPED) == (mode == "skip")


def test_skip_is_refused_where_samples_differ(media: Cli) -> None:
    outcome = refused(media, 101, *words(media, initial_sync="skip"))
    assert "differ near byte 0" in outcome.err
    shutil.copyfile(media.folder / "p", media.folder / "s")
    with (media.folder / "s").open("r+b") as stream:
        stream.seek(8 * MIB - 1)
        stream.write(b"x")
    assert "differ near byte" in refused(media, 101, *words(media, initial_sync="skip")).err


def test_a_dry_run_prints_the_plan_and_changes_nothing(media: Cli) -> None:
    outcome = refused(media, 0, *words(media), "--dry-run")
    assert "initial_sync         full" in outcome.out
    plan = refused(media, 0, *words(media), "--dry-run", "--json").json
    assert plan["dry_run"] is True
    assert plan["volume"]["extents"] == 8
    assert plan["volume"]["record_limit_bytes"] == 64 * MIB
    assert plan["output_version"]["command"] == "create"


def test_json_of_a_creation(media: Cli) -> None:
    made = media.ok(*words(media), "--json").json
    assert made["dry_run"] is False
    assert made["volume"]["uuid"] == str(load_volume(media.paths, "vol0").uuid)


def test_everything_that_is_wrong_is_listed_at_once(media: Cli) -> None:
    (media.folder / "tiny").write_bytes(b"x" * 512)
    outcome = refused(
        media,
        2,
        *words(media, name=".bad", primary="p", secondary="tiny", record="gone", attach="usb"),
        "--block-size=2MiB",
    )
    assert "'.bad' cannot be the name" in outcome.err
    assert "record" in outcome.err
    assert "gone does not exist" in outcome.err
    assert "auto, nbd, dm" in outcome.err
    outcome = refused(media, 10, *words(media, secondary="tiny", record="gone"))
    assert "for 2 reasons" in outcome.err
    assert "secondary" in outcome.err
    assert "has 512 bytes" in outcome.err
    error = refused(media, 10, *words(media, secondary="tiny", record="gone"), "--json").json
    assert error["error"]["code"] == "not-found"


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"primary": "gone"}, 10, "primary"),
        ({"attach": "dm"}, 2, "is not a block device"),
        ({"secondary": "."}, 2, "neither a block device nor a regular file"),
        ({"secondary": "p"}, 2, "are the same medium"),
        ({"record": "p"}, 2, "are the same medium"),
        ({"record": "small"}, 13, "truncate -s 139264"),
        ({"primary": "odd"}, 2, "truncate -s 8388608"),
        ({"block_size": "3k"}, 2, "not a power of two"),
        ({"extent_size": "1MB"}, 2, "write 1MiB"),
        ({"predictor": "supersat"}, 2, "superset"),
        ({"era_interval": "5"}, 2, "--era-interval"),
        ({"record_limit": "1g", "resync_target": "5s"}, 2, "excludes"),
        ({"initial_sync": "ful"}, 2, "did you mean full?"),
        ({"listen": "nbd://0.0.0.0/x"}, 2, "--listen"),
        ({"tls_certificates": "/nonexistent", "listen": "nbds://127.0.0.1/x"}, 10, "ca-cert.pem"),
        ({"secondary": "nbd+unix:///x?socket=/nonexistent/s"}, 15, "secondary nbd+unix"),
        ({"secondary": "nbd+unix:///x"}, 2, "socket=PATH is missing"),
    ],
)
def test_refusals(media: Cli, options: dict[str, str], status: int, message: str) -> None:
    media.medium("small", 4096)
    media.medium("odd", 8 * MIB - 100)
    assert message in refused(media, status, *words(media, **options)).err


def test_the_name_is_taken_once(media: Cli) -> None:
    media.ok(*words(media))
    for name in ("p2", "s2"):
        media.medium(name)
    media.medium("r2", MIB)
    outcome = refused(media, 11, *words(media, primary="p2", secondary="s2", record="r2"))
    assert "exists already" in outcome.err


def test_media_of_another_volume_are_refused_even_by_another_name(media: Cli) -> None:
    media.ok(*words(media))
    (media.folder / "link").symlink_to(media.folder / "p")
    media.medium("s2")
    media.medium("r2", MIB)
    outcome = refused(
        media, 12, *words(media, "vol1", primary="link", secondary="s2", record="r2"), "--force"
    )
    assert "is the primary of volume 'vol0'" in outcome.err


def test_a_broken_neighbour_is_noted_and_no_obstacle(media: Cli) -> None:
    media.paths.volumes_dir.mkdir(parents=True)
    media.paths.volume_file("other").write_text("?")
    outcome = media.call(*words(media))
    assert outcome.status == 0
    assert "note: the configuration of 'other' has errors" in outcome.err


def mkfs(path: Path) -> None:
    program = shutil.which("mke2fs", path=f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin")
    if program is None:
        pytest.skip("mke2fs is not installed: nothing to make a file system with")
    subprocess.run([program, "-q", "-F", path], check=True, timeout=60)


def test_what_is_on_the_secondary_or_record_is_named_and_kept(media: Cli) -> None:
    mkfs(media.folder / "s")
    mkfs(media.folder / "r")
    outcome = refused(media, 11, *words(media))
    assert outcome.err.count("ext") == 2
    assert outcome.err.count("--force overwrites it") == 2
    plan = media.ok(*words(media), "--force", "--json").json
    assert len(plan["volume"]["overwritten"]) == 2


def test_a_file_system_on_the_primary_is_no_obstacle_and_on_its_copy_neither(media: Cli) -> None:
    mkfs(media.folder / "p")
    shutil.copyfile(media.folder / "p", media.folder / "s")
    refused(media, 11, *words(media))
    media.ok(*words(media, initial_sync="checksum"))


def session_of(record: Path) -> int:
    probed = tool.probe(record)
    assert probed is not None
    return probed.session


def test_the_record_of_another_volume_needs_force(media: Cli) -> None:
    media.ok(*words(media))
    media.paths.volume_file("vol0").unlink()
    outcome = refused(media, 22, *words(media, "vol1"))
    assert "belongs to volume 'vol0'" in outcome.err
    media.ok(*words(media, "vol1"), "--force")
    probed = tool.probe(media.folder / "r")
    assert probed is not None
    assert probed.name == "vol1"


def test_a_creation_that_was_cut_short_can_be_repeated(media: Cli) -> None:
    """The record is formatted and the configuration is not there: nothing was ever started."""
    media.ok(*words(media))
    media.paths.volume_file("vol0").unlink()
    assert "earlier" in media.call(*words(media)).err
    assert load_volume(media.paths, "vol0").name == "vol0"


@pytest.mark.parametrize(
    ("flags", "status"), [(RecordFlag(0), 22), (RecordFlag.CLEAN, 0)], ids=["unclean", "clean"]
)
def test_an_earlier_record_of_that_name_goes_if_it_is_clean(
    media: Cli, flags: RecordFlag, status: int
) -> None:
    media.ok(*words(media))
    media.paths.volume_file("vol0").unlink()
    with tool.RecordMedium.open(media.folder / "r") as medium:
        old = tool.load(medium).superblock
        tool.write_superblock(medium, old.updated(0, session=3, flags=flags))
    outcome = media.call(*words(media))
    assert outcome.status == status
    if status:
        assert "not stopped cleanly" in outcome.err
        media.ok(*words(media), "--force")
    # What the old process had sent may land late: its successor's first session is no first one.
    assert session_of(media.folder / "r") == (1 if status else 0)


def test_a_damaged_or_newer_record_needs_force(media: Cli) -> None:
    media.ok(*words(media))
    media.paths.volume_file("vol0").unlink()
    with (media.folder / "r").open("r+b") as stream:
        for offset in (100, 65536 + 100):
            stream.seek(offset)
            stream.write(b"\xff")
    refused(media, 20, *words(media))
    media.ok(*words(media), "--force")
    assert session_of(media.folder / "r") == 1


def test_a_record_that_is_being_served_is_busy_even_with_force(media: Cli) -> None:
    media.ok(*words(media))
    media.paths.volume_file("vol0").unlink()
    with tool.RecordMedium.open(media.folder / "r") as medium:
        medium.lock()
        outcome = refused(media, 12, *words(media), "--force")
    assert "in use" in outcome.err


def test_a_configuration_that_cannot_be_written_leaves_no_volume(
    media: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "vol0.toml")

    with monkeypatch.context() as patched:
        patched.setattr("dmctl.cli.create.create_volume", full)
        assert media.call(*words(media)).status == 13
    assert media.call("status", "vol0").status == 10
    assert tool.probe(media.folder / "r") is None
    media.ok(*words(media))


def nbdkit(folder: Path, socket: Path, size: str, *filters: str) -> subprocess.Popen[bytes]:
    program = shutil.which("nbdkit")
    if program is None:
        pytest.skip("nbdkit is not installed: there is no foreign server to look at")
    pid_file = folder / "nbdkit.pid"
    command = [program, "--foreground", "--pidfile", str(pid_file), "--unix", str(socket)]
    process = subprocess.Popen([*command, *filters, "memory", size], stdin=subprocess.DEVNULL)
    while not pid_file.exists() and process.poll() is None:
        try:
            process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
    assert process.poll() is None
    return process


@pytest.mark.parametrize(
    ("size", "options", "status", "message"),
    [
        ("8M", (), 0, ""),
        ("4M", (), 13, "has 4194304 bytes"),
        ("8M", ("-r",), 15, "secondary nbd+unix"),
        ("8M", ("--initial-sync=skip",), 101, "differ near byte 0"),
    ],
)
def test_an_nbd_secondary_is_asked_what_it_is(
    media: Cli, size: str, options: tuple[str, ...], status: int, message: str
) -> None:
    socket = media.paths.run_dir / "secondary"
    server = nbdkit(media.folder, socket, size, *[o for o in options if o == "-r"])
    try:
        more = [o for o in options if o != "-r"]
        target = f"nbd+unix:///?socket={socket}"
        outcome = media.call(*words(media, secondary=target), *more)
        assert outcome.status == status, outcome
        assert message in outcome.err
    finally:
        server.send_signal(signal.SIGKILL)
        server.wait(10)


def test_a_mounted_secondary_is_busy_even_with_force(media: Cli) -> None:
    """Needs root, loop devices and mount; elsewhere the kernel's own test of `in_use` stands."""
    tools = [
        shutil.which(name, path="/sbin:/usr/sbin:/bin:/usr/bin") for name in ("losetup", "mount")
    ]
    if os.geteuid() != 0 or None in tools:
        pytest.skip("needs root, losetup and mount")
    mkfs(media.folder / "s")
    where = media.folder / "mounted"
    where.mkdir()
    attach = subprocess.run(
        ["losetup", "--find", "--show", media.folder / "s"],
        capture_output=True,
        text=True,
        check=False,
    )
    if attach.returncode != 0:
        pytest.skip(f"no loop device can be had here: {attach.stderr.strip()}")
    device = attach.stdout.strip()
    try:
        mounted = subprocess.run(
            ["mount", "-o", "ro", device, where], capture_output=True, check=False
        )
        if mounted.returncode != 0:
            pytest.skip("mount is not allowed here")
        try:
            arguments = [*words(media), "--force"]
            arguments[3] = f"--secondary={device}"
            outcome = media.call(*arguments)
            assert outcome.status == 12, outcome
            assert f"mounted on {where}" in outcome.err
            assert not media.paths.volume_file("vol0").exists()
        finally:
            subprocess.run(["umount", where], check=True)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.parametrize(
    ("given", "is_remote", "block_kib"),
    [(None, False, 256), (None, True, 64), (128 << 10, True, 128)],
)
def test_a_disk_behind_a_network_gets_small_blocks(
    media: Cli,
    monkeypatch: pytest.MonkeyPatch,
    given: int | None,
    is_remote: bool,
    block_kib: int,
) -> None:
    assert media.call(*words(media)).status == 0
    config = replace(load_volume(media.paths, "vol0"), block_size_bytes=given)
    monkeypatch.setattr(create, "is_remote_path", lambda path: is_remote)
    monkeypatch.setattr(create, "resolved", lambda config: replace(config, attach="dm"))
    assert create._decided(config, {}).block_size_bytes == block_kib << 10
