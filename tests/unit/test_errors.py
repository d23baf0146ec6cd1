"""errors: class = code = exit status, there and back over the control socket."""

from __future__ import annotations

import errno
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd import errors
from bitmapd.errors import (
    BitmapdError,
    BusyError,
    PermissionError_,
    UsageError,
    error_from_json,
    explain,
    printable,
    refused,
)

CLASSES = [
    found
    for found in vars(errors).values()
    if isinstance(found, type) and issubclass(found, BitmapdError)
]


def test_exit_statuses_are_those_of_the_command_line_contract() -> None:
    assert {found.code: found.exit_status for found in CLASSES} == {
        "failed": 1,
        "usage": 2,
        "not-found": 10,
        "exists": 11,
        "busy": 12,
        "no-space": 13,
        "wrong-state": 14,
        "unreachable": 15,
        "split-brain": 16,
        "record-damaged": 20,
        "format-too-new": 21,
        "foreign-record": 22,
        "permission": 30,
        "time-out": 40,
        "degraded": 100,
        "differences": 101,
    }
    assert len(CLASSES) == 16, "no two classes share a code"


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.code)
@pytest.mark.parametrize("hint", [None, "do something else"])
def test_an_error_survives_the_way_through_json(kind: type[BitmapdError], hint: str | None) -> None:
    error = kind("it failed", hint)
    again = error_from_json(json.loads(json.dumps(error.to_json())))
    assert type(again) is kind
    assert (again.message, again.hint, str(again)) == ("it failed", hint, "it failed")
    assert again.to_json() == error.to_json()


def test_json_has_the_keys_of_the_contract() -> None:
    assert BusyError("taken", "wait").to_json() == {
        "code": "busy",
        "exit_status": 12,
        "message": "taken",
        "hint": "wait",
    }


@pytest.mark.parametrize("data", [{}, {"code": "from-the-future"}, {"code": None}])
def test_what_is_not_known_is_a_plain_failure(data: dict[str, object]) -> None:
    error = error_from_json(data)
    assert type(error) is BitmapdError
    assert (error.message, error.hint, error.exit_status) == ("unknown error", None, 1)


def test_an_error_has_no_hint_unless_there_is_one() -> None:
    assert UsageError("no").hint is None


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(28, "No space left on device", "/etc/x"), "no-space", "/etc/x: No space left on"),
        (OSError(28, "No space left on device"), "no-space", "volume 'v': No space left on device"),
        (OSError(2, "No such file or directory", "/x"), "not-found", "/x: No such file"),
        (OSError(30, "Read-only file system", "/x"), "permission", "/x: Read-only"),
        (OSError(5, "Input/output error"), "failed", "volume 'v': Input/output error"),
        (OSError("timed out"), "failed", "volume 'v': timed out"),
    ],
)
def test_a_system_error_names_the_file_or_what_it_is_about(
    error: OSError, code: str, message: str
) -> None:
    found = explain(error, "volume 'v'")
    assert found.code == code
    assert found.message.startswith(message)


def test_a_system_error_about_nothing_that_is_known() -> None:
    assert explain(OSError(5, "Input/output error")).message == "Input/output error"


@given(st.text())
def test_printable_text_is_printable_and_stays_as_it_is(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert printable(shown) == shown
    kept = printable(text, keep="\n")
    assert kept.replace("\n", "").isprintable()
    assert kept.count("\n") == text.count("\n")


def test_a_refusal_has_the_class_of_its_number() -> None:
    error = refused(OSError(errno.EACCES, "Permission denied"), "cannot open it", "be root")
    assert type(error) is PermissionError_
    assert (error.message, error.hint) == ("cannot open it: Permission denied", "be root")
    assert type(refused(OSError("odd"), "cannot")) is BitmapdError
    assert refused(OSError("odd"), "cannot").message == "cannot: odd"
