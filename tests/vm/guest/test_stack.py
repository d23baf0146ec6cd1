"""The stack of a volume in a real kernel: built, looked at, grown, mended, removed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bitmapd.config import Paths
from bitmapd.errors import BitmapdError, BusyError, ExistsError, UsageError
from dmctl.cli.context import Context
from dmctl.cli.output import Output
from dmctl.cli.plan import show
from dmctl.kernel import ram
from dmctl.kernel.dm_ioctl import DeviceMapper
from dmctl.kernel.dm_wire import Target
from dmctl.kernel.execute import Dmsetup, execute
from dmctl.kernel.nbd_netlink import NbdNetlink
from dmctl.kernel.observe import observe, primary_facts, queue_number
from dmctl.model.names import Layer, device_path
from dmctl.model.plan import plan
from dmctl.model.stack import Goal, Observed, Primary, Segment, Volume, Wanted, check_primary
from dmctl.model.targets import SECTOR_BYTES, kind_and_parameters
from tests.vm.guest.disks import MIB, Disk, disks, sh, size_of
from tests.vm.guest.dmvolume import DmVolume, dm_volume
from tests.vm.guest.erastack import direct
from tests.vm.guest.test_nbd_attach import Server, serving

BLOCK = 64 << 10
ROOM = 48 * MIB  # what the primary and the gate have
SIZE = 32 * MIB
UUID = "5" * 32
NAME = "stack-test"
HALF: tuple[Segment, ...] = ((0, SIZE // 2, "direct"), (SIZE // 2, SIZE, "gate"))


class Stack:
    """A volume over a disk, with an NBD server of its own as the gate."""

    def __init__(self, primary: Disk, server: Server, sector_bytes: int) -> None:
        self.primary, self.server = primary, server
        self.volume = Volume(NAME, UUID, primary.path, SIZE, sector_bytes, BLOCK)
        self.mapper = DeviceMapper()
        self.actor = Dmsetup(self.mapper)
        self.index = -1

    def connect(self) -> None:
        with self.server.connect() as sock, NbdNetlink() as client:
            self.index = client.connect(
                sock.fileno(),
                UUID,
                size_bytes=self.volume.size_bytes,
                logical_block_bytes=self.volume.logical_block_bytes,
                timeout_s=10,
                dead_conn_timeout_s=1000,
                flags=self.server.flags,
            )

    def look(self) -> Observed:
        return observe(self.volume, self.mapper)

    def steps(self, goal: Goal, segments: tuple[Segment, ...] = ()) -> list[str]:
        wanted = Wanted(self.volume, goal, segments)
        return [step.command for step in plan(self.look(), wanted)]

    def reach(self, goal: Goal, segments: tuple[Segment, ...] = ()) -> list[str]:
        """The commands that were carried out."""
        done: list[str] = []
        self.actor.reach(Wanted(self.volume, goal, segments), log=done.append)
        assert self.steps(goal, segments) == []
        return done

    def name(self, layer: Layer) -> str:
        return self.volume.device(layer)

    def path(self, layer: Layer) -> str:
        return device_path(self.name(layer))

    def tables(self) -> dict[str, list[str]]:
        """By name, what dmsetup shows of the volume's devices."""
        return {
            layer.value: sh("dmsetup", "table", self.name(layer)).splitlines()
            for layer in Layer
            if self.mapper.device(self.name(layer)) is not None
        }

    def assert_nothing_is_left(self) -> None:
        assert self.tables() == {}
        assert self.look().nbd is None
        assert ram.find(self.volume.stamp) == []
        for layer in Layer:
            assert not os.path.lexists(self.path(layer))


@contextlib.contextmanager
def stack_on(folder: Path, disk: str, sector_bytes: int) -> Iterator[Stack]:
    with (folder / "image").open("wb") as stream:
        stream.truncate(ROOM)
    with (
        disks((disk, ROOM), sector_bytes=sector_bytes) as (primary,),
        serving(folder) as server,
    ):
        made = Stack(primary, server, sector_bytes)
        try:
            yield made
        finally:
            made.mapper.close()


@pytest.fixture(scope="module", params=[512, 4096])
def any_media(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    with stack_on(tmp_path_factory.mktemp("stack"), "stack", request.param) as made:
        yield made


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Disk and server live as long as this module's tests, what is made of them as long as one."""
    with stack_on(tmp_path_factory.mktemp("stack"), "stack512", 512) as made:
        yield made


@pytest.fixture
def either(any_media: Stack) -> Iterator[Stack]:
    yield from emptied(any_media)


@pytest.fixture
def stack(media: Stack) -> Iterator[Stack]:
    yield from emptied(media)


def emptied(made: Stack) -> Iterator[Stack]:
    volume = made.volume
    try:
        yield made
    finally:
        made.actor.reach(Wanted(made.volume, Goal.GONE))
        made.volume = volume


# -- building and removing ------------------------------------------------------------------------
def test_build_inspect_use_and_remove(either: Stack) -> None:
    stack = either
    before = set(sh("dmsetup", "ls").splitlines())
    stack.connect()
    stack.reach(Goal.ATTACHED, HALF)
    seen = stack.look()
    assert seen.primary
    assert seen.nbd
    era, write = (seen.layer(stack.volume, layer) for layer in (Layer.ERA, Layer.WRITE))
    assert era
    assert write
    (metadata,) = seen.rams
    sectors = SIZE // SECTOR_BYTES
    assert stack.tables() == {
        "era": [f"0 {sectors} era {metadata.number} {seen.primary.number} 128"],
        "write": [
            f"0 {sectors // 2} linear {era.number} 0",
            f"{sectors // 2} {sectors // 2} linear {seen.nbd.number} {sectors // 2}",
        ],
        "top": [
            f"0 {sectors} delay {seen.primary.number} 0 0 {write.number} 0 0"
            f" {seen.primary.number} 0 0"
        ],
    }
    assert sh("blockdev", "--getss", stack.path(Layer.TOP)).strip() == str(
        stack.volume.logical_block_bytes
    )
    assert era.discard_max_bytes <= BLOCK
    assert size_of(metadata.path) == stack.volume.ram_bytes

    with direct(stack.path(Layer.TOP)) as put:
        put(0, b"d" * 4096)
        put(SIZE - 4096, b"g" * 4096)
    image = stack.server.image.read_bytes()
    stored = stack.primary.read()
    assert stored[:4096] == b"d" * 4096
    assert image[:4096] == bytes(4096)
    assert image[SIZE - 4096 : SIZE] == b"g" * 4096
    assert stored[SIZE - 4096 : SIZE] == bytes(4096)

    assert stack.reach(Goal.ATTACHED) == []  # found alive, and left as it is
    stack.reach(Goal.CLOSED)
    assert set(stack.tables()) == {"era", "write"}
    stack.reach(Goal.GONE)
    stack.assert_nothing_is_left()
    assert set(sh("dmsetup", "ls").splitlines()) == before


def test_the_commands_do_what_the_executor_does(stack: Stack) -> None:
    stack.connect()
    for goal in (Goal.ATTACHED, Goal.GONE):
        commands = [line for line in stack.steps(goal, HALF) if "nbd-client" not in line]
        # Without udev, dmsetup leaves the nodes to whoever wants them.
        script = "\n".join(
            f"{command}\ndmsetup mknodes" if "dmsetup" in command else command
            for command in commands
        )
        done = subprocess.run(
            ["sh", "-e"], input=script, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        left = stack.steps(goal, HALF)
        assert all("nbd-client" in line for line in left), left
    stack.reach(Goal.GONE)
    stack.assert_nothing_is_left()


def test_after_each_step_a_new_attempt_goes_on(stack: Stack) -> None:
    stack.connect()
    wanted = Wanted(stack.volume, Goal.ATTACHED, HALF)
    count = len(plan(stack.look(), wanted))
    assert count >= 4
    for done in range(1, count):
        execute(plan(stack.look(), wanted)[:done], stack.actor, undo=False)
        stack.reach(Goal.ATTACHED if done % 2 else Goal.GONE, HALF)
        if done % 2:
            stack.reach(Goal.GONE)
        stack.connect()
    stack.reach(Goal.ATTACHED, HALF)

    gone = Wanted(stack.volume, Goal.GONE)
    for done in range(1, len(plan(stack.look(), gone))):
        execute(plan(stack.look(), gone)[:done], stack.actor, undo=False)
        if stack.look().nbd is None:
            stack.connect()
        stack.reach(Goal.ATTACHED, HALF)


def _created(stack: Stack, layer: Layer) -> None:
    """dmsetup died after its first ioctl."""
    stack.mapper.create(stack.name(layer), stack.volume.device_uuid(layer))


def _loaded(stack: Stack, layer: Layer) -> None:
    """dmsetup died after its second ioctl."""
    _created(stack, layer)
    target = Target(0, SIZE // SECTOR_BYTES, "linear", f"{_number(stack.primary.path)} 0")
    if layer is Layer.ERA:
        path = stack.actor.make_ram(stack.volume.ram_bytes, stack.volume.stamp)
        words = f"{_number(path)} {_number(stack.primary.path)} 128"
        target = Target(0, SIZE // SECTOR_BYTES, "era", words)
    stack.mapper.load(stack.name(layer), [target])


def _number(path: str) -> str:
    found = os.stat(path).st_rdev
    return f"{os.major(found)}:{os.minor(found)}"


@pytest.mark.parametrize("layer", list(Layer))
@pytest.mark.parametrize("half", [_created, _loaded])
def test_half_of_a_device(stack: Stack, half: Callable[[Stack, Layer], None], layer: Layer) -> None:
    half(stack, layer)
    stack.reach(Goal.GONE)
    stack.assert_nothing_is_left()
    half(stack, layer)
    stack.connect()
    stack.reach(Goal.ATTACHED)


def _facts(stack: Stack) -> Primary:
    facts = primary_facts(stack.primary.path)
    assert facts
    return facts


def test_what_fails_leaves_nothing(stack: Stack) -> None:
    held = os.open(stack.primary.path, os.O_RDWR | os.O_EXCL)  # as a mounted file system does
    try:
        with pytest.raises(BusyError, match="opened exclusively by another program"):
            stack.reach(Goal.TRACKED)
        wanted = Wanted(stack.volume, Goal.TRACKED)
        quiet = replace(stack.look(), primary=replace(_facts(stack), use=None))
        with pytest.raises(BitmapdError, match="dmctl-stack--test-era") as caught:
            execute(plan(quiet, wanted), stack.actor, undo=True)
        assert "could not be undone" not in caught.value.message
    finally:
        os.close(held)
    stack.assert_nothing_is_left()
    stack.reach(Goal.TRACKED)


def test_ram_that_was_left_behind_is_freed(stack: Stack) -> None:
    left = ram.make(MIB, stack.volume.stamp)
    foreign = ram.make(MIB, "somebody else's")
    try:
        stack.reach(Goal.TRACKED)
        (kept,) = ram.find(stack.volume.stamp)
        assert kept.path != left or size_of(kept.path) == stack.volume.ram_bytes
        stack.reach(Goal.GONE)
        assert [found.path for found in ram.find("somebody else's")] == [foreign]
    finally:
        ram.free(foreign)
    ram.free(foreign)  # gone is gone


def test_ram_is_found_by_the_table_when_the_stamp_is_gone(stack: Stack) -> None:
    stack.reach(Goal.TRACKED)
    (kept,) = stack.look().rams
    with direct(kept.path) as put:
        put(stack.volume.ram_bytes - 4096, bytes(4096))
    assert ram.find(stack.volume.stamp) == []
    assert stack.look().rams == (kept,)
    stack.reach(Goal.GONE)
    assert not os.path.exists(kept.path)


# -- adopting and mending -------------------------------------------------------------------------
@pytest.mark.parametrize("layer", list(Layer))
def test_a_suspended_layer_is_resumed_first(stack: Stack, layer: Layer) -> None:
    stack.connect()
    stack.reach(Goal.ATTACHED, HALF)
    sh("dmsetup", "suspend", "--noflush", "--nolockfs", stack.name(layer))
    assert stack.reach(Goal.AWAKE) == [
        f"dmsetup resume {stack.name(layer)} --noflush --nolockfs --noudevsync"
    ]
    assert stack.reach(Goal.ATTACHED) == []


def test_a_barrier_that_died_keeps_the_old_table(stack: Stack) -> None:
    stack.connect()
    stack.reach(Goal.ATTACHED, HALF)
    before = stack.tables()
    name = stack.name(Layer.WRITE)
    seen = stack.look()
    write = seen.layer(stack.volume, Layer.WRITE)
    assert write
    assert seen.nbd
    target = Target(0, SIZE // SECTOR_BYTES, "linear", f"{seen.nbd.number} 0")
    stack.mapper.load(name, [target])
    sh("dmsetup", "suspend", "--noflush", "--nolockfs", name)
    stack.reach(Goal.AWAKE)
    assert stack.tables() == before


@pytest.mark.parametrize("layer", [Layer.WRITE, Layer.TOP])
def test_an_error_table_is_mended_under_a_host(stack: Stack, layer: Layer) -> None:
    stack.connect()
    stack.reach(Goal.ATTACHED, HALF)
    held = os.open(stack.path(Layer.TOP), os.O_RDONLY)
    try:
        sh("dmsetup", "load", stack.name(layer), "--table", f"0 {SIZE // SECTOR_BYTES} error")
        sh("dmsetup", "resume", "--noudevsync", stack.name(layer))
        assert any("dmsetup load" in command for command in stack.reach(Goal.ATTACHED, HALF))
    finally:
        os.close(held)
    with direct(stack.path(Layer.TOP)) as put:
        put(0, b"m" * 4096)
    assert stack.primary.read()[:4096] == b"m" * 4096


def test_a_table_of_two_thousand_segments(stack: Stack) -> None:
    step = SIZE // 2048
    segments = tuple((at * step, (at + 1) * step, ("direct", "gate")[at % 2]) for at in range(2048))
    stack.connect()
    stack.reach(Goal.ATTACHED, segments)
    assert len(stack.tables()["write"]) == 2048
    seen = stack.look().layer(stack.volume, Layer.WRITE)
    assert seen
    assert [kind_and_parameters(line.target)[0] for line in seen.lines] == ["linear"] * 2048


def test_growing_under_a_host(stack: Stack) -> None:
    stack.connect()
    stack.reach(Goal.ATTACHED)
    held = os.open(stack.path(Layer.TOP), os.O_RDONLY)
    try:
        stack.volume = replace(stack.volume, size_bytes=ROOM)
        with NbdNetlink() as client:
            client.resize(stack.index, UUID, ROOM)
        stack.reach(Goal.TRACKED)
        stack.reach(Goal.ATTACHED)
        assert os.lseek(held, 0, os.SEEK_END) == ROOM
        assert size_of(stack.path(Layer.ERA)) == ROOM
    finally:
        os.close(held)


# -- dmctl plan -----------------------------------------------------------------------------------
def shown(volume: DmVolume, *, as_json: bool = False, remove: bool = False) -> str:
    stream = io.StringIO()
    paths = Paths.find({}, str(volume.run_dir.parent / "etc"), str(volume.run_dir))
    context = Context(paths, Output({}, as_json=as_json, stdout=stream))
    assert show(context, Namespace(name=volume.name, remove=remove)) == 0
    return stream.getvalue()


def test_the_plan_of_a_volume_that_does_not_run() -> None:
    with dm_volume("plan-me", started=False) as made:
        before = shown(made)
        assert before.startswith("# nothing of the volume is there\n# to attach it")
        commands = json.loads(shown(made, as_json=True))["commands"]
        assert "\n".join(commands) in before
        uuid = json.loads(shown(made, as_json=True))["uuid"].replace("-", "")
        block_bytes = made.status()["block_size_bytes"]
        volume = Volume("plan-me", uuid, made.primary.path, made.size_bytes, 512, block_bytes)
        mapper = DeviceMapper()
        try:
            actor = Dmsetup(mapper)
            actor.reach(Wanted(volume, Goal.TRACKED))
            after = shown(made)
            assert "#   dmctl-plan--me-era (253:" in after
            assert "zram" not in after.partition("# to attach it")[2]
            (device,) = json.loads(shown(made, as_json=True))["devices"]
            assert device["table"][0].split()[2] == "era"
            assert "dmsetup remove dmctl-plan--me-era" in shown(made, remove=True)
            actor.reach(Wanted(volume, Goal.GONE))
        finally:
            mapper.close()
        assert shown(made) == before


# -- what is refused ------------------------------------------------------------------------------
def test_an_open_volume_is_not_closed(stack: Stack) -> None:
    stack.connect()
    stack.reach(Goal.ATTACHED, HALF)
    before = stack.tables()
    held = os.open(stack.path(Layer.TOP), os.O_RDONLY)
    try:
        for goal in (Goal.CLOSED, Goal.GONE):
            with pytest.raises(BusyError, match="/dev/mapper/stack-test is in use"):
                stack.reach(goal)
    finally:
        os.close(held)
    assert stack.tables() == before


def test_a_foreign_device_is_left_alone(stack: Stack) -> None:
    table = "0 8 zero"
    sh("dmsetup", "create", NAME, "--uuid", "somebody", "--noudevsync", "--table", table)
    try:
        stack.connect()
        with pytest.raises(ExistsError, match="its UUID is 'somebody'"):
            stack.reach(Goal.ATTACHED)
        stack.reach(Goal.GONE)
        assert sh("dmsetup", "table", NAME).strip() == table
    finally:
        sh("dmsetup", "remove", "--noudevsync", NAME)
        sh("dmsetup", "mknodes")


def test_a_primary_that_another_mapped_device_uses(stack: Stack) -> None:
    words = ("--noudevsync", "--table", f"0 8 linear {stack.primary.path} 0")
    sh("dmsetup", "create", "dmtest-other", *words)
    try:
        with pytest.raises(BusyError, match="is part of 253:"):
            stack.reach(Goal.TRACKED)
    finally:
        sh("dmsetup", "remove", "--noudevsync", "dmtest-other")
        sh("dmsetup", "mknodes")
    stack.assert_nothing_is_left()


def test_primaries_as_the_kernel_describes_them(either: Stack) -> None:
    facts = primary_facts(either.primary.path)
    assert facts
    check_primary(either.volume, facts)
    assert facts.size_bytes == ROOM
    assert facts.holders == ()
    assert primary_facts("/dev/mapper/control") is None
    assert primary_facts("/dev/mapper/nothing") is None
    either.reach(Goal.TRACKED)
    era = either.look().layer(either.volume, Layer.ERA)
    facts = primary_facts(either.primary.path)
    assert era
    assert facts
    assert facts.holders == (era.number,)


def test_a_zoned_primary_is_refused() -> None:
    words = ("modprobe", "null_blk", "nr_devices=1", "gb=1", "zoned=1", "zone_size=64")
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("SKIPPED: the guest's kernel has no null_blk to make a zoned device with")
    try:
        facts = primary_facts("/dev/nullb0")
        assert facts
        assert facts.zoned == "host-managed"
        volume = Volume(NAME, UUID, "/dev/nullb0", 64 * MIB, facts.logical_block_bytes, BLOCK)
        with pytest.raises(UsageError, match="is a zoned device"):
            check_primary(volume, facts)
    finally:
        sh("modprobe", "-r", "null_blk")


def test_a_partition_is_described_by_its_disk(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as stream:
        stream.truncate(16 * MIB)
    loop = sh("losetup", "-f", "--show", "-b", "4096", str(image)).strip()
    try:
        sh("addpart", loop, "1", "8", "1024")
        facts = primary_facts(f"{loop}p1")
        assert facts
        assert facts.size_bytes == 1024 * SECTOR_BYTES
        assert facts.logical_block_bytes == 4096
        assert queue_number(facts.number, "no_such_attribute") == 0
    finally:
        sh("delpart", loop, "1", check=False)
        sh("losetup", "-d", loop)
