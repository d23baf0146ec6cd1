"""The wiring helper's process, where there need be no device-mapper; more in tests/vm/guest."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bitmapd.attach.helper_frames import Frame, FrameReader, encode
from bitmapd.errors import UsageError
from bitmapd.media.blockstat import BlockStat
from dmctl.kernel.barrier import counters
from dmctl.kernel.dm_ioctl import DeviceMapper
from dmctl.kernel.dm_wire import Target
from dmctl.kernel.verbs import Helper, Request, wired
from dmctl.model.names import Layer
from dmctl.model.stack import Volume
from dmctl.model.targets import Line, Linear

SOON_S = 30.0


class Process:
    def __init__(self) -> None:
        self.sock, theirs = socket.socketpair()
        with theirs:
            theirs.set_inheritable(True)
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "dmctl.kernel.helper", "--fd", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stderr=subprocess.PIPE,
            )
        self.sock.settimeout(SOON_S)
        self._reader = FrameReader()

    def ask(self, **header: Any) -> dict[str, Any]:
        self.sock.sendall(encode(header))
        return self.answer().header

    def answer(self) -> Frame:
        while True:
            data = self.sock.recv(1 << 16)
            if not data:
                raise EOFError
            if frames := self._reader.feed(data):
                return frames[0]

    def close(self) -> None:
        self.sock.close()
        try:
            self.process.wait(SOON_S)
        finally:
            self.process.kill()
            self.process.communicate()


@pytest.fixture
def helper() -> Iterator[Process]:
    made = Process()
    try:
        yield made
    finally:
        made.close()


def test_it_ends_when_the_other_end_has_gone(helper: Process) -> None:
    assert helper.ask(id=1, verb="stat")["error"]["code"] == "wrong-state"
    helper.sock.close()
    assert helper.process.wait(SOON_S) == 0
    assert helper.process.stderr is not None
    assert helper.process.stderr.read() == b""


def test_it_ends_in_the_middle_of_a_frame_too(helper: Process) -> None:
    helper.sock.sendall(encode({"id": 1, "verb": "stat"})[:-3])
    helper.sock.close()
    assert helper.process.wait(SOON_S) == 0


def test_signals_do_not_end_it(helper: Process) -> None:
    helper.ask(id=1, verb="stat")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        helper.process.send_signal(number)
    assert helper.ask(id=2, verb="stat")["id"] == 2


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"verb": "barrier"}, "'barrier' came before 'hello'"),
        ({"verb": "hello"}, "field 'name' of 'hello' is None"),
        ({"verb": "hello", "name": 3}, "field 'name' of 'hello' is 3"),
    ],
)
def test_what_makes_no_sense_is_refused(
    helper: Process, header: dict[str, Any], reason: str
) -> None:
    answer = helper.ask(id=7, **header)
    assert answer["id"] == 7
    assert reason in answer["error"]["message"]


@pytest.mark.parametrize("text", [b"\0\0\0\2\0\0\0\0{]", encode({"verb": "stat"})])
def test_what_is_no_request_ends_it_with_one_line(helper: Process, text: bytes) -> None:
    helper.sock.sendall(text)
    with pytest.raises((EOFError, ConnectionResetError)):
        helper.answer()
    assert helper.process.wait(SOON_S) == 1
    assert helper.process.stderr is not None
    said = helper.process.stderr.read().decode()
    assert said.startswith("<3>wiring helper: FrameError: ")
    assert said.count("\n") == 1


def test_a_machine_without_device_mapper_is_told(helper: Process) -> None:
    with contextlib.suppress(OSError):
        os.close(os.open("/dev/mapper/control", os.O_RDWR))
        pytest.skip("this machine has device-mapper; see tests/vm/guest/test_helper.py")
    answer = helper.ask(
        id=1,
        verb="hello",
        name="vol",
        uuid="0" * 32,
        primary="/dev/null",
        size_bytes=1 << 20,
        logical_block_bytes=512,
        block_bytes=65536,
    )
    assert answer["error"]["code"] in {"ENOENT", "ENODEV", "EACCES", "EPERM"}
    assert "/dev/mapper/control" in answer["error"]["message"]


def test_fields_have_kinds() -> None:
    request = Request(
        {"verb": "x", "text": "a", "number": 3, "seconds": 1.5, "no": True, "segments": None}, [5]
    )
    assert (request.text("text"), request.number("number")) == ("a", 3)
    assert (request.seconds("seconds"), request.seconds("number")) == (1.5, 3.0)
    assert request.fd() == 5
    assert request.segments() is None
    for get, key in (
        (request.text, "number"),
        (request.number, "seconds"),
        (request.number, "no"),
        (request.seconds, "text"),
        (request.number, "missing"),
    ):
        with pytest.raises(UsageError, match=f"field '{key}'"):
            get(key)
    with pytest.raises(UsageError, match="0 sockets"):
        Request({}, []).fd()


def test_segments_have_a_shape() -> None:
    assert Request({"segments": [[0, 8, "gate"], [8, 9, "direct"]]}, []).segments() == (
        (0, 8, "gate"),
        (8, 9, "direct"),
    )
    for wrong in ([[0, 8]], [1], [["a", 8, "gate"]], [[None, 8, "gate"]]):
        with pytest.raises(UsageError, match="segments of another shape"):
            Request({"segments": wrong}, []).segments()
    with pytest.raises(UsageError, match="field 'segments'"):
        Request({"segments": 3}, []).segments()


def test_a_table_is_wired_in_sectors() -> None:
    table = (Line(0, 4096, Linear("7:0", 0)), Line(4096, 512, Linear("43:0", 4096)))
    assert wired(table) == [Target(0, 8, "linear", "7:0 0"), Target(8, 1, "linear", "43:0 8")]


# -- counting on --------------------------------------------------------------------------------
ZEROES = "0 " * 17


@pytest.fixture
def counting(tmp_path: Path) -> Iterator[Helper]:
    """A helper that has the counters of two layers, below a folder like /sys/dev/block."""
    volume = Volume("vol", "0" * 32, "/dev/null", 1 << 20, 512, 65536)
    mapper = DeviceMapper(os.devnull)
    made = Helper(volume, mapper)
    for layer in (Layer.ERA, Layer.TOP):
        queue = tmp_path / layer.value / "queue"
        queue.mkdir(parents=True)
        (queue / "iostats").write_text("1\n")
        (queue.parent / "stat").write_text(ZEROES)
        made._stats[layer] = BlockStat(layer.value, tmp_path)
    yield made
    for stat in made._stats.values():
        stat.close()
    mapper.close()


def switch(folder: Path, layer: Layer) -> Path:
    return folder / layer.value / "queue" / "iostats"


def test_layers_that_are_counted_are_left_alone(counting: Helper) -> None:
    assert counting._count_on() == ([], "")
    assert counting._restored == 0


def test_a_layer_that_somebody_had_not_counted_is_named_once_and_counted_again(
    counting: Helper, tmp_path: Path
) -> None:
    """Nobody read the counters meanwhile, which look as if nothing had been written."""
    stat = counting._stats[Layer.ERA]
    before = counters(stat, counting._restored)
    switch(tmp_path, Layer.ERA).write_text("0\n")
    assert counting._count_on() == (["dmctl-vol-era"], "")
    assert switch(tmp_path, Layer.ERA).read_bytes() == b"1"
    assert counters(stat, counting._restored) != before, "doubt counts as written"
    assert counting._count_on() == ([], "")


def test_a_layer_that_stays_uncounted_is_the_problem_and_keeps_none_from_being_counted(
    counting: Helper, tmp_path: Path
) -> None:
    for layer in (Layer.ERA, Layer.TOP):
        switch(tmp_path, layer).write_text("0\n")
    switch(tmp_path, Layer.ERA).unlink()  # read through a descriptor; the name leads nowhere
    switch(tmp_path, Layer.ERA).symlink_to(os.devnull)
    restored, problem = counting._count_on()
    assert restored == ["vol"]
    assert problem.startswith("/dev/mapper/dmctl-vol-era: ")
    assert problem.endswith("iostats stays 0")
