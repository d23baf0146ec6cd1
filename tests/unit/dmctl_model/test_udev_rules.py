"""The rules that name media, the decision to start, and the files that follow from both."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.config import Paths, ReceiverConfig, VolumeConfig, load_any, load_volume
from dmctl.kernel import systemd
from dmctl.model import udev
from dmctl.model.assembly import (
    FIRST_RETRY_S,
    LONGEST_RETRY_S,
    Assembly,
    Do,
    Verdict,
    local_media,
)
from dmctl.model.udev import Medium, device_name, lines_of, objection, render

ROOT = Path(__file__).parents[3]
UUIDS = ("0a9e5c39-53b6-4ef4-8fb6-e7a0b5ec7d10", "1a9e5c39-53b6-4ef4-8fb6-e7a0b5ec7d10")
ALL = ("primary", "record", "secondary")

# -- rules ------------------------------------------------------------------------------------


def rules_of(text: str) -> list[tuple[str, str]]:
    """What a line asks for, and what it then says."""
    return [
        tuple(line.split(", ", 1))  # type: ignore[misc]
        for line in text.splitlines()
        if line.startswith(("KERNEL", "SYMLINK"))
    ]


def test_a_link_and_a_name_of_the_kernel() -> None:
    text = render(
        [
            Medium("vol0", "primary", "/dev/disk/by-id/nvme-X_1", True),
            Medium("vol0", "record", "/dev/sdb1", False),
        ]
    )
    says = 'ENV{DMCTL_VOLUME}="vol0", ENV{DMCTL_ROLE}='
    assert rules_of(text) == [
        ('KERNEL=="disk!by-id!nvme-X_1"', f'{says}"primary", ENV{{DMCTL_ASSEMBLE}}="1"'),
        ('SYMLINK=="disk/by-id/nvme-X_1"', f'{says}"primary", ENV{{DMCTL_ASSEMBLE}}="1"'),
        ('KERNEL=="sdb1"', f'{says}"record"'),
        ('SYMLINK=="sdb1"', f'{says}"record"'),
    ]


@pytest.mark.parametrize(
    "path", ["/srv/image", "/dev/", "/dev//", "/devices/x", "nbd://host/export"]
)
def test_what_is_no_device_has_no_rule_and_is_no_mistake(path: str) -> None:
    medium = Medium("v", "primary", path, True)
    assert device_name(path) is None
    assert objection(medium) is None
    assert rules_of(render([medium])) == []


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/dev/disk/by-uuid/1-2", "same link"),
        ("/dev/disk/by-label/data", "same link"),
        ('/dev/x"y', "cannot hold that name"),
        ("/dev/sd*", "cannot hold that name"),
        ("/dev/a|b", "cannot hold that name"),
        ("/dev/a b", "cannot hold that name"),
        ("/dev/é", "cannot hold that name"),
        ("/dev/$(x)", "cannot hold that name"),
        ("/dev/../srv/x", "cannot hold that name"),
        ("/dev/disk//x", "cannot hold that name"),
        ("/dev/./x", "cannot hold that name"),
    ],
)
def test_what_cannot_be_written_is_told_and_left_out(path: str, reason: str) -> None:
    medium = Medium("v", "secondary", path, True)
    error = objection(medium)
    assert error is not None
    assert reason in error.message
    assert error.hint is not None
    assert rules_of(render([medium])) == []


@given(st.text(min_size=1), st.booleans())
def test_nothing_but_plain_names_gets_into_a_rule(name: str, start: bool) -> None:
    text = render([Medium("v", "record", f"/dev/{name}", start)])
    for match, _ in rules_of(text):
        assert re.fullmatch(r'(KERNEL|SYMLINK)=="[A-Za-z0-9#+.:=@_/!\\-]+"', match)
    assert len(text.splitlines()) - 5 in (0, 2)


def test_lines_of_a_volume_that_cannot_be_read_are_kept() -> None:
    media = [Medium(name, "primary", f"/dev/{name}", True) for name in ("a", "b")]
    old = render(media)
    kept = lines_of(old, "a")
    assert len(kept) == 2
    assert rules_of(render(media[1:], kept)) == rules_of(old)
    assert lines_of(old, "c") == lines_of("", "a") == []


def test_the_partition_type_in_the_rules_is_the_documented_one() -> None:
    assert udev.RECORD_PARTITION_TYPE in (ROOT / "udev/69-dmctl.rules").read_text()
    assert udev.RECORD_PARTITION_TYPE in (ROOT / "docs/boot.md").read_text()


def test_rules_are_read_in_the_order_they_need() -> None:
    foreign = [
        "50-udev-default",
        "60-persistent-storage",
        "63-md-raid-arrays",
        "64-btrfs",
        "69-lvm",
    ]
    ours = [udev.FILE_NAME, *(path.name for path in (ROOT / "udev").glob("*.rules"))]
    names = sorted([*(f"{name}.rules" for name in foreign), *ours])
    assert names == [
        "11-dm-dmctl.rules",
        "50-udev-default.rules",
        "60-persistent-storage.rules",
        "63-md-raid-arrays.rules",
        "63-volumes-dmctl.rules",
        "63-volumes-hide-dmctl.rules",
        "64-btrfs.rules",
        "69-dmctl.rules",
        "69-lvm.rules",
    ]


def test_every_jump_in_the_rules_has_its_mark_further_down() -> None:
    texts = [path.read_text() for path in (ROOT / "udev").glob("*.rules")]
    for text in [*texts, render([Medium("v", "primary", "/dev/x", True)])]:
        for jump in re.finditer(r'GOTO="(\w+)"', text):
            assert f'LABEL="{jump[1]}"' in text[jump.end() :]
        for line in text.splitlines():
            if line and not line.startswith("#"):
                # udev 252 drops a whole line with a link that is taken away.
                assert re.fullmatch(
                    r'([A-Z]+(\{\w+\}|\{[\w/]+\})?(==|!=|\+=|:=|=)".*"(, )?)+', line
                )
                assert "SYMLINK-=" not in line


def test_what_shows_the_file_system_of_a_volume_is_hidden() -> None:
    text = (ROOT / "udev/63-volumes-hide-dmctl.rules").read_text()
    found = re.search(r'ENV\{DMCTL_ROLE\}!="([^"]*)", GOTO="dmctl_hide_end"', text)
    assert found is not None
    assert set(found[1].split("|")) == {"primary", "secondary", "image"}


def test_nothing_that_a_device_says_reaches_a_shell() -> None:
    for path in (ROOT / "udev").glob("*.rules"):
        for line in path.read_text().splitlines():
            for program in re.findall(r'(?:PROGRAM==|IMPORT\{program\}=|RUN\S*=)"(\S+)', line):
                assert program in ("/usr/bin/awk", "/usr/local/bin/dmctl")


# -- when to start ----------------------------------------------------------------------------


def test_it_waits_says_so_once_and_starts_once() -> None:
    volume = Assembly(patience_s=30)
    assert volume.look(("record", "primary"), 0) == Verdict(Do.WAIT, ("primary", "record"))
    assert volume.look(("record", "primary"), 1) == Verdict(Do.NOTHING, ("primary", "record"))
    assert volume.look(("record",), 2) == Verdict(Do.WAIT, ("record",))
    assert volume.look((), 3) == Verdict(Do.START)
    assert volume.look((), 4) == Verdict(Do.NOTHING)
    # Whoever stopped it is not overruled until a medium that it needs has gone and come back.
    assert volume.look(("secondary",), 5) == Verdict(Do.NOTHING)
    assert volume.look((), 6) == Verdict(Do.NOTHING)
    assert volume.look(("record",), 7) == Verdict(Do.WAIT, ("record",))
    assert volume.look((), 8) == Verdict(Do.START)


def test_a_secondary_is_waited_for_in_vain_only_so_long() -> None:
    volume = Assembly(patience_s=30)
    assert volume.look(("secondary",), 10) == Verdict(Do.WAIT, ("secondary",), 40)
    assert volume.look(("secondary",), 39) == Verdict(Do.NOTHING, ("secondary",), 40)
    assert volume.look(("secondary",), 40) == Verdict(Do.START, ("secondary",))


def test_patience_begins_anew_when_something_else_was_missing() -> None:
    volume = Assembly(patience_s=30)
    volume.look(("secondary",), 0)
    volume.look(("record", "secondary"), 29)
    assert volume.look(("secondary",), 31) == Verdict(Do.WAIT, ("secondary",), 61)


def test_a_volume_that_joined_later_is_not_started_by_that() -> None:
    volume = Assembly(armed=False)
    assert volume.look((), 0) == volume.look(("secondary",), 1) == Verdict(Do.NOTHING)
    volume.look(("primary",), 2)
    assert volume.look((), 3) == Verdict(Do.START)


def test_failures_are_tried_again_more_and_more_rarely_unless_it_is_hopeless() -> None:
    volume = Assembly()
    now_s, wait_s = 0.0, FIRST_RETRY_S
    for _ in range(10):
        assert volume.look((), now_s) == Verdict(Do.START)
        assert volume.failed(12, now_s) == now_s + wait_s
        assert volume.look((), now_s) == Verdict(Do.NOTHING, (), now_s + wait_s)
        now_s += wait_s
        wait_s = min(2 * wait_s, LONGEST_RETRY_S)
    assert wait_s == LONGEST_RETRY_S
    assert volume.look((), now_s).do is Do.START
    assert volume.failed(22, now_s) is None
    assert volume.look((), now_s + 1000) == Verdict(Do.NOTHING)
    # Another disk in its place is another chance.
    volume.look(("record",), now_s)
    assert volume.look((), now_s).do is Do.START
    assert volume.failed(12, now_s) == now_s + FIRST_RETRY_S


def test_a_retry_does_not_wait_for_the_secondary_once_more() -> None:
    volume = Assembly(patience_s=30)
    volume.look(("secondary",), 0)
    assert volume.look(("secondary",), 30).do is Do.START
    assert volume.failed(1, 30) == 31
    assert volume.look(("secondary",), 31).do is Do.START


def test_a_process_that_died_is_replaced_at_once_if_it_had_lived() -> None:
    volume = Assembly()
    volume.look((), 0)
    assert volume.died(1) == 1 + FIRST_RETRY_S
    assert volume.look((), 2).do is Do.START
    assert volume.died(3) == 3 + 2 * FIRST_RETRY_S
    assert volume.look((), 5).do is Do.START
    assert volume.died(5 + 2 * LONGEST_RETRY_S) == 5 + 2 * LONGEST_RETRY_S + FIRST_RETRY_S


@given(st.permutations(ALL), st.lists(st.sampled_from(ALL)), st.floats(0, 1e6))
def test_each_order_of_arrival_starts_it_exactly_once(
    order: list[str], noise: list[str], began_s: float
) -> None:
    """Also when events repeat, and when media come and go before all are there."""
    volume = Assembly(patience_s=1e9)
    missing = set(ALL)
    for role in noise:
        missing ^= {role}
        if missing:
            assert volume.look(tuple(missing), began_s).do is not Do.START
        else:
            missing = {role}
    starts = 0
    for role in (*order, *order):
        missing.discard(role)
        verdict = volume.look(tuple(missing), began_s)
        assert (verdict.do is Do.START) <= (not missing)
        starts += verdict.do is Do.START
    assert starts == 1


# -- files of the host ------------------------------------------------------------------------


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An /etc of our own, on a machine where neither udev nor systemd runs."""
    monkeypatch.setattr(systemd, "UDEV_RUNS", tmp_path / "no-udev")
    monkeypatch.setattr(systemd, "SYSTEMD_RUNS", tmp_path / "no-systemd")
    etc = tmp_path / "etc"
    (etc / "udev").mkdir(parents=True)
    (etc / "systemd/system").mkdir(parents=True)
    (etc / "dmctl/volumes").mkdir(parents=True)
    return etc


Write = Callable[..., VolumeConfig]


@pytest.fixture
def write(etc: Path) -> Write:
    def write_volume(name: str = "vol0", **values: str) -> VolumeConfig:
        table = {
            "uuid": UUIDS[name != "vol0"],
            "primary": f"/dev/disk/by-id/{name}-p",
            "secondary": f"nbd://host/{name}",
            "record": f"/dev/disk/by-id/{name}-r",
            "attach": "dm",
            **values,
        }
        lines = [f'{key} = "{value}"\n' for key, value in table.items()]
        (etc / f"dmctl/volumes/{name}.toml").write_text("".join(lines))
        return load_volume(Paths(etc / "dmctl", etc / "run"), name)

    return write_volume


@pytest.fixture
def receives(etc: Path) -> Callable[..., ReceiverConfig]:
    def write_receiver(name: str = "vol0", **values: str) -> ReceiverConfig:
        table = {
            "role": "receiver",
            "image": f"/dev/disk/by-id/{name}-i",
            "journal": f"/dev/disk/by-id/{name}-j",
            "listen": f"receiver+unix:///{name}?socket=/run/{name}.points",
            **values,
        }
        lines = [f'{key} = "{value}"\n' for key, value in table.items()]
        (etc / f"dmctl/volumes/{name}.toml").write_text("".join(lines))
        config = load_any(Paths(etc / "dmctl", etc / "run"), name)
        assert isinstance(config, ReceiverConfig)
        return config

    return write_receiver


def update(etc: Path) -> systemd.Outcome:
    return systemd.update(Paths(etc / "dmctl", etc / "run"), etc=etc)


def test_files_follow_the_configuration(etc: Path, write: Write) -> None:
    rules = etc / "udev/rules.d" / udev.FILE_NAME
    unit = etc / "systemd/system/bitmapd@vol0.service.d/50-dmctl.conf"
    write()
    done = update(etc)
    assert set(done.written) == {rules, unit}
    assert done.problems == []
    assert [match for match, _ in rules_of(rules.read_text())][1::2] == [
        'SYMLINK=="disk/by-id/vol0-p"',
        'SYMLINK=="disk/by-id/vol0-r"',
    ]
    assert (rules.stat().st_mode & 0o777, unit.stat().st_mode & 0o777) == (0o644, 0o644)
    assert update(etc).written == []

    write(secondary="/dev/disk/by-id/vol0-s")
    assert update(etc).written == [rules]
    assert "vol0-s" in rules.read_text()

    (etc / "dmctl/volumes/vol0.toml").unlink()
    assert set(update(etc).written) == {rules, unit}
    assert rules_of(rules.read_text()) == []
    assert not unit.parent.exists()


def test_a_plus_in_a_name_is_escaped_for_systemd_and_not_for_udev(etc: Path, write: Write) -> None:
    write("a+b.C_1-d")
    update(etc)
    folders = [path.name for path in (etc / "systemd/system").iterdir()]
    assert folders == ["bitmapd@a\\x2bb.C_1-d.service.d"]
    assert 'ENV{DMCTL_VOLUME}="a+b.C_1-d"' in (etc / "udev/rules.d" / udev.FILE_NAME).read_text()


def test_what_an_administrator_put_beside_our_drop_in_stays(etc: Path, write: Write) -> None:
    write()
    update(etc)
    folder = etc / "systemd/system/bitmapd@vol0.service.d"
    (folder / "local.conf").write_text("[Service]\n")
    (etc / "dmctl/volumes/vol0.toml").unlink()
    update(etc)
    assert [path.name for path in folder.iterdir()] == ["local.conf"]


def test_a_volume_whose_configuration_is_broken_stays_hidden(etc: Path, write: Write) -> None:
    write("vol0")
    write("vol1")
    update(etc)
    rules = etc / "udev/rules.d" / udev.FILE_NAME
    before = set(rules_of(rules.read_text()))
    (etc / "dmctl/volumes/vol0.toml").write_text("no TOML")
    write("vol1", primary="/dev/disk/by-id/other")
    done = update(etc)
    assert len(done.problems) == 1
    after = set(rules_of(rules.read_text()))
    assert {rule for rule in before - after if "vol0" in rule[1]} == set()
    assert any("other" in match for match, _ in after)
    assert (etc / "systemd/system/bitmapd@vol0.service.d/50-dmctl.conf").exists()


Receives = Callable[..., ReceiverConfig]


def test_a_receiver_has_its_rules_and_its_unit(etc: Path, receives: Receives) -> None:
    rules = etc / "udev/rules.d" / udev.FILE_NAME
    unit = etc / "systemd/system/bitmapd@vol0.service.d/50-dmctl.conf"
    receives(record="/dev/disk/by-id/vol0-r")
    done = update(etc)
    assert set(done.written) == {rules, unit}
    assert done.problems == []
    says = 'ENV{DMCTL_VOLUME}="vol0", ENV{DMCTL_ROLE}='
    assert rules_of(rules.read_text())[1::2] == [
        (f'SYMLINK=="disk/by-id/vol0-{role[0]}"', f'{says}"{role}", ENV{{DMCTL_ASSEMBLE}}="1"')
        for role in ("image", "journal", "record")
    ]
    (etc / "dmctl/volumes/vol0.toml").write_text("no TOML")
    assert update(etc).written == []  # what is hidden stays hidden
    (etc / "dmctl/volumes/vol0.toml").unlink()
    assert set(update(etc).written) == {rules, unit}
    assert rules_of(rules.read_text()) == []
    assert not unit.parent.exists()


def test_who_takes_the_place_of_the_other_is_hidden_as_that(
    etc: Path, write: Write, receives: Receives
) -> None:
    rules = etc / "udev/rules.d" / udev.FILE_NAME
    medium = "/dev/disk/by-id/medium"
    for role in ("primary", "image", "primary"):
        if role == "primary":
            write(primary=medium)
        else:
            receives(image=medium)
        update(etc)
        said = dict(rules_of(rules.read_text()))
        assert f'ENV{{DMCTL_ROLE}}="{role}"' in said['SYMLINK=="disk/by-id/medium"']


def test_udev_looks_at_the_media_of_a_receiver_again(
    etc: Path, receives: Receives, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(systemd, "_look_again", lambda media, outcome: seen.extend(media))
    config = receives(record="/dev/r")
    systemd.update(Paths(etc / "dmctl", etc / "run"), ["/dev/gone", "/dev/r"], etc=etc)
    assert seen == [config.image, config.journal, "/dev/r", "/dev/gone"]


def test_an_image_that_cannot_be_hidden_is_told(etc: Path, receives: Receives) -> None:
    receives(image="/dev/disk/by-uuid/1-2")
    (problem,) = update(etc).problems
    assert "image /dev/disk/by-uuid/1-2 of volume 'vol0' cannot be hidden" in problem.message


def test_media_that_cannot_be_hidden_are_told(etc: Path, write: Write) -> None:
    write(primary="/dev/disk/by-uuid/1-2")
    (problem,) = update(etc).problems
    assert "primary /dev/disk/by-uuid/1-2 of volume 'vol0' cannot be hidden" in problem.message


def test_only_the_configuration_of_the_host_concerns_udev(tmp_path: Path, write: Write) -> None:
    write()
    other = tmp_path / "other"
    (other / "udev").mkdir(parents=True)
    paths = Paths(tmp_path / "etc/dmctl", tmp_path / "run")
    assert systemd.update(paths, etc=other).written == []
    assert list(other.rglob("*")) == [other / "udev"]


def test_a_host_without_udev_or_systemd_gets_no_files(etc: Path, write: Write) -> None:
    write()
    shutil.rmtree(etc / "udev")
    shutil.rmtree(etc / "systemd")
    assert update(etc).written == []


def test_udev_and_systemd_are_told(
    etc: Path, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools, log = tmp_path / "bin", tmp_path / "log"
    tools.mkdir()
    for name in ("udevadm", "systemctl"):
        (tools / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {log}\necho no >&2\nexit 1\n')
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    monkeypatch.setattr(systemd, "UDEV_RUNS", tmp_path)
    monkeypatch.setattr(systemd, "SYSTEMD_RUNS", tmp_path)
    write()
    messages = [problem.message for problem in update(etc).problems]
    assert log.read_text() == "systemctl daemon-reload\nudevadm control --reload\n"
    assert messages == [
        "'systemctl daemon-reload' failed: no",
        "'udevadm control --reload' failed: no",
    ]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, ["Before=local-fs-pre.target", "Wants=local-fs-pre.target"]),
        (
            {"attach": "nbd"},
            [
                "After=local-fs.target network.target",
                "Before=remote-fs-pre.target",
                "Wants=remote-fs-pre.target",
            ],
        ),
        (
            {"record": "/srv/a b%c/record", "secondary": "/srv/copy"},
            [
                'RequiresMountsFor="/srv/a b%%c/record"',
                'RequiresMountsFor="/srv/copy"',
                "After=local-fs.target network.target",
                "Before=remote-fs-pre.target",
                "Wants=remote-fs-pre.target",
            ],
        ),
    ],
)
def test_mounts_come_after_the_volume(
    write: Write, values: dict[str, str], wanted: list[str]
) -> None:
    config = write(**values)
    assert systemd.drop_in(config).splitlines()[1:] == ["[Unit]", *wanted]


@pytest.mark.parametrize(
    ("values", "files"),
    [
        ({}, []),
        ({"record": "/srv/r"}, []),
        ({"image": "/srv/i", "journal": "/j"}, ["/srv/i", "/j"]),
    ],
)
def test_a_receiver_waits_for_what_it_needs_and_no_mount_waits_for_it(
    receives: Receives, values: dict[str, str], files: list[str]
) -> None:
    """A record that is away holds up no receiver."""
    assert systemd.drop_in(receives(**values)).splitlines()[1:] == [
        "[Unit]",
        *(f'RequiresMountsFor="{path}"' for path in files),
        "After=local-fs.target network.target",
    ]


def test_a_secondary_in_the_network_is_not_waited_for(write: Write) -> None:
    assert list(local_media(write())) == ["primary", "record"]
    assert set(local_media(write(secondary="/dev/sdc"))) == set(ALL)
