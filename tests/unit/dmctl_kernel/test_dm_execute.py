"""The executor: rounds, patience, undoing, and how it speaks to dmsetup."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from bitmapd.errors import (
    BitmapdError,
    BusyError,
    NoSpaceError,
    NotFoundError,
    TimeOutError,
    WrongStateError,
)
from dmctl.kernel.execute import Dmsetup, execute, reach
from dmctl.model.names import Layer
from dmctl.model.plan import plan
from dmctl.model.stack import Goal, Nbd, Observed, Primary, Volume, Wanted
from dmctl.model.targets import Line, Linear, Table
from tests.support.simdm import MIB, SimDm

VOLUME = Volume("vol0", "ab" * 16, "/dev/sda", 64 * MIB, 512, 64 << 10)
NBD = Nbd("/dev/nbd0", "43:0", 64 * MIB, 512)
TABLE = (Line(0, 512, Linear("8:0", 0)), Line(512, 512, Linear("8:0", 512)))


@pytest.fixture
def dm() -> SimDm:
    return SimDm(VOLUME, Primary("/dev/sda", "8:0", 64 * MIB, 512, 512), nbd=NBD)


def wanted(goal: Goal) -> Wanted:
    return Wanted(VOLUME, goal)


# -- reaching a goal ------------------------------------------------------------------------------
def test_what_is_done_is_told(dm: SimDm) -> None:
    told: list[str] = []
    planned = [step.command for step in plan(dm.observe(), wanted(Goal.ATTACHED))]
    observed = reach(wanted(Goal.ATTACHED), dm.observe, dm, log=told.append)
    assert told == planned
    assert observed == dm.observe()
    assert reach(wanted(Goal.ATTACHED), dm.observe, dm, log=told.append) == observed
    assert told == planned


def test_somebody_who_undoes_it_all_the_time(dm: SimDm) -> None:
    def look() -> Observed:
        dm.devices.pop(VOLUME.name, None)
        return dm.observe()

    with pytest.raises(BitmapdError, match="cannot be brought to 'attached': after 4 rounds"):
        reach(wanted(Goal.ATTACHED), look, dm)


def test_a_short_use_is_waited_for(dm: SimDm) -> None:
    reach(wanted(Goal.ATTACHED), dm.observe, dm)
    looks = 0

    def look() -> Observed:
        nonlocal looks
        looks += 1
        if VOLUME.name in dm.devices:
            dm.devices[VOLUME.name].opens = int(looks < 3)  # udev has a look, and goes
        return dm.observe()

    reach(wanted(Goal.CLOSED), look, dm, busy_s=60)
    assert VOLUME.name not in dm.devices


def test_a_long_use_is_told(dm: SimDm) -> None:
    reach(wanted(Goal.ATTACHED), dm.observe, dm)
    dm.devices[VOLUME.name].opens = 1
    with pytest.raises(BusyError, match="/dev/mapper/vol0 is in use"):
        reach(wanted(Goal.CLOSED), dm.observe, dm, busy_s=0.05)


def test_only_bitmapd_can_connect(dm: SimDm) -> None:
    dm.nbd = None
    with pytest.raises(WrongStateError, match="not connected to bitmapd"):
        reach(wanted(Goal.ATTACHED), dm.observe, dm)
    assert not dm.devices
    assert not dm.rams


# -- failing --------------------------------------------------------------------------------------
def failing(method: str, error: Exception, dm: SimDm) -> Callable[..., None]:
    def fail(*arguments: object) -> None:
        raise error

    setattr(dm, method, fail)
    return fail


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), NoSpaceError),
        (OSError(errno.EBUSY, "Device or resource busy"), BusyError),
        (OSError(errno.EINVAL, "Invalid argument"), BitmapdError),
        (TimeOutError("it took too long", "wait"), TimeOutError),
    ],
)
def test_an_error_names_its_step(dm: SimDm, error: Exception, kind: type[BitmapdError]) -> None:
    failing("make_ram", error, dm)
    with pytest.raises(kind) as caught:
        reach(wanted(Goal.TRACKED), dm.observe, dm)
    assert type(caught.value) is kind
    assert caught.value.message.endswith("(at: modprobe zram num_devices=0 …)")
    assert caught.value.hint == getattr(error, "hint", None)


def test_undoing_that_fails_is_told_too(dm: SimDm) -> None:
    """The NBD device is lost meanwhile, and the era device cannot be removed."""
    steps = plan(dm.observe(), wanted(Goal.ATTACHED))
    failing("remove", OSError(errno.EBUSY, "Device or resource busy"), dm)
    dm.nbd = None
    with pytest.raises(NotFoundError) as caught:
        execute(steps, dm, undo=True)
    assert caught.value.message == (
        "no device /dev/nbd0 (at: dmsetup create dmctl-vol0-w"
        f" --uuid DMCTL-{VOLUME.uuid}-write --noudevsync --table '0 131072 linear /dev/nbd0 0');"
        " what was done before could not be undone: dmsetup remove dmctl-vol0-era --noudevsync:"
        " [Errno 16] Device or resource busy"
    )
    assert "tidies up" in str(caught.value.hint)
    assert list(dm.devices) == [VOLUME.device(Layer.ERA)]


def test_removing_is_not_undone(dm: SimDm) -> None:
    reach(wanted(Goal.ATTACHED), dm.observe, dm)
    failing("disconnect_nbd", OSError(errno.EIO, "Input/output error"), dm)
    with pytest.raises(BitmapdError, match="Input/output error"):
        reach(wanted(Goal.GONE), dm.observe, dm)
    assert list(dm.devices) == [VOLUME.device(Layer.ERA)]


# -- dmsetup --------------------------------------------------------------------------------------
class Mapper:
    """What `Dmsetup` asks of device-mapper itself, beside the program."""

    cleared = 0

    def clear(self, name: str) -> None:
        self.cleared += 1

    def device(self, name: str) -> None:
        return None


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a dmsetup of ours first in PATH; a file that it may write to."""

    def install(script: str) -> Path:
        path = tmp_path / "dmsetup"
        path.write_text(f"#!/bin/sh\nout={tmp_path}/out\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return tmp_path / "out"

    return install


def dmsetup(**options: float) -> tuple[Dmsetup, Mapper]:
    mapper = Mapper()
    return Dmsetup(mapper, **options), mapper  # type: ignore[arg-type]


def test_a_table_goes_through_standard_input(program: Callable[[str], Path]) -> None:
    out = program('echo "$LC_ALL $*" >> $out; [ $1 != load ] || cat >> $out')
    actor, mapper = dmsetup()
    actor.reload("dmctl-vol0-w", TABLE)
    assert out.read_text().splitlines() == [
        "C load dmctl-vol0-w",
        "0 1 linear 8:0 0",
        "1 1 linear 8:0 1",
        "C resume dmctl-vol0-w --noflush --nolockfs --noudevsync",
    ]
    assert not mapper.cleared


def test_a_table_that_does_not_come_in_force_is_forgotten(program: Callable[[str], Path]) -> None:
    program(
        "[ $1 = load ] && exit\n"
        "echo 'device-mapper: resume ioctl on dmctl-vol0-w  failed: Invalid argument' >&2\n"
        "echo 'Command failed.' >&2; exit 1"
    )
    actor, mapper = dmsetup()
    with pytest.raises(OSError, match=r"^\[Errno 22\] 'dmsetup resume .*Invalid arg") as caught:
        actor.reload("dmctl-vol0-w", TABLE)
    assert caught.value.errno == errno.EINVAL
    assert "Command failed" not in str(caught.value)
    assert mapper.cleared == 1


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("failed: Device or resource busy", errno.EBUSY),
        ("failed: No such device or address", errno.ENXIO),
        ("failed: No space left on device", errno.ENOSPC),
        ("something new", errno.EIO),
        ("", errno.EIO),
    ],
)
def test_what_dmsetup_says(program: Callable[[str], Path], text: str, number: int) -> None:
    program(f"echo '{text}' >&2; exit 1")
    with pytest.raises(OSError, match=text or "failed without a word") as caught:
        dmsetup()[0].remove("vol0")
    assert caught.value.errno == number


def test_a_dmsetup_that_does_not_end(program: Callable[[str], Path]) -> None:
    program("exec sleep 60")
    with pytest.raises(TimeOutError, match=r"did not end within 0\.2 s"):
        dmsetup(timeout_s=0.2)[0].remove("vol0")


def test_a_dmsetup_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("dmctl.kernel.execute.PROGRAM", "dmsetup-that-is-not-installed")
    with pytest.raises(NotFoundError, match="not installed"):
        dmsetup()[0].remove("vol0")


def test_a_device_that_goes_while_its_node_is_made(program: Callable[[str], Path]) -> None:
    out = program('echo "$1" >> $out')
    table: Table = (TABLE[0],)
    with pytest.raises(OSError, match="has gone"):
        dmsetup()[0].create("vol0", "DMCTL-x", table)
    assert out.read_text().split() == ["create", "remove"]
