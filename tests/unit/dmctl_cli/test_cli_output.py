"""Tables, colours, questions, progress, and what several errors become."""

from __future__ import annotations

import errno
import io
import json
from typing import Any

import pytest

from bitmapd.config import ConfigError, Problem
from bitmapd.errors import BitmapdError, BusyError, NotFoundError, UsageError
from dmctl.cli.context import combine, worst
from dmctl.cli.output import Output, OutputLost


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def new_output(
    environment: dict[str, str] | None = None,
    *,
    tty: bool = False,
    typed: str = "",
    **options: Any,
) -> tuple[Output, io.StringIO, io.StringIO]:
    kind = Terminal if tty else io.StringIO
    out, err = kind(), kind()
    stdin = kind(typed)
    output = Output(environment or {}, stdout=out, stderr=err, stdin=stdin, **options)
    return output, out, err


def test_a_table_is_aligned_and_ends_no_line_with_blanks() -> None:
    output, out, _ = new_output()
    output.table(["A", "LONG"], [["green:in-sync", "1"], ["x", ""]])
    assert out.getvalue() == "A        LONG\nin-sync  1\nx\n"


def test_colours_only_on_a_terminal_and_without_no_color() -> None:
    for environment, tty, coloured in (
        ({}, True, True),
        ({}, False, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, True, False),
    ):
        output, out, err = new_output(environment, tty=tty)
        output.table(["A"], [["red:failed"]])
        output.error(BitmapdError("no"))
        assert ("\033[31mfailed\033[0m" in out.getvalue()) is coloured
        assert ("\033[31merror" in err.getvalue()) is coloured


def test_what_is_said_depends_on_quiet_and_verbose() -> None:
    output, _, err = new_output(quiet=True)
    output.say("a")
    output.detail("b")
    assert err.getvalue() == ""
    output, _, err = new_output()
    output.say("a")
    output.detail("b")
    assert err.getvalue() == "a\n"
    output.verbose = 1
    output.detail("b")
    assert err.getvalue() == "a\nb\n"


def test_errors_are_told_even_if_quiet() -> None:
    output, _, err = new_output(quiet=True)
    output.error(BitmapdError("broken", "mend it"), "cannot start 'v'")
    assert err.getvalue() == "dmctl: error: cannot start 'v': broken\nhint: mend it\n"


HOSTILE = "a\x1b[2Jb\rc\x9bd\u202ee\udcfff\x00"
HARMLESS = "a\\x1b[2Jb\\rc\\x9bd\\u202ee\\udcfff\\x00"


def test_2_nothing_from_elsewhere_commands_the_terminal() -> None:
    output, out, err = new_output(tty=True, typed="y\n", verbose=1)
    output.line(HOSTILE)
    output.text(f"{HOSTILE}\nmore\n")
    output.table(["A"], [[HOSTILE], [f"green:{HOSTILE}\n"]])
    output.say(HOSTILE)
    output.detail(HOSTILE)
    output.error(BitmapdError(HOSTILE, HOSTILE), HOSTILE)
    output.confirm(HOSTILE, HOSTILE, yes=False)
    said = out.getvalue() + err.getvalue()
    assert said.count(HARMLESS) == 11
    for ours in ("\033[31m", "\033[32m", "\033[0m", "\n"):
        said = said.replace(ours, "")
    assert said.isprintable()


def test_2_a_message_of_several_lines_has_one_beginning() -> None:
    output, _, err = new_output()
    output.error(BitmapdError("no\ndmctl: error: the disk is lost\n  a reason\x1b"))
    assert err.getvalue() == (
        "dmctl: error: no\n  dmctl: error: the disk is lost\n  a reason\\x1b\n"
    )


def test_2_json_is_exact_and_escaped() -> None:
    output, out, _ = new_output()
    output.event({"name": HOSTILE})
    assert json.loads(out.getvalue()) == {"name": HOSTILE}
    output.json("status", {"name": HOSTILE})
    output.json_error(BitmapdError(HOSTILE))
    assert out.getvalue().isascii()
    assert out.getvalue().replace("\n", "").isprintable()


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "full")


def test_3_a_full_stdout_is_reported_and_a_full_stderr_is_not() -> None:
    output = Output({}, stdout=Full(), stderr=Full(), stdin=Terminal("y\n"))
    output.say("a")
    output.error(BitmapdError("b", "c"))
    output.confirm("lost", "Do it?", yes=False)
    for write in (output.line, output.text, lambda text: output.json(text, {})):
        with pytest.raises(OutputLost):
            write("text")


def test_json_has_its_version() -> None:
    output, out, _ = new_output()
    output.json("status", {"volumes": []})
    assert json.loads(out.getvalue()) == {
        "output_version": {"command": "status", "major": 1, "minor": 0},
        "volumes": [],
    }


def test_questions() -> None:
    output, _, err = new_output(tty=True, typed="y\n")
    output.confirm("the data would be lost", "Do it?", yes=False)
    assert err.getvalue() == "the data would be lost.\nDo it? [y/N] "
    for answer in ("n\n", "\n", ""):
        output, _, _ = new_output(tty=True, typed=answer)
        with pytest.raises(BitmapdError, match="not confirmed"):
            output.confirm("lost", "Do it?", yes=False)
    output, _, err = new_output()
    output.confirm("lost", "Do it?", yes=True)
    assert err.getvalue() == ""
    with pytest.raises(UsageError, match="no terminal") as caught:
        output.confirm("lost", "Do it?", yes=False)
    assert "--yes" in str(caught.value.hint)


def test_progress_is_shown_on_a_terminal_only() -> None:
    output, _, err = new_output(tty=True)
    with output.progress("copying") as bar:
        bar(0.5)
        bar(2.0)
    assert "copying" in err.getvalue()
    output, _, err = new_output()
    with output.progress("copying") as bar:
        bar(0.5)
    assert err.getvalue() == ""


def test_the_worst_of_several_statuses() -> None:
    assert worst([]) == 0
    assert worst([0, 0]) == 0
    assert worst([0, 101, 14]) == 14
    assert worst([101, 1, 2]) == 1


def test_several_errors_become_one_of_the_worst_class() -> None:
    one = combine([NotFoundError("gone", "look")], "cannot do it")
    assert (type(one), one.message, one.hint) == (NotFoundError, "cannot do it: gone", "look")
    config = ConfigError([Problem("file", "key", "wrong")])
    several = combine([NotFoundError("gone"), BusyError("busy", "wait"), config], "cannot do it")
    assert type(several) is UsageError
    assert several.message == (
        "cannot do it, for 3 reasons:\n  gone\n  busy (wait)\n  file: key: wrong"
    )
    assert type(combine([BitmapdError("x")], "d")) is BitmapdError
    twice = combine([BusyError("busy", "wait"), BusyError("busy", "wait")], "cannot do it")
    assert (twice.message, twice.hint) == ("cannot do it: busy", "wait")
