"""Names, targets, tables and checks of the volume's kernel stack."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.errors import (
    BitmapdError,
    BusyError,
    NoSpaceError,
    NotFoundError,
    PermissionError_,
    UsageError,
    WrongStateError,
)
from dmctl.model.names import (
    Layer,
    layer_name,
    layer_uuid,
    parse_layer_name,
    parse_layer_uuid,
)
from dmctl.model.plan import plan
from dmctl.model.stack import (
    Goal,
    Mapped,
    Nbd,
    Observed,
    Primary,
    Ram,
    Volume,
    Wanted,
    check_nbd,
    check_primary,
    era_table,
    segments_of,
    top_table,
    with_devices,
    write_table,
)
from dmctl.model.targets import (
    Delay,
    Era,
    EraStatus,
    Line,
    Linear,
    Other,
    Target,
    Via,
    Zero,
    parse,
    parse_era_status,
    parse_line,
    render,
    render_line,
    table_bytes,
)

MIB = 1 << 20
UUID = "00112233445566778899aabbccddeeff"
VOLUME = Volume("vol-0", UUID, "/dev/sda", 64 * MIB, 512, 64 << 10)
PRIMARY = Primary("/dev/sda", "8:0", 64 * MIB, 512, 4096)


# -- names --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("volume", "layer", "name"),
    [
        ("vol0", Layer.TOP, "vol0"),
        ("vol0", Layer.WRITE, "dmctl-vol0-w"),
        ("a-b", Layer.ERA, "dmctl-a--b-era"),
        ("a-b", Layer.TOP, "a-b"),
        ("a--b-", Layer.WRITE, "dmctl-a----b---w"),
    ],
)
def test_names(volume: str, layer: Layer, name: str) -> None:
    assert layer_name(volume, layer) == name


NAMES = st.from_regex(r"[A-Za-z0-9+_][A-Za-z0-9+_.-]{0,63}", fullmatch=True).filter(
    lambda name: not name.startswith("dmctl-") and name != "control" and name.count("-") <= 53
)


@given(NAMES, st.sampled_from([Layer.WRITE, Layer.ERA]))
def test_inner_names_are_read_back(volume: str, layer: Layer) -> None:
    assert parse_layer_name(layer_name(volume, layer)) == (volume, layer)


@given(NAMES, NAMES, st.sampled_from(Layer), st.sampled_from(Layer))
def test_no_two_layers_share_a_name(one: str, other: str, a: Layer, b: Layer) -> None:
    if (one, a) != (other, b):
        assert layer_name(one, a) != layer_name(other, b)


@pytest.mark.parametrize(
    "name",
    ["vol0", "dmctl-vol0", "dmctl--w", "dmctl-a-b-w", "dmctl-a---b-w", "dmctl-a-x", "dmctl-"],
)
def test_names_that_are_not_inner_ones(name: str) -> None:
    assert parse_layer_name(name) is None


def test_a_volume_named_like_a_layer_is_refused() -> None:
    with pytest.raises(UsageError, match="inner devices"):
        layer_name("dmctl-vol0-w", Layer.TOP)
    with pytest.raises(UsageError, match="own node"):
        layer_name("control", Layer.TOP)


def test_3_inner_names_fit_the_kernel() -> None:
    longest = "a" + "-" * 53 + "a" * 10
    assert len(layer_name(longest, Layer.ERA)) == 127
    with pytest.raises(UsageError, match="128 bytes; the kernel allows 127") as caught:
        layer_name("a" + "-" * 54 + "a" * 9, Layer.ERA)
    assert "hyphen" in str(caught.value.hint)


@pytest.mark.parametrize("layer", list(Layer))
def test_uuids(layer: Layer) -> None:
    uuid = layer_uuid(UUID, layer)
    assert uuid == f"DMCTL-{UUID}-{layer.value}"
    assert parse_layer_uuid(uuid) == (UUID, layer)
    for foreign in (uuid[:-1], f"LVM-{uuid}", uuid.lower(), f"DMCTL-{UUID}-ram", ""):
        assert parse_layer_uuid(foreign) is None


# -- targets ------------------------------------------------------------------------------------
LINES = [
    ("0 131072 era 252:0 8:0 128", Line(0, 64 * MIB, Era("252:0", "8:0", 64 << 10))),
    ("8 16 linear 253:1 8", Line(4096, 8192, Linear("253:1", 4096))),
    (
        "0 8 delay 8:0 0 0 253:1 0 0 8:0 0 0",
        Line(0, 4096, Delay(Via("8:0"), Via("253:1"), Via("8:0"))),
    ),
    (
        "0 8 delay 8:0 1 2 8:0 3 4 8:0 5 6",
        Line(0, 4096, Delay(Via("8:0", 512, 2), Via("8:0", 1536, 4), Via("8:0", 2560, 6))),
    ),
    ("0 8 zero", Line(0, 4096, Zero())),
    ("0 8 error", Line(0, 4096, Other("error", ""))),
    ("0 8 delay 8:0 0 500", Line(0, 4096, Other("delay", "8:0 0 500"))),
    ("0 8 linear 8:0 x", Line(0, 4096, Other("linear", "8:0 x"))),
    ("0 8 era 8:0 8:1 -8", Line(0, 4096, Other("era", "8:0 8:1 -8"))),
    ("0 8 zero 1", Line(0, 4096, Other("zero", "1"))),
]


@pytest.mark.parametrize(("text", "line"), LINES)
def test_lines(text: str, line: Line) -> None:
    assert parse_line(text) == line
    assert parse_line(text + " ") == line  # as `dmsetup table` prints it
    assert render_line(line) == text


@pytest.mark.parametrize("text", ["", "0", "0 8", "x 8 zero", "0 x zero", "-1 8 zero", "0 ² zero"])
def test_what_is_no_line(text: str) -> None:
    with pytest.raises(ValueError, match="no line of a table"):
        parse_line(text)


SECTORS = st.integers(0, 1 << 40).map(lambda count: count * 512)
DEVICES = st.sampled_from(["8:0", "253:17", "/dev/mapper/dmctl-a--b-w", "/dev/nbd0"])
VIAS = st.builds(Via, DEVICES, SECTORS, st.integers(0, 10_000))
TARGETS: st.SearchStrategy[Target] = st.one_of(
    st.builds(Linear, DEVICES, SECTORS),
    st.builds(Era, DEVICES, DEVICES, SECTORS),
    st.builds(Delay, VIAS, VIAS, VIAS),
    st.just(Zero()),
)


@given(st.lists(st.builds(Line, SECTORS, SECTORS, TARGETS), max_size=5))
def test_tables_are_read_back(lines: list[Line]) -> None:
    assert parse(render(lines)) == tuple(lines)


@given(st.integers(1, 511), SECTORS)
def test_no_part_of_a_sector_is_rendered(odd: int, start: int) -> None:
    for line in (
        Line(start + odd, 512, Zero()),
        Line(0, start + odd, Zero()),
        Line(0, 512, Linear("8:0", start + odd)),
        Line(0, 512, Era("8:0", "8:1", start + odd)),
        Line(0, 512, Delay(Via("8:0"), Via("8:0", start + odd), Via("8:0"))),
    ):
        with pytest.raises(ValueError, match="no whole sectors"):
            render_line(line)


def test_the_size_of_a_table() -> None:
    assert table_bytes(()) == 0
    assert table_bytes((Line(0, 512, Zero()), Line(512, 1024, Zero()))) == 1536


def test_status_of_era() -> None:
    assert parse_era_status("8 26/16384 4 -") == EraStatus(4096, 26, 16384, 4, None)
    assert parse_era_status(" 8 26/16384 4 17 ") == EraStatus(4096, 26, 16384, 4, 17)
    for text in ("Error", "", "8 26/16384 4", "8 26 16384 4 -", "8 26/16384 4 - x"):
        with pytest.raises(ValueError, match="no status of dm-era"):
            parse_era_status(text)


# -- tables of a volume -------------------------------------------------------------------------
def test_tables_of_a_volume() -> None:
    era = era_table(VOLUME, ram="/dev/zram0", primary="/dev/sda")
    assert render(era) == "0 131072 era /dev/zram0 /dev/sda 128"
    assert (
        render(top_table(VOLUME, primary="/dev/sda", write="/dev/mapper/dmctl-vol--0-w"))
        == "0 131072 delay /dev/sda 0 0 /dev/mapper/dmctl-vol--0-w 0 0 /dev/sda 0 0"
    )
    segments = [(0, 8192, "gate"), (8192, MIB, "gate"), (MIB, 64 * MIB, "direct")]
    assert render(write_table(VOLUME, segments, era="ERA", nbd="NBD")).splitlines() == [
        "0 2048 linear NBD 0",
        "2048 129024 linear ERA 2048",
    ]


@pytest.mark.parametrize(
    ("segments", "problem"),
    [
        ([], "end at byte 0"),
        ([(0, MIB, "gate")], "end at byte 1048576"),
        ([(512, 64 * MIB, "gate")], "does not follow on byte 0"),
        ([(0, MIB, "gate"), (MIB - 512, 64 * MIB, "direct")], "does not follow on byte 1048576"),
        ([(0, 0, "gate"), (0, 64 * MIB, "direct")], "does not follow on byte 0"),
        ([(0, 65 * MIB, "gate")], "end at byte 68157440"),
        ([(0, 100, "gate"), (100, 64 * MIB, "direct")], "does not end with a logical block of 512"),
        ([(0, 64 * MIB, "both")], "unknown route 'both'"),
    ],
)
def test_segments_that_are_refused(segments: list[tuple[int, int, str]], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        write_table(VOLUME, segments, era="ERA", nbd="NBD")


def test_segments_keep_to_logical_blocks_of_4_kib() -> None:
    volume = replace(VOLUME, logical_block_bytes=4096)
    with pytest.raises(UsageError, match="logical block of 4096"):
        write_table(volume, [(0, 512, "gate"), (512, 64 * MIB, "direct")], era="ERA", nbd="NBD")


def test_too_many_segments() -> None:
    segments = [
        (at * MIB, (at + 1) * MIB, ("gate", "direct")[at % 2]) for at in range(64)
    ]  # fmt: skip
    assert len(write_table(VOLUME, segments, era="E", nbd="N", max_segments=64)) == 64
    with pytest.raises(UsageError, match="64 segments are more than 63"):
        write_table(VOLUME, segments, era="E", nbd="N", max_segments=63)


@pytest.mark.parametrize(
    "text",
    [
        "0 8 zero",
        "0 8 linear 9:9 0",
        "0 8 linear 43:0 8",
        "8 8 linear 43:0 8",
        "0 8 linear 43:0 0\n16 8 linear 253:0 16",
    ],
)
def test_tables_that_are_not_of_our_making(text: str) -> None:
    assert segments_of(parse(text), era="253:0", nbd="43:0") is None


def test_devices_of_a_table_under_other_names() -> None:
    text = "0 8 linear 8:0 0\n8 8 era 8:0 8:1 8\n16 8 delay 8:0 0 0 8:1 0 0 8:2 0 0\n24 8 zero"
    names = {"8:0": "/dev/a", "8:2": "/dev/c"}
    assert render(with_devices(parse(text), names)) == text.replace("8:0", "/dev/a").replace(
        "8:2", "/dev/c"
    )


def test_which_device_uses_which() -> None:
    era = Mapped("e", "", "253:0", table=parse("0 8 era 252:0 8:0 8"))
    write = Mapped("w", "", "253:1", table=parse("0 8 linear 253:0 0"))
    top = Mapped("t", "", "253:2", table=parse("0 8 delay 8:0 0 0 253:1 0 0 8:0 0 0"))
    assert write.uses(era)
    assert top.uses(write)
    assert not top.uses(era)
    assert not era.uses(write)
    assert not replace(write, table=None).uses(era)
    assert not replace(write, table=parse("0 8 error")).uses(era)
    assert not write.uses(None)


def test_ram_of_a_volume() -> None:
    assert VOLUME.ram_bytes == 1024 * 12 + (16 << 20)
    odd = replace(VOLUME, size_bytes=64 * MIB + 512)
    assert odd.ram_bytes == -(-(1025 * 12 + (16 << 20)) // 4096) * 4096
    assert VOLUME.stamp == f"DMCTL-{UUID}-ram"


# -- checks -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "error", "problem"),
    [
        ({"zoned": "host-managed"}, UsageError, "zoned device \\(host-managed\\)"),
        ({"zoned": "host-aware"}, UsageError, "zoned device"),
        ({"read_only": True}, PermissionError_, "cannot be written"),
        ({"size_bytes": 64 * MIB - 512}, NoSpaceError, "has 67108352 bytes, volume 'vol-0' has"),
        ({"logical_block_bytes": 4096}, WrongStateError, "logical blocks of 4096 bytes"),
        ({"physical_block_bytes": 128 << 10}, UsageError, "physical blocks of 131072 bytes"),
    ],
)
def test_primaries_that_are_refused(
    changes: dict[str, object], error: type[BitmapdError], problem: str
) -> None:
    check_primary(VOLUME, PRIMARY)
    with pytest.raises(error, match=problem):
        check_primary(VOLUME, replace(PRIMARY, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"primary": "/dev/disk/by-id/a b"}, "cannot stand in a table"),
        ({"size_bytes": 60 * MIB + 512, "logical_block_bytes": 4096}, "no multiple of the primary"),
        ({"block_bytes": 2048}, "no multiple of the grain of dm-era"),
    ],
)
def test_volumes_that_are_refused(changes: dict[str, object], problem: str) -> None:
    volume = replace(VOLUME, **changes)  # type: ignore[arg-type]
    logical = volume.logical_block_bytes
    with pytest.raises(UsageError, match=problem):
        check_primary(volume, replace(PRIMARY, logical_block_bytes=logical))


def test_nbd_devices_that_are_refused() -> None:
    nbd = Nbd("/dev/nbd0", "43:0", 64 * MIB, 512)
    check_nbd(VOLUME, nbd)
    with pytest.raises(WrongStateError, match="has 512 bytes"):
        check_nbd(VOLUME, replace(nbd, size_bytes=512))
    with pytest.raises(WrongStateError, match="logical blocks of 1024"):
        check_nbd(VOLUME, replace(nbd, logical_block_bytes=1024))


# -- plans that are refused -----------------------------------------------------------------------
def stack(size_bytes: int = 64 * MIB) -> Observed:
    """A volume that is attached."""
    volume = replace(VOLUME, size_bytes=size_bytes)
    write = write_table(volume, [(0, size_bytes, "gate")], era="253:0", nbd="43:0")
    tables = {
        Layer.ERA: era_table(volume, ram="252:0", primary="8:0"),
        Layer.WRITE: write,
        Layer.TOP: top_table(volume, primary="8:0", write="253:1"),
    }
    devices = tuple(
        Mapped(
            volume.device(layer),
            volume.device_uuid(layer),
            f"253:{at}",
            open_count=int(layer is Layer.WRITE),
            table=table,
        )
        for at, (layer, table) in enumerate(tables.items())
    )
    return Observed(
        primary=replace(PRIMARY, holders=("253:0", "253:2"), size_bytes=128 * MIB),
        devices=devices,
        nbd=Nbd("/dev/nbd0", "43:0", size_bytes, 512),
        rams=(Ram("/dev/zram0", "252:0"),),
    )


def test_what_is_there_needs_no_step() -> None:
    for goal in (Goal.AWAKE, Goal.TRACKED, Goal.ATTACHED):
        assert plan(stack(), Wanted(VOLUME, goal)) == []


def test_a_layer_of_another_release_is_left_alone() -> None:
    observed = stack()
    strange = Mapped("dmctl-vol--0-x", f"DMCTL-{UUID}-x", "253:9")
    observed = replace(observed, devices=(*observed.devices, strange))
    assert plan(observed, Wanted(VOLUME, Goal.ATTACHED)) == []
    assert len(plan(observed, Wanted(VOLUME, Goal.GONE))) == 5


def test_a_primary_that_is_not_there() -> None:
    with pytest.raises(NotFoundError, match="/dev/sda is not there"):
        plan(Observed(), Wanted(VOLUME, Goal.TRACKED))
    assert plan(Observed(), Wanted(VOLUME, Goal.GONE)) == []


def test_a_primary_that_something_else_uses() -> None:
    for changes, problem in (
        ({"holders": ("253:7",)}, "/dev/sda is part of 253:7"),
        ({"use": "mounted on /srv"}, "/dev/sda is mounted on /srv"),
    ):
        observed = Observed(primary=replace(PRIMARY, **changes))
        with pytest.raises(BusyError, match=re.escape(problem)):
            plan(observed, Wanted(VOLUME, Goal.TRACKED))


@pytest.mark.parametrize("layer", [Layer.WRITE, Layer.TOP])
def test_a_volume_in_use_does_not_shrink(layer: Layer) -> None:
    large, small = stack(96 * MIB), stack()
    devices = tuple(
        from_large if from_large.name == VOLUME.device(layer) else from_small
        for from_large, from_small in zip(large.devices, small.devices, strict=True)
    )
    with pytest.raises(WrongStateError, match="cannot shrink"):
        plan(replace(large, devices=devices), Wanted(VOLUME, Goal.ATTACHED))


def test_an_era_device_that_lost_its_table_and_is_open() -> None:
    observed = stack()
    era = replace(observed.devices[0], table=None, open_count=1)
    with pytest.raises(BusyError, match="has no table, '0 131072 era RAM 8:0 128' is needed"):
        plan(replace(observed, devices=(era,)), Wanted(VOLUME, Goal.TRACKED))


# -- commands -----------------------------------------------------------------------------------
def commands(observed: Observed, goal: Goal) -> list[str]:
    return [step.command for step in plan(observed, Wanted(VOLUME, goal))]


def test_the_commands_that_build() -> None:
    observed = Observed(primary=replace(PRIMARY, discard_max_bytes=MIB))
    quoted = "'0 131072 era '\"$RAM\"' /dev/sda 128'"
    assert commands(observed, Goal.ATTACHED) == [
        "modprobe zram num_devices=0\n"
        "RAM=/dev/zram$(cat /sys/class/zram-control/hot_add)\n"
        'echo 16789504 > "/sys/block/${RAM#/dev/}/disksize"\n'
        f"printf '%-4096s' DMCTL-{UUID}-ram |"
        ' dd of="$RAM" bs=4096 seek=4098 oflag=direct status=none',
        f"dmsetup create dmctl-vol--0-era --uuid DMCTL-{UUID}-era --noudevsync --table {quoted}",
        'echo 65536 > "/sys/dev/block/$(dmsetup info -c --noheadings --separator : -o major,minor'
        ' dmctl-vol--0-era)/queue/discard_max_bytes"',
        "# bitmapd hands one end of a socket pair to the kernel's NBD client (NBD_CMD_CONNECT,"
        f" backend identifier {UUID}):\nNBD=/dev/nbdN",
        f"dmsetup create dmctl-vol--0-w --uuid DMCTL-{UUID}-write --noudevsync --table"
        " '0 131072 linear '\"$NBD\"' 0'",
        f"dmsetup create vol-0 --uuid DMCTL-{UUID}-top --noudevsync --table"
        " '0 131072 delay /dev/sda 0 0 /dev/mapper/dmctl-vol--0-w 0 0 /dev/sda 0 0'",
    ]


def test_the_commands_that_remove() -> None:
    assert commands(stack(), Goal.GONE) == [
        "dmsetup remove vol-0 --noudevsync",
        "dmsetup remove dmctl-vol--0-w --noudevsync",
        "nbd-client -d /dev/nbd0",
        "dmsetup remove dmctl-vol--0-era --noudevsync",
        "echo 0 > /sys/class/zram-control/hot_remove",
    ]


def test_what_has_no_way_back() -> None:
    observed = Observed(primary=PRIMARY)
    connect = plan(observed, Wanted(VOLUME, Goal.ATTACHED))[2]
    assert connect.inverse is None
    steps = plan(stack(), Wanted(VOLUME, Goal.GONE))
    assert [step.inverse is None for step in steps] == [False, False, True, True, True]
    created = steps[0].inverse
    assert created is not None
    assert created.command == (
        f"dmsetup create vol-0 --uuid DMCTL-{UUID}-top --noudevsync --table"
        " '0 131072 delay 8:0 0 0 /dev/mapper/dmctl-vol--0-w 0 0 8:0 0 0'"
    )


def test_the_commands_that_wake_and_mend() -> None:
    observed = stack()
    era, write, top = observed.devices
    asleep = replace(
        observed, devices=(era, replace(write, inactive=True, table=None, suspended=True), top)
    )
    assert [step.inverse for step in plan(asleep, Wanted(VOLUME, Goal.AWAKE))] == [None, None]
    assert commands(asleep, Goal.AWAKE) == [
        "dmsetup clear dmctl-vol--0-w",
        "dmsetup resume dmctl-vol--0-w --noflush --nolockfs --noudevsync",
    ]
    other = parse("0 8 linear 43:0 0\n8 131064 error")
    broken = replace(
        observed, devices=(era, replace(write, table=other), replace(top, has_node=False))
    )
    wanted = Wanted(VOLUME, Goal.ATTACHED, ((0, MIB, "direct"), (MIB, 64 * MIB, "gate")))
    steps = plan(broken, wanted)
    assert [step.command for step in steps] == [
        "dmsetup load dmctl-vol--0-w <<END\n"
        "0 2048 linear /dev/mapper/dmctl-vol--0-era 0\n"
        "2048 129024 linear /dev/nbd0 2048\n"
        "END\n"
        "dmsetup resume dmctl-vol--0-w --noflush --nolockfs --noudevsync",
        "dmsetup mknodes vol-0",
    ]
    inverse = steps[0].inverse
    assert inverse is not None
    assert inverse.command.splitlines()[1:3] == ["0 8 linear 43:0 0", "8 131064 error"]
    assert inverse.inverse == steps[0]
    assert steps[1].inverse is None
