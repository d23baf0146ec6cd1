"""Formats of traces: the same requests in each, and lines that are refused."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path

import pytest

from bitmapd.errors import UsageError
from dmctl.simulate.files import load_trace
from dmctl.simulate.formats import FORMATS, detect, parse

TRACES = Path(__file__).parents[2] / "data" / "traces"
FILES = {
    "requests.csv": "csv",
    "disk.blkparse": "blkparse",
    "disk.vscsi.csv": "vscsi",
    "server_0.msr.csv": "msr",
    "job.fio2.log": "fio",
    "job.fio3.log": "fio",
}
WRITES = [(0.0, 1048576, 4096), (0.25, 0, 65536), (1.5, 2097152, 1048576), (3.0, 1052672, 4096)]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("packed", [False, True])
def test_every_format_says_the_same(name: str, packed: bool, tmp_path: Path) -> None:
    file = TRACES / name
    if packed:
        file = tmp_path / f"{name}.gz"
        file.write_bytes(gzip.compress((TRACES / name).read_bytes()))
    for form in (None, FILES[name]):
        trace = load_trace(file, form)
        found = zip(trace.time_s, trace.first_byte, trace.end_byte, strict=True)
        assert [(round(at, 6), low, high - low) for at, low, high in found] == WRITES
        assert trace.requests == 5
        assert trace.name == name.removesuffix(".csv").removesuffix(".log")


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_trace(tmp_path / "nothing")
    broken = tmp_path / "broken.gz"
    broken.write_bytes(gzip.compress(b"0,W,0,512\n" * 1000)[:-12])
    with pytest.raises(UsageError, match=r"broken\.gz: this is neither text nor a whole gzip"):
        load_trace(broken)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="binary: this is neither"):
        load_trace(binary)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("before", [b"", b"0,W,0,512\n" * 2000])
def test_one_endless_line_is_not_read_into_memory(
    tmp_path: Path, packed: bool, before: bytes
) -> None:
    """A gigabyte in one line; packed it is a megabyte on the disk."""
    endless = tmp_path / "endless"
    with gzip.open(endless, "wb", compresslevel=1) if packed else open(endless, "wb") as stream:
        stream.write(before)
        if packed:
            for _ in range(64):
                stream.write(bytes(1 << 20))
        else:
            stream.truncate(1 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match="line is longer than 16384 bytes") as caught:
            load_trace(endless)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert f"line {before.count(10) + 1}:" in caught.value.message


@pytest.mark.parametrize(
    ("form", "line", "reason"),
    [
        ("csv", "1.0,W,0", "3 columns, not 4 (time_s,op,offset_bytes,length_bytes)"),
        ("csv", "soon,W,0,512", "time 'soon' is not a number"),
        ("csv", "nan,W,0,512", "time 'nan' is out of range"),
        ("csv", "-1,W,0,512", "time '-1' is out of range"),
        ("csv", "1,X,0,512", "op 'X' is none of R W Z T"),
        ("csv", "1,W,0x10,512", "offset '0x10' is not a whole number"),
        ("csv", "1,W,-512,512", "offset '-512' is out of range"),
        ("csv", f"1,W,0,{1 << 63}", "is out of range"),
        ("vscsi", "1,2,write,512,0", "op 'write' is not a SCSI operation code"),
        ("vscsi", "1,2,2a,512,x", "lbn 'x'"),
        ("msr", "1,h,0,Write,0,512", "6 columns, not 7"),
        ("msr", "1,h,0,Trim,0,512,1", "type 'Trim' is neither Read nor Write"),
        ("blkparse", "8,0 3 1 Q W 1 + 1", "not a line of blkparse's default output"),
        ("blkparse", "8,0 3 1 0.5 9 Q W x + 1 [a]", "sector 'x' is not a whole number"),
        ("fio", "/dev/sdb write 0 512", "not an iolog of fio, version 2 or 3"),
        ("fio", "fio version 1 iolog", "not an iolog of fio, version 2 or 3"),
    ],
)
def test_a_bad_line_is_named(form: str, line: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        list(parse("a.trace", ["# comment\n", "\n", line + "\n"], form))
    assert caught.value.message.startswith("a.trace, line 3: ")
    assert reason in caught.value.message


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/dev/sdb erase 0 512", "neither 'FILE ACTION' nor"),
        ("/dev/sdb write 0", "neither 'FILE ACTION' nor"),
        ("/dev/sdb write zero 512", "offset 'zero'"),
        ("/dev/sdb wait long 0", "wait 'long'"),
        ("/dev/sdc write 0 512", "a request to '/dev/sdc', after others to '/dev/sdb': keep one"),
    ],
)
def test_a_bad_line_of_an_iolog(line: str, reason: str) -> None:
    lines = ["fio version 2 iolog", "/dev/sdb write 0 512", line]
    with pytest.raises(UsageError, match="line 3") as caught:
        list(parse("a", lines))
    assert reason in caught.value.message


@pytest.mark.parametrize(
    ("form", "line"),
    [
        ("csv", "0,{},0,512"),
        ("csv", "{},W,0,512"),
        ("csv", "0,W,0,{}"),
        ("vscsi", "1,2,2a,{},0"),
        ("msr", "1,h,0,{},0,512,1"),
        ("fio", "fio version 2 iolog\nf write 0 512\n{} write 0 512"),
    ],
)
@pytest.mark.parametrize("filling", ["\0" * 100_000, "-" + "9" * 4000])
def test_what_is_quoted_of_a_line_is_short_however_long_the_line(
    form: str, line: str, filling: str
) -> None:
    with pytest.raises(UsageError) as caught:
        list(parse("a", line.replace("{}", filling).splitlines(), form))
    assert repr(filling[:40])[:-1] in caught.value.message
    assert len(caught.value.message) < 400


def test_an_action_without_a_place_moves_nothing() -> None:
    lines = ["fio version 3 iolog", "0 f write", "1 f write 0 512", "2 f wait"]
    assert len(list(parse("a", lines))) == 1


def test_requests_to_a_second_device_are_refused() -> None:
    with pytest.raises(UsageError, match="line 2: a request to 'web disk 1', after others to 'web"):
        list(parse("a", ["1,web,0,Write,0,512,1", "2,web,1,Write,0,512,1"]))
    events = ["8,0 3 1 0.5 9 Q W 0 + 8 [a]", "8,16 3 1 0.5 9 Q W 0 + 8 [a]"]
    with pytest.raises(UsageError, match="a request to '8,16'"):
        list(parse("a", events))


@pytest.mark.parametrize(("events", "count"), [("QGD", 1), ("GDC", 1), ("CC", 2), ("GG", 0)])
def test_one_kind_of_event_counts(events: str, count: int) -> None:
    lines = [f"8,0 3 {n} 0.5 9 {event} W 0 + 8 [a]" for n, event in enumerate(events)]
    assert len(list(parse("a", lines, "blkparse"))) == count


@pytest.mark.parametrize(
    "line",
    [
        "8,0 3 1 0.5 9 Q N 0 + 8 [a]",
        "8,0 3 1 0.5 9 Q WS 0 [a]",
        "8,0 3 1 0.5 9 Q W 0 +",
        "8,0 3 1 0.5 9 Q",
    ],
)
def test_events_that_move_no_data_are_passed_over(line: str) -> None:
    assert list(parse("a", ["8,0 3 1 0.5 9 Q R 0 + 8 [a]", line])) == list(
        parse("a", ["8,0 3 1 0.5 9 Q R 0 + 8 [a]"])
    )


def test_column_names_are_passed_over_anywhere() -> None:
    columns = {
        "vscsi": "version,time,op,size,lbn",
        "msr": "Timestamp,Hostname,DiskNumber,Type,Offset,Size,ResponseTime",
        "csv": "time_s,op,offset_bytes,length_bytes",
    }
    for form, line in columns.items():
        assert list(parse("a", [line, line], form)) == []
        assert detect("a", [line]) == form


def test_more_lines_than_are_looked_at_first() -> None:
    lines = (f"{i},W,{i * 512},512\n" for i in range(2500))
    assert [r.offset_bytes for r in parse("a", lines)] == [i * 512 for i in range(2500)]


def test_a_format_has_a_known_name() -> None:
    with pytest.raises(UsageError, match="'tape' is not a format"):
        parse("a.trace", [], "tape")


@pytest.mark.parametrize("text", ["", "hello", "a,b", "1,X,2,3"])
def test_what_is_not_known_is_not_guessed(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse("a.trace", [text])
    assert caught.value.message == "a.trace: the format of this trace is not known"
    assert all(form in str(caught.value.hint) for form in FORMATS)
