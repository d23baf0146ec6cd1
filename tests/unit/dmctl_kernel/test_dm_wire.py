"""Messages of the device-mapper interface, against answers built as the kernel builds them."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmctl.kernel import dm_wire
from dmctl.kernel.dm_wire import Command, Flag, Target, WireError

TEXT = st.text("abcdefghij 0123456789:/-", min_size=1, max_size=60)
TARGETS = st.lists(
    st.builds(
        Target,
        first_sector=st.integers(0, (1 << 63) - 1),
        sectors=st.integers(0, (1 << 63) - 1),
        kind=st.text("abcdefghij-", min_size=1, max_size=15),
        parameters=TEXT,
    ),
    max_size=8,
)


def answer(data: bytes, *, targets: int = 0, flags: int = 0, number: int = 0) -> bytearray:
    """What the kernel leaves in the buffer; it need not fill it."""
    message = bytearray(dm_wire.HEADER.size) + data + bytes(64)
    dm_wire.HEADER.pack_into(
        message,
        0,
        *(4, 47, 0),
        dm_wire.HEADER.size + len(data),
        dm_wire.HEADER.size,
        targets,
        2,
        flags,
        7,
        0,
        number,
        b"name",
        b"DMCTL-0-era",
    )
    return message


def status_data(targets: list[Target]) -> bytes:
    """As retrieve_status does it: `next` counts from the start, the last text is not padded."""
    data = b""
    for target in targets:
        text = target.parameters.encode() + b"\0"
        end = len(data) + dm_wire.SPEC.size + len(text)
        end += -end % 8
        data += dm_wire.SPEC.pack(target.first_sector, target.sectors, 0, end, target.kind.encode())
        data += text.ljust(end - len(data), b"\0")
    return data[: len(data) - (-len(targets[-1].parameters.encode() + b"\0") % 8)] if data else b""


def test_the_layout_is_that_of_the_header_file() -> None:
    assert dm_wire.HEADER.size == 312
    assert dm_wire.SPEC.size == 40
    # As a C compiler has them on x86-64.
    assert Command.VERSION.request == 0xC138FD00
    assert Command.DEV_SUSPEND.request == 0xC138FD06
    assert Command.TARGET_MSG.request == 0xC138FD0E


def test_a_request_is_a_header_data_and_room() -> None:
    message = dm_wire.request(
        name="vol",
        uuid="DMCTL-1-top",
        flags=Flag.SUSPEND | Flag.NOFLUSH,
        event_nr=5,
        targets=3,
        data=b"data",
        room_bytes=100,
    )
    assert len(message) == 412
    fields = dm_wire.HEADER.unpack_from(message)
    assert fields[:11] == (4, 0, 0, 412, 312, 3, 0, 1 << 1 | 1 << 11, 5, 0, 0)
    assert fields[11].rstrip(b"\0") == b"vol"
    assert fields[12].rstrip(b"\0") == b"DMCTL-1-top"
    assert message[312:317] == b"data\0"
    assert len(dm_wire.request(data=bytes(50), room_bytes=10)) == 362


def test_names_that_do_not_fit_are_refused() -> None:
    dm_wire.request(name="n" * 127, uuid="u" * 128)
    for name, uuid in (("n" * 128, ""), ("", "u" * 129), ("a\0b", "")):
        with pytest.raises(ValueError, match="does not fit"):
            dm_wire.request(name=name, uuid=uuid)


@given(TARGETS)
def test_a_table_for_loading_is_walked_from_spec_to_spec(targets: list[Target]) -> None:
    data = dm_wire.targets_data(targets)
    at = 0
    for target in targets:
        first, sectors, status, following, kind = dm_wire.SPEC.unpack_from(data, at)
        assert (first, sectors, status) == (target.first_sector, target.sectors, 0)
        assert kind.rstrip(b"\0").decode() == target.kind
        text = data[at + dm_wire.SPEC.size : at + following]
        assert text.endswith(b"\0")
        assert text.rstrip(b"\0").decode() == target.parameters
        assert following % 8 == 0
        at += following
    assert at == len(data)


@given(TARGETS)
def test_a_status_is_read_as_the_kernel_writes_it(targets: list[Target]) -> None:
    message = answer(status_data(targets), targets=len(targets))
    assert dm_wire.targets(message) == targets


@given(TARGETS.filter(bool), st.data())
def test_a_status_that_ends_early_is_not_guessed_at(
    targets: list[Target], data: st.DataObject
) -> None:
    whole = status_data(targets)
    cut = data.draw(st.integers(0, max(len(whole) - 8, 0)))
    with pytest.raises(WireError):
        dm_wire.targets(answer(whole[:cut], targets=len(targets)))


def test_a_spec_that_leads_backwards_is_refused() -> None:
    data = dm_wire.SPEC.pack(0, 8, 0, 8, b"linear") + bytes(8)
    with pytest.raises(WireError, match="ends at 8"):
        dm_wire.targets(answer(data, targets=1))


def test_a_device_is_what_the_header_says() -> None:
    number = 253 << 8 | 0x21 | 3 << 20
    message = answer(b"", targets=1, flags=1 << 1 | 1 << 5 | 1 << 13, number=number)
    device = dm_wire.device(message)
    assert (device.name, device.uuid) == ("name", "DMCTL-0-era")
    assert device.number == f"253:{0x321}"
    assert (device.targets, device.open_count, device.event_nr) == (1, 2, 7)
    assert device.suspended
    assert device.has_table
    assert not device.has_inactive_table
    assert dm_wire.version(message) == (4, 47, 0)
    assert Flag.UEVENT_GENERATED in dm_wire.flags(message)
    assert not dm_wire.is_full(message)
    assert dm_wire.is_full(answer(b"", flags=1 << 8))


def test_names_are_a_chain() -> None:
    first = dm_wire.NAME.pack(253 << 8, 24) + b"one\0"
    data = first.ljust(24, b"\0") + dm_wire.NAME.pack(253 << 8 | 1, 0) + b"two\0"
    assert dm_wire.names(answer(data)) == [("one", "253:0"), ("two", "253:1")]
    assert dm_wire.names(answer(dm_wire.NAME.pack(0, 0) + bytes(4))) == []
    assert dm_wire.names(answer(b"")) == []


@pytest.mark.parametrize(
    "data",
    [
        b"short",
        dm_wire.NAME.pack(253 << 8, 0) + b"endless",
        dm_wire.NAME.pack(253 << 8, 80) + b"a\0",
    ],
)
def test_a_broken_chain_of_names_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        dm_wire.names(answer(data))


def test_dependencies_are_numbers() -> None:
    data = struct.pack("=IIQQ", 2, 0, 7 << 8, 253 << 8 | 9)
    assert dm_wire.deps(answer(data)) == ["7:0", "253:9"]
    with pytest.raises(WireError):
        dm_wire.deps(answer(data[:-1]))


def test_an_answer_that_is_shorter_than_it_says_is_refused() -> None:
    message = answer(bytes(16))
    with pytest.raises(WireError, match="data from"):
        dm_wire.deps(message[:320])


def test_a_message_for_a_target_is_a_sector_and_a_text() -> None:
    assert dm_wire.message_data(8, "drop") == struct.pack("=Q", 8) + b"drop\0"
